"""The layout of a cache folder: its Zarr v3 documents and its small tables.

Every array is sharded and, except for optional compression of the features, uncompressed, so a shard is contiguous
bytes and any Zarr library opens it:

    zarr.json                               root group, with consolidated metadata
    fingerprint.json  manifest.json  quarantine.jsonl
    <dataset>/features/<view>/c/<shard>/0/0 [observations, tokens, width] float16, int8, or uint8 holding float8_e4m3fn;
                                            one inner chunk = one observation = one frame in `frame_stride`, or of
                                            those the frames that the attribute "kept" names by episode
                                            (with a boundary: hidden states, of the vision tower one token per patch)
    <dataset>/features/<view>.aug<k>/…      the same images in their k-th augmented variant, k = 1 … variants
    <dataset>/scales/<view>[.aug<k>]/c/<shard>/0  [observations, tokens] float32, of 8-bit features
    channel_scale                           [width] float32, of 8-bit features
    <dataset>/{action,proprio,timestamp}    [frames, 128] or [frames]; a table is one shard
    <dataset>/{action_mask,proprio_mask}    [128] bool
    <dataset>/episodes/{start,length,id,instruction}  [episodes] int64
    <dataset>/text/{embedding,length}       [instructions, Lt, text width] float16, [instructions] int64
    <dataset>/null/<view>, <dataset>/null_text  features of a black frame and of an empty instruction
    .commits/<dataset>/tables.json, .commits/<dataset>/<array>/<shard>.json  what a builder has finished
    .lock                                   held by the one builder
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from ...common.documents import Count, Field, Form, OpenForm, Positive, open_regular, parse_json
from ...common.files import write_file
from ...errors import UserError
from ..actions.slots import UNIFIED_DIM
from .codec import Compression
from .feature_format import FeatureFormat
from .manifest import FINGERPRINT, QUARANTINE, Keys, json_bytes, read_document
from .plan import BuildPlan, DatasetPlan, DatasetTables, Range, ShardTask, array_name
from .shard_writer import ShardWriter, index_nbytes

TABLE_CHUNK_NBYTES = 1 << 20  # inner chunk of a table: about 1 MiB of rows
Layout = tuple[tuple[int | None, ...], str]  # of a table: shape (None: not known before it is read), dtype
_FILL: dict[str, float | int | bool] = {"float16": 0.0, "float32": 0.0, "float64": 0.0, "int64": 0, "int8": 0}
_FILL |= {"uint8": 0, "bool": False}
_DIMENSIONS = {
    "action": ("frame", "slot"),
    "proprio": ("frame", "slot"),
    "timestamp": ("frame",),
    "action_mask": ("slot",),
    "proprio_mask": ("slot",),
    "text/length": ("instruction",),
    "text/embedding": ("instruction", "text_token", "text_channel"),
    "null_text": ("null_text_token", "text_channel"),
}


_REPAIR = "run `dvla cache repair` on the cache"


class _Endian(Form):
    endian: Literal["little"]


class _Codec(Form):
    name: str
    configuration: dict[str, Any] = {}


class _Sharding(Form):
    chunk_shape: list[Positive]
    codecs: Annotated[list[_Codec], Field(min_length=1, max_length=2)]
    index_codecs: list[_Codec]
    index_location: Literal["end"]


class _Sharded(Form):
    name: Literal["sharding_indexed"]
    configuration: _Sharding


class _Shape(Form):
    chunk_shape: list[Positive]


class _Grid(Form):
    name: Literal["regular"]
    configuration: _Shape


class ArrayForm(Form):
    """What `array_document` makes."""

    zarr_format: Literal[3]
    node_type: Literal["array"]
    shape: Annotated[list[Positive], Field(min_length=1)]
    data_type: Literal["float16", "float32", "float64", "int64", "int8", "uint8", "bool"]
    fill_value: float | bool
    attributes: dict[str, Any]
    dimension_names: list[str]
    chunk_grid: _Grid
    chunk_key_encoding: _Codec
    codecs: Annotated[list[_Sharded], Field(min_length=1, max_length=1)]
    storage_transformers: list[_Codec] = []


_Vector = Annotated[list[float], Field(min_length=UNIFIED_DIM, max_length=UNIFIED_DIM)]
_Slots = list[Annotated[int, Field(ge=0, lt=UNIFIED_DIM)]]


class _Statistics(Form):
    mean: _Vector
    std: _Vector
    min: _Vector
    max: _Vector
    count: Positive
    quantiles: dict[Annotated[str, Field(pattern=r"^0\.\d{1,6}$")], _Vector] = {}


class Attributes(OpenForm):
    """What `dataset_attributes` makes; "quarantined" comes last. A build adds what it read the dataset with."""

    format: int
    views: Annotated[list[str], Field(min_length=1)]
    tokens: Positive
    width: Positive
    shard_frames: Positive
    frames: Positive
    frame_stride: Positive
    variants: Count
    dtype: str
    compression: str
    view_hashes: dict[str, list[str]] = {}
    embodiment: Count
    control_hz: Annotated[float, Field(gt=0)]
    instructions: Annotated[list[str], Field(min_length=1)]
    source_hashes: Annotated[list[str], Field(min_length=1)]
    action_stats: _Statistics
    proprio_stats: _Statistics
    action_rotation: _Slots
    proprio_rotation: _Slots
    kept: list[list[Range] | None] | None = None
    visible: list[Positive] | None = None
    null_visible: Positive | None = None
    image_tokens: Annotated[list[Count], Field(min_length=3, max_length=3)] | None = None
    quarantined: list[int] = []
    config: dict[str, Any] = {}
    encoder: dict[str, Any] = {}
    source: str = ""
    license: str = ""
    embodiment_name: str = ""
    dataset_config: str = ""
    selection: str = ""
    starts: list[Any] = []
    failed: list[int] = []
    left_out: Count = 0


class GroupForm(Form):
    """What `group_document` makes of a dataset."""

    zarr_format: Literal[3]
    node_type: Literal["group"]
    attributes: Attributes


def read_attributes(path: Path, dataset: str, manifest: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a finished cache records of a dataset besides its arrays. `UserError` as `read_document`."""
    name = f"{dataset}/zarr.json"
    found = parse_json(read_document(path, name, manifest), path / name, GroupForm, _REPAIR)["attributes"]
    return Keys(found, path / name)


