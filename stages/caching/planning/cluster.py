"""What a cluster takes for stages one and two: hours, bytes, network, price, computed from a pilot on one machine.

Stage one: shards are handed out one at a time to W workers (`cache build --workers`, `--slurm`). Each decodes and
encodes at the same time, so that

    seconds = start + tables + max(rounds · shard, bytes read / source, bytes written / store),    rounds = ⌈shards / W⌉
    shard   = max(images · encode, images · decode / cores per worker) + overhead of a shard

Workers that share processors instead of having a device each (`Pool.devices` < W) start, and make a shard, W / devices
times as slowly. Stage two: samples/s is the least of what the GPUs train and what the network cards and the store
deliver; later epochs read local copies.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from ....common.config import configs_dir, from_mapping
from ....common.documents import read_yaml
from ....errors import UserError
from ..config import SHARD_NBYTES, SHARD_ROWS
from ..sizes import ROW_NBYTES
from .forecast import Forecast

GB, GIB = 1e9, 2**30
MEMORY = 0.8  # of a node's memory that may hold pages of a cache


@dataclass(frozen=True)
class Cluster:
    """What its parts can do; configs/launch/cluster.yaml describes each and its unit."""

    nodes: int
    gpus: int
    cores: int
    memory_gib: float
    source_read: float
    store_write: float
    store_read: float
    node_read: float
    local_read: float
    price_gpu_hour: float
    price_tb_month: float
    local_gib: float = 0.0
    start_seconds: float = 60.0
    shard_seconds: float = 0.2
    pictures_per_second: float | None = None
    samples_per_second: float | None = None

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus", "cores", "memory_gib", "source_read", "store_write", "store_read", "node_read"):
            if not getattr(self, name) > 0:
                raise UserError(f"cluster: {name} is {getattr(self, name)}; it must be above 0")
        for name in ("local_read", "local_gib", "start_seconds", "shard_seconds", "price_gpu_hour", "price_tb_month"):
            if not getattr(self, name) >= 0:
                raise UserError(f"cluster: {name} is {getattr(self, name)}; it must be at least 0")


@dataclass(frozen=True)
class Work:
    """Datasets to encode, and what one image of them costs. Seconds are those of one core or one device."""

    frames: int  # of all datasets
    images: float  # per frame: views, augmented variants, stride
    stored: float  # bytes of one image's features
    rows: float  # bytes of a frame's tables
    source: float  # bytes of one image in the dataset; 0: not known
    encode: float  # seconds per image
    decode: float  # seconds per image
    table: float  # seconds per frame, in the one process that writes the tables
    shard_frames: int  # frames of one view in a shard


@dataclass(frozen=True)
class Pool:
    """Who encodes. `devices`: how many of the workers can encode at the same time without slowing each other."""

    workers: int
    devices: float
    cores: float  # for each worker's decoding
    start: float  # seconds
    overhead: float  # seconds per shard
    source_read: float = math.inf  # bytes/s of all
    store_write: float = math.inf  # bytes/s of all


@dataclass(frozen=True)
class StageOne:
    """Seconds of each part as if it were alone, and of all together."""

    shards: int
    rounds: int  # of shards: how many a worker makes, at most
    start: float
    tables: float
    work: float  # of the rounds
    read: float
    write: float
    seconds: float
    binds: str  # the bottleneck: encode, decode, read, write, start or tables


@dataclass(frozen=True)
class ClusterForecast:
    """What `dvla cache plan --cluster` prints."""

    frames: int
    gpus: int
    bytes: int  # of the cache
    bytes_per_sample: int
    build: StageOne
    build_hours: float
    build_write: float  # bytes/s into the store while it builds
    build_cost: float  # USD
    storage_cost: float  # USD a month
    first_epoch: float  # samples/s
    later_epochs: float  # samples/s, from local copies or memory where these hold the cache
    train_binds: str  # the bottleneck of the first epoch: model, network card or store
    train_read: float  # bytes/s from the store in the first epoch
    epoch_hours: float  # of a later epoch
    epoch_cost: float  # USD
    model: float | None  # samples/s of all GPUs, where it is known


def stage_one(work: Work, pool: Pool) -> StageOne:
    """Seconds of one build, by the formula above."""
    images = work.frames * work.images
    shards = math.ceil(work.frames / work.shard_frames) * max(1, round(work.images))
    rounds = math.ceil(shards / pool.workers)
    crowd = max(1.0, min(pool.workers, shards) / pool.devices)
    encode, decode = (images / shards * x for x in (work.encode * crowd, work.decode / pool.cores))
    spent = rounds * (max(encode, decode) + pool.overhead * crowd)
    read = images * work.source / pool.source_read
    write = (images * work.stored + work.frames * work.rows) / pool.store_write
    tables, start = work.frames * work.table, pool.start * max(1.0, pool.workers / pool.devices)
    parts = {"encode" if encode >= decode else "decode": spent, "read": read, "write": write}
    longest = {**parts, "start": start, "tables": tables}
    return StageOne(
        shards,
        rounds,
        start,
        tables,
        spent,
        read,
        write,
        start + tables + max(parts.values()),
        max(longest, key=lambda name: longest[name]),
    )


def work_of(found: Forecast, frames: int | None, shard_frames: int | None) -> Work:
    """The pilot's datasets, or `frames` frames like theirs. `shard_frames`: as in the build; None: its default."""
    stored = sum(v.bytes for v in found.views) / found.measured.compression / max(1, found.pictures)
    shard_frames = shard_frames or max(1, min(SHARD_ROWS, int(SHARD_NBYTES / stored)))
    return Work(
        frames or found.frames,
        found.pictures / max(1, found.frames),
        stored,
        ROW_NBYTES,
        0.0,
        found.measured.encode,
        found.seconds["decode"] / max(1, found.pictures),
        found.seconds["tables"] / max(1, found.frames),
        shard_frames,
    )


