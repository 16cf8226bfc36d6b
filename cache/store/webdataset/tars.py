"""A feature cache as WebDataset tars, on disk, behind fsspec URLs or behind pipes. Only this module imports webdataset.

    index.json                          written last: the tars with samples, bytes and crc32c of each (key "shardlist"),
                                        and under "dvla" the other tars and the names of the views
    _meta.tar                           everything but features: cache/store (fingerprint, manifest, channel_scale) and
                                        <dataset>/tables (attributes as json; action, text.embedding, … as npy)
    <dataset>-000000.tar …              one sample per observation
    _quarantine-<dataset>-000000.tar …  observations of quarantined episodes, partly zeros: kept apart, so that a reader
                                        of "shardlist" never trains on them

The key of a sample is <dataset>/<position of the episode in its table>/<frame of the episode>, zero-padded, so that
keys sort as rows do. Its fields:

    features.<view>[.aug<k>].npy        [tokens, width] as stored: float16, int8, or uint8 holding float8_e4m3fn
    scales.<view>[.aug<k>].npy          [tokens] float32, of 8-bit features; feature = code · scale · channel_scale
    action.npy, proprio.npy             [128] float32, unified, not normalized
    json                                dataset, episode_id, step, row, timestamp, instruction, control_hz, …

WebDataset lower-cases fields, so <view> is the camera's name in lower case; view0, view1, … where two would be equal.
The bytes depend only on the cache and the size of a tar (no times, no owners, fixed order). `webdataset.WebDataset`
reads them as they are; `WebDatasetCache` gives them the interface of `Cache`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import re
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np

from ....common.documents import MOST_BYTES, Count, Crc32c, Field, Form, parse_json, require_form
from ....common.files import file_crc32c
from ....errors import UserError
from ..locations import Folder, Place, Url, creating, fetch

INDEX, META, EXPORT_FORMAT = "index.json", "_meta.tar", 1
Entry = dict[str, Any]  # of a tar: url, nsamples, filesize, crc32c
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")  # of a file beside the index, also within a command
_NO_SENSE = "export the cache again"


class TarEntry(Form):
    """A tar beside the index: its name becomes part of paths, URLs and commands."""

    url: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*\.tar$")]
    nsamples: Count
    filesize: Count
    crc32c: Crc32c
    dataset: str = ""  # of observations


class Claim(Form):
    """Whose export it is."""

    export: int
    cache: str
    shard_nbytes: Count


class _Own(Claim):
    meta: TarEntry
    quarantine: list[TarEntry]
    views: dict[str, dict[str, str]]


class _Index(Form):
    kind: Annotated[str, Field(alias="__kind__")] = ""
    wids_version: int
    shardlist: list[TarEntry]
    dvla: _Own


def parse_index(data: bytes, where: str) -> dict[str, Any]:
    """The index of an export in `data`. `UserError` naming `where` when it is damaged or of another format."""
    index: dict[str, Any] = parse_json(data, where, remedy=_NO_SENSE)
    version = require_form(index.get("dvla"), where, dict[str, Any], _NO_SENSE).get("export")
    if type(version) is int and version != EXPORT_FORMAT:
        raise UserError(f"{where} has export format {version}, not {EXPORT_FORMAT}; export the cache again")
    require_form(index, where, _Index, _NO_SENSE)
    names = [e["url"] for e in (index["dvla"]["meta"], *index["shardlist"], *index["dvla"]["quarantine"])]
    if len(set(names)) < len(names):
        raise UserError(f"{where} is damaged: it lists a tar twice; {_NO_SENSE}")
    return index


def labels(views: Sequence[str]) -> dict[str, str]:
    """View → its name in the fields of samples, which WebDataset lower-cases."""
    lower = [v.lower() for v in views]
    clash = len(set(lower)) < len(lower) or any(re.search(r"\.aug\d+$", label) for label in lower)
    return dict(zip(views, (f"view{i}" for i in range(len(views))) if clash else lower))


def field_name(kind: str, label: str, variant: int) -> str:
    """The field of one view's features or scales."""
    return f"{kind}.{label}{f'.aug{variant}' if variant else ''}.npy"


