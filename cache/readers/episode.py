"""What every reader yields: an `Episode` with its tables in memory and its images decoded lazily, or a failure.

Letters: T frames of the episode, H × W image size, ds/da native state and action width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ...common.text import printable
from ...errors import LONGEST, Failed, Kind, Note


class CorruptEpisode(Exception):
    """This episode cannot be used; the message is one line: which one, what is wrong, where. A build quarantines it."""

    def __init__(self, message: str, kind: Kind = "unusable-episode") -> None:
        super().__init__(" ".join(printable(message[:LONGEST]).split("\n")))  # it may quote a file
        self.kind: Kind = kind

    def failed(self, episode_id: int, where: str, rows: int = 0) -> Failed:
        """The same as a value; `where` is how messages about the episode begin."""
        reason = str(self).removeprefix(f"{where}: ").removeprefix(f"{where} ")
        return Failed(episode_id, where, self.kind, reason, rows)


@dataclass(frozen=True, slots=True)
class View:
    """One camera of one episode. Nothing is decoded before `frames` is iterated."""

    name: str  # short camera name, e.g. "corner2"; safe as a folder name
    height: int  # H in pixels, of the stored image
    width: int  # W in pixels
    length: int  # T, equal to the episode's
    open: Callable[[int, int], Iterator[np.ndarray]]  # (start, stop) → uint8 [H, W, 3] RGB of frames start..stop-1
    sha256: str = ""  # hex over the stored image bytes: changes when they do
    notes: tuple[Note, ...] = ()  # what was settled to find its frames

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Yield uint8 [H, W, 3] RGB of frames start..stop-1 in order; `CorruptEpisode` where one cannot be decoded."""
        stop = self.length if stop is None else stop
        if not 0 <= start <= stop <= self.length:
            raise ValueError(f"frames {start}..{stop} asked of view '{self.name}', which has {self.length}")
        return self.open(start, stop) if start < stop else iter(())


@dataclass(frozen=True)
class Episode:
    """One recorded demonstration in the robot's own units. All values are finite and all tables have T rows."""

    dataset: str  # name of the source, safe as a folder name
    episode_id: int  # id in the source
    source_hash: str  # sha256 hex over table rows, instruction and stored image bytes of all views; "" if not known
    instruction: str  # may be empty
    control_hz: float  # rows per second
    length: int  # T
    views: tuple[View, ...]  # those asked for
    state: np.ndarray  # [T, ds] float32, native units
    action: np.ndarray  # [T, da] float32, native units
    timestamps: np.ndarray  # [T] float64 seconds since the episode's start
