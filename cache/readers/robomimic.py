"""robomimic's HDF5 (also MimicGen's, LIBERO's and RoboCasa's): one file of demonstrations.

    data                        attribute env_args: JSON with env_name and env_kwargs (control_freq, controller_configs)
      demo_N                    one episode, id N; attribute num_samples T
        actions                 [T, da]
        obs/<key>               [T, …] measured before the action; images are uint8 [T, H, W, 3]

Columns are named as in a demo ("actions", "obs/robot0_eef_pos"), views as their key without "_image". robomimic itself
has no task text; the `lang` of attribute ep_meta (RoboCasa) or problem_info (LIBERO) is used where there is one. `mask`
(lists of demos for training and validation), `next_obs`, rewards and simulator states are not read. Letters: T frames,
da action width.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ...errors import UserError
from .base import Source, choose_views, listing_hash
from .config import DatasetConfig
from .episode import CorruptEpisode, View
from .hdf5 import SUFFIXES, find, find_array, has, numbers, one_file, opened, text, view_of
from .search import choose_config
from .tables import EpisodeTable, Rows

_DEMO = re.compile(r"demo_(\d+)")
_POSE = 6  # dimensions of an OSC_POSE action: displacement and rotation


class RobomimicSource(Source):
    """One robomimic file."""

    format = "robomimic"

    def __init__(self, path_or_repo: str, config: DatasetConfig | None = None) -> None:
        """A file, a folder with one, or a hub id of either; `config` None finds the shipped one by env_name and file
        name.

        `UserError` when the file cannot be read, has no demonstration or no image, or the config does not describe it
        (its scale is compared with that of the controller the file was recorded with).
        """
        self._file = one_file(str(path_or_repo))
        stem = self._file.stem
        try:
            with opened(self._file, stem) as file:
                data = find(file, "data", stem)
                demos, about = _demos(data, stem), _json(data, "env_args", stem)
                given = about.get("env_kwargs")
                kwargs = given if isinstance(given, dict) else {}
                environment = str(about.get("env_name") or "")
                names = (environment, stem, self._file.parent.name)
                config = choose_config(config, self.format, names, self._file, lambda: _columns(data, demos))
                self._cameras, widths = _first_demo(data, demos, config.columns, stem)
        except CorruptEpisode as error:
            raise UserError(str(error)) from None
        name = re.sub(r"[^\w.-]+", "_", f"{environment}_{stem}".strip("_"))  # many files are called image.hdf5
        if not self._cameras and config.mapped:
            raise UserError(
                f"{name} has no camera, only low-dimensional observations; extract images with robomimic's "
                "dataset_states_to_obs.py and --camera_names"
            )
        hz = kwargs.get("control_freq")
        super().__init__(
            self._file,
            name,
            config,
            fps=float(hz) if isinstance(hz, (int, float)) and hz > 0 else None,
            view_names=choose_views(tuple(self._cameras), config, name),
            episode_ids=demos,
            widths=widths,
        )
        if config.action_columns == ("actions",):
            _check_controller(config, list(_nested(kwargs.get("controller_configs"))), name)

    @classmethod
    def matches(cls, names: Sequence[str], root: Path | None) -> bool:
        """By an HDF5 file with data/demo_N (or too damaged to tell); on the hub by robomimic's and LIBERO's names."""
        files = [n for n in names if n.endswith(SUFFIXES) and "/" not in n]
        if root is None:
            return any(re.fullmatch(r"((demo|low_dim|image|depth)(_\w+)?|\w+_demo)\.(hdf5|h5)", n) for n in files)
        return any(_has_demos(root / n) for n in files)

    @functools.cached_property
    def revision_hash(self) -> str:
        """sha256 hex over name and size of the file."""
        return listing_hash(self._file.parent, [self._file])

    def length_of(self, episode_id: int) -> int:
        """Rows of the action's first column."""
        where = self.where(episode_id)
        with opened(self._file, where) as file:
            actions = find_array(find(file, f"data/demo_{episode_id}", where), self.config.action_columns[0], where)
            return len(actions) if actions.ndim else 0

    def instruction_of(self, episode_id: int) -> str:
        """The demo's task text, else the config's default."""
        where = self.where(episode_id)
        with opened(self._file, where) as file:
            return _instruction(file, episode_id, where) or self.config.instruction

    def _rows(self, episode_id: int, columns: Sequence[str], where: str) -> Rows:
        first = self.config.action_columns[0]
        with opened(self._file, where) as file:
            demo = find(file, f"data/demo_{episode_id}", where)
            found = {name: np.atleast_1d(numbers(demo, name, where)) for name in columns}
            if (listed := demo.attrs.get("num_samples", len(found[first]))) != len(found[first]):
                reason = f"{where}: '{first}' has {len(found[first])} rows, num_samples says {listed}"
                raise CorruptEpisode(reason, "row-count")
            return Rows(found, _instruction(file, episode_id, where))

    def _files(self, episode_id: int, view: str, where: str) -> Sequence[Path]:
        return (self._file,)

    def _views(self, episode_id: int, names: Sequence[str], table: EpisodeTable, where: str) -> list[View]:
        stored = {name: f"data/demo_{episode_id}/obs/{self._cameras[name]}" for name in names}
        with opened(self._file, where) as file:
            return [view_of(file, self._file, stored[name], name, where) for name in names]


