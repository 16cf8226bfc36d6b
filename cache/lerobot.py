"""LeRobot datasets (v2.0, v2.1, v3.0; video files or pictures in parquet) as episodes, equal to lerobot's own reading.

Opening reads `meta/` only; `table` reads one episode's rows; `load` also finds, but does not decode, its pictures.
Letters: T frames of the episode, ds/da native state and action width.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError, unknown
from .actions import ActionMap
from .dataset_config import DatasetConfig, find_config
from .episode import CorruptEpisode, Episode, View
from .lerobot_meta import EpisodeEntry, Metadata
from .lerobot_tables import decode_images, find_images, read_rows, to_matrix
from .video import decode, find_extent


@dataclass(frozen=True)
class EpisodeTable:
    """The rows of one episode, in native units, without pictures."""

    state: np.ndarray       # [T, ds] float32; ds = 0 where the config has no state
    action: np.ndarray      # [T, da] float32
    timestamps: np.ndarray  # [T] float64 seconds since the episode's start
    instruction: str        # may be empty


def open_source(path_or_repo: str, config: DatasetConfig | None = None) -> "LeRobotSource":
    """Open a LeRobot dataset folder or hub id; `config` None finds the shipped one that fits.

    `UserError` when it is missing, is not a LeRobot dataset, or the config does not describe it.
    """
    return LeRobotSource(Metadata(str(path_or_repo)), config)


class LeRobotSource:
    """One dataset. Cheap to make, safe to use from several threads, holds no open file."""

    def __init__(self, meta: Metadata, config: DatasetConfig | None = None) -> None:
        self._meta = meta
        self.path = meta.root                      # folder of the dataset
        self.name = meta.name                      # safe as a folder name
        self.fps = float(meta.info["fps"])
        self.config = config or find_config(meta.info, meta.name)
        self.control_hz = self.config.control_hz or self.fps
        self.action_map = ActionMap(self.config.action, self.control_hz)
        self.state_map = ActionMap(self.config.state, self.control_hz)
        self._check_width(self.config.action_key, self.action_map)
        if self.config.state:
            self._check_width(self.config.state_key, self.state_map)
        self._cameras = _choose_cameras(meta.features, self.config)  # short name → feature key
        self.view_names = tuple(self._cameras)
        self.episode_ids = tuple(sorted(meta.episodes))  # as listed; a missing file shows when the episode is loaded

    @functools.cached_property
    def revision_hash(self) -> str:
        """sha256 hex over every file of `meta/`."""
        return self._meta.revision_hash()

    @functools.cached_property
    def _recording(self) -> dict[str, Any]:
        """`meta/dvla.json`, which `dvla data record` writes; empty where there is no such file."""
        path = self.path / "meta" / "dvla.json"
        if not path.is_file():
            return {}
        try:
            found = json.loads(path.read_text())
            starts = {int(k): [float(x) for x in v] for k, v in found["starts"].items()}
            return {"environment": str(found["environment"]), "starts": starts}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); record the dataset again") from None

    @property
    def starts(self) -> dict[int, list[float]] | None:
        """Start vector of each recorded simulator episode; None for a dataset that `dvla data record` did not write."""
        return self._recording.get("starts")

    @property
    def environment(self) -> str | None:
        """Name of the simulated task the dataset was recorded in, e.g. "metaworld/push-v3"; None for another dataset."""
        return self._recording.get("environment")

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

    def table(self, episode_id: int) -> EpisodeTable:
        """State, action, time and task of one episode, no picture; `CorruptEpisode` for rows that cannot be used."""
        entry, where = self._entry(episode_id), self._where(episode_id)
        path = self._meta.locate(entry.data_path, where)
        keys = [self.config.action_key, self.config.state_key, "timestamp", "frame_index", "task_index"]
        rows = read_rows(path, episode_id, keys, where)
        length = rows.num_rows
        if length != entry.length or not length:
            raise CorruptEpisode(f"{where}: {entry.data_path} has {length} rows, meta/ lists {entry.length}")
        frames = to_matrix(rows, "frame_index", where)[:, 0]
        if not np.array_equal(frames, np.arange(length)):
            raise CorruptEpisode(f"{where}: frame_index does not run 0..{length - 1}")
        timestamps = to_matrix(rows, "timestamp", where)[:, 0]
        if (np.diff(timestamps) <= 0).any() or timestamps[0] < 0:
            at = int((np.diff(timestamps) <= 0).argmax()) + 1
            raise CorruptEpisode(f"{where}: timestamps do not increase at frame {at}")
        action = to_matrix(rows, self.config.action_key, where).astype(np.float32)
        state = np.zeros((length, 0), dtype=np.float32)
        if self.config.state:
            state = to_matrix(rows, self.config.state_key, where).astype(np.float32)
        for key, values, width in ((self.config.action_key, action, self.action_map.native_dim),
                                   (self.config.state_key, state, self.state_map.native_dim)):
            if values.shape[1] != width:
                raise CorruptEpisode(f"{where}: column '{key}' has {values.shape[1]} dimensions, expected {width}")
        numbers = to_matrix(rows, "task_index", where)[:, 0].astype(int) if "task_index" in rows.column_names else None
        return EpisodeTable(state, action, timestamps, self._instruction(entry, numbers, where))

    def load(self, episode_id: int) -> Episode:
        """One episode, its views lazily decoded; `CorruptEpisode` says what is missing, cut short or not finite."""
        entry, where, table = self._entry(episode_id), self._where(episode_id), self.table(episode_id)
        length, views, digest = len(table.action), [], hashlib.sha256()
        text = np.frombuffer(table.instruction.encode(), np.uint8)
        for values in (text, table.state, table.action, table.timestamps):
            part = values.tobytes()
            digest.update(f"{len(part)};".encode() + part)
        for name, key in self._cameras.items():
            if key in self._meta.video_keys:
                path = self._meta.locate(entry.video_paths[key], where)
                found = find_extent(path, entry.video_starts[key] + table.timestamps, where)
                opener = functools.partial(decode, found, where)
            else:
                path = self._meta.locate(entry.data_path, where)
                found = find_images(path, episode_id, key, length, where)
                opener = functools.partial(decode_images, found, where)
            digest.update(f"{name}:{found.sha256};".encode())
            views.append(View(name, found.height, found.width, length, opener))
        return Episode(self.name, episode_id, digest.hexdigest(), table.instruction, self.control_hz, length,
                       tuple(views), table.state, table.action, table.timestamps)

    def _entry(self, episode_id: int) -> EpisodeEntry:
        if episode_id not in self._meta.episodes:
            raise UserError(f"{self.name} has no episode {episode_id}; it lists {len(self.episode_ids)}, "
                            f"{self.episode_ids[0]} to {self.episode_ids[-1]}" if self.episode_ids
                            else f"{self.name} lists no episodes")
        return self._meta.episodes[episode_id]

    def _where(self, episode_id: int) -> str:
        return f"{self.name} episode {episode_id}"

    def _instruction(self, entry: EpisodeEntry, numbers: np.ndarray | None, where: str) -> str:
        """Text of the rows' `task_index` values; refuses rows that contradict `meta/`."""
        if numbers is None:
            return "; ".join(entry.tasks) or self.config.instruction
        used = list(dict.fromkeys(numbers.tolist()))
        missing = [n for n in used if n not in self._meta.tasks]
        if missing and self._meta.tasks:
            raise CorruptEpisode(f"{where}: task_index {missing[0]} is none of meta/'s {len(self._meta.tasks)} tasks")
        texts = [self._meta.tasks[n] for n in used if n in self._meta.tasks]
        if entry.tasks and set(texts) != set(entry.tasks):
            raise CorruptEpisode(f"{where}: the rows' task is {texts}, meta/ says {list(entry.tasks)}")
        return "; ".join(texts) or self.config.instruction

    def _check_width(self, key: str, mapping: ActionMap) -> None:
        feature = self._meta.features.get(key)
        if feature is None:
            raise UserError(f"{self.name}: {unknown('column', key, self._meta.features)}; dataset config "
                            f"'{self.config.name}' asks for it")
        width = math.prod(feature.get("shape") or [1])
        if width != mapping.native_dim:
            raise UserError(f"{self.name}: '{key}' has {width} dimensions, dataset config '{self.config.name}' "
                            f"describes {mapping.native_dim}; choose or write another dataset config")


