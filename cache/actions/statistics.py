"""Per-dataset statistics of unified vectors, which normalization to [-1, 1] is made from. Pure functions of tables.

center = mean, half_range = 5 · max(std, 0.01): the floor keeps a nearly constant dimension from being blown up.
Statistics need one pass over the rows and memory that grows with the logarithm of their number; they depend on the rows
and their order, not on how these were cut into tables, and those of several parts can be merged. Letters: D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from ...common.documents import Field, Form, Positive
from .slots import UNIFIED_DIM

QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
BLOCK = 2048  # rows of a buffer; ranks of quantiles are off by at most log2(rows / BLOCK) / (2 · BLOCK)


Values = Annotated[list[float], Field(min_length=UNIFIED_DIM, max_length=UNIFIED_DIM)]


class StatisticsForm(Form):
    """What `Statistics.to_dict` gives of unified vectors."""

    mean: Values
    std: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=UNIFIED_DIM, max_length=UNIFIED_DIM)]
    min: Values
    max: Values
    count: Positive
    quantiles: dict[Annotated[str, Field(pattern=r"^0\.[0-9]{1,20}$")], Values] = {}


@dataclass(frozen=True)
class Statistics:
    """Moments and quantiles of `count` vectors. All arrays float64 [D]; `std` divides by `count`."""

    mean: np.ndarray
    std: np.ndarray
    min: np.ndarray
    max: np.ndarray
    count: int
    quantiles: Mapping[float, np.ndarray] | None = None  # level → values that occur; None in caches of earlier releases

    def merge(self, other: Statistics) -> Statistics:
        """Moments of both sets together (Chan, Golub, LeVeque 1979); exact up to rounding. Its quantiles are None, for
        they do not follow from those of the parts: merge the `RunningStatistics` to have them."""
        count = self.count + other.count
        gap = other.mean - self.mean
        squares = self.count * self.std**2 + other.count * other.std**2 + gap**2 * (self.count * other.count / count)
        return Statistics(
            self.mean + gap * (other.count / count),
            np.sqrt(squares / count),
            np.minimum(self.min, other.min),
            np.maximum(self.max, other.max),
            count,
        )

    def on(self, slots: np.ndarray) -> Statistics:
        """Statistics of wider vectors, whose `slots` [W] bool these dimensions are and which are 0 elsewhere."""

        def wide(values: np.ndarray) -> np.ndarray:
            out = np.zeros(len(slots))
            out[slots] = values
            return out

        quantiles = None if self.quantiles is None else {q: wide(v) for q, v in self.quantiles.items()}
        moments = {name: wide(getattr(self, name)) for name in ("mean", "std", "min", "max")}
        return Statistics(**moments, count=self.count, quantiles=quantiles)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; floats survive the round trip exactly."""
        arrays = {k: getattr(self, k).tolist() for k in ("mean", "std", "min", "max")}
        quantiles = (
            {} if self.quantiles is None else {"quantiles": {str(q): v.tolist() for q, v in self.quantiles.items()}}
        )
        return {**arrays, "count": self.count, **quantiles}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Statistics:
        """Inverse of `to_dict`; also of what earlier releases wrote, without quantiles."""
        arrays = {k: np.array(values[k], dtype=np.float64) for k in ("mean", "std", "min", "max")}
        found = values.get("quantiles")
        quantiles = None if found is None else {float(q): np.array(v, dtype=np.float64) for q, v in found.items()}
        return cls(**arrays, count=int(values["count"]), quantiles=quantiles)


