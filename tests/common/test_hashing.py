"""Permutations as pure functions of their key."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dvla.common.hashing import permute


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 1025, 4096, 70_001])
def test_permute_is_a_permutation_that_its_key_chooses(size: int) -> None:
    images = [permute(np.arange(size), size, key) for key in (0, 1, 2**63 + 5)]
    for image in images:
        np.testing.assert_array_equal(np.sort(image), np.arange(size))
    if size > 16:
        assert all((a != b).any() for a, b in itertools.combinations([np.arange(size), *images], 2))
    if size > 1000:  # no trend: correlation with the identity is noise
        assert all(abs(np.corrcoef(image, np.arange(size))[0, 1]) < 4 / np.sqrt(size) for image in images)
    some = np.random.default_rng(0).integers(0, size, 50)
    np.testing.assert_array_equal(permute(some, size, 1), images[1][some])


def test_permute_with_mixed_sizes_is_elementwise() -> None:
    sizes, keys = np.array([3, 1000, 1, 77, 2]), np.array([1, 2, 3, 4, 5])
    together = permute(np.array([2, 999, 0, 5, 1]), sizes, keys)
    alone = [permute(np.array([i]), s, k)[0] for i, s, k in zip([2, 999, 0, 5, 1], sizes, keys)]
    np.testing.assert_array_equal(together, alone)
