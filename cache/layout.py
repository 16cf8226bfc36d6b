"""What lies where in a cache folder: the plan of a build, the Zarr v3 documents, and the small tables.

Every array is sharded and, but for an option of the features, uncompressed, so a shard is contiguous bytes (see shard.py) and any
Zarr library opens it:

    zarr.json                                  root group, with consolidated metadata
    fingerprint.json  manifest.json  quarantine.jsonl
    <dataset>/features/<view>/c/<shard>/0/0    [observations, tokens, width] float16, int8, or uint8 holding float8_e4m3fn;
                                               one inner chunk = one observation = one frame in `frame_stride`
                                               (with a boundary: of hidden states inside the vision tower, one token a patch)
    <dataset>/features/<view>.aug<k>/…         the same pictures in their k-th augmented variant, k = 1 … variants
    <dataset>/scales/<view>[.aug<k>]/c/<shard>/0    [observations, tokens] float32, of 8-bit features
    channel_scale                              [width] float32, of 8-bit features
    <dataset>/{action,proprio,timestamp}       [frames, 128] or [frames]; a table is one shard
    <dataset>/{action_mask,proprio_mask}       [128] bool
    <dataset>/episodes/{start,length,id,instruction}     [episodes] int64
    <dataset>/text/{embedding,length}          [instructions, Lt, text width] float16, [instructions] int64
    <dataset>/null/<view>, <dataset>/null_text           features of a black frame and of an empty instruction
    .commits/<dataset>/tables.json, .commits/<dataset>/<array>/<shard>.json    what a builder has finished (array: view or variant)
    .lock                                      held by the one builder
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .codec import Compression, FeatureFormat
from .shard import ShardWriter, write_file

FORMAT = 2                          # version of everything in this file
TABLE_CHUNK_NBYTES = 1 << 20        # inner chunk of a table: about 1 MiB of rows
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VARIANT = re.compile(r".*\.aug\d+")
_DTYPES = {"float16": 0.0, "float32": 0.0, "float64": 0.0, "int64": 0, "int8": 0, "uint8": 0, "bool": False}   # name → fill value


@dataclass(frozen=True)
class EpisodePlan:
    """One episode that gets rows in the cache."""

    episode_id: int
    length: int             # frames, ≥ 1
    instruction: str        # may be empty
    source_hash: str        # changes when the episode's source bytes change
    view_hashes: tuple[str, ...] = ()   # per view: changes when that of which its features are made changes, and only then


@dataclass(frozen=True)
class DatasetPlan:
    """One dataset: its episodes in row order, its cameras, and the episodes left out because they cannot be loaded."""

    name: str                                       # letters, digits, . _ -
    views: tuple[str, ...]                          # camera names; their order is the order in a batch
    episodes: tuple[EpisodePlan, ...]
    quarantined: tuple[tuple[int, str], ...] = ()   # (episode id, reason): no rows, only a line in the ledger

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
        return -(-np.array([e.length for e in self.episodes], np.int64) // stride)

    @cached_property
    def instructions(self) -> tuple[str, ...]:
        """The distinct instructions in order of first use: rows of the text table."""
        return tuple(dict.fromkeys(e.instruction for e in self.episodes))


@dataclass(frozen=True)
class BuildPlan:
    """The whole content's shape. It is part of the fingerprint, so a resumed build must be given the same plan."""

    datasets: tuple[DatasetPlan, ...]
    tokens: int             # vision tokens per frame and view
    width: int              # feature width
    shard_frames: int       # S, observations in one shard
    format: FeatureFormat = field(default_factory=FeatureFormat)
    frame_stride: int = 1   # every n-th frame of an episode gets features; actions and proprio are kept for all
    variants: int = 0       # augmented variants of every picture besides the picture itself

    def tasks(self) -> list[ShardTask]:
        """All shards, in dataset, view, variant and row order."""
        size, out = self.shard_frames, []
        for d in self.datasets:
            rows = int(d.observations(self.frame_stride).sum())
            out += [ShardTask(d.name, view, i, start, min(start + size, rows), variant) for view in d.views
                    for variant in range(self.variants + 1) for i, start in enumerate(range(0, rows, size))]
        return out

    def check(self) -> None:
        """Raise `UserError` for what the layout cannot hold."""
        if not self.datasets or min(self.tokens, self.width, self.shard_frames, self.frame_stride) < 1 or self.variants < 0:
            raise UserError("a cache needs at least one dataset, tokens, width, shard frames and frame stride of at least 1, and "
                            "0 or more augmented variants")
        names = [d.name for d in self.datasets]
        for name in [*names, *(v for d in self.datasets for v in d.views)]:
            if not _NAME.fullmatch(name) or name.endswith(".json") or _VARIANT.fullmatch(name):
                raise UserError(f"'{name}' cannot name a dataset or view in a cache; use letters, digits, . _ and - (and no "
                                "ending like .json or .aug1)")
        for kind, given in [("dataset", names)] + [(f"view of {d.name}", list(d.views)) for d in self.datasets]:
            for name in given:
                if given.count(name) > 1:
                    raise UserError(f"{kind} '{name}' is given twice; names must differ")
        for dataset in self.datasets:
            if not dataset.views or not dataset.episodes or min(e.length for e in dataset.episodes) < 1:
                raise UserError(f"dataset '{dataset.name}' has no view, no readable episode, or an empty episode")
            if len({e.episode_id for e in dataset.episodes}) != len(dataset.episodes):
                raise UserError(f"dataset '{dataset.name}' lists an episode id twice")

    def document(self) -> dict[str, Any]:
        """The plan's part of the fingerprint (key "store")."""
        return {"format": FORMAT, "tokens": self.tokens, "width": self.width, "shard_frames": self.shard_frames,
                "dtype": self.format.dtype, "compression": self.format.compression, "frame_stride": self.frame_stride,
                "variants": self.variants, "order": [d.name for d in self.datasets],
                "datasets": {d.name: {"views": d.views, "quarantined": [list(q) for q in d.quarantined],
                                      "episodes": {str(e.episode_id): {"length": e.length, "instruction": e.instruction,
                                                                       "source_hash": e.source_hash,
                                                                       "view_hashes": list(e.view_hashes)}
                                                   for e in d.episodes},
                                      "episode_order": [e.episode_id for e in d.episodes]} for d in self.datasets}}

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> BuildPlan:
        """Inverse of `document`, also after a round trip through JSON: the plan of the cache whose fingerprint holds it."""
        def dataset(name: str) -> DatasetPlan:
            d = document["datasets"][name]
            episodes = ((number, d["episodes"][str(number)]) for number in d["episode_order"])
            return DatasetPlan(name, tuple(d["views"]), tuple(EpisodePlan(n, e["length"], e["instruction"], e["source_hash"],
                                                                          tuple(e["view_hashes"])) for n, e in episodes),
                               tuple((number, reason) for number, reason in d["quarantined"]))
        return cls(tuple(map(dataset, document["order"])), document["tokens"], document["width"], document["shard_frames"],
                   FeatureFormat(document["dtype"], document["compression"]), document["frame_stride"], document["variants"])


