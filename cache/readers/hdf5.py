"""HDF5 files as readers use them: opened and closed per call, links followed only inside the file, damage in one line.

What HDF5 fills in silently is refused: chunks that were never written, datasets whose values are in other files.
Letters: T rows or frames of an episode, H × W image size.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ...common.files import publish, temporary_name
from ...common.hub import hub_files
from ...common.text import first_line
from ...errors import UserError
from .episode import CorruptEpisode
from .hdf5_child import can_be_read
from .labels import SUCCESS, truth
from .location import Location, absence

SUFFIXES = (".hdf5", ".h5")
_MAX_HOPS = 16  # soft links followed in a row; more is a loop
_MAX_TABLE = 1 << 30  # bytes of a table or of one chunk, unpacked; more is a damaged description
_MEANINGS = (  # of what HDF5 says when it opens a file
    ("unable to lock", "is open in a program that may still write to it; close that, or read a copy of the file"),
    (
        "already open for write",
        "was not closed by the program that wrote it; when none writes to it any more, run h5clear -s on it",
    ),
    ("truncated file", "cannot be read as HDF5: it is cut short ({sizes} bytes); copy it again"),
    ("signature not found", "cannot be read as HDF5: it is another kind of file, or its beginning is damaged"),
)
_ENDLESS = "is damaged: reading it does not end, or ends the process; copy it again"
DAMAGE = (OSError, RuntimeError, ValueError, KeyError, TypeError, MemoryError)  # what h5py raises for damaged files


@contextlib.contextmanager
def opened(path: Path, where: str) -> Iterator[h5py.File]:
    """The file, open for reading. `CorruptEpisode`, beginning with `where`, when it is not an HDF5 file, is cut short,
    or something of it cannot be read inside the block."""
    if not path.is_file():
        raise CorruptEpisode(f"{where}: {path.name} {absence(path) or 'is missing'}", "missing-file")
    if not can_be_read(path):
        raise CorruptEpisode(f"{where}: {path.name} {_ENDLESS}", "unreadable-file")
    try:
        with h5py.File(path, "r", locking="best-effort") as file:
            yield file
    except DAMAGE as error:
        raise CorruptEpisode(f"{where}: {path.name} {absence(path) or _meaning(error)}", "unreadable-file") from None


def _meaning(error: Exception) -> str:
    """What an error of HDF5 says about the file, and what to do."""
    said = first_line(error)
    sizes = " of ".join(re.findall(r"eof = (\d+)", said))  # those there, those written down
    known = (text.format(sizes=sizes) for sign, text in _MEANINGS if sign in said)
    return next(known, f"cannot be read as HDF5 ({said})")


def one_file(given: str) -> Path:
    """The HDF5 file that `given` means: itself, or the only one of a folder, here or on the hub ("owner/name/x.hdf5"
    names one there). `UserError` when there is none, or several."""
    path = Path(given).expanduser()
    if path.is_file():
        return path
    folder, _, file = given.partition("@")[0].rpartition("/")
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir() if p.is_file())
    elif file.endswith(SUFFIXES) and folder.count("/") and not path.is_absolute():
        names, given = [file], given.replace(f"/{file}", "", 1)
    else:
        names = hub_files(given)
    found = [n for n in names if n.endswith(SUFFIXES) and "/" not in n]
    if not found:
        raise UserError(f"{given} holds no HDF5 file")
    if len(found) > 1:
        listed = f"{len(found)} HDF5 files ({', '.join(found[:4])}); give one of them, e.g. {given}/{found[-1]}"
        raise UserError(f"{given} holds {listed}")
    try:
        return Location(given, (found[0],)).locate(found[0], given)
    except CorruptEpisode as error:
        raise UserError(str(error)) from None


def has(group: h5py.Group, name: str) -> bool:
    """Whether `group` has a member of that name, followed or not."""
    return group.get(name, getlink=True) is not None


def find(group: h5py.Group, name: str, where: str) -> h5py.Group | h5py.Dataset:
    """The member `name` ("a/b") of `group`. `CorruptEpisode` when it is absent or a link leads out of the file."""
    parts, here, hops = [p for p in name.split("/") if p], group, 0
    while parts:
        part = parts.pop(0)
        link = here.get(part, getlink=True) if isinstance(here, h5py.Group) else None
        if link is None:
            raise CorruptEpisode(f"{where}: '{name}' is missing", "missing-file")
        if isinstance(link, h5py.ExternalLink):
            raise CorruptEpisode(
                f"{where}: '{name}' is a link into another file ({link.filename}); copy the data into one file"
            )
        if isinstance(link, h5py.SoftLink):
            hops += 1
            if hops > _MAX_HOPS:
                raise CorruptEpisode(f"{where}: '{name}' is a link that leads in a circle")
            here = here.file if link.path.startswith("/") else here
            parts = [p for p in link.path.split("/") if p not in ("", ".")] + parts
            continue
        try:
            here = here[part]
        except DAMAGE as error:
            raise CorruptEpisode(f"{where}: '{name}' cannot be read ({first_line(error)})", "unreadable-file") from None
    return here


def members(group: h5py.Group) -> dict[str, h5py.Group | h5py.Dataset]:
    """What of a group can be opened, by name; no link that leads out of the file is followed."""
    found = {}
    for name in group:
        with contextlib.suppress(CorruptEpisode):
            found[name] = find(group, name, "")
    return found


def find_group(group: h5py.Group, name: str, where: str) -> h5py.Group:
    """The group `name` of `group`; `CorruptEpisode` when it is absent or a dataset (whose rows it would list)."""
    found = find(group, name, where)
    if not isinstance(found, h5py.Group):
        raise CorruptEpisode(f"{where}: '{name}' is a dataset, not a group")
    return found


def readable_group(group: h5py.Group, name: str, where: str) -> h5py.Group:
    """As `find_group`, of a group whose members were looked at in a process of its own before: those of an episode."""
    path = Path(group.file.filename)
    if not can_be_read(path, f"{group.name.rstrip('/')}/{name}", below=True):
        raise CorruptEpisode(f"{where}: '{name}' of {path.name} {_ENDLESS}", "unreadable-file")
    return find_group(group, name, where)


def find_array(group: h5py.Group, name: str, where: str) -> h5py.Dataset:
    """The dataset `name` of `group`, all of whose values are stored in this file.

    `CorruptEpisode` when it is absent, is virtual, is in other files, or has parts that were never written; `UserError`
    for a compression that is not installed.
    """
    array = find(group, name, where)
    if not isinstance(array, h5py.Dataset):
        raise CorruptEpisode(f"{where}: '{name}' is a group, not a dataset")
    if array.is_virtual or array.external:
        raise CorruptEpisode(f"{where}: the values of '{name}' are in other files; copy the data into one file")
    if array.shape is None:
        raise CorruptEpisode(f"{where}: '{name}' is empty")
    filters = array.id.get_create_plist()
    for i in range(filters.get_nfilters()):
        number, _, _, label = filters.get_filter(i)
        if not h5py.h5z.filter_avail(number):
            label = (label or b"").decode(errors="replace") or f"filter {number}"
            raise UserError(
                f"{where}: '{name}' is compressed with '{label}', for which HDF5 has no decoder here; rewrite the "
                f"file with gzip or without compression, e.g. h5repack -f GZIP=4"
            )
    row_nbytes = math.prod(array.shape[1:]) * array.dtype.itemsize
    if max(row_nbytes, math.prod(array.chunks or (0,)) * array.dtype.itemsize) > _MAX_TABLE:
        raise CorruptEpisode(f"{where}: '{name}' claims {list(array.shape)} {array.dtype} in chunks of {array.chunks}")
    if array.size and array.chunks:
        expected = math.prod(-(-n // c) for n, c in zip(array.shape, array.chunks))
        written = array.id.get_num_chunks()
        if written < expected:
            raise CorruptEpisode(
                f"{where}: {expected - written} of {expected} chunks of '{name}' were never written; HDF5 would "
                f"read them as {array.fillvalue}"
            )
    elif array.size and array.id.get_space_status() == h5py.h5d.SPACE_STATUS_NOT_ALLOCATED:
        raise CorruptEpisode(
            f"{where}: the values of '{name}' were never written; HDF5 would read them as {array.fillvalue}"
        )
    return array


def numbers(group: h5py.Group, name: str, where: str) -> np.ndarray:
    """All values of a numeric dataset; `CorruptEpisode` for another kind, otherwise as `find_array`."""
    array = find_array(group, name, where)
    if array.dtype.kind not in "fiub":
        raise CorruptEpisode(f"{where}: '{name}' is not numeric ({array.dtype})")
    if array.nbytes > _MAX_TABLE:
        raise CorruptEpisode(f"{where}: '{name}' has {array.nbytes:,} bytes; a table has at most {_MAX_TABLE:,}")
    return array[()]


def text(value: Any, where: str) -> str:
    """A string from what h5py returns (bytes, str, or an array of one); `CorruptEpisode` for anything else."""
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(-1)[0]
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise CorruptEpisode(f"{where} is not UTF-8 text") from None
    if not isinstance(value, str):
        raise CorruptEpisode(f"{where} is not text but {type(value).__name__}")
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):  # h5py's way to keep such bytes
        raise CorruptEpisode(f"{where} is not UTF-8 text")
    return str(value)


def texts(value: Any, where: str) -> list[str]:
    """Every string in what h5py returns; [] for what is no text, `CorruptEpisode` where it is not UTF-8."""
    parts = value.reshape(-1).tolist() if isinstance(value, np.ndarray) else [value]
    return [text(p, where) for p in parts] if all(isinstance(p, (bytes, str)) for p in parts) else []


def success_of(node: h5py.Group, where: str) -> bool | None:
    """Whether a demonstration succeeded, by an attribute or a dataset of its group (of a dataset [T] the last row, and
    any before it); None where there is neither."""
    for name in SUCCESS:
        if name in node.attrs:
            return truth(node.attrs[name])
        if has(node, name):
            array = find_array(node, name, where)
            values = array[()] if array.size <= _MAX_TABLE and not array.dtype.hasobject else np.zeros(0)
            return bool(np.any(values)) if values.size and values.dtype.kind in "biuf" else truth(values)
    return None


@contextlib.contextmanager
def whole_file(path: Path, nbytes: int) -> Iterator[h5py.File]:
    """A new file of about `nbytes` to write into; it appears under its name, synced, when the block ends without an
    error. `UserError` when it cannot be written, or the disk is too small for it."""
    temporary = temporary_name(path)
    free = shutil.disk_usage(path.parent).free
    if free < nbytes:  # checked first: HDF5 can crash the process when a disk fills up
        raise UserError(f"cannot write {path}: it needs {nbytes >> 20} MiB, the disk has {free >> 20} MiB left")
    try:
        with h5py.File(temporary, "w") as file:
            yield file
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        publish(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {first_line(error)}") from None
    finally:
        temporary.unlink(missing_ok=True)
