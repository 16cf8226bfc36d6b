"""What a fine-tuning run leaves in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from dvla.stages.training.stage_three import finetune as finetune_module


@contextlib.contextmanager
def caught_encoders() -> Iterator[list[Any]]:
    """The encoders that fine-tuning loads meanwhile: afterwards they are as training left them."""
    encoders: list[Any] = []
    load = finetune_module.load_policy_encoder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune_module, "load_policy_encoder", lambda *a: encoders.append(load(*a)) or encoders[0])
        yield encoders
