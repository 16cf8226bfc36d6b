"""Messages as bytes: msgpack with NumPy arrays in openpi's form.

An array is a map with the binary keys `__ndarray__` (true), `data` (its bytes, C order), `dtype` (NumPy's string, e.g.
"<f4") and `shape`; a NumPy number is a map with `__npgeneric__` (true), `data` and `dtype`. The msgpack-numpy package
writes other keys and pickles arrays of objects; here only booleans, integers and floats are allowed, in both
directions, so that reading a message never executes code.
"""

from __future__ import annotations

import math
import re
from typing import Any

import msgpack
import numpy as np

from .errors import ClientError

NUMBERS = re.compile(r"[<>|=]?[biuf]\d{1,2}")
LONGEST = 1 << 16  # values of a list, entries of a map; arrays are bytes
MOST_PARTS = 1 << 20  # lists, maps and what they hold, of a message: an empty list is one byte of it and 56 in memory


def pack(value: Any) -> bytes:
    """Maps, lists, text, numbers and NumPy arrays → bytes. `ClientError` for anything else."""
    try:
        return msgpack.packb(value, default=_encode)
    except (TypeError, ValueError, OverflowError) as error:
        raise ClientError(f"cannot be sent: {_line(error)}") from None


def unpack(data: bytes) -> Any:
    """Inverse of `pack`; arrays are read-only. `ClientError` for bytes that are not such a message."""
    parts = 0

    def counted(value: Any) -> Any:
        nonlocal parts
        parts += 1 + len(value)
        if parts > MOST_PARTS:
            raise ClientError(f"a message holds more than {MOST_PARTS} values; send numbers as arrays")
        return value

    try:
        return msgpack.unpackb(
            data,
            object_hook=lambda value: _decode(counted(value)),
            list_hook=counted,
            max_array_len=LONGEST,
            max_map_len=LONGEST,
        )
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        raise ClientError(f"not a msgpack message: {_line(error)}") from None


def _encode(value: Any) -> dict[bytes, Any]:
    if not isinstance(value, (np.ndarray, np.generic)):
        raise TypeError(f"{type(value).__name__} is not a map, a list, text, a number or an array")
    if not NUMBERS.fullmatch(value.dtype.str):
        raise TypeError(f"arrays must be of numbers, not of dtype {value.dtype}")
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}


def _decode(value: dict[Any, Any]) -> Any:
    if b"__ndarray__" in value:
        dtype, shape, data = _dtype(value), value.get(b"shape"), value.get(b"data")
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape) or len(shape) > 8:
            raise ClientError("an array's shape must be a list of at most 8 sizes")
        if not isinstance(data, bytes) or len(data) != math.prod(shape) * dtype.itemsize:
            raise ClientError(
                f"an array of shape {shape} and dtype {dtype} needs {math.prod(shape) * dtype.itemsize} bytes of data, "
                f"got {len(data) if isinstance(data, bytes) else type(data).__name__}"
            )
        return np.frombuffer(data, dtype).reshape(shape)
    if b"__npgeneric__" in value:
        with np.errstate(over="ignore"):  # an overflow becomes infinite, which is refused where it matters
            return _dtype(value).type(value.get(b"data"))
    return value


def _dtype(value: dict[Any, Any]) -> np.dtype[Any]:
    name = value.get(b"dtype")
    if not isinstance(name, str) or not NUMBERS.fullmatch(name):
        raise ClientError(f"an array's dtype must be of booleans, integers or floats, got {name!r:.40}")
    return np.dtype(name)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
