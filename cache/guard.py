"""What guards a folder that is being written: it appears when it is complete, a cache has one builder at a time, and a full disk is named and
loses nothing."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeVar

from ..errors import UserError

Method = TypeVar("Method", bound=Callable[..., Any])
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)     # full disk, used-up quota, limit of one file's size


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `out` when the block ends well. `UserError` when `out` exists."""
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
    """Lock an open file, or a folder's descriptor, until it is closed. `UserError` that begins with `busy` when another process has it, or when what
    was locked is not the right one any more."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = still()
    except OSError:
        held = False
    if not held:
        raise UserError(f"{busy}; wait for it or stop it, then run again")


def lock_folder(path: Path) -> BinaryIO:
    """The lock of the cache at `path`: a file that is held until it is closed; `UserError` when another process has it."""
    try:
        file = open(path / ".lock", "ab")
    except OSError as error:
        raise UserError(f"cannot write a cache at {path}: {error.strerror}; choose another --out") from None
    try:        # another generation may have taken its place meanwhile
        hold(file, f"another process is building {path}", lambda: os.path.samestat(os.fstat(file.fileno()), os.stat(path / ".lock")))
    except UserError:
        file.close()
        raise
    return file


def names_full_disk(method: Method) -> Method:
    """Of a writer with a `path`: a full disk is a `UserError`. Nothing is lost, and the same command goes on once there is room."""
    @functools.wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            free = shutil.disk_usage(self.path).free / 2**30
            raise UserError(f"cannot go on writing {self.path}: {error.strerror} ({free:.2f} GiB are free); what is finished is kept: "
                            "make room and run the same command again") from None
    return guarded  # type: ignore[return-value]