def cluster_forecast(work: Work, cluster: Cluster, *, model: float | None = None) -> ClusterForecast:
    """Both stages on the cluster. `model`: samples/s of one GPU in training, where the cluster's file does not say."""
    gpus = cluster.nodes * cluster.gpus
    encode = 1 / cluster.pictures_per_second if cluster.pictures_per_second else work.encode
    work = dataclasses.replace(work, encode=encode)
    build = stage_one(
        work,
        Pool(
            gpus,
            gpus,
            cluster.cores / cluster.gpus,
            cluster.start_seconds,
            cluster.shard_seconds,
            cluster.nodes * cluster.source_read * GB,
            cluster.store_write * GB,
        ),
    )
    sample = work.images * work.stored
    nbytes = work.frames * (sample + work.rows)
    one = cluster.samples_per_second or model
    trained = None if one is None else one * gpus
    ways = {"network card": cluster.nodes * cluster.node_read * GB / sample, "store": cluster.store_read * GB / sample}
    first = min([*ways.values(), *([trained] if trained else [])])
    # Any node reads any sample, so each must hold the whole cache to read nothing twice.
    in_memory, on_disk = (nbytes <= room * GIB for room in (MEMORY * cluster.memory_gib, cluster.local_gib))
    later = first
    if in_memory or on_disk:
        local = math.inf if in_memory else cluster.nodes * cluster.local_read * GB / sample
        best = min(local, trained or math.inf)
        later = max(first, best) if math.isfinite(best) else first  # what the GPUs train is not known
    binds = "model" if trained and trained <= min(ways.values()) else min(ways, key=lambda name: ways[name])
    hours, epoch = build.seconds / 3600, work.frames / later / 3600
    return ClusterForecast(
        work.frames,
        gpus,
        int(nbytes),
        round(sample),
        build,
        hours,
        nbytes / max(build.seconds, 1e-9),
        hours * gpus * cluster.price_gpu_hour,
        nbytes / 1e12 * cluster.price_tb_month,
        first,
        later,
        binds,
        first * sample,
        epoch,
        epoch * gpus * cluster.price_gpu_hour,
        trained,
    )


def read_cluster(name_or_file: str) -> Cluster:
    """A YAML file, or the shipped one: "cluster". `UserError`."""
    if name_or_file.endswith((".yaml", ".yml")):
        return from_mapping(Cluster, read_yaml(Path(name_or_file)), name_or_file)
    if name_or_file != "cluster":
        raise UserError(
            f"--cluster {name_or_file}: give a YAML file (a copy of configs/launch/cluster.yaml with your numbers), or "
            "'cluster' for the shipped one"
        )
    return from_mapping(Cluster, read_yaml(configs_dir() / "launch" / "cluster.yaml"), "cluster")