def shard_names(task: ShardTask, quantized: bool) -> list[str]:
    """The files of a shard, relative to the cache."""
    names = [f"{task.dataset}/features/{task.array}/c/{task.index}/0/0"]
    return [*names, *([f"{task.dataset}/scales/{task.array}/c/{task.index}/0"] if quantized else [])]


def table_names(dataset: DatasetPlan) -> Iterator[str]:
    """The files of a dataset's tables, relative to the cache."""
    for name, (shape, _) in table_layouts(1, 1, 1, 1, 1, dataset.views).items():
        yield from (f"{dataset.name}/{name}/zarr.json", f"{dataset.name}/{name}/c/{'/'.join('0' * len(shape))}")


def file_names(plan: BuildPlan) -> Iterator[str]:
    """The files of a finished cache that its manifest lists."""
    yield from ("zarr.json", FINGERPRINT, QUARANTINE, *(CHANNEL_NAMES if plan.format.quantized else ()))
    for task in plan.tasks():
        yield from shard_names(task, plan.format.quantized)
    for dataset in plan.datasets:
        yield from table_names(dataset)
        yield from (f"{name}/zarr.json" for name in node_names(dataset, plan))


def node_names(dataset: DatasetPlan, plan: BuildPlan) -> Iterator[str]:
    """The names of a dataset's groups and feature arrays."""
    kinds = ("features", *(("scales",) if plan.format.quantized else ()))
    yield from (dataset.name, *(f"{dataset.name}/{group}" for group in (*kinds, "episodes", "text", "null")))
    arrays = [array_name(view, k) for view in dataset.views for k in range(plan.variants + 1)]
    yield from (f"{dataset.name}/{kind}/{array}" for kind in kinds for array in arrays)


CHANNELS = "channel_scale"  # the table of an 8-bit cache
CHANNEL_NAMES = (f"{CHANNELS}/zarr.json", f"{CHANNELS}/c/0")


def features_folder(root: Path, dataset: str, array: str) -> Path:
    """The array folder of one view's features, or of a variant of it."""
    return root / dataset / "features" / array


def scales_folder(root: Path, dataset: str, array: str) -> Path:
    """The array folder of the token scales that belong to 8-bit features."""
    return root / dataset / "scales" / array


