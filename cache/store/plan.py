"""The plan of a cache: datasets, episodes, shards and units of work. Pure data, no files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

import numpy as np

from ...common.documents import Count, Field, Form, Positive, Strict
from ...errors import UserError
from .feature_format import FeatureFormat

FORMAT = 2  # version of the layout of a cache
KEPT_FORMAT = 3  # the same, of a cache without features of some frames: earlier releases would take wrong ones
MOST_SHARDS = 4_000_000  # of a plan: each has a file of its own
MOST_FRAMES = 2**40  # of an episode
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VARIANT = re.compile(r".*\.aug\d+")


def require_names(names: Iterable[object]) -> None:
    """`UserError` for what cannot name a dataset or view: a name becomes part of paths, and of commands of pipes."""
    for name in names:
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name.endswith(".json") or _VARIANT.fullmatch(name):
            raise UserError(
                f"{name!r} cannot name a dataset or view in a cache; use letters, digits, . _ and - (and no "
                "ending like .json or .aug1)"
            )


Pair = Annotated[tuple[int, str], Strict(False)]  # (episode, why it is quarantined), a list in JSON
Range = Annotated[tuple[Count, Count], Strict(False)]


class _Episode(Form):
    length: Annotated[int, Field(ge=1, le=MOST_FRAMES)]
    instruction: str
    source_hash: str
    view_hashes: list[str]
    kept: list[Range] | None = None


class _Dataset(Form):
    views: list[str]
    quarantined: list[Pair]
    episodes: dict[str, _Episode]
    episode_order: list[int]


class Store(Form):
    """What `BuildPlan.document` makes."""

    format: int
    tokens: Positive
    width: Positive
    shard_frames: Positive
    dtype: str
    compression: str
    frame_stride: Positive
    variants: Count
    order: list[str]
    datasets: dict[str, _Dataset]


@dataclass(frozen=True)
class EpisodePlan:
    """One episode that gets rows in the cache."""

    episode_id: int
    length: int  # frames, ≥ 1
    instruction: str  # may be empty
    source_hash: str  # changes when the episode's source bytes change
    view_hashes: tuple[str, ...] = ()  # per view: changes when, and only when, the source of its features changes
    kept: tuple[tuple[int, int], ...] | None = None  # frames to train on, ranges [first, end); None: all

    def observations(self, stride: int) -> int:
        """How many frames `observed` gives, without listing them."""
        if self.kept is None:
            return -(-self.length // stride)
        return max(1, sum(-(-end // stride) - -(-first // stride) for first, end in self.kept))

    def observed(self, stride: int) -> np.ndarray:
        """int64: the frames that have features, of every `stride`-th from the first; at least the first."""
        frames = np.arange(0, self.length, stride)
        if self.kept is None:
            return frames
        inside = np.zeros(self.length, bool)
        for first, end in self.kept:
            inside[first:end] = True
        return frames[inside[frames]] if inside[frames].any() else frames[:1]


@dataclass(frozen=True)
class DatasetPlan:
    """One dataset: its episodes in row order, its cameras, and the episodes that cannot be loaded."""

    name: str  # letters, digits, . _ -
    views: tuple[str, ...]  # camera names; their order is the order in a batch
    episodes: tuple[EpisodePlan, ...]
    quarantined: tuple[tuple[int, str], ...] = ()  # (episode id, reason): no rows, only a line in the ledger

    @cached_property
    def frames(self) -> int:
        """Rows of the dataset's flat time axis."""
        return sum(e.length for e in self.episodes)

    @cached_property
    def starts(self) -> np.ndarray:
        """`[episodes]` int64: first row of each episode."""
        return np.cumsum([0, *(e.length for e in self.episodes[:-1])], dtype=np.int64)

    def observations(self, stride: int) -> np.ndarray:
        """`[episodes]` int64: rows of each episode that have features, every `stride`-th from its first."""
        return np.fromiter((e.observations(stride) for e in self.episodes), np.int64, len(self.episodes))

    @cached_property
    def instructions(self) -> tuple[str, ...]:
        """The distinct instructions in order of first use: rows of the text table."""
        return tuple(dict.fromkeys(e.instruction for e in self.episodes))


