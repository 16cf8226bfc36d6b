"""Writing Zarr v3 shard files directly."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...common.files import crc32c, publish, temporary_name

if TYPE_CHECKING:
    from .codec import Compression


MISSING = np.uint64(2**64 - 1)  # offset and nbytes of a chunk that was never written


def index_nbytes(chunks_per_shard: int) -> int:
    """Bytes of a shard's index with its checksum."""
    return 16 * chunks_per_shard + 4


class ShardWriter:
    """Writes one shard: `append` in order, then `commit`, without which no file appears. Use as a context manager.

    `chunk_shape` is the inner chunk; `chunks_per_shard` the inner chunks of a full shard (fewer may be written: the
    rest is marked missing in the index). `compression` None stores the bytes as they are.
    """

    def __init__(
        self,
        path: Path,
        chunk_shape: tuple[int, ...],
        dtype: np.dtype | str,
        chunks_per_shard: int,
        compression: Compression | None = None,
    ) -> None:
        self.path, self.chunks_per_shard, self.count = Path(path), chunks_per_shard, 0
        self._compression = compression
        self._sizes: list[int] = []  # bytes of each chunk as stored
        self._tail, self._dtype = tuple(chunk_shape[1:]), np.dtype(dtype).newbyteorder("<")
        self._rows = chunk_shape[0]
        self._chunk_nbytes = int(np.prod(chunk_shape)) * self._dtype.itemsize
        self._crc, self._temporary = 0, temporary_name(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._temporary, "wb", buffering=0)

    def append(self, block: np.ndarray) -> None:
        """Write full chunks, `[k · chunk_shape[0], *chunk_shape[1:]]` of the shard's dtype, without a copy."""
        if block.dtype != self._dtype or block.shape[1:] != self._tail or block.shape[0] % self._rows:
            raise ValueError(
                f"{self.path}: expected chunks of {(self._rows, *self._tail)} {self._dtype}, "
                f"got {block.shape} {block.dtype}"
            )
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
        """Write the index, sync, rename to the final name; returns (nbytes, crc32c) of the file."""
        index = np.full((self.chunks_per_shard, 2), MISSING, dtype="<u8")
        index[: self.count, 1] = self._sizes
        index[: self.count, 0] = np.cumsum([0, *self._sizes[:-1]])[: self.count]
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
        self._temporary.unlink(missing_ok=True)  # already renamed after a commit

    def _write(self, data: np.ndarray) -> None:
        flat = data.reshape(-1).view(np.uint8)
        self._crc = crc32c(flat, self._crc)
        view = flat.data
        while view:
            view = view[self._file.write(view) :]
