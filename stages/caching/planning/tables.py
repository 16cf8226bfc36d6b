"""Forecasts of a build in the terminal. A line fits in 80 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....common.console import console, say, table
from ....common.text import duration, size, wrapped
from .forecast import Forecast

if TYPE_CHECKING:
    from .cluster import ClusterForecast

BOTTLENECKS = {
    "decode": "decoding",
    "encode": "encoding",
    "write": "writing",
    "read": "reading",
    "start": "starting workers",
    "model": "the policy",
}


def bottleneck(part: str) -> str:
    """The part that takes longest, for people."""
    return f"bottleneck: {BOTTLENECKS.get(part, part)}"


def show_forecast(f: Forecast) -> None:
    """What `plan` measured and predicts."""
    m = f.measured
    rows = [
        (
            v.dataset,
            v.view,
            str(v.frames),
            str(v.observations),
            size(int(v.bytes / m.compression)),
            duration(v.decode_seconds),
        )
        for v in f.views
    ]
    console.print(table(("dataset", "view", "frames", "observations", "features", "decoding"), rows, drop=("frames",)))
    console.print(
        f"cache: {size(f.bytes)}, {size(f.free_bytes)} are free{'' if f.fits else ': it does not fit'}",
        style=None if f.fits else "red",
    )
    if f.features:
        say(wrapped(f"{f.features}: {f.tokens[0]} tokens of {f.tokens[1]} a view"))
    if f.prompt:
        say(f"  room for {f.prompt[1]} tokens after the image's; the longest prompt here has {f.prompt[0]}")
    if f.reads != "image":
        say(f"  another {'instruction' if f.reads == 'instruction' else f.reads} means encoding an episode again")
    packed = f", {m.compression:.2f}x compressed" if m.compression != 1 else ""
    say(f"  {f.observations} observations of {size(f.bytes_per_sample)} (all views){packed}")
    if f.quarantined:
        say(f"  {f.quarantined} episodes cannot be read and are left out")
    cost = "" if f.cost is None else f", {f.cost:.2f} USD"
    say(f"build: {duration(f.hours * 3600)}{cost}; {bottleneck(f.binds)}")
    parts = {"tables": "tables", "decode": "decoding", "encode": "encoding", "write": "writing"}
    say("  " + ", ".join(f"{word} {duration(f.seconds[part])}" for part, word in parts.items()))
    say(f"  {1 / m.encode:.1f} images/s encoded, {size(int(m.write))}/s written")
    say("relative RMS error of the stored features:")
    say(f"  storage {m.storing_error[0]:.2g} overall, {m.storing_error[1]:.2g} in the worst channel")
    if m.pooling_error is not None:
        say(f"  pooling {m.pooling_error:.2g}")
    if m.stride_change is not None:
        say(f"  frame stride {m.stride_change:.2g}: the change up to the last skipped frame")
    _show_training(f)


def _show_training(f: Forecast) -> None:
    """Stage two, or fine-tuning from a cache with a boundary."""
    m, speed = f.measured, f"{f.read_samples:.0f} samples/s"
    disk, memory = f"{size(int(m.read))}/s from disk", f"{size(int(m.read_warm))}/s from memory"
    where = f"from {'memory after the first epoch' if f.fits_in_memory else 'disk'}"
    if f.boundary is not None:
        say(f"fine-tuning: at most {speed}, reading {where}")
        say(f"  {disk}, {memory}")
        say(f"  each step runs {f.boundary} blocks of the VLM and the policy")
        return
    shared = "1 noise sample each" if f.draws == 1 else f"{f.draws} noise samples each"
    say(f"stage two: {f.train_samples:.0f} samples/s with {shared}; {bottleneck(f.train_binds)}")
    say(f"  reading {speed} {where}")
    if m.model is not None:
        say(f"  policy {m.model:.0f} samples/s")
    say(f"  {disk}, {memory}")
    if f.break_even_epoch is None:
        say("break-even: never, a live encoder is as fast")
    else:
        say(f"break-even: after epoch {f.break_even_epoch} the cache has cost less time than a live encoder")


def show_cluster(f: ClusterForecast) -> None:
    """What `plan --cluster` predicts."""
    b = f.build
    say(f"on {f.gpus} GPUs, {f.frames:,} frames: cache {size(f.bytes)}, {size(f.bytes_per_sample)} per sample")
    say(f"  build: {duration(b.seconds)}, {f.build_cost:,.0f} USD; {bottleneck(b.binds)}")
    say(f"    {b.shards:,} shards in {b.rounds:,} rounds {duration(b.work)}, tables {duration(b.tables)}")
    say(f"    writing {duration(b.write)} ({size(int(f.build_write))}/s into the store)")
    say(f"  stage two: {f.first_epoch:,.0f} samples/s; {bottleneck(f.train_binds)}")
    model = "" if f.model is None else f", the GPUs train {f.model:,.0f} samples/s"
    say(f"    {size(int(f.train_read))}/s from the store{model}")
    if f.later_epochs > f.first_epoch:
        say(f"    from the second epoch on {f.later_epochs:,.0f} samples/s")
    say(f"  an epoch: {duration(f.epoch_hours * 3600)}, {f.epoch_cost:,.0f} USD")
    say(f"  storage: {f.storage_cost:,.0f} USD a month")
