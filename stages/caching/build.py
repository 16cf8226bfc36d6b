"""`dvla cache build`: datasets → shards of features, unified actions and tables; resumable, with reproducible bytes.

A build writes into its cache folder. Once the cache is finished, `--append` and `--update` write the next generation
beside it and copy (or link) every feature whose images and encoder are the same. Then the two change places: OUT is the
new generation, and the old one stays as OUT.gen-1, OUT.gen-2, … until `dvla cache gc` removes it. D: feature width.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...cache.readers import Source
from ...cache.store.cache import Cache
from ...cache.store.codec import channel_scale, relative_error
from ...cache.store.plan import BuildPlan, ShardTask, Unit, units
from ...cache.store.writer import CacheWriter, require_place
from ...cache.vlm.encoder import VisionLanguageEncoder
from ...cache.vlm.pooling import pooling_error
from ...common.files import lock_folder
from ...common.progress import Progress
from ...common.signals import terminable
from ...errors import UserError
from .build_plan import decide, open_all
from .calibration import POOLING_IMAGES, pilot_features
from .config import BuildConfig, check_settings
from .generations import Earlier, exchange, finish_exchange, next_generation, require_intact, require_same_start
from .pipeline import Timing, run_unit
from .quarantine import TooManyQuarantined, require_few
from .sizes import require_room
from .sources import Corpus, located, make_tables
from .workers import run_with_workers


@dataclass
class BuildReport:
    """What happened. `seconds` are wall-clock of this call."""

    path: Path
    frames: int = 0
    bytes: int = 0
    resumed_shards: int = 0  # shards that were finished before
    adopted_shards: int = 0  # shards of the previous generation that are reused unchanged
    quarantined: int = 0  # episodes in quarantine.jsonl
    seconds: float = 0.0
    timing: Timing = field(default_factory=Timing)
    previous: Path | None = None  # where the previous generation is now
    error: tuple[float, float] | None = None  # relative error of 8-bit features: overall, worst channel (of the pilot)
    pooled: float | None = None  # relative error of pooling: the detail that pooled tokens lose (of the pilot)
    remarks: list[str] = field(default_factory=list)  # what to know about the datasets, one line each
    lost: tuple[str, ...] = ()  # datasets of which no episode could be read

    @property
    def complete_before(self) -> bool:
        """Whether nothing had to be encoded, copied or linked."""
        return not (self.timing.images or self.timing.reused or self.adopted_shards)

    @property
    def images_per_second(self) -> float:
        """Images encoded in a second of this call, loading included."""
        return self.timing.images / max(self.seconds, 1e-9)


class CameraProgress:
    """Progress of each camera: the images encoded, of those that this call encodes."""

    def __init__(self, work: Sequence[Unit], progress: Progress) -> None:
        self._progress, self._done, self._total = progress, Counter[str](), Counter[str]()
        for unit in work:
            self._total[self._name(unit)] += unit.records

    def show(self, unit: Unit, records: int) -> None:
        """`records` of a unit are made."""
        name = self._name(unit)
        self._progress(name, self._done[name] + records, self._total[name])

    def finish(self, unit: Unit) -> None:
        """All of a unit is committed."""
        self._done[self._name(unit)] += unit.records
        self.show(unit, 0)

    def _name(self, unit: Unit) -> str:
        """The dataset and its camera, or cameras that are encoded together; augmented variants are counted with it."""
        return f"{unit.dataset}/{'+'.join(dict.fromkeys(task.view for task in unit.tasks))}: images"


def build(
    config: BuildConfig, progress: Progress = lambda *_: None, say: Callable[[str], None] = lambda _: None
) -> BuildReport:
    """Build the cache, or resume one that was begun with the same settings. Corrupt episodes go to `quarantine.jsonl`.

    `UserError` for a missing source, a checkpoint that does not fit, a folder that holds something else, or a cache
    begun with other settings (the differing fields are named). `TooManyQuarantined`, with everything committed.
    """
    began = time.perf_counter()
    check_settings(config)
    report = BuildReport(config.out)
    with terminable() as check, contextlib.ExitStack() as stack:

        def checked(name: str, done: int, total: int) -> None:
            check()
            progress(name, done, total)

        finish_exchange(config.out)
        earlier = None
        if config.mode == "new":
            require_place(config.out)  # before the VLM loads
        else:
            Cache.open(config.out)  # reports what is wrong before there is anything to lock
            held = stack.enter_context(lock_folder(config.out))
            earlier = Cache.open(config.out)
        sources, encoder = open_all(config, earlier, say)
        found = decide(config, sources, encoder, earlier, checked)
        report.remarks = [line for corpus in found.corpora.values() for line in corpus.remarks()]
        plan, reused, target = found.plan, found.reused, config.out
        if earlier is not None and found.unchanged:
            held.close()
        elif earlier is not None:
            target = next_generation(config.out)
            require_intact(earlier)
            require_same_start(target, {**found.fingerprint, "store": plan.document()})
        begun = CacheWriter(target, plan, None)
        if not (config.allow_quarantine or begun.complete):
            _warn(config, plan, say)
        todo, _ = _split(begun.missing(), found.corpora, plan, reused)
        require_room(plan, target, todo, begun.tables_missing())
        writer = stack.enter_context(CacheWriter.create_or_resume(target, found.fingerprint, plan))
        manifest = _fill(config, writer, encoder, found.corpora, reused, report, checked)
        if target != config.out:
            report.previous = exchange(config.out)
    report.frames, report.bytes = manifest["frames"], manifest["bytes"]
    report.lost = tuple(d.name for d in Cache.open(config.out).datasets if d.quarantined.all())
    report.quarantined, report.seconds = manifest["quarantine_count"], time.perf_counter() - began
    return report


def _warn(config: BuildConfig, plan: BuildPlan, say: Callable[[str], None]) -> None:
    """Say before any image is encoded that the build will not finish: of some episodes the tables suffice to see it."""
    try:
        require_few(config.out, plan, {d.name: set(d.quarantined) for d in plan.datasets}, config.max_quarantine)
    except TooManyQuarantined as error:
        for line in (
            "this build will not finish without --allow-quarantine, for lack of usable episodes:",
            *error.reasons,
        ):
            say(line)


def _split(
    missing: Sequence[ShardTask], corpora: Mapping[str, Corpus], plan: BuildPlan, reused: Earlier
) -> tuple[list[ShardTask], list[ShardTask]]:
    """(shards to make, shards that the previous generation has as they are)."""
    whole = {task for task in missing if reused.whole(task, corpora[task.dataset].plan, plan)}
    return [task for task in missing if task not in whole], [task for task in missing if task in whole]


def _fill(
    config: BuildConfig,
    writer: CacheWriter,
    encoder: VisionLanguageEncoder,
    corpora: dict[str, Corpus],
    reused: Earlier,
    report: BuildReport,
    progress: Progress,
) -> dict[str, Any]:
    """Write whatever is missing, note it in `report`, and finish; returns the manifest."""
    missing = writer.missing()
    channels = _calibrate(config, writer, encoder, list(corpora.values()), reused, report, bool(missing))
    for name in writer.tables_missing():
        writer.write_tables(name, make_tables(corpora[name], encoder))
    report.resumed_shards = len(writer.plan.tasks()) - len(missing)
    todo, adopted = _split(missing, corpora, writer.plan, reused)
    for task in adopted:
        assert reused.path is not None  # it has the shard
        writer.adopt(task, reused.path)
    report.adopted_shards = len(adopted)
    work = units(todo, encoder.by_observation)
    shown, sources = CameraProgress(work, progress), {name: c.source for name, c in corpora.items()}
    if config.workers.active and work:
        spec, opened = located(encoder.spec), list(sources.values())
        finished = run_with_workers(config, spec, opened, writer.path, work, channels, reused.path)
    else:
        finished = run_here(writer, work, sources, encoder, config.batch_size, channels, reused, shown)
    with contextlib.closing(finished):
        for unit, timing in finished:
            report.timing.add(timing)
            shown.finish(unit)
    if not (config.allow_quarantine or writer.complete):
        require_few(writer.path, writer.plan, writer.quarantined(), config.max_quarantine)
    return writer.finish()


def _calibrate(
    config: BuildConfig,
    writer: CacheWriter,
    encoder: VisionLanguageEncoder,
    corpora: Sequence[Corpus],
    reused: Earlier,
    report: BuildReport,
    missing: bool,
) -> np.ndarray | None:
    """The channel scales of an 8-bit cache, float32 [D]; the errors of quantization and pooling go to `report`.

    `missing`: whether there are shards to write.
    """
    plan = writer.plan
    pilot = pilot_features(corpora, plan, encoder) if config.format.quantized and missing else None
    if encoder.pools and missing:
        full = encoder.unpooled()
        few = full.of_image(pilot_features(corpora, plan, full, POOLING_IMAGES))
        report.pooled = pooling_error(few, encoder.image_tokens)

    def measured() -> np.ndarray:
        if reused.channels is not None:
            return reused.channels
        if pilot is None:  # scales are stored before any shard: where they are missing, so are all shards
            raise UserError(f"run `dvla cache repair {writer.path}` first: its channel scales are damaged")
        return channel_scale(pilot)

    channels = writer.channel_scale(measured)
    if pilot is not None and channels is not None:
        report.error = relative_error(pilot, config.format, channels)
    return channels


def run_here(
    writer: CacheWriter,
    work: Sequence[Unit],
    sources: Mapping[str, Source],
    encoder: VisionLanguageEncoder,
    batch_size: int,
    channels: np.ndarray | None,
    reused: Earlier,
    shown: CameraProgress,
) -> Generator[tuple[Unit, Timing], None, None]:
    """(unit, timing) of each as its shards are committed, one after the other in this process."""
    for unit in work:
        made = functools.partial(shown.show, unit)
        source = sources[unit.dataset]
        yield unit, run_unit(writer, unit, source, encoder, batch_size, channels, reused, made)
