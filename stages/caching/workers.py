"""Building with many processes: dask hands one `plan.Unit` at a time to workers that load the model once.

The file system is the truth: a worker reads the plan from the cache's fingerprint and commits its shards itself, so a
lost worker, scheduler or parent loses nothing but the shards it was in the middle of. Each worker has sources of its
own: what the parent hashed for the plan is hashed once more by each worker, and only in the views that it encodes.
Letters: D feature width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import threading
import uuid
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.store.manifest import is_begun, read_fingerprint
from ...cache.store.plan import BuildPlan, Unit
from ...common import fingerprint as fp
from ...errors import UserError
from .dask_cluster import client_of
from .generations import Earlier
from .pipeline import Timing, run_unit

if TYPE_CHECKING:
    from ...cache.readers import Source
    from ...cache.readers.config import DatasetConfig
    from ...cache.vlm.encoder import VisionLanguageEncoder
    from ...cache.vlm.spec import EncoderSpec
    from .config import BuildConfig


@dataclass(frozen=True)
class Job:
    """What a worker needs to know besides the plan, which is in the cache. Small: it is sent with every unit."""

    key: str  # of this run of the build; workers load model and sources once per key
    encoder: EncoderSpec
    device: str
    batch_size: int
    sources: dict[str, tuple[str, DatasetConfig]]  # dataset → where it is, how it is read
    path: Path
    channels: np.ndarray | None  # [D] float32, of an 8-bit cache
    earlier: Path | None


def run_with_workers(
    config: BuildConfig,
    encoder: EncoderSpec,
    sources: Sequence[Source],
    path: Path,
    units: Sequence[Unit],
    channels: np.ndarray | None,
    earlier: Path | None,
) -> Generator[tuple[Unit, Timing], None, None]:
    """(unit, timing) of each as its shards are committed under `path`, which every worker must see under the same name.

    Close it (`contextlib.closing`) to stop early. `UserError`: as inline, and for a unit that no worker survives.
    """
    from distributed import as_completed

    opened = {s.name: (s.location, dataclasses.replace(s.config, views=s.view_names)) for s in sources}
    job = Job(
        uuid.uuid4().hex,
        encoder,
        config.device,
        config.batch_size,
        opened,
        path.absolute(),
        channels,
        earlier.absolute() if earlier else None,
    )
    with client_of(config.workers) as client:
        waiting, running = list(reversed(units)), as_completed([], loop=client.loop)
        handed: dict[str, Unit] = {}  # by the key of its future
        # Blamed once: workers that die at once pass a unit on, which is blamed for all of them.
        again: set[Unit] = set()

        def hand_out() -> None:
            """One unit per worker, new ones included. More would share the blame when a worker dies."""
            workers = max(1, config.workers.count, len(client.nthreads()))
            while waiting and len(handed) < workers:
                future = client.submit(make_unit, job, waiting[-1], pure=False)
                handed[future.key] = waiting.pop()
                running.add(future)

        try:
            hand_out()
            for future in running:
                unit = handed.pop(future.key)
                if (unit not in again) and _killed(future):
                    again.add(unit)
                    waiting.append(unit)
                    hand_out()
                    continue
                timing = _result(future, unit)
                hand_out()
                yield unit, timing
        finally:
            if handed:  # an error or an interruption: shards in work are dropped at their next batch
                with contextlib.suppress(Exception):  # of a worker that is gone: so is its shard
                    client.run(_drop, job.key, wait=False)


def _killed(future: Any) -> bool:
    from distributed import KilledWorker

    return isinstance(future.exception(), KilledWorker) if future.status == "error" else False


def _result(future: Any, unit: Unit) -> Timing:
    from concurrent.futures import CancelledError

    from distributed import KilledWorker

    where = f"shard {unit.tasks[0].index} of {unit.name}"
    try:
        result = future.result()
    except KilledWorker as error:
        raise UserError(
            f"{where} killed {error.allowed_failures + 1} workers one after another, twice (out of memory? see the "
            "system's log); give a smaller --batch-size or more memory, and rerun the same command"
        ) from None
    except CancelledError:
        raise UserError(f"the dask scheduler was lost during {where}; rerun the same command to resume") from None
    if isinstance(result, UserError):
        raise result
    return result


class _Dropped(Exception):
    """The build that asked for the unit has ended."""


_loaded: list[tuple[str, Any]] = []  # the newest (job key, what it needs), in each worker process
_loading = threading.Lock()
_dropped: set[str] = set()  # keys of builds that have ended


def make_unit(job: Job, unit: Unit) -> Timing | UserError:
    """Make and commit the shards of one unit. The model and the sources are loaded on the worker's first one. A
    `UserError` is returned, since dask would print the traceback of a raised one."""
    from ...cache.store.writer import CacheWriter

    def require_wanted(records: int) -> None:
        if job.key in _dropped:
            raise _Dropped

    try:
        require_wanted(0)
        with _loading:
            plan, encoder, sources, earlier = _load(job)
        writer = CacheWriter(job.path, plan, None)  # the parent holds the lock
        return run_unit(
            writer, unit, sources[unit.dataset], encoder, job.batch_size, job.channels, earlier, require_wanted
        )
    except UserError as error:
        return error
    except _Dropped:
        return Timing()


async def _drop(key: str) -> None:  # in the worker's event loop, beside the unit's threads
    _dropped.add(key)


def _load(job: Job) -> tuple[BuildPlan, VisionLanguageEncoder, dict[str, Source], Earlier]:
    from ...cache.readers import open_source
    from ...cache.store.cache import Cache
    from ...cache.vlm.load import load_encoder
    from ...common.device import pick_device

    if not is_begun(job.path):
        raise UserError(
            f"worker on {socket.gethostname()} does not see {job.path}; give an --out that all workers share"
        )
    if not _loaded or _loaded[0][0] != job.key:
        fingerprint = read_fingerprint(job.path)
        encoder = load_encoder(job.encoder, pick_device(_device(job.device)))
        if lines := fp.diff(fingerprint["encoder"], encoder.fingerprint(), "the build has", "it has"):
            raise UserError(
                f"worker on {socket.gethostname()} has another encoder than the build: {'; '.join(lines[:6])}; give "
                "all workers the same checkpoint, dvla version and kind of device"
            )
        sources = {name: open_source(location, config) for name, (location, config) in job.sources.items()}
        earlier = Earlier(Cache.open(job.earlier) if job.earlier else None)
        _loaded[:] = [(job.key, (BuildPlan.from_document(fingerprint["store"]), encoder, sources, earlier))]
    return _loaded[0][1]


def _device(asked: str) -> str:
    """One GPU per worker: workers are numbered, and take the GPUs in turn."""
    import torch
    from distributed import get_worker

    if asked not in ("auto", "cuda") or not torch.cuda.is_available():
        return asked
    name = get_worker().name
    return f"cuda:{name % torch.cuda.device_count()}" if isinstance(name, int) else "cuda:0"