class RunningStatistics:
    """Statistics of a stream of tables in one pass. The result depends on the rows and their order alone."""

    def __init__(self) -> None:
        self._moments: Statistics | None = None  # of all full blocks
        self._ranks = _Ranks()  # of all full blocks
        self._rows = np.empty((0, 0))  # [BLOCK, D], of which `_filled` wait for the block to be full
        self._filled = 0

    def update(self, x: np.ndarray) -> None:
        """Add the rows of `x [n, D]`; n = 0 adds nothing. `ValueError` for a non-finite value or another D."""
        x = np.asarray(x)
        if len(x) == 0:
            return
        if self._rows.shape[1] == 0:
            self._rows = np.empty((BLOCK, x.shape[1]))
        if x.shape[1] != self._rows.shape[1]:
            raise ValueError(f"statistics of {self._rows.shape[1]} dimensions cannot take rows of {x.shape[1]}")
        if not np.isfinite(x).all():
            raise ValueError("statistics of a table with a non-finite value")
        while len(x):
            part, x = x[: BLOCK - self._filled], x[BLOCK - self._filled :]
            self._rows[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            if self._filled == BLOCK:
                block = _moments(self._rows)
                self._moments = block if self._moments is None else self._moments.merge(block)
                self._ranks.add(np.sort(self._rows.T, axis=1))
                self._filled = 0

    def merge(self, other: RunningStatistics) -> None:
        """Add all rows that `other` has seen; `other` is unchanged. Moments are exact up to rounding, and ranks of
        quantiles keep their bound, whatever is merged in whatever order."""
        if other._moments is not None:
            self._moments = other._moments if self._moments is None else self._moments.merge(other._moments)
        self._ranks.merge(other._ranks)
        self.update(other._rows[: other._filled])

    def result(self, levels: tuple[float, ...] = QUANTILES) -> Statistics:
        """Statistics of every row so far, with the quantiles of these `levels`; `ValueError` when there was none."""
        rest = self._rows[: self._filled]
        total = self._moments
        if len(rest):
            total = _moments(rest) if total is None else total.merge(_moments(rest))
        if total is None:
            raise ValueError("statistics of no rows")
        return Statistics(total.mean, total.std, total.min, total.max, total.count, self._ranks.quantiles(rest, levels))


def statistics_of(*tables: np.ndarray) -> Statistics:
    """Of all rows of tables [n, D], one after another; each may be a memory map."""
    running = RunningStatistics()
    for table in tables:
        for start in range(0, len(table), 32 * BLOCK):
            running.update(table[start : start + 32 * BLOCK])
    return running.result()


def _moments(x: np.ndarray) -> Statistics:
    return Statistics(x.mean(0), x.std(0), x.min(0), x.max(0), len(x))


class _Ranks:
    """A summary of a stream from which any quantile can be read: sorted buffers of BLOCK values, at most one per level,
    where a value of level i stands for 2^i rows.

    Two buffers of a level become one of the next: sorted together, every other value is kept, the odd and the even ones
    in turn (Manku, Rajagopalan, Lindsay 1998, without randomness). Such a step moves a rank by at most 2^i, and n rows
    take n / (BLOCK · 2^(i+1)) of them at level i: n / (2 · BLOCK) per level, which bounds the error for any data and
    merges.
    """

    def __init__(self) -> None:
        self._levels: list[np.ndarray | None] = []  # [D, BLOCK] each, sorted along BLOCK
        self._odd: list[bool] = []  # which half the next step of a level keeps

    def add(self, buffer: np.ndarray, level: int = 0) -> None:
        """Add `buffer [D, BLOCK]`, sorted, whose values stand for 2^level rows each."""
        while True:
            while len(self._levels) <= level:
                self._levels.append(None)
                self._odd.append(False)
            waiting = self._levels[level]
            if waiting is None:
                self._levels[level] = buffer
                return
            both = np.concatenate([waiting, buffer], axis=1)
            both.sort(axis=1, kind="stable")  # merges the two sorted runs
            buffer = np.ascontiguousarray(both[:, int(self._odd[level]) :: 2])
            self._levels[level], self._odd[level] = None, not self._odd[level]
            level += 1

    def merge(self, other: _Ranks) -> None:
        """Add what `other` holds."""
        for level, buffer in enumerate(other._levels):
            if buffer is not None:
                self.add(buffer, level)

    def quantiles(self, rest: np.ndarray, levels: tuple[float, ...]) -> dict[float, np.ndarray]:
        """level → [D]: the smallest value that at least that share of all rows does not exceed; `rest [m, D]` are
        further rows that stand for themselves."""
        parts = [(1, rest.T)] if len(rest) else []
        parts += [(2**i, b) for i, b in enumerate(self._levels) if b is not None]
        values = np.concatenate([b for _, b in parts], axis=1)  # [D, M]
        weights = np.concatenate([np.full(b.shape[1], w) for w, b in parts])  # [M]
        order = np.argsort(values, axis=1, kind="stable")
        ranks = np.cumsum(weights[order], axis=1)  # [D, M]
        rows = np.arange(len(values))
        found = {}
        for q in levels:
            first = (ranks >= max(1, math.ceil(q * int(weights.sum()) - 1e-9))).argmax(1)
            found[q] = values[rows, order[rows, first]]
        return found
