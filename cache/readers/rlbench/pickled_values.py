"""What a pickle of observations may hold besides numbers, text, lists and dicts, and the few calls that make it.

Classes and functions of the file are names here; what numpy's functions would do with their arguments is done by ours,
which check that an array is exactly its bytes. `unpickle.py` is the interpreter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

_NUMBER = re.compile(r"(b1|[iu][1248]|f[248])")
_ANY_DTYPE = re.compile(r"[a-zA-Z][0-9]{0,9}")


@dataclass(slots=True, eq=False)
class Record:
    """An object of one of the known record classes: its class and its attributes, without any behavior."""

    kind: str  # "Observation" or "Demo"
    fields: dict[str, Any] = field(default_factory=dict)  # attribute → value as read; arrays as `PickledArray`


@dataclass(slots=True, eq=False)
class PickledArray:
    """A numpy array as stored. Numbers become an array when asked for; text and objects stay closed."""

    dtype: str = ""  # with byte order, e.g. "<f8"
    shape: tuple[int, ...] = ()
    order: Literal["C", "F"] = "C"
    raw: bytes | list = b""  # a list for objects
    axes: tuple[int, ...] | None = None  # a transposition of `shape`, which is then that in memory

    def numpy(self) -> np.ndarray | None:
        """The array (read-only), or None when it does not hold numbers."""
        if not _NUMBER.fullmatch(self.dtype[1:]) or isinstance(self.raw, list):
            return None
        array = np.frombuffer(self.raw, np.dtype(self.dtype)).reshape(self.shape, order=self.order)
        return array if self.axes is None else array.transpose(self.axes)


class Name(NamedTuple):
    """What a class or function of the file is here: its names."""

    module: str
    name: str


@dataclass(slots=True, eq=False)
class Dtype:
    code: str  # e.g. "f8"
    order: str = "|"  # "<", ">", "=" or "|"


class Refused(Exception):
    """The file asks for what is not data."""


class Damaged(Exception):
    """The bytes are not a complete pickle."""


def fill(array: PickledArray, raw: Any, dtype: Any, shape: Any, order: Any) -> PickledArray:
    """Check that `raw` is exactly the bytes (or objects) of such an array, and keep it."""
    if (
        type(dtype) is not Dtype
        or order not in ("C", "F")
        or type(shape) is not tuple
        or len(shape) > 32
        or not all(type(n) is int and n >= 0 for n in shape)
    ):
        raise Damaged("an array of unknown form")
    count = math.prod(shape)
    if dtype.code[0] == "O":
        if type(raw) is not list or len(raw) != count:
            raise Refused("has an array of objects that is not a list of them")
    elif type(raw) is not bytes or _NUMBER.fullmatch(dtype.code) and len(raw) != count * int(dtype.code[1:]):
        raise Damaged("an array whose shape does not fit its bytes")
    array.dtype, array.shape, array.order, array.raw = dtype.order + dtype.code, shape, order, raw
    return array


def _reconstruct(kind: Any, shape: Any, code: Any) -> PickledArray:
    if kind != Name("numpy", "ndarray"):
        raise Refused("makes an array of another class")
    return PickledArray("|b1", (0,))


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> PickledArray:
    """Protocol 5. Order "K" (numpy 2.3 on): the array in memory, transposed by `axes`."""
    array = fill(PickledArray(), raw, dtype, shape, "C" if order == "K" else order)
    if order == "K":
        if type(axes) is not tuple or any(type(i) is not int for i in axes) or sorted(axes) != list(range(len(shape))):
            raise Damaged("an invalid transposition")
        array.axes = axes
    return array


def _scalar(dtype: Any, raw: Any) -> Any:
    value = fill(PickledArray(), raw, dtype, (), "C").numpy()
    if value is None:
        raise Refused(f"has a number of type {dtype.code}")
    return value.item()


def _dtype(code: Any, align: Any = False, copy: Any = False) -> Dtype:
    if type(code) is not str or not _ANY_DTYPE.fullmatch(code):
        raise Refused("has an array of a compound type")
    return Dtype(code)


def set_dtype(dtype: Dtype, version: Any, order: Any, subtype: Any, names: Any, fields: Any, *sizes: Any) -> None:
    if order not in ("<", ">", "=", "|") or (subtype, names, fields) != (None, None, None):
        raise Refused("has an array of a compound type")
    dtype.order = order


def _encode(text: Any, encoding: Any) -> bytes:
    """Protocol 2 keeps bytes as text: `_codecs.encode(text, "latin1")`."""
    if encoding not in ("latin1", "latin-1"):
        raise Refused("encodes text")
    return text.encode("latin1")


def _bytes(content: Any = b"", encoding: Any = "latin1") -> bytes:
    if type(content) not in (str, bytes):
        raise Refused("makes bytes from what is no text")
    return content if type(content) is bytes else _encode(content, encoding)


def _ordered(*nothing: Any) -> dict:
    if nothing:
        raise Refused("makes a dictionary from other objects")
    return {}


RECORDS: dict[tuple, str] = {  # the classes of RLBench, and of its fork for two arms when it records one
    Name("rlbench.backend.observation", "Observation"): "Observation",
    Name("rlbench.backend.observation", "UnimanualObservation"): "Observation",
    Name("rlbench.demo", "Demo"): "Demo",
}
TYPES = {Name("numpy", "ndarray")}
CALLS: dict[tuple, Callable[..., Any]] = {
    Name("numpy", "dtype"): _dtype,
    Name("_codecs", "encode"): _encode,
    Name("collections", "OrderedDict"): _ordered,
    **{Name(module, name): _bytes for module in ("builtins", "__builtin__") for name in ("bytes", "bytearray")},
    **{
        Name(f"numpy.{core}.{module}", name): call
        for core in ("core", "_core")  # numpy 1 and numpy 2
        for module, name, call in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _from_buffer),
        )
    },
}
