"""The bytes of one Zarr v3 shard: written once by one writer, read by `preadv` straight into the caller's buffers.

A shard of a sharded array is its inner chunks one after another (each compressed for itself, or not at all), then an index of
(offset, nbytes) little-endian uint64 pairs in C order of the chunks, then the index's crc32c. A record is one inner chunk.
"""

from __future__ import annotations

import os
import threading
import uuid
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import google_crc32c
import numpy as np

from ..errors import UserError

if TYPE_CHECKING:
    from .codec import Compression

MISSING = np.uint64(2**64 - 1)      # offset and nbytes of a chunk that was never written
MAX_BUFFERS = 512                   # buffers in one preadv; the kernel's limit (IOV_MAX) is 1024


def crc32c(data: np.ndarray | bytes, start: int = 0) -> int:
    """crc32c of C-contiguous bytes, continuing from the crc `start`."""
    return google_crc32c.extend(start, data)


def index_nbytes(chunks_per_shard: int) -> int:
    """Size in bytes of a shard's index with its checksum."""
    return 16 * chunks_per_shard + 4


def temporary_name(path: Path) -> Path:
    """The name a file carries until it is whole: this process's own, on whatever host it runs. `CacheWriter` removes the ones that a
    killed builder left."""
    return path.with_name(f".{path.name}.tmp-{_own_names.setdefault(os.getpid(), uuid.uuid4().hex[:16])}")


_own_names: dict[int, str] = {}     # process id → its part of temporary names; a forked process gets another


def publish(temporary: Path, path: Path) -> None:
    """Rename a synced file to its final name and make the rename durable."""
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class ShardWriter:
    """Writes one shard: `append` in order, then `commit`. Without `commit` (an error, a kill) no final name appears.

    `chunk_shape` is the inner chunk; `chunks_per_shard` the inner chunks a full shard holds (fewer may be written: the
    rest is marked missing in the index). `compression` None stores the bytes as they are. Use as a context manager.
    """

    def __init__(self, path: Path, chunk_shape: tuple[int, ...], dtype: np.dtype | str, chunks_per_shard: int,
                 compression: Compression | None = None) -> None:
        self.path, self.chunks_per_shard, self.count = Path(path), chunks_per_shard, 0
        self._compression, self._sizes = compression, []
        self._tail, self._dtype = tuple(chunk_shape[1:]), np.dtype(dtype).newbyteorder("<")
        self._rows = chunk_shape[0]
        self._chunk_nbytes = int(np.prod(chunk_shape)) * self._dtype.itemsize
        self._crc, self._temporary = 0, temporary_name(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._temporary, "wb", buffering=0)

    def append(self, block: np.ndarray) -> None:
        """Write whole chunks, `[k · chunk_shape[0], *chunk_shape[1:]]` of the shard's dtype; no copy is made."""
        if block.dtype != self._dtype or block.shape[1:] != self._tail or block.shape[0] % self._rows:
            raise ValueError(f"{self.path}: expected chunks of {(self._rows, *self._tail)} {self._dtype}, "
                             f"got {block.shape} {block.dtype}")
        chunks = block.shape[0] // self._rows
        if self.count + chunks > self.chunks_per_shard:
            raise ValueError(f"{self.path}: more than {self.chunks_per_shard} chunks")
        block = np.ascontiguousarray(block)
        if self._compression is None:
            self._write(block)
            self._sizes += [self._chunk_nbytes] * chunks
        else:
            for record in block.reshape(chunks, self._rows, *self._tail):
                data = np.frombuffer(self._compression.encode(record), np.uint8)
                self._write(data)
                self._sizes.append(len(data))
        self.count += chunks

    def commit(self) -> tuple[int, int]:
        """Write the index, sync, rename to the final name; returns (nbytes, crc32c) of the whole file."""
        index = np.full((self.chunks_per_shard, 2), MISSING, dtype="<u8")
        index[:self.count, 1] = self._sizes
        index[:self.count, 0] = np.cumsum([0, *self._sizes[:-1]])[:self.count]
        self._write(index)
        self._write(np.array([crc32c(index)], dtype="<u4"))
        os.fsync(self._file.fileno())
        nbytes = self._file.tell()
        self._file.close()
        publish(self._temporary, self.path)
        return nbytes, self._crc

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)     # already renamed after a commit

    def _write(self, data: np.ndarray) -> None:
        flat = data.reshape(-1).view(np.uint8)
        self._crc = crc32c(flat, self._crc)
        view = memoryview(flat)
        while view:
            view = view[self._file.write(view):]


