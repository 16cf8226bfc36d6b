"""One unit of a build (`plan.Unit`): decode → encode → write, in threads of their own, with bounded queues between
them.

A unit is one shard, or all views' shards of the same observations where the encoder takes an observation at once; then
its views are decoded in step, and each shard still has a writer and a commit of its own. libav, BLAS, CUDA and the file
system release the interpreter lock, so the three overlap. What cannot be decoded is a `Failed` in the same stream, from
the decoder to the writer and its ledger. Letters: n observations of a batch, V views, K tokens, D width.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress, islice
from typing import Any

import numpy as np
import torch

from ...cache.readers import Source
from ...cache.readers.episode import CorruptEpisode
from ...cache.store.codec import quantize
from ...cache.store.dataset import CacheDataset
from ...cache.store.plan import BuildPlan, DatasetPlan, EpisodePlan, ShardTask, Unit
from ...cache.store.writer import CacheWriter, Features
from ...cache.vlm.augment import frame_keys
from ...cache.vlm.encoder import VisionLanguageEncoder
from ...cache.vlm.observations import augmented, float16_later, require_finite
from ...errors import Failed, UserError
from .generations import Earlier

QUEUED_BATCHES = 4  # decoded batches that may wait for the encoder, and encoded ones for the disk
LATE = {"cuda": 1}  # batches whose features are fetched when the encoder has others to work on, by device


@dataclass
class Timing:
    """Where the time of a build went, in seconds."""

    images: int = 0  # encoded
    reused: int = 0  # images whose features an earlier generation had
    encode: float = 0.0
    decode_wait: float = 0.0  # the encoder waited for images
    write_wait: float = 0.0  # the encoder waited for the disk

    def add(self, other: Timing) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def bottleneck(self) -> str:
        """The part that took most of the time."""
        parts = {"decoding": self.decode_wait, "encoding": self.encode, "writing": self.write_wait}
        return max(parts, key=lambda name: parts[name])


def run_unit(
    writer: CacheWriter,
    unit: Unit,
    source: Source,
    encoder: VisionLanguageEncoder,
    batch_size: int,
    channels: np.ndarray | None,
    earlier: Earlier,
    on_records: Callable[[int], None] = lambda n: None,
) -> Timing:
    """Make and commit the shards of one unit. `on_records(n)`: features so far. `UserError` for what ends the build."""
    timing, records = Timing(), 0
    plan = next(d for d in writer.plan.datasets if d.name == unit.dataset)
    # Views that are encoded together, whichever of their shards are missing.
    seen = plan.views if encoder.by_observation else (unit.tasks[0].view,)
    scales = None if channels is None else torch.from_numpy(channels).to(encoder.device)
    with contextlib.ExitStack() as stack:
        size, own = max(1, batch_size // len(seen)), encoder.reads == "image"
        decoder = _Decoder(source, plan, writer.plan, unit, seen, size, earlier, own)
        stack.callback(decoder.close)
        writings = [_Writing(writer, task) for task in unit.tasks]
        for writing in writings:
            stack.callback(writing.close)
        for batch in _encode(decoder, encoder, unit, seen, writer.plan, scales, timing):
            began = time.perf_counter()
            for writing, features in zip(writings, batch):
                writing.add(features)
                records += _rows(features)
            timing.write_wait += time.perf_counter() - began
            on_records(records)
        began = time.perf_counter()
        for writing in writings:
            writing.add(None)
        for writing in writings:
            writing.finish()
        timing.write_wait += time.perf_counter() - began
    return timing


def _rows(features: Features | Failed) -> int:
    if isinstance(features, Failed):
        return features.rows
    return len(features[0] if isinstance(features, tuple) else features)


class _Abort(Exception):
    """Raised inside the writing thread, so that it drops its temporary files."""


class _Worker(threading.Thread):
    """A thread with a bounded queue. It dies with the process, so Ctrl-C never waits for it."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.queue: queue.Queue[Any] = queue.Queue(QUEUED_BATCHES)
        self.stopping = threading.Event()
        self.start()

    def put(self, item: Any, wanted: Callable[[], bool]) -> None:
        """Queue an item as soon as there is room, as long as it is `wanted`."""
        while wanted():
            try:
                return self.queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def close(self) -> None:
        """Stop, and wait until it has."""
        self.stopping.set()
        self.join()


