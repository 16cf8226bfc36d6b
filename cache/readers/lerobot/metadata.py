"""What a LeRobot dataset (v2.0, v2.1, v3.0; GR00T's flavor of them) says about itself: info.json, tasks, episodes and
file templates.

Nothing but `meta/` is read here, and the names of files; data files only where `meta/` has no list of the episodes.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ....errors import Kind, Note, UserError
from ..episode import CorruptEpisode
from ..images import choose_cameras
from ..images.arrays import left_out
from ..location import Location, regular
from ..search import BESIDE, NUMBERED
from .documents import Template, flat_names, number, read_json, shown, whole
from .listing import EpisodeEntry, Listing, Paths, is_instruction, read_episodes, read_tasks
from .modality import Modality, read_modality
from .parquet import DAMAGE
from .presence import ANY_CHUNK, presence, recover_episodes

VERSIONS = ("v2.0", "v2.1", "v3.0")
_PATHS = {  # LeRobot's own, where info.json has none
    "data_path": (
        "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
    ),
    "video_path": (
        "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    ),
}
_FIELDS = (("episode_chunk", "episode_index", "chunk_index"), ("chunk_index", "file_index"))
_RATES = (1e-3, 1e5)  # rows per second that can be meant
_DEEP = re.compile(r"gray(f|9|1\d)")  # pixel formats of more than 8 bits in one channel
_CHUNK = 1000  # episodes per folder of v2, where info.json does not say


class Metadata:
    """`meta/` of one dataset. `UserError` when the path is not a LeRobot dataset or its description cannot be used.

    Episodes are `episodes`, or `damaged` where their own entry cannot be used; `notes` tell what was settled.
    """

    def __init__(self, path_or_repo: str) -> None:
        self.files = files = Location(path_or_repo, ["meta/**"])
        self.root, self.name = files.root, files.name
        self.repo = files.hub_id or path_or_repo
        info_path = self.root / "meta" / "info.json"
        if not os.path.lexists(info_path):
            raise UserError(f"{path_or_repo} is not a LeRobot dataset: it has no meta/info.json")
        try:
            self.info: dict[str, Any] = read_json(info_path)
        except ValueError as error:
            raise UserError(f"{path_or_repo}: meta/{error}") from None
        self._listing = Listing()
        self.version = self._version()
        self.info["fps"] = self._fps()
        self.features = self.info["features"] = self._features()
        self.depth_maps = tuple(k for k, f in self.features.items() if _is_depth(f))
        self.video_keys = tuple(k for k, f in self.features.items() if f["dtype"] == "video")
        self._paths = self._templates()
        self._read_lists()
        self.tasks, self.episodes = self._listing.tasks, self._listing.entries
        self.damaged: dict[int, tuple[Kind, str]] = self._listing.damaged

    @property
    def episode_ids(self) -> tuple[int, ...]:
        """Every listed episode, also those whose entry is damaged."""
        return tuple(sorted({*self.episodes, *self.damaged}))

    def entry(self, episode_id: int, where: str) -> EpisodeEntry:
        """A listed episode; `CorruptEpisode`, beginning with `where`, when its entry cannot be used."""
        if episode_id in self.damaged:
            kind, reason = self.damaged[episode_id]
            raise CorruptEpisode(f"{where}: {reason}", kind)
        return self.episodes[episode_id]

    def video_path(self, entry: EpisodeEntry, key: str, where: str) -> str | None:
        """The video file of one camera; None for one whose images are in the table."""
        if key in self.video_keys and key not in entry.video_paths:
            raise CorruptEpisode(f"{where}: meta/episodes has no file or time for '{key}' of it", "missing-file")
        return entry.video_paths.get(key)

    def data_files(self) -> list[str]:
        """Every data file that is here, relative."""
        return self.files.names(self._paths.data.glob())

    def video_files(self, key: str) -> list[str]:
        """Every video file of a camera that is here, relative."""
        found = self.root.glob(self._paths.video.glob(video_key=key)) if self._paths.video else ()
        return [path.relative_to(self.root).as_posix() for path in found]

    def locate(self, relative: str, where: str) -> Path:
        """As `Location.locate`; an episode's own file is also found in the folder of another chunk."""
        try:
            return self.files.locate(relative, where)
        except CorruptEpisode:
            elsewhere = ANY_CHUNK.sub("chunk-*", glob.escape(relative))
            found = [] if self._is_v3 or self.files.hub_id else self.files.names(elsewhere)
            if len(found) != 1 or not (self.root / found[0]).is_file():
                raise
            return self.root / found[0]

    @functools.cached_property
    def modality(self) -> Modality:
        """GR00T's meta/modality.json; empty where there is none or it cannot be used."""
        return read_modality(self.root / "meta" / "modality.json", self.features)

    def dimension_names(self, columns: Sequence[str]) -> list[str] | None:
        """The name of each dimension of these columns by meta/info.json; None where it has none.

        Where they only number the dimensions, GR00T's, as "left_arm.0"."""
        found: list[str] = []
        for column in columns:
            feature = self.features.get(column) or {}
            names, width = list(flat_names(feature.get("names"))), math.prod(feature.get("shape") or [1])
            if len(names) != width or all(map(NUMBERED.fullmatch, names)):
                slices = [s for s in (*self.modality.action, *self.modality.state) if s.column == column]
                parts = {i: f"{s.name}.{i - s.start}" for s in slices for i in range(s.start, s.stop)}
                names = [parts[i] for i in sorted(parts)] if len(parts) == width else names
            if len(names) != width:
                return None
            found += names
        return found

    @functools.cached_property
    def texts(self) -> frozenset[str]:
        """The texts of the tasks that say what to do."""
        return frozenset(filter(is_instruction, self.tasks.values()))

    @property
    def needs_more_texts(self) -> bool:
        """Whether rows may point at a task without an instruction, so that other columns are worth reading."""
        if not self.tasks or "task_index" not in self.features:
            return True
        doubts = any(note.rule.startswith("task-") for note in self._listing.notes)
        return doubts or not all(map(is_instruction, self.tasks.values()))

    def notes(self) -> tuple[Note, ...]:
        """What a user should know about the dataset as a whole, one line each."""
        found = [*self._listing.notes, *self.modality.notes]
        if self.depth_maps:
            found.append(Note("depth-map", f"{', '.join(self.depth_maps)}: depth maps, not read as cameras"))
        named = [k for k in self.features if k.startswith("observation.image") and k not in self.depth_maps]
        if unread := [k for k in named if self.features[k]["dtype"] not in ("video", "image")]:
            kinds = ", ".join(f"{k} ({shown(self.features[k]['dtype'])})" for k in unread)
            found.append(Note("camera-unknown", f"{kinds}: named like cameras, neither video nor image; not read"))
        splits = self.info.get("splits")
        if isinstance(splits, Mapping) and len(splits) > 1:
            parts = ", ".join(f"{name} {shown(value)}" for name, value in list(splits.items())[:3])
            found.append(Note("splits", f"meta/info.json has splits ({parts}); all {len(self.episode_ids)} are read"))
        if self.absent_cameras:
            found.append(Note("camera-without-files", f"no images of {', '.join(self.absent_cameras)}: not read"))
        if not self.files.hub_id:
            stored = {p.name for place in ("", "*/") for p in self.root.glob(f"videos/{place}observation.*")}
            stored |= {name for name in self._stored_columns or () if name.startswith("observation.image")}
            if unlisted := sorted(stored - self.features.keys()):
                text = f"images of {', '.join(unlisted)} are here, but not in meta/info.json: not read"
                found.append(Note("camera-unlisted", text))
            keys = [k for k in self.video_keys if k not in self.absent_cameras]
            here, listed = presence(self.files, self.episodes, keys, not self._is_v3), len(self.episode_ids)
            if here["both"] < listed - len(self.damaged):
                videos = f", {here['videos']} videos" if keys else ""
                counts = f"{here['both']} of {listed} episodes present: {here['tables']} tables{videos}"
                found.append(Note("partly-present", f"{counts}; fetch the others (git lfs pull or hf download)"))
        return tuple(found)

    @functools.cached_property
    def absent_cameras(self) -> tuple[str, ...]:
        """Cameras of info.json that no episode has a file of, or no table a column, while another camera has."""
        keys = [k for k, f in self.features.items() if f["dtype"] in ("video", "image") and k not in self.depth_maps]
        if len(keys) < 2:
            return ()
        stored = self._stored_columns if set(keys) - set(self.video_keys) else None
        template, have = self._paths.video, set[str]()
        if self._is_v3:
            have = {k for entry in self.episodes.values() for k in entry.video_paths}
        elif template is not None:
            have = {k for k in self.video_keys if self.files.has(template.glob(video_key=k))}
        have |= {k for k in keys if k not in self.video_keys and (stored is None or k in stored)}
        return tuple(k for k in keys if have.intersection(keys) and k not in have)

    @functools.cached_property
    def _stored_columns(self) -> set[str] | None:
        """Columns of the first and the last table; None where these are not here or cannot be read."""
        if self.files.hub_id or not self.episodes:
            return None
        ends = {self.episodes[e].data_path for e in (min(self.episodes), max(self.episodes))}
        try:
            return {name for path in ends for name in pq.read_schema(regular(self.root / path)).names}
        except DAMAGE:
            return None

    def revision_hash(self) -> str:
        """sha256 hex over names and bytes of every file in `meta/` but a dataset config."""
        digest = hashlib.sha256()
        for path in sorted(p for p in (self.root / "meta").rglob("*") if p.is_file() and p.name != BESIDE):
            digest.update(f"{path.relative_to(self.root).as_posix()}:{path.stat().st_size};".encode())
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def cameras(self, wanted: Sequence[str] | None) -> dict[str, str]:
        """Short view name → feature of those `wanted` (full keys or short names), None for all; a depth map is none."""
        keys = [k for k, f in self.features.items() if f["dtype"] in ("video", "image")]
        usable = [k for k in keys if k not in self.depth_maps and k not in self.absent_cameras]
        chosen = usable if wanted is None else wanted
        remedy = "rename one of them in meta/info.json"
        found = choose_cameras(keys, "observation.images.", chosen, self.name, remedy)
        for short, key in found.items():
            if key in self.depth_maps:
                raise UserError(f"{self.name}: view '{short}' is a depth map, not a camera; leave it out of `views`")
        return found

    # --- info.json ---

    @property
    def _is_v3(self) -> bool:
        return self.version == "v3.0"

    def _wrong(self, what: str) -> UserError:
        return UserError(f"{self.repo}: {what} in meta/info.json")

    def _version(self) -> str:
        """The version, guessed by the files where info.json has none."""
        storage = self.info.get("storage_format")
        if storage not in (None, "", "parquet"):
            raise UserError(
                f"{self.repo} is stored as {shown(storage)} (storage_format in meta/info.json), which is not readable; "
                "convert it to LeRobot's parquet and mp4"
            )
        given = self.info.get("codebase_version")
        if given is None:
            return "v3.0" if (self.root / "meta" / "episodes").is_dir() else "v2.1"
        version = f"v{given}".replace("vv", "v") if isinstance(given, (str, int, float)) else ""
        if version not in VERSIONS:
            newer = re.match(r"v(\d{1,4})\.(\d{1,4})", version)
            is_newer = newer is not None and (int(newer[1]), int(newer[2])) > (3, 0)
            remedy = "look for a newer dvla, or convert it" if is_newer else "convert it with lerobot"
            raise UserError(
                f"{self.repo}: LeRobot version {version or shown(given)} is not readable; {remedy} to one of "
                f"{', '.join(VERSIONS)}"
            )
        return version

    def _fps(self) -> float:
        try:
            fps = number(self.info.get("fps"))
            if not _RATES[0] <= fps <= _RATES[1]:
                raise ValueError(f"is {fps:g}, expected rows per second")
        except ValueError as error:
            raise self._wrong(f"'fps' {'is missing' if self.info.get('fps') is None else error}") from None
        return fps

    def _features(self) -> dict[str, dict[str, Any]]:
        """Features in plain form: "dtype" a text, "shape" a list of whole numbers ([]: not known), "info" an object."""
        given = self.info.get("features")
        if not isinstance(given, Mapping) or not given:
            raise self._wrong(f"'features' is {'missing' if given is None else shown(given)}, expected an object")
        features = {}
        for key, feature in given.items():
            if not isinstance(feature, Mapping):
                note = f"feature '{key}' of meta/info.json is {shown(feature)}, expected an object: not read"
                self._listing.notes.append(Note("feature-unreadable", note))
                continue
            plain = {**feature, "dtype": str(feature.get("dtype")), "shape": self._shape(key, feature.get("shape"))}
            for name in ("info", "video_info"):
                if not isinstance(plain.get(name), Mapping):
                    plain.pop(name, None)
            features[key] = plain
        return features

    def _shape(self, key: str, shape: Any) -> list[int]:
        try:
            return [whole(n) for n in (shape if isinstance(shape, list) else [shape])] if shape is not None else []
        except ValueError as error:
            self._listing.notes.append(Note("feature-unreadable", f"the shape of '{key}' in meta/info.json {error}"))
            return []

    def _templates(self) -> Paths:
        def template(name: str, extra: Sequence[str] = ()) -> Template:
            text = self.info.get(name) or _PATHS[name][self._is_v3]
            try:
                return Template(text, (*_FIELDS[self._is_v3], *extra))
            except ValueError as error:
                raise UserError(f"{self.repo}: {name} of meta/info.json does not fit {self.version}: {error}") from None

        try:
            chunks = whole(self.info.get("chunks_size")) or _CHUNK
        except ValueError:
            chunks = _CHUNK
        video = template("video_path", ["video_key"]) if self.video_keys else None
        paths = Paths(template("data_path"), video, self.video_keys, chunks)
        try:  # a path that leaves the folder does so for every episode
            for key in self.video_keys if video else ():
                video.glob(video_key=key)  # type: ignore[union-attr]
        except ValueError as error:
            raise UserError(f"{self.repo}: a path of meta/info.json: {error}") from None
        return paths

    def _read_lists(self) -> None:
        files, listing = self.files, self._listing
        read_tasks(files, listing)
        try:
            total = min(whole(self.info.get("total_episodes")), 10**5)
        except ValueError:
            total = 0
        read_episodes(files, self._paths, self._is_v3, total, listing)
        if not listing.entries and not listing.damaged:
            recover_episodes(files, self._paths, self._is_v3, self.info["fps"], listing)


def _is_depth(feature: Mapping[str, Any]) -> bool:
    """Whether a feature is a depth map: marked as one, gray video of more than 8 bits, or a table of such images."""
    about = {**feature, **feature.get("video_info", {}), **feature.get("info", {})}
    if about.get("is_depth_map") or about.get("video.is_depth_map") or feature["dtype"] == "depth":
        return True
    if feature["dtype"] in ("video", "image"):
        return _DEEP.match(str(about.get("video.pix_fmt") or about.get("pix_fmt"))) is not None
    shape = tuple(feature["shape"])
    return (
        feature["dtype"] in ("uint16", "float16", "float32") and left_out("", (1, *shape), np.dtype("f4")) is not None
    )
