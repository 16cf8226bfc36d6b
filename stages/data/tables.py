"""Tables and lines of `dvla data list`, `show` and `stats`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from ...cache.readers.search import place_of
from ...common.console import console, errors, say, table
from ...common.text import wrapped

if TYPE_CHECKING:
    from ...cache.actions.action_map import ActionMap
    from ...cache.readers import Source
    from ...cache.readers.config import DatasetConfig
    from ...cache.readers.episode import Episode
    from .summary import Summary

SHOWN_INSTRUCTIONS = 5
SHOWN_REASONS = 10
SHOWN_NUMBERS = 20
WIDE = 64  # numbers per row of a column, above which they are shown as one
SHOWN_QUANTILES = ("0.01", "0.5", "0.99")


def show_families(configs: Sequence[DatasetConfig]) -> None:
    """One row per shipped dataset config; variants, which have a folder, last."""
    rows = [
        (
            c.name,
            c.format,
            c.embodiment,
            f"{c.control_hz:g}" if c.control_hz else "-",
            f"{c.action_width}/{sum(spec.width for spec in c.state)}",
            f"{c.sampling_weight:g}",
            c.license or "-",
            (c.source or ("-",))[0] + (f" (+{len(c.source) - 1})" if len(c.source) > 1 else ""),
        )
        for c in sorted(configs, key=lambda c: ("/" in c.name, c.name))
    ]
    head = ("family", "format", "embodiment", "Hz", "dims", "weight", "license", "source")
    console.print(table(head, rows, drop=("weight", "source", "dims")))
    say("Hz -: the rate in the files; dims: native dimensions of action/state")
    say("a family with / is used only where --dataset-config names it")


def show_datasets(found: Sequence[Summary]) -> None:
    """One row per dataset that lies in the folders."""
    rows = [
        (
            s.path,
            f"{s.format} {s.version or ''}".strip(),
            str(s.episodes),
            "?" if s.frames is None else str(s.frames),
            f"{s.hz:g}" if s.source is None or s.source.rate_known else "?",
            _cameras(s.cameras, "\n"),
            s.family or "none",
        )
        for s in found
    ]
    head = ("dataset", "format", "episodes", "frames", "Hz", "cameras (H×W)", "family")
    console.print(table(head, rows, drop=("Hz", "format")))


def show_summary(s: Summary, instructions: Counter[str]) -> None:
    """What the dataset is, in lines."""
    config = s.source.config
    lines = {"dataset": s.path, "format": f"{s.format} {s.version or ''}".strip(), "config": "none fits"}
    if config.mapped:
        lines["config"] = f"{config.name} ({place_of(config)})"
        lines |= {
            "embodiment": config.embodiment,
            "license": config.license or "not known",
            "source": ", ".join(config.source),
            "note": config.note,
        }
        lines["rate"] = f"{s.source.control_hz:g} Hz"
        lines["rate"] += f" ({s.hz:g} Hz by the files)" if s.hz != s.source.control_hz else ""
        ahead = f", {config.action_shift} rows ahead" if config.action_shift else ""
        if config.integrate:
            how = f"{config.integrate.rotation}, {config.integrate.frame} frame"
            lines["integrated"] = f"the action's displacements ({how}) become absolute poses"
        state = " + ".join(config.state_columns) if config.state else "none"
        lines["columns"] = f"action: {' + '.join(config.action_columns)}{ahead}; state: {state}"
    else:
        lines["rate"] = f"{s.hz:g} Hz" if s.source.rate_known else "not in the files"
    lines["episodes"] = f"{s.episodes}, {'an unknown number of' if s.frames is None else s.frames} frames"
    lines["cameras"] = _cameras(s.cameras, ", ")
    counted = instructions.total()
    lines["instructions"] = f"{len(instructions)} different"
    lines["instructions"] += f" in {counted} of {s.episodes} episodes" if counted < s.episodes else ""
    lines["instructions"] += f", from {s.source.text_from}" if s.source.text_from else ""
    lines["remarks"] = "; ".join(note.text for note in s.source.notes())
    for name, value in lines.items():
        if value:
            say(f"{name:<13} {wrapped(value, ' ' * 14)[14:]}")
    for text, count in instructions.most_common(SHOWN_INSTRUCTIONS):
        say(f"{count:>13} × {text!r}" if text else f"{count:>13} × no instruction")


def _cameras(cameras: Mapping[str, tuple[int, int] | None], between: str) -> str:
    return between.join(name + (f" {size[0]}×{size[1]}" if size else "") for name, size in cameras.items()) or "none"


def columns_table(source: Source, ranges: Mapping[str, np.ndarray], read: int, episode: Episode | None) -> Table:
    """The numbers of a dataset that no config describes, with their `ranges` in `read` episodes; a wide column in one
    row. `episode`: also its first and last row."""
    from .summary import column_names

    config, rows = source.config, []
    for what, names in column_names(source).items():
        columns, specs = (getattr(config, part) for part in (f"{what}_columns", what))
        start = 0
        for column, spec in zip(columns, specs):
            whole = slice(start, start + spec.width)
            parts = [whole] if spec.width > WIDE else [slice(i, i + 1) for i in range(start, whole.stop)]
            for part in parts:
                at = _span(range(part.start - start, part.stop - start))
                low, high = (f"{end(v[i, part]):.4g}" for i, end, v in _ends(ranges.get(what)))
                values = [_numbers(getattr(episode, what)[row, part]) for row in (0, -1)] if episode else []
                rows.append((column, at, names[part.start] if part != whole else "", low, high, *values))
            start = whole.stop
    head = ("column", "dim", "name", "min", "max", *(("first", "last") if episode else ()))
    every = len(source.episode_ids)
    return table(head, rows, f"numbers, ranges in {read} of {every} episodes" if read < every else "numbers")


def field_table(title: str, mapping: ActionMap, native_names: Sequence[str] | None) -> Table:
    """A field map: native dimension → unified slot."""
    from .summary import field_rows

    rows = [
        (_span(row.dims), ", ".join(row.native), row.field, _span(row.slots), row.unit, row.conversion)
        for row in field_rows(mapping, native_names)
    ]
    return table(("dim", "native", "unified", "slot", "unit", "native → unified"), rows, title)


def values_table(title: str, mapping: ActionMap, native_names: Sequence[str] | None, values: np.ndarray) -> Table:
    """The first and the last row of native `values [T, d]`, as they are and unified."""
    from .summary import field_rows

    ends = values[[0, -1]]
    unified, rows = mapping.to_unified(ends), []
    for row in field_rows(mapping, native_names):
        dims, slots = list(row.dims), list(row.slots)
        numbers = (ends[0, dims], ends[1, dims], unified[0, slots], unified[1, slots])
        rows.append((_span(row.dims), ", ".join(row.native), row.field, *map(_numbers, numbers)))
    head = ("dim", "native", "unified", "first\nnative", "last\nnative", "first\nunified", "last\nunified")
    return table(head, rows, title, drop=("last\nnative", "last\nunified"))


def show_episode(episode: Episode) -> None:
    """Length, instruction and image sizes."""
    say(f"episode {episode.episode_id}: {episode.length} frames, {episode.timestamps[-1]:.2f} s")
    say(wrapped(f"instruction {episode.instruction!r}"))
    say(wrapped(f"cameras {_cameras({v.name: (v.height, v.width) for v in episode.views}, ', ')}"))


def _ends(values: np.ndarray | None) -> list[tuple[int, Any, np.ndarray]]:
    known = np.full((2, 1 << 16), np.nan) if values is None else values
    return [(0, np.min, known), (1, np.max, known)]


def _span(numbers: Sequence[int]) -> str:
    return "" if not numbers else str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}–{numbers[-1]}"


def _numbers(values: np.ndarray) -> str:
    return " ".join(f"{v:.4g}" for v in values) if len(values) <= 9 else "…"


def statistics_table(title: str, fields: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row per field of a report's vector."""
    numbers = ("mean", "std", "min", *SHOWN_QUANTILES, "max")
    head = ("field", "unit", "count", *(n if n.isalpha() else f"q{n}" for n in numbers))
    rows = [
        (name, f.get("unit", ""), str(f["count"]), *(f"{f.get(n, f['quantiles'].get(n)):.4g}" for n in numbers))
        for name, f in fields.items()
    ]
    return table(head, rows, title, drop=("count", "q0.01", "q0.99", "q0.5"))


