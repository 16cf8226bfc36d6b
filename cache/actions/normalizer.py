"""Normalization of unified vectors to [-1, 1]: mean ± 5·max(std, 0.01) per dataset and slot."""

from __future__ import annotations

import numpy as np

from .statistics import Statistics

STD_FLOOR = 0.01  # in the slot's own unit
STD_MULTIPLE = 5.0  # half of the normalized range, in standard deviations


class Normalizer:
    """Unified vectors ↔ network range for one dataset, in float32.

    `center`, `half_range` float32 [128]: 0, 1 in 6D slots (left as they are, never clipped) and where inactive.
    """

    def __init__(self, stats: Statistics, mask: np.ndarray, rotation_slots: np.ndarray) -> None:
        self.mask, self.rotation_slots = np.asarray(mask, dtype=bool), np.asarray(rotation_slots, dtype=bool)
        scaled = self.mask & ~self.rotation_slots
        self.center = np.where(scaled, stats.mean, 0.0).astype(np.float32)
        self.half_range = np.where(scaled, STD_MULTIPLE * np.maximum(stats.std, STD_FLOOR), 1.0).astype(np.float32)

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """`x [..., 128]` → float32 [..., 128] in [-1, 1], clipped; 6D rotation slots unchanged; 0 where inactive."""
        x = np.asarray(x, dtype=np.float32)
        scaled = np.clip((x - self.center) / self.half_range, -1.0, 1.0)
        return np.where(self.mask, np.where(self.rotation_slots, x, scaled), np.float32(0))

    def denormalize(self, x: np.ndarray) -> np.ndarray:
        """Inverse of `normalize` where nothing was clipped; 0 where inactive."""
        x = np.asarray(x, dtype=np.float32)
        return np.where(self.mask, x * self.half_range + self.center, np.float32(0))
