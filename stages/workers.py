"""Building with many processes: dask hands one shard at a time to workers that load the model once.

Only this module imports dask. The file system is the truth: a worker commits its shards itself, so a lost worker, scheduler or parent
loses nothing but the shards it was in the middle of. Letters: D feature width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..cache.layout import BuildPlan, ShardTask
from ..errors import UserError
from ..settings import load_yaml
from .shard_job import Earlier, Timing, run_shard

if TYPE_CHECKING:
    from ..cache.dataset_config import DatasetConfig
    from ..cache.encoder import EncoderSpec, VisionLanguageEncoder
    from ..cache.readers import Source
    from .build import BuildConfig

AHEAD = 2       # shards handed to each worker at a time: one in work, one waiting


@dataclass(frozen=True)
class WorkerSpec:
    """Where shards are made. All zero or None: in this process."""

    count: int = 0                      # worker processes: here, or jobs of the Slurm cluster; one per GPU where there are GPUs
    scheduler: str | None = None        # address of a running dask scheduler, e.g. tcp://head:8786
    slurm: str | None = None            # YAML file with the arguments of dask_jobqueue.SLURMCluster

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


def run_with_workers(config: BuildConfig, encoder: EncoderSpec, sources: Sequence[Source], path: Path, plan: BuildPlan,
                     tasks: Sequence[ShardTask], channels: np.ndarray | None, earlier: Path | None) -> Iterator[tuple[ShardTask, Timing]]:
    """(task, timing) of each shard as it is committed under `path`, which every worker must see under the same name."""
    from distributed import Client, as_completed

    with contextlib.ExitStack() as stack:
        cluster = _cluster(config.workers, stack)
        try:
            client = stack.enter_context(Client(cluster, timeout=30, set_as_default=False))
        except OSError as error:
            raise UserError(f"no dask scheduler answers at {config.workers.scheduler} ({error}); start one with `dask scheduler`") from None
        opened = {s.name: (s.location, dataclasses.replace(s.config, views=s.view_names)) for s in sources}
        job = client.scatter(Job(encoder, config.device, config.batch_size, opened, path.absolute(), plan, channels,
                                 earlier.absolute() if earlier else None), broadcast=True)
        waiting = list(reversed(tasks))
        width = max(1, config.workers.count, len(client.scheduler_info()["workers"]))
        running = as_completed([client.submit(make_shard, job, waiting.pop(), pure=False) for _ in range(min(len(waiting), AHEAD * width))],
                               loop=client.loop)
        for future in running:
            yield future.result()       # raises what the worker raised: UserError for what stops the build
            if waiting:
                running.add(client.submit(make_shard, job, waiting.pop(), pure=False))


@dataclass(frozen=True)
class Job:
    """What a worker needs to know once, whatever the number of its shards."""

    encoder: EncoderSpec
    device: str
    batch_size: int
    sources: dict[str, tuple[str, DatasetConfig]]   # dataset → where it is, how it is read
    path: Path
    plan: BuildPlan
    channels: np.ndarray | None
    earlier: Path | None


def make_shard(job: Job, task: ShardTask) -> tuple[ShardTask, Timing]:
    """Runs in a worker: make and commit one shard. The model and the sources are loaded on the worker's first shard."""
    from ..cache.writer import CacheWriter

    encoder, sources, earlier = _load(job)
    writer = CacheWriter(job.path, job.plan, None)      # the parent holds the lock
    return task, run_shard(writer, task, sources[task.dataset], encoder, job.batch_size, job.channels, earlier)


_loaded: list[tuple[Any, Any]] = []     # the newest (key, value), in each worker process


def _load(job: Job) -> tuple[VisionLanguageEncoder, dict[str, Source], Earlier]:
    from ..cache.encoder import load_encoder
    from ..cache.readers import open_source
    from ..cache.store import Cache
    from .build import pick_device

    key = job.encoder, job.device, job.path, job.earlier, tuple(job.sources)
    if not _loaded or _loaded[0][0] != key:
        sources = {name: open_source(location, config) for name, (location, config) in job.sources.items()}
        earlier = Earlier(Cache.open(job.earlier) if job.earlier else None)
        _loaded[:] = [(key, (load_encoder(job.encoder, pick_device(_device(job.device))), sources, earlier))]
    return _loaded[0][1]


def _device(asked: str) -> str:
    """One GPU per worker: workers are numbered, and take the GPUs in turn."""
    import torch
    from distributed import get_worker

    if asked not in ("auto", "cuda") or not torch.cuda.is_available():
        return asked
    name = get_worker().name
    return f"cuda:{name % torch.cuda.device_count()}" if isinstance(name, int) else "cuda:0"


def _cluster(spec: WorkerSpec, stack: contextlib.ExitStack) -> Any:
    import dask

    # a lost worker's shard is tried again, but a shard that kills every worker must not go on for ever
    stack.enter_context(dask.config.set({"distributed.scheduler.allowed-failures": 5, "distributed.worker.daemon": True}))
    if spec.scheduler:
        return spec.scheduler
    if spec.slurm:
        try:
            from dask_jobqueue import SLURMCluster
        except ImportError:
            raise UserError("--slurm needs dask-jobqueue; pip install 'dvla[slurm]'") from None
        try:
            cluster = stack.enter_context(SLURMCluster(**{"processes": 1, **load_yaml(Path(spec.slurm))}))
        except (TypeError, ValueError) as error:
            raise UserError(f"{spec.slurm} does not describe a Slurm cluster: {error}; see configs/launch/slurm.yaml") from None
        cluster.scale(jobs=max(1, spec.count))
        return cluster
    from distributed import LocalCluster

    cores = max(1, (os.cpu_count() or 1) // spec.count)
    environment = {"OMP_NUM_THREADS": str(cores)}
    return stack.enter_context(LocalCluster(n_workers=spec.count, threads_per_worker=1, processes=True, dashboard_address=None,
                                            memory_limit=0, silence_logs=40, env=environment))
