"""Zarr groups and arrays in a folder or a zip, found without opening anything but metadata, read chunk by chunk.

Zarr does not write chunks that hold nothing but the fill value, so a chunk without a file is data. A copy that lost
files looks the same, which is why a reader is given their number. Letters: N rows.
"""

from __future__ import annotations

import bz2
import contextlib
import itertools
import lzma
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ....common.documents import json_value
from ....common.text import first_line
from ....errors import UserError
from ..archive import Archive, open_archive
from ..episode import CorruptEpisode

ENDS = "meta/episode_ends"
METADATA = ("zarr.json", ".zarray")  # of an array in v3 and v2
# Those zarr and numcodecs bring; "pickle" and others that build objects are left out on purpose.
_CODECS = frozenset((
    "bytes", "transpose", "blosc", "zstd", "lz4", "gzip", "zlib", "bz2", "lzma", "delta", "shuffle", "bitround",
    "quantize", "fixedscaleoffset", "packbits", "astype", "crc32", "crc32c", "adler32", "fletcher32",
))  # fmt: skip
_MAX_CHUNK = 1 << 30  # bytes of a chunk or a row, unpacked
_MAX_COUNT = 1 << 16  # chunks of a row
_MAX_TEXT = 100  # characters quoted of what a file says
_BLOCK = 1 << 20  # bytes unpacked at a time
_MAX_GROWTH = 8  # times the bytes of a chunk before it was compressed


