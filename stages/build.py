"""`dvla cache build`: corpus → shards of features, unified actions and tables. Resumable; the bytes depend only on the inputs.

Decoding runs ahead in a thread (libav releases the interpreter lock) while the encoder works; memory is bounded by the
queue between them. Letters: K tokens, D width, N frames of a dataset.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..cache.actions import ACTION_SCHEMA_VERSION
from ..cache.encoder import EncoderSpec, VisionLanguageEncoder, load_encoder
from ..cache.episode import CorruptEpisode
from ..cache.layout import BuildPlan, DatasetPlan, DatasetTables, EpisodePlan, ShardTask
from ..cache.readers import Source, open_source
from ..cache.normalize import RunningStatistics
from ..cache.writer import CacheWriter
from ..errors import UserError
from .encode import batches, to_float16

TRANSFORM_VERSION = 1       # raised when this file writes other content from the same inputs
SHARD_NBYTES = 256 << 20    # default size of a shard: large enough to stream, small enough to redo
QUEUED_BATCHES = 4          # decoded batches that may wait for the encoder

Progress = Callable[[str, int, int], None]   # (stage, done, total)


@dataclass(frozen=True)
class BuildConfig:
    """What `dvla cache build` needs."""

    sources: tuple[str, ...]            # LeRobot dataset folders or hub ids
    encoder: EncoderSpec                # which VLM, at which resolution
    out: Path                           # cache folder
    batch_size: int = 64                # pictures per encoder call; part of the fingerprint (it changes the last bits)
    shard_frames: int | None = None     # frames per shard file; None = about 256 MiB
    device: str = "auto"                # auto, cpu, cuda
    dataset_config: str | None = None   # YAML of the field map when none of the shipped ones fits


@dataclass
class BuildReport:
    """What happened. Seconds are wall-clock of this call; `images` counts pictures encoded by this call."""

    path: Path
    frames: int = 0
    bytes: int = 0
    images: int = 0
    resumed_shards: int = 0             # shards found finished
    quarantined: int = 0                # episodes in quarantine.jsonl
    seconds: float = 0.0
    encode_seconds: float = 0.0
    decode_wait_seconds: float = 0.0    # the encoder waited for pictures
    write_seconds: float = 0.0

    @property
    def binds(self) -> str:
        """The stage that took most of the time."""
        parts = {"decode": self.decode_wait_seconds, "encode": self.encode_seconds, "write": self.write_seconds}
        return max(parts, key=lambda name: parts[name])


@dataclass
class _Corpus:
    """One source, read once: its plan and its tables."""

    source: Source
    plan: DatasetPlan
    action: np.ndarray          # [N,128] float32 unified
    proprio: np.ndarray         # [N,128] float32 unified
    timestamp: np.ndarray       # [N] float64
    view_sizes: dict[str, list[int]] = field(default_factory=dict)


def pick_device(name: str) -> torch.device:
    """The device of a `--device` setting; `UserError` for CUDA where there is none."""
    if name not in ("auto", "cpu", "cuda") and not name.startswith("cuda:"):
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
    if not config.sources:
        raise UserError("no source given; name at least one dataset folder or hub id")
    if config.batch_size < 1 or (config.shard_frames is not None and config.shard_frames < 1):
        raise UserError(f"batch size {config.batch_size} and shard frames {config.shard_frames} must be at least 1")
    device = pick_device(config.device)
    sources = open_sources(config.sources, config.dataset_config)
    encoder = load_encoder(config.encoder, device)
    corpora = [_read(source, progress) for source in sources]
    shard_frames = config.shard_frames or max(1, SHARD_NBYTES // (encoder.tokens * encoder.width * 2))
    plan = BuildPlan(tuple(c.plan for c in corpora), encoder.tokens, encoder.width, shard_frames)
    report = BuildReport(config.out)
    with CacheWriter.create_or_resume(config.out, _fingerprint(encoder, corpora, config.batch_size), plan) as writer:
        by_name = {c.plan.name: c for c in corpora}
        for name in writer.tables_missing():
            writer.write_tables(name, _tables(by_name[name], encoder))
        missing = writer.missing()
        every = sum(len(d.views) * -(-d.frames // shard_frames) for d in plan.datasets)
        report.resumed_shards = every - len(missing)
        total, done = sum(t.stop - t.start for t in missing), 0
        for task in missing:
            corpus, quarantined = by_name[task.dataset], []
            pictures = _Decoder(corpus, task, config.batch_size, quarantined)
            shown = f"{task.dataset}/{task.view}"
            chunks = _encode(pictures, encoder, report, lambda n: progress(shown, done + n, total))
            before, spent = time.perf_counter(), report.encode_seconds + report.decode_wait_seconds
            try:
                writer.write_shard(task, chunks, quarantined)
            finally:
                pictures.close()
            elapsed = time.perf_counter() - before
            report.write_seconds += elapsed - (report.encode_seconds + report.decode_wait_seconds - spent)
            done += task.stop - task.start
            progress(shown, done, total)
        manifest = writer.finish()
    report.frames, report.bytes = manifest["frames"], manifest["bytes"]
    report.quarantined, report.seconds = manifest["quarantine_count"], time.perf_counter() - began
    return report


def open_sources(paths: tuple[str, ...] | list[str], dataset_config: str | None = None) -> list[Source]:
    """Open every source; `UserError` when two have one name, since a cache names its datasets after them."""
    from ..cache.dataset_config import load_config

    config = load_config(dataset_config) if dataset_config else None
    sources = [open_source(path, config) for path in paths]
    names = [s.name for s in sources]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two sources are named '{name}'; rename one of the folders")
    return sources


def encoder_location(spec: EncoderSpec) -> dict[str, Any]:
    """The spec as JSON; a folder by its absolute path, so that training and evaluation find it from anywhere."""
    folder = Path(spec.path).expanduser()
    return dataclasses.asdict(dataclasses.replace(spec, path=str(folder.resolve()) if folder.is_dir() else spec.path))


def _read(source: Source, progress: Progress) -> _Corpus:
    """Tables and plan of a source. What cannot be loaded is quarantined by name, and nothing else is lost."""
    episodes, quarantined, actions, states, times, sizes = [], [], [], [], [], {}
    for i, number in enumerate(source.episode_ids):
        try:
            episode = source.load(number)
            action, state = source.action_map.to_unified(episode.action), source.state_map.to_unified(episode.state)
        except CorruptEpisode as error:
            quarantined.append((number, str(error)))
        else:
            episodes.append(EpisodePlan(number, episode.length, episode.instruction, episode.source_hash))
            actions.append(action)
            states.append(state)
            times.append(episode.timestamps)
            sizes = {v.name: [v.height, v.width] for v in episode.views}
        progress(f"{source.name}: tables", i + 1, len(source.episode_ids))
    if not episodes:
        reason = quarantined[0][1] if quarantined else "it lists no episodes"
        raise UserError(f"{source.path} has no usable episode ({reason}); run on a whole copy of the dataset")
    plan = DatasetPlan(source.name, source.view_names, tuple(episodes), tuple(quarantined))
    return _Corpus(source, plan, np.concatenate(actions), np.concatenate(states), np.concatenate(times), sizes)


def _fingerprint(encoder: VisionLanguageEncoder, corpora: list[_Corpus], batch_size: int) -> dict[str, Any]:
    """Everything the bytes depend on besides the plan (which the writer adds)."""
    return {"encoder": encoder.fingerprint(), "batch_size": batch_size, "transform_version": TRANSFORM_VERSION,
            "action_schema": ACTION_SCHEMA_VERSION,
            "sources": {c.plan.name: {"revision": c.source.revision_hash, "config": c.source.config.name,
                                      "embodiment": c.source.config.embodiment,
                                      "action_map": c.source.action_map.to_dict(),
                                      "state_map": c.source.state_map.to_dict()} for c in corpora}}


def _tables(corpus: _Corpus, encoder: VisionLanguageEncoder) -> DatasetTables:
    source, plan, what = corpus.source, corpus.plan, f"{corpus.plan.name}: text"
    text, length = encoder.encode_text(plan.instructions)           # [n,Lt,D], [n]
    null_text, _ = encoder.encode_text([""])                        # [1,1,D]
    null_image = to_float16(encoder.null_image_features(), f"{plan.name}: black frame")     # [K,D]
    stats = []
    for table in (corpus.action, corpus.proprio):
        running = RunningStatistics()
        running.update(table)
        stats.append(running.result())
    starts = source.starts or {}
    attributes = {"dataset_config": source.config.name, "embodiment_name": source.config.embodiment,
                  "license": source.config.license, "view_sizes": corpus.view_sizes,
                  "action_map": source.action_map.to_dict(), "state_map": source.state_map.to_dict(),
                  "environment": source.environment, "source": str(source.path.resolve()), "encoder": encoder_location(encoder.spec),
                  "starts": [starts[e.episode_id] for e in plan.episodes if e.episode_id in starts]}
    return DatasetTables(
        action=corpus.action, action_mask=source.action_map.mask, action_rotation=source.action_map.rotation_slots,
        action_stats=stats[0], proprio=corpus.proprio, proprio_mask=source.state_map.mask,
        proprio_rotation=source.state_map.rotation_slots, proprio_stats=stats[1], timestamp=corpus.timestamp,
        text=to_float16(text, what), text_length=length.cpu().numpy(), null_text=to_float16(null_text, what)[0],
        null_features={view: null_image for view in plan.views}, embodiment=source.config.embodiment_id,
        control_hz=source.control_hz, attributes=attributes)


class _Decoder:
    """Pictures of one shard, in order, decoded ahead in a thread.

    Yields uint8 [n, H, W, 3], or an int: that many rows of an episode that could not be decoded (listed in
    `quarantined`). Batches never cross an episode's end, so their make-up is a function of the plan alone.
    """

    def __init__(self, corpus: _Corpus, task: ShardTask, batch_size: int, quarantined: list[tuple[int, str]]) -> None:
        self._corpus, self._task, self._size, self._quarantined = corpus, task, batch_size, quarantined
        self._queue: queue.Queue[Any] = queue.Queue(QUEUED_BATCHES)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dvla-decode", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[np.ndarray | int]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """Stop decoding and wait for the thread."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            for item in self._items():
                self._put(item)
            self._put(None)
        except BaseException as error:  # handed to the consumer, which raises it
            self._put(error)

    def _put(self, item: Any) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _items(self) -> Iterator[np.ndarray | int]:
        plan, task = self._corpus.plan, self._task
        view = plan.views.index(task.view)
        first = int(np.searchsorted(plan.starts, task.start, side="right")) - 1
        for entry, start in zip(plan.episodes[first:], plan.starts[first:].tolist()):
            if start >= task.stop or self._stop.is_set():
                return
            begin, end = max(task.start - start, 0), min(task.stop - start, entry.length)
            done = begin
            try:
                episode = self._corpus.source.load(entry.episode_id)
                if episode.source_hash != entry.source_hash:
                    raise UserError(f"{self._corpus.source.path}: episode {entry.episode_id} changed during the build; "
                                    "run again once the dataset is at rest")
                for block in batches(episode.views[view].frames(begin, end), self._size):
                    yield block
                    done += len(block)
            except CorruptEpisode as error:
                self._quarantined.append((entry.episode_id, str(error)))
                yield end - done


def _encode(pictures: _Decoder, encoder: VisionLanguageEncoder, report: BuildReport,
            on_frames: Callable[[int], None]) -> Iterator[np.ndarray]:
    """Features [n,K,D] float16 of the decoder's batches; zeros for rows in quarantine."""
    frames, stream = 0, iter(pictures)
    while True:
        began = time.perf_counter()
        item = next(stream, None)
        report.decode_wait_seconds += time.perf_counter() - began
        if item is None:
            return
        if isinstance(item, int):
            block = np.zeros((item, encoder.tokens, encoder.width), np.float16)
        else:
            began = time.perf_counter()
            with torch.inference_mode():
                block = to_float16(encoder.encode_images(item), "feature")
            report.encode_seconds += time.perf_counter() - began
            report.images += len(item)
        frames += len(block)
        yield block
        on_frames(frames)
