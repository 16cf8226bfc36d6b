"""The video files of one camera: an episode that is not in the file it is listed in is looked for beside it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ....errors import Note
from ..episode import CorruptEpisode
from ..video import VideoExtent, stored_times
from .rows import Clock
from .spans import Claim, VideoFile

_MOST = 8  # episodes of a file that are tried elsewhere
_NEAR = 64  # files that are looked into
_ONE_AT_A_TIME = threading.Lock()  # of the module: sources are pickled


class CameraFiles:
    """Which video file, and which of its frames, belong to the episodes of one camera."""

    def __init__(
        self,
        claims: Mapping[str, Sequence[Claim]],
        fps: float,
        locate: Callable[[str, str], Path],
        names: Callable[[], Sequence[str]],
    ) -> None:
        """`claims`: file → what is listed in it; `names`: all video files of the camera that are here."""
        self._files = {name: VideoFile(found, fps) for name, found in claims.items()}
        self._listed = {claim.episode: name for name, found in claims.items() for claim in found}
        self._fps, self._locate, self._names = fps, locate, names
        self._moved: dict[int, str] = {}
        self._tried: set[str] = set()

    def path(self, episode: int, where: str) -> Path:
        """The file with the episode's frames, as far as is known; `CorruptEpisode` when it is missing."""
        try:
            return self._locate(self._moved.get(episode, self._listed[episode]), where)
        except CorruptEpisode:
            self._search(self._listed[episode], [episode], where)
            if episode not in self._moved:
                raise
            return self._locate(self._moved[episode], where)

    def find(
        self, episode: int, times: np.ndarray, clock: Clock | None, where: str
    ) -> tuple[VideoExtent, tuple[Note, ...]]:
        """As `VideoFile.find`."""
        path, listed = self.path(episode, where), self._listed[episode]
        if episode not in self._moved:
            file = self._files[listed]
            try:
                return file.find(path, episode, times, clock, where)
            except CorruptEpisode as error:
                if error.kind != "row-count":
                    raise
                self._search(listed, file.unsettled(path, where) or [episode], where)
                if episode not in self._moved and self._files[listed] is file:
                    raise
        name = self._moved.get(episode, listed)
        extent, notes = self._files[name].find(self._locate(name, where), episode, times, clock, where)
        moved = (Note("file-index", f"its frames are in {name}, meta/ lists {listed}"),) if name != listed else ()
        return extent, (*moved, *notes)

    def _search(self, listed: str, episodes: Sequence[int], where: str) -> None:
        """Move the one of these episodes without which the others listed in a file fit it, if exactly one other file
        has frames left for it: as many as it has, at its listed time."""
        with _ONE_AT_A_TIME:
            file = self._files[listed]
            if listed in self._tried or len(episodes) > _MOST or any(c.stop is None for c in file.claims):
                return
            self._tried.add(listed)
            names = sorted({listed, *self._names()})
            at = names.index(listed)
            near = [n for n in sorted(names, key=lambda n: abs(names.index(n) - at))[:_NEAR] if n != listed]
            stored = self._read(listed, where)
            found = []
            for episode in (e for e in episodes if file.without(e).fits(stored)):
                for name in near:
                    new = self._with(episode, name, listed)
                    times = self._read(name, where, new.total)
                    if len(times) == new.total and new.fits(times):
                        found.append((episode, name, new))
            if len(found) == 1:
                episode, name, new = found[0]
                self._files |= {listed: self._files[listed].without(episode), name: new}
                self._moved[episode] = name

    def _with(self, episode: int, name: str, listed: str) -> VideoFile:
        claims = self._files[name].claims if name in self._files else ()
        return VideoFile([*claims, self._files[listed].claim(episode)], self._fps)

    def _read(self, name: str, where: str, count: int = 0) -> np.ndarray:
        """Times of all frames of a file; none where it cannot be read, or by its header has not `count` frames."""
        try:
            return stored_times(self._locate(name, where), where, count)
        except CorruptEpisode:
            return np.zeros(0)
