"""Values far from all others of their slot, and values that normalization cuts off: what a build, a check and a
training say of them.

A glitch of a sensor stretches the range of its slot until nothing is left of the rest. Letters: T rows of an episode.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .normalizer import HIGH, LOW, Normalizer, Scheme
from .slots import slots
from .statistics import Statistics

FAR = 50.0  # widths of the middle 98 % of a slot's values, beyond which a value is a glitch …
WIDTH = 0.1  # … of this width at least, in the slot's own unit …
FEW, FEW_ROWS = 0.001, 3  # … where no more than this share, or number, of its rows are that far
CLIPPED = 0.001  # share of a slot's values from which it is said that they are cut off
SHOWN = 3  # lines of each kind


@dataclass(frozen=True)
class Glitch:
    """The farthest value of an episode, and how many of its values are as far from all others of their slots."""

    table: str  # "action" or "state"
    slot: int
    episode: int
    row: int  # in the episode
    value: float
    usual: tuple[float, float]  # the middle 98 % of the slot's values
    values: int  # of the episode and the table

    @property
    def stretch(self) -> float:
        """How many times further than the usual values this one is from their middle."""
        low, high = self.usual
        return abs(self.value - (low + high) / 2) / max((high - low) / 2, WIDTH / 2)

    def __str__(self) -> str:
        more = f" ({self.values - 1} more like it)" if self.values > 1 else ""
        return (
            f"{self.table} {slots()[self.slot].name} is {self.value:.4g} at episode {self.episode} row {self.row}{more}, "
            f"{self.stretch:.2g} times as far out as 98 % of its values"
        )


@dataclass(frozen=True)
class Extremes:
    """What was found in one table of a dataset."""

    glitches: tuple[Glitch, ...] = ()  # one per episode, in the order of the episodes
    clipped: tuple[tuple[str, float], ...] = ()  # ("action arm_joint_0_pos", share of its values that are cut off)
    scheme: Scheme = "std5"

    def lines(self, dataset: str) -> list[str]:
        """What to say before a dataset is trained on: the first few of each kind, and how many there are."""
        reach = f"{self.scheme} reaches up to it; " if self.scheme in ("std5", "minmax") else ""
        lines = [f"{dataset}: {g}; {reach}leave it out with --exclude-episodes {g.episode}" for g in self.glitches]
        cut = [
            f"{dataset}: {share:.2g} % of {name} is beyond the range of {self.scheme} and cut off; --normalize std5 is not"
            for name, share in ((name, 100 * share) for name, share in self.clipped)
        ]
        more = "more like it; see `dvla data check`"
        return [
            line
            for found in (lines, cut)
            for line in (*found[:SHOWN], *([f"{dataset}: {len(found) - SHOWN} {more}"] if len(found) > SHOWN else []))
        ]


def extremes(
    table: str, stats: Statistics, normalizer: Normalizer, episodes: Iterable[tuple[int, np.ndarray]]
) -> Extremes:
    """What `normalizer` makes of the `table` ("action" or "state") with these statistics.

    `episodes`: (id, unified [T, 128]), gone through only where the statistics show a value that is far or cut off."""
    cut = np.flatnonzero(normalizer.clips(stats))
    low, high = _limits(stats)
    far = np.flatnonzero(normalizer.scaled & ((stats.min < low) | (stats.max > high)))
    if not len(cut) and not len(far):
        return Extremes(scheme=normalizer.scheme)
    few, lost, seen = max(FEW_ROWS, FEW * stats.count), np.zeros(len(cut)), np.zeros(len(far), np.int64)
    found: list[tuple[int, int, np.ndarray, np.ndarray]] = []  # (episode, row, which of `far`, values)
    edge = normalizer.half_range[cut] * (normalizer.limit + 1e-6)
    for number, values in episodes:
        lost += (np.abs(values[:, cut] - normalizer.center[cut]) > edge).sum(0)
        x = values[:, far]  # [T, far]
        beyond = (x < low[far]) | (x > high[far])
        seen += beyond.sum(0)
        beyond &= seen <= few  # what is not rare is not kept
        found += [(number, row, beyond[row], x[row]) for row in np.flatnonzero(beyond.any(1)).tolist()]
    shares = zip(cut.tolist(), (lost / stats.count).tolist())
    return Extremes(
        _by_episode(table, stats, far, seen <= few, found),
        tuple((f"{table} {slots()[slot].name}", share) for slot, share in shares if share > CLIPPED),
        normalizer.scheme,
    )


def _limits(stats: Statistics) -> tuple[np.ndarray, np.ndarray]:
    """[D] values below and above which one is far from all others; infinite without quantiles (of earlier caches)."""
    if stats.quantiles is None:
        return np.full_like(stats.mean, -np.inf), np.full_like(stats.mean, np.inf)
    first, last = stats.quantiles[LOW], stats.quantiles[HIGH]
    reach = FAR * np.maximum(last - first, WIDTH)
    return first - reach, last + reach


def _by_episode(
    table: str,
    stats: Statistics,
    far: np.ndarray,
    rare: np.ndarray,
    found: list[tuple[int, int, np.ndarray, np.ndarray]],
) -> tuple[Glitch, ...]:
    worst: dict[int, Glitch] = {}
    for number, row, beyond, x in found:
        for i in np.flatnonzero(beyond & rare).tolist():
            slot = int(far[i])
            assert stats.quantiles is not None  # else nothing is far
            usual = float(stats.quantiles[LOW][slot]), float(stats.quantiles[HIGH][slot])
            before = worst.get(number)
            glitch = Glitch(table, slot, number, row, float(x[i]), usual, 1 + (before.values if before else 0))
            if before is not None and before.stretch >= glitch.stretch:
                glitch = Glitch(table, before.slot, number, before.row, before.value, before.usual, glitch.values)
            worst[number] = glitch
    return tuple(worst.values())
