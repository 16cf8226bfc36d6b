"""Tables and lines of `dvla cache plan`, `status`, `inspect`, `diff` and `gc`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Column

from ....common.console import console, right_aligned, simple_table
from ....common.text import size

if TYPE_CHECKING:
    from .diff import CacheDiff
    from .garbage import Garbage
    from .inspect import CacheFacts, DatasetFacts, SlotRow
    from .status import CacheStatus


SHOWN_INSTRUCTIONS = 5
SHOWN_LINES = 20


def show_status(found: Sequence[CacheStatus]) -> None:
    """One table per unfinished or damaged cache, a line for each finished one."""
    for s in found:
        done, total = s.shards
        state = "finished" if s.finished else "unfinished"
        state += ", being built now" if s.building else ""
        planned = "" if s.finished else f" of {size(s.planned_bytes)}"
        leftovers = f", {s.leftovers} temporary files" if s.leftovers else ""
        console.print(
            f"{s.path}: {state}, {done} of {total} shards, {size(s.bytes)}{planned}, {s.frames} frames, {s.episodes} episodes, "
            f"{s.quarantined} in quarantine{leftovers}",
            markup=False,
        )
        console.print("  " + ", ".join(f"{k} {v}" for k, v in s.fingerprint.items()), markup=False, style="dim")
        table = simple_table("dataset", "array", *right_aligned("shards", "bytes"), "tables")
        for a in s.arrays:
            table.add_row(
                escape(a.dataset),
                escape(a.array),
                f"{a.done}/{a.shards}",
                size(a.bytes),
                "missing" if a.dataset in s.tables_missing else "done",
            )
        console.print(table)


def show_facts(f: CacheFacts) -> None:
    """The spec, the fingerprint and the tables of a finished cache."""
    console.print(f"{f.path}: {size(f.bytes)} in {f.files} files", markup=False)
    for title, values in (("encoder", f.encoder), ("fingerprint", f.fingerprint)):
        console.print(f"{title}: " + ", ".join(f"{k} {v}" for k, v in values.items()), markup=False)
    for d in f.datasets:
        _show_dataset(d)


def _show_dataset(d: DatasetFacts) -> None:
    low, middle, high = d.lengths
    source = f"; from {d.source}" if d.source else ""
    console.print(
        f"\n{d.name}: {d.embodiment}, {d.control_hz:g} Hz, views {', '.join(d.views)}; {d.episodes} episodes of {low} to {high} frames "
        f"(median {middle}), {d.quarantined} in quarantine; {d.frames} frames, {d.observations} observations{source}",
        markup=False,
    )
    texts = [f"“{text}” ({count})" for text, count in d.instructions[:SHOWN_INSTRUCTIONS]]
    more = f", {len(d.instructions) - SHOWN_INSTRUCTIONS} more" if len(d.instructions) > SHOWN_INSTRUCTIONS else ""
    console.print(f"{len(d.instructions)} instructions: {', '.join(texts)}{more}", markup=False)
    table = simple_table("", *right_aligned("slot"), "name", *right_aligned("mean", "std", "min", "max"))
    for kind, rows in (("action", d.action), ("proprio", d.proprio)):
        for i, row in enumerate(rows):
            table.add_row("" if i else kind, *_slot(row))
    console.print(table)


def _slot(row: SlotRow) -> list[str]:
    return [str(row.slot), row.name, *(f"{value:.4g}" for value in (row.mean, row.std, row.min, row.max))]


def show_ranges(ranges: dict[Path, tuple[float, float]]) -> None:
    """The pictures written, and what their dark and bright ends mean."""
    for file, (low, high) in ranges.items():
        console.print(f"{file}: token norms, dark {low:.4g} to bright {high:.4g}", markup=False)


def show_diff(d: CacheDiff) -> None:
    """Every difference, then what was compared."""
    for lines in (d.fingerprint, d.only):
        for line in lines[:SHOWN_LINES]:
            console.print(line, markup=False)
        if len(lines) > SHOWN_LINES:
            console.print(f"… {len(lines) - SHOWN_LINES} more")
    if d.arrays:
        table = simple_table("dataset", "array", *right_aligned("compared"), "", *right_aligned("relative difference"))
        for a in d.arrays:
            relative = "other shape" if a.relative is None else "0" if a.equal else f"{a.relative:.2g}"
            table.add_row(
                escape(a.dataset), escape(a.array), str(a.compared), "equal" if a.equal else "differs", relative
            )
        console.print(table)
    for drift in d.drifts if not d.same else ():
        console.print(
            f"feature drift of {drift.dataset}, {drift.frames} frames: relative RMS {drift.relative:.3g}, cosine {drift.cosine:.5f}",
            markup=False,
        )
    if d.same:
        console.print("the caches are equal: features and tables were written with the same checksums")
    elif not d.same_files and not d.fingerprint and not d.only and all(a.equal for a in d.arrays):
        console.print(
            "what was compared is equal, but some files were written with other checksums; give more --samples to find where"
        )


def show_garbage(items: Sequence[Garbage]) -> None:
    """One row per thing that can go."""
    table = simple_table(Column("path", overflow="fold"), "what", *right_aligned("size", "frees"))
    for g in items:
        table.add_row(escape(str(g.path)), g.kind, size(g.bytes), size(g.frees))
    console.print(table)
