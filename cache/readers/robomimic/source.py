"""robomimic's HDF5 (also MimicGen's, LIBERO's and RoboCasa's): one file of demonstrations.

    data                        attribute env_args: JSON with env_name and env_kwargs (control_freq, controller_configs)
      demo_N                    one episode, id N (also demoN, episode_N, 000N …); attribute num_samples T
        actions                 [T, da]
        obs/<key>               [T, …] measured before the action; images are uint8 [T, H, W, 3]

Columns are named as in a demo ("actions", "obs/robot0_eef_pos"), views as their key without "_image". robomimic itself
has no task text; one is looked for in the attributes and datasets of a demo, then of data and of the file, by name and
in JSON (`lang` of RoboCasa's ep_meta, `language_instruction` of LIBERO's problem_info). Other members of data, `mask`
(lists of demos for training and validation), `next_obs` and simulator states are not read. Letters: T frames, da action
width.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ....common.documents import json_value
from ....errors import Failed, Note, UserError
from ..base import Source, choose_views, common, listing_hash, look_around, rare_cameras
from ..config import DatasetConfig
from ..episode import CorruptEpisode, View
from ..faults import one_episode
from ..hdf5 import (
    DAMAGE,
    SUFFIXES,
    find,
    find_array,
    find_group,
    has,
    members,
    numbers,
    one_file,
    opened,
    readable_group,
    success_of,
    text,
    texts,
)
from ..images.hdf5 import Spans, is_images, left_out_of, spans_over, view_of
from ..labels import found_in, is_task, joined, plain, rank
from ..search import Files, choose_config
from ..tables import EpisodeTable, Rows
from .controller import check_actions, check_controllers, controllers_in

_ACTIONS = ("actions",)  # the column that the controllers of env_args are about
_DEMO = re.compile(r".*?(\d{1,18})")
_PARTS = re.compile(r"(\d{1,18})")
_MUST_BE_JSON = ("ep_meta", "problem_info")  # RoboCasa's and LIBERO's, where the task text is
_DOCUMENTS = (*_MUST_BE_JSON, "env_args", "metadata", "meta", "info")
_GOAL = re.compile(r"\(:language\s([^()]+)\)")
_MAX_TEXTS = 1_000_000  # strings of a dataset, one per row
_POSITION = re.compile(r"(?:.*[/_])?eef?_pos(?:ition)?")  # a column with the measured position


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
                data = find_group(file, "data", stem)
                self._demos, about = _demos(data, stem), _json(data, "env_args", stem)
                given = about.get("env_kwargs")
                kwargs = given if isinstance(given, dict) else {}
                environment = str(about.get("env_name") or "")
                names = (environment, stem, self._file.parent.name)
                config = choose_config(
                    config, self.format, Files(names, self._file, lambda: _columns(data, self._demos))
                )
                self._cameras, widths, self._rare = _usual_demo(data, self._demos, config.columns, stem)
                widths = widths or _columns(data, self._demos)
        except CorruptEpisode as error:
            raise UserError(str(error)) from None
        named = f"{environment[:100]}_{stem}".strip("_")  # many files are called image.hdf5
        name = re.sub(r"[^\w.-]+", "_", named)
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
            fps=float(hz) if isinstance(hz, (int, float)) and 0 < hz < math.inf else None,
            view_names=choose_views(tuple(self._cameras), config, name),
            episode_ids=tuple(self._demos),
            widths=widths,
        )
        self._spans: dict[str, Spans] = {}
        self._controllers = list(controllers_in(kwargs.get("controller_configs")))
        if config.mapped and config.action_columns == _ACTIONS:
            check_controllers(config, self._controllers, name)

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

    def notes(self) -> tuple[Note, ...]:
        """As in `Source`: cameras of few demos, and observations of the first that can be read that look like images
        and are none."""
        for number in self.episode_ids:
            with contextlib.suppress(CorruptEpisode), self._open(number) as (_, demo, where):
                return (*self._rare, *left_out_of(find_group(demo, "obs", where)))
        return self._rare

    def length_of(self, episode_id: int) -> int:
        """Rows of the action's first column."""
        with self._open(episode_id) as (_, demo, where):
            actions = find_array(demo, self.config.action_columns[0], where)
            return len(actions) if actions.ndim else 0

    def instruction_of(self, episode_id: int) -> str:
        """The demo's task text, else the config's default."""
        with self._open(episode_id) as (file, demo, where):
            return _instruction(file, demo, where)[0] or self.config.instruction

    @functools.cached_property
    def text_from(self) -> str:  # type: ignore[override]
        """Where the first demo that can be read has its task text."""
        for number in self.episode_ids:
            if not isinstance(found := self.attempt(self._said, number), Failed):
                return found[1]
        return ""

    def _said(self, episode_id: int) -> tuple[str, str]:
        with self._open(episode_id) as (file, demo, where):
            return _instruction(file, demo, where)

    def success_of(self, episode_id: int) -> bool | None:
        """By the demo's mark; else by its rewards of 0 and 1, where any demo of the file has a 1."""
        with self._open(episode_id) as (_, demo, where):
            marked = success_of(demo, where)
            rewarded = _rewarded(demo, where) if marked is None else None
        return marked if rewarded is None else True if rewarded else False if self._any_rewarded else None

    @functools.cached_property
    def _any_rewarded(self) -> bool:
        """Whether a reward of 1 stands for success in this file: some files have no rewards but zeros."""
        for number in self.episode_ids:
            with contextlib.suppress(CorruptEpisode), self._open(number) as (_, demo, where):
                if _rewarded(demo, where):
                    return True
        return False

    def _rows(self, episode_id: int, columns: Sequence[str], where: str) -> Rows:
        first = self.config.action_columns[0]
        with self._open(episode_id) as (file, demo, _):
            found = {name: np.atleast_1d(numbers(demo, name, where)) for name in columns}
            if (listed := demo.attrs.get("num_samples", len(found[first]))) != len(found[first]):
                reason = f"{where}: '{first}' has {len(found[first])} rows, num_samples says {listed}"
                raise CorruptEpisode(reason, "row-count")
            if self.config.mapped and self.config.action_columns == _ACTIONS:
                position = next((v for c, v in found.items() if _POSITION.fullmatch(c)), None)
                check_actions(found[first], position, self.config, self._controllers, where)
            return Rows(found, _instruction(file, demo, where)[0])

    def _files(self, episode_id: int, view: str, where: str) -> Sequence[Path]:
        return (self._file,)

    def _views(self, episode_id: int, names: Sequence[str], table: EpisodeTable, where: str) -> list[View]:
        stored = {name: f"data/{self._demos[episode_id]}/obs/{self._cameras[name]}" for name in names}
        with opened(self._file, where) as file:
            return [view_of(file, self._file, stored[name], name, where, self._spans_of(name)) for name in names]

    def _spans_of(self, view: str) -> Spans:
        """The values of black and white of a camera, looked for in the whole file once."""
        if view not in self._spans:
            with opened(self._file, self.name) as file:
                stored = [f"data/{demo}/obs/{self._cameras[view]}" for demo in self._demos.values()]
                self._spans[view] = spans_over(file, stored, self.name)
        return self._spans[view]

    @contextlib.contextmanager
    def _open(self, episode_id: int) -> Iterator[tuple[h5py.File, h5py.Group, str]]:
        """The file and the demo, open inside the block, and how messages about it begin."""
        where = self.where(episode_id)
        with opened(self._file, where) as file:
            demo = readable_group(file, f"data/{self._demos[episode_id]}", where)
            if not isinstance(demo, h5py.Group):
                raise CorruptEpisode(f"{where}: data/{self._demos[episode_id]} is no group of a demo's arrays")
            yield file, demo, where


