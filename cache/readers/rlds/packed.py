"""Files compressed as one stream (gzip or zlib, as tf.io.TFRecordOptions writes them), read from any position.

The stream is unpacked once from its beginning; the state of the decompressor is kept at up to `_POINTS` places on the
way, so that a record is found again from the nearest one. Memory stays below about 10 MB whatever a file holds.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ANY = 32 + zlib.MAX_WBITS  # gzip or zlib, by the stream's header
_READ = 64 << 10  # packed bytes read at once
_BLOCK = 1 << 20  # unpacked bytes made at once
_POINTS = 64
_KINDS = {  # first bytes of a file → how it is compressed
    b"\x1f\x8b\x08": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x04\x22\x4d\x18": "lz4",
    b"\xff\x06\x00\x00sNaPpY": "snappy",
}


def compression_of(head: bytes) -> str:
    """How a file with these first bytes is compressed; "" where they do not tell."""
    if len(head) > 1 and head[0] & 15 == 8 and head[0] >> 4 < 8 and (head[0] << 8 | head[1]) % 31 == 0:
        return "zlib"
    return next((kind for magic, kind in _KINDS.items() if head.startswith(magic)), "")


class Damaged(Exception):
    """The stream cannot be unpacked any further."""


@dataclass(frozen=True)
class _Point:
    """A place in the stream from which it can be unpacked."""

    at: int  # unpacked bytes before it
    packed: int  # bytes of the file read before it
    engine: Any  # a zlib decompressor, never used itself but copied
    rest: bytes  # packed bytes read but not used yet


class Unpacked:
    """What a gzip or zlib file holds. Safe to read from several threads once `blocks(learn=True)` has ended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._points = [_Point(0, 0, zlib.decompressobj(_ANY), b"")]
        self._step = _BLOCK

    def blocks(self, start: int = 0, learn: bool = False) -> Iterator[bytes]:
        """What is unpacked from byte `start` on, in blocks of up to 1 MiB; `Damaged` where that ends early.

        `learn`: keep places on the way."""
        point = next(p for p in reversed(self._points) if p.at <= start)
        engine, rest, at, packed = point.engine.copy(), point.rest, point.at, point.packed
        block, begun = b"", point.at > 0
        with open(self.path, "rb") as file:
            file.seek(packed)
            while True:
                if not rest and len(block) < _BLOCK:  # a full block may have left more in the engine
                    rest = file.read(_READ)
                    packed += len(rest)
                    if not rest:
                        if begun:
                            raise Damaged("the compressed file is cut short")
                        return
                try:
                    block = engine.decompress(rest, _BLOCK)
                except zlib.error as error:
                    raise Damaged(f"the compressed file is damaged ({error})") from None
                rest, begun = engine.unconsumed_tail, True
                if engine.eof:  # another stream may follow, as gzip allows
                    rest, engine, begun = engine.unused_data.lstrip(b"\0"), zlib.decompressobj(_ANY), False
                at += len(block)
                if learn:
                    self._keep(_Point(at, packed, engine.copy(), rest))
                if at > start:
                    yield block[max(0, len(block) - (at - start)) :]

    def read(self, start: int, stop: int) -> bytes:
        """Bytes start..stop-1, fewer where it ends before; `Damaged` as `blocks`."""
        found = bytearray()
        for block in self.blocks(start):
            found += block[: stop - start - len(found)]
            if len(found) == stop - start:
                break
        return bytes(found)

    def _keep(self, point: _Point) -> None:
        if point.at >= self._points[-1].at + self._step:
            self._points.append(point)
        if len(self._points) > _POINTS:
            self._points, self._step = self._points[::2], 2 * self._step
