"""Values far from all others of their slot, and values that normalization cuts off: what a build, a check and a
training say of them.

A glitch of a sensor stretches the range of its slot until nothing is left of the rest. Letters: T rows of an episode.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .normalizer import Normalizer
from .schemes import Scheme
from .slots import UNIFIED_DIM, slots
from .statistics import Statistics

USUAL = (0.1, 0.9)  # quantiles between which most of a slot's values lie
FAR = 50.0  # times the width of that, beyond which a value is a glitch …
WIDTHS = (0.1, 2.0)  # … which counts as this at least, of a position and of a velocity, in the slot's own unit …
FEW, FEW_ROWS = 0.001, 3  # … where no more than this share, or number, of its rows are that far
LEAST = np.array([WIDTHS["_vel" in slot.name] for slot in slots()])  # [128]
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
    stretch: float  # how many times further from the middle of its slot's values it is than 80 % of them
    values: int = 1  # of the episode and the table

    def __str__(self) -> str:
        name, more = slots()[self.slot].name, f" ({self.values - 1} more like it)" if self.values > 1 else ""
        return (
            f"{self.table} {name} is {self.value:.4g} at episode {self.episode} row {self.row}{more}, "
            f"{self.stretch:.2g} times as far out as 80 % of its values"
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
        lines = [f"{g}; {reach}leave it out with --exclude-episodes {dataset}={g.episode}" for g in self.glitches]
        cut = [cut_off(name, share, self.scheme) for name, share in self.clipped]
        more = "more like it; see `dvla data check`"
        return [
            line
            for found in (lines, cut)
            for line in (*found[:SHOWN], *([f"{len(found) - SHOWN} {more}"] if len(found) > SHOWN else []))
        ]


def cut_off(name: str, share: float, scheme: Scheme) -> str:
    """What to say of a share of the values of `name` that are clipped."""
    return f"{100 * share:.2g} % of {name} is beyond the range of {scheme} and cut off; normalize it by std5 instead"


def extremes(
    table: str, stats: Statistics, normalizer: Normalizer, episodes: Iterable[tuple[int, np.ndarray]]
) -> Extremes:
    """What `normalizer` makes of the `table` ("action" or "state") with these statistics.

    `episodes`: (id, unified [T, 128]), gone through only where the statistics show a value that is far or cut off."""
    cut = np.flatnonzero(normalizer.clips(stats))
    middle, width = _usual(stats)
    far = np.flatnonzero(normalizer.scaled & (np.maximum(stats.max - middle, middle - stats.min) > FAR * width))
    if not len(cut) and not len(far):
        return Extremes(scheme=normalizer.scheme)
    few, lost, seen = max(FEW_ROWS, FEW * stats.count), np.zeros(len(cut)), np.zeros(len(far), np.int64)
    found: list[tuple[Glitch, int]] = []  # with its place in `far`
    edge = normalizer.half_range[cut] * (normalizer.limit + 1e-6)
    for number, values in episodes:
        lost += (np.abs(values[:, cut] - normalizer.center[cut]) > edge).sum(0)
        x = values[:, far]  # [T, far]
        stretch = np.abs(x - middle[far]) / (width[far] / 2)
        beyond = stretch > 2 * FAR
        seen += beyond.sum(0)
        beyond &= seen <= few  # what is not rare is not kept
        for row, i in np.argwhere(beyond).tolist():
            place = int(far[i]), number, row, float(x[row, i]), float(stretch[row, i])
            found.append((Glitch(table, *place), i))
    shares = zip(cut.tolist(), (lost / stats.count).tolist())
    return Extremes(
        _by_episode(g for g, i in found if seen[i] <= few),
        tuple((f"{table} {slots()[slot].name}", share) for slot, share in shares if share > CLIPPED),
        normalizer.scheme,
    )


def _usual(stats: Statistics) -> tuple[np.ndarray, np.ndarray]:
    """(middle, width) [128] of most values of each slot; infinitely wide without quantiles (of earlier caches)."""
    if stats.quantiles is None:
        return stats.mean, np.full(UNIFIED_DIM, np.inf)
    low, high = (stats.quantiles[q] for q in USUAL)
    return (low + high) / 2, np.maximum(high - low, LEAST)


def _by_episode(glitches: Iterable[Glitch]) -> tuple[Glitch, ...]:
    """The worst of each episode, with the number of all."""
    worst: dict[int, Glitch] = {}
    for glitch in glitches:
        before = worst.get(glitch.episode, glitch)
        count = 1 if before is glitch else before.values + 1
        worst[glitch.episode] = dataclasses.replace(max(before, glitch, key=lambda g: g.stretch), values=count)
    return tuple(worst.values())