def _choose_cameras(features: Mapping[str, dict], config: DatasetConfig) -> dict[str, str]:
    """Short view name → feature key. Depth maps are no pictures and are left out unless a config names them."""
    def is_depth(feature: dict) -> bool:
        details = feature.get("info") or feature.get("video_info") or {}
        return bool(details.get("video.is_depth_map"))

    keys = [k for k, f in features.items() if f.get("dtype") in ("video", "image")]
    last = {k: k.rsplit(".", 1)[-1] for k in keys}
    shared = {name for name, count in Counter(last.values()).items() if count > 1}  # rgb.head, depth.head: keep more
    short = {k: k.removeprefix("observation.images.") if last[k] in shared else last[k] for k in keys}
    short = {k: re.sub(r"[^\w-]+", "_", v) for k, v in short.items()}
    if len(set(short.values())) < len(keys):
        raise UserError(f"two cameras get the same short name: {', '.join(keys)}; rename one of them in meta/info.json")
    if config.views is None:
        return {short[k]: k for k in keys if not is_depth(features[k])}
    by_name = {v: k for k, v in short.items()} | {k: k for k in keys}
    for wanted in config.views:
        if wanted not in by_name:
            raise unknown("view", wanted, by_name)
    return {short[by_name[w]]: by_name[w] for w in config.views}