def write_file(path: Path, data: bytes) -> tuple[int, int]:
    """Write a small file whole or not at all; returns (nbytes, crc32c)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)   # already renamed unless something went wrong
    return len(data), crc32c(data)


def file_crc32c(path: Path) -> tuple[int, int]:
    """(nbytes, crc32c) of a file, read in blocks."""
    crc, nbytes, buffer = 0, 0, np.empty(1 << 20, np.uint8)
    with open(path, "rb", buffering=0) as file:
        while got := file.readinto(buffer):
            crc, nbytes = crc32c(buffer[:got], crc), nbytes + got
    return nbytes, crc


def read_index(path: Path, chunks_per_shard: int) -> np.ndarray:
    """`[chunks_per_shard, 2]` uint64 (offset, nbytes); `UserError` naming the shard when it is missing or damaged."""
    handle = _open(path)
    try:
        return _read_index(handle, path, chunks_per_shard)
    finally:
        os.close(handle)


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


def _open(path: Path, folder: Folder | None = None) -> int:
    try:
        if folder is not None:
            return os.open(path.relative_to(folder.path), os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder.handle)
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(f"cannot read shard {path}: {error.strerror}") from None


def _read_index(handle: int, path: Path, chunks_per_shard: int) -> np.ndarray:
    size = index_nbytes(chunks_per_shard)
    end = os.fstat(handle).st_size
    tail = os.pread(handle, size, end - size) if end >= size else b""
    if len(tail) != size or crc32c(tail[:-4]) != int.from_bytes(tail[-4:], "little"):
        raise _damaged(path)
    return np.frombuffer(tail, dtype="<u8", count=2 * chunks_per_shard).reshape(-1, 2)


def _damaged(path: Path) -> UserError:
    return UserError(f"shard {path} is damaged (truncated, or its index is wrong); run `dvla cache verify`")


class ShardFiles:
    """Open shard files, per thread and at most `limit` of each thread's, so no thread closes what another one reads.

    With a `folder`, paths are below it."""

    def __init__(self, limit: int = 128, folder: Folder | None = None) -> None:
        self._limit, self._folder, self._local = limit, folder, threading.local()
        self._all: list[OrderedDict[Path, tuple[int, np.ndarray]]] = []
        self._finalizer = weakref.finalize(self, _close_all, self._all)

    def get(self, path: Path, chunks_per_shard: int) -> tuple[int, np.ndarray]:
        """(file descriptor, `[chunks_per_shard, 2]` int64 byte offset and size, −1 where missing), opened when needed."""
        mine = getattr(self._local, "open", None)
        if mine is None:
            mine = self._local.open = OrderedDict()
            self._all.append(mine)
        if path in mine:
            mine.move_to_end(path)
            return mine[path]
        handle = _open(path, self._folder)
        try:
            index = _read_index(handle, path, chunks_per_shard).astype(np.int64)    # 2**64-1 becomes -1
        except BaseException:
            os.close(handle)
            raise
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
        mine[path] = handle, index
        if len(mine) > self._limit:
            os.close(mine.popitem(last=False)[1][0])
        return mine[path]

    def close(self) -> None:
        """Close every file; no thread may be reading."""
        _close_all(self._all)


def _close_all(tables: list[OrderedDict[Path, tuple[int, np.ndarray]]]) -> None:
    for table in tables:
        while table:
            os.close(table.popitem()[1][0])


def read_records(files: ShardFiles, folder: Path, rows: np.ndarray, targets: Sequence[memoryview], records_per_shard: int,
                 tail: str = "0/0", compression: Compression | None = None) -> None:
    """Read record `rows[i]` of the array's shards in `folder` into `targets[i]`, adjacent records in one `preadv`.

    `rows` int64 [n], any order, repeats allowed; `folder` holds the shards `<number>/<tail>`; each target is writable,
    contiguous and exactly one record long. `UserError` naming the shard when a record cannot be read.
    """
    order = np.argsort(rows, kind="stable")
    shard, inner = np.divmod(rows[order], records_per_shard)
    record = len(targets[0]) if len(rows) else 0
    for begin, end in _runs(np.diff(shard) != 0, len(rows)):
        path = folder / str(shard[begin]) / tail
        handle, index = files.get(path, records_per_shard)
        at, size = index[inner[begin:end]].T
        if at.min() < 0:
            raise UserError(f"shard {path} does not hold row {rows[order[begin + int(at.argmin())]]}")
        if compression is not None:
            for i, offset, nbytes in zip(order[begin:end], at.tolist(), size.tolist()):
                try:
                    compression.decode(os.pread(handle, nbytes, offset), targets[i])
                except ValueError:
                    raise _damaged(path) from None
            continue
        for first, last in _runs(np.diff(at) != record, end - begin):
            for low in range(first, last, MAX_BUFFERS):
                picked = order[begin + low:begin + min(low + MAX_BUFFERS, last)]
                buffers = [targets[i] for i in picked]
                got = os.preadv(handle, buffers, int(at[low]))
                if got != record * len(buffers):
                    _finish_read(handle, path, buffers, int(at[low]), got)


def _runs(breaks: np.ndarray, count: int) -> list[tuple[int, int]]:
    """The (begin, end) ranges of `count` items between the positions where `breaks [count-1]` is True."""
    edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), count]
    return list(zip(edges[:-1], edges[1:])) if count else []


def _finish_read(handle: int, path: Path, buffers: list[memoryview], offset: int, got: int) -> None:
    """Complete a short read (network file systems, signals); a read of nothing means the file ends too early."""
    for buffer in buffers:
        done = min(got, len(buffer))
        got -= done
        while done < len(buffer):
            read = os.preadv(handle, [buffer[done:]], offset + done)
            if read == 0:
                raise _damaged(path)
            done += read
        offset += len(buffer)
