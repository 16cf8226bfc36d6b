"""One shard of a build: decode → encode → write, each in a thread of its own, with bounded queues between them.

libav, BLAS, CUDA and the file system release the interpreter lock, so the three overlap. Letters: K tokens, D width.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from ..cache.augment import augment, frame_keys
from ..cache.codec import quantise
from ..cache.encoder import VisionLanguageEncoder
from ..cache.episode import CorruptEpisode
from ..cache.layout import BuildPlan, DatasetPlan, EpisodePlan, ShardTask
from ..cache.readers import Source
from ..cache.store import CacheDataset
from ..cache.writer import CacheWriter, Features
from ..errors import UserError
from .encode import to_float16
from .generations import Earlier

QUEUED_BATCHES = 4          # decoded batches that may wait for the encoder, and encoded ones for the disk


@dataclass
class Timing:
    """Where the time of a build went, in seconds; `images` counts the pictures encoded."""

    images: int = 0
    reused: int = 0         # observations whose features an earlier generation had
    encode: float = 0.0
    decode_wait: float = 0.0    # the encoder waited for pictures
    write_wait: float = 0.0     # the encoder waited for the disk

    def add(self, other: "Timing") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def binds(self) -> str:
        """The part that took most of the time."""
        parts = {"decode": self.decode_wait, "encode": self.encode, "write": self.write_wait}
        return max(parts, key=lambda name: parts[name])


def run_shard(writer: CacheWriter, task: ShardTask, source: Source, encoder: VisionLanguageEncoder, batch_size: int,
              channels: np.ndarray | None, earlier: Earlier, on_rows: Callable[[int], None] = lambda n: None) -> Timing:
    """Make and commit one shard. `on_rows(n)`: rows encoded so far. `UserError` for what stops the whole build."""
    timing, quarantined = Timing(), []
    plan = next(d for d in writer.plan.datasets if d.name == task.dataset)
    decoder = _Decoder(source, plan, writer.plan, task, batch_size, quarantined, earlier)
    scales = None if channels is None else torch.from_numpy(channels).to(encoder.device)
    writing, rows = _Writing(writer, task, quarantined), 0
    try:
        for features in _encode(decoder, encoder, task, plan, writer.plan, scales, timing):
            began = time.perf_counter()
            writing.put(features)
            timing.write_wait += time.perf_counter() - began
            rows += len(features[0]) if isinstance(features, tuple) else len(features)
            on_rows(rows)
        began = time.perf_counter()
        writing.finish()
        timing.write_wait += time.perf_counter() - began
    finally:
        writing.close()
        decoder.close()
    return timing


class _Abort(Exception):
    """Raised inside the writing thread, so that it drops its temporary files."""


class _Writing:
    """`CacheWriter.write_shard` in a thread, fed batch by batch. The thread dies with the process, so a Ctrl-C never waits for it."""

    def __init__(self, writer: CacheWriter, task: ShardTask, quarantined: list[tuple[int, str]]) -> None:
        self._queue: queue.Queue[Features | None] = queue.Queue(QUEUED_BATCHES)
        self._stop, self._error = threading.Event(), None
        self._thread = threading.Thread(target=self._run, args=(writer, task, quarantined), name="dvla-write", daemon=True)
        self._thread.start()

    def put(self, item: Features | None) -> None:
        """Queue a batch, None after the last. Raises what stopped the thread."""
        while self._thread.is_alive():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
        self._raise()

    def finish(self) -> None:
        """Wait until the shard is committed."""
        self.put(None)
        self._thread.join()
        self._raise()

    def close(self) -> None:
        """Drop the shard unless it is committed, and wait for the thread."""
        self._stop.set()
        self._thread.join()

    def _run(self, writer: CacheWriter, task: ShardTask, quarantined: list[tuple[int, str]]) -> None:
        try:
            writer.write_shard(task, self._drain(), quarantined)
        except BaseException as error:  # raised by the next put or finish
            self._error = error

    def _drain(self) -> Iterator[Features]:
        while not self._stop.is_set():
            try:
                item = self._queue.get(timeout=0.1)
            except queue.Empty:
                continue
            if item is None:
                return
            yield item
        raise _Abort

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


def _encode(decoder: _Decoder, encoder: VisionLanguageEncoder, task: ShardTask, plan: DatasetPlan, build: BuildPlan,
            scales: torch.Tensor | None, timing: Timing) -> Iterator[Features]:
    """Stored features of the decoder's batches; zeros for rows in quarantine."""
    stream = iter(decoder)
    while True:
        began = time.perf_counter()
        item = next(stream, None)
        timing.decode_wait += time.perf_counter() - began
        if item is None:
            return
        if isinstance(item, _Missing):
            codes = np.zeros((item.rows, build.tokens, build.width), build.format.zarr_dtype)
            yield codes if scales is None else (codes, np.ones((item.rows, build.tokens), np.float32))
        elif isinstance(item, _Copied):
            timing.reused += len(item.codes)
            yield item.codes if item.scale is None else (item.codes, item.scale)
        else:
            began = time.perf_counter()
            yield_value = encode_pictures(encoder, item.images, item.keys, scales, build, f"{task.dataset}/{task.array}")
            timing.encode += time.perf_counter() - began
            timing.images += len(item.images)
            yield yield_value