@dataclass(frozen=True)
class ShardTask:
    """One shard file to write: observations `start … stop-1` of one view of one dataset, in shard `index`."""

    dataset: str
    view: str
    index: int
    start: int
    stop: int
    variant: int = 0    # 0: the pictures themselves; k: their k-th augmented variant

    @property
    def array(self) -> str:
        """Name of the array it belongs to."""
        return array_name(self.view, self.variant)


@dataclass(frozen=True)
class Unit:
    """One unit of building: the shards that one pass of the encoder makes. Each of them is written and committed for itself."""

    tasks: tuple[ShardTask, ...]    # one; of the same observations of several views where these are encoded together

    @property
    def dataset(self) -> str:
        """Name of the dataset that all its shards are of."""
        return self.tasks[0].dataset

    @property
    def name(self) -> str:
        """For people: the dataset and its arrays."""
        return f"{self.dataset}/{'+'.join(task.array for task in self.tasks)}"

    @property
    def records(self) -> int:
        """Features it writes: observations times views."""
        return sum(task.stop - task.start for task in self.tasks)


def units(tasks: Iterable[ShardTask], by_observation: bool) -> list[Unit]:
    """The units of work that make `tasks`, in their order. `by_observation`: all views of an observation are encoded together
    (`VisionLanguageEncoder.by_observation`), so that shards of the same dataset, variant and index belong together."""
    groups: dict[tuple[str, int, int, str], list[ShardTask]] = {}
    for task in tasks:
        groups.setdefault((task.dataset, task.variant, task.index, "" if by_observation else task.view), []).append(task)
    return [Unit(tuple(group)) for group in groups.values()]


@dataclass(frozen=True)
class DatasetTables:
    """Everything of a dataset but its vision features. N frames, n distinct instructions, Lt text tokens, D width,
    Dt width of text (D, unless features are taken before the projection into the language model).

    Actions and proprio are unified but NOT normalised; `*_stats` are `Statistics` of normalize.py and `*_rotation`
    marks the slots that normalisation leaves alone.
    """

    action: np.ndarray                      # [N, 128] float32
    action_mask: np.ndarray                 # [128] bool
    action_rotation: np.ndarray             # [128] bool
    action_stats: Any                       # Statistics
    proprio: np.ndarray                     # [N, 128] float32
    proprio_mask: np.ndarray                # [128] bool
    proprio_rotation: np.ndarray            # [128] bool
    proprio_stats: Any                      # Statistics
    timestamp: np.ndarray                   # [N] float64 seconds
    text: np.ndarray                        # [n, Lt, Dt] float16, rows as `DatasetPlan.instructions`
    text_length: np.ndarray                 # [n] int64, tokens in use
    null_text: np.ndarray                   # [Lt0, Dt] float16, the empty instruction
    null_features: dict[str, np.ndarray]    # view → [tokens, D] float16, a black frame
    embodiment: int                         # embodiment id
    control_hz: float
    attributes: dict[str, Any] = field(default_factory=dict)    # JSON: action map, view sizes, licence, …


