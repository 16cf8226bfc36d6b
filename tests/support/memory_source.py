"""A `Source` over arrays in memory: what the checks every reader shares are tested with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dvla.cache.readers.base import Source
from dvla.cache.readers.config import DatasetConfig
from dvla.cache.readers.episode import View
from dvla.cache.readers.tables import EpisodeTable, Rows


class MemorySource(Source):
    """Episodes given as {id: {column: [T, d]}}, with one black camera."""

    format = "lerobot"
    revision_hash = "memory"

    def __init__(
        self, config: DatasetConfig, episodes: Mapping[int, Mapping[str, np.ndarray]], fps: float = 10.0
    ) -> None:
        super().__init__(Path(__file__), "memory", config, fps=fps, view_names=("front",), episode_ids=tuple(episodes))
        self._episodes = episodes

    @classmethod
    def matches(cls, names: Sequence[str], root: Path | None) -> bool:
        return False

    def length_of(self, episode_id: int) -> int:
        return len(next(iter(self._episodes[episode_id].values())))

    def _rows(self, episode_id: int, columns: Sequence[str], where: str) -> Rows:
        return Rows({c: self._episodes[episode_id][c] for c in columns}, "")

    def _files(self, episode_id: int, view: str, where: str) -> list[Path]:
        return []

    def _views(self, episode_id: int, names: Sequence[str], table: EpisodeTable, where: str) -> list[View]:
        length = len(table.action)
        frames = np.zeros((length, 4, 4, 3), np.uint8)
        return [View("front", 4, 4, length, lambda start, stop: iter(frames[start:stop]), "0" * 64)]