def encode_pictures(encoder: VisionLanguageEncoder, images: np.ndarray, keys: np.ndarray | None, scales: torch.Tensor | None,
                    build: BuildPlan, what: str) -> Features:
    """uint8 [n,H,W,3] → what is stored of them: float16 [n,K,D], or (codes, token scales). `keys` [n]: augmented first."""
    with torch.inference_mode():
        pictures = torch.from_numpy(images).to(encoder.device)
        if keys is not None:
            pictures = augment(pictures, keys)
        features = encoder.encode_images(pictures)                                  # [n,K,D]
        if scales is None:
            return to_float16(features, what)
        if not torch.isfinite(features).all():
            raise UserError(f"{what}: the encoder gave a value that is not finite; check the weights and their dtype")
        codes, scale = quantise(features, scales, build.format.dtype)
        return codes.cpu().numpy(), scale.cpu().numpy()


# --- decoding ------------------------------------------------------------------------------------------------------------

@dataclass
class _Pictures:
    images: np.ndarray          # uint8 [n,H,W,3]
    keys: np.ndarray | None     # uint64 [n] of an augmented variant


@dataclass
class _Missing:
    rows: int                   # of an episode that could not be decoded (listed in `quarantined`)


@dataclass
class _Copied:
    codes: np.ndarray           # features as stored in the earlier generation
    scale: np.ndarray | None


class _Decoder:
    """Pictures of one shard, in order, decoded ahead in a thread.

    Batches never cross an episode's end, so their make-up is a function of the plan alone.
    """

    def __init__(self, source: Source, plan: DatasetPlan, build: BuildPlan, task: ShardTask, batch_size: int,
                 quarantined: list[tuple[int, str]], earlier: Earlier) -> None:
        self._source, self._plan, self._build, self._task = source, plan, build, task
        self._size, self._quarantined, self._earlier = batch_size, quarantined, earlier
        self._queue: queue.Queue[Any] = queue.Queue(QUEUED_BATCHES)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dvla-decode", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[_Pictures | _Missing | _Copied]:
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

    def _items(self) -> Iterator[_Pictures | _Missing | _Copied]:
        plan, task, stride = self._plan, self._task, self._build.frame_stride
        counts = plan.observations(stride)                                          # [episodes]
        starts = np.cumsum(counts) - counts                                         # first row of each
        view = plan.views.index(task.view)
        first = int(np.searchsorted(starts, task.start, side="right")) - 1
        for entry, start, count in zip(plan.episodes[first:], starts[first:].tolist(), counts[first:].tolist()):
            if start >= task.stop or self._stop.is_set():
                return
            begin, end = max(task.start - start, 0), min(task.stop - start, count)
            view_hash = entry.view_hashes[view] if entry.view_hashes else ""
            if found := self._earlier.find(task, entry, view_hash):
                yield from self._copied(*found, np.arange(begin, end) * stride)
                continue
            done = begin
            try:
                for images in self._pictures(entry, view, begin, end):
                    frames = np.arange(done, done + len(images)) * stride
                    keys = frame_keys(task.dataset, task.view, entry.episode_id, frames, task.variant) if task.variant else None
                    yield _Pictures(images, keys)
                    done += len(images)
            except CorruptEpisode as error:
                self._quarantined.append((entry.episode_id, str(error)))
                yield _Missing(end - done)

    def _pictures(self, entry: EpisodePlan, view: int, begin: int, end: int) -> Iterator[np.ndarray]:
        """uint8 [n,H,W,3] of observations begin…end-1 of an episode, n ≤ batch size."""
        episode, stride = self._source.load(entry.episode_id), self._build.frame_stride
        if episode.source_hash != entry.source_hash:
            raise UserError(f"{self._source.path}: episode {entry.episode_id} changed during the build; "
                            "run again once the dataset is at rest")
        frames = islice(episode.views[view].frames(begin * stride, (end - 1) * stride + 1), 0, None, stride)
        while block := list(islice(frames, self._size)):
            yield np.stack(block)

    def _copied(self, dataset: CacheDataset, start: int, frames: np.ndarray) -> Iterator[_Copied]:
        for at in range(0, len(frames), self._size):
            yield _Copied(*self._earlier.records(dataset, self._task, start + frames[at:at + self._size]))
