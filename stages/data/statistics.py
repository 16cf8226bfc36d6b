"""`dvla data stats`: statistics of a dataset's actions and states, streamed from its tables; no image is opened.

A report is JSON: for action and state, per unified field and native dimension, count, mean, std, min, max, quantiles
and `grid`: the medians of 200 parts of equal count. Reports merge: moments exactly, quantiles by the grids, whose ranks
are off by at most 1/400 of their report's rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from ...cache.actions.action_map import ActionMap
from ...cache.actions.slots import ACTION_SCHEMA_VERSION, UNIFIED_DIM
from ...cache.actions.statistics import QUANTILES, RunningStatistics, Statistics
from ...cache.readers import Source
from ...common.documents import Count, Field, Form, Positive, read_json, require_form
from ...common.files import write_file
from ...common.progress import Progress
from ...errors import Failed, UserError
from .summary import column_names, unified_fields

KIND = "dvla statistics 1"  # first entry of a report; the number changes with its layout
PARTS = 200  # of the grid
GRID = tuple((i + 0.5) / PARTS for i in range(PARTS))
BATCH_ROWS = 16384

Report = dict[str, Any]


class _Entry(Form):
    count: Positive
    mean: float
    std: Annotated[float, Field(ge=0)]
    min: float
    max: float
    quantiles: Annotated[
        dict[Literal[tuple(map(str, QUANTILES))], float],  # type: ignore[valid-type]
        Field(min_length=len(QUANTILES)),
    ]
    grid: Annotated[list[float], Field(min_length=PARTS, max_length=PARTS)]


class _Slot(_Entry):
    slot: Annotated[int, Field(ge=0, lt=UNIFIED_DIM)]
    unit: str


class _Vector(Form):
    unified: dict[str, _Slot]
    native: dict[str, _Entry] = {}


class _Refused(Form):
    episode: Count
    reason: str


class _Dataset(Form):
    name: str
    config: str | None
    control_hz: Annotated[float, Field(gt=0)]
    episodes: Count
    rows: Count
    quarantined: list[_Refused]


class _Report(Form):
    """A report on disk."""

    kind: str
    action_schema: str | int
    datasets: Annotated[list[_Dataset], Field(min_length=1)]
    action: _Vector | None = None
    state: _Vector | None = None


def measure(source: Source, show: Progress) -> Report:
    """Report of one dataset. Episodes that cannot be used are listed in it; `UserError` when none can be."""
    maps = {"action": source.action_map, "state": source.state_map}
    running = {what: (RunningStatistics(), RunningStatistics()) for what in maps}
    refused: list[Failed] = []
    episodes = rows = 0
    total = len(source.episode_ids)
    for block in source.tables(BATCH_ROWS):
        for what, mapping in maps.items():
            values = getattr(block, what)
            if mapping.native_dim and len(values):
                unified, native = running[what]
                if mapping.mask.any():
                    unified.update(mapping.to_unified(values)[:, mapping.mask])
                native.update(values)
        refused += block.refused
        episodes += len(np.unique(block.episode_ids))
        rows += len(block.episode_ids)
        show("episodes", episodes + len(refused), total)
    if not rows:
        raise UserError(f"{source.name}: none of {total} episodes can be used" + (f"; {refused[0]}" if refused else ""))
    about = {
        "name": source.name,
        "config": source.config.name if source.config.mapped else None,
        "control_hz": source.control_hz,
        "episodes": episodes,
        "rows": rows,
        "quarantined": [{"episode": f.episode, "reason": str(f)} for f in refused],
    }
    names = {what: mapping.field_names for what, mapping in maps.items()}
    if not source.config.mapped:
        names = {what: tuple(found) for what, found in column_names(source).items()}
    vectors = {
        what: _vector(mapping, *running[what], names[what]) for what, mapping in maps.items() if mapping.native_dim
    }
    return {"kind": KIND, "action_schema": ACTION_SCHEMA_VERSION, "datasets": [about], **vectors}


def _vector(
    mapping: ActionMap, unified: RunningStatistics, native: RunningStatistics, names: Sequence[str]
) -> dict[str, Any]:
    slots = np.flatnonzero(mapping.mask).tolist()
    entries = dict(zip(slots, _entries(unified) if slots else ()))  # in the order of the slots
    named = {name: {"slot": slot, "unit": unit, **entries[slot]} for slot, name, unit in unified_fields(mapping)}
    return {
        "unified": named,
        "native": {f"{i} {name}": entry for i, (name, entry) in enumerate(zip(names, _entries(native)))},
    }


def _entries(running: RunningStatistics) -> list[dict[str, Any]]:
    """One JSON-ready entry per dimension."""
    s = running.result(QUANTILES + GRID)
    assert s.quantiles is not None  # asked for
    return [
        {
            "count": s.count,
            "mean": float(s.mean[i]),
            "std": float(s.std[i]),
            "min": float(s.min[i]),
            "max": float(s.max[i]),
            "quantiles": {str(q): float(s.quantiles[q][i]) for q in QUANTILES},
            "grid": [float(np.float32(s.quantiles[q][i])) for q in GRID],
        }
        for i in range(len(s.mean))
    ]


# --- reports on disk -------------------------------------------------------------------------------------------------


def read_report(path: Path) -> Report:
    """A report that `write_report` wrote; `UserError` for another file."""
    report = read_json(path, Any)
    if not isinstance(report, dict) or report.get("kind") != KIND:
        raise UserError(f"{path} is not a report of this release's `dvla data stats --out`; measure the dataset again")
    return require_form(report, path, _Report, "measure the dataset again")


def write_report(report: Report, path: Path) -> None:
    """Write it atomically; an existing file is refused."""
    refuse_existing(path)
    write_file(path, (json.dumps(report, indent=1) + "\n").encode())


def refuse_existing(path: Path | None) -> None:
    """`UserError` when `path` exists; called before long work."""
    if path is not None and path.exists():
        raise UserError(f"{path} exists; choose another --out")


# --- merging ---------------------------------------------------------------------------------------------------------


def merge_reports(reports: Sequence[Report]) -> Report:
    """One report over all rows, merged by unified slot; native dimensions stay where all have the same dataset config.

    `UserError` when a dataset is in two of them, or the action schemas differ.
    """
    if len(reports) == 1:
        return reports[0]
    schemas = {r["action_schema"] for r in reports}
    if schemas != {ACTION_SCHEMA_VERSION}:
        raise UserError(
            f"measure the datasets again: the reports have action schemas {', '.join(map(str, sorted(schemas)))}, this "
            f"release has {ACTION_SCHEMA_VERSION}"
        )
    datasets = [d for r in reports for d in r["datasets"]]
    names = [d["name"] for d in datasets]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise UserError(f"dataset {', '.join(twice)} is in more than one of the reports; its rows would count twice")
    merged: Report = {"kind": KIND, "action_schema": ACTION_SCHEMA_VERSION, "datasets": datasets}
    configs = {d["config"] for d in datasets}
    same = len(configs) == 1 and None not in configs
    for what in ("action", "state"):
        vectors = [r[what] for r in reports if what in r]
        if vectors:
            merged[what] = {
                part: _merge_fields([v.get(part, {}) for v in vectors]) for part in ("unified", "native")[: 1 + same]
            }
    return merged


def _merge_fields(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Field by field: two datasets may name a slot differently (arm, right_arm); the first name stays."""
    groups: dict[Any, tuple[str, list[Mapping[str, Any]]]] = {}
    for part in parts:
        for name, entry in part.items():
            groups.setdefault(entry.get("slot", name), (name, []))[1].append(entry)
    return {name: _merge_entries(entries) for name, entries in groups.values()}


def _merge_entries(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if len(entries) == 1:
        return dict(entries[0])
    total = _moments(entries[0])
    for entry in entries[1:]:
        total = total.merge(_moments(entry))
    values = np.concatenate([e["grid"] for e in entries])
    weights = np.repeat([e["count"] / PARTS for e in entries], PARTS)
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[order]) / weights.sum()

    def at(level: float) -> float:
        return float(values[order[min(int(np.searchsorted(reached, level - 1e-9)), len(order) - 1)]])

    return {
        **entries[0],
        **{k: float(getattr(total, k)[0]) for k in ("mean", "std", "min", "max")},
        "count": total.count,
        "quantiles": {str(q): at(q) for q in QUANTILES},
        "grid": [at(q) for q in GRID],
    }


def _moments(entry: Mapping[str, Any]) -> Statistics:
    mean, std, low, high = (np.array([entry[k]]) for k in ("mean", "std", "min", "max"))
    return Statistics(mean, std, low, high, entry["count"])
