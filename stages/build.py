"""`dvla cache build`: corpus → shards of features, unified actions and tables. Resumable; the bytes depend only on the inputs.

A build writes into its cache folder. Once that is finished, `--append` and `--update` write the next generation beside it, copying
(or linking) every feature whose pictures and encoder are the same, and then change places: OUT is the new generation, the old one
is OUT.gen-1, OUT.gen-2, … until `dvla cache gc` is asked to remove it. Letters: K tokens, D width.
"""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..cache import fingerprint as fp
from ..cache.actions import ACTION_SCHEMA_VERSION
from ..cache.augment import AUGMENTATION_VERSION
from ..cache.codec import FeatureFormat, channel_scale, pooling_error, relative_error
from ..cache.encoder import EncoderSpec, VisionLanguageEncoder, load_encoder
from ..cache.episode import CorruptEpisode
from ..cache.guard import lock_folder
from ..cache.layout import BuildPlan, DatasetPlan, Unit, units
from ..cache.readers import Source
from ..cache.store import Cache
from ..cache.writer import CacheWriter
from ..errors import UserError
from .corpus import Corpus, Progress, located, make_tables, open_sources, read_corpus, sources_to_append
from .generations import (Earlier, exchange, finish_exchange, next_generation, require_only_new, require_same_start, require_whole,
                          same_features)
from .interrupts import terminable
from .plan import require_room
from .shard_job import Timing, run_unit
from .workers import WorkerSpec, run_with_workers

TRANSFORM_VERSION = 2       # raised when the build writes other content from the same inputs
SHARD_NBYTES = 256 << 20    # default size of a shard: large enough to stream, small enough to redo
SHARD_ROWS = 1 << 14        # and at most so many records, however small: each costs 16 bytes of index, in the last shard too
PILOT_PICTURES = 64         # looked at for the channel scales of an 8-bit cache, about
POOLING_PICTURES = 8        # and to tell what pooling loses


@dataclass(frozen=True)
class BuildConfig:
    """What `dvla cache build` needs."""

    sources: tuple[str, ...]            # dataset folders or hub ids
    encoder: EncoderSpec                # which VLM, at which resolution, how many tokens
    out: Path                           # cache folder
    batch_size: int = 64                # pictures per encoder call (all views, where these are encoded together); part of the fingerprint
                                        # (it changes the last bits)
    shard_frames: int | None = None     # observations per shard file; None = about 256 MiB
    device: str = "auto"                # auto, cpu, cuda
    dataset_config: str | None = None   # YAML of the field map when none of the shipped ones fits
    format: FeatureFormat = field(default_factory=FeatureFormat)    # 16 or 8 bit, compressed or not
    frame_stride: int = 1               # features of every n-th frame; actions and proprio of all
    views: tuple[str, ...] = ()         # cameras to encode; () = all
    augment: int = 0                    # augmented variants of every picture
    mode: str = "new"                   # new; append: new episodes in a new generation; update: whatever changed
    workers: WorkerSpec = field(default_factory=WorkerSpec)


@dataclass(frozen=True)
class Decision:
    """What a build has to make of its sources, and what it may take from the generation before."""

    corpora: dict[str, Corpus]          # dataset → its plan and tables
    plan: BuildPlan
    fingerprint: dict[str, Any]         # without the plan
    unchanged: bool                     # the finished cache is what was asked for
    reused: Earlier


@dataclass
class BuildReport:
    """What happened. `seconds` are wall-clock of this call."""

    path: Path
    frames: int = 0
    bytes: int = 0
    resumed_shards: int = 0             # shards found finished
    adopted_shards: int = 0             # shards taken whole from the earlier generation
    quarantined: int = 0                # episodes in quarantine.jsonl
    seconds: float = 0.0
    timing: Timing = field(default_factory=Timing)
    previous: Path | None = None        # where the earlier generation is now
    error: tuple[float, float] | None = None    # relative error of storing 8-bit features: over all, worst channel (of the pilot)
    pooled: float | None = None         # relative error of pooling: what the pooled tokens cannot tell (of the pilot)


def pick_device(name: str) -> torch.device:
    """The device of a `--device` setting; `UserError` for CUDA where there is none."""
    if name not in ("auto", "cpu", "cuda") and not re.fullmatch(r"cuda:\d+", name):
        raise UserError(f"device '{name}' is not one of auto, cpu, cuda, cuda:N")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device '{name}': this machine has no CUDA device torch can use; run `dvla doctor`, or use cpu")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else "cpu" if name == "auto" else name)


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
            Cache.open(config.out)      # says what is wrong before there is anything to lock
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
        require_room(plan, target, [t for t in begun.missing() if not reused.whole(t, found.corpora[t.dataset].plan, plan)], begun.tables_missing())
        writer = stack.enter_context(CacheWriter.create_or_resume(target, found.fingerprint, plan))
        manifest = _fill(config, writer, encoder, found.corpora, reused, report, told)
        if target != config.out:
            report.previous = exchange(config.out)
    report.frames, report.bytes = manifest["frames"], manifest["bytes"]
    report.quarantined, report.seconds = manifest["quarantine_count"], time.perf_counter() - began
    return report


