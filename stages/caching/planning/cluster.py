"""What a cluster takes for stages one and two: hours, bytes, network, price. Arithmetic alone, from what a pilot measured on one machine.

Stage one: shards are handed out one at a time to W workers (cache build --workers, --slurm), each of which decodes and encodes side by side, so that

    seconds = start + tables + max(rounds · shard, bytes read / source, bytes written / store),    rounds = ⌈shards / W⌉
    shard   = max(pictures · encode, pictures · decode / cores per worker) + overhead of a shard

Where workers share processors instead of having a device each (`Pool.devices` < W), they start, and make a shard, W / devices times as slowly.
Stage two: samples/s is the least of what the GPUs train, the nodes' network cards and the store deliver, and of the local copies once they are made.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from ....common.config import configs_dir, from_mapping, load_yaml
from ....errors import UserError
from ..config import SHARD_NBYTES, SHARD_ROWS
from ..sizes import ROW_NBYTES
from .forecast import Forecast

GB, GIB = 1e9, 2**30
MEMORY = 0.8  # of a node's memory that may hold pages of a cache


@dataclass(frozen=True)
class Cluster:
    """What its parts can do; see configs/launch/cluster.yaml, which says the units."""

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
    """A corpus to encode, and what one picture of it costs. Seconds are those of one core or one device."""

    frames: int  # of all datasets
    pictures: float  # a frame: views, augmented variants, stride
    stored: float  # bytes of one picture's features
    rows: float  # bytes of a frame's tables
    source: float  # bytes of one picture where the dataset lies; 0: not known
    encode: float  # seconds a picture
    decode: float  # seconds a picture
    table: float  # seconds a frame, in the one process that writes the tables
    shard_frames: int  # frames of one view in a shard


@dataclass(frozen=True)
class Pool:
    """Who encodes. `devices`: how many of the workers can encode at the same time without slowing each other."""

    workers: int
    devices: float
    cores: float  # for each worker's decoding
    start: float  # seconds
    overhead: float  # seconds a shard
    source_read: float = math.inf  # bytes/s of all
    store_write: float = math.inf  # bytes/s of all


@dataclass(frozen=True)
class StageOne:
    """Seconds of the parts as if each were alone, and together."""

    shards: int
    rounds: int  # of shards: how many a worker makes, at most
    start: float
    tables: float
    work: float  # of the rounds
    read: float
    write: float
    seconds: float
    binds: str  # the longest of them: encode, decode, read, write, start or tables


@dataclass(frozen=True)
class ClusterForecast:
    """What `dvla cache plan --cluster` tells."""

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
    later_epochs: float  # samples/s, where copies or memory hold what has been read
    train_binds: str  # of the first epoch: model, network card or store
    train_read: float  # bytes/s from the store in the first epoch
    epoch_hours: float  # of a later one
    epoch_cost: float  # USD
    model: float | None  # samples/s of all GPUs, where it is known


def stage_one(work: Work, pool: Pool) -> StageOne:
    """Of one build. Letters of the formula are the file's."""
    pictures = work.frames * work.pictures
    shards = math.ceil(work.frames / work.shard_frames) * max(1, round(work.pictures))
    rounds = math.ceil(shards / pool.workers)
    crowd = max(1.0, min(pool.workers, shards) / pool.devices)
    encode, decode = (pictures / shards * x for x in (work.encode * crowd, work.decode / pool.cores))
    spent = rounds * (max(encode, decode) + pool.overhead * crowd)
    read, write = (
        pictures * work.source / pool.source_read,
        (pictures * work.stored + work.frames * work.rows) / pool.store_write,
    )
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
    """The pilot's corpus, or one of `frames` frames like it. `shard_frames`: as of the build, None: its default."""
    pictures = found.pictures / max(1, found.frames)
    total = frames or found.frames
    stored = sum(v.bytes for v in found.views) / found.measured.compression / max(1, found.pictures)
    shard_frames = shard_frames or max(1, min(SHARD_ROWS, int(SHARD_NBYTES / stored)))
    return Work(
        total,
        pictures,
        stored,
        ROW_NBYTES,
        0.0,
        found.measured.encode,
        found.seconds["decode"] / max(1, found.pictures),
        found.seconds["tables"] / max(1, found.frames),
        shard_frames,
    )


def cluster_forecast(work: Work, cluster: Cluster, *, model: float | None = None) -> ClusterForecast:
    """`model`: samples/s of one GPU's training, where the cluster's file does not say."""
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
    sample = work.pictures * work.stored
    nbytes = work.frames * (sample + work.rows)
    one = cluster.samples_per_second or model
    trained = None if one is None else one * gpus
    ways = {"network card": cluster.nodes * cluster.node_read * GB / sample, "store": cluster.store_read * GB / sample}
    first = min([*ways.values(), *([trained] if trained else [])])
    # Samples of an epoch come to any node, so that each must hold the whole cache to read nothing twice.
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
        return from_mapping(Cluster, load_yaml(Path(name_or_file)), name_or_file)
    if name_or_file != "cluster":
        raise UserError(
            f"--cluster {name_or_file}: give a YAML file, or cluster for the shipped configs/launch/cluster.yaml (copy it, and put in your numbers)"
        )
    return from_mapping(Cluster, load_yaml(configs_dir() / "launch" / "cluster.yaml"), "cluster")
