"""RLBench demonstrations, as PerAct and `hqfang/RLBench-18-Tasks` lay them out, in zips, tars or unpacked.

`[data/][train/]close_jar[.zip]/[close_jar/]all_variations/episodes/episode7/` (or `variation3/episodes/…`) holds
`low_dim_obs.pkl` (T observations), `variation_descriptions.pkl` and a folder of T images per camera: `front_rgb/0.png`.
Depth and mask images are not read. Any of these folders can be given, a single .zip or .tar, a hub id, or a folder or
zip inside a hub repository (`hqfang/RLBench-18-Tasks/data/val/close_jar.zip`). Only a zip itself tells what it holds,
so all zips below a hub id are fetched when it is opened: the repository is 116 GB, a task a fiftieth of that.

An episode's number is its place in the natural order of the paths, so that it is the same packed and unpacked.
Letters: T frames of the episode.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ....errors import Note, UserError
from ..archive import SUFFIXES
from ..base import Source, choose_views, common, listing_hash, rare_cameras
from ..config import DatasetConfig
from ..episode import CorruptEpisode, View
from ..images import decode_all, survey
from ..search import Files, choose_config
from ..tables import EpisodeTable, Rows
from .layout import LOW_DIM, TEXTS, Place, dataset_name, find_episodes, locate, looks_like_rlbench
from .pickled_values import PickledArray, Record
from .unpickle import load_records

CAMERAS = ("front", "left_shoulder", "right_shoulder", "overhead", "wrist")  # of RLBench, in our order

_IMAGE = re.compile(r"(?:rgb_)?([0-9]{1,9})\.png")
_MAX_FRAMES = 100_000
_MAX_COLUMN = 1 << 27  # bytes of a column of an episode
_FORMATS = ("PNG",)


class RlbenchSource(Source):
    """Demonstrations of one or many RLBench tasks."""

    format = "rlbench"

    def __init__(self, path_or_repo: str, config: DatasetConfig | None = None) -> None:
        """A folder, a .zip or .tar, or a hub id; `config` None finds the shipped one by the names of the folder and
        those around it. `UserError` when there is no episode, or an archive is damaged or refused."""
        path, names = locate(path_or_repo)
        places = find_episodes(path)
        config = choose_config(config, self.format, Files(names, path, lambda: _columns(places)))
        if not places:
            raise UserError(
                f"{path_or_repo} holds no RLBench episode: a folder like all_variations/episodes/episode0 with "
                f"{LOW_DIM}, or {' or '.join(SUFFIXES)} files of them"
            )
        self._places = dict(enumerate(places))
        # The cameras of at least half of the episodes that have any: one without such a camera is damaged.
        seen = [p.cameras for p in places if p.cameras]
        self._rare = rare_cameras(seen)
        cameras = sorted(
            common(seen),
            key=lambda c: (CAMERAS.index(c) if c in CAMERAS else len(CAMERAS), c),
        )
        name = dataset_name(names)
        super().__init__(
            path, name, config, view_names=choose_views(cameras, config, name), episode_ids=tuple(self._places)
        )

    @classmethod
    def matches(cls, names: Sequence[str], root: Path | None) -> bool:
        """As `looks_like_rlbench`."""
        return looks_like_rlbench(names, root)

    @functools.cached_property
    def revision_hash(self) -> str:
        """sha256 hex over names and sizes of the zips and tars and of each unpacked `low_dim_obs.pkl`."""
        files = {
            p.archive.path if p.label and not p.damage else p.archive.path / p.member(LOW_DIM)
            for p in self._places.values()
        }
        return listing_hash(self.path if self.path.is_dir() else self.path.parent, [f for f in files if f.is_file()])

    def notes(self) -> tuple[Note, ...]:
        """As in `Source`: cameras of few episodes."""
        return self._rare

    def length_of(self, episode_id: int) -> int:
        """Number of images of the first camera."""
        where = self.where(episode_id)
        return len(_images(self._place(episode_id, where), self.view_names[0], where))

    def instruction_of(self, episode_id: int) -> str:
        """The first description of the episode's variation; the config's default where there is none."""
        where = self.where(episode_id)
        return _instruction(self._place(episode_id, where), where) or self.config.instruction

    def _rows(self, episode_id: int, columns: Sequence[str], where: str) -> Rows:
        place = self._place(episode_id, where)
        observations, spot = _observations(place, where), f"{place.spot(where)}: {place.member(LOW_DIM)}"
        return Rows({name: _column(observations, name, spot) for name in columns}, _instruction(place, where))

    def _files(self, episode_id: int, view: str, where: str) -> Sequence[Path]:
        place = self._place(episode_id, where)
        if place.archive.path.is_file():
            return (place.archive.path,)
        return [place.archive.path / name for name in _images(place, view, where)]

    def _views(self, episode_id: int, names: Sequence[str], table: EpisodeTable, where: str) -> Iterator[View]:
        place = self._place(episode_id, where)
        for camera in names:
            encoded = _encoded(place, camera, 0, None, where)
            count, height, width, sha256 = survey(encoded, _FORMATS)
            opener = functools.partial(_decode, place, camera, (height, width), where)
            yield View(camera, height, width, count, opener, sha256)

    def _place(self, episode_id: int, where: str) -> Place:
        place = self._places[episode_id]
        if place.damage:
            raise CorruptEpisode(f"{where}: {place.damage}", "unreadable-file")
        return place


def _load(place: Place, name: str, where: str) -> Any:
    member, spot = place.member(name), place.spot(where)
    return load_records(place.archive.read(member, spot), member, spot)


def _observations(place: Place, where: str) -> list[Record]:
    """The T observations of an episode: a `Demo`, or a plain list as older versions of RLBench wrote it."""
    found = _load(place, LOW_DIM, where)
    if isinstance(found, Record) and found.kind == "Demo":
        found = found.fields.get("_observations")
    if (
        not isinstance(found, list)
        or not 0 < len(found) <= _MAX_FRAMES
        or not all(isinstance(o, Record) and o.kind == "Observation" for o in found)
    ):
        raise CorruptEpisode(
            f"{place.spot(where)}: {place.member(LOW_DIM)} holds no list of 1 to {_MAX_FRAMES:,} observations"
        )
    return found


def _columns(places: Sequence[Place]) -> dict[str, int]:
    """Numbers per frame of each attribute of the first observation of the first readable episode."""
    for place in places:
        with contextlib.suppress(CorruptEpisode):
            fields = _observations(place, "")[0].fields
            found = zip(fields, _all_numbers(fields.values()))
            return {name: value.size for name, value in found if value is not None}
    return {}


def _column(observations: Sequence[Record], name: str, spot: str) -> np.ndarray:
    """One attribute of all observations, [T] or [T, ...]."""
    found = _all_numbers([o.fields.get(name) for o in observations])
    values, absent = [v for v in found if v is not None], [i for i, v in enumerate(found) if v is None]
    if not values:
        fields = observations[0].fields
        known = sorted(n for n, v in zip(fields, _all_numbers(fields.values())) if v is not None)
        raise CorruptEpisode(f"{spot} has no numbers called '{name}' (it has {', '.join(known)[:200] or 'none'})")
    if absent:
        raise CorruptEpisode(f"{spot} has no '{name}' in frame {absent[0]}")
    odd = [i for i, v in enumerate(values) if v.shape != values[0].shape]
    if odd:
        raise CorruptEpisode(
            f"{spot}: '{name}' has shape {values[odd[0]].shape} in frame {odd[0]}, {values[0].shape} before"
        )
    if len(values) * values[0].nbytes > _MAX_COLUMN:
        raise CorruptEpisode(f"{spot}: '{name}' is {list(values[0].shape)} in each of {len(values)} frames")
    return np.stack(values)


def _all_numbers(values: Collection[Any]) -> list[np.ndarray | None]:
    """`_numbers` of each, found once of one that stands in many places."""
    found = {key: _numbers(value) for key, value in {id(v): v for v in values}.items()}
    return [found[id(v)] for v in values]


def _numbers(value: Any) -> np.ndarray | None:
    """An attribute's numbers; None when it is not there or something else."""
    if isinstance(value, PickledArray):
        return value.numpy()
    many = value if isinstance(value, (list, tuple)) else (value,)
    if not all(isinstance(v, (bool, int, float)) for v in many):
        return None
    try:
        return np.array(value, np.float64)
    except OverflowError:  # an integer beyond any float
        return None


