"""`dvla data list`, `show` and `stats` in the terminal. A line fits in 80 columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from ...common.console import console, errors, right_aligned, say, simple_table
from ...common.text import wrapped

if TYPE_CHECKING:
    from ...cache.actions.action_map import ActionMap
    from ...cache.readers.config import DatasetConfig
    from ...cache.readers.episode import Episode
    from .summary import Summary

WIDE = 110  # columns of a terminal that shows all of a table; a narrower one shows what fits in 80
PIPE_WIDTH = 170  # of wide tables where there is no terminal
SHOWN_INSTRUCTIONS = 5
SHOWN_REASONS = 10
SHOWN_NUMBERS = 20
SHOWN_QUANTILES = ("0.01", "0.5", "0.99")


def show_families(configs: Sequence[DatasetConfig]) -> None:
    """One row per shipped dataset config; variants, which have a folder, last."""
    names = ("family", "format", "embodiment", "Hz", "dims", "weight", "license", "source")
    shown = names if _is_wide() else ("family", "format", "embodiment", "source")
    fixed = [Column(name, no_wrap=True) for name in shown if name not in ("license", "source")]
    table = simple_table(*fixed, *(name for name in shown if name in ("license", "source")))
    for c in sorted(configs, key=lambda c: ("/" in c.name, c.name)):
        dims = f"{c.action_width}/{sum(spec.width for spec in c.state)}"
        more = f" (+{len(c.source) - 1})" if len(c.source) > 1 else ""
        hz, source = f"{c.control_hz:g}" if c.control_hz else "-", (c.source or ("-",))[0] + more
        row = (c.name, c.format, c.embodiment, hz, dims, f"{c.sampling_weight:g}", c.license or "-", source)
        table.add_row(*(escape(cell) for name, cell in zip(names, row) if name in shown))
    _print_wide(table)
    if _is_wide():
        say("dims: native dimensions of action/state; Hz -: the rate that the dataset's files give")
    say("a family with / is used only where --dataset-config names it")


def show_datasets(found: Sequence[Summary]) -> None:
    """One row per dataset in the folders."""
    wide = _is_wide()
    numbers = right_aligned("episodes", "frames", "Hz")
    table = simple_table("dataset", "format", *numbers, "cameras (H×W)" if wide else "cameras", "family")
    for s in found:
        form, frames = f"{s.format} {s.version or ''}".strip(), "?" if s.frames is None else str(s.frames)
        cameras = _cameras(s.cameras, "\n") if wide else str(len(s.cameras))
        row = (s.path, form, str(s.episodes), frames, f"{s.hz:g}", cameras, s.family or "none")
        table.add_row(*map(escape, row))
    _print_wide(table)


def _is_wide() -> bool:
    return not console.is_terminal or console.width >= WIDE


def _print_wide(table: Table) -> None:
    Console(highlight=False, width=None if console.is_terminal else PIPE_WIDTH).print(table)


def show_summary(s: Summary, instructions: Counter[str]) -> None:
    """What the dataset is, in lines."""
    lines = {"dataset": s.path, "format": f"{s.format} {s.version or ''}".strip(), "config": s.family or "none fits"}
    if s.source:
        config = s.source.config
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
        lines["columns"] = f"action: {' + '.join(config.action_columns)}{ahead}; state: " + (
            " + ".join(config.state_columns) if config.state else "none"
        )
    else:
        lines["rate"] = f"{s.hz:g} Hz"
    lines["episodes"] = f"{s.episodes}, {'an unknown number of' if s.frames is None else s.frames} frames"
    lines["cameras"] = _cameras(s.cameras, ", ")
    counted = instructions.total()
    lines["instructions"] = f"{len(instructions)} different"
    lines["instructions"] += f" in {counted} of {s.episodes} episodes" if counted < s.episodes else ""
    for name, value in lines.items():
        if value:
            say(f"{name:<13} {wrapped(' '.join(value.split()), ' ' * 14)[14:]}")
    for text, count in instructions.most_common(SHOWN_INSTRUCTIONS):
        say(f"{count:>13} × {text!r}" if text else f"{count:>13} × no instruction")


def _cameras(cameras: Mapping[str, tuple[int, int] | None], between: str) -> str:
    return between.join(name + (f" {size[0]}×{size[1]}" if size else "") for name, size in cameras.items()) or "none"


def features_table(features: Mapping[str, Any]) -> Table:
    """The raw features of a LeRobot dataset that no config describes."""
    from .summary import dimension_names

    table = simple_table("feature", "type", "shape", "names")
    for key, feature in features.items():
        names = ", ".join(dimension_names(features, (key,)) or [])
        shape = "×".join(map(str, feature.get("shape") or [1]))
        table.add_row(escape(key), str(feature.get("dtype")), shape, escape(names))
    return table


def field_table(title: str, mapping: ActionMap, native_names: Sequence[str] | None) -> Table:
    """A field map: native dimension → unified slot."""
    from .summary import field_rows

    table = simple_table(
        "dim", "native", "unified", "slot", "unit", "native → unified", title=title, title_justify="left"
    )
    for row in field_rows(mapping, native_names):
        cells = (_span(row.dims), ", ".join(row.native), row.field, _span(row.slots), row.unit, row.conversion)
        table.add_row(*map(escape, cells))
    return table


def values_table(title: str, mapping: ActionMap, native_names: Sequence[str] | None, values: np.ndarray) -> Table:
    """The first and the last row of native `values [T, d]`, as they are and unified."""
    from .summary import field_rows

    heads = ("dim", "native", "unified", "first\nnative", "last\nnative", "first\nunified", "last\nunified")
    table = simple_table(*heads, title=title, title_justify="left")
    ends = values[[0, -1]]
    unified = mapping.to_unified(ends)
    for row in field_rows(mapping, native_names):
        dims, slots = list(row.dims), list(row.slots)
        numbers = (ends[0, dims], ends[1, dims], unified[0, slots], unified[1, slots])
        table.add_row(*map(escape, (_span(row.dims), ", ".join(row.native), row.field, *map(_numbers, numbers))))
    return table


def show_episode(episode: Episode) -> None:
    """Length, instruction and image sizes."""
    say(f"episode {episode.episode_id}: {episode.length} frames, {episode.timestamps[-1]:.2f} s")
    say(wrapped(f"instruction {episode.instruction!r}"))
    say(wrapped(f"cameras {_cameras({v.name: (v.height, v.width) for v in episode.views}, ', ')}"))


def _span(numbers: Sequence[int]) -> str:
    return "" if not numbers else str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}–{numbers[-1]}"


def _numbers(values: np.ndarray) -> str:
    return " ".join(f"{v:.4g}" for v in values) if len(values) <= 9 else "…"


def statistics_table(title: str, fields: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row per field of a report's vector."""
    wide = _is_wide()
    numbers = ("mean", "std", "min", *(SHOWN_QUANTILES if wide else ("0.5",)), "max")
    heads = [*(["count"] if wide else []), *(f"q{n}" if n in SHOWN_QUANTILES else n for n in numbers)]
    fixed = (Column(name, no_wrap=True) for name in ("field", "unit"))
    table = simple_table(*fixed, *right_aligned(*heads), title=title, title_justify="left")
    for name, f in fields.items():
        cells = [f"{f.get(n, f['quantiles'].get(n)):.{4 if wide else 3}g}" for n in numbers]
        table.add_row(escape(name), f.get("unit", ""), *([str(f["count"])] if wide else []), *cells)
    return table


def show_report(report: Mapping[str, Any], out: Path | None, native: bool) -> None:
    """Tables of a report, the reasons of its quarantine, and the closing line."""
    for what in ("action", "state"):
        for part in ("unified", "native")[: 1 + native]:
            if part in report.get(what, {}):
                console.print(statistics_table(f"{what}, {part}", report[what][part]))
    lost = [q for d in report["datasets"] for q in d["quarantined"]]
    for q in lost[:SHOWN_REASONS]:
        errors.print(q["reason"], style="yellow", markup=False)
    if len(lost) > SHOWN_REASONS:
        where = f"all in {out}" if out else "--out writes all"
        errors.print(f"… {len(lost) - SHOWN_REASONS} more, {where}", style="yellow", markup=False)
    episodes, rows = (sum(d[k] for d in report["datasets"]) for k in ("episodes", "rows"))
    named = ", ".join(str(q["episode"]) for q in lost[:SHOWN_NUMBERS]) + (", …" if len(lost) > SHOWN_NUMBERS else "")
    what = out or ", ".join(d["name"] for d in report["datasets"])
    say(f"{what}: {rows} rows of {episodes} episodes, {len(lost)} quarantined" + (f" ({named})" if lost else ""))
