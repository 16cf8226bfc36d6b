"""Files of `meta/` as plain values: JSON, JSON lines and parquet as people really write them; numbers out of values;
templates of paths. What cannot be used is a `ValueError` whose text completes "FILE …" or "'FIELD' …"."""

from __future__ import annotations

import functools
import glob
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from ....common.documents import read_file, require_plain, unique
from ....common.text import first_line
from ....errors import UserError
from ..location import unreadable
from .parquet import DAMAGE, open_file, require_texts

_BIGGEST = 2**53  # whole numbers beyond it are no counts
_BLANK = " \t\r\n\x00"  # what surrounds values; a crash can leave a tail of zero bytes
_SKIPPED = re.compile(f"[{_BLANK}]*")


@dataclass(frozen=True)
class Line:
    """One object of a JSON lines file, or one row of a parquet file."""

    where: str  # file and line, or file and row
    value: dict[str, Any] | None  # None: it cannot be read
    problem: str = ""  # why
    text: str = ""  # of the line that cannot be read
    odd_bytes: bool = False  # it is no UTF-8 and was read as Windows-1252


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file."""
    try:
        text, _ = _decoded(read_file(path))
        value = _one(text.strip(_BLANK))
    except (UserError, ValueError) as error:
        raise ValueError(unreadable(path, "JSON", error)) from None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds {shown(value)}, expected a JSON object")
    return value


def read_lines(path: Path) -> list[Line]:
    """Every object of a JSON lines file in order, blank lines left out; lines end at line feeds alone.

    `ValueError` when the file cannot be read, or holds lines and none of them can.
    """
    found: list[Line] = []
    try:
        data = read_file(path)
        for number, (text, is_utf8) in enumerate(_split(data), 1):
            found += _objects(f"meta/{path.name} line {number}", text, is_utf8)
        if any(line.value is None for line in found):
            found = _one_document(path, data) or found
        if found and all(line.value is None for line in found):
            raise ValueError(found[0].problem)
    except (UserError, ValueError) as error:
        raise ValueError(unreadable(path, "JSON lines", error)) from None
    return found


def _split(data: bytes) -> Iterator[tuple[str, bool]]:
    """(text of a line, whether it is valid in the file's encoding)."""
    if not json.detect_encoding(data).startswith("utf-8"):  # UTF-16 or -32, of Windows tools
        yield from ((line, True) for line in _decoded(data)[0].split("\n"))
    else:
        yield from map(_decoded, data.split(b"\n"))


def _decoded(data: bytes) -> tuple[str, bool]:
    encoding = json.detect_encoding(data)
    try:
        return data.decode(encoding), True
    except UnicodeDecodeError:
        if not encoding.startswith("utf-8"):
            raise
        return data.decode("cp1252", "replace"), False


def _objects(where: str, text: str, is_utf8: bool) -> Iterator[Line]:
    """The objects in one line: usually one; two where a writer lost the line feed between them."""
    text, at = text.strip(_BLANK), 0
    while at < len(text):
        try:
            value, end = _next(text, at)
        except ValueError as error:
            yield Line(where, None, f"cannot be read as JSON: {first_line(error)}", text[at:], not is_utf8)
            return
        line = _as_line(where, value, "" if isinstance(value, dict) else text[at:], not is_utf8)
        yield line
        at = _SKIPPED.match(text, end).end() if line.value is not None else len(text)  # type: ignore[union-attr]


def _one_document(path: Path, data: bytes) -> list[Line]:
    """The objects of a file that is one array, or one object over many lines; [] for any other."""
    try:
        whole = _one(_decoded(data)[0].strip(_BLANK))
    except ValueError:
        return []
    values = whole if isinstance(whole, list) else [whole]
    return [_as_line(f"meta/{path.name} entry {i}", value, "", False) for i, value in enumerate(values, 1)]


def _as_line(where: str, value: Any, text: str, odd_bytes: bool) -> Line:
    if isinstance(value, dict):
        return Line(where, value, odd_bytes=odd_bytes)
    return Line(where, None, f"holds {shown(value)}, expected an object", text, odd_bytes)


def _one(text: str) -> Any:
    value, end = _next(text)
    if text[end:].strip(_BLANK):
        raise ValueError(f"extra data after character {end}")
    return value


def _next(text: str, at: int = 0) -> tuple[Any, int]:
    """The JSON value of `text` that begins at `at`, and where it ends."""
    try:
        value, end = _DECODER.raw_decode(text, at)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if "\\ud" in text[at:end].lower():  # half of a pair of escapes cannot be written again
        value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    require_plain(value, nan=True)
    return value, end


# Not strict: a raw tab in a text is no damage.
_DECODER = json.JSONDecoder(strict=False, object_pairs_hook=functools.partial(unique, same=True))


def read_rows(path: Path, root: Path, skip: str | None = None) -> list[Line]:
    """Every row of a parquet file, without the columns that begin with `skip`; `ValueError` when it cannot be read."""
    name = path.relative_to(root).as_posix()
    try:
        with open_file(path, texts=True) as file:
            names = [n for n in file.schema_arrow.names if skip is None or not n.startswith(skip)]
            table = file.read(columns=names)
        require_texts(table)
    except DAMAGE as error:
        raise ValueError(unreadable(path, "parquet", error)) from None
    try:
        return [Line(f"{name} row {i}", row) for i, row in enumerate(table.to_pylist())]
    except (ValueError, OverflowError, pa.ArrowException):  # e.g. a text that is no UTF-8: of one row
        return [_row(f"{name} row {i}", table.slice(i, 1)) for i in range(table.num_rows)]


def _row(where: str, table: pa.Table) -> Line:
    try:
        return Line(where, table.to_pylist()[0])
    except (ValueError, OverflowError, pa.ArrowException) as error:
        return Line(where, None, f"cannot be read: {first_line(error)}")


# --- values -----------------------------------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """A value in a message: short, in one line."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def number(value: Any) -> float:
    """A finite number, also one in a text or alone in a list."""
    if type(value) is float and math.isfinite(value):
        return value
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if value is None:
        raise ValueError("is empty")
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str, Decimal)):
            raise ValueError
        found = float(value)
        if not math.isfinite(found):
            raise ValueError
    except (ValueError, OverflowError):
        raise ValueError(f"is {shown(value)}, expected a number") from None
    return found


