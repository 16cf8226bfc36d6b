"""Which images `dvla data check` decodes, and what it remembers of them: a few numbers per episode and camera.

Letters: T rows of an episode, H × W image size, h × w size of its thumbnail, k dimensions of a position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ....cache.readers.episode import View

BLOCK = 8  # pixels of an image's side that make one of its thumbnail's
DARK = 2.0  # gray levels: mean and spread of a black image stay below
SAME = 0.5  # gray levels: no block of two identical images differs more
STILL = 3.0  # gray levels: no block of a frozen camera leaves its first image by more (lossy coding moves a little)
MOVES = 0.05  # share of a dimension's range over the dataset that counts as the robot having moved


@dataclass
class CameraFacts:
    """What one camera of one episode showed in those of its frames that were decoded."""

    episode: int
    view: str
    height: int  # H
    width: int  # W
    frames: int = 0  # decoded
    black: int = 0  # of these, black
    pairs: int = 0  # neighboring frames between which the robot moves
    repeated: int = 0  # of these, with the same image twice
    change: float = 0.0  # largest departure of a block from the first frame, gray levels
    way: float = 0.0  # largest departure of the robot from where it was then, as a share of a dimension's range

    @property
    def is_black(self) -> bool:
        return self.frames > 0 and self.black == self.frames

    @property
    def is_frozen(self) -> bool:
        """Every frame looks like the first although the robot went some way."""
        return not self.is_black and self.way > MOVES and self.change <= STILL


def scan(
    episode: int,
    view: View,
    frames: Sequence[tuple[int, int]],
    position: np.ndarray,
    stopped: Callable[[], bool] = lambda: False,
) -> CameraFacts:
    """Decode the ranges (start, stop) `frames` of a view, until `stopped`. `position` [T, k]: state (or action) as
    shares of its range over the dataset, to know when the robot moves. `CorruptEpisode` for a damaged frame."""
    found = CameraFacts(episode, view.name, view.height, view.width)
    steps = np.abs(np.diff(position, axis=0)).max(1, initial=0)
    moving = (steps > MOVES / 50) & (steps >= (np.median(steps) if len(steps) else 0))  # [T-1]
    first = before = np.zeros(0)
    for start, stop in frames:
        for index, image in enumerate(view.frames(start, stop), start):
            if stopped():
                return found
            small = thumbnail(image)
            if not found.frames:
                first, origin = small, position[index]
            elif index > start and moving[index - 1]:
                found.pairs += 1
                found.repeated += bool(np.abs(small - before).max() <= SAME)
            found.frames += 1
            found.black += bool(small.mean() < DARK and image.std() < DARK)
            found.change = max(found.change, float(np.abs(small - first).max()))
            found.way = max(found.way, float(np.abs(position[index] - origin).max(initial=0)))
            before = small
    return found


def thumbnail(image: np.ndarray) -> np.ndarray:
    """float32 [h, w, 3]: means over blocks of BLOCK × BLOCK pixels (of the whole side where the image is smaller)."""
    by, bx = min(BLOCK, image.shape[0]), min(BLOCK, image.shape[1])
    h, w = image.shape[0] // by, image.shape[1] // bx
    # In two steps: 30 times faster than one mean.
    rows = image[: h * by, : w * bx].reshape(h, by, w * bx * 3).sum(1, dtype=np.uint16)
    return np.add.reduceat(rows.reshape(h, w * bx, 3), np.arange(0, w * bx, bx), axis=1, dtype=np.float32) / np.float32(
        by * bx
    )


def sample_frames(length: int, frames: int, odd: bool = False) -> list[tuple[int, int]]:
    """Ranges (start, stop) of about `frames` of `length` frames: pairs of neighbors spread from the first to the last,
    all beginning at even or all at odd frames (a slow camera may repeat by twos; a caller alternates)."""
    if length <= frames or length < 2:
        return [(0, length)]
    first = int(odd and length > 2)
    starts = np.unique(
        first + 2 * np.linspace(0, (length - 2 - first) // 2, max(1, frames // 2)).round().astype(int)
    ).tolist()
    ranges: list[tuple[int, int]] = []
    for start in starts:
        if ranges and ranges[-1][1] >= start:
            ranges[-1] = (ranges[-1][0], start + 2)
        else:
            ranges.append((start, start + 2))
    return ranges


def sample_episodes(episodes: Sequence[int], count: int) -> list[int]:
    """`count` of `episodes`, evenly spread, the first and the last among them."""
    if count >= len(episodes):
        return list(episodes)
    return [episodes[int(i)] for i in np.unique(np.linspace(0, len(episodes) - 1, count).round())]
