"""The dask cluster behind a build with many processes: on this machine, of a running scheduler, or of Slurm jobs.

Only this module, slurm_cluster.py and workers.py import dask (its `distributed`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any

from ...errors import UserError
from .slurm_cluster import slurm_cluster, watched

if TYPE_CHECKING:
    from .config import WorkerSpec

DEATHS = (
    3  # workers that one unit may kill, twice, before the build gives up; also workers that may die while they start
)
WAIT_SECONDS = 60  # for the first worker of a running scheduler
KEEP_SECONDS = 1  # between checks for workers that are lost for good


@contextlib.contextmanager
def client_of(spec: WorkerSpec) -> Iterator[Any]:
    """A client of the workers asked for. Failures that dask would log are raised as errors instead."""
    import dask
    from distributed import Client

    settings = {
        "distributed.scheduler.allowed-failures": DEATHS - 1,
        "distributed.worker.daemon": True,
        "distributed.comm.timeouts.connect": 30,
        "distributed.nanny.pre-spawn-environ": {
            "OMP_NUM_THREADS": max(1, (os.cpu_count() or 1) // max(1, spec.count)),
            "DASK_LOGGING__DISTRIBUTED": "critical",
        },
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(dask.config.set(settings))
        stack.enter_context(_same_environment())
        stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        stack.enter_context(_quiet())
        with _interrupts_for_this_thread_only():
            cluster = _cluster(spec, stack)
            try:
                client = stack.enter_context(Client(cluster, timeout=30, set_as_default=False))
            except (OSError, ValueError) as error:  # ValueError: no such kind of address
                raise UserError(
                    f"cannot connect to a dask scheduler at {spec.scheduler} ({error}); start one with `dask scheduler`"
                ) from None
            if spec.slurm:
                stack.enter_context(watched(cluster, client, max(1, spec.count)))
        if spec.scheduler:
            try:
                client.wait_for_workers(1, timeout=WAIT_SECONDS)
            except TimeoutError:
                raise UserError(
                    f"the dask scheduler at {spec.scheduler} has no worker; start some with "
                    f"`dask worker {spec.scheduler} --nthreads 1`"
                ) from None
        # on the way out: a second Ctrl-C waits until everything is closed
        stack.callback(signal.pthread_sigmask, signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        yield client


def _cluster(spec: WorkerSpec, stack: contextlib.ExitStack) -> Any:
    if spec.scheduler:
        return spec.scheduler
    if spec.slurm:
        return slurm_cluster(spec.slurm, max(1, spec.count), stack)
    return _local_cluster(spec.count, stack)


def _local_cluster(count: int, stack: contextlib.ExitStack) -> Any:
    """Workers on this machine.

    dask replaces a worker that dies, but gives up when the replacement dies while it starts; it is started anew here.
    """
    from distributed import LocalCluster
    from distributed.core import Status
    from tornado.ioloop import PeriodicCallback

    for _ in range(DEATHS):
        with contextlib.suppress(RuntimeError):  # a first worker died while it started; dask has closed the others
            cluster = stack.enter_context(
                LocalCluster(
                    n_workers=count,
                    threads_per_worker=1,
                    processes=True,
                    memory_limit=0,
                    dashboard_address=":0",  # any free port; a fixed one warns when it is taken
                    silence_logs=logging.CRITICAL,
                )
            )
            break
    else:
        raise UserError(
            f"give fewer --workers, and rerun the same command to resume: workers ended while they started ({DEATHS} "
            "times; out of memory? see the system's log)"
        )

    def replace_lost() -> None:
        if cluster.status == Status.running:
            for name, nanny in list(cluster.workers.items()):
                if nanny.status in (Status.closed, Status.failed):
                    del cluster.workers[name]
            cluster.scale(count)

    keeper = PeriodicCallback(replace_lost, KEEP_SECONDS * 1000)
    cluster.loop.add_callback(keeper.start)
    stack.callback(cluster.loop.add_callback, keeper.stop)
    return cluster


@contextlib.contextmanager
def _interrupts_for_this_thread_only() -> Iterator[None]:
    """Only the main thread acts on Ctrl-C, which reaches every process of the terminal's foreground group.

    Threads started in here, and the workers they start at any time, never see it; one that comes now is delivered at
    the end.
    """
    resource_tracker.ensure_running()  # it unblocks signals when it starts by itself
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _same_environment() -> Iterator[None]:
    """Undo what dask sets in this process's environment for its workers."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("distributed", "tornado", "tornado.application", "asyncio")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before):
            logger.setLevel(level)
