"""Diffusion Policy's replay buffers: one Zarr group (v2 or v3), a folder or a zip, all episodes one after another.

    data/<key>              [N, …]; images [N, H, W, 3] or [N, 3, H, W], uint8 or another range
    meta/episode_ends       [E] row after the last of each episode, ascending; rows after the last belong to none

Columns are the keys of `data` ("action", "state"), and so are views; an episode's id is its position in episode_ends
(a leading 0 does not count). Zarr leaves out chunks of nothing but the fill value, mostly 0: they are read as that, and
named by `data check`. Only chunks that an episode touches are read. A task text can be in the group's attributes; else
the config's instruction is used. Letters: N rows, E episodes, H × W image size.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ....errors import Note, UserError
from ..base import Source, choose_views
from ..config import DatasetConfig
from ..episode import CorruptEpisode, View
from ..images.arrays import ArrayForm, channels_of, form_of, is_camera, left_out, range_of
from ..labels import found_in
from ..location import Location
from ..search import Files, choose_config
from ..tables import EpisodeTable, Rows
from .store import ENDS, METADATA, Array, Group

_HUB_PATTERNS = ("data/**", "meta/**", ".zgroup", ".zattrs", "zarr.json", "*.zarr.zip")
_PROBES = 8  # images looked at to tell the range of a float array


class ReplayBufferSource(Source):
    """One replay buffer."""

    format = "replay_buffer"

    def __init__(self, path_or_repo: str, config: DatasetConfig | None = None) -> None:
        """A Zarr folder, a zip of one, or a hub id of either; `config` None finds the shipped one by name.

        `UserError` when it is no replay buffer, an array cannot be understood or needs a codec that is not there,
        episode_ends does not ascend or ends elsewhere than the arrays, or the config does not describe it.
        """
        location = Location(str(path_or_repo), _HUB_PATTERNS)
        name = location.name
        try:
            group = Group.find(location.root, name)
            self._ends = _read_ends(group.array(ENDS, name), name)
            keys = group.keys("data")
            arrays, others = _arrays(group, keys, name)
            columns = functools.partial(_columns, arrays, self._ends)
            config = choose_config(config, self.format, Files((name,), location.root, columns))
            cameras = [k for k, a in arrays.items() if is_camera(k, a.shape, a.dtype)]
            views = choose_views(cameras, config, name)
            used = [key for key in (*config.columns, *views) if key in keys]
            for key in (k for k in used if k in others):
                raise others[key]
            self._arrays = {key: arrays[key] for key in used}
            for array in self._arrays.values():
                array.check_codecs(name)
                array.require_values(name)
            self._forms = {key: _form(self._arrays[key], name) for key in views}
        except CorruptEpisode as error:
            raise UserError(str(error)) from None
        found = (left_out(k, a.shape, a.dtype) for k, a in arrays.items())
        self._notes = (*(note for note in found if note), *_rows_left(self._arrays.values(), self._ends))
        self._text = found_in(group.attributes())
        super().__init__(
            location.root,
            name,
            config,
            view_names=views,
            episode_ids=range(len(self._ends)),
            widths=dict.fromkeys(keys, 0) | {key: math.prod(a.shape[1:]) for key, a in self._arrays.items()},
        )

    @classmethod
    def matches(cls, names: Sequence[str], root: Path | None) -> bool:
        """By meta/episode_ends in the folder or the only one in it, or in its one zip (on the hub by a name that ends
        in .zarr.zip)."""
        if any(f"{ENDS}/{m}" in names for m in METADATA):
            return True
        if root is not None and sum(n.endswith(f"/{ENDS}") for n in names) == 1:
            with contextlib.suppress(CorruptEpisode, UserError):
                return bool(Group.find(root, root.name))
        zips = [n for n in names if n.endswith(".zip") and "/" not in n]
        if root is not None and len(zips) == 1:
            with contextlib.suppress(CorruptEpisode, UserError):
                return bool(Group.find(root / zips[0], zips[0]))
        return len(zips) == 1 and zips[0].endswith(".zarr.zip")  # opening a damaged one says what is wrong

    @functools.cached_property
    def revision_hash(self) -> str:
        """sha256 hex over episode_ends and the metadata of the arrays used."""
        digest = hashlib.sha256(self._ends.tobytes())
        for array in sorted(self._arrays.values(), key=lambda a: a.name):
            digest.update(array.metadata)
        return digest.hexdigest()

    def notes(self) -> tuple[Note, ...]:
        """As in `Source`: arrays that look like images and are none; rows behind the last episode."""
        return self._notes

    def length_of(self, episode_id: int) -> int:
        """Rows by episode_ends."""
        first, last = self._span(episode_id, self.where(episode_id))
        return last - first

    def instruction_of(self, episode_id: int) -> str:
        """That of the group's attributes, else the config's."""
        self.where(episode_id)
        return self._text or self.config.instruction

    @property
    def text_from(self) -> str:  # type: ignore[override]
        """The group's attributes, where they have a task text."""
        return "the group's attributes" if self._text else ""

    def _rows(self, episode_id: int, columns: Sequence[str], where: str) -> Rows:
        first, last = self._span(episode_id, where)
        found: dict[str, np.ndarray] = {}
        notes: list[Note] = []
        for array in (self._arrays[k] for k in columns if k in self._arrays):
            empty: list[str] = []
            found[array.name.removeprefix("data/")] = array.read(first, last, where, empty)
            notes += _empty_chunks(array, empty)
        return Rows(found, self._text, notes=tuple(notes))

    def _files(self, episode_id: int, view: str, where: str) -> Sequence[Path]:
        array = self._arrays[view]
        group = array.group
        if group.files.path.is_file():
            return (group.files.path,)
        folder = group.files.path / group.folder / array.name
        return [folder / name for name in array.chunk_names(*self._span(episode_id, where))]

    def _views(self, episode_id: int, names: Sequence[str], table: EpisodeTable, where: str) -> Iterator[View]:
        first, last = self._span(episode_id, where)
        for key, array in ((name, self._arrays[name]) for name in names):
            form = f"{first}:{last};{array.dtype.str}{array.chunks}{array.shape[1:]}{array.codecs};"
            digest = hashlib.sha256(form.encode())
            empty = []
            for chunk, data in array.stored_chunks(first, last, where):
                digest.update(f"{array.fill};".encode() if data is None else data)
                empty += [chunk] if data is None else []
            height, width = self._forms[key].size(array.shape)
            opener = functools.partial(self._images, key, first, where)
            notes = tuple(_empty_chunks(array, empty))
            yield View(key, height, width, last - first, opener, digest.hexdigest(), notes)

    def _images(self, key: str, first: int, where: str, start: int, stop: int) -> Iterator[np.ndarray]:
        """uint8 [H, W, 3] of the episode's frames start..stop-1; each chunk is decoded once, one is in memory."""
        array, row, end = self._arrays[key], first + start, first + stop
        step = array.chunks[0]
        while row < end:
            upto = min(end, (row // step + 1) * step)
            yield from self._forms[key].to_rgb(array.read(row, upto, where), f"{where}: {array.name}")
            row = upto

    def _span(self, episode_id: int, where: str) -> tuple[int, int]:
        """First row of an episode, and the one after its last; `CorruptEpisode` where that cannot be."""
        first, last = (int(self._ends[episode_id - 1]) if episode_id else 0), int(self._ends[episode_id])
        before = int(self._ends[:episode_id].max(initial=0))
        if last == first:
            raise CorruptEpisode(f"{where}: it has no rows", "row-count")
        if last < first or first < before:
            raise CorruptEpisode(
                f"{where}: {ENDS} goes from {first} to {last} here, and up to {before} before", "row-count"
            )
        for array in self._arrays.values():
            if array.shape[0] < last:
                reason = f"{where}: {array.name} has {array.shape[0]} rows, by {ENDS} it is rows {first} to {last}"
                raise CorruptEpisode(reason, "row-count")
        return first, last


def _read_ends(array: Array, name: str) -> np.ndarray:
    """episode_ends, [E] int64, without a leading 0; `UserError` unless they are whole numbers."""
    if len(array.shape) != 1 or array.dtype.kind not in "iuf" or not array.shape[0]:
        raise UserError(
            f"{name}: {ENDS} is {array.dtype} {list(array.shape)}, expected the end of at least one episode"
        )
    empty: list[str] = []
    ends = array.read(0, array.shape[0], name, empty)
    if empty:
        raise UserError(f"{name}: {ENDS}/{empty[0]} is missing, so no episode can be found; copy it again")
    if not (ends == np.rint(ends)).all() or np.abs(ends).max() >= 2**53:  # False for NaN too
        raise UserError(f"{name}: {ENDS} is no row number at {int((ends != np.rint(ends)).argmax())}: {ends.dtype}")
    ends = ends.astype(np.int64)
    return ends[1:] if len(ends) > 1 and ends[0] == 0 else ends


def _arrays(group: Group, keys: Sequence[str], name: str) -> tuple[dict[str, Array], dict[str, CorruptEpisode]]:
    """The arrays of `data` by key, and why others are no arrays of numbers."""
    arrays, others = {}, {}
    for key in keys:
        try:
            arrays[key] = group.array(f"data/{key}", name)
        except CorruptEpisode as error:
            others[key] = error
    return arrays, others


def _rows_left(arrays: Iterable[Array], ends: np.ndarray) -> Iterator[Note]:
    """Rows behind the last episode, as a recording that was cut off leaves them."""
    rows, last = min((a.shape[0] for a in arrays), default=0), int(ends.max())
    if rows > last:
        text = f"{rows - last} rows after the last episode, {last} to {rows - 1}, belong to none by {ENDS}: not read"
        yield Note("rows-left", text)


def _empty_chunks(array: Array, empty: Sequence[str]) -> Iterator[Note]:
    if empty:
        text = (
            f"{len(empty)} chunks of {array.name} have no file ({empty[0]}): read as {array.fill}, as Zarr does, but a "
        )
        yield Note("chunks-without-file", f"{text}copy that lost files looks the same")


def _form(array: Array, name: str) -> ArrayForm:
    """How the array holds images. `UserError` or `CorruptEpisode` when that cannot be told."""

    def samples() -> Iterator[np.ndarray]:
        for row in np.linspace(0, array.shape[0] - 1, min(_PROBES, array.shape[0])).round().astype(int).tolist():
            with contextlib.suppress(CorruptEpisode):  # reported with the episode it is in
                yield array.read(row, row + 1, name)

    what = f"{name}: {array.name}"
    return form_of(array.shape, array.dtype, range_of(samples(), array.dtype, what), what)


def _columns(arrays: Mapping[str, Array], ends: np.ndarray) -> dict[str, int]:
    """Numbers per row of each array of `data` that is no image and has rows for most of the episodes."""
    usual = float(np.median(ends))
    fitting = {k: a for k, a in arrays.items() if channels_of(a.shape, a.dtype) is None and a.shape[0] >= usual}
    return {key: math.prod(a.shape[1:]) for key, a in fitting.items()}
