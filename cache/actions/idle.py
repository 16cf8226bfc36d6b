"""Which frames of a demonstration are idle: a pause in which the robot neither moves nor is commanded to.

For `RUN` seconds (at least `FEWEST` frames) every number of action and state stays within a band: a position (joint,
hand, gripper, finger) changes by at most the band, a velocity is at most that. The band of a slot is `SHARE` of the
range that the dataset itself uses, of the slot of the same unit that moves most (1st to 99th percentile), and at least
`FLOOR` of that unit. So a gripper that closes is motion, however rare, and the noise of a resting joint is not. Of each
pause a margin of `RUN` / 2 stays beside the motion, so that a policy sees how to begin and to stop. Letters: T frames.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from .slots import slots
from .statistics import Statistics

RUN, FEWEST = 0.5, 4
SHARE = 0.005
FLOOR = {"rad": 0.005, "m": 0.0005, "6D": 0.005, "rad/s": 0.01, "m/s": 0.002, "1/s": 0.02}
GRIPPER = 0.01  # of an opening, or of a slot of no known unit


def bands(stats: Statistics, mask: np.ndarray) -> np.ndarray:
    """float32 [128]: how far each slot of a unified table may move in a pause; 0 where `mask` [128] is not set."""
    low, high = (stats.min, stats.max) if stats.quantiles is None else (stats.quantiles[q] for q in (0.01, 0.99))
    units, out = np.array([slot.unit for slot in slots()]), np.zeros(len(mask), np.float32)
    for unit in set(units[mask].tolist()):
        mine = mask & (units == unit)
        out[mine] = max(SHARE * float((high - low)[mine].max()), FLOOR.get(unit, GRIPPER))
    return out


def idle_frames(tables: Sequence[tuple[np.ndarray, np.ndarray]], hz: float) -> np.ndarray:
    """bool [T]: the frames of one episode that are idle; `tables`: (unified values [T, 128], `bands` [128]) of action
    and state. Its first frame is never idle where all others are."""
    length, run = len(tables[0][0]), max(FEWEST, math.ceil(RUN * hz))
    idle = np.zeros(length, bool)
    if length <= run or not any(band.any() for _, band in tables):
        return idle
    still = np.ones(length - run + 1, bool)  # the `run` frames from here
    for values, band in tables:
        for mine, spread in ((band > 0) & ~_velocities(), _range), ((band > 0) & _velocities(), _size):
            if mine.any():
                still &= (spread(values[:, mine], run) <= band[mine]).all(axis=1)
    edges = np.flatnonzero(np.diff(still.astype(np.int8), prepend=0, append=0)).tolist()
    for first, end in zip(edges[::2], edges[1::2]):  # a pause; one that begins at once is another: between is a jump
        last = end + run - 2
        idle[first + (run // 2 if first else 0) : last + 1 - (run // 2 if last < length - 1 else 0)] = True
    idle[0] &= not idle.all()
    return idle


@functools.cache
def _velocities() -> np.ndarray:
    """bool [128]: the slots whose rest is at 0."""
    return np.array([slot.unit.endswith("/s") for slot in slots()])


def _range(x: np.ndarray, run: int) -> np.ndarray:
    """[T-run+1, d]: how far the values of `run` frames are apart."""
    return _largest(x, run) + _largest(-x, run)


def _size(x: np.ndarray, run: int) -> np.ndarray:
    """[T-run+1, d]: the largest magnitude in `run` frames."""
    return _largest(np.abs(x), run)


def _largest(x: np.ndarray, run: int) -> np.ndarray:
    """[T-run+1, d]: the maximum of `run` frames, by doubling."""
    width = 1
    while 2 * width <= run:
        x, width = np.maximum(x[:-width], x[width:]), 2 * width
    rest = run - width
    return np.maximum(x[: len(x) - rest], x[rest:])
