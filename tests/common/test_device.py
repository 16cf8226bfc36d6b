"""`--device`, where there are GPUs: pretended."""

from __future__ import annotations

import pytest
import torch

from dvla.common.device import pick_device
from dvla.errors import UserError


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Two GPUs, and what is asked of cuDNN's attention."""
    asked: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", asked.append)
    return asked


def test_a_gpu_that_is_not_there_is_refused(two_gpus: list[bool]) -> None:
    with pytest.raises(UserError, match="cuda:0 to cuda:1"):
        pick_device("cuda:7")
    assert [str(pick_device(name)) for name in ("auto", "cuda", "cuda:1", "cpu")] == ["cuda", "cuda", "cuda:1", "cpu"]


def test_cudnn_attention_is_off_on_a_gpu(two_gpus: list[bool]) -> None:
    pick_device("cpu")
    assert two_gpus == []
    pick_device("cuda")
    assert two_gpus == [False]
