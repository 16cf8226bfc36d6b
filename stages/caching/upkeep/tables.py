"""`dvla cache status`, `inspect`, `diff` and `gc` in the terminal. A line fits in 80 columns, its path apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....common.console import console, say, table
from ....common.text import size, wrapped

if TYPE_CHECKING:
    from .diff import CacheDiff
    from .garbage import Garbage
    from .inspect import CacheFacts, DatasetFacts
    from .status import CacheStatus


SHOWN_INSTRUCTIONS = 5
SHOWN_LINES = 20


def show_status(found: Sequence[CacheStatus]) -> None:
    """The state of each cache, and a table of its arrays."""
    for s in found:
        done, total = s.shards
        state = "finished" if s.finished else "unfinished"
        state += ", being built now" if s.building else ""
        planned = "" if s.finished else f" of {size(s.planned_bytes)}"
        leftovers = f", {s.leftovers} temporary files" if s.leftovers else ""
        say(f"{s.path}: {state}, {done} of {total} shards, {size(s.bytes)}{planned}")
        say(f"  {s.frames} frames, {s.episodes} episodes, {s.quarantined} quarantined{leftovers}")
        console.print(wrapped(_pairs(s.fingerprint)), markup=False, style="dim")
        rows = [
            (
                a.dataset,
                a.array,
                f"{a.done}/{a.shards}",
                size(a.bytes),
                "missing" if a.dataset in s.tables_missing else "done",
            )
            for a in s.arrays
        ]
        console.print(table(("dataset", "array", "shards", "bytes", "tables"), rows))


def _pairs(values: Mapping[str, Any]) -> str:
    """`name value, …`: names without underscores, and no value where a setting has none."""
    shown = {name.replace("_", " "): value for name, value in values.items() if value not in (None, [], "")}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def show_facts(f: CacheFacts) -> None:
    """The settings, the fingerprint and the datasets of a finished cache."""
    say(f"{f.path}: {size(f.bytes)} in {f.files} files")
    for title, values in (("encoder", f.encoder), ("fingerprint", f.fingerprint)):
        say(f"{title}:\n{wrapped(_pairs(values))}")
    for d in f.datasets:
        _show_dataset(d)


def _show_dataset(d: DatasetFacts) -> None:
    low, middle, high = d.lengths
    say(f"\n{d.name}: {d.embodiment}, {d.control_hz:g} Hz")
    say(wrapped(f"views: {', '.join(d.views)}"))
    say(f"  {d.episodes} episodes of {low} to {high} frames (median {middle}), {d.quarantined} quarantined")
    say(f"  {d.frames} frames, {d.observations} observations")
    if d.source:
        say(f"  from {d.source}{f', {d.selection}' if d.selection else ''}")
    texts = [f"“{text}” ({count})" for text, count in d.instructions[:SHOWN_INSTRUCTIONS]]
    more = f", {len(d.instructions) - SHOWN_INSTRUCTIONS} more" if len(d.instructions) > SHOWN_INSTRUCTIONS else ""
    say(wrapped(f"instructions ({len(d.instructions)}): {', '.join(texts)}{more}"))
    rows = [
        ("" if i else kind, str(r.slot), r.name, *(f"{value:.4g}" for value in (r.mean, r.std, r.min, r.max)))
        for kind, slots in (("action", d.action), ("proprio", d.proprio))
        for i, r in enumerate(slots)
    ]
    console.print(table(("", "slot", "name", "mean", "std", "min", "max"), rows))


def show_ranges(ranges: dict[Path, tuple[float, float]]) -> None:
    """The images written, and what their dark and bright ends mean."""
    for file, (low, high) in ranges.items():
        say(f"{file}: token norms, dark {low:.4g} to bright {high:.4g}")


def show_diff(d: CacheDiff) -> None:
    """Every difference, then what was compared."""
    for lines in (d.fingerprint, d.only):
        for line in lines[:SHOWN_LINES]:
            say(line)
        if len(lines) > SHOWN_LINES:
            say(f"… {len(lines) - SHOWN_LINES} more")
    if d.arrays:
        rows = []
        for a in d.arrays:
            relative = "different shape" if a.relative is None else "0" if a.equal else f"{a.relative:.2g}"
            rows.append((a.dataset, a.array, str(a.compared), "equal" if a.equal else "differs", relative))
        console.print(table(("dataset", "array", "compared", "", "difference"), rows))
    for drift in d.drifts if not d.same else ():
        say(f"feature drift of {drift.dataset}, {drift.frames} frames:")
        say(f"  relative RMS {drift.relative:.3g}, cosine {drift.cosine:.5f}")
    if d.same:
        say("the caches are equal: all features and tables have the same checksums")
    elif not d.same_files and not d.fingerprint and not d.only and all(a.equal for a in d.arrays):
        say("everything compared is equal, but some checksums differ; raise --samples")


def show_garbage(items: Sequence[Garbage]) -> None:
    """One row per thing that can be removed."""
    rows = [(str(g.path), g.kind, size(g.bytes), size(g.frees)) for g in items]
    console.print(table(("path", "what", "size", "frees"), rows))