def _demos(data: h5py.Group | h5py.Dataset, where: str) -> dict[int, str]:
    """Episode id → name in `data`: the number in it, or its place in natural order where two have one number."""
    names = [n for n in data if _is_demo(data, n)] if isinstance(data, h5py.Group) else []
    if not names:
        inside = ", ".join(list(data)[:3]) if isinstance(data, h5py.Group) else ""
        raise CorruptEpisode(f"{where}: data holds {inside or 'nothing'}, expected demo_0, demo_1, …")
    numbers = [int(_DEMO.fullmatch(n)[1]) for n in names]  # type: ignore[index]
    if len(set(numbers)) < len(names):
        return dict(enumerate(sorted(names, key=lambda n: [int(p) if p.isdecimal() else p for p in _PARTS.split(n)])))
    return dict(sorted(zip(numbers, names)))


def _is_demo(data: h5py.Group, name: str) -> bool:
    """Whether a member of data is a demo: a group, or a link that should lead to one, with a number at its end."""
    if not _DEMO.fullmatch(name):
        return False
    try:
        link = data.get(name, getlink=True)
        return not isinstance(link, h5py.HardLink) or data.get(name, getclass=True) is h5py.Group
    except DAMAGE:
        return True  # opening it says what is wrong


def _usual_demo(
    data: h5py.Group, demos: Mapping[int, str], columns: Sequence[str], where: str
) -> tuple[dict[str, str], dict[str, int], tuple[Note, ...]]:
    """(view name → key in obs, width of each column, cameras of fewer) of half of the demos looked at; empty when none
    has an image."""

    def look(number: int) -> tuple[list[str], dict[str, int]] | None:
        here = f"{where} episode {number}"
        with one_episode(here):
            demo = readable_group(data, demos[number], here)
            obs = find(demo, "obs", here) if has(demo, "obs") else None
            keys = [key for key in obs if is_images(find(obs, key, here))] if isinstance(obs, h5py.Group) else []
            return (keys, {c: math.prod(find_array(demo, c, here).shape[1:]) for c in columns}) if keys else None

    found, refused = look_around(look, tuple(demos))
    if not found and refused:
        raise CorruptEpisode(f"none of its {len(demos)} demos can be used: {refused[0]}")
    keys = common([seen for seen, _ in found])
    cameras = {re.sub(r"[^\w-]+", "_", k.removesuffix("_image")): k for k in keys}
    if len(cameras) < len(keys):
        raise UserError(f"{where}: two cameras get the same short name: {', '.join(keys)}; rename one of them")
    widths = {c: n for _, seen in found for c, n in seen.items()}
    widths |= dict(common([seen.items() for _, seen in found]))
    return cameras, widths, rare_cameras([seen for seen, _ in found])


