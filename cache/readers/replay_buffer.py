"""Diffusion Policy's replay buffers: one Zarr group (v2 or v3), a folder or a zip, all episodes one after another.

    data/<key>              [N, …]; images [N, H, W, 3] or [N, 3, H, W], uint8, or float that ranges to 255 or to 1
    meta/episode_ends       [E] row after the last of each episode, ascending; the last is N

Columns are the keys of `data` ("action", "state"), and so are views; an episode's id is its position in episode_ends.
Zarr reads a chunk whose file is missing as the fill value; here it is refused. Only chunks that an episode touches are
read. There is no task text: the config's instruction is used. Letters: N rows, E episodes, H × W image size.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...common.text import first_line
from ...errors import UserError
from .archive import Archive, open_archive
from .base import Source, choose_views
from .config import DatasetConfig
from .episode import CorruptEpisode, View
from .location import Location
from .search import Files, choose_config
from .tables import EpisodeTable, Rows

_ENDS = "meta/episode_ends"
_HUB_PATTERNS = ("data/**", "meta/**", ".zgroup", "zarr.json", "*.zarr.zip")
_METADATA = ("zarr.json", ".zarray")  # of an array in v3 and v2
# Those zarr and numcodecs bring; "pickle" and others that build objects are left out on purpose.
_CODECS = frozenset((
    "bytes", "transpose", "blosc", "zstd", "lz4", "gzip", "zlib", "bz2", "lzma", "delta", "shuffle", "bitround",
    "quantize", "fixedscaleoffset", "packbits", "astype", "crc32", "crc32c", "adler32", "fletcher32",
))  # fmt: skip
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
            group = _Group.find(location.root, name)
            self._ends = _check_ends(group.array(_ENDS, name), name)
            keys = group.keys("data")
            columns = functools.partial(_columns, group, keys, self._ends, name)
            config = choose_config(config, self.format, Files((name,), location.root, columns))
            views = choose_views([k for k in keys if group.array(f"data/{k}", name).layout], config, name)
            used = [key for key in (*config.columns, *views) if key in keys]
            self._arrays = {key: group.array(f"data/{key}", name) for key in used}
            for array in self._arrays.values():
                if array.shape[0] != self._ends[-1]:
                    raise UserError(f"{name}: {array.name} has {array.shape[0]} rows, {_ENDS} ends at {self._ends[-1]}")
                array.check_codecs(name)
            self._white = {key: _white_level(self._arrays[key], name) for key in views}
        except CorruptEpisode as error:
            raise UserError(str(error)) from None
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
        """By meta/episode_ends in the folder, or in its one zip (on the hub by a name that ends in .zarr.zip)."""
        if any(f"{_ENDS}/{m}" in names for m in _METADATA):
            return True
        zips = [n for n in names if n.endswith(".zip") and "/" not in n]
        if root is not None and len(zips) == 1:
            with contextlib.suppress(CorruptEpisode, UserError):
                return bool(_Group.find(root / zips[0], zips[0]))
        return len(zips) == 1 and zips[0].endswith(".zarr.zip")  # opening a damaged one says what is wrong

    @functools.cached_property
    def revision_hash(self) -> str:
        """sha256 hex over episode_ends and the metadata of the arrays used."""
        digest = hashlib.sha256(self._ends.tobytes())
        for array in sorted(self._arrays.values(), key=lambda a: a.name):
            digest.update(array.metadata)
        return digest.hexdigest()

    def length_of(self, episode_id: int) -> int:
        """Rows by episode_ends."""
        self.where(episode_id)
        return int(np.diff(self._span(episode_id))[0])

    def instruction_of(self, episode_id: int) -> str:
        """The config's."""
        self.where(episode_id)
        return self.config.instruction

    def _rows(self, episode_id: int, columns: Sequence[str], where: str) -> Rows:
        return Rows({k: self._arrays[k].read(*self._span(episode_id), where) for k in columns if k in self._arrays}, "")

    def _files(self, episode_id: int, view: str, where: str) -> Sequence[Path]:
        array = self._arrays[view]
        group = array.group
        if group.files.path.is_file():
            return (group.files.path,)
        folder = group.files.path / group.folder / array.name
        return [folder / name for name in array.chunk_names(*self._span(episode_id))]

    def _views(self, episode_id: int, names: Sequence[str], table: EpisodeTable, where: str) -> Iterator[View]:
        first, last = self._span(episode_id)
        for key, array in ((name, self._arrays[name]) for name in names):
            form = f"{first}:{last};{array.dtype.str}{array.chunks}{array.shape[1:]}{array.codecs};"
            digest = hashlib.sha256(form.encode())
            for chunk in array.chunk_names(first, last):
                digest.update(array.chunk(chunk, where))
            height, width = array.shape[1:3] if array.layout == "last" else array.shape[2:]
            opener = functools.partial(self._images, key, first, where)
            yield View(key, height, width, last - first, opener, digest.hexdigest())

    def _images(self, key: str, first: int, where: str, start: int, stop: int) -> Iterator[np.ndarray]:
        """uint8 [H, W, 3] of the episode's frames start..stop-1; each chunk is decoded once, one is in memory."""
        array, row, end = self._arrays[key], first + start, first + stop
        step = array.chunks[0]
        while row < end:
            upto = min(end, (row // step + 1) * step)
            yield from _to_uint8(array.read(row, upto, where), self._white[key], array, where)
            row = upto

    def _span(self, episode_id: int) -> tuple[int, int]:
        return (int(self._ends[episode_id - 1]) if episode_id else 0), int(self._ends[episode_id])


@dataclass(frozen=True)
class _Group:
    """A Zarr group in a folder or a zip."""

    files: Archive
    folder: str  # of the group inside it, "" or ending with "/"

    @classmethod
    def find(cls, root: Path, name: str) -> _Group:
        """The group at `root`: a Zarr folder, a zip, or a folder with one zip. `CorruptEpisode` when there is none."""
        zips = sorted(root.glob("*.zip")) if root.is_dir() and not (root / _ENDS).is_dir() else []
        group = cls(open_archive(zips[0] if len(zips) == 1 else root), "")
        for _ in range(3):  # people zip the folder, or one around it, as often as its contents
            inside = group.files.entries(group.folder)
            if "meta/" in inside or len(inside) != 1 or not inside[0].endswith("/"):
                break
            group = cls(group.files, group.folder + inside[0])
        if "episode_ends/" not in group.files.entries(f"{group.folder}meta"):
            raise CorruptEpisode(f"{name} is not a replay buffer: {_ENDS} is missing", "missing-file")
        return group

    def keys(self, name: str) -> list[str]:
        """Names of the arrays directly inside the group `name`, sorted."""
        inside = [n.removesuffix("/") for n in self.files.entries(f"{self.folder}{name}") if n.endswith("/")]
        return [n for n in inside if set(_METADATA) & set(self.files.entries(f"{self.folder}{name}/{n}"))]

    def array(self, name: str, where: str) -> _Array:
        """An array by its metadata. `CorruptEpisode` when it is missing or does not describe an array of numbers."""
        inside = self.files.entries(f"{self.folder}{name}")
        which = next((m for m in _METADATA if m in inside), _METADATA[0])
        metadata = self.files.read(f"{self.folder}{name}/{which}", where)
        try:
            return _Array(
                self, name, which, metadata, **(_parse_v2 if which == ".zarray" else _parse_v3)(json.loads(metadata))
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptEpisode(f"{where}: {name}/{which} does not describe an array of numbers ({error})") from None


@dataclass(frozen=True)
class _Array:
    """One array, by its metadata."""

    group: _Group
    name: str  # "data/img"
    which: str  # its metadata file
    metadata: bytes
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype
    head: str  # chunk files are called head + positions joined by separator
    separator: str
    codecs: tuple[str, ...]
    fill: Any  # what zarr gives for a missing chunk

    def __post_init__(self) -> None:
        if (
            self.dtype.kind not in "fiub"
            or not self.shape
            or len(self.shape) != len(self.chunks)
            or min(self.chunks) < 1
        ):
            raise ValueError(f"{self.dtype} {list(self.shape)} in chunks of {list(self.chunks)}")

    @property
    def layout(self) -> str | None:
        """Axis of the three colors: "last", "first", or "both" when that cannot be told; None when it is no image."""
        if len(self.shape) != 4 or not (self.dtype == np.uint8 or self.dtype.kind == "f"):
            return None
        last, first = self.shape[3] == 3, self.shape[1] == 3
        return "both" if last and first else "last" if last else "first" if first else None

    def check_codecs(self, where: str) -> None:
        """`UserError` naming a codec that cannot be decoded here."""
        for codec in self.codecs:
            if codec == "sharding_indexed":
                raise UserError(
                    f"{where}: {self.name} is sharded, which hides missing chunks; rewrite it without shards"
                )
            if codec.removeprefix("numcodecs.") not in _CODECS:
                raise UserError(
                    f"{where}: {self.name} is stored with the codec '{codec}', which is not available here; rewrite "
                    f"it with one of {', '.join(sorted(_CODECS))}"
                )

    def chunk_names(self, start: int, stop: int) -> Iterator[str]:
        """Names of the chunk files with rows start..stop-1, relative to the array."""
        rows = range(start // self.chunks[0], -(-stop // self.chunks[0]))
        rest = [range(-(-n // c)) for n, c in zip(self.shape[1:], self.chunks[1:])]
        return (self.head + self.separator.join(map(str, at)) for at in itertools.product(rows, *rest))

    def chunk(self, name: str, where: str) -> bytes:
        """The stored bytes of a chunk; `CorruptEpisode` when they are missing or cut off."""
        try:
            data = self.group.files.read(f"{self.group.folder}{self.name}/{name}", where)
        except CorruptEpisode as error:
            hint = f"; zarr would read it as {self.fill}, where that is right use write_empty_chunks"
            raise CorruptEpisode(f"{error}{hint if error.kind == 'missing-file' else ''}", error.kind) from None
        if self.codecs and self.codecs[-1].endswith("blosc"):  # whose decoder reads on behind the end of its input
            listed = int.from_bytes(data[12:16], "little")
            if len(data) < 16 or listed != len(data):
                reason = f"{where}: {self.name}/{name} has {len(data)} bytes, its header says {listed}"
                raise CorruptEpisode(reason, "unreadable-file")
        return data

    def read(self, start: int, stop: int, where: str) -> np.ndarray:
        """Rows start..stop-1. `CorruptEpisode` when a chunk is missing or cannot be decoded."""
        import zarr  # 0.6 s, and not needed to find out what a dataset is
        from zarr.registry import get_buffer_class
        from zarr.storage import MemoryStore

        self.check_codecs(where)
        found = {name: self.chunk(name, where) for name in self.chunk_names(start, stop)} | {self.which: self.metadata}
        try:
            store = MemoryStore({name: get_buffer_class().from_bytes(data) for name, data in found.items()})
            return np.asarray(zarr.open_array(store, mode="r")[start:stop])
        except Exception as error:  # codecs raise many types: RuntimeError, ValueError, zlib.error, EOFError, …
            reason = f"{where}: rows {start} to {stop - 1} of {self.name} cannot be decoded ({first_line(error)})"
            raise CorruptEpisode(reason, "unreadable-file") from None


def _parse_v2(about: dict[str, Any]) -> dict[str, Any]:
    return {
        "shape": tuple(map(int, about["shape"])),
        "dtype": np.dtype(about["dtype"]),
        "fill": about["fill_value"],
        "chunks": tuple(map(int, about["chunks"])),
        "separator": about.get("dimension_separator") or ".",
        "head": "",
        "codecs": tuple(c["id"] for c in (*(about["filters"] or ()), about["compressor"]) if c),
    }


def _parse_v3(about: dict[str, Any]) -> dict[str, Any]:
    key = about["chunk_key_encoding"]
    separator = (key.get("configuration") or {}).get("separator", "/" if key["name"] == "default" else ".")
    return {
        "shape": tuple(map(int, about["shape"])),
        "dtype": np.dtype(about["data_type"]),
        "fill": about["fill_value"],
        "chunks": tuple(map(int, about["chunk_grid"]["configuration"]["chunk_shape"])),
        "separator": separator,
        "head": f"c{separator}" if key["name"] == "default" else "",
        "codecs": tuple(c["name"] for c in about["codecs"]),
    }


def _check_ends(array: _Array, name: str) -> np.ndarray:
    """episode_ends, [E] int64; `UserError` unless they ascend from above 0."""
    if len(array.shape) != 1 or array.dtype.kind not in "iu" or not array.shape[0]:
        raise UserError(
            f"{name}: {_ENDS} is {array.dtype} {list(array.shape)}, expected the end of at least one episode"
        )
    ends = array.read(0, array.shape[0], name).astype(np.int64)
    bad = np.diff(ends, prepend=0) <= 0
    if bad.any():
        e = int(bad.argmax())
        raise UserError(f"{name}: {_ENDS} does not increase at episode {e} ({ends[e]} after {ends[e - 1] if e else 0})")
    return ends


def _white_level(array: _Array, name: str) -> float:
    """The value of full brightness: 255 for uint8; for floats 255 or 1 by what up to 8 images hold. `UserError` when
    that cannot be told, or which axis holds the colors."""
    if array.layout == "both":
        raise UserError(
            f"{name}: {array.name} {list(array.shape)} has its colors first or last; store it as [N, H, W, 3]"
        )
    if array.dtype == np.uint8:
        return 255.0
    for row in np.linspace(0, array.shape[0] - 1, min(_PROBES, array.shape[0])).round().astype(int).tolist():
        with contextlib.suppress(CorruptEpisode):  # reported with the episode it is in
            values = array.read(row, row + 1, name).astype(np.float64)
            if values.min() >= 0 and values.max() > 2:  # not 1: resampling overshoots
                return 255.0
            if values.min() >= 0 and values.max() <= 1 and (values % 1 > 0).any():
                return 1.0
    raise UserError(
        f"{name}: {array.name} is {array.dtype} and may range to 1 or to 255, or is no image; store it as uint8, "
        f"or leave it out with `views` in a dataset config"
    )


def _to_uint8(block: np.ndarray, white: float, array: _Array, where: str) -> np.ndarray:
    """Images as stored → uint8 [k, H, W, 3], rounded; `CorruptEpisode` for a value outside 0..white or NaN."""
    if array.layout == "first":
        block = np.moveaxis(block, 1, 3)
    if block.dtype.kind == "f":
        if not (block.min() >= 0 and block.max() <= white):  # False for NaN too
            raise CorruptEpisode(
                f"{where}: {array.name} holds {block.min()} to {block.max()}, its images range to {white:g}"
            )
        block = np.rint(block * (255.0 / white)).astype(np.uint8)
    return np.ascontiguousarray(block)


def _columns(group: _Group, keys: Sequence[str], ends: np.ndarray, name: str) -> dict[str, int]:
    """Numbers per row of each array of `data` that is no image and has a row for each step."""
    arrays = {key: group.array(f"data/{key}", name) for key in keys}
    fitting = {k: a for k, a in arrays.items() if not a.layout and a.shape[0] == ends[-1]}
    return {key: math.prod(a.shape[1:]) for key, a in fitting.items()}


READER = ReplayBufferSource
