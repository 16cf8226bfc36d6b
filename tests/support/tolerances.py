"""How far features, and actions made from them, may differ when images were encoded in batches of another composition.

The promise is in docs/concepts.md: the same batches give the same bits; other batches, processors and numbers of
threads give the same features up to rounding. Every test that compares across batches uses `assert_same_features` or
`assert_same_actions`; every other one compares bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dvla.stages.caching.upkeep.verify import TOLERANCE

OF_RMS = 1e-5  # of the features' RMS: what a float32 encoder's sums differ by; 5e-6 measured, on 24 blocks of width 512
OF_SPREAD = 2e-3  # of the actions' standard deviation


def assert_same_features(found: Any, expected: Any, dtype: str = "float16") -> None:
    """The features [..., K, D] of a float32 encoder, of the same images in batches of another composition.

    `dtype` is what the cache stores. float16: each value differs by at most one step of float16 (0 where both are
    float32) and `OF_RMS` of the RMS of all. 8-bit codes may have been made with other channel scales: the RMS of the
    difference is at most what `dvla cache verify` allows.
    """
    a, b = (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x) for x in (found, expected))
    assert a.shape == b.shape and np.isfinite(a).all()
    rounded = np.float16 in (a.dtype, b.dtype)
    a, b = a.astype(np.float64), b.astype(np.float64)
    rms = np.sqrt(np.square(b).mean())
    assert rms > 0
    if dtype != "float16":
        relative = np.sqrt(np.square(a - b).mean()) / rms
        assert relative <= TOLERANCE[dtype], f"the difference is {relative:.2g} of the features' RMS"
        return
    step = np.spacing(np.maximum(np.abs(a), np.abs(b)).astype(np.float16)).astype(np.float64) if rounded else 0.0
    beyond = np.abs(a - b) - step
    at = np.unravel_index(beyond.argmax(), a.shape)
    assert beyond.max() <= OF_RMS * rms, (
        f"{beyond.max() / rms:.2g} of the features' RMS beyond one step of float16, at {at}"
    )


def assert_same_actions(found: np.ndarray, expected: np.ndarray) -> None:
    """Actions [..., T, d] of one policy for the same observations, in batches of another composition."""
    difference = np.abs(np.asarray(found) - np.asarray(expected)).max()
    assert difference <= OF_SPREAD * np.std(expected), (
        f"actions differ by {difference / np.std(expected):.2g} of their spread"
    )


@contextlib.contextmanager
def rows_that_decide_the_rounding() -> Iterator[None]:
    """As on a processor whose matrix product takes another kernel for another number of rows, and for leftover rows.

    Each sum is split in two, at a place that the number of rows decides. The same rows always give the same bits.
    """
    real = F.linear

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        rows = x.flatten(0, -2)  # [M,K]
        left = len(rows) % 16

        def product(part: torch.Tensor, kernel: int) -> torch.Tensor:
            at = 1 + kernel * 2654435761 % 2**32 % (weight.shape[1] - 1)  # Knuth's multiplicative hash
            return real(part[:, :at], weight[:, :at]) + real(part[:, at:], weight[:, at:], bias)

        parts = [product(rows[: len(rows) - left], len(rows) // 16), product(rows[len(rows) - left :], left)]
        return torch.cat(parts).unflatten(0, x.shape[:-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", linear)
        yield
