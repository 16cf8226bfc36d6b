"""Open files and folders of shards: found by the name they had, also when they move or go, and closed with their last user."""

from __future__ import annotations

import contextlib
import os
import weakref
from pathlib import Path

import numpy as np

from ..errors import UserError


class Folder:
    """A directory held open: files are found in it by the name it had, also after it was renamed and another took that name."""

    def __init__(self, path: Path) -> None:
        self.path, self.handle = path, os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._finalizer = weakref.finalize(self, os.close, self.handle)

    def is_at(self, path: Path) -> bool:
        """Whether `path` names it now."""
        try:
            return os.path.samestat(os.fstat(self.handle), os.stat(path))
        except FileNotFoundError:
            return False


def open_file(path: Path, folder: Folder | None = None) -> int:
    """Handle of a shard, to be read; in `folder` when its path is below that. `UserError` naming it when that fails."""
    try:
        if folder is not None:
            return os.open(path.relative_to(folder.path), os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder.handle)
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(f"cannot read shard {path}: {error.strerror}") from None


def touch(handle: int) -> None:
    """Mark a file as used just now, as far as one may: it may be another user's copy."""
    with contextlib.suppress(OSError):
        os.utime(handle)


class OpenShard:
    """An open shard file. It is closed when its last user lets go of it.

    Its first `count` records follow each other from byte 0 on; of one where they do not, `index` [n, 2] int64 holds (offset, nbytes)
    of each, −1 where missing, and `count` is 0."""

    __slots__ = ("handle", "path", "index", "count", "used", "_close")

    def __init__(self, handle: int, path: str, index: np.ndarray | None, count: int) -> None:
        self.handle, self.path, self.index, self.count, self.used = handle, path, index, count, False
        self._close = os.close      # still known when the interpreter ends

    def __del__(self) -> None:
        self._close(self.handle)

    def extent(self, inner: int, record: int) -> tuple[int, int]:
        """(offset, nbytes) of a record; `KeyError` for one that was never written."""
        if inner < self.count:
            return inner * record, record
        if self.index is None or self.index[inner, 0] < 0:
            raise KeyError(inner)
        return int(self.index[inner, 0]), int(self.index[inner, 1])