def whole(value: Any) -> int:
    """A count or an index: 0 or more; 12.0 and "12" are 12."""
    if type(value) is int and 0 <= value <= _BIGGEST:
        return value
    found = number(value)
    if not (0 <= found <= _BIGGEST and found == int(found)):
        raise ValueError(f"is {shown(value)}, expected a whole number of 0 or more")
    return int(found)


def field(values: Mapping[str, Any], name: str) -> int:
    """The whole number `name` of an object; the `ValueError` names it."""
    if name not in values:
        raise ValueError(f"has no '{name}'")
    try:
        return whole(values[name])
    except ValueError as error:
        raise ValueError(f"'{name}' {error}") from None


# --- templates --------------------------------------------------------------------------------------------------------

_MOST_FIELDS = 8  # of a template: names are matched against it, in time that grows with their power
_FIELD = re.compile(r"\{(\w+)(?::(0?\d{0,2})d?)?\}")


class Template:
    """A path with fields like `{episode_index:06d}`. Nothing but a number's width can be asked of a field."""

    def __init__(self, text: Any, known: Sequence[str]) -> None:
        """`ValueError` for fields that are not `known`, for anything else in braces, for a path out of its folder."""
        if not isinstance(text, str) or not text:
            raise ValueError(f"is {shown(text)}, expected a path")
        text = text.replace("\\", "/")
        self.text, self._safe = text, set[str]()
        fields = _FIELD.findall(text)
        if len(fields) > _MOST_FIELDS:
            raise ValueError(f"has {len(fields)} fields, expected at most {_MOST_FIELDS}")
        for name, _ in fields:
            if name not in known:
                raise ValueError(f"'{text}' has the field '{name}' (known: {', '.join(known)})")
        if re.search(r"[{}]", _FIELD.sub("", text)):
            raise ValueError(f"'{text}' has braces that are no field (known: {', '.join(known)})")
        self._require_inside(text)
        pieces = _FIELD.split(PurePosixPath(text).as_posix())  # literal, name, width, literal, …
        self._literals, self._fields = pieces[::3], list(zip(pieces[1::3], pieces[2::3]))

    def fill(self, **values: int | str) -> str:
        """The path, relative; `ValueError` when a text of `values` would lead out of the dataset's folder."""
        path = self._literals[0]
        for (name, width), literal in zip(self._fields, self._literals[1:]):
            value = values[name]
            if isinstance(value, str) and value not in self._safe:
                self._require_inside(value)
                self._safe.add(value)
            path += (format(value, f"{width or ''}d") if isinstance(value, int) else value) + literal
        return path

    def glob(self, **values: str) -> str:
        """A pattern for the paths with these values and any others."""
        for value in values.values():
            self._require_inside(value)
        filled = [glob.escape(values[name]) if name in values else "*" for name, _ in self._fields]
        return "".join(glob.escape(a) + b for a, b in zip(self._literals, [*filled, ""]))

    def match(self, path: str) -> dict[str, str]:
        """The fields of a path that was made by this template; {} for another path."""
        pattern, seen = re.escape(self._literals[0]), set()
        for (name, _), literal in zip(self._fields, self._literals[1:]):
            pattern += ("(?:.+?)" if name in seen else f"(?P<{name}>.+?)") + re.escape(literal)
            seen.add(name)
        found = re.fullmatch(pattern, path)
        return found.groupdict() if found else {}

    def _require_inside(self, path: str) -> None:
        parts = PurePosixPath(path)
        if parts.is_absolute() or ".." in parts.parts or "\0" in path or "\\" in path or not parts.parts:
            raise ValueError(f"'{self.text}' leaves its folder")


def flat_names(names: Any) -> Iterator[str]:
    """Names out of the forms that writers use: a list, lists in lists, groups like {"motors": […]} (their names before
    those of several groups that share one), and name → position."""
    if isinstance(names, Mapping):
        values = list(names.values())
        if values and all(type(v) is int for v in values):
            yield from sorted(map(str, names), key=lambda name: names[name])
            return
        groups = {str(group): list(flat_names(inside)) for group, inside in names.items()}
        every = [name for inside in groups.values() for name in inside]
        is_plain = len(set(every)) == len(every)
        yield from every if is_plain else (f"{g}.{name}" for g, inside in groups.items() for name in inside)
    elif isinstance(names, (list, tuple)):
        for part in names:
            yield from flat_names(part)
    elif names is not None:
        yield str(names)