def _instruction(place: Place, where: str) -> str:
    """The first text that is not empty, "" without any: beside `episodes/` (RLBench), or in the episode (PerAct mixes
    variations)."""
    outer = place.folder.split("/")[:-1]
    for folder in (place.folder, "/".join(outer[:-1] if outer[-1:] == ["episodes"] else outer)):
        if TEXTS in place.archive.entries(folder):
            member, spot = f"{folder}/{TEXTS}".lstrip("/"), place.spot(where)
            texts = load_records(place.archive.read(member, spot), member, spot)
            if not isinstance(texts, (list, tuple)) or not all(isinstance(t, str) for t in texts):
                raise CorruptEpisode(f"{spot}: {member} holds no list of texts")
            if said := next(filter(None, (t.strip() for t in dict.fromkeys(texts))), ""):
                return said
    return ""


def _images(place: Place, camera: str, where: str) -> tuple[str, ...]:
    """Names in the archive of one camera's images, in order."""
    folder = place.member(f"{camera}_rgb")
    found = sorted((int(m[1]), e) for e in place.archive.entries(folder) if (m := _IMAGE.fullmatch(e)))
    if not found:
        reason = f"{place.spot(where)}: {folder} is missing or empty, so there is no image of '{camera}'"
        raise CorruptEpisode(reason, "missing-file")
    for wanted, (number, entry) in enumerate(found):
        if number != wanted:
            raise CorruptEpisode(f"{place.spot(where)}: {folder} has {entry} where image {wanted} should be")
    return tuple(f"{folder}/{entry}" for _, entry in found)


def _encoded(place: Place, camera: str, start: int, stop: int | None, where: str) -> Iterator[tuple[str, bytes]]:
    spot = place.spot(where)
    return ((f"{spot}: {n}", place.archive.read(n, spot)) for n in _images(place, camera, where)[start:stop])


def _decode(
    place: Place, camera: str, size: tuple[int, int], where: str, start: int, stop: int
) -> Iterator[np.ndarray]:
    """Yield uint8 [H, W, 3] RGB of frames start..stop-1; `CorruptEpisode` where an image cannot be decoded."""
    return decode_all(_encoded(place, camera, start, stop, where), size, _FORMATS)