@dataclass(frozen=True)
class BuildPlan:
    """The shape of a cache's content. It is part of the fingerprint, so a resumed build needs the same plan."""

    datasets: tuple[DatasetPlan, ...]
    tokens: int  # vision tokens per frame and view
    width: int  # feature width
    shard_frames: int  # S, observations in one shard
    format: FeatureFormat = field(default_factory=FeatureFormat)
    frame_stride: int = 1  # every n-th frame of an episode gets features; actions and proprio are kept for all
    variants: int = 0  # augmented variants of every image besides the image itself

    def tasks(self) -> list[ShardTask]:
        """All shards, in dataset, view, variant and row order."""
        size, out = self.shard_frames, []
        for d in self.datasets:
            rows = int(d.observations(self.frame_stride).sum())
            out += [
                ShardTask(d.name, view, i, start, min(start + size, rows), variant)
                for view in d.views
                for variant in range(self.variants + 1)
                for i, start in enumerate(range(0, rows, size))
            ]
        return out

    @cached_property
    def version(self) -> int:
        """Of the layout."""
        return KEPT_FORMAT if any(e.kept is not None for d in self.datasets for e in d.episodes) else FORMAT

    def check(self) -> None:
        """`UserError` for a plan that the layout cannot hold."""
        sizes = (self.tokens, self.width, self.shard_frames, self.frame_stride)
        if not self.datasets or min(sizes) < 1 or self.variants < 0:
            raise UserError(
                "a cache needs at least one dataset, tokens, width, shard frames and frame stride of at least 1, and "
                "0 or more augmented variants"
            )
        names = [d.name for d in self.datasets]
        require_names([*names, *(v for d in self.datasets for v in d.views)])
        for kind, given in [("dataset", names)] + [(f"view of {d.name}", list(d.views)) for d in self.datasets]:
            for name in given:
                if given.count(name) > 1:
                    raise UserError(f"{kind} '{name}' is given twice; names must differ")
        for dataset in self.datasets:
            if not dataset.views or not dataset.episodes or min(e.length for e in dataset.episodes) < 1:
                raise UserError(
                    f"dataset '{dataset.name}' has no view, no readable episode, or an empty episode; "
                    "run `dvla data check` on it"
                )
            for e in dataset.episodes:
                edges = [0, *(frame for span in e.kept or () for frame in span), e.length]
                if edges != sorted(edges) or len(e.view_hashes) not in (0, len(dataset.views)):
                    raise UserError(
                        f"dataset '{dataset.name}' has no sense in the kept frames or hashes of episode {e.episode_id}"
                    )
            if len({e.episode_id for e in dataset.episodes}) != len(dataset.episodes):
                raise UserError(f"dataset '{dataset.name}' lists an episode id twice")
        shards = sum(
            len(d.views) * (self.variants + 1) * -(-int(d.observations(self.frame_stride).sum()) // self.shard_frames)
            for d in self.datasets
        )
        if shards > MOST_SHARDS:
            raise UserError(f"the plan has {shards} shards, at most {MOST_SHARDS} are possible; raise --shard-frames")

    def document(self) -> dict[str, Any]:
        """The plan's part of the fingerprint (key "store")."""
        return {
            "format": self.version,
            "tokens": self.tokens,
            "width": self.width,
            "shard_frames": self.shard_frames,
            "dtype": self.format.dtype,
            "compression": self.format.compression,
            "frame_stride": self.frame_stride,
            "variants": self.variants,
            "order": [d.name for d in self.datasets],
            "datasets": {
                d.name: {
                    "views": d.views,
                    "quarantined": [list(q) for q in d.quarantined],
                    "episodes": {
                        str(e.episode_id): {
                            "length": e.length,
                            "instruction": e.instruction,
                            "source_hash": e.source_hash,
                            "view_hashes": list(e.view_hashes),
                            **({} if e.kept is None else {"kept": [list(r) for r in e.kept]}),
                        }
                        for e in d.episodes
                    },
                    "episode_order": [e.episode_id for e in d.episodes],
                }
                for d in self.datasets
            },
        }

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> BuildPlan:
        """Inverse of `document`, also after a round trip through JSON. `ValueError` for names that do not match."""
        for what, listed, named in (
            ("order", document["order"], document["datasets"]),
            *((name, map(str, d["episode_order"]), d["episodes"]) for name, d in document["datasets"].items()),
        ):
            if sorted(listed) != sorted(named):
                raise ValueError(f"the order of {what} is not that of its entries")

        def dataset(name: str) -> DatasetPlan:
            d = document["datasets"][name]
            episodes = tuple(
                EpisodePlan(
                    n,
                    e["length"],
                    e["instruction"],
                    e["source_hash"],
                    tuple(e["view_hashes"]),
                    None if e.get("kept") is None else tuple((first, end) for first, end in e["kept"]),
                )
                for n in d["episode_order"]
                for e in [d["episodes"][str(n)]]
            )
            quarantined = tuple((number, reason) for number, reason in d["quarantined"])
            return DatasetPlan(name, tuple(d["views"]), episodes, quarantined)

        return cls(
            tuple(map(dataset, document["order"])),
            document["tokens"],
            document["width"],
            document["shard_frames"],
            FeatureFormat(document["dtype"], document["compression"]),
            document["frame_stride"],
            document["variants"],
        )


@dataclass(frozen=True)
class ShardTask:
    """One shard file to write: observations `start … stop-1` of one view of one dataset, in shard `index`."""

    dataset: str
    view: str
    index: int
    start: int
    stop: int
    variant: int = 0  # 0: the images themselves; k: their k-th augmented variant

    @property
    def array(self) -> str:
        """Name of the array it belongs to."""
        return array_name(self.view, self.variant)


@dataclass(frozen=True)
class Unit:
    """One unit of building: the shards that one pass of the encoder makes, each written and committed separately."""

    tasks: tuple[ShardTask, ...]  # one, or one per view where all views of an observation are encoded together

    @property
    def dataset(self) -> str:
        """Name of the dataset of its shards."""
        return self.tasks[0].dataset

    @property
    def name(self) -> str:
        """The dataset and its arrays, for messages."""
        return f"{self.dataset}/{'+'.join(task.array for task in self.tasks)}"

    @property
    def records(self) -> int:
        """Features that it writes: observations times views."""
        return sum(task.stop - task.start for task in self.tasks)


def units(tasks: Iterable[ShardTask], by_observation: bool) -> list[Unit]:
    """The units of work that make `tasks`, in their order.

    `by_observation`: all views of an observation are encoded together (`VisionLanguageEncoder.by_observation`), so that
    shards of the same dataset, variant and index form one unit.
    """
    groups: dict[tuple[str, int, int, str], list[ShardTask]] = {}
    for task in tasks:
        key = task.dataset, task.variant, task.index, "" if by_observation else task.view
        groups.setdefault(key, []).append(task)
    return [Unit(tuple(group)) for group in groups.values()]


@dataclass(frozen=True)
class DatasetTables:
    """Everything of a dataset but its vision features. N frames, n distinct instructions, Lt text tokens, D width,
    Dt width of text (D, unless features are taken before the projection into the language model).

    Actions and proprio are unified but NOT normalized; `*_rotation` marks the slots that normalization leaves alone.
    """

    action: np.ndarray  # [N, 128] float32
    action_mask: np.ndarray  # [128] bool
    action_rotation: np.ndarray  # [128] bool
    action_stats: Any  # Statistics
    proprio: np.ndarray  # [N, 128] float32
    proprio_mask: np.ndarray  # [128] bool
    proprio_rotation: np.ndarray  # [128] bool
    proprio_stats: Any  # Statistics
    timestamp: np.ndarray  # [N] float64 seconds
    text: np.ndarray  # [n, Lt, Dt] float16, rows as `DatasetPlan.instructions`
    text_length: np.ndarray  # [n] int64, tokens in use
    null_text: np.ndarray  # [Lt0, Dt] float16, the empty instruction
    null_features: dict[str, np.ndarray]  # view → [tokens, D] float16, a black frame
    embodiment: int  # embodiment id
    control_hz: float
    attributes: dict[str, Any] = field(default_factory=dict)  # JSON: action map, view sizes, license, …


def array_name(view: str, variant: int) -> str:
    """Name of the array of a view's images (variant 0) or of their k-th augmented variant."""
    return f"{view}.aug{variant}" if variant else view
