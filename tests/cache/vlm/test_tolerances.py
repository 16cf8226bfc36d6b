"""The promise of docs/concepts.md on features: the same bits in the same batches, equal up to rounding in others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dvla.cache.vlm.encoder import VisionLanguageEncoder
from dvla.cache.vlm.load import load_encoder
from dvla.cache.vlm.spec import EncoderSpec
from dvla.cache.vlm.tiny_paligemma2 import TinyPaliGemmaSpec, make_tiny_paligemma2
from dvla.cache.vlm.tiny_qwen3vl import TinySpec, make_tiny_qwen3vl
from support.tolerances import assert_same_actions, assert_same_features, rows_that_decide_the_rounding
from support.vlm_samples import smooth_images

KINDS: dict[str, dict[str, Any]] = {
    "merged": {},
    "patch": {"features": "patch"},
    "hidden": {"boundary": 1},
    "language": {"vlm": "paligemma2", "resolution": 56, "tokens": 4, "depth": "language"},
}


@pytest.fixture(scope="module", params=KINDS)
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageEncoder:
    folder = tmp_path_factory.mktemp("vlm") / "tiny"
    if request.param == "language":
        make_tiny_paligemma2(folder, TinyPaliGemmaSpec(image_size=56, vocabulary=600))
    else:
        make_tiny_qwen3vl(folder, TinySpec(vocabulary=512, init_std=0.1))
    return load_encoder(
        EncoderSpec(**{"path": str(folder), "resolution": 64, "dtype": "float32", **KINDS[request.param]})
    )


def in_batches(encoder: VisionLanguageEncoder, size: int) -> torch.Tensor:
    images = smooth_images(11, 48, 64)
    with torch.inference_mode():
        return torch.cat(
            [encoder.encode_observation([images[at : at + size]], "push") for at in range(0, len(images), size)]
        )


def test_other_batches_change_no_more_than_the_rounding(encoder: VisionLanguageEncoder) -> None:
    """On this processor, and on one whose products round by their rows."""
    here = in_batches(encoder, 11)
    assert torch.equal(in_batches(encoder, 11), here)
    with rows_that_decide_the_rounding():
        there = in_batches(encoder, 11)
        assert torch.equal(in_batches(encoder, 11), there) and not torch.equal(there, here)
        for size in (1, 2, 3, 8):
            found = in_batches(encoder, size)
            assert not torch.equal(found, there)
            for a, b in (
                (found, there),
                (found.half(), there.half()),
                (found.half(), there),
                (found.half(), here.half()),
            ):
                assert_same_features(a, b)
    for size in (1, 2, 3, 8):
        assert_same_features(in_batches(encoder, size), here)


def test_what_is_not_the_rounding_is_seen() -> None:
    values = np.random.default_rng(0).normal(size=(5, 4, 32))
    half = values.astype(np.float16)
    assert_same_features(half, values)
    assert_same_features(np.nextafter(half, np.float16(9)), half)  # one step, everywhere
    large = np.unravel_index(np.abs(half).argmax(), half.shape)
    other, moved, swapped = half.copy(), values.copy(), half[[1, 0, 2, 3, 4]]
    other[large] = np.nextafter(np.nextafter(half[large], np.float16(9)), np.float16(9))
    moved[large] += 2e-5
    for a, b in ((other, half), (moved, values), (swapped, half), (np.zeros_like(half), half)):
        with pytest.raises(AssertionError, match="of the features' RMS beyond one step"):
            assert_same_features(a, b)
    assert_same_features(1.01 * values, values, "int8")
    for dtype, factor in (("int8", 1.03), ("float8_e4m3fn", 1.07)):
        with pytest.raises(AssertionError, match="of the features' RMS"):
            assert_same_features(factor * values, values, dtype)
    assert_same_actions(values + 1e-3, values)
    with pytest.raises(AssertionError, match="of their spread"):
        assert_same_actions(values + 3e-3, values)
