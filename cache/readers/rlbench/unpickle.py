"""Pickled observation records, read by an interpreter of our own that can build nothing but data.

Python's unpickler with a filtered `find_class` is not enough for files of strangers: numpy's own `dtype` and `ndarray`
set forged state without checking it (raw bytes become object pointers), deeply nested keys overflow the C stack, and
one memo number takes gigabytes. So the opcodes are read here: those that CPython writes for numbers, text, lists,
dicts, arrays and three record classes (protocols 2 to 5). A class or function is only ever a pair of names, nothing is
imported, nothing is called, and memory is bounded by the size of the file. Everything else is refused.
"""

from __future__ import annotations

import pickle  # for the opcodes' numbers alone
import struct
from collections.abc import Callable
from typing import Any

from ..episode import CorruptEpisode
from .pickled_values import CALLS, RECORDS, TYPES, Damaged, Dtype, Name, PickledArray, Record, Refused, fill, set_dtype

__all__ = ["PickledArray", "Record", "load_records"]

MAX_BYTES = 64 << 20  # an episode of 150 observations with camera matrices takes about 0.6 MB
MAX_INT_KEYS = 10_000  # of all dictionaries: their hashes can be chosen to collide, those of texts cannot
MAX_OPCODES = 4_000_000  # and 90,000 opcodes, each of which makes at most one object


def load_records(data: bytes, name: str, where: str) -> Any:
    """The value that was pickled into `data`: None, bool, int, float, str, bytes, list, tuple, dict (keys text or int),
    `Record` or `PickledArray`, nested. `CorruptEpisode`, "<where>: <name> ...", for a file that asks for anything else,
    is cut off, damaged or larger than `MAX_BYTES`."""
    if len(data) > MAX_BYTES:
        raise CorruptEpisode(f"{where}: {name} has {len(data):,} bytes; at most {MAX_BYTES:,} are read")
    try:
        return _Machine(data).run()
    except Refused as error:
        raise CorruptEpisode(f"{where}: {name} {error}; refused") from None
    except (Damaged, IndexError, KeyError, ValueError, TypeError, AttributeError, struct.error, OverflowError) as error:
        reason = f": {error}" if isinstance(error, Damaged) else ""
        raise CorruptEpisode(f"{where}: {name} is cut off or damaged{reason}", "unreadable-file") from None