def group_document(attributes: dict[str, Any] | None = None) -> dict[str, Any]:
    """A Zarr v3 group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes or {}}


def array_document(
    shape: tuple[int, ...],
    dtype: str,
    shard: tuple[int, ...],
    chunk: tuple[int, ...],
    dimensions: tuple[str, ...],
    compression: Compression | None = None,
    attributes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A Zarr v3 array: little endian, sharded, with an index and its crc32c at the end of each shard."""
    raw = {"name": "bytes", "configuration": {"endian": "little"}}
    inner = {"name": "bytes"} if dtype in ("bool", "int8", "uint8") else raw
    codecs = [inner, *(compression.document() if compression else [])]
    sharding = {
        "chunk_shape": list(chunk),
        "codecs": codecs,
        "index_codecs": [raw, {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "fill_value": _FILL[dtype],
        "attributes": attributes or {},
        "dimension_names": list(dimensions),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shard)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "storage_transformers": [],
    }


def features_document(rows: int, plan: BuildPlan) -> dict[str, Any]:
    """The array of one view's features."""
    tail, format = (plan.tokens, plan.width), plan.format
    attributes = {"encoding": format.dtype} if format.zarr_dtype != format.dtype else {}
    return array_document(
        (rows, *tail),
        format.zarr_dtype,
        (plan.shard_frames, *tail),
        (1, *tail),
        ("observation", "token", "channel"),
        record_compression(format),
        attributes,
    )


def scales_document(rows: int, plan: BuildPlan) -> dict[str, Any]:
    """The array of the token scales of one view's 8-bit features."""
    return array_document(
        (rows, plan.tokens), "float32", (plan.shard_frames, plan.tokens), (1, plan.tokens), ("observation", "token")
    )


def dataset_nodes(
    dataset: DatasetPlan, plan: BuildPlan, attributes: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, document) of a dataset's groups and feature arrays; those of its tables are written with them."""
    quantized = plan.format.quantized
    yield dataset.name, group_document(attributes)
    for group in ("features", "episodes", "text", "null", *(("scales",) if quantized else ())):
        yield f"{dataset.name}/{group}", group_document()
    rows = int(dataset.observations(plan.frame_stride).sum())
    for array in (array_name(view, k) for view in dataset.views for k in range(plan.variants + 1)):
        yield f"{dataset.name}/features/{array}", features_document(rows, plan)
        if quantized:
            yield f"{dataset.name}/scales/{array}", scales_document(rows, plan)


def root_document(nodes: dict[str, dict[str, Any]], version: int) -> dict[str, Any]:
    """The root group of a cache, with the consolidated metadata of all its groups and arrays."""
    consolidated = {"kind": "inline", "must_understand": False, "metadata": nodes}
    return {**group_document({"dvla": {"format": version}}), "consolidated_metadata": consolidated}


def dimensions_of(table: str) -> tuple[str, ...]:
    """The names of a table's dimensions."""
    return _DIMENSIONS.get(table, ("episode",) if table.startswith("episodes/") else ("token", "channel"))


def dataset_attributes(dataset: DatasetPlan, plan: BuildPlan, tables: DatasetTables) -> dict[str, Any]:
    """The attributes of a dataset's group that follow from its plan and tables."""
    hashes = {
        view: [e.view_hashes[i] for e in dataset.episodes if e.view_hashes] for i, view in enumerate(dataset.views)
    }
    kept = [None if e.kept is None else [list(r) for r in e.kept] for e in dataset.episodes]
    return {
        "format": plan.version,
        "views": list(dataset.views),
        "tokens": plan.tokens,
        "width": plan.width,
        "shard_frames": plan.shard_frames,
        "frames": dataset.frames,
        "frame_stride": plan.frame_stride,
        "variants": plan.variants,
        "dtype": plan.format.dtype,
        "compression": plan.format.compression,
        "view_hashes": hashes,
        "embodiment": int(tables.embodiment),
        "control_hz": float(tables.control_hz),
        "instructions": list(dataset.instructions),
        "source_hashes": [e.source_hash for e in dataset.episodes],
        "action_stats": tables.action_stats.to_dict(),
        "proprio_stats": tables.proprio_stats.to_dict(),
        "action_rotation": np.flatnonzero(tables.action_rotation).tolist(),
        "proprio_rotation": np.flatnonzero(tables.proprio_rotation).tolist(),
        **({"kept": kept} if any(ranges is not None for ranges in kept) else {}),
    }


def record_compression(format: FeatureFormat) -> Compression | None:
    """The compression of feature records, or None."""
    return None if format.compression == "none" else Compression(format.compression, format.itemsize)


def write_table(folder: Path, values: np.ndarray, dimensions: tuple[str, ...]) -> dict[Path, tuple[int, int]]:
    """Write a small array as one shard; returns path → (nbytes, crc32c) of its two files."""
    dtype = str(values.dtype)
    if dtype not in _FILL or values.ndim != len(dimensions) or values.size == 0:
        raise ValueError(f"{folder.name}: cannot store {values.shape} {dtype} with dimensions {dimensions}")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        where = np.argwhere(~np.isfinite(values))[0].tolist()
        raise UserError(f"table {folder} has a non-finite value at {where}; check the source data")
    rows = max(1, min(len(values), TABLE_CHUNK_NBYTES // (values.nbytes // len(values))))
    chunks = -(-len(values) // rows)
    tail = values.shape[1:]
    full = len(values) // rows * rows
    shard = folder.joinpath("c", *["0"] * values.ndim)
    with ShardWriter(shard, (rows, *tail), dtype, chunks) as writer:
        writer.append(values[:full])
        if full < len(values):  # an edge chunk is stored full size
            last = np.zeros((rows, *tail), dtype)
            last[: len(values) - full] = values[full:]
            writer.append(last)
        written = {shard: writer.commit()}
    document = array_document(values.shape, dtype, (chunks * rows, *tail), (rows, *tail), dimensions)
    written[folder / "zarr.json"] = write_file(folder / "zarr.json", json_bytes(document))
    return written


def open_table(root: Path, name: str, layout: Layout, manifest: Mapping[str, Any] | None = None) -> np.ndarray:
    """The array that `write_table` wrote to `root`/`name`, memory-mapped read-only.

    `UserError` when it is missing, of another size, or of another dtype or shape than `layout`: nothing else is mapped,
    for the file may come from a stranger.
    """
    where = root / name / "zarr.json"
    document = parse_json(read_document(root, f"{name}/zarr.json", manifest), where, ArrayForm, _REPAIR)
    shape = tuple(document["shape"])
    try:
        require_layout(shape, document["data_type"], layout)
        with open(open_regular(root.joinpath(name, "c", *["0"] * len(shape))), "rb") as file:
            found, wanted = os.fstat(file.fileno()).st_size, _table_nbytes(document, np.dtype(layout[1]).itemsize)
            if found != wanted:
                raise ValueError(f"{found} bytes, {wanted} were written")
            return np.memmap(file, layout[1], "r", shape=shape)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read table {root / name}: {reason}; run `dvla cache verify` on the cache") from None


def _table_nbytes(document: dict[str, Any], itemsize: int) -> int:
    """The size of a table's one shard. `ValueError` unless its chunks are blocks of rows."""
    sharding, shape = document["codecs"][0]["configuration"], document["shape"]
    chunk, shard = sharding["chunk_shape"], document["chunk_grid"]["configuration"]["chunk_shape"]
    chunks = -(-shape[0] // chunk[0]) if chunk else 0
    if not chunk or [chunks * chunk[0], *chunk[1:]] != shard or chunk[1:] != shape[1:] or len(sharding["codecs"]) != 1:
        raise ValueError(f"it says chunks {chunk} in shards {shard}")
    return math.prod(shard) * itemsize + index_nbytes(chunks)


def table_layouts(
    frames: int, episodes: int, instructions: int, tokens: int, width: int, views: Iterable[str]
) -> dict[str, Layout]:
    """The layout of every table of a dataset, by its path."""
    vectors, mask = ((frames, UNIFIED_DIM), "float32"), ((UNIFIED_DIM,), "bool")
    return {
        "action": vectors,
        "proprio": vectors,
        "action_mask": mask,
        "proprio_mask": mask,
        "timestamp": ((frames,), "float64"),
        # Of text, length and width follow from no setting: the width is `width`, unless features are taken before the
        # projection into the language model.
        "text/embedding": ((instructions, None, None), "float16"),
        "text/length": ((instructions,), "int64"),
        "null_text": ((None, None), "float16"),
        **{f"null/{view}": ((tokens, width), "float16") for view in views},
        **{f"episodes/{name}": ((episodes,), "int64") for name in ("start", "length", "id", "instruction")},
    }


def require_layout(shape: tuple[Any, ...], dtype: Any, layout: Layout) -> None:
    """`ValueError` for another shape or dtype than `layout`."""
    expected, name = layout
    fits = len(shape) == len(expected) and all(
        type(given) is int and (given >= 1 if wanted is None else given == wanted)
        for given, wanted in zip(shape, expected)
    )
    if not fits or dtype != name:
        wanted = ", ".join("any" if n is None else str(n) for n in expected)
        raise ValueError(f"it says {dtype} {list(shape)}, expected {name} [{wanted}]")
