"""Real matrices of a MATLAB 5 file (what `scipy.io.savemat` writes), read with every length checked.

scipy's own reader ends the process on one in fifty damaged files. Format: MathWorks, "MAT-File Format", level 5.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator

import numpy as np

_NUMBERS = {
    1: "i1",
    2: "u1",
    3: "i2",
    4: "u2",
    5: "i4",
    6: "u4",
    7: "f4",
    9: "f8",
    12: "i8",
    13: "u8",
}  # by type of data
_MATRIX, _COMPRESSED = 14, 15  # types of elements
_CLASSES = range(6, 16)  # of arrays: double, single and integers
_COMPLEX = 0x800  # flag of an array
_MOST = 1 << 20  # bytes of an element that is unpacked: camera matrices are small
_HEADER = 128


def read_matrices(data: bytes) -> dict[str, np.ndarray]:
    """The real matrices in a file by name, float64. `ValueError` for a file that is damaged or of another version."""
    if data[126:128] not in (b"IM", b"MI") or data[124:126] not in (b"\0\1", b"\1\0"):
        raise ValueError("not a MATLAB 5 file")
    order, found = "<" if data[126:128] == b"IM" else ">", {}
    for kind, content in _elements(data[_HEADER:], order):
        for inner, matrix in _elements(_unpacked(content), order) if kind == _COMPRESSED else [(kind, content)]:
            if inner == _MATRIX and (named := _matrix(matrix, order)) is not None:
                found[named[0]] = named[1]
    return found


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """(type, content) of each data element."""
    at = 0
    while at < len(data):
        kind, size = np.frombuffer(data[at : at + 8], f"{order}u4").tolist()
        begin, length = (at + 4, 8) if kind >> 16 else (at + 8, 8 + size + (-size % 8 if kind != _COMPRESSED else 0))
        kind, size = (kind & 0xFFFF, kind >> 16) if kind >> 16 else (kind, size)
        if begin + size > len(data) or (begin == at + 4 and size > 4):
            raise ValueError("it is cut short")
        yield kind, data[begin : begin + size]
        at += length


def _unpacked(data: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(data, _MOST)
    except zlib.error as error:
        raise ValueError(str(error)) from None


def _matrix(data: bytes, order: str) -> tuple[str, np.ndarray] | None:
    """(name, values) of a matrix of real numbers; None for any other variable."""
    flags, shape, name, *parts = _elements(data, order)
    (flag,) = np.frombuffer(flags[1][:4], f"{order}u4").tolist()
    if flag & 0xFF not in _CLASSES or flag & _COMPLEX or len(parts) != 1 or parts[0][0] not in _NUMBERS:
        return None
    sizes = np.frombuffer(shape[1], f"{order}i4").tolist()
    values = np.frombuffer(parts[0][1], order + _NUMBERS[parts[0][0]]).astype(np.float64)
    if min(sizes, default=0) < 0 or math.prod(sizes) != len(values):
        raise ValueError(f"a matrix of shape {sizes} with {len(values)} numbers")
    return name[1].decode("ascii"), values.reshape(sizes, order="F")
