"""Counter-based random numbers: hashes, uniform numbers and permutations as pure functions of their key."""

from __future__ import annotations

import numpy as np

ROUNDS = 6  # Feistel rounds


def mix(*words: np.ndarray | int) -> np.ndarray:
    """Hash integers (arrays broadcast) to uint64: splitmix64's finalizer (Steele, Lea, Flood 2014), once per word."""
    with np.errstate(over="ignore"):
        h: np.ndarray = np.zeros((), np.uint64)
        for word in words:
            h = (h ^ np.asarray(word).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            h = h ^ (h >> np.uint64(31))
    return h


def uniform(*words: np.ndarray | int) -> np.ndarray:
    """Float64 in [0, 1) as a hash of integers."""
    return (mix(*words) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(index: np.ndarray, size: np.ndarray | int, key: np.ndarray | int) -> np.ndarray:
    """Image of `index` [n] (0 ≤ index < size) under a permutation of `size` items chosen by `key`; int64 [n].

    A Feistel network over the next power of four, walked until it lands below `size` (cycle walking; Black and Rogaway
    2002). `size` and `key` may differ per element.
    """
    index, size, key = np.broadcast_arrays(
        np.asarray(index, np.uint64), np.asarray(size, np.uint64), np.asarray(key, np.uint64)
    )
    length = np.frexp((size - np.uint64(1)).astype(np.float64))[1]  # bit length of the largest index
    bits = np.maximum(1, (length + 1) // 2).astype(np.uint64)  # of each half
    low = (np.uint64(1) << bits) - np.uint64(1)
    out, todo = np.zeros(index.shape, np.uint64), np.arange(index.size)
    value = index.copy()
    while todo.size:
        v, b, m, k = value[todo], bits[todo], low[todo], key[todo]
        left, right = v >> b, v & m
        for i in range(ROUNDS):
            left, right = right, left ^ (mix(k, i, right) & m)
        value[todo] = out[todo] = (left << b) | right
        todo = todo[out[todo] >= size[todo]]
    return out.astype(np.int64)