class _Writing(_Worker):
    """`CacheWriter.write_shard` in a thread, fed batch by batch; `close` drops the shard unless it is committed."""

    def __init__(self, writer: CacheWriter, task: ShardTask) -> None:
        self._writer, self._task = writer, task
        self._error: BaseException | None = None
        super().__init__("dvla-write")

    def add(self, item: Features | Failed | None) -> None:
        """Queue a batch, None after the last. Raises what stopped the thread."""
        self.put(item, self.is_alive)
        self._raise()

    def finish(self) -> None:
        """After the last batch: wait until the shard is committed."""
        self.join()
        self._raise()

    def run(self) -> None:
        try:
            self._writer.write_shard(self._task, self._drain())
        except BaseException as error:  # raised by the next add or finish
            self._error = error

    def _drain(self) -> Iterator[Features | Failed]:
        while not self.stopping.is_set():
            try:
                item = self.queue.get(timeout=0.1)
            except queue.Empty:
                continue
            if item is None:
                return
            yield item
        raise _Abort

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


def _encode(
    decoder: _Decoder,
    encoder: VisionLanguageEncoder,
    unit: Unit,
    seen: Sequence[str],
    build: BuildPlan,
    scales: torch.Tensor | None,
    timing: Timing,
) -> Iterator[Sequence[Features | Failed]]:
    """What each shard of the unit stores of the decoder's batches; failures pass through. From a GPU the features of a
    batch are fetched when it has the next one to work on."""
    stream, wanted = iter(decoder), [seen.index(task.view) for task in unit.tasks]
    encoded: deque[list[Callable[[], Features]]] = deque()

    def fetched(left: int) -> Iterator[list[Features]]:
        while len(encoded) > left:
            began = time.perf_counter()
            batch = [fetch() for fetch in encoded.popleft()]
            timing.encode += time.perf_counter() - began
            yield batch

    while True:
        began = time.perf_counter()
        item = next(stream, None)
        timing.decode_wait += time.perf_counter() - began
        if not isinstance(item, _Images):
            yield from fetched(0)
        if item is None:
            return
        if isinstance(item, Failed):
            yield [item] * len(wanted)
        elif isinstance(item, _Copied):
            timing.reused += sum(map(_rows, item.records))
            yield item.records
        else:
            began = time.perf_counter()
            encoded.append(_encode_batch(encoder, item, wanted, scales, build, unit.name))
            timing.encode += time.perf_counter() - began
            timing.images += sum(map(len, item.views))
            yield from fetched(LATE.get(encoder.device.type, 0))


def _encode_batch(
    encoder: VisionLanguageEncoder,
    batch: _Images,
    wanted: Sequence[int],
    scales: torch.Tensor | None,
    build: BuildPlan,
    what: str,
) -> list[Callable[[], Features]]:
    """What gives, for each of the `wanted` views (numbers in the batch), what it stores: float16 [n,K,D], or (codes,
    token scales)."""
    with torch.inference_mode():
        views = [augmented(images, keys, encoder.device) for images, keys in zip(batch.views, batch.keys)]
        features = encoder.encode_observation(views, batch.instruction)  # [n,V,K,D]
        return [_stored(features[:, v].contiguous(), scales, build, what) for v in wanted]


def _stored(features: torch.Tensor, scales: torch.Tensor | None, build: BuildPlan, what: str) -> Callable[[], Features]:
    """What gives features [n,K,D] of one view as they are written."""
    if scales is None:
        return float16_later(features, what)
    require_finite(features, what)
    codes, scale = quantize(features, scales, build.format.dtype)
    stored = codes.cpu().numpy(), scale.cpu().numpy()
    return lambda: stored


# --- decoding ---------------------------------------------------------------------------------------------------------


@dataclass
class _Images:
    """A batch for the encoder, of one episode."""

    views: list[np.ndarray]  # uint8 [n,H,W,3] of each view
    keys: list[np.ndarray]  # uint64 [n] of their augmented variant, 0 = as they are
    instruction: str


@dataclass
class _Copied:
    records: list[Features]  # as stored in the earlier generation, for each shard of the unit


