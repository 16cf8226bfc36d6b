"""LeRobot datasets (v2.0, v2.1, v3.0; video files or images in parquet) as episodes, equal to lerobot's own reading.

Opening reads `meta/` only; `table` reads one episode's rows; `load` also finds its images, without decoding them.
Letters: T frames of the episode.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from ....errors import Failed, UserError
from ..base import Source
from ..config import DatasetConfig, find_config
from ..episode import CorruptEpisode, View
from ..faults import one_episode
from ..tables import EpisodeTable, Rows, TableBlock
from ..video import VideoExtent, decode, find_extent
from .metadata import EpisodeEntry, Metadata
from .parquet import ImageRows, decode_images, find_images, read_marks, read_rows, stream_rows, to_matrix

_SUCCESS = ("next.success", "success")  # columns that say whether a demonstration succeeded
_CHECKED = ("timestamp", "frame_index", "task_index")  # columns of every LeRobot table, by which its rows are checked


class LeRobotSource(Source):
    """One LeRobot dataset."""

    format = "lerobot"

    def __init__(self, path_or_repo: str, config: DatasetConfig | None = None) -> None:
        """A folder or hub id; `config` None finds the shipped one that fits.

        `UserError` when it is missing, is not a LeRobot dataset, or the config does not describe it.
        """
        self.meta = meta = Metadata(path_or_repo)
        config = config or find_config(self.format, (str(meta.info.get("robot_type") or ""), meta.name))
        self._cameras = meta.cameras(config.views)  # short name → feature key
        self._marks: dict[Path, dict[int, bool]] = {}  # of the table files looked at, by episode
        super().__init__(
            meta.root,
            meta.name,
            config,
            fps=float(meta.info["fps"]),
            view_names=tuple(self._cameras),
            episode_ids=tuple(meta.episodes),  # as listed; a missing file shows when the episode is loaded
            widths={key: math.prod(f.get("shape") or [1]) for key, f in meta.features.items()},
        )
        self._read_recording()

    @classmethod
    def matches(cls, names: Sequence[str], root: Path | None) -> bool:
        """By `meta/info.json`."""
        return "meta/info.json" in names

    @functools.cached_property
    def revision_hash(self) -> str:
        """sha256 hex over every file of `meta/`."""
        return self.meta.revision_hash()

    def length_of(self, episode_id: int) -> int:
        """Listed number of frames T."""
        return self._entry(episode_id).length

    def instruction_of(self, episode_id: int) -> str:
        """The episode's task text, from `meta/` alone where it has one task. Several are joined by "; " in the order
        in which the rows use them. The config's default where there is none."""
        tasks = self._entry(episode_id).tasks
        if len(tasks) > 1:
            return self.table(episode_id).instruction
        return (tasks[0] if tasks else "") or self.config.instruction

    def success_of(self, episode_id: int) -> bool | None:
        """By the column `next.success` or `success`: whether any row of the episode is marked."""
        name = next((name for name in _SUCCESS if name in self.meta.features), None)
        if name is None:
            return None
        path = self.meta.locate(self._entry(episode_id).data_path, self.where(episode_id))
        if path not in self._marks:
            self._marks[path] = read_marks(path, name, self.where(episode_id))
        return self._marks[path].get(episode_id)

    def tables(self, batch_rows: int = 65536) -> Iterator[TableBlock]:
        """As in `Source`; a file of many episodes is read once, front to back, and its blocks come in that order."""
        return self._blocks(self._each_table(batch_rows), batch_rows)

    def _each_table(self, batch_rows: int) -> Iterator[tuple[int, EpisodeTable | Failed]]:
        files: dict[str, set[int]] = {}
        for number in self.episode_ids:
            files.setdefault(self._entry(number).data_path, set()).add(number)
        for data_path, left in files.items():
            # A file that is missing or damaged: what is left is read one by one, each with its own reason.
            with contextlib.suppress(CorruptEpisode), one_episode(self.name, self.path):
                if len(left) > 1:
                    path = self.meta.locate(data_path, self.name)
                    for number, rows in stream_rows(path, [*self.config.columns, *_CHECKED], batch_rows, self.name):
                        if number in left:
                            left.remove(number)
                            yield number, self.attempt(functools.partial(self._table_of, rows), number)
            for number in sorted(left):
                yield number, self.attempt(self.table, number)

    def _table_of(self, rows: pa.Table, episode_id: int) -> EpisodeTable:
        where = self.where(episode_id)
        return self._checked(self._rows_of(self._entry(episode_id), rows, self.config.columns, where), where)

    def _rows(self, episode_id: int, columns: Sequence[str], where: str) -> Rows:
        entry = self._entry(episode_id)
        rows = read_rows(self.meta.locate(entry.data_path, where), episode_id, [*columns, *_CHECKED], where)
        return self._rows_of(entry, rows, columns, where)

    def _rows_of(self, entry: EpisodeEntry, rows: pa.Table, columns: Sequence[str], where: str) -> Rows:
        length = rows.num_rows
        if length != entry.length or not length:
            raise CorruptEpisode(
                f"{where}: {entry.data_path} has {length} rows, meta/ lists {entry.length}", "row-count"
            )
        frames = to_matrix(rows, "frame_index", where)[:, 0]
        if not np.array_equal(frames, np.arange(length)):
            raise CorruptEpisode(f"{where}: frame_index does not run 0..{length - 1}", "row-count")
        numbers = to_matrix(rows, "task_index", where)[:, 0].astype(int) if "task_index" in rows.column_names else None
        return Rows(
            {name: to_matrix(rows, name, where) for name in columns},
            self._instruction(entry, numbers, where),
            to_matrix(rows, "timestamp", where)[:, 0],
        )

    def _files(self, episode_id: int, view: str, where: str) -> Sequence[Path]:
        entry, key = self._entry(episode_id), self._cameras[view]
        return (self.meta.locate(entry.video_paths.get(key, entry.data_path), where),)

    def _views(self, episode_id: int, names: Sequence[str], table: EpisodeTable, where: str) -> Iterator[View]:
        entry = self._entry(episode_id)
        found: VideoExtent | ImageRows
        for name in names:
            (path,), key = self._files(episode_id, name, where), self._cameras[name]
            if key in entry.video_paths:
                found = find_extent(path, entry.video_starts[key] + table.timestamps, where)
                length, opener = len(found.pts), functools.partial(decode, found, where)
            else:
                found = find_images(path, episode_id, key, where)
                length, opener = found.length, functools.partial(decode_images, found, where)
            yield View(name, found.height, found.width, length, opener, found.sha256)

    def _read_recording(self) -> None:
        """Task and initial states of a simulator's recording, from `meta/dvla.json` of `dvla data record`."""
        path = self.path / "meta" / "dvla.json"
        if not path.is_file():
            return
        try:
            found = json.loads(path.read_text())
            self.starts = {int(k): [float(x) for x in v] for k, v in found["starts"].items()}
            self.environment = str(found["environment"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); record the dataset again") from None

    def _entry(self, episode_id: int) -> EpisodeEntry:
        self.where(episode_id)
        return self.meta.episodes[episode_id]

    def _instruction(self, entry: EpisodeEntry, numbers: np.ndarray | None, where: str) -> str:
        """Text of the rows' `task_index` values; refuses rows that contradict `meta/`."""
        if numbers is None:
            return "; ".join(entry.tasks) or self.config.instruction
        used = list(dict.fromkeys(numbers.tolist()))
        missing = [n for n in used if n not in self.meta.tasks]
        if missing and self.meta.tasks:
            raise CorruptEpisode(
                f"{where}: task_index {missing[0]} is not among the {len(self.meta.tasks)} tasks of meta/"
            )
        texts = [self.meta.tasks[n] for n in used if n in self.meta.tasks]
        if entry.tasks and set(texts) != set(entry.tasks):
            raise CorruptEpisode(f"{where}: the rows' task is {texts}, meta/ says {list(entry.tasks)}")
        return "; ".join(texts) or self.config.instruction