def show_report(report: Mapping[str, Any], out: Path | None, native: bool) -> None:
    """Tables of a report, the reasons of its quarantine, and the closing line."""
    for what in ("action", "state"):
        unmapped = not report.get(what, {}).get("unified")
        for part in ("unified", "native")[: 1 + (native or unmapped)]:
            if report.get(what, {}).get(part):
                console.print(statistics_table(f"{what}, {part}", report[what][part]))
    lost = [q for d in report["datasets"] for q in d["quarantined"]]
    for q in lost[:SHOWN_REASONS]:
        errors.print(q["reason"], style="yellow", markup=False)
    if len(lost) > SHOWN_REASONS:
        where = f"all in {out}" if out else "--out writes all"
        errors.print(f"… {len(lost) - SHOWN_REASONS} more, {where}", style="yellow", markup=False)
    episodes, rows = (sum(d[k] for d in report["datasets"]) for k in ("episodes", "rows"))
    named = ", ".join(str(q["episode"]) for q in lost[:SHOWN_NUMBERS]) + (", …" if len(lost) > SHOWN_NUMBERS else "")
    where = str(out or ", ".join(d["name"] for d in report["datasets"]))
    say(f"{where}: {rows} rows of {episodes} episodes, {len(lost)} quarantined" + (f" ({named})" if lost else ""))