def sample_key(dataset: str, position: int, step: int) -> str:
    """The key of frame `step` of the `position`-th episode."""
    return f"{dataset}/{position:08d}/{step:08d}"


def npy(values: np.ndarray) -> bytes:
    """The .npy file of an array."""
    values = np.ascontiguousarray(values).reshape(values.shape)
    return b"".join((_npy_header(values.dtype.str, values.shape), values.reshape(-1).view(np.uint8).data))


@functools.lru_cache(maxsize=256)
def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


@functools.lru_cache(maxsize=256)
def _parse_header(header: bytes) -> tuple[np.dtype, tuple[int, ...]]:
    """(dtype, shape) of a .npy file from the bytes before its data; `ValueError` when they are something else."""
    file = io.BytesIO(header)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in read:
        raise ValueError(f"npy version {version}")
    shape, fortran, dtype = read[version](file)
    if fortran or dtype.kind not in "biuf" or file.tell() != len(header) or min(shape, default=1) < 0:
        raise ValueError("not a plain array")
    return dtype, shape


class Pipe(Place):
    """`pipe:COMMAND` of WebDataset: a command that takes or gives the bytes of the file {name}.

    Existing files cannot be listed, so an interrupted export starts over.
    """

    resumable = False

    def __init__(self, where: str) -> None:
        if "{name}" not in where:
            raise UserError(
                f"'{where}' has no {{name}}, which stands for the name of each file, as in "
                "'pipe:aws s3 cp - s3://bucket/cache/{name}'"
            )
        self.where = where

    def url(self, name: str) -> str:
        """The command for one file. `UserError` for a name that a shell could read as anything but a name."""
        if not _PLAIN.fullmatch(name):
            raise UserError(f"{name!r} is no file name for a command; export the cache again, or fetch it to a folder")
        return self.where.replace("{name}", name)

    def begin(self, name: str) -> Any:
        return self._run(name, "wb")

    def end(self, name: str, file: Any) -> None:
        file.close()  # raises when the command failed

    def drop(self, name: str, file: Any) -> None:
        with contextlib.suppress(OSError):
            file.close()

    def open(self, name: str) -> Any:
        return self._run(name, "rb")

    def _run(self, name: str, mode: str) -> Any:
        from webdataset.gopen import gopen

        return gopen(self.url(name), mode)


def open_place(where: str) -> Place:
    """The place of a folder, a URL or a pipe; `UserError` for anything else."""
    if where.startswith("pipe:"):
        return Pipe(where)
    return Url(where) if "://" in where and not where.startswith("file://") else Folder(where)


def write_tar(place: Place, name: str, samples: Iterable[Mapping[str, Any]]) -> Entry:
    """Write samples (field → bytes, and `__key__`) as one tar; returns its index entry. `UserError` when that fails."""
    from webdataset import TarWriter

    count = 0
    with creating(place, name) as sink:
        writer = TarWriter(sink, encoder=False, mtime=0, user="", group="", mode=0o644, format="PAX_FORMAT")
        for sample in samples:
            writer.write(sample)
            count += 1
        writer.close()
    return {"url": name, "nsamples": count, "filesize": sink.nbytes, "crc32c": sink.crc}


@dataclass(frozen=True)
class _Tar:
    file: BinaryIO  # seekable; closed with the last reference
    members: dict[str, tuple[int, int]]  # name → (offset of its data, nbytes)


