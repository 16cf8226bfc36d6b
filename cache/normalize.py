"""Per-dataset statistics of unified vectors, and the normalisation to [-1, 1] made from them. Pure functions of tables.

center = mean, half_range = 5 · max(std, 0.01): the floor keeps a nearly constant dimension from being blown up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

STD_FLOOR = 0.01      # in the slot's own unit
STD_MULTIPLE = 5.0    # half of the normalised range, in standard deviations


@dataclass(frozen=True)
class Statistics:
    """Moments of `count` vectors. All arrays float64 [128]; `std` is the population's (divided by count)."""

    mean: np.ndarray
    std: np.ndarray
    min: np.ndarray
    max: np.ndarray
    count: int

    def merge(self, other: "Statistics") -> "Statistics":
        """Statistics of both sets together (Chan, Golub, LeVeque 1979); exact up to rounding."""
        count = self.count + other.count
        gap = other.mean - self.mean
        squares = self.count * self.std**2 + other.count * other.std**2 + gap**2 * (self.count * other.count / count)
        return Statistics(self.mean + gap * (other.count / count), np.sqrt(squares / count),
                          np.minimum(self.min, other.min), np.maximum(self.max, other.max), count)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; floats survive the round trip exactly."""
        arrays = {k: getattr(self, k).tolist() for k in ("mean", "std", "min", "max")}
        return {**arrays, "count": self.count}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Statistics":
        """Inverse of `to_dict`."""
        arrays = {k: np.array(values[k], dtype=np.float64) for k in ("mean", "std", "min", "max")}
        return cls(**arrays, count=int(values["count"]))


class RunningStatistics:
    """Statistics of a stream of tables in one pass and constant memory."""

    def __init__(self) -> None:
        self._total: Statistics | None = None

    def update(self, x: np.ndarray) -> None:
        """Add the rows of `x [n, D]`; n = 0 adds nothing. `ValueError` for a non-finite value."""
        x = np.asarray(x, dtype=np.float64)
        if len(x) == 0:
            return
        if not np.isfinite(x).all():
            raise ValueError("statistics of a table with a non-finite value")
        part = Statistics(x.mean(0), x.std(0), x.min(0), x.max(0), len(x))
        self._total = part if self._total is None else self._total.merge(part)

    def result(self) -> Statistics:
        """Statistics of every row so far; `ValueError` when there was none."""
        if self._total is None:
            raise ValueError("statistics of no rows")
        return self._total


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