class _Decoder(_Worker):
    """Images of one unit, in order, decoded ahead in a thread, `size` observations at a time.

    Batches never cross an episode's end, so their make-up is a function of the plan alone.
    """

    def __init__(
        self,
        source: Source,
        plan: DatasetPlan,
        build: BuildPlan,
        unit: Unit,
        seen: Sequence[str],
        size: int,
        earlier: Earlier,
        own: bool,
    ) -> None:
        """`own`: the plan has the hash of each view's images alone."""
        self._own, self._source, self._plan, self._build, self._unit = own, source, plan, build, unit
        self._seen, self._size, self._earlier = seen, size, earlier
        super().__init__("dvla-decode")

    def __iter__(self) -> Iterator[_Images | Failed | _Copied]:
        while (item := self.queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def run(self) -> None:
        try:
            for item in self._items():
                self.put(item, self._wanted)
            self.put(None, self._wanted)
        except BaseException as error:  # handed to the consumer, which raises it
            self.put(error, self._wanted)

    def _wanted(self) -> bool:
        return not self.stopping.is_set()

    def _items(self) -> Iterator[_Images | Failed | _Copied]:
        plan, task, stride = self._plan, self._unit.tasks[0], self._build.frame_stride
        counts = plan.observations(stride)  # [episodes]
        starts = np.cumsum(counts) - counts  # first row of each
        first = int(np.searchsorted(starts, task.start, side="right")) - 1
        for entry, start, count in zip(plan.episodes[first:], starts[first:].tolist(), counts[first:].tolist()):
            if start >= task.stop or self.stopping.is_set():
                return
            frames = entry.observed(stride)[max(task.start - start, 0) : min(task.stop - start, count)]
            asked = (
                self._earlier.find(t.dataset, t.view, plan.views.index(t.view), entry, frames) for t in self._unit.tasks
            )
            found = [each for each in asked if each is not None]
            if len(found) == len(self._unit.tasks):
                yield from self._copied(found, frames)
                continue
            done = 0
            try:
                for views in self._images(entry, frames):
                    part = frames[done : done + len(views[0])]
                    yield _Images(views, self._keys(entry, part), entry.instruction)
                    done += len(part)
            except CorruptEpisode as error:
                if error.kind == "missing-file":  # the plan has its hash: a folder that was unmounted, a moved dataset
                    raise UserError(f"{error}, which was there when the build began; put it back and rerun") from None
                yield error.failed(entry.episode_id, self._source.where(entry.episode_id), len(frames) - done)

    def _keys(self, entry: EpisodePlan, frames: np.ndarray) -> list[np.ndarray]:
        """uint64 [n] of the augmented variant of each view's frames, 0 = as they are."""
        task = self._unit.tasks[0]
        if not task.variant:
            return [np.zeros(len(frames), np.uint64) for _ in self._seen]
        return [frame_keys(task.dataset, v, entry.episode_id, frames, task.variant) for v in self._seen]

    def _images(self, entry: EpisodePlan, frames: np.ndarray) -> Iterator[list[np.ndarray]]:
        """uint8 [n,H,W,3] of each view seen, of `frames` (ascending) of an episode, n ≤ the size of a batch.

        Only these views' files are opened where the plan has the hashes of the others.
        """
        if self._own:
            others = dict(zip(self._plan.views, entry.view_hashes))
            episode = self._source.load(entry.episode_id, self._seen, others)
        else:
            episode = self._source.load(entry.episode_id)
        if episode.source_hash != entry.source_hash:
            raise UserError(
                f"{self._source.path}: episode {entry.episode_id} changed during the build; rerun the same command "
                "when nothing writes to the dataset"
            )
        first, wanted = int(frames[0]), np.isin(np.arange(frames[0], frames[-1] + 1), frames).tolist()
        images = [
            compress(view.frames(first, first + len(wanted)), wanted)
            for view in episode.views
            if view.name in self._seen
        ]
        while (blocks := [list(islice(each, self._size)) for each in images])[0]:
            yield [np.stack(block) for block in blocks]

    def _copied(self, found: list[tuple[CacheDataset, int]], frames: np.ndarray) -> Iterator[_Copied]:
        for at in range(0, len(frames), self._size):
            part = frames[at : at + self._size]
            records = [
                self._earlier.records(dataset, task, start + part)
                for task, (dataset, start) in zip(self._unit.tasks, found)
            ]
            yield _Copied([codes if scale is None else (codes, scale) for codes, scale in records])
