"""Normalization of unified vectors to about [-1, 1] per dataset and slot, which inverts on the data it was made from.

    scheme    center             half range                             values beyond ±1
    std5      mean               5·max(std, 0.01), or up to min, max    clipped; the data holds none
    minmax    (min + max) / 2    max((max − min) / 2, 0.01)             clipped; the data holds none
    meanstd   mean               max(std, 0.01)                         kept
    quantile  (q01 + q99) / 2    max((q99 − q01) / 2, 0.01)             kept

0.01, in the slot's own unit, keeps a nearly constant slot from being blown up. `quantile` takes min and max where 98 %
of the values are that close, as for a gripper that rarely closes. `std5-clipped` is what earlier releases did and their
runs keep: std5 without reaching up to min and max, so that rare values far from the mean were cut off.
"""

from __future__ import annotations

import numpy as np

from ...errors import unknown
from .schemes import EARLIER, SCHEMES, Scheme
from .statistics import Statistics

FLOOR = 0.01  # of the std or half range, in the slot's own unit
STD_MULTIPLE = 5.0  # of std5: half of the normalized range, in standard deviations
LOW, HIGH = 0.01, 0.99  # the quantiles of `quantile`


class Normalizer:
    """Unified vectors ↔ network range for one dataset, in float32.

    `center`, `half_range` float32 [128]: 0, 1 in 6D slots (left as they are, never clipped) and where inactive.
    `limit`: normalized values are clipped to ±limit, which may be infinite. `UserError` for an unknown scheme.
    """

    def __init__(
        self, stats: Statistics, mask: np.ndarray, rotation_slots: np.ndarray, scheme: Scheme = "std5"
    ) -> None:
        if scheme not in SCHEMES:
            raise unknown("normalization", scheme, SCHEMES)
        self.mask, self.rotation_slots = np.asarray(mask, dtype=bool), np.asarray(rotation_slots, dtype=bool)
        self.scheme, self.scaled = scheme, self.mask & ~self.rotation_slots
        self.limit = np.float32(np.inf if scheme in ("meanstd", "quantile") else 1.0)
        center, half_range = _scale(stats, scheme)
        self.center = np.where(self.scaled, center, 0.0).astype(np.float32)
        self.half_range = np.where(self.scaled, half_range, 1.0).astype(np.float32)

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """`x [..., 128]` → float32 [..., 128]; 6D rotation slots unchanged; 0 where inactive."""
        x = np.asarray(x, dtype=np.float32)
        scaled = np.clip((x - self.center) / self.half_range, -self.limit, self.limit)
        return np.where(self.mask, np.where(self.rotation_slots, x, scaled), np.float32(0))

    def denormalize(self, x: np.ndarray) -> np.ndarray:
        """Inverse of `normalize` where nothing was clipped; 0 where inactive."""
        x = np.asarray(x, dtype=np.float32)
        return np.where(self.mask, x * self.half_range + self.center, np.float32(0))

    def clips(self, stats: Statistics) -> np.ndarray:
        """[128] bool: slots of which a value of the data with these statistics is cut off."""
        reach = np.maximum(stats.max - self.center, self.center - stats.min)
        return self.scaled & (reach > self.half_range * (self.limit + 1e-6))


def _scale(stats: Statistics, scheme: Scheme) -> tuple[np.ndarray, np.ndarray]:
    """(center, half range) float64 [128]. `ValueError` for `quantile` of statistics without quantiles."""
    if scheme == "meanstd":
        return stats.mean, np.maximum(stats.std, FLOOR)
    if scheme in ("std5", EARLIER):
        half_range = STD_MULTIPLE * np.maximum(stats.std, FLOOR)
        if scheme == "std5":
            half_range = np.maximum(half_range, np.maximum(stats.max - stats.mean, stats.mean - stats.min))
        return stats.mean, half_range
    low, high = stats.min, stats.max
    if scheme == "quantile":
        if stats.quantiles is None:
            raise ValueError("normalization by quantiles needs statistics with quantiles")
        first, last = stats.quantiles[LOW], stats.quantiles[HIGH]
        narrow = last - first < 2 * FLOOR
        low, high = np.where(narrow, low, first), np.where(narrow, high, last)
    return (low + high) / 2, np.maximum((high - low) / 2, FLOOR)
