"""Forecasts of a build as console tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from ....common.console import console, right_aligned, simple_table
from ....common.text import duration, size
from .forecast import Forecast

if TYPE_CHECKING:
    from .cluster import ClusterForecast


def show_forecast(f: Forecast) -> None:
    """What `plan` found, and what it means."""
    m, table = (
        f.measured,
        simple_table("dataset", "view", *right_aligned("frames", "observations", "features", "decode")),
    )
    for v in f.views:
        table.add_row(
            escape(v.dataset),
            escape(v.view),
            str(v.frames),
            str(v.observations),
            size(int(v.bytes / m.compression)),
            duration(v.decode_seconds),
        )
    console.print(table)
    note = f", {m.compression:.2f} × compressed" if m.compression != 1 else ""
    console.print(
        f"cache: {f.observations} observations, {size(f.bytes_per_sample)} each (all views){note}, {size(f.bytes)} in all; "
        f"{size(f.free_bytes)} are free{'' if f.fits else ': it does not fit'}",
        style=None if f.fits else "red",
    )
    if f.quarantined:
        console.print(f"{f.quarantined} episodes cannot be read and are left out")
    cost = "" if f.cost is None else f", {f.cost:.2f} USD"
    console.print(
        f"build: {duration(f.hours * 3600)}{cost}; tables {duration(f.seconds['tables'])}, decode {duration(f.seconds['decode'])}, encode "
        f"{duration(f.seconds['encode'])} ({1 / m.encode:.1f} pictures/s), write {duration(f.seconds['write'])} ({size(int(m.write))}/s); "
        f"{f.binds} binds"
    )
    lost = [f"storing {m.storing_error[0]:.2g} over all, {m.storing_error[1]:.2g} in the worst channel"]
    lost += [f"pooling {m.pooling_error:.2g}"] if m.pooling_error is not None else []
    lost += [f"stride: the last skipped frame differs by {m.stride_change:.2g}"] if m.stride_change is not None else []
    console.print(f"relative error (RMS, of the features'): {'; '.join(lost)}")
    where = "from memory after the first epoch" if f.fits_in_memory else "from the disk"
    if f.boundary is not None:
        console.print(
            f"fine-tuning: at most {f.read_samples:.0f} samples/s by reading {where} ({size(int(m.read))}/s from the disk, "
            f"{size(int(m.read_warm))}/s from memory); {f.boundary} of the VLM's blocks and the policy run at each step"
        )
        return
    model = "" if m.model is None else f", {m.model:.0f} by the model"
    console.print(
        f"stage two: {f.train_samples:.0f} samples/s, each shared by {f.draws} draws ({f.read_samples:.0f} by reading {where}: "
        f"{size(int(m.read))}/s from the disk, {size(int(m.read_warm))}/s from memory{model}); {f.train_binds} binds"
    )
    console.print(
        "break-even: never, a live encoder is as fast"
        if f.break_even_epoch is None
        else f"break-even: after epoch {f.break_even_epoch} the cache has cost less time than a live encoder"
    )


def show_cluster(f: ClusterForecast) -> None:
    """What `plan --cluster` found."""
    b = f.build
    console.print(
        f"on {f.gpus} GPUs, {f.frames:,} frames: cache {size(f.bytes)}, {size(f.bytes_per_sample)} a sample",
        highlight=False,
    )
    console.print(
        f"  build: {duration(b.seconds)}, {f.build_cost:,.0f} USD; {b.shards:,} shards in {b.rounds:,} rounds {duration(b.work)}, tables {duration(b.tables)}, "
        f"writing {duration(b.write)} ({size(int(f.build_write))}/s into the store); {b.binds} binds",
        highlight=False,
    )
    model = "" if f.model is None else f" of {f.model:,.0f} that the GPUs train"
    console.print(
        f"  stage two: {f.first_epoch:,.0f} samples/s{model}, {size(int(f.train_read))}/s from the store; {f.train_binds} binds"
        + (f"; from the second epoch on {f.later_epochs:,.0f}" if f.later_epochs > f.first_epoch else ""),
        highlight=False,
    )
    console.print(
        f"  an epoch: {duration(f.epoch_hours * 3600)}, {f.epoch_cost:,.0f} USD; keeping the cache: {f.storage_cost:,.0f} USD a month",
        highlight=False,
    )
