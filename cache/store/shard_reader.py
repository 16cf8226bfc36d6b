"""Reading records of Zarr shards from shared open files, which stay valid while caches move or are replaced."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...common.documents import open_regular
from ...common.files import crc32c
from ...errors import UserError
from .manifest import MANIFEST
from .shard_writer import index_nbytes

if TYPE_CHECKING:
    from .codec import Compression


class Folder:
    """A directory held open: paths with its original name lead into it even after it was renamed or replaced, and
    `unread` tells that it is in use."""

    def __init__(self, path: Path) -> None:
        self.path, self.handle = path, os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._finalizer = weakref.finalize(self, os.close, self.handle)
        with contextlib.suppress(OSError):  # no manifest, or a file system without locks
            held = open_regular(MANIFEST, folder=self.handle)
            self._unlock = weakref.finalize(self, os.close, held)
            fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def is_at(self, path: Path) -> bool:
        """Whether it is at `path` now."""
        try:
            return os.path.samestat(os.fstat(self.handle), os.stat(path))
        except FileNotFoundError:
            return False


@contextlib.contextmanager
def unread(path: Path) -> Iterator[bool]:
    """Whether no process reads the generation in a directory through a `Folder`; none can start inside the block."""
    if not (path / MANIFEST).is_file():
        yield True
        return
    handle = open_regular(path / MANIFEST)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without locks
            pass
        yield True
    finally:
        os.close(handle)


def open_file(path: Path, folder: Folder | None = None) -> int:
    """Read-only handle of a shard, by way of `folder` where given. `UserError` naming the shard on failure."""
    try:
        if folder is not None:
            return open_regular(path.relative_to(folder.path), folder=folder.handle)
        return open_regular(path)
    except OSError as error:
        raise UserError(f"cannot read shard {path}: {error.strerror}; run `dvla cache verify`") from None


def touch(handle: int) -> None:
    """Mark a file as used now, unless it belongs to another user."""
    with contextlib.suppress(OSError):
        os.utime(handle)


class OpenShard:
    """An open shard file, closed with the last reference to it.

    Its first `count` records are contiguous from byte 0. Where they are not, `count` is 0 and `index` [n, 2] int64
    holds (offset, nbytes) of each record, −1 where missing.
    """

    __slots__ = ("handle", "path", "index", "count", "used", "_close")

    def __init__(self, handle: int, path: str, index: np.ndarray | None, count: int) -> None:
        self.handle, self.path, self.index, self.count, self.used = handle, path, index, count, False
        self._close = os.close  # still defined when the interpreter exits

    def __del__(self) -> None:
        self._close(self.handle)

    def extent(self, inner: int, record: int) -> tuple[int, int]:
        """(offset, nbytes) of a record; `KeyError` for one that was never written."""
        if inner < self.count:
            return inner * record, record
        if self.index is None or self.index[inner, 0] < 0:
            raise KeyError(inner)
        return int(self.index[inner, 0]), int(self.index[inner, 1])


MAX_BUFFERS = 512  # buffers in one preadv; the kernel's limit (IOV_MAX) is 1024
REMEMBERED = 1 << 16  # contiguous shards whose index is not read again (about 20 MB)
ADVICE = 128 << 10  # bytes of one POSIX_FADV_WILLNEED: the kernel reads at most its read-ahead window for each


def read_index(handle: int, path: Path, chunks_per_shard: int) -> np.ndarray:
    """`[chunks_per_shard, 2]` uint64 (offset, nbytes) of an open shard; `UserError` naming it when it is damaged."""
    size = index_nbytes(chunks_per_shard)
    end = os.fstat(handle).st_size
    tail = os.pread(handle, size, end - size) if end >= size else b""
    if len(tail) != size or crc32c(tail[:-4]) != int.from_bytes(tail[-4:], "little"):
        raise _damaged(path)
    return np.frombuffer(tail, dtype="<u8", count=2 * chunks_per_shard).reshape(-1, 2)


def _damaged(path: Path | str) -> UserError:
    return UserError(f"shard {path} is damaged (truncated, or its index is wrong); run `dvla cache verify`")


class ShardFiles:
    """The most recently used open shard files, shared by threads: at most `limit` (default: 1/8 of the process's).

    With a `folder`, paths are below it. `fetch(path)` is called to download a file that does not exist (any more).
    """

    def __init__(
        self, limit: int | None = None, folder: Folder | None = None, fetch: Callable[[Path], None] | None = None
    ) -> None:
        self._limit = limit or max(16, min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8))
        self._folder, self._fetch, self._lock = folder, fetch, threading.Lock()
        self._open: OrderedDict[str, OpenShard] = OrderedDict()
        self._plain: dict[str, tuple[int, int]] = {}  # contiguous shard → (file size, records): no index to read again

    def get(self, path: str, chunks_per_shard: int, record: int) -> OpenShard:
        """The shard at `path`, opened if needed, of up to `chunks_per_shard` records of `record` bytes (0: any)."""
        with self._lock:
            if (found := self._open.get(path)) is not None:
                self._open.move_to_end(path)
                found.used = True
                return found
        shard = self._load(path, chunks_per_shard, record)  # two threads may both load it: the later one stays
        with self._lock:
            self._open[path] = shard
            while len(self._open) > self._limit:
                self._open.popitem(last=False)
        return shard

    def close(self) -> None:
        """Release every file."""
        with self._lock:
            self._open.clear()

    def _load(self, path: str, chunks: int, record: int) -> OpenShard:
        handle, where = self._handle(Path(path)), Path(path)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
            size = os.fstat(handle).st_size
            known = self._plain.get(path)
            if known is not None and known[0] == size:
                return OpenShard(handle, path, None, known[1])
            index = read_index(handle, where, chunks).astype(np.int64)  # 2**64-1 becomes -1
            held = index[index[:, 0] >= 0]
            if ((held[:, 0] > size) | (held[:, 1] < 0) | (held[:, 1] > size - held[:, 0])).any():
                raise _damaged(where)  # before so much is read
            count = len(held)
            plain = np.stack([np.arange(count) * record, np.full(count, record)], axis=1)
            if record and (index[count:] < 0).all() and (index[:count] == plain).all():
                if len(self._plain) >= REMEMBERED:
                    self._plain.clear()
                self._plain[path] = size, count
                return OpenShard(handle, path, None, count)
            return OpenShard(handle, path, index, 0)
        except BaseException:
            os.close(handle)
            raise

    def _handle(self, path: Path) -> int:
        if self._fetch is None:
            return open_file(path, self._folder)
        for last in (False, False, True):
            if not path.exists():
                self._tend()
                self._fetch(path)
                self._tend()
            try:
                handle = open_file(path, self._folder)
            except UserError:  # removed meanwhile to make room
                if last:
                    raise
            else:
                touch(handle)
                return handle
        raise AssertionError

    def _tend(self) -> None:
        """Mark the downloaded files that were used, and close those that were removed, to free their space."""
        with self._lock:
            for path, shard in list(self._open.items()):
                if not os.fstat(shard.handle).st_nlink:
                    del self._open[path]
                elif shard.used:
                    shard.used = False
                    touch(shard.handle)


def read_records(
    files: ShardFiles,
    folder: Path | str,
    rows: np.ndarray,
    targets: Sequence[memoryview],
    records_per_shard: int,
    tail: str = "0/0",
    compression: Compression | None = None,
) -> None:
    """Read record `rows[i]` of the array's shards in `folder` into `targets[i]`, adjacent records in one `preadv`.

    `rows` int64 [n], in any order, with repeats; `folder` holds the shards `<number>/<tail>`; each target is writable,
    contiguous and exactly one record long. `UserError` naming the shard when a record cannot be read.
    """
    record = len(targets[0]) if len(rows) else 0
    order = np.argsort(rows, kind="stable")
    ordered, into, path = rows[order], order.tolist(), ""
    shard: OpenShard | None = None
    for where, inner, begin, end in _runs(folder, ordered, records_per_shard, tail):
        if shard is None or where != path:
            shard = None  # release it first: a thread keeps one file open, not two
            path, shard = where, files.get(where, records_per_shard, 0 if compression else record)
        if inner + end - begin <= shard.count:  # the hot path: one after the other
            for low in range(begin, end, MAX_BUFFERS):
                buffers = [targets[i] for i in into[low : min(low + MAX_BUFFERS, end)]]
                at = (inner + low - begin) * record
                if (got := os.preadv(shard.handle, buffers, at)) != len(buffers) * record:
                    _finish_read(shard, buffers, at, got)
            continue
        for i in range(begin, end):  # compressed, or written by another tool in another order, or missing
            try:
                offset, nbytes = shard.extent(inner + i - begin, record)
                if compression is None:
                    _finish_read(shard, [targets[into[i]]], offset, 0)
                else:
                    compression.decode(os.pread(shard.handle, nbytes, offset), targets[into[i]])
            except KeyError:
                raise UserError(f"shard {path} does not hold row {ordered[i]}; run `dvla cache verify`") from None
            except ValueError:
                raise _damaged(path) from None


def advise_records(
    files: ShardFiles, folder: Path | str, rows: np.ndarray, record: int, records_per_shard: int, tail: str = "0/0"
) -> None:
    """Have the kernel read records `rows` (int64 [n], ascending) of `record` bytes (0: compressed) into memory."""
    for path, inner, begin, end in _runs(folder, rows, records_per_shard, tail):
        _advise(files.get(path, records_per_shard, record), inner, inner + end - begin - 1, record)


def _advise(shard: OpenShard, first: int, last: int, record: int) -> None:
    """Have the kernel read the records `first` to `last` of a shard into memory."""
    try:
        begin, end = shard.extent(first, record)[0], sum(shard.extent(last, record))
    except KeyError:
        return  # reading reports what is missing
    for at in range(begin, end, ADVICE):
        os.posix_fadvise(shard.handle, at, min(ADVICE, end - at), os.POSIX_FADV_WILLNEED)


def _runs(
    folder: Path | str, ordered: np.ndarray, records_per_shard: int, tail: str
) -> Iterator[tuple[str, int, int, int]]:
    """(path, first record in it, begin, end) of each range of `ordered` rows that are adjacent in one shard."""
    shard, inner = np.divmod(ordered, records_per_shard)
    cuts = (np.flatnonzero((np.diff(ordered) != 1) | (np.diff(shard) != 0)) + 1).tolist()
    begins, base = [0, *cuts] if len(ordered) else [], str(folder)
    for begin, end, number, first in zip(begins, [*cuts, len(ordered)], shard[begins].tolist(), inner[begins].tolist()):
        yield f"{base}/{number}/{tail}", first, begin, end


def _finish_read(shard: OpenShard, buffers: list[memoryview], offset: int, got: int) -> None:
    """Complete a read that returned only `got` bytes (network file systems, signals)."""
    for buffer in buffers:
        done = min(got, len(buffer))
        got -= done
        while done < len(buffer):
            read = os.preadv(shard.handle, [buffer[done:]], offset + done)
            if read == 0:  # the file ends too early
                raise _damaged(shard.path)
            done += read
        offset += len(buffer)
