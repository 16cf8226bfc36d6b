"""Locks, durable writes and checksums; a full disk is reported in one line."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeVar

import google_crc32c
import numpy as np

from ..errors import UserError
from .documents import open_regular

Method = TypeVar("Method", bound=Callable[..., Any])
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # full disk, used-up quota, limit of one file's size


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write in, renamed to `out` when the block succeeds. `UserError` when `out` exists."""
    if out.exists():
        raise UserError(f"{out} exists already; choose another folder or remove it")
    part = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def hold(file: IO[Any] | int, busy: str, still: Callable[[], bool] = lambda: True) -> None:
    """Lock an open file or a folder's descriptor until it is closed.

    `UserError` that begins with `busy` when another process holds it, or when `still()` is false after locking.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = still()
    except OSError:
        held = False
    if not held:
        raise UserError(f"{busy}; wait for it to finish or stop it, then rerun")


def open_lock(path: Path) -> BinaryIO:
    """The file to lock, made where it is missing."""
    return open(open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab")


def lock_folder(path: Path) -> BinaryIO:
    """The lock of the cache at `path`, held until the file is closed; `UserError` when another process holds it."""
    try:
        file = open_lock(path / ".lock")
    except OSError as error:
        raise UserError(f"cannot write a cache at {path}: {error.strerror}; choose another --out") from None
    try:  # another generation may have taken its place meanwhile
        hold(
            file,
            f"another process is building {path}",
            lambda: os.path.samestat(os.fstat(file.fileno()), os.stat(path / ".lock")),
        )
    except UserError:
        file.close()
        raise
    return file


def names_full_disk(method: Method) -> Method:
    """Decorate a method of a writer with a `path`: a full disk becomes a `UserError`, and nothing is lost."""

    @functools.wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except OSError as error:
            if error.errno not in NO_ROOM:
                if not str(error.filename or "").startswith(f"{self.path}/"):
                    raise  # of a source, perhaps
                raise UserError(
                    f"cannot write {error.filename}: {error.strerror}; remove what is in its place, then rerun"
                ) from None
            free = shutil.disk_usage(self.path).free / 2**30
            raise UserError(
                f"cannot write {self.path}: {error.strerror} ({free:.2f} GiB free); finished work is kept: "
                "free some space and rerun the same command to resume"
            ) from None

    return guarded  # type: ignore[return-value]


def crc32c(data: np.ndarray | bytes, start: int = 0) -> int:
    """crc32c of C-contiguous bytes, continuing from the crc `start`."""
    return google_crc32c.extend(start, data)


def temporary_name(path: Path) -> Path:
    """The name of a file until it is complete, unique to this process on any host.

    `CacheWriter` removes those that a killed builder left.
    """
    return path.with_name(f".{path.name}.tmp-{_own_names.setdefault(os.getpid(), uuid.uuid4().hex[:16])}")


_own_names: dict[int, str] = {}  # process id → its suffix of temporary names; a forked process gets its own


def publish(temporary: Path, path: Path) -> None:
    """Rename a synced file to its final name and make the rename durable."""
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, data: bytes) -> tuple[int, int]:
    """Write a small file atomically; returns (nbytes, crc32c)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    finally:
        discard(temporary)  # already renamed unless something went wrong
    return len(data), crc32c(data)


def discard(temporary: Path) -> None:
    """Remove a file that may be there; where that fails, the error that led here is the one to tell."""
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)


def write_output(path: Path, data: bytes, option: str = "--out") -> None:
    """Write a file that `option` names, whole or not at all; into a device or a pipe directly.

    `UserError` if it cannot be written.
    """
    try:
        if path.is_file() or not path.exists():
            write_file(Path(os.path.realpath(path)), data)
            return
        with open(path, "wb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            os.set_blocking(file.fileno(), True)  # a pipe that nobody reads is refused when it is opened
            file.write(data)
    except OSError as error:
        reason = f"{error.filename} is no folder" if isinstance(error, FileExistsError) else error.strerror or error
        raise UserError(f"cannot write {path}: {reason}; give another {option}") from None


def file_crc32c(path: Path) -> tuple[int, int]:
    """(nbytes, crc32c) of a file, read in blocks."""
    crc, nbytes, buffer = 0, 0, np.empty(1 << 20, np.uint8)
    with open(open_regular(path), "rb", buffering=0) as file:
        while got := file.readinto(buffer.data):
            crc, nbytes = crc32c(buffer[:got], crc), nbytes + got
    return nbytes, crc