class _Machine:
    """The pickle stack machine: `stack` with `marks` into it, and a `memo`. One method per kind of opcode."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        self.encoded = 0  # bytes made from text so far
        self.int_keys = self.attributes = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []

    def run(self) -> Any:
        """Interpret up to STOP; the value on top."""
        data, ops = self.data, _OPCODES
        if data[:1] != b"\x80" or not 2 <= data[1] <= 5:
            raise Damaged("it is not a pickle of protocol 2 to 5")
        for _ in range(MAX_OPCODES):
            code = data[self.at]
            self.at += 1
            if code == pickle.STOP[0]:
                if type(self.stack[-1]) is Name:
                    raise Refused("holds a class or function")
                return self.stack.pop()
            operation = ops.get(code)
            if operation is None:
                raise Refused(f"uses opcode 0x{code:02x} at byte {self.at - 1}, which is not needed for observations")
            operation(self)
        raise Refused(f"has more than {MAX_OPCODES:,} opcodes")

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        start, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise Damaged("it ends early")
        return self.data[start : self.at]

    def number(self, size: int) -> int:
        """The next `size` bytes as an unsigned little-endian integer."""
        return int.from_bytes(self.take(size), "little")

    def since_mark(self) -> list[Any]:
        """Pop what was pushed after the last mark."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def line(self) -> str:
        """Text up to the next end of line."""
        end = self.data.find(b"\n", self.at)
        if end < 0:
            raise Damaged("it ends early")
        return self.take(end + 1 - self.at)[:-1].decode()

    # --- opcodes with more than one line ---

    def memoize(self, index: int) -> None:
        if index > len(self.memo):
            raise Damaged("a memo out of order")
        self.memo[index : index + 1] = [self.stack[-1]]

    def append(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise Damaged("items for what is no list")
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        keys = items[::2]
        if type(self.stack[-1]) is not dict or len(items) % 2:
            raise Damaged("items for what is no dictionary")
        if not all(type(k) in (str, int) for k in keys):  # a tuple may be nested as deep as the file is long
            raise Refused("has a dictionary with keys that are no text")
        self.int_keys += sum(type(k) is int for k in keys)
        if self.int_keys > MAX_INT_KEYS:
            raise Refused(f"has more than {MAX_INT_KEYS:,} numbers as keys")
        self.stack[-1].update(zip(keys, items[1::2]))

    def name(self, module: Any, name: Any) -> None:
        found = Name(module, name)
        if found not in RECORDS and found not in CALLS and found not in TYPES:
            shown = "".join(c if c.isprintable() else "?" for c in f"{module}.{name}"[:80])
            raise Refused(f"asks for {shown}, which is not an observation record")
        self.stack.append(found)

    def stack_name(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise Damaged("a class name that is no text")
        self.name(module, name)

    def new_object(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if type(kind) is not Name or kind not in RECORDS or arguments != ():
            raise Refused("makes an object that is not an observation record")
        self.stack.append(Record(RECORDS[kind]))

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not Name or function not in CALLS or type(arguments) is not tuple:
            raise Refused("calls what is not an array or a number")
        made = CALLS[function](*arguments)
        if type(made) is bytes:  # one text may be named often; bytes of it may not be made more often than it is there
            self.encoded += len(made)
            if self.encoded > len(self.data):
                raise Refused("makes more bytes than it has")
        self.stack.append(made)

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Record:
            self.attributes += len(state) if type(state) is dict else 0
            if self.attributes > MAX_OPCODES:  # one large state, looked through for each of many records
                raise Refused("sets more attributes than it has")
            if type(state) is not dict or target.fields or any(k.startswith("__") for k in state):
                raise Refused(f"sets more than the attributes of {target.kind}")
            target.fields = state  # not a copy: a thousand records may share one large state
        elif type(target) is PickledArray:
            _version, shape, dtype, fortran, raw = state
            fill(target, raw, dtype, shape, "F" if fortran else "C")
        elif type(target) is Dtype:
            set_dtype(target, *state)
        else:
            raise Refused("sets the state of what is not an observation record")


# --- the opcodes, which pickletools.py of CPython describes --------------------------------------------------------


def _push(value: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    return lambda m: m.stack.append(value(m))


def _tuple_of(count: int) -> Callable[[_Machine], None]:
    def operation(m: _Machine) -> None:
        if len(m.stack) < count:
            raise Damaged("it takes from an empty stack")
        items = tuple(m.stack[-count:])
        m.stack[-count:] = [items]

    return operation


def _text(size: int) -> Callable[[_Machine], None]:
    return _push(lambda m: m.take(m.number(size)).decode("utf-8", "surrogatepass"))


def _binary(size: int) -> Callable[[_Machine], None]:
    return _push(lambda m: m.take(m.number(size)))


_BY_NAME: dict[str, Callable[[_Machine], Any]] = {
    "PROTO": lambda m: m.take(1),
    "FRAME": lambda m: m.take(8),
    "MARK": lambda m: m.marks.append(len(m.stack)),
    "POP": lambda m: m.stack.pop(),
    "POP_MARK": _Machine.since_mark,
    "NONE": _push(lambda m: None),
    "NEWTRUE": _push(lambda m: True),
    "NEWFALSE": _push(lambda m: False),
    "BININT": _push(lambda m: int.from_bytes(m.take(4), "little", signed=True)),
    "BININT1": _push(lambda m: m.number(1)),
    "BININT2": _push(lambda m: m.number(2)),
    "LONG1": _push(lambda m: int.from_bytes(m.take(m.number(1)), "little", signed=True)),
    "BINFLOAT": _push(lambda m: struct.unpack(">d", m.take(8))[0]),
    "SHORT_BINUNICODE": _text(1),
    "BINUNICODE": _text(4),
    "BINUNICODE8": _text(8),
    "SHORT_BINBYTES": _binary(1),
    "BINBYTES": _binary(4),
    "BINBYTES8": _binary(8),
    "BYTEARRAY8": _binary(8),
    "EMPTY_LIST": _push(lambda m: []),
    "APPENDS": lambda m: m.append(m.since_mark()),
    "APPEND": lambda m: m.append([m.stack.pop()]),
    "EMPTY_DICT": _push(lambda m: {}),
    "SETITEMS": lambda m: m.set_items(m.since_mark()),
    "SETITEM": lambda m: m.set_items([m.stack.pop(), m.stack.pop()][::-1]),
    "EMPTY_TUPLE": _push(lambda m: ()),
    "TUPLE": _push(lambda m: tuple(m.since_mark())),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "BINPUT": lambda m: m.memoize(m.number(1)),
    "LONG_BINPUT": lambda m: m.memoize(m.number(4)),
    "MEMOIZE": lambda m: m.memoize(len(m.memo)),
    "BINGET": _push(lambda m: m.memo[m.number(1)]),
    "LONG_BINGET": _push(lambda m: m.memo[m.number(4)]),
    "GLOBAL": lambda m: m.name(m.line(), m.line()),
    "STACK_GLOBAL": _Machine.stack_name,
    "NEWOBJ": _Machine.new_object,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
}
_OPCODES = {getattr(pickle, name)[0]: operation for name, operation in _BY_NAME.items()}