def _columns(data: h5py.Group, demos: Mapping[int, str]) -> dict[str, int]:
    """Numbers per row of each array of the first demo, and of its observations, that is no image."""
    found: dict[str, Any] = {}
    with contextlib.suppress(CorruptEpisode):
        found = members(readable_group(data, demos[min(demos)], data.file.filename))
    if isinstance(obs := found.pop("obs", None), h5py.Group):
        found |= {f"obs/{name}": node for name, node in members(obs).items()}
    arrays = {k: a for k, a in found.items() if isinstance(a, h5py.Dataset) and a.dtype.kind in "fiu" and a.ndim <= 2}
    return {name: math.prod(a.shape[1:]) for name, a in arrays.items() if name not in ("rewards", "dones", "states")}


def _json(node: h5py.Group | h5py.Dataset, name: str, where: str, required: bool = True) -> dict[str, Any]:
    """The JSON object in an attribute; empty where there is none, or none is `required` and it is something else."""
    if name not in node.attrs:
        return {}
    try:
        found = json_value(text(node.attrs[name], f"{where}: attribute {name}"), nan=True)
    except (ValueError, CorruptEpisode) as error:
        if not required:
            return {}
        reason = error if isinstance(error, CorruptEpisode) else f"{where}: attribute {name} is not JSON"
        raise CorruptEpisode(str(reason)) from None
    return found if isinstance(found, dict) else {}


def _instruction(file: h5py.File, demo: h5py.Group, where: str) -> tuple[str, str]:
    """(task text, where it is) of a demo, the nearest to it; ("", "") where there is none."""
    for node, place in ((demo, "each demo"), (file["data"], "data"), (file, "the file")):
        about = ((n, _json(node, n, where, n in _MUST_BE_JSON)) for n in _DOCUMENTS if n in node.attrs)
        for name in sorted(filter(rank, node.attrs), key=rank):  # type: ignore[type-var, arg-type]
            found = plain(texts(node.attrs[name], f"{where}: attribute {name}"))
            if is_task(name, found):
                return found, f"attribute {name} of {place}"
        for name, values in about:
            if found := found_in(values):
                return found, f"attribute {name} of {place}"
        if "bddl_file_content" in node.attrs:  # LIBERO's description of the task
            content = text(node.attrs["bddl_file_content"], f"{where}: attribute bddl_file_content")
            if said := _GOAL.search(content):
                return said[1].strip(), f"attribute bddl_file_content of {place}"
        inside = find(node, "obs", where) if node is demo and has(node, "obs") else None
        for group in (g for g in (node, inside) if isinstance(g, h5py.Group)):
            for name in sorted(filter(rank, group), key=rank):  # type: ignore[type-var, arg-type]
                found = _stored_text(group, name, where)
                if is_task(name, found):
                    return found, f"{name} in {place}"
    return "", ""


def _stored_text(group: h5py.Group, name: str, where: str) -> str:
    """What a dataset of strings says, one or one per row; "" where it holds other things."""
    node = find(group, name, where)
    if not isinstance(node, h5py.Dataset) or h5py.check_string_dtype(node.dtype) is None or node.size > _MAX_TEXTS:
        return ""
    return joined(texts(find_array(group, name, where)[()], f"{where}: '{name}'"))


def _rewarded(demo: h5py.Group, where: str) -> bool | None:
    """Whether a demo has a reward of 1; None where it has none, or others than 0 and 1."""
    if not has(demo, "rewards"):
        return None
    rewards = numbers(demo, "rewards", where)
    return bool(rewards.any()) if rewards.size and np.isin(rewards, (0, 1)).all() else None


def _has_demos(path: Path) -> bool:
    try:
        with opened(path, path.name) as file:
            data = find(file, "data", path.name)
            return isinstance(data, h5py.Group) and any(_is_demo(data, n) for n in data)
    except CorruptEpisode as error:
        return error.kind == "unreadable-file"  # no other format could read it, and opening it says what is wrong
