"""One shard of a build: decode → encode → write, each in a thread of its own, with bounded queues between them.

libav, BLAS, CUDA and the file system release the interpreter lock, so the three overlap. Letters: K tokens, D width.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
from ..cache.store import Cache, CacheDataset
from ..cache.writer import CacheWriter, Features
from ..errors import UserError
from .encode import to_float16

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


class Earlier:
    """The finished generation a new one may copy features from: an episode's, as long as its pictures are the same."""

    def __init__(self, cache: Cache | None) -> None:
        self.path = cache.path if cache else None
        self._cache, self._datasets = cache, {d.name: d for d in cache.datasets} if cache else {}

    @property
    def channels(self) -> np.ndarray | None:
        """Channel scales of its 8-bit features: codes can be copied only together with them."""
        return self._cache.datasets[0].channel_scale if self._cache else None

    def whole(self, task: ShardTask, plan: DatasetPlan, build: BuildPlan) -> bool:
        """Whether it has the very shard: the same rows of the same pictures, stored the same way."""
        dataset = self._datasets.get(task.dataset)
        if dataset is None or task.view not in dataset.views or dataset.shard_frames != build.shard_frames \
                or dataset.attributes["compression"] != build.format.compression:
            return False
        counts = plan.observations(build.frame_stride)
        starts, view = np.cumsum(counts) - counts, plan.views.index(task.view)
        last = int(np.searchsorted(starts, task.stop, side="left"))             # episodes before the shard's end
        total = int(dataset.episode_observations.sum())
        if task.stop > total or (task.stop < task.start + build.shard_frames and task.stop != total):
            return False
        old = dataset.attributes["view_hashes"][task.view][:last]
        entries = plan.episodes[:last]
        return (dataset.episode_id[:last].tolist() == [e.episode_id for e in entries]
                and dataset.episode_length[:last].tolist() == [e.length for e in entries]
                and old == [e.view_hashes[view] for e in entries] and not dataset.quarantined[:last].any())

    def find(self, task: ShardTask, entry: EpisodePlan, view_hash: str) -> tuple[CacheDataset, int] | None:
        """(dataset, its first row of the episode), or None when its pictures changed, are new, or could not be read then."""
        dataset = self._datasets.get(task.dataset)
        if dataset is None or task.view not in dataset.views or not view_hash:
            return None
        at = np.flatnonzero(dataset.episode_id == entry.episode_id)
        if not len(at) or dataset.quarantined[at[0]] or dataset.episode_length[at[0]] != entry.length:
            return None
        same = dataset.attributes["view_hashes"][task.view][int(at[0])] == view_hash
        return (dataset, int(dataset.episode_start[at[0]])) if same else None


def run_shard(writer: CacheWriter, task: ShardTask, source: Source, encoder: VisionLanguageEncoder, batch_size: int,
              channels: np.ndarray | None, earlier: Earlier, on_rows: Callable[[int], None] = lambda n: None) -> Timing:
    """Make and commit one shard. `on_rows(n)`: rows encoded so far. `UserError` for what stops the whole build."""
    timing, quarantined = Timing(), []
    plan = next(d for d in writer.plan.datasets if d.name == task.dataset)
    decoder = _Decoder(source, plan, writer.plan, task, batch_size, quarantined, earlier)
    encoded: queue.Queue[Features | None] = queue.Queue(QUEUED_BATCHES)
    scales = None if channels is None else torch.from_numpy(channels).to(encoder.device)
    with ThreadPoolExecutor(1, thread_name_prefix="dvla-write") as pool:
        writing = pool.submit(writer.write_shard, task, _drain(encoded), quarantined)
        rows = 0
        try:
            for features in _encode(decoder, encoder, task, plan, writer.plan, scales, timing):
                began = time.perf_counter()
                _hand_over(encoded, features, writing)
                timing.write_wait += time.perf_counter() - began
                rows += len(features[0]) if isinstance(features, tuple) else len(features)
                on_rows(rows)
            _hand_over(encoded, None, writing)
        except BaseException:
            _hand_over(encoded, _ABORT, writing)
            writing.exception()
            raise
        finally:
            decoder.close()
        began = time.perf_counter()
        writing.result()
        timing.write_wait += time.perf_counter() - began
    return timing


class _Abort(Exception):
    """Raised inside the writing thread, so that it drops its temporary file."""


_ABORT: Any = _Abort()


def _drain(encoded: queue.Queue) -> Iterator[Features]:
    while (item := encoded.get()) is not None:
        if item is _ABORT:
            raise item
        yield item


def _hand_over(encoded: queue.Queue, item: Any, writing: Any) -> None:
    """Put `item` in the queue unless the writer is gone (its error shows when its result is asked for)."""
    while not writing.done():
        try:
            return encoded.put(item, timeout=0.1)
        except queue.Full:
            continue


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
            yield _Copied(*dataset.records(self._task.view, start + frames[at:at + self._size], self._task.variant))
