"""The one gate of every JSON and YAML document that dvla reads: file, size, encoding, depth, numbers, keys and types.

A document's form is a `Form` (a pydantic model that forbids unknown keys and converts nothing), or any annotation:

    class Entry(Form):
        bytes: Count
        crc32c: Annotated[int, Field(ge=0, lt=2**32)]

    files = read_json(path, dict[str, Entry])        # the plain mapping, once it has that form

pydantic rather than our own checks: it reports where, what was found and what is allowed; it is fast, and the packages
of most users bring it along. What it does not see is checked here: duplicate keys, NaN, depth, halves of surrogates.
"""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic import Field as Field
from pydantic import Strict as Strict

from ..errors import UserError
from .text import first_line, printable

MOST_BYTES = 256 * 2**20  # of a document; a manifest of 100,000 files has 10 MB
MOST_PARTS = 5_000_000  # values and keys; anchors of YAML can stand for any number
MOST_DEPTH = 64  # of lists and mappings within each other
_MERGE = "tag:yaml.org,2002:merge"
SHOWN = 60  # characters of a value in a message


class Form(BaseModel):
    """What a mapping must be: the fields' keys, no others, of exactly these types. A field with a default may lack."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class OpenForm(Form):
    """The same, with any other keys besides."""

    model_config = ConfigDict(extra="allow")


Count = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[int, Field(ge=1, lt=2**63)]
Crc32c = Annotated[int, Field(ge=0, lt=2**32)]


def read_json(path: Path, form: Any = dict[str, Any], remedy: str = "", most: int = MOST_BYTES) -> Any:
    """The plain value of a JSON file that has `form`.

    Args:
        remedy: what to do about a damaged file, the end of the message.
        most: the largest size that is read, in bytes.

    Raises:
        UserError: it cannot be read, is no regular file, or not such a document. The line names file, place, what was
            found and what is allowed.
    """
    return parse_json(read_file(path, most), path, form, remedy)


def read_json_lines(path: Path, form: Any = dict[str, Any], remedy: str = "") -> list[Any]:
    """The values of a JSON lines file, each of `form`; `UserError` as `read_json`, naming the line."""
    lines = read_file(path).split(b"\n")
    return [parse_json(line, f"{path} line {n}", form, remedy) for n, line in enumerate(lines, 1) if line.strip()]


def parse_json(data: bytes, where: Path | str, form: Any = dict[str, Any], remedy: str = "") -> Any:
    """The plain value of JSON text in UTF-8 that has `form`; `UserError` as `read_json`, naming `where`."""
    try:
        value = json_value(data.decode("utf-8"))
    except ValueError as error:
        raise _damaged(where, f"is not valid JSON: {error}", remedy) from None
    return require_form(value, where, form, remedy)


def require_form(value: Any, where: Path | str, form: Any, remedy: str = "") -> Any:
    """`value` as it is; `UserError` unless it has `form`: the place, what was found, what is allowed."""
    try:
        _adapter(form).validate_python(value)
    except ValidationError as error:
        raise _damaged(where, _reason(error), remedy) from None
    except RecursionError:
        raise _damaged(where, "is nested too deeply", remedy) from None
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; `UserError` when it cannot be read or is not one."""
    value = parse_yaml(read_file(path, most=2**20), path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a mapping at the top level, found {shown(value)}")
    return value


def parse_yaml(data: bytes | str, where: Path | str) -> Any:
    """The plain value of YAML text: mappings with text keys, lists, texts (dates too), numbers, booleans and null.

    `UserError` for what is no YAML, tags, duplicate keys, NaN, and anchors that stand for millions of values.
    """
    import yaml  # slow to import, and `--help` reads none

    class Loader(yaml.SafeLoader):  # its own: constructors are registered on a class
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            unique([(self.construct_object(key, deep=True), None) for key, _ in node.value if key.tag != _MERGE])
            return super().construct_mapping(node, deep)

    def as_text(loader: Any, node: Any) -> str:  # a date is text to everything here
        return str(node.value)

    Loader.add_constructor("tag:yaml.org,2002:timestamp", as_text)
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        value = Loader(text).get_single_data()
        require_plain(value)
        return value
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else first_line(error)
        raise UserError(f"{where} is not valid YAML: {printable(reason)}") from None


def json_bytes(document: Any, *, indent: int = 1, allow_nan: bool = True) -> bytes:
    """Readable JSON with a fixed byte form and sorted keys. `ValueError` for a NaN or infinity that is not allowed."""
    text = json.dumps(document, sort_keys=True, indent=indent, ensure_ascii=False, allow_nan=allow_nan)
    return f"{text}\n".encode()


def json_value(text: str, *, nan: bool = False) -> Any:
    """The value of JSON text. `ValueError`: not JSON, NaN (unless `nan`), a key twice, too deep, half a surrogate."""
    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=None if nan else _not_a_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    require_plain(value, nan)
    return value


def read_file(path: Path, most: int = MOST_BYTES) -> bytes:
    """The bytes of a regular file of at most `most` bytes. `UserError` for any other, a pipe among them: no waiting."""
    path = Path(path)
    try:
        with open(open_regular(path), "rb") as file:
            if (size := os.fstat(file.fileno()).st_size) > most:
                raise UserError(f"cannot read {path}: it has {size} bytes, expected at most {most}")
            return file.read()  # not `most`, for which room would be taken
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def open_regular(path: Path | str, flags: int = os.O_RDONLY, folder: int | None = None) -> int:
    """A handle of a regular file, which is never waited for; `OSError` for a pipe, a device or anything else.

    `folder`: the handle of the directory that a relative path is in.
    """
    try:
        handle = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666, dir_fd=folder)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        raise OSError(errno.EINVAL, "it is a socket or pipe, expected a file", str(path)) from None
    if not stat.S_ISREG(mode := os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, f"it is {kind_of(mode)}, expected a file", str(path))
    return handle


