"""`dvla cache build`: corpus → shards of features, unified actions and tables. Resumable; the bytes depend only on the inputs.

A build writes into its cache folder. Once that is finished, `--append` and `--update` write the next generation beside it, copying
(or linking) every feature whose pictures and encoder are the same, and then change places: OUT is the new generation, the old one
is OUT.gen-1, OUT.gen-2, … until `dvla cache gc` is asked to remove it. Letters: K tokens, D width.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...cache.store.cache import Cache
from ...cache.store.codec import channel_scale, relative_error
from ...cache.store.plan import Unit, units
from ...cache.store.writer import CacheWriter
from ...cache.vlm.encoder import VisionLanguageEncoder
from ...cache.vlm.load import load_encoder
from ...cache.vlm.pooling import pooling_error
from ...common.device import pick_device
from ...common.files import lock_folder
from ...common.signals import terminable
from .build_plan import decide
from .calibration import POOLING_PICTURES, pilot_features
from .config import BuildConfig, check_settings
from .generations import (
    Earlier,
    exchange,
    finish_exchange,
    next_generation,
    require_same_start,
    require_whole,
)
from .pipeline import Timing, run_unit
from .sizes import require_room
from .sources import Corpus, Progress, located, make_tables, open_sources, sources_to_append
from .workers import run_with_workers


@dataclass
class BuildReport:
    """What happened. `seconds` are wall-clock of this call."""

    path: Path
    frames: int = 0
    bytes: int = 0
    resumed_shards: int = 0  # shards found finished
    adopted_shards: int = 0  # shards taken whole from the earlier generation
    quarantined: int = 0  # episodes in quarantine.jsonl
    seconds: float = 0.0
    timing: Timing = field(default_factory=Timing)
    previous: Path | None = None  # where the earlier generation is now
    error: tuple[float, float] | None = (
        None  # relative error of storing 8-bit features: over all, worst channel (of the pilot)
    )
    pooled: float | None = None  # relative error of pooling: what the pooled tokens cannot tell (of the pilot)


def build(config: BuildConfig, progress: Progress = lambda *_: None) -> BuildReport:
    """Build the cache, or finish one that was begun with the same settings. Corrupt episodes go to `quarantine.jsonl`.

    `UserError` for a missing source, a checkpoint that does not fit, a folder that holds something else, or a cache
    begun with other settings (the differing fields are named).
    """
    began = time.perf_counter()
    check_settings(config)
    device = pick_device(config.device)
    report = BuildReport(config.out)
    with terminable() as check, contextlib.ExitStack() as stack:

        def told(name: str, done: int, total: int) -> None:
            check()
            progress(name, done, total)

        finish_exchange(config.out)
        earlier = None
        if config.mode != "new":
            Cache.open(config.out)  # says what is wrong before there is anything to lock
            held = stack.enter_context(lock_folder(config.out))
            earlier = Cache.open(config.out)
        sources = open_sources(config.sources, config.dataset_config, config.views)
        if earlier is not None and config.mode == "append":
            sources = sources_to_append(earlier, sources)
        encoder = load_encoder(config.encoder, device)
        found = decide(config, sources, encoder, earlier, told)
        plan, reused, target = found.plan, found.reused, config.out
        if earlier is not None and found.unchanged:
            held.close()
        elif earlier is not None:
            target = next_generation(config.out)
            require_whole(earlier)
            require_same_start(target, {**found.fingerprint, "store": plan.document()})
        begun = CacheWriter(target, plan, None)
        require_room(
            plan,
            target,
            [t for t in begun.missing() if not reused.whole(t, found.corpora[t.dataset].plan, plan)],
            begun.tables_missing(),
        )
        writer = stack.enter_context(CacheWriter.create_or_resume(target, found.fingerprint, plan))
        manifest = _fill(config, writer, encoder, found.corpora, reused, report, told)
        if target != config.out:
            report.previous = exchange(config.out)
    report.frames, report.bytes = manifest["frames"], manifest["bytes"]
    report.quarantined, report.seconds = manifest["quarantine_count"], time.perf_counter() - began
    return report


def _fill(
    config: BuildConfig,
    writer: CacheWriter,
    encoder: VisionLanguageEncoder,
    corpora: dict[str, Corpus],
    reused: Earlier,
    report: BuildReport,
    progress: Progress,
) -> dict[str, Any]:
    """Write whatever is missing, tell `report`, and finish; returns the manifest."""
    plan, missing = writer.plan, writer.missing()
    pilot = pilot_features(list(corpora.values()), plan, encoder) if config.format.quantised and missing else None
    if encoder.tokens < encoder.native_tokens and missing:
        report.pooled = pooling_error(
            pilot_features(list(corpora.values()), plan, encoder.unpooled(), POOLING_PICTURES), encoder.tokens
        )

    def measured() -> np.ndarray:
        if reused.channels is not None:
            return reused.channels
        assert pilot is not None  # scales are stored before any shard: where they are missing, all shards are
        return channel_scale(pilot)

    channels = writer.channel_scale(measured)
    if pilot is not None and channels is not None:
        report.error = relative_error(pilot, config.format, channels)
    for name in writer.tables_missing():
        writer.write_tables(name, make_tables(corpora[name], encoder))
    report.resumed_shards = len(plan.tasks()) - len(missing)
    todo = []
    for task in missing:
        if reused.path is not None and reused.whole(task, corpora[task.dataset].plan, plan):
            writer.adopt(task, reused.path)
            report.adopted_shards += 1
        else:
            todo.append(task)
    work, done = units(todo, encoder.by_observation), 0
    total = sum(unit.records for unit in work)

    def shown(unit: Unit, records: int) -> None:
        progress(unit.name, done + records, total)

    def here() -> Generator[tuple[Unit, Timing], None, None]:
        for unit in work:
            yield (
                unit,
                run_unit(
                    writer,
                    unit,
                    corpora[unit.dataset].source,
                    encoder,
                    config.batch_size,
                    channels,
                    reused,
                    functools.partial(shown, unit),
                ),
            )

    sources = [c.source for c in corpora.values()]
    elsewhere = config.workers.active and work
    finished = (
        run_with_workers(config, located(encoder.spec), sources, writer.path, work, channels, reused.path)
        if elsewhere
        else here()
    )
    with contextlib.closing(finished):
        for unit, timing in finished:
            report.timing.add(timing)
            done += unit.records
            shown(unit, 0)
    return writer.finish()
