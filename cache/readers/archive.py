"""One view of a folder, a .zip and an uncompressed .tar: list a folder, read a member, without unpacking anything.

An archive is refused when any member would be outside it or is a link; nothing is ever written. (Links in a
local folder are followed: it is the user's own, and a hub snapshot consists of them.) The index of an archive is kept
in memory for a few archives at a time, no file stays open between calls, and all calls are safe from several threads.
"""

from __future__ import annotations

import functools
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ...common.documents import open_regular
from ...common.text import first_line
from ...errors import UserError
from .episode import CorruptEpisode
from .location import POINTER, absence, leads_down

SUFFIXES = (".zip", ".tar")
COMPRESSED = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz|7z|rar)$", re.IGNORECASE)
MAX_MEMBER = 256 << 20  # bytes of one member, unpacked
_MAX_RATIO = 1032  # of deflate, by its format; a member that says it grows more than that lies
_MAX_DEPTH = 64
_INDEXES = 8  # archives whose index is kept: about 15 MB for one of 50,000 images
_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_BROKEN = (zipfile.BadZipFile, tarfile.TarError, NotImplementedError, EOFError, ValueError, struct.error, OverflowError)


@dataclass(frozen=True)
class Archive(ABC):
    """Files below `path`. Names are relative to it, with "/" between parts."""

    path: Path
    wanted: str = ""  # regex, searched in members' names: which of a packed archive to index; folders always are

    @abstractmethod
    def entries(self, folder: str = "") -> tuple[str, ...]:
        """Names directly inside a folder ("" is the top), sorted, folders with a "/" at the end; () when there is no
        such folder. `UserError` when the archive cannot be read or is refused."""

    @abstractmethod
    def read(self, name: str, where: str) -> bytes:
        """A member's bytes; `CorruptEpisode` when it is missing, cut off, damaged, or larger than `MAX_MEMBER`."""


def open_archive(path: Path, wanted: str = "") -> Archive:
    """A folder, a .zip or a .tar; nothing is read yet. `UserError` for another kind of file."""
    if path.is_dir():
        return _Folder(path, wanted)
    if path.suffix.lower() == ".zip":
        return _Zip(path, wanted)
    if path.suffix.lower() == ".tar":
        return _Tar(path, wanted)
    if COMPRESSED.search(path.name):
        raise _compressed(path)
    raise UserError(f"{path} is not a folder, a {' or a '.join(SUFFIXES)} file")


def _compressed(path: Path) -> UserError:
    return UserError(f"{path} is compressed as one stream, so single images cannot be read from it; extract it first")


class _Folder(Archive):
    def entries(self, folder: str = "") -> tuple[str, ...]:
        try:
            here = self.path / folder
            return tuple(sorted(f"{p.name}/" if leads_down(p) else p.name for p in here.iterdir()))
        except (FileNotFoundError, NotADirectoryError):
            return ()
        except OSError as error:
            raise UserError(f"{self.path / folder} cannot be listed: {error.strerror or error}") from None

    def read(self, name: str, where: str) -> bytes:
        with _reading(name, where), open(open_regular(self.path / name), "rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_MEMBER:
                raise ValueError(f"it is larger than {MAX_MEMBER >> 20} MiB")
            data = file.read()
            if data.startswith(POINTER):
                raise CorruptEpisode(f"{where}: {name} {absence(self.path / name)}", "unreadable-file")
            return data


class _Member(NamedTuple):
    """Where a member's bytes are in the file."""

    offset: int  # tar: of its data; zip: of its local header
    packed: int  # bytes in the file
    size: int  # bytes unpacked
    crc: int | None = None  # zip only
    deflated: bool = False


class _Packed(Archive):
    """A file with an index."""

    def entries(self, folder: str = "") -> tuple[str, ...]:
        return tuple(sorted(self._index().get(folder.strip("/"), ())))

    def read(self, name: str, where: str) -> bytes:
        folder, _, base = name.rpartition("/")
        member = self._index().get(folder, {}).get(base)
        if member is None:
            raise CorruptEpisode(f"{where}: {name} is missing", "missing-file")
        with _reading(name, where), open(open_regular(self.path), "rb") as file:
            if max(member.size, member.packed) > MAX_MEMBER or member.size > _MAX_RATIO * (member.packed + 1):
                raise ValueError(f"its {member.packed:,} bytes claim to unpack to {member.size:,}")
            file.seek(member.offset)
            if member.crc is not None:
                header = file.read(30)
                if header[:4] != b"PK\x03\x04":
                    raise ValueError("its header is not where the index says")
                file.seek(sum(struct.unpack("<HH", header[26:30])), 1)  # behind the name and the extra field
            return _unpack(file.read(member.packed), member)

    def members(self) -> Iterator[tuple[str, _Member | None]]:
        """(name as stored, place) of every member in file order; None for a folder. Refuses links."""
        raise NotImplementedError

    def _index(self) -> dict[str, dict[str, _Member | None]]:
        try:
            found = self.path.stat()
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror or error}") from None
        return _read_index(self, found.st_size, found.st_mtime_ns)

    def refuse(self, name: str, why: str) -> UserError:
        shown = "".join(c if c.isprintable() else "?" for c in name)
        return UserError(f"{self.path}: member '{shown}' {why}; the archive is refused")


