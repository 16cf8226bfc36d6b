"""The task text of an RLDS episode, and whether it succeeded: features with many names in many places."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np

from ..episode import CorruptEpisode
from ..labels import SUCCESS, is_task, joined, rank, truth
from .metadata import Feature
from .tfrecord import values_of

_CATALOG = ("steps/language_instruction", "steps/observation/natural_language_instruction")  # where tfds' own have it
_CODES = ("uint8", "int32", "int64")  # of the characters of a text, filled up with 0, as Language-Table has it


def text_features(features: Mapping[str, Feature]) -> dict[str, Feature]:
    """Path in a record → feature that may hold the task text, the preferred first: where the catalog has it, then by
    name, and of one name those of a step first."""
    ranked = {
        path: (path not in _CATALOG, rank(path.rpartition("/")[2]), _distance(path), path)
        for path, feature in features.items()
        if rank(path.rpartition("/")[2]) and _holds_text(feature)
    }
    return {path: features[path] for path in sorted(ranked, key=lambda p: ranked[p])}


def read_text(example: Mapping[str, Any], features: Mapping[str, Feature], lengths: Set[int], where: str) -> str:
    """The task text: of the first of `features` that is not empty; differing ones of the steps are joined by "; " in
    order of use. `lengths`: of the columns. `CorruptEpisode` for another number of texts, or what is not UTF-8."""
    for path, feature in features.items():
        if path not in example:
            continue
        found, short = _texts(example, path, feature, where), path.removeprefix("steps/")
        if path.startswith("steps/") and len(found) not in lengths:
            raise CorruptEpisode(f"{where}: {len(found)} texts of '{short}' for {max(lengths)} rows", "row-count")
        text = joined(found)
        if is_task(path.rpartition("/")[2], text):
            return text
    return ""


def success_features(features: Iterable[str]) -> tuple[str, ...]:
    """Paths of the features that may say whether an episode succeeded."""
    return tuple(p for p in features if p.rpartition("/")[2] in SUCCESS or p.endswith("path"))


def success_in(example: Mapping[str, Any], paths: Sequence[str]) -> bool | None:
    """By a feature called success (of steps: any of them), else by a folder of that name in the path of a recording,
    as DROID's; None where neither tells. `paths`: of `success_features`."""
    for path in paths:
        values = _any_values(example, path)
        if path.rpartition("/")[2] in SUCCESS and values:
            found = [truth(v) for v in values]
            return None if None in found else any(found)
        folders = {p for v in values if isinstance(v, bytes) for p in v.decode(errors="replace").split("/")}
        if len(folders & {"success", "failure"}) == 1:
            return "success" in folders
    return None


def _distance(path: str) -> int:
    """How far a feature is from a step: of a step, of its observation, of something else in it, of the episode."""
    outer = path.split("/")[:-1]
    return 3 if outer[:1] != ["steps"] else 0 if len(outer) == 1 else 1 if outer == ["steps", "observation"] else 2


def _holds_text(feature: Feature) -> bool:
    codes = feature.kind == "tensor" and feature.encoding == "none" and feature.dtype in _CODES
    return feature.kind in ("text", "string tensor") or codes and len(feature.shape) == 1 and (feature.width or 0) > 1


def _texts(example: Mapping[str, Any], path: str, feature: Feature, where: str) -> list[str]:
    """The texts of a feature, one per step or the episode's one; of several strings in a step the first not empty."""
    width, short = feature.width or 1, path.removeprefix("steps/")
    values = values_of(example, path, "int64" if feature.kind == "tensor" else "bytes", where)
    if feature.kind != "text" and len(values) % width:
        raise CorruptEpisode(f"{where}: '{short}' has {len(values)} parts, no multiple of the {width} of one step")
    try:
        if feature.kind == "tensor":
            rows = ("".join(map(chr, row[row != 0])) for row in np.reshape(values, (-1, width)))
            return [t.encode("latin1").decode() if not t.isascii() and max(t) < "\u0100" else t for t in rows]
        if feature.kind == "string tensor" and feature.shape:
            values = [next(filter(None, values[i : i + width]), b"") for i in range(0, len(values), width)]
        return [v.decode() for v in values]
    except (UnicodeError, ValueError, OverflowError):
        raise CorruptEpisode(f"{where}: '{short}' is not UTF-8 text") from None


def _any_values(example: Mapping[str, Any], path: str) -> list[Any]:
    """The values of a feature of any kind; [] where the record lacks it."""
    kind = example[path].WhichOneof("kind") if path in example else None
    return list(getattr(example[path], kind).value) if kind else []
