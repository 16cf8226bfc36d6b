"""Tables and lines of `dvla cache plan`, `status`, `inspect`, `diff` and `gc`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Column, Table

from ..errors import UserError
from .console import console, duration, size

if TYPE_CHECKING:
    from .cache_content import CacheDiff, CacheFacts, DatasetFacts, SlotRow
    from .cache_tools import CacheStatus, Garbage
    from .cluster_plan import ClusterForecast
from .plan import Forecast

SHOWN_INSTRUCTIONS = 5
SHOWN_LINES = 20


def _table(*columns: str | Column) -> Table:
    return Table(*columns, box=SIMPLE_HEAD)


def show_forecast(f: Forecast) -> None:
    """What `plan` found, and what it means."""
    m, table = f.measured, _table("dataset", "view", *_right("frames", "observations", "features", "decode"))
    for v in f.views:
        table.add_row(escape(v.dataset), escape(v.view), str(v.frames), str(v.observations), size(int(v.bytes / m.compression)),
                      duration(v.decode_seconds))
    console.print(table)
    note = f", {m.compression:.2f} × compressed" if m.compression != 1 else ""
    console.print(f"cache: {f.observations} observations, {size(f.bytes_per_sample)} each (all views){note}, {size(f.bytes)} in all; "
                  f"{size(f.free_bytes)} are free{'' if f.fits else ': it does not fit'}", style=None if f.fits else "red")
    if f.quarantined:
        console.print(f"{f.quarantined} episodes cannot be read and are left out")
    cost = "" if f.cost is None else f", {f.cost:.2f} USD"
    console.print(f"build: {duration(f.hours * 3600)}{cost}; tables {duration(f.seconds['tables'])}, decode {duration(f.seconds['decode'])}, encode "
                  f"{duration(f.seconds['encode'])} ({1 / m.encode:.1f} pictures/s), write {duration(f.seconds['write'])} ({size(int(m.write))}/s); "
                  f"{f.binds} binds")
    lost = [f"storing {m.storing_error[0]:.2g} over all, {m.storing_error[1]:.2g} in the worst channel"]
    lost += [f"pooling {m.pooling_error:.2g}"] if m.pooling_error is not None else []
    lost += [f"stride: the last skipped frame differs by {m.stride_change:.2g}"] if m.stride_change is not None else []
    console.print(f"relative error (RMS, of the features'): {'; '.join(lost)}")
    where = "from memory after the first epoch" if f.fits_in_memory else "from the disk"
    if f.boundary is not None:
        console.print(f"fine-tuning: at most {f.read_samples:.0f} samples/s by reading {where} ({size(int(m.read))}/s from the disk, "
                      f"{size(int(m.read_warm))}/s from memory); {f.boundary} of the VLM's blocks and the policy run at each step")
        return
    model = "" if m.model is None else f", {m.model:.0f} by the model"
    console.print(f"stage two: {f.train_samples:.0f} samples/s, each shared by {f.draws} draws ({f.read_samples:.0f} by reading {where}: "
                  f"{size(int(m.read))}/s from the disk, {size(int(m.read_warm))}/s from memory{model}); {f.train_binds} binds")
    console.print("break-even: never, a live encoder is as fast" if f.break_even_epoch is None else
                  f"break-even: after epoch {f.break_even_epoch} the cache has cost less time than a live encoder")


def show_cluster(f: ClusterForecast) -> None:
    """What `plan --cluster` found."""
    b = f.build
    console.print(f"on {f.gpus} GPUs, {f.frames:,} frames: cache {size(f.bytes)}, {size(f.bytes_per_sample)} a sample", highlight=False)
    console.print(f"  build: {duration(b.seconds)}, {f.build_cost:,.0f} USD; {b.shards:,} shards in {b.rounds:,} rounds {duration(b.work)}, tables {duration(b.tables)}, "
                  f"writing {duration(b.write)} ({size(int(f.build_write))}/s into the store); {b.binds} binds", highlight=False)
    model = "" if f.model is None else f" of {f.model:,.0f} that the GPUs train"
    console.print(f"  stage two: {f.first_epoch:,.0f} samples/s{model}, {size(int(f.train_read))}/s from the store; {f.train_binds} binds"
                  + (f"; from the second epoch on {f.later_epochs:,.0f}" if f.later_epochs > f.first_epoch else ""), highlight=False)
    console.print(f"  an epoch: {duration(f.epoch_hours * 3600)}, {f.epoch_cost:,.0f} USD; keeping the cache: {f.storage_cost:,.0f} USD a month", highlight=False)


def show_status(found: Sequence[CacheStatus]) -> None:
    """One table per unfinished or damaged cache, a line for each finished one."""
    for s in found:
        done, total = s.shards
        state = "finished" if s.finished else "unfinished"
        state += ", being built now" if s.building else ""
        planned = "" if s.finished else f" of {size(s.planned_bytes)}"
        leftovers = f", {s.leftovers} temporary files" if s.leftovers else ""
        console.print(f"{s.path}: {state}, {done} of {total} shards, {size(s.bytes)}{planned}, {s.frames} frames, {s.episodes} episodes, "
                      f"{s.quarantined} in quarantine{leftovers}", markup=False)
        console.print("  " + ", ".join(f"{k} {v}" for k, v in s.fingerprint.items()), markup=False, style="dim")
        table = _table("dataset", "array", *_right("shards", "bytes"), "tables")
        for a in s.arrays:
            table.add_row(escape(a.dataset), escape(a.array), f"{a.done}/{a.shards}", size(a.bytes),
                          "missing" if a.dataset in s.tables_missing else "done")
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
    console.print(f"\n{d.name}: {d.embodiment}, {d.control_hz:g} Hz, views {', '.join(d.views)}; {d.episodes} episodes of {low} to {high} frames "
                  f"(median {middle}), {d.quarantined} in quarantine; {d.frames} frames, {d.observations} observations{source}", markup=False)
    texts = [f"“{text}” ({count})" for text, count in d.instructions[:SHOWN_INSTRUCTIONS]]
    more = f", {len(d.instructions) - SHOWN_INSTRUCTIONS} more" if len(d.instructions) > SHOWN_INSTRUCTIONS else ""
    console.print(f"{len(d.instructions)} instructions: {', '.join(texts)}{more}", markup=False)
    table = _table("", *_right("slot"), "name", *_right("mean", "std", "min", "max"))
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
        table = _table("dataset", "array", *_right("compared"), "", *_right("relative difference"))
        for a in d.arrays:
            relative = "other shape" if a.relative is None else "0" if a.equal else f"{a.relative:.2g}"
            table.add_row(escape(a.dataset), escape(a.array), str(a.compared), "equal" if a.equal else "differs", relative)
        console.print(table)
    for drift in d.drifts if not d.same else ():
        console.print(f"feature drift of {drift.dataset}, {drift.frames} frames: relative RMS {drift.relative:.3g}, cosine {drift.cosine:.5f}", markup=False)
    if d.same:
        console.print("the caches are equal: features and tables were written with the same checksums")
    elif not d.same_files and not d.fingerprint and not d.only and all(a.equal for a in d.arrays):
        console.print("what was compared is equal, but some files were written with other checksums; give more --samples to find where")


def show_garbage(items: Sequence[Garbage]) -> None:
    """One row per thing that can go."""
    table = _table(Column("path", overflow="fold"), "what", *_right("size", "frees"))
    for g in items:
        table.add_row(escape(str(g.path)), g.kind, size(g.bytes), size(g.frees))
    console.print(table)


def _right(*names: str) -> list[Column]:
    return [Column(name, justify="right") for name in names]


def write_json(file: Path | None, values: Any) -> None:
    """The dataclass `values`, a list of such, or a mapping, as JSON for scripts; nothing when no file was asked for. `UserError` where it cannot go."""
    if file is None:
        return
    listed = values if isinstance(values, dict) else [dataclasses.asdict(v) for v in values] if isinstance(values, list) else dataclasses.asdict(values)
    try:
        file.write_text(json.dumps(listed, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}; give another --json") from None
