"""Episode-HDF5: one file per episode whose actions and proprioception are already unified. Read here, and written.

    ep_000000.hdf5                      the number is the episode id
      images/view_k                     [T, H, W, 3] uint8 RGB; attribute `name` (*): the camera's (else "view_k")
      actions, proprio                  [T, 128] float32, zero outside their masks
      action_mask, proprio_mask (*)     [128] bool
      timestamps (*)                    [T] float64 seconds
      language                          string, the task
      attributes                        dataset_name, embodiment_id (position in EMBODIMENTS), episode_length, n_views,
                                        action_dim (native width); control_hz, source_hash, settings (*)

(*) is added by `write_episode` and may be missing when reading. Native values are the active slots in slot order,
unchanged; the field map follows from the masks. What is fixed for a dataset must be the same in all files of a folder.
Letters: T frames.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ...common.hub import hub_files
from ...errors import UserError
from ..actions.action_map import ActionMap, FieldSpec
from ..actions.slots import EMBODIMENTS, SLOTS, UNIFIED_DIM
from .base import Source, choose_views, listing_hash, look_around
from .config import DatasetConfig
from .episode import CorruptEpisode, Episode, View
from .hdf5 import find, find_array, has, numbers, opened, success_of, text, whole_file
from .images.hdf5 import view_of, write_images
from .location import Location
from .search import Files, NoConfig, choose_config
from .tables import EpisodeTable, Rows

_FILE = re.compile(r"ep_(\d+)\.hdf5")
_SAMPLED = 8  # files looked into for what they have in common, and for the active proprio slots without a mask
_ROTATIONS = {SLOTS[f"{prefix}_0"]: prefix for prefix in ("eef_angle", "left_eef_angle")}  # first of six slots → prefix
_QUATERNION = 4  # of these six, the first are used where a file keeps a quaternion there (the layout's first form)


@dataclass(frozen=True)
class Header:
    """What every episode of a dataset has in common."""

    dataset_name: str
    embodiment_id: int
    control_hz: float | None  # None: the files do not say
    views: tuple[str, ...]  # names, in the order view_0, view_1, …
    action_mask: tuple[int, ...]  # active slots, ascending
    proprio_mask: tuple[int, ...] | None  # None: the files do not say


class EpisodeHDF5Source(Source):
    """A folder of ep_*.hdf5 files, or one of them."""

    format = "episode_hdf5"

    def __init__(self, path_or_repo: str, config: DatasetConfig | None = None) -> None:
        """A folder, one file, or a hub id. Without `config` the field map, embodiment and rate come from the first file
        that can be read. Files without control_hz need a config that has it, and one that maps the columns `actions`,
        `proprio`.

        `UserError` when no file can be read, a mask names a slot that has no name, or the config does not fit.
        """
        self._location, self._names = _locate(str(path_or_repo))
        self._header = header = self._usual_header()
        self._slots = {"actions": header.action_mask, "proprio": header.proprio_mask or ()}
        if header.proprio_mask is None:  # a config tells, else the values do
            used = ActionMap(config.state, 1.0).mask if config else self._used_slots()
            self._slots["proprio"] = tuple(np.flatnonzero(used).tolist())
        widths = {name: len(slots) for name, slots in self._slots.items()}
        with contextlib.suppress(NoConfig):
            if config is None or header.control_hz is None:
                config = choose_config(
                    config, self.format, Files((self._location.name,), self._location.root, lambda: widths)
                )
        config = config if config and (config.mapped or header.control_hz is None) else self._derived_config()
        super().__init__(
            self._location.root,
            self._location.name,
            config,
            fps=header.control_hz,
            view_names=choose_views(header.views, config, self._location.name),
            episode_ids=tuple(self._names),
            widths=widths,
        )

    @classmethod
    def matches(cls, names: Sequence[str], root: Path | None) -> bool:
        """By a file ep_<number>.hdf5."""
        return any(_FILE.fullmatch(n) for n in names)

    @functools.cached_property
    def revision_hash(self) -> str:
        """sha256 hex over names and sizes of the files (those of a hub dataset are all fetched for it)."""
        found = (self.attempt(lambda n: self._path(n, self.where(n)), number) for number in self._names)
        paths = [path for path in found if isinstance(path, Path)]
        return listing_hash(paths[0].parent if paths else self.path, paths)

    def length_of(self, episode_id: int) -> int:
        """Rows of `actions`."""
        where = self.where(episode_id)
        with opened(self._path(episode_id, where), where) as file:
            return len(_wide(find_array(file, "actions", where), "actions", where))

    def instruction_of(self, episode_id: int) -> str:
        """The file's `language`; the config's default where that is empty."""
        where = self.where(episode_id)
        with opened(self._path(episode_id, where), where) as file:
            return _language(file, where) or self.config.instruction

    def success_of(self, episode_id: int) -> bool | None:
        """By an attribute or a dataset of the file."""
        where = self.where(episode_id)
        with opened(self._path(episode_id, where), where) as file:
            return success_of(file, where)

    def _rows(self, episode_id: int, columns: Sequence[str], where: str) -> Rows:
        with opened(self._path(episode_id, where), where) as file:
            self._check_header(read_header(file, where), where)
            found = {name: self._active(file, name, where) for name in {"actions", *columns} & set(self._slots)}
            rows = len(found["actions"])
            if (listed := file.attrs.get("episode_length", rows)) != rows:
                raise CorruptEpisode(f"{where}: 'actions' has {rows} rows, episode_length says {listed}", "row-count")
            times = numbers(file, "timestamps", where) if has(file, "timestamps") else None
            return Rows(found, _language(file, where), times)

    def _files(self, episode_id: int, view: str, where: str) -> Sequence[Path]:
        return (self._path(episode_id, where),)

    def _views(self, episode_id: int, names: Sequence[str], table: EpisodeTable, where: str) -> list[View]:
        path = self._path(episode_id, where)
        with opened(path, where) as file:
            return [view_of(file, path, f"images/view_{self._header.views.index(name)}", name, where) for name in names]

    def _active(self, file: h5py.File, name: str, where: str) -> np.ndarray:
        """[T, active] of `actions` or `proprio`; a value outside the mask would be lost, so it is refused."""
        values, slots = _wide(numbers(file, name, where), name, where), list(self._slots[name])
        outside = np.delete(np.arange(UNIFIED_DIM), slots)
        lost = values[:, outside] != 0  # True for NaN too
        if lost.any():
            row, column = np.argwhere(lost)[0]
            slot = outside[column]
            raise CorruptEpisode(
                f"{where}: '{name}' is {values[row, slot]} at frame {row} in slot {slot}, which is not active; "
                f"correct the mask, or give a dataset config"
            )
        return values[:, slots]

    def _path(self, number: int, where: str) -> Path:
        root = self._location.root
        return root if root.is_file() else self._location.locate(self._names[number], where)

    def _usual_header(self) -> Header:
        """The header of most of the files looked at; of a hub dataset of the first that can be read."""

        def look(number: int) -> Header:
            name = self._names[number]
            with opened(self._path(number, name), name) as file:
                return read_header(file, name)

        found, refused = look_around(look, tuple(self._names), 1 if self._location.hub_id else _SAMPLED)
        if not found:
            raise UserError(
                f"none of the {len(refused)} ep_*.hdf5 files of {self._location.given} can be read: {refused[0]}"
            )
        return Counter(found).most_common(1)[0][0]

    def _check_header(self, header: Header, where: str) -> None:
        for field in dataclasses.fields(Header):
            mine, common = getattr(header, field.name), getattr(self._header, field.name)
            if mine != common:
                raise CorruptEpisode(
                    f"{where}: its {field.name} is {mine}, the dataset's {common}; keep one dataset per folder"
                )

    def _used_slots(self) -> np.ndarray:
        """[128] bool: slots of `proprio` not always zero in up to 8 episodes spread over the source; a row of several
        may be damaged. A rotation counts as a whole: six slots, or the first four where the last two are never used (a
        quaternion)."""
        every, filled, rows = list(self._names), np.zeros(UNIFIED_DIM, int), 0
        for i in np.linspace(0, len(every) - 1, min(_SAMPLED, len(every))).round().astype(int):
            name = self._names[every[i]]
            with contextlib.suppress(CorruptEpisode), opened(self._path(every[i], name), name) as file:
                values = _wide(numbers(file, "proprio", name), "proprio", name)
                if values[:, ~_NAMED].any():  # damaged: nothing writes there
                    continue
                filled, rows = filled + (values != 0).sum(axis=0), rows + len(values)
        used = filled > (rows > 1)
        for first in _ROTATIONS:
            if used[first : first + 6].any():
                used[first : first + (6 if used[first + _QUATERNION : first + 6].any() else _QUATERNION)] = True
        return used

    def _derived_config(self) -> DatasetConfig:
        header, name = self._header, self._location.name
        if header.control_hz is None:
            raise UserError(
                f"{name}: the files do not give the number of rows per second; set their attribute control_hz "
                f"(Hz), or give --dataset-config with format episode_hdf5, control_hz and the field map"
            )
        note = "field map from the masks in the files"
        if header.proprio_mask is None:
            note += f"; they have no proprio_mask: its slots are those not always zero in up to {_SAMPLED} episodes"
        return DatasetConfig(
            name=re.sub(r"[^\w.-]+", "_", header.dataset_name) or name,
            match=(),
            format=self.format,
            note=note,
            embodiment=EMBODIMENTS[header.embodiment_id],
            control_hz=header.control_hz,
            action=field_map(self._slots["actions"]),
            action_columns=("actions",),
            state=field_map(self._slots["proprio"]),
            state_columns=("proprio",),
        )


def read_header(file: h5py.File, where: str) -> Header:
    """What the file says about its dataset; `CorruptEpisode` when a part is missing or impossible."""
    for name in ("dataset_name", "embodiment_id", "n_views"):
        if name not in file.attrs:
            raise CorruptEpisode(f"{where}: attribute {name} is missing", "missing-file")
    embodiment, hz = file.attrs["embodiment_id"], file.attrs.get("control_hz")
    if not isinstance(embodiment, (int, np.integer)) or not 0 <= embodiment < len(EMBODIMENTS):
        raise CorruptEpisode(f"{where}: embodiment_id is {embodiment}, allowed are 0 to {len(EMBODIMENTS) - 1}")
    if hz is not None and not (isinstance(hz, (int, float, np.integer, np.floating)) and np.isfinite(hz) and hz > 0):
        raise CorruptEpisode(f"{where}: control_hz is {hz}, it must be positive")
    images = find(file, "images", where)
    stored = set(images) if isinstance(images, h5py.Group) else set()
    numbered = [f"view_{k}" for k in range(len(stored))]
    if stored != set(numbered) or file.attrs["n_views"] != len(stored):
        raise CorruptEpisode(f"{where}: images holds {sorted(stored)}, n_views says {file.attrs['n_views']}")
    names = tuple(text(find(images, n, where).attrs.get("name", n), f"{where}: the name of {n}") for n in numbered)
    if len(set(names)) < len(names) or not all(re.fullmatch(r"[\w-]+", n) for n in names):
        raise CorruptEpisode(
            f"{where}: view names {list(names)} must differ and consist of letters, digits, '_' and '-'"
        )
    action = _mask(file, "action_mask", where)
    if not action:
        raise CorruptEpisode(f"{where}: 'action_mask' has no active slot")
    proprio = _mask(file, "proprio_mask", where) if has(file, "proprio_mask") else None
    name = text(file.attrs["dataset_name"], f"{where}: dataset_name")
    return Header(name, int(embodiment), None if hz is None else float(hz), names, action, proprio)


_NAMED = np.isin(np.arange(UNIFIED_DIM), list(SLOTS.values()))  # [128] slots that mean something


def field_map(slots: Sequence[int]) -> tuple[FieldSpec, ...]:
    """The field map of a vector that holds these unified slots in ascending order. A rotation whose six slots are all
    there is 6D; one that is there in part is kept unchanged (`legacy`). `UserError` for a slot that has no name."""
    names = {slot: name for name, slot in reversed(SLOTS.items())}  # the first name of each slot
    names |= {SLOTS[n]: n for n in SLOTS if re.fullmatch(r"(left_)?gripper_open(_vel)?", n)}
    groups: list[
        tuple[int | None, list[int]]
    ] = []  # (first slot of the rotation or None, slots), slots of one kind together
    for slot in slots:
        if slot not in names:
            raise UserError(f"slot {slot} is active but has no name in the unified space; correct the mask")
        rotation = next((first for first in _ROTATIONS if first <= slot < first + 6), None)
        if not groups or groups[-1][0] != rotation:
            groups.append((rotation, []))
        groups[-1][1].append(slot)
    return tuple(
        FieldSpec(rotation="rot6d", prefix=_ROTATIONS[first])
        if first is not None and len(group) == 6
        else FieldSpec(fields=tuple(names[s] for s in group), legacy=first is not None)
        for first, group in groups
    )


def write_episode(
    path: Path,
    episode: Episode,
    action: np.ndarray,
    proprio: np.ndarray,
    attributes: Mapping[str, Any],
    masks: Mapping[str, np.ndarray],
    compression: str | None = None,
) -> None:
    """Write one file, complete or not at all; images go in one by one. `action`, `proprio` float32 [T, 128]; `masks`
    action_mask and proprio_mask bool [128]; `attributes` at least embodiment_id and action_dim; `compression` of images
    None or "gzip". `CorruptEpisode` when an image cannot be decoded, `UserError` when the file cannot be written."""
    own = {
        "dataset_name": episode.dataset,
        "episode_length": episode.length,
        "n_views": len(episode.views),
        "control_hz": episode.control_hz,
    }
    pixels = 0 if compression else sum(view.height * view.width * 3 for view in episode.views)
    with whole_file(path, episode.length * (pixels + 2 * 4 * UNIFIED_DIM)) as file:
        file.attrs.update({**own, **attributes})
        for name, values in {"actions": action, "proprio": proprio, "timestamps": episode.timestamps, **masks}.items():
            file[name] = values
        file["language"] = episode.instruction
        for k, view in enumerate(episode.views):
            write_images(file, f"images/view_{k}", view, compression, f"{episode.dataset} episode {episode.episode_id}")
            file[f"images/view_{k}"].attrs["name"] = view.name


def read_attributes(path: Path, where: str) -> dict[str, Any]:
    """Attributes of a written file; `CorruptEpisode`, beginning with `where`, when it cannot be read."""
    with opened(path, where) as file:
        return dict(file.attrs)


def episode_files(names: Sequence[str]) -> dict[int, str]:
    """Episode number → file name, ascending; other names are skipped. `UserError` when two have one number."""
    found = sorted((int(m[1]), m[0]) for m in map(_FILE.fullmatch, names) if m)
    for (first, one), (second, other) in zip(found, found[1:]):
        if first == second:
            raise UserError(f"{one} and {other} are both episode {first}; remove one of them")
    return dict(found)


def _locate(given: str) -> tuple[Location, dict[int, str]]:
    """The dataset's place and its files. Of a hub dataset only the first is fetched now."""
    path = Path(given).expanduser()
    files = episode_files([path.name] if path.is_file() else os.listdir(path) if path.is_dir() else hub_files(given))
    if not files:
        raise UserError(f"{given} holds no file ep_<number>.hdf5")
    return Location(given, (files[min(files)],)), files


def _wide(values: Any, name: str, where: str) -> Any:
    """`values` when they are [T, 128]."""
    if values.ndim != 2 or values.shape[1] != UNIFIED_DIM:
        raise CorruptEpisode(f"{where}: '{name}' is {list(values.shape)}, expected [T, {UNIFIED_DIM}]")
    return values


def _mask(file: h5py.File, name: str, where: str) -> tuple[int, ...]:
    """Active slots of a mask, ascending."""
    values = numbers(file, name, where)
    if values.shape != (UNIFIED_DIM,) or not np.isin(values, (0, 1)).all():
        raise CorruptEpisode(
            f"{where}: '{name}' is {values.dtype} {list(values.shape)}, expected {UNIFIED_DIM} booleans"
        )
    return tuple(np.flatnonzero(values).tolist())


def _language(file: h5py.File, where: str) -> str:
    return text(find_array(file, "language", where)[()], f"{where}: 'language'").strip()


READER = EpisodeHDF5Source
