"""GR00T's `meta/modality.json`: what slices of state and action are, its cameras, its annotations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....errors import Note
from .documents import field, read_json, shown

_COLUMN = {"state": "observation.state", "action": "action"}  # of a slice that names no other


@dataclass(frozen=True)
class Slice:
    """Dimensions start..stop-1 of a column, and what they are."""

    name: str  # e.g. "left_arm"
    column: str  # feature of the files
    start: int
    stop: int
    absolute: bool | None = None  # False: a displacement; None: not said
    rotation: str = ""  # GR00T's name of the representation, e.g. "quaternion"; "" where it is no rotation
    low: float | None = None  # range of the values, where it is given
    high: float | None = None


@dataclass(frozen=True)
class Modality:
    """A validated modality.json; what cannot be used of it is left out and in `notes`."""

    state: tuple[Slice, ...] = ()  # in the order of their dimensions
    action: tuple[Slice, ...] = ()
    cameras: Mapping[str, str] | None = None  # GR00T's name → feature; None: not said
    annotations: Mapping[str, str] | None = None  # e.g. "human.action.task_description" → column of the rows
    notes: tuple[Note, ...] = ()


def read_modality(path: Path, features: Mapping[str, Mapping[str, Any]]) -> Modality:
    """The file's content, checked against `features`; an empty `Modality` where there is no file."""
    if not path.is_file():
        return Modality()
    try:
        given = read_json(path)
    except ValueError as error:
        return Modality(notes=(Note("modality-unreadable", f"meta/{error}: not used"),))
    notes: list[Note] = []
    parts = {part: _slices(part, given.get(part), features, notes) for part in _COLUMN}
    cameras = {
        name: key
        for name, key in _keys(given.get("video"), "", "video", notes).items()
        if _known("video", name, key, features, notes)
    }
    annotations = _keys(given.get("annotation"), "annotation.", "annotation", notes)
    return Modality(parts["state"], parts["action"], cameras or None, annotations or None, tuple(notes))


def _slices(part: str, given: Any, features: Mapping[str, Mapping[str, Any]], notes: list[Note]) -> tuple[Slice, ...]:
    found = []
    for name, values in _objects(given, part, notes).items():
        column = values.get("original_key") or _COLUMN[part]
        if not _known(part, name, column, features, notes):
            continue
        width = (features[column].get("shape") or [0])[0]
        try:
            start, stop = field(values, "start"), field(values, "end")
            if start >= stop or width and stop > width:
                raise ValueError(f"has the dimensions {start} to {stop} of '{column}', which has {width}")
        except ValueError as error:
            notes.append(_note(f"{part} '{name}' {error}"))
            continue
        absolute, rotation = values.get("absolute"), values.get("rotation_type")
        bounds = values.get("range")
        low = high = None
        if isinstance(bounds, list) and len(bounds) == 2 and all(type(b) in (int, float) for b in bounds):
            low, high = map(float, bounds)
        found.append(
            Slice(
                name,
                column,
                start,
                stop,
                absolute if isinstance(absolute, bool) else None,
                rotation if isinstance(rotation, str) else "",
                low,
                high,
            )
        )
    return tuple(sorted(found, key=lambda s: (s.column, s.start)))


def _keys(given: Any, prefix: str, part: str, notes: list[Note]) -> dict[str, str]:
    """Name → the column or feature it stands for."""
    named = {n: v.get("original_key") or f"{prefix}{n}" for n, v in _objects(given, part, notes).items()}
    return {name: key for name, key in named.items() if isinstance(key, str)}


def _objects(given: Any, part: str, notes: list[Note]) -> dict[str, Mapping[str, Any]]:
    if given is not None and not isinstance(given, Mapping):
        notes.append(_note(f"{part} is {shown(given)}, expected an object"))
    found = given if isinstance(given, Mapping) else {}
    return {name: value if isinstance(value, Mapping) else {} for name, value in found.items()}


def _known(part: str, name: str, key: Any, features: Mapping[str, Any], notes: list[Note]) -> bool:
    if isinstance(key, str) and key in features:
        return True
    notes.append(_note(f"{part} '{name}' stands for {shown(key)}, which info.json does not have"))
    return False


def _note(what: str) -> Note:
    return Note("modality-unreadable", f"meta/modality.json: {what}: not used")
