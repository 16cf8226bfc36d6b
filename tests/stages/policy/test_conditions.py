"""A policy acts without the conditions that its training always dropped."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from dvla.cache.vlm.tiny_qwen3vl import make_tiny_qwen3vl
from dvla.stages.policy import policy as policy_module
from dvla.stages.policy.document import read_document
from dvla.stages.policy.observation import Observation
from dvla.stages.policy.policy import Policy
from support.run_samples import TINY, VIEWS, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conditions")
    return make_run(folder / "run", make_tiny_qwen3vl(folder / "vlm", TINY))


@pytest.mark.parametrize("condition", ["text", "proprio", "images"])
def test_what_was_always_dropped_changes_nothing(run: Path, condition: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images = {view: np.full((48, 48, 3), 40 + 60 * i, np.uint8) for i, view in enumerate(VIEWS)}
    seen = Observation(images, "open the door", np.array([0.1, -0.2, 0.3], np.float32), 0, 0)
    null = {"text": {"instruction": ""}, "images": {"images": {v: np.zeros_like(i) for v, i in images.items()}}}
    null["proprio"] = {"state": np.array([0.4, 0.4, 0.4], np.float32)}
    other = dataclasses.replace(seen, **null[condition])

    def act(share: float) -> list[np.ndarray]:
        def read(folder: Path) -> dict:
            document = read_document(folder)
            return document | {"conditions": document["conditions"] | {"masking": {condition: share}}}

        monkeypatch.setattr(policy_module, "read_document", read)
        policy = Policy.from_pretrained(run)
        return [policy.act_batch([one]) for one in (seen, other)]

    (one, two), (with_it, without) = act(1.0), act(0.9)
    np.testing.assert_array_equal(one, two)
    assert np.abs(with_it - without).max() > 1e-3
    if condition != "proprio":  # whose null, zeros of the normalized state, no state need have
        np.testing.assert_allclose(one, without, atol=5e-4)