def array_name(view: str, variant: int) -> str:
    """Name of the array of a view's pictures (variant 0) or of their k-th augmented variant."""
    return f"{view}.aug{variant}" if variant else view


def features_folder(root: Path, dataset: str, array: str) -> Path:
    """The array folder of one view's features, or of a variant of it."""
    return root / dataset / "features" / array


def scales_folder(root: Path, dataset: str, array: str) -> Path:
    """The array folder of the token scales that belong to 8-bit features."""
    return root / dataset / "scales" / array


def commit_file(root: Path, dataset: str, array: str | None = None, index: int = 0) -> Path:
    """The commit record of one shard, or of a dataset's tables when `array` is None."""
    folder = root / ".commits" / dataset
    return folder / "tables.json" if array is None else folder / array / f"{index}.json"


def json_bytes(document: dict[str, Any]) -> bytes:
    """Readable JSON with a fixed byte form."""
    return (json.dumps(document, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """One of a cache's JSON files; `UserError` when it cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; is this a whole cache? run `dvla cache verify` on it") from None


def group_document(attributes: dict[str, Any] | None = None) -> dict[str, Any]:
    """A Zarr v3 group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes or {}}


def array_document(shape: tuple[int, ...], dtype: str, shard: tuple[int, ...], chunk: tuple[int, ...],
                   dimensions: tuple[str, ...], compression: Compression | None = None,
                   attributes: dict[str, Any] | None = None) -> dict[str, Any]:
    """A Zarr v3 array: little endian, sharded, index with crc32c at the end of each shard; chunks compressed or not."""
    raw = {"name": "bytes", "configuration": {"endian": "little"}}
    inner = {"name": "bytes"} if dtype in ("bool", "int8", "uint8") else raw
    codecs = [inner, *(compression.document() if compression else [])]
    sharding = {"chunk_shape": list(chunk), "codecs": codecs, "index_codecs": [raw, {"name": "crc32c"}],
                "index_location": "end"}
    return {"zarr_format": 3, "node_type": "array", "shape": list(shape), "data_type": dtype,
            "fill_value": _DTYPES[dtype], "attributes": attributes or {}, "dimension_names": list(dimensions),
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shard)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}], "storage_transformers": []}


def features_document(rows: int, plan: BuildPlan) -> dict[str, Any]:
    """The array of one view's features."""
    tail, format = (plan.tokens, plan.width), plan.format
    attributes = {"encoding": format.dtype} if format.zarr_dtype != format.dtype else {}
    return array_document((rows, *tail), format.zarr_dtype, (plan.shard_frames, *tail), (1, *tail),
                          ("observation", "token", "channel"), record_compression(format), attributes)


def scales_document(rows: int, plan: BuildPlan) -> dict[str, Any]:
    """The array of the token scales of one view's 8-bit features."""
    return array_document((rows, plan.tokens), "float32", (plan.shard_frames, plan.tokens), (1, plan.tokens), ("observation", "token"))


def record_compression(format: FeatureFormat) -> Compression | None:
    """The compression of feature records; None where they are stored as they are."""
    return None if format.compression == "none" else Compression(format.compression, format.itemsize)


def write_table(folder: Path, values: np.ndarray, dimensions: tuple[str, ...]) -> dict[Path, tuple[int, int]]:
    """Write a small array as one shard; returns path → (nbytes, crc32c) of its two files."""
    dtype = str(values.dtype)
    if dtype not in _DTYPES or values.ndim != len(dimensions) or values.size == 0:
        raise ValueError(f"{folder.name}: cannot store {values.shape} {dtype} with dimensions {dimensions}")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        where = np.argwhere(~np.isfinite(values))[0].tolist()
        raise UserError(f"table {folder} holds a value that is not finite at {where}; check the source data")
    rows = max(1, min(len(values), TABLE_CHUNK_NBYTES // (values.nbytes // len(values))))
    chunks = -(-len(values) // rows)
    tail = values.shape[1:]
    whole = len(values) // rows * rows
    shard = folder.joinpath("c", *["0"] * values.ndim)
    with ShardWriter(shard, (rows, *tail), dtype, chunks) as writer:
        writer.append(values[:whole])
        if whole < len(values):     # an edge chunk is stored full size
            last = np.zeros((rows, *tail), dtype)
            last[:len(values) - whole] = values[whole:]
            writer.append(last)
        written = {shard: writer.commit()}
    document = array_document(values.shape, dtype, (chunks * rows, *tail), (rows, *tail), dimensions)
    written[folder / "zarr.json"] = write_file(folder / "zarr.json", json_bytes(document))
    return written


def open_table(folder: Path) -> np.ndarray:
    """The array `write_table` wrote, memory-mapped read-only; `UserError` when it is missing or too short."""
    try:
        document = json.loads((folder / "zarr.json").read_bytes())
        return np.memmap(folder.joinpath("c", *["0"] * len(document["shape"])), document["data_type"], "r",
                         shape=tuple(document["shape"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read table {folder}: {error}; run `dvla cache verify` on the cache") from None
