"""Settings of a build and of its workers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ...cache.store.feature_format import FeatureFormat
from ...cache.vlm.spec import EncoderSpec
from ...errors import UserError

SHARD_NBYTES = 256 << 20  # default size of a shard: large enough to stream, small enough to redo
SHARD_ROWS = 1 << 14  # and at most so many records, however small: each costs 16 bytes of index, in the last shard too


@dataclass(frozen=True)
class WorkerSpec:
    """Where shards are made. All zero or None: in this process."""

    count: int = 0  # worker processes: here, or jobs of the Slurm cluster; one per GPU where there are GPUs
    scheduler: str | None = None  # address of a running dask scheduler, e.g. tcp://head:8786
    slurm: str | None = None  # YAML file with the arguments of dask_jobqueue.SLURMCluster

    def __post_init__(self) -> None:
        if self.count < 0:
            raise UserError(f"--workers {self.count}: give the number of processes, 0 for none but this one")
        if self.scheduler and self.slurm:
            raise UserError("--scheduler and --slurm exclude each other: give one")
        if self.scheduler and "://" not in self.scheduler:
            raise UserError(f"--scheduler {self.scheduler}: give an address like tcp://host:8786")

    @property
    def active(self) -> bool:
        """Whether any worker is asked for."""
        return bool(self.count or self.scheduler or self.slurm)


@dataclass(frozen=True)
class BuildConfig:
    """What `dvla cache build` needs."""

    sources: tuple[str, ...]  # dataset folders or hub ids
    encoder: EncoderSpec  # which VLM, at which resolution, how many tokens
    out: Path  # cache folder
    batch_size: int = (
        64  # pictures per encoder call (all views, where these are encoded together); part of the fingerprint
    )
    # (it changes the last bits)
    shard_frames: int | None = None  # observations per shard file; None = about 256 MiB
    device: str = "auto"  # auto, cpu, cuda
    dataset_config: str | None = None  # YAML of the field map when none of the shipped ones fits
    format: FeatureFormat = field(default_factory=FeatureFormat)  # 16 or 8 bit, compressed or not
    frame_stride: int = 1  # features of every n-th frame; actions and proprio of all
    views: tuple[str, ...] = ()  # cameras to encode; () = all
    augment: int = 0  # augmented variants of every picture
    mode: str = "new"  # new; append: new episodes in a new generation; update: whatever changed
    workers: WorkerSpec = field(default_factory=WorkerSpec)


def check_settings(config: BuildConfig) -> None:
    """`UserError` for settings that no build can run with."""
    if config.mode not in ("new", "append", "update"):
        raise UserError(f"build mode '{config.mode}' is not one of new, append, update")
    if not config.sources and config.mode == "new":
        raise UserError("no source given; name at least one dataset folder or hub id")
    for option, value in (
        ("--batch-size", config.batch_size),
        ("--shard-frames", config.shard_frames),
        ("--frame-stride", config.frame_stride),
    ):
        if value is not None and value < 1:
            raise UserError(f"{option} {value}: give at least 1")
    if not 0 <= config.augment <= 64:
        raise UserError(f"--augment {config.augment}: give the number of augmented variants of each picture, 0 to 64")