@dataclass(frozen=True)
class Group:
    """A Zarr group in a folder or a zip."""

    files: Archive
    folder: str  # of the group inside it, "" or ending with "/"

    @classmethod
    def find(cls, root: Path, name: str) -> Group:
        """The group at `root`: a Zarr folder, a zip, or a folder with one zip. `CorruptEpisode` when there is none."""
        zips = sorted(root.glob("*.zip")) if root.is_dir() and not (root / ENDS).is_dir() else []
        group = cls(open_archive(zips[0] if len(zips) == 1 else root), "")
        for _ in range(3):  # people zip the folder, or one around it, as often as its contents
            folders = [e for e in group.files.entries(group.folder) if e.endswith("/") and e != "__MACOSX/"]
            if "meta/" in folders or len(folders) != 1:
                break
            group = cls(group.files, group.folder + folders[0])
        if "episode_ends/" not in group.files.entries(f"{group.folder}meta"):
            raise CorruptEpisode(f"{name} is not a replay buffer: {ENDS} is missing", "missing-file")
        return group

    def keys(self, name: str) -> list[str]:
        """Names of the arrays directly inside the group `name`, sorted."""
        inside = [n.removesuffix("/") for n in self.files.entries(f"{self.folder}{name}") if n.endswith("/")]
        return [n for n in inside if set(METADATA) & set(self.files.entries(f"{self.folder}{name}/{n}"))]

    def array(self, name: str, where: str) -> Array:
        """An array by its metadata. `CorruptEpisode` when it is missing or does not describe an array of numbers."""
        inside = self.files.entries(f"{self.folder}{name}")
        which = next((m for m in METADATA if m in inside), METADATA[0])
        metadata = self.files.read(f"{self.folder}{name}/{which}", where)
        try:
            parse = _parse_v2 if which == ".zarray" else _parse_v3
            return Array(self, name, which, metadata, **parse(json_value(metadata.decode(), nan=True)))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            reason = f"{where}: {name}/{which} does not describe an array of numbers ({str(error)[:_MAX_TEXT]})"
            raise CorruptEpisode(reason) from None

    def attributes(self) -> dict[str, Any]:
        """What people wrote beside the group; {} where that cannot be read."""
        try:
            if ".zattrs" in self.files.entries(self.folder):
                found = json_value(self.files.read(f"{self.folder}.zattrs", "").decode(), nan=True)
            else:
                found = json_value(self.files.read(f"{self.folder}zarr.json", "").decode(), nan=True).get("attributes")
        except (CorruptEpisode, ValueError, AttributeError):
            return {}
        return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Array:
    """One array, by its metadata."""

    group: Group
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
        if self.separator not in (".", "/") or not all(isinstance(c, str) for c in self.codecs):
            raise ValueError(f"chunks named with {self.separator!r}, codecs {self.codecs}")
        row, chunk = self.dtype.itemsize * math.prod(self.shape[1:]), self.chunk_nbytes
        many = math.prod(-(-n // c) for n, c in zip(self.shape[1:], self.chunks[1:]))
        if min(self.shape) < 0 or max(row, chunk) > _MAX_CHUNK or many > _MAX_COUNT:
            raise ValueError(f"{list(self.shape)} in chunks of {list(self.chunks)}: more than is read at once")

    @property
    def chunk_nbytes(self) -> int:
        """Bytes of a chunk, unpacked."""
        return self.dtype.itemsize * math.prod(self.chunks)

    def check_codecs(self, where: str) -> None:
        """`UserError` naming a codec that cannot be decoded here."""
        for codec in self.codecs:
            if codec == "sharding_indexed":
                raise UserError(f"{where}: {self.name} is sharded, which is not read; rewrite it without shards")
            if codec.removeprefix("numcodecs.") not in _CODECS:
                raise UserError(
                    f"{where}: {self.name} is stored with the codec '{codec[:_MAX_TEXT]}', which is not available "
                    f"here; rewrite it with one of {', '.join(sorted(_CODECS))}"
                )

    def chunk_names(self, start: int, stop: int) -> Iterator[str]:
        """Names of the chunk files with rows start..stop-1, relative to the array."""
        rows = range(start // self.chunks[0], -(-stop // self.chunks[0]))
        rest = [range(-(-n // c)) for n, c in zip(self.shape[1:], self.chunks[1:])]
        return (self.head + self.separator.join(map(str, at)) for at in itertools.product(rows, *rest))

    def stored_chunks(self, start: int, stop: int, where: str) -> Iterator[tuple[str, bytes | None]]:
        """(name, stored bytes) of the chunks with rows start..stop-1; None for one without a file, which holds nothing
        but the fill value. `CorruptEpisode` where one is cut off, or is missing and there is no fill value."""
        for name in self.chunk_names(start, stop):
            yield name, self._chunk(name, where)

    def require_values(self, where: str) -> None:
        """`UserError` when not one chunk of the array has a file: they were lost, not left out for being empty."""
        inside = set(self.group.files.entries(f"{self.group.folder}{self.name}"))
        if self.shape[0] and not inside - {self.which, ".zattrs", ".zmetadata", ".zgroup"}:
            raise UserError(f"{where}: {self.name} has no values, only its description; copy the whole folder again")

    def _chunk(self, name: str, where: str) -> bytes | None:
        try:
            data = self.group.files.read(f"{self.group.folder}{self.name}/{name}", where)
        except CorruptEpisode as error:
            if error.kind == "missing-file" and self.fill is not None:
                return None
            raise
        codec = self.codecs[-1] if self.codecs else ""
        if codec.endswith("blosc"):  # whose decoder reads on behind the end of its input
            listed = int.from_bytes(data[12:16], "little")
            if len(data) < 16 or listed != len(data):
                reason = f"{where}: {self.name}/{name} has {len(data)} bytes, its header says {listed}"
                raise CorruptEpisode(reason, "unreadable-file")
        most = _MAX_GROWTH * (self.chunk_nbytes + 1024)  # filters may have made it larger
        if _claimed(codec, data) > most or _streams_beyond(codec, data, most):
            reason = f"{where}: {self.name}/{name} unpacks to more than a chunk's {self.chunk_nbytes:,} bytes"
            raise CorruptEpisode(reason, "unreadable-file")
        return data

    def read(self, start: int, stop: int, where: str, empty: list[str] | None = None) -> np.ndarray:
        """Rows start..stop-1; names of chunks without a file are added to `empty`. `CorruptEpisode` as `stored_chunks`,
        and when a chunk cannot be decoded."""
        import zarr  # 0.6 s, and not needed to find out what a dataset is
        from zarr.registry import get_buffer_class
        from zarr.storage import MemoryStore

        self.check_codecs(where)
        if (stop - start) * self.dtype.itemsize * math.prod(self.shape[1:]) > _MAX_CHUNK:
            raise CorruptEpisode(f"{where}: {stop - start} rows of {self.name} are more than is read at once")
        found = {self.which: self.metadata, **dict(self.stored_chunks(start, stop, where))}
        if empty is not None:
            empty += [name for name, data in found.items() if data is None]
        try:
            stored = {name: get_buffer_class().from_bytes(data) for name, data in found.items() if data is not None}
            store = MemoryStore(stored)
            return np.asarray(zarr.open_array(store, mode="r")[start:stop])
        except Exception as error:  # codecs raise many types: RuntimeError, ValueError, zlib.error, EOFError, …
            reason = f"{where}: rows {start} to {stop - 1} of {self.name} cannot be decoded ({first_line(error)})"
            raise CorruptEpisode(reason, "unreadable-file") from None


_STREAMS = {  # codec without a size in its header → its decoder, and how much it can make of a byte
    "gzip": (lambda: zlib.decompressobj(32 + zlib.MAX_WBITS), 1032),
    "zlib": (zlib.decompressobj, 1032),
    "bz2": (bz2.BZ2Decompressor, 50_000),
    "lzma": (lzma.LZMADecompressor, 10_000),
}


def _streams_beyond(codec: str, data: bytes, most: int) -> bool:
    """Whether a compressed chunk unpacks to more than `most` bytes, tried where it could be more than is read."""
    make, growth = _STREAMS.get(codec.removeprefix("numcodecs."), (None, 0))
    if make is None or len(data) * growth <= _MAX_CHUNK:
        return False
    decoder: Any = make()
    have = 0
    with contextlib.suppress(zlib.error, OSError, EOFError, lzma.LZMAError):  # zarr says what is wrong
        while have <= most:
            block = decoder.decompress(data, _BLOCK)
            data = getattr(decoder, "unconsumed_tail", b"")  # the others keep what is left themselves
            if decoder.eof:  # another stream may follow
                data, decoder = decoder.unused_data, make()
            have += len(block)
            if not block and not data:
                break
    return have > most


def _claimed(codec: str, data: bytes) -> int:
    """Bytes that a compressed chunk claims to unpack to, which its decoder takes at once; 0 where it does not say."""
    if codec.endswith("blosc"):
        return int.from_bytes(data[4:8], "little")
    if codec.endswith("lz4"):
        return int.from_bytes(data[:4], "little")
    if codec.endswith("zstd") and data[:4] == b"\x28\xb5\x2f\xfd" and len(data) > 5:  # RFC 8878, 3.1.1.1
        flags = data[4]
        single = flags >> 5 & 1
        at = 5 + (not single) + (0, 1, 2, 4)[flags & 3]
        size = (single, 2, 4, 8)[flags >> 6]
        return int.from_bytes(data[at : at + size], "little") + 256 * (size == 2)
    return 0


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
