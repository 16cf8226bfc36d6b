"""What a LeRobot dataset (v2.0, v2.1, v3.0) says about itself: info.json, tasks, the episodes and the file templates.

Nothing but `meta/` is read here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ....common.text import first_line
from ....errors import UserError
from ..images import choose_cameras
from ..location import Location

VERSIONS = ("v2.0", "v2.1", "v3.0")


@dataclass(frozen=True)
class EpisodeEntry:
    """One listed episode: where its rows and images are (paths relative to the dataset)."""

    length: int
    tasks: tuple[str, ...]
    data_path: str
    video_paths: Mapping[str, str]  # video key → file
    video_starts: Mapping[str, float]  # video key → seconds into that file at which the episode begins
    video_ends: Mapping[str, float] = field(default_factory=dict)  # and ends, where that is listed (v3.0)
    rows: tuple[int, int] | None = None  # [from, to) among all rows, where that is listed (v3.0)


class Metadata:
    """`meta/` of one dataset. `UserError` when the path is not a LeRobot dataset or its description cannot be used."""

    def __init__(self, path_or_repo: str) -> None:
        files = Location(path_or_repo, ["meta/**"])
        self.locate, self.root, self.name = files.locate, files.root, files.name
        self.repo = files.hub_id or path_or_repo
        info_path = self.root / "meta" / "info.json"
        if not info_path.is_file():
            raise UserError(f"{path_or_repo} is not a LeRobot dataset: it has no meta/info.json")
        self.info: dict[str, Any] = _json(info_path)
        self.version = str(self.info.get("codebase_version"))
        if self.version not in VERSIONS:
            raise UserError(
                f"{path_or_repo}: LeRobot version {self.version} is not readable; "
                f"convert it to one of {', '.join(VERSIONS)}"
            )
        for key in ("fps", "features", "data_path"):
            if not self.info.get(key):
                raise UserError(f"{info_path}: '{key}' is missing")
        self.features: dict[str, Any] = self.info["features"]
        self.video_keys = tuple(k for k, f in self.features.items() if f.get("dtype") == "video")
        if self.video_keys and not self.info.get("video_path"):
            raise UserError(f"{info_path}: there are video features ({', '.join(self.video_keys)}) but no 'video_path'")
        self.tasks, self.episodes = self._read_v3() if self.version == "v3.0" else self._read_v2()

    def revision_hash(self) -> str:
        """sha256 hex over names and bytes of every file in `meta/`."""
        digest = hashlib.sha256()
        for path in sorted(p for p in (self.root / "meta").rglob("*") if p.is_file()):
            digest.update(f"{path.relative_to(self.root).as_posix()}:{path.stat().st_size};".encode())
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def cameras(self, wanted: Sequence[str] | None) -> dict[str, str]:
        """Short view name → feature of those `wanted` (full keys or short names); None: all that are no depth map."""

        def is_depth(feature: dict) -> bool:
            return bool((feature.get("info") or feature.get("video_info") or {}).get("video.is_depth_map"))

        keys = [k for k, f in self.features.items() if f.get("dtype") in ("video", "image")]
        chosen = [k for k in keys if not is_depth(self.features[k])] if wanted is None else wanted
        return choose_cameras(keys, "observation.images.", chosen, self.name, "rename one of them in meta/info.json")

    def _read_v2(self) -> tuple[dict[int, str], dict[int, EpisodeEntry]]:
        tasks = {int(t["task_index"]): str(t["task"]) for t in _json_lines(self.root / "meta" / "tasks.jsonl")}
        episodes = {}
        for row in _json_lines(self.root / "meta" / "episodes.jsonl"):
            number = int(row["episode_index"])
            values = {"episode_index": number, "episode_chunk": number // int(self.info.get("chunks_size") or 1000)}
            videos = {k: self._fill("video_path", video_key=k, **values) for k in self.video_keys}
            episodes[number] = EpisodeEntry(
                int(row["length"]),
                tuple(row.get("tasks") or ()),
                self._fill("data_path", **values),
                videos,
                dict.fromkeys(videos, 0.0),
            )
        return tasks, episodes

    def _read_v3(self) -> tuple[dict[int, str], dict[int, EpisodeEntry]]:
        files = sorted((self.root / "meta" / "episodes").glob("*/*.parquet"))
        if not files:
            raise UserError(f"{self.repo}: meta/episodes holds no parquet file; was the recording finalized?")
        table = pa.concat_tables([_table(f, skip="stats/") for f in files], promote_options="default")
        texts = _table(self.root / "meta" / "tasks.parquet").to_pydict()
        # pandas keeps the text in its index
        text_column = next((c for c in ("__index_level_0__", "task") if c in texts), None)
        if text_column is None or "task_index" not in texts:
            raise UserError(f"{self.repo}: meta/tasks.parquet has no task text (columns: {', '.join(texts)})")
        tasks = dict(zip(texts["task_index"], texts[text_column], strict=True))
        episodes = {}

        def numbers(row: dict[str, Any], of: str) -> dict[str, Any]:
            return {name: row[f"{of}/{name}"] for name in ("chunk_index", "file_index")}

        for row in table.to_pylist():
            try:
                videos = {
                    k: self._fill("video_path", video_key=k, **numbers(row, f"videos/{k}")) for k in self.video_keys
                }
                starts = {k: float(row[f"videos/{k}/from_timestamp"]) for k in self.video_keys}
                data = self._fill("data_path", **numbers(row, "data"))
                tasks_of = tuple(row.get("tasks") or ())
                ends = {k: float(row[f"videos/{k}/to_timestamp"]) for k in self.video_keys}
                span = row["dataset_from_index"], row["dataset_to_index"]
                episodes[row["episode_index"]] = EpisodeEntry(row["length"], tasks_of, data, videos, starts, ends, span)
            except KeyError as error:
                raise UserError(f"{self.repo}: meta/episodes has no column {error}") from None
        return tasks, episodes

    def _fill(self, template: str, **values: Any) -> str:
        try:
            path = Path(self.info[template].format(**values))
        except (KeyError, ValueError, IndexError) as error:
            raise UserError(
                f"{self.repo}: {template} '{self.info[template]}' of meta/info.json does not fit "
                f"{self.version} (known: {', '.join(values)}; {type(error).__name__}: {error})"
            ) from None
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"{self.repo}: {template} '{self.info[template]}' of meta/info.json leaves its folder")
        return path.as_posix()


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def _json_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON lines: {error}") from None


def _table(path: Path, skip: str | None = None) -> pa.Table:
    """A parquet file of `meta/`, without the columns that begin with `skip`."""
    try:
        with pq.ParquetFile(path) as file:
            names = [n for n in file.schema_arrow.names if skip is None or not n.startswith(skip)]
            return file.read(columns=names)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read as parquet: {first_line(error)}") from None