def _demos(data: h5py.Group | h5py.Dataset, where: str) -> list[int]:
    names = list(data) if isinstance(data, h5py.Group) else []
    other = next((n for n in names if not _DEMO.fullmatch(n)), None)
    if other or not names:
        raise CorruptEpisode(f"{where}: data holds {repr(other) if other else 'nothing'}, expected demo_0, demo_1, …")
    return [int(n.removeprefix("demo_")) for n in names]


def _first_demo(
    data: h5py.Group, demos: Sequence[int], columns: Sequence[str], where: str
) -> tuple[dict[str, str], dict[str, int]]:
    """(view name → key in obs, width of each column) of the first demo that has them; empty when none has an image."""
    reasons = []
    for number in sorted(demos):
        here = f"{where} episode {number}"
        try:
            demo = find(data, f"demo_{number}", here)
            obs = find(demo, "obs", here) if has(demo, "obs") else {}
            keys = [key for key in obs if _is_image(find(obs, key, here))]
            if not keys:
                continue
            cameras = {re.sub(r"[^\w-]+", "_", k.removesuffix("_image")): k for k in keys}
            if len(cameras) < len(keys):
                raise UserError(f"{where}: two cameras get the same short name: {', '.join(keys)}; rename one of them")
            return cameras, {c: math.prod(find_array(demo, c, here).shape[1:]) for c in columns}
        except CorruptEpisode as error:
            reasons.append(str(error))
    if reasons:
        raise CorruptEpisode(f"none of its {len(demos)} demos can be used: {reasons[0]}")
    return {}, {}


def _columns(data: h5py.Group, demos: Sequence[int]) -> dict[str, int]:
    """Numbers per row of each array of the first demo, and of its observations, that is no image."""
    demo = data[f"demo_{min(demos)}"]
    found = {name: demo[name] for name in demo}
    if isinstance(obs := found.pop("obs", None), h5py.Group):
        found |= {f"obs/{name}": obs[name] for name in obs}
    arrays = {k: a for k, a in found.items() if isinstance(a, h5py.Dataset) and a.dtype.kind in "fiu" and a.ndim <= 2}
    return {name: math.prod(a.shape[1:]) for name, a in arrays.items() if name not in ("rewards", "dones", "states")}


def _is_image(array: h5py.Group | h5py.Dataset) -> bool:
    return isinstance(array, h5py.Dataset) and array.dtype == np.uint8 and array.ndim == 4 and array.shape[3] == 3


def _json(node: h5py.Group | h5py.Dataset, name: str, where: str) -> dict[str, Any]:
    """The JSON object in an attribute; empty where there is none."""
    if name not in node.attrs:
        return {}
    try:
        found = json.loads(text(node.attrs[name], f"{where}: attribute {name}"))
    except ValueError:
        raise CorruptEpisode(f"{where}: attribute {name} is not JSON") from None
    return found if isinstance(found, dict) else {}


def _instruction(file: h5py.File, number: int, where: str) -> str:
    data = find(file, "data", where)
    found = _json(find(data, f"demo_{number}", where), "ep_meta", where).get("lang")
    found = found or _json(data, "problem_info", where).get("language_instruction") or ""
    return "".join(found).strip().strip('"')  # LIBERO writes a list of letters, in quotes


def _nested(value: Any) -> Iterator[dict[str, Any]]:
    """Every controller description in `controller_configs`: one, a list of them, or grouped by part of the body."""
    if isinstance(value, dict):
        if "type" in value:
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _nested(part)


def _check_controller(config: DatasetConfig, controllers: Sequence[dict[str, Any]], name: str) -> None:
    """`UserError` when the config scales the actions other than the controller did, or takes them for other things."""
    scales = [s.scale for s in config.action if s.delta for _ in range(s.width)][:_POSE]
    meant = "displacements" if len(scales) == _POSE else "something else"
    poses = [c for c in controllers if c["type"] == "OSC_POSE"]
    if controllers and not poses and meant == "displacements":
        raise UserError(
            f"{name}: its controller is {controllers[0]['type']}, dataset config '{config.name}' describes {meant} "
            f"of OSC_POSE; write a dataset config for it"
        )
    for controller in poses:
        relative = bool(controller.get("control_delta", controller.get("input_type", "delta") == "delta"))
        if relative != (meant == "displacements"):
            raise UserError(
                f"{name}: its OSC_POSE actions are {'displacements' if relative else 'absolute poses'}, dataset "
                f"config '{config.name}' describes {meant}; write a dataset config for it"
            )
        largest = controller.get("output_max")
        if relative and isinstance(largest, (int, float, list)):
            given = np.resize(np.asarray(largest, np.float64), _POSE)
            if not np.allclose(given, scales, rtol=1e-3, atol=0):
                raise UserError(
                    f"{name}: its controller moves by {given.tolist()} at full action, dataset config "
                    f"'{config.name}' scales by {scales}; write a dataset config with those scales"
                )


def _has_demos(path: Path) -> bool:
    try:
        with opened(path, path.name) as file:
            data = find(file, "data", path.name)
            return isinstance(data, h5py.Group) and any(_DEMO.fullmatch(n) for n in data)
    except CorruptEpisode as error:
        return error.kind == "unreadable-file"  # no other format could read it, and opening it says what is wrong


READER = RobomimicSource
