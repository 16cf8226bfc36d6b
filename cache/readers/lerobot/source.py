"""LeRobot datasets (v2.0, v2.1, v3.0; video files or images in parquet) as episodes, equal to lerobot's own reading.

Opening reads `meta/` only; `table` reads one episode's rows; `load` also finds its images, without decoding them.
Letters: T frames of the episode.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pyarrow as pa

from ....common.documents import Field, Form, read_json
from ....errors import Failed, Note
from ..base import Source
from ..config import UNMAPPED, DatasetConfig
from ..episode import CorruptEpisode, View
from ..faults import one_episode
from ..labels import SUCCESS
from ..search import Files, choose_config
from ..tables import EpisodeTable, Rows, TableBlock
from ..video import decode, is_depth_video
from .camera_files import CameraFiles
from .image_columns import decode_images, find_images, holds_depth, image_file
from .listing import EpisodeEntry
from .metadata import Metadata
from .parquet import RowsAt, opened, read_marks, stream_rows, to_matrix
from .placement import DataFiles, FoundRows
from .rows import Clock, Listed, put_in_order
from .spans import Claim
from .texts import instruction_of, text_columns

_NUMBERS = re.compile(r"(float|u?int)\d+")  # dtypes of features
_CHECKED = ("timestamp", "frame_index", "task_index")  # columns of every LeRobot table, by which its rows are checked


class _Recording(Form):
    """`meta/dvla.json`, which `dvla data record` writes."""

    environment: str
    starts: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], list[float]]  # episode → initial state
    start_numbers: dict[str, int] = {}
    split: str = ""
    seed: int | None = None
    noise: float = 0.0
    observation_noise: float = 0.0
    pixel_noise: float = 0.0
    attempted: int = 0
    succeeded: int = 0


@dataclass(frozen=True)
class _Origin:
    """Where the rows of a table are, and what they say about their images."""

    at: RowsAt
    clock: Clock | None


class LeRobotSource(Source):
    """One LeRobot dataset."""

    format = "lerobot"

    def __init__(self, path_or_repo: str, config: DatasetConfig | None = None) -> None:
        """A folder or hub id; `config` None finds the shipped one that fits.

        `UserError` when it is missing, is not a LeRobot dataset, or the config does not describe it.
        """
        self.meta = meta = Metadata(path_or_repo)
        self._texts = text_columns(meta.features, meta.modality.annotations) if meta.needs_more_texts else ()
        names = (meta.name, str(meta.info.get("robot_type") or ""))
        reopen = functools.partial(type(self), path_or_repo, UNMAPPED)
        files = Files(names, meta.root, self._columns, meta.dimension_names, reopen)
        config = choose_config(config, self.format, files)
        meta.depth_maps += tuple(self._deep_images())
        self._cameras = meta.cameras(config.views)  # short name → feature key
        self._marks: dict[Path, dict[int, bool]] = {}  # of the table files looked at, by episode
        super().__init__(
            meta.root,
            meta.name,
            config,
            fps=meta.info["fps"],
            view_names=tuple(self._cameras),
            episode_ids=meta.episode_ids,  # as listed; a missing file shows when the episode is loaded
            widths=self._widths(config),
        )
        self._data = DataFiles(meta)
        self._read_recording()

    def dimension_names(self, columns: Sequence[str]) -> list[str] | None:
        """As `Metadata.dimension_names`."""
        return self.meta.dimension_names(columns)

    def _columns(self) -> dict[str, int]:
        """Numbers per row of each numeric feature that the first table has, too."""
        features = {k: f for k, f in self.meta.features.items() if _NUMBERS.fullmatch(str(f.get("dtype")))}
        stored = set(features)
        for entry in list(self.meta.episodes.values())[:1]:
            with contextlib.suppress(CorruptEpisode), opened(self.meta.locate(entry.data_path, ""), "") as file:
                stored = set(file.schema_arrow.names)
        return {key: math.prod(f.get("shape") or [1]) for key, f in features.items() if key in stored}

    def _deep_images(self) -> Iterator[str]:
        """Features that are depth maps by the first image or video there is. Only those with one channel or a name that
        says depth are looked at: tables need no video."""
        for key, feature in self.meta.features.items():
            doubtful = feature["dtype"] in ("image", "video") and (3 not in feature["shape"] or "depth" in key.lower())
            with contextlib.suppress(CorruptEpisode):
                if doubtful and key not in self.meta.depth_maps and self._is_deep(key, feature["dtype"]):
                    yield key

    def _is_deep(self, key: str, dtype: str) -> bool:
        """Whether a feature is a depth map by the first episode that has it."""
        for number, entry in self.meta.episodes.items():
            if dtype == "image":
                fetch = functools.partial(image_file, self.meta.files, key, number, "")
                return holds_depth(self.meta.locate(entry.data_path, ""), key, fetch, "")
            if key in entry.video_paths:
                return is_depth_video(self.meta.locate(entry.video_paths[key], ""), "")
        return False

    @classmethod
    def matches(cls, names: Sequence[str], root: Path | None) -> bool:
        """By `meta/info.json`."""
        return "meta/info.json" in names

    def notes(self) -> tuple[Note, ...]:
        """As in `Source`: about `meta/`, cameras without files, and how many episodes are here."""
        return self.meta.notes()

    @functools.cached_property
    def revision_hash(self) -> str:
        """sha256 hex over every file of `meta/`."""
        return self.meta.revision_hash()

    def length_of(self, episode_id: int) -> int:
        """Listed number of frames T, else that of the rows."""
        listed = self._entry(episode_id).length
        return len(self.table(episode_id).action) if listed is None else listed

    def instruction_of(self, episode_id: int) -> str:
        """The episode's task text, from `meta/` alone where it has one task. Several are joined by "; " in the order
        in which the rows use them. The config's default where there is none."""
        tasks = self._entry(episode_id).tasks
        if len(tasks) == 1 and (tasks[0] in self.meta.texts or not self.meta.texts):
            return tasks[0]
        return self.table(episode_id).instruction

    def success_of(self, episode_id: int) -> bool | None:
        """By a field of the list of episodes, else by a column: whether any row of the episode is marked."""
        entry = self._entry(episode_id)
        name = next((name for name in ("next.success", *SUCCESS) if name in self.meta.features), None)
        if entry.success is not None or name is None:
            return entry.success
        path = self.meta.locate(self._data.path_of(episode_id), self.where(episode_id))
        if path not in self._marks:
            self._marks[path] = read_marks(path, name, self.where(episode_id))
        return self._marks[path].get(episode_id)

    def tables(self, batch_rows: int = 65536) -> Iterator[TableBlock]:
        """As in `Source`; a file of many episodes is read once, front to back, and its blocks come in that order."""
        return self._blocks(self._each_table(batch_rows), batch_rows)

    def _each_table(self, batch_rows: int) -> Iterator[tuple[int, EpisodeTable | Failed]]:
        files: dict[str, set[int]] = {}
        for number in self.episode_ids:
            if number in self.meta.damaged:
                yield number, self.attempt(self.table, number)
            else:
                files.setdefault(self._entry(number).data_path, set()).add(number)
        for data_path, left in files.items():
            # A file that is missing or damaged: what is left is read one by one, each with its own reason.
            with contextlib.suppress(CorruptEpisode), one_episode(self.name, self.path):
                if len(left) > 1:
                    path = self.meta.locate(data_path, self.name)
                    columns = self._wanted(self.config.columns)
                    for number, first, rows in stream_rows(path, columns, batch_rows, self.name):
                        if number in left:
                            left.remove(number)
                            yield number, self.attempt(functools.partial(self._table_of, path, rows, first), number)
            for number in sorted(left):
                yield number, self.attempt(self.table, number)

    def _table_of(self, path: Path, rows: pa.Table, first: int, episode_id: int) -> EpisodeTable:
        where = self.where(episode_id)
        notes = self._data.judge(episode_id, rows, first, where)
        if notes is None:  # its rows may be elsewhere
            return self.table(episode_id)
        found = FoundRows(rows, RowsAt(path, episode_id), self._data.path_of(episode_id), notes)
        return self._checked(self._rows_of(found, self.config.columns, where), where)

    def _rows(self, episode_id: int, columns: Sequence[str], where: str) -> Rows:
        self._entry(episode_id)  # refuses one whose entry is damaged
        return self._rows_of(self._data.find(episode_id, self._wanted(columns), where), columns, where)

    def _rows_of(self, found: FoundRows, columns: Sequence[str], where: str) -> Rows:
        at, entry = found.at, self._entry(found.at.episode_id)
        span = entry.rows[1] - entry.rows[0] if entry.rows else None
        ordered = put_in_order(
            found.table, Listed(entry.length, span, bool(entry.video_paths)), self.fps, found.name, where
        )
        if ordered.order is not None:
            at = at.reordered(ordered.order, where)
        rows = ordered.table
        text, notes = instruction_of(rows, entry, self.meta.tasks, self._texts, where)
        return Rows(
            {name: to_matrix(rows, name, where) for name in columns},
            text,
            ordered.times,
            (*found.notes, *ordered.notes, *notes),
            _Origin(at, ordered.clock),
        )

    def _files(self, episode_id: int, view: str, where: str) -> Sequence[Path]:
        entry, key = self._entry(episode_id), self._cameras[view]
        if self.meta.video_path(entry, key, where):
            return (self._videos[key].path(episode_id, where),)
        return (self.meta.locate(self._data.path_of(episode_id), where),)

    def _views(self, episode_id: int, names: Sequence[str], table: EpisodeTable, where: str) -> Iterator[View]:
        entry, origin = self._entry(episode_id), table.origin
        assert isinstance(origin, _Origin)
        for name in names:
            key = self._cameras[name]
            if key in entry.video_paths:
                extent, notes = self._videos[key].find(episode_id, table.timestamps, origin.clock, where)
                opener = functools.partial(decode, extent, where)
                notes = (*notes, *extent.notes, *self._sizes_differ(key, extent.height, extent.width))
                yield View(name, extent.height, extent.width, len(extent.pts), opener, extent.sha256, notes)
            else:
                fetch = functools.partial(image_file, self.meta.files, key, episode_id, where)
                images = find_images(origin.at, key, fetch, where)
                opener = functools.partial(decode_images, images, fetch, where)
                notes = self._sizes_differ(key, images.height, images.width)
                yield View(name, images.height, images.width, images.length, opener, images.sha256, notes)

    def _sizes_differ(self, key: str, height: int, width: int) -> tuple[Note, ...]:
        """What to say where images are not of the size that info.json gives: theirs is used."""
        listed = self.meta.features[key]["shape"]
        if not listed or {height, width} <= set(listed):
            return ()
        return (Note("image-size", f"'{key}' is {width}x{height}, meta/info.json lists {listed}: read as it is"),)

    @functools.cached_property
    def _videos(self) -> dict[str, CameraFiles]:
        """Feature → the video files of each camera in use."""
        claims: defaultdict[str, defaultdict[str, list[Claim]]] = defaultdict(lambda: defaultdict(list))
        for number, entry in self.meta.episodes.items():
            for key in self._cameras.values():
                if key in entry.video_paths:
                    start, stop = entry.video_starts[key], entry.video_ends.get(key)
                    by_time = None if stop is None else round((stop - start) * self.fps)
                    span = entry.rows[1] - entry.rows[0] if entry.rows else None
                    listed = span if span is not None and by_time == span else entry.length  # two against one
                    length = max(listed or by_time or 0, 0)
                    claims[key][entry.video_paths[key]].append(Claim(number, length, start, stop))
        files = {key: functools.partial(self.meta.video_files, key) for key in claims}
        return {key: CameraFiles(found, self.fps, self.meta.locate, files[key]) for key, found in claims.items()}

    def _read_recording(self) -> None:
        """Task and initial states of a simulator's recording, from `meta/dvla.json` of `dvla data record`."""
        path = self.path / "meta" / "dvla.json"
        if os.path.lexists(path):
            found = read_json(path, _Recording, "record the dataset again")
            self.starts = {int(k): [float(x) for x in v] for k, v in found["starts"].items()}
            self.environment = found["environment"]

    def _entry(self, episode_id: int) -> EpisodeEntry:
        return self.meta.entry(episode_id, self.where(episode_id))

    def _wanted(self, columns: Sequence[str]) -> list[str]:
        return [*columns, *_CHECKED, *self._texts]

    def _widths(self, config: DatasetConfig) -> dict[str, int] | None:
        """Numbers per row of every feature; None where info.json does not tell that of a column of the config."""
        shapes = {key: feature["shape"] for key, feature in self.meta.features.items()}
        if any(not shapes.get(column, [1]) for column in config.columns):
            return None
        return {key: math.prod(shape) for key, shape in shapes.items()}