def decide(config: BuildConfig, sources: Sequence[Source], encoder: VisionLanguageEncoder, earlier: Cache | None,
           progress: Progress) -> Decision:
    """Read the sources' tables and hashes, and compare with the finished cache `earlier` (None: a new one). `UserError` for what that
    mode of building refuses, and for observations that are more than the encoder reads at once."""
    corpora = [read_corpus(source, encoder.by_observation, progress) for source in sources]
    plan = make_plan(config, [c.plan for c in corpora], encoder)
    fingerprint = make_fingerprint(encoder, corpora, config)
    unchanged = earlier is not None and not fp.diff(earlier.fingerprint, {**fingerprint, "store": plan.document()})
    if earlier is not None and not unchanged and config.mode == "append":
        require_only_new(earlier, fingerprint, plan)
    same = earlier is not None and not unchanged and same_features(earlier, fingerprint, plan)
    return Decision({c.plan.name: c for c in corpora}, plan, fingerprint, unchanged, Earlier(earlier if same else None))


def _fill(config: BuildConfig, writer: CacheWriter, encoder: VisionLanguageEncoder, corpora: dict[str, Corpus], reused: Earlier,
          report: BuildReport, progress: Progress) -> dict[str, Any]:
    """Write whatever is missing, tell `report`, and finish; returns the manifest."""
    plan, missing = writer.plan, writer.missing()
    pilot = pilot_features(list(corpora.values()), plan, encoder) if config.format.quantised and missing else None
    if encoder.tokens < encoder.native_tokens and missing:
        report.pooled = pooling_error(pilot_features(list(corpora.values()), plan, encoder.unpooled(), POOLING_PICTURES), encoder.tokens)

    def measured() -> np.ndarray:
        if reused.channels is not None:
            return reused.channels
        assert pilot is not None        # scales are stored before any shard: where they are missing, all shards are
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
            yield unit, run_unit(writer, unit, corpora[unit.dataset].source, encoder, config.batch_size, channels, reused,
                                 functools.partial(shown, unit))

    sources = [c.source for c in corpora.values()]
    elsewhere = config.workers.active and work
    finished = run_with_workers(config, located(encoder.spec), sources, writer.path, work, channels, reused.path) if elsewhere else here()
    with contextlib.closing(finished):
        for unit, timing in finished:
            report.timing.add(timing)
            done += unit.records
            shown(unit, 0)
    return writer.finish()


def check_settings(config: BuildConfig) -> None:
    """`UserError` for settings that no build can run with."""
    if config.mode not in ("new", "append", "update"):
        raise UserError(f"build mode '{config.mode}' is not one of new, append, update")
    if not config.sources and config.mode == "new":
        raise UserError("no source given; name at least one dataset folder or hub id")
    for option, value in (("--batch-size", config.batch_size), ("--shard-frames", config.shard_frames), ("--frame-stride", config.frame_stride)):
        if value is not None and value < 1:
            raise UserError(f"{option} {value}: give at least 1")
    if not 0 <= config.augment <= 64:
        raise UserError(f"--augment {config.augment}: give the number of augmented variants of each picture, 0 to 64")


def make_plan(config: BuildConfig, datasets: Sequence[DatasetPlan], encoder: VisionLanguageEncoder) -> BuildPlan:
    """What the cache will hold. `UserError` for observations that are more than the encoder reads at once."""
    for dataset in datasets:
        encoder.require_fits(len(dataset.views), dataset.instructions)
    record = config.format.record_nbytes(encoder.tokens, encoder.width)
    return BuildPlan(tuple(datasets), encoder.tokens, encoder.width,
                     config.shard_frames or max(1, min(SHARD_ROWS, SHARD_NBYTES // record)), config.format, config.frame_stride, config.augment)


def make_fingerprint(encoder: VisionLanguageEncoder, corpora: Sequence[Corpus], config: BuildConfig) -> dict[str, Any]:
    """Everything the bytes depend on besides the plan (which the writer adds)."""
    return {"encoder": encoder.fingerprint(), "batch_size": config.batch_size, "transform_version": TRANSFORM_VERSION,
            "action_schema": ACTION_SCHEMA_VERSION, "augmentation": AUGMENTATION_VERSION if config.augment else None,
            "sources": {c.plan.name: {"revision": c.source.revision_hash, "config": c.source.config.name,
                                      "embodiment": c.source.config.embodiment,
                                      "action_map": c.source.action_map.to_dict(),
                                      "state_map": c.source.state_map.to_dict()} for c in corpora}}


def pilot_observations(corpora: Sequence[Corpus], plan: BuildPlan, count: int) -> Iterator[tuple[list[np.ndarray], str]]:
    """Observations with about `count` pictures (uint8 [H,W,3] of each view, the instruction), evenly over datasets and episodes: the same
    for the same plan."""
    each = max(1, count // sum(len(c.plan.views) for c in corpora))
    for corpus in corpora:
        episodes = corpus.plan.episodes
        picked = sorted({round(i * (len(episodes) - 1) / max(1, each - 1)) for i in range(each)})
        for i, number in enumerate(picked):
            entry = episodes[number]
            frame = (i * entry.length // len(picked)) // plan.frame_stride * plan.frame_stride
            try:
                views = [next(view.frames(frame, frame + 1)) for view in corpus.source.load(entry.episode_id).views]
            except CorruptEpisode:
                continue        # the build will say so
            yield views, entry.instruction


def pilot_features(corpora: Sequence[Corpus], plan: BuildPlan, encoder: VisionLanguageEncoder, count: int = PILOT_PICTURES) -> torch.Tensor:
    """float32 [n,K,D]: features of about `count` pictures."""
    features = []
    with torch.inference_mode():
        for views, instruction in pilot_observations(corpora, plan, count):
            features.append(encoder.encode_observation([picture[None] for picture in views], instruction)[0].float().cpu())     # [V,K,D]
    if not features:
        raise UserError("no picture could be decoded to measure what storing them loses; run `dvla data check` on the sources")
    return torch.cat(features)