def require_file(path: Path, most: int = MOST_BYTES) -> None:
    """`UserError` unless another library may read this file: a regular one of at most `most` bytes."""
    try:
        os.close(open_regular(path))
        size = os.stat(path).st_size
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if size > most:
        raise UserError(f"cannot read {path}: it has {size} bytes, expected at most {most}")


def kind_of(mode: int) -> str:
    """What a path is that is no regular file, in words, of its `st_mode`."""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def shown(value: Any) -> str:
    """A value in a message: shortened, printable."""
    try:
        text = f"a mapping of {len(value)} keys" if isinstance(value, dict) else repr(value)
    except ValueError:  # Python writes no more than 4300 digits
        text = "a number of thousands of digits"
    text = f"a list of {len(value)} values" if isinstance(value, list) and len(text) > SHOWN else text
    text = printable(text).replace("\n", " ")
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


@functools.cache
def _adapter(form: Any) -> TypeAdapter[Any]:
    if isinstance(form, type) and issubclass(form, BaseModel):
        return TypeAdapter(form)
    return TypeAdapter(form, config=ConfigDict(strict=True, allow_inf_nan=False))


def _reason(error: ValidationError) -> str:
    """The first problem: place, what was found, what is allowed; how many more there are."""
    first, *more = error.errors(include_url=False, include_context=False)
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    place = printable(place if len(place) <= 2 * SHOWN else f"…{place[-2 * SHOWN :]}")
    message = re.sub(r"^Input should be |^String should (?=match)", "expected ", first["msg"]).replace(
        "dictionary", "mapping"
    )
    found = {"missing": "is missing", "extra_forbidden": "is no key of it"}.get(
        first["type"], f"is {shown(first['input'])}, {message}"
    )
    rest = f" (and {len(more)} more)" if more else ""
    return f"is damaged: '{place}' {found}{rest}" if place else f"is damaged: it {found}{rest}"


def _damaged(where: Path | str, what: str, remedy: str) -> UserError:
    return UserError(f"{where} {what}" + (f"; {remedy}" if remedy else ""))


def unique(pairs: list[tuple[Any, Any]], same: bool = False) -> dict[Any, Any]:
    """A mapping of pairs; `ValueError` for a key given twice, with `same` unless its values are equal."""
    values = dict(pairs)
    if len(values) == len(pairs):
        return values
    values = {}
    for key, value in pairs:
        if key in values and not (same and value == values[key]):
            raise ValueError(f"the key {shown(key)} is given twice" + " with different values" * same)
        values[key] = value
    return values


def _not_a_number(constant: str) -> float:
    raise ValueError(f"it holds {constant}, expected a finite number")


def require_plain(value: Any, nan: bool = False) -> None:
    """`ValueError` for what no document may hold: see `json_value`."""
    level, parts = [value], 0
    for _ in range(MOST_DEPTH + 1):
        inner: list[Any] = []
        for part in level:
            kind = type(part)
            if kind is dict:
                inner += part
                inner += part.values()
            elif kind is list:
                inner += part
            elif kind is float and not nan and not math.isfinite(part):
                raise ValueError(f"it holds {part}, expected a finite number")
            elif kind is str and not part.isascii():
                _require_unicode(part)
        parts += len(inner)
        if parts > MOST_PARTS:
            raise ValueError(f"it stands for more than {MOST_PARTS} values")
        level = inner
    if level:
        raise ValueError(f"it is nested over {MOST_DEPTH} levels deep")


def _require_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("a text holds half of a surrogate pair") from None
