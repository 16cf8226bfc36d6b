"""Bytes, seconds and training speed of a planned build, computed from its plan and from what a pilot measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ....cache.store.plan import BuildPlan, DatasetPlan
from ..generations import ViewChange
from ..sizes import ROOM_MARGIN, plan_nbytes

MEMORY_SHARE = 0.8  # of a machine's memory that may hold pages of a cache
KINDS = ("new", "again", "copied", "adopted")  # what becomes of features, as `ViewChange` counts


@dataclass(frozen=True)
class ViewCost:
    """Seconds to decode one camera of one dataset."""

    dataset: str
    view: str
    load: float  # to open an episode for the first time: its tables, and the hash over its stored images
    reload: float  # to open it again, its hash remembered: once for each unit of work
    first: float  # to the first frame of an episode
    following: float  # to each further observation of it, skipped frames included


@dataclass(frozen=True)
class Measured:
    """What the pilot measured. Bytes are stored bytes: codes with their scales, after compression."""

    views: tuple[ViewCost, ...]
    encode: float  # seconds per image, augmentation and quantization included
    compression: float  # uncompressed over stored bytes
    write: float  # bytes/s
    read: float  # bytes/s of records in random order, not in memory before
    read_warm: float  # bytes/s of records in random order, from memory
    model: float | None  # observations/s of a training step of the policy alone
    storing_error: tuple[float, float]  # RMS of the storage error over the features' RMS: overall, in the worst channel
    pooling_error: float | None  # RMS of what `--tokens` discards over the RMS of all tokens; None: nothing is pooled
    # RMS of the change from an observation to the last skipped frame after it; None: no stride.
    stride_change: float | None


@dataclass(frozen=True)
class PlannedView:
    """One camera of one dataset in the planned cache."""

    dataset: str
    view: str
    frames: int
    observations: int
    bytes: int  # of its features, augmented variants included, before compression
    decode_seconds: float  # of what has to be encoded


@dataclass(frozen=True)
class Share:
    """A part of the features, by what the build does with it."""

    kind: str  # one of `KINDS`
    pictures: int  # images: all views and augmented variants
    bytes: int  # stored
    hours: float  # of decoding, encoding and writing it


@dataclass(frozen=True)
class Forecast:
    """What a build will take and what stage two will get. Decode, encode and write are seconds of one process."""

    views: tuple[PlannedView, ...]
    measured: Measured
    frames: int
    observations: int
    pictures: int  # images to encode: all views and augmented variants
    shares: tuple[Share, ...]  # of `--append` and `--update`: against the finished cache; () for a new one
    quarantined: int  # episodes whose length cannot be read
    bytes: int  # of the cache
    bytes_to_write: int  # of them: all but shards that are reused unchanged
    bytes_per_sample: int  # features of one observation, all its views
    free_bytes: int  # in the file system of the cache
    seconds: dict[str, float]  # tables, decode, encode, write
    binds: str  # the bottleneck: decode, encode or write
    hours: float
    cost: float | None  # USD at the price given
    fits_in_memory: bool  # so that the disk is read in the first epoch only
    read_samples: float  # observations/s by reading alone
    train_samples: float  # observations/s of stage two, each with `draws` noise samples
    draws: int
    train_binds: str  # the bottleneck: reading or model
    break_even_epoch: int | None  # the first after which the cache has cost no more than a live encoder; None: never
    cluster: Any = None  # of `--cluster`: what it would take there (a `ClusterForecast`)
    features: str = ""  # which, in words
    tokens: tuple[int, int] = (0, 0)  # of one view, and their width
    prompt: tuple[int, int] | None = None  # tokens after the image's: of the longest instruction, and room for them
    reads: str = "image"  # what a view's features depend on: image, instruction (too) or observation (all of it)
    # n, where the hidden states before the last n blocks are stored, not features: `train_samples` is by reading alone
    boundary: int | None = None

    @property
    def fits(self) -> bool:
        """Whether the disk can hold it."""
        return self.bytes_to_write * ROOM_MARGIN <= self.free_bytes


def forecast(
    plan: BuildPlan,
    m: Measured,
    *,
    free: int,
    memory: int,
    parallel: int = 1,
    overlap: bool = True,
    draws: int = 1,
    price: float | None = None,
    changed: Sequence[ViewChange] | None = None,
) -> Forecast:
    """The build of `plan`, and training from its cache.

    Args:
        free, memory: bytes on the disk and of this machine.
        parallel: processes that decode and encode, each with a device of its own.
        overlap: decoding and encoding do not share processors.
        price: USD per hour for all of it.
        changed: each view of `m.views` against the finished cache that is brought up to date; None: all is new.
    """
    whole = [_all_new(plan, c.dataset, c.view) for c in m.views]
    todo = whole
    if changed is not None:
        todo = [next(t for t in changed if (t.dataset, t.view) == (c.dataset, c.view)) for c in m.views]
    views = tuple(_planned(plan, c, w, t) for c, w, t in zip(m.views, whole, todo))
    shares = {kind: _share(kind, plan, m, todo, parallel, overlap) for kind in KINDS}
    pictures, stored = shares["new"].pictures + shares["again"].pictures, sum(v.bytes for v in views)
    nbytes = plan_nbytes(plan) - stored + int(stored / m.compression)
    to_write = nbytes - shares["adopted"].bytes
    seconds = _seconds(plan, m, views, pictures, to_write)
    decode, encode = (seconds[part] / parallel for part in ("decode", "encode"))
    total = seconds["tables"] + elapsed(decode, encode, seconds["write"], overlap)
    observations = sum(int(d.observations(plan.frame_stride).sum()) for d in plan.datasets)
    sample = stored / (plan.variants + 1) / observations / m.compression
    in_memory = nbytes < MEMORY_SHARE * memory
    read_samples = (m.read_warm if in_memory else m.read) / sample
    return Forecast(
        views,
        m,
        sum(d.frames for d in plan.datasets),
        observations,
        pictures,
        () if changed is None else tuple(shares.values()),
        sum(len(d.quarantined) for d in plan.datasets),
        nbytes,
        to_write,
        round(sample),
        free,
        seconds,
        max(("decode", "encode", "write"), key=lambda name: seconds[name]),
        total / 3600,
        None if price is None else total / 3600 * price,
        in_memory,
        read_samples,
        min(read_samples, m.model or math.inf),
        draws,
        "model" if m.model and m.model < read_samples else "reading",
        _break_even(m, whole, observations, read_samples, total, overlap),
    )


def _seconds(
    plan: BuildPlan, m: Measured, views: Sequence[PlannedView], pictures: int, to_write: int
) -> dict[str, float]:
    """Of the parts of the build, each in one process."""
    opened = ((c, _dataset(plan, c.dataset)) for c in m.views)
    return {
        "tables": sum(c.load * len(d.episodes) / len(d.views) for c, d in opened),
        "decode": sum(v.decode_seconds for v in views),
        "encode": pictures * m.encode,
        "write": to_write / m.write,
    }


def _break_even(
    m: Measured, whole: Sequence[ViewChange], observations: int, read_samples: float, build: float, overlap: bool
) -> int | None:
    """Epochs after which a build of `build` seconds has saved its time against a live encoder; None: never."""
    step = observations / m.model if m.model else 0.0
    decode = sum(_decode_seconds(c, w.episodes, w.new) for c, w in zip(m.views, whole))
    live = elapsed(decode, sum(w.new for w in whole) * m.encode + step, 0.0, overlap)
    saved = live - max(observations / read_samples, step)
    return math.ceil(build / saved) if saved > 0 else None


def _dataset(plan: BuildPlan, name: str) -> DatasetPlan:
    return next(d for d in plan.datasets if d.name == name)


def _all_new(plan: BuildPlan, name: str, view: str) -> ViewChange:
    dataset = _dataset(plan, name)
    return ViewChange(name, view, int(dataset.observations(plan.frame_stride).sum()), 0, 0, 0, len(dataset.episodes))


def _planned(plan: BuildPlan, cost: ViewCost, whole: ViewChange, todo: ViewChange) -> PlannedView:
    versions, record = plan.variants + 1, plan.format.record_nbytes(plan.tokens, plan.width)
    decode = versions * _decode_seconds(cost, todo.episodes, todo.new + todo.again)
    frames = _dataset(plan, cost.dataset).frames
    return PlannedView(cost.dataset, cost.view, frames, whole.new, whole.new * versions * record, decode)


def _decode_seconds(cost: ViewCost, episodes: int, observations: int) -> float:
    """Of one variant: each episode is opened, and its observations are decoded in order."""
    return episodes * (cost.reload + cost.first) + (observations - episodes) * cost.following


def _share(kind: str, plan: BuildPlan, m: Measured, todo: Sequence[ViewChange], parallel: int, overlap: bool) -> Share:
    """One of `KINDS`; `todo`: of each of `m.views`. Only new and changed images are decoded; reused shards are free."""
    versions, record = plan.variants + 1, plan.format.record_nbytes(plan.tokens, plan.width)
    pictures = versions * sum(getattr(t, kind) for t in todo)
    nbytes, decode, encode = int(pictures * record / m.compression), 0.0, 0.0
    if kind in ("new", "again"):
        decode = versions * sum(
            _decode_seconds(c, t.episodes, t.new + t.again) * getattr(t, kind) / max(1, t.new + t.again)
            for c, t in zip(m.views, todo)
        )
        encode = pictures * m.encode
    write = 0.0 if kind == "adopted" else nbytes / m.write
    return Share(kind, pictures, nbytes, elapsed(decode / parallel, encode / parallel, write, overlap) / 3600)


def elapsed(decode: float, encode: float, write: float, overlap: bool) -> float:
    """Seconds of the three together: the longest where each has resources of its own, the sum where they share them."""
    return max(decode, encode, write) if overlap else decode + encode + write