class _Zip(_Packed):
    def members(self) -> Iterator[tuple[str, _Member | None]]:
        with open(open_regular(self.path), "rb") as raw, zipfile.ZipFile(raw) as file:
            for info in file.infolist():
                kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the writer was no Unix
                if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise self.refuse(info.filename, "is a link or a device")
                if info.filename.endswith("/"):
                    yield info.filename, None
                    continue
                if re.search(self.wanted, info.filename):
                    if info.flag_bits & 0x1:
                        raise self.refuse(info.filename, "is encrypted")
                    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                        raise self.refuse(
                            info.filename, f"is packed by method {info.compress_type}, not stored or by deflate"
                        )
                deflated = info.compress_type == zipfile.ZIP_DEFLATED
                yield (
                    info.filename,
                    _Member(info.header_offset, info.compress_size, info.file_size, info.CRC, deflated),
                )


class _Tar(_Packed):
    def members(self) -> Iterator[tuple[str, _Member | None]]:
        with open(open_regular(self.path), "rb") as raw:
            if raw.read(5).startswith(_MAGIC):
                raise _compressed(self.path)
            raw.seek(0)
            with tarfile.open(fileobj=raw, mode="r:") as file:
                for info in file:
                    if not (info.isdir() or info.isreg()) or info.issparse():
                        raise self.refuse(info.name, "is a link, a device or sparse")
                    yield info.name, None if info.isdir() else _Member(info.offset_data, info.size, info.size)
                raw.seek(file.offset)
                if raw.read(512) != bytes(512):
                    raise tarfile.ReadError("it has no end")


@functools.lru_cache(maxsize=_INDEXES)
def _read_index(archive: _Packed, size: int, time: int) -> dict[str, dict[str, _Member | None]]:
    """Folder → name directly inside (folders with a "/") → where it is; `size` and `time` are part of the cache key."""
    index: dict[str, dict[str, _Member | None]] = {"": {}}
    try:
        for stored, member in archive.members():
            name = _inside(archive, stored)
            parent, _, base = name.rpartition("/")
            if member is not None and not base:
                raise archive.refuse(stored, "has no name")
            contents = _folder(index, name if member is None else parent)
            if member is not None and re.search(archive.wanted, name):
                if base in contents:
                    raise archive.refuse(name, "appears twice")
                contents[base] = member
    except _BROKEN as error:
        if reason := absence(archive.path):
            raise UserError(f"{archive.path} {reason}") from None
        raise UserError(f"{archive.path} is cut off or damaged ({first_line(error)}); fetch it again") from None
    except OSError as error:
        raise UserError(f"{archive.path} cannot be read: {error.strerror or error}") from None
    return index


def _folder(index: dict[str, dict[str, _Member | None]], name: str) -> dict[str, _Member | None]:
    """The contents of a folder, made known to those around it when it is new."""
    if name not in index:
        parent, _, base = name.rpartition("/")
        index[name] = {}
        _folder(index, parent)[f"{base}/"] = None
    return index[name]


def _inside(archive: _Packed, stored: str) -> str:
    """A member's name in plain form; refuses one that leaves the archive."""
    name = stored.replace("\\", "/")
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or re.match(r"[A-Za-z]:", name):
        raise archive.refuse(stored, "is outside its folder")
    if not name.isprintable():
        raise archive.refuse(stored, "has characters in its name that cannot be printed")
    if len(parts) > _MAX_DEPTH:
        raise archive.refuse(stored[:80], f"lies more than {_MAX_DEPTH} folders deep")
    return "/".join(p for p in parts if p not in ("", "."))


def _unpack(data: bytes, member: _Member) -> bytes:
    """The member's bytes out of those in the file; `ValueError` when they are not all there or not what they were."""
    if len(data) != member.packed:
        raise ValueError("it is cut off")
    if member.deflated:
        unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
        data = unpacker.decompress(data, member.size + 1)  # not more, whatever the packed bytes hold
    if len(data) != member.size or member.crc is not None and zlib.crc32(data) != member.crc:
        raise ValueError("its checksum does not match")
    return data


@contextmanager
def _reading(name: str, where: str) -> Iterator[None]:
    """Turn what can go wrong while a member is read into `CorruptEpisode`."""
    try:
        yield
    except FileNotFoundError:
        raise CorruptEpisode(f"{where}: {name} is missing", "missing-file") from None
    except (OSError, ValueError, struct.error, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CorruptEpisode(f"{where}: {name} is damaged ({reason})", "unreadable-file") from None