class Tars:
    """Random access to the members of an export's tars; thread-safe.

    Remote tars are copied to an unnamed temporary file in `scratch` when first needed. At most `limit` are kept open.
    With `check`, and whenever one is copied, a tar is compared with its entry before it is read.
    """

    def __init__(self, place: Place, entries: Iterable[Entry], scratch: Path, check: bool) -> None:
        self.place, self.limit, self._scratch, self._check = place, 256, scratch, check
        self._entries = {e["url"]: e for e in entries}
        self._open: OrderedDict[str, _Tar] = OrderedDict()
        self._checked: set[str] = set()
        self._lock = threading.Lock()

    def read(self, tar: str, member: str, dtype: str, shape: tuple[int, ...], target: memoryview) -> None:
        """Fill `target` with the data of one .npy member. `UserError` naming the tar when it is not that array."""

        opened, offset, nbytes = self._member(tar, member)
        begin = max(nbytes - len(target), 0)
        found = self._header(tar, member, opened, offset, begin)
        if found != (np.dtype(dtype), shape):
            raise self.damaged(tar, f"{member} is {found[0]} {list(found[1])}, not {dtype} {list(shape)}")
        while len(target):
            got = os.preadv(opened.file.fileno(), [target], offset + begin)
            if not got:
                raise self.damaged(tar, f"it ends inside {member}")
            target, begin = target[got:], begin + got

    def array(self, tar: str, member: str) -> np.ndarray:
        """A .npy member, memory-mapped read-only."""
        opened, offset, nbytes = self._member(tar, member)
        start = os.pread(opened.file.fileno(), min(nbytes, 10), offset)
        begin = 10 + int.from_bytes(start[8:10], "little")  # the header of version 1, as written by `npy`
        dtype, shape = self._header(tar, member, opened, offset, begin)
        if begin + math.prod(shape) * dtype.itemsize != nbytes or not math.prod(shape):
            raise self.damaged(tar, f"{member} holds {nbytes} bytes for {dtype} {list(shape)}")
        return np.memmap(opened.file, dtype, "r", offset + begin, shape)

    def document(self, tar: str, member: str) -> bytes:
        """The text of a JSON member."""
        opened, offset, nbytes = self._member(tar, member)
        if nbytes > MOST_BYTES:
            raise self.damaged(tar, f"{member} has {nbytes} bytes")
        return os.pread(opened.file.fileno(), nbytes, offset)

    def json(self, tar: str, member: str, form: Any) -> Any:
        """The document in a JSON member, which has `form`."""
        return parse_json(self.document(tar, member), f"{self.place.url(tar)}: {member}", form, _NO_SENSE)

    def fetch(self, tar: str) -> None:
        """Copy a tar onto this machine if it is remote, and index its members."""
        self._get(tar)

    def damaged(self, tar: str, why: str) -> UserError:
        """The error for a damaged tar."""
        return UserError(f"{self.place.url(tar)} is damaged ({why}); export the cache again, or fetch that tar again")

    def _header(
        self, tar: str, member: str, opened: _Tar, offset: int, nbytes: int
    ) -> tuple[np.dtype, tuple[int, ...]]:
        """(dtype, shape) of a .npy member whose header has `nbytes` bytes."""
        try:
            return _parse_header(os.pread(opened.file.fileno(), nbytes, offset))
        except ValueError as error:
            raise self.damaged(tar, f"{member}: {error}") from None

    def _member(self, tar: str, member: str) -> tuple[_Tar, int, int]:
        opened = self._get(tar)
        if member not in opened.members:
            raise self.damaged(tar, f"it has no {member}")
        return opened, *opened.members[member]

    def _get(self, name: str) -> _Tar:
        with self._lock:
            if name not in self._open:
                while len(self._open) >= self.limit:
                    self._open.popitem(last=False)
                self._open[name] = self._load(name)
            self._open.move_to_end(name)
            return self._open[name]

    def _load(self, name: str) -> _Tar:
        entry = self._entries[name]
        file, nbytes, crc = fetch(self.place, name, self._scratch, most=entry["filesize"])
        if isinstance(self.place, Folder) and self._check and name not in self._checked:  # a copy has its crc already
            nbytes, crc = file_crc32c(self.place.path / name)
        if nbytes != entry["filesize"]:
            raise self.damaged(name, f"{nbytes} bytes, {entry['filesize']} were written")
        if crc is not None and crc != entry["crc32c"]:
            raise self.damaged(name, f"crc32c {crc:08x}, {entry['crc32c']:08x} was written")
        self._checked.add(name)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                members = [(m.name, (m.offset_data, m.size)) for m in tar if m.isreg()]
        except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, MemoryError) as error:
            raise self.damaged(name, " ".join(str(error).split()) or "its headers make no sense") from None
        if len(dict(members)) < len(members) or any(size < 0 or at + size > nbytes for _, (at, size) in members):
            raise self.damaged(name, "its members are not all in it, or one is there twice")
        return _Tar(file, dict(members))
