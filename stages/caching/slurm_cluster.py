"""Workers of a build as Slurm jobs. dask-jobqueue submits them, and again when a connected worker is lost; jobs that
Slurm refuses, and jobs that end before their worker connects, are noticed and submitted again here."""

from __future__ import annotations

import contextlib
import getpass
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...common.documents import read_yaml
from ...common.packages import missing_package
from ...common.signals import handled
from ...common.text import first_line, slurm_errors
from ...errors import UserError

ATTEMPTS = 3  # of each job, in a row and without a worker, before the build gives up
CHECK_SECONDS, LONGEST_SECONDS = 2, 60  # between checks; twice as long after each that found something


def slurm_cluster(file: str, jobs: int, stack: contextlib.ExitStack) -> Any:
    """A dask cluster whose workers are `jobs` Slurm jobs as `file` describes them. `UserError` without Slurm."""
    try:
        # its import sets a handler with which Ctrl-C would end the build with code 0
        with handled(signal.default_int_handler, (signal.SIGINT,)):
            from dask_jobqueue import SLURMCluster
    except ImportError:
        raise missing_package("dask-jobqueue", "--slurm", "slurm") from None
    arguments = read_yaml(Path(file))
    try:
        cluster = SLURMCluster(**{"processes": 1, **arguments, "job_cls": _job_class(SLURMCluster.job_cls)})
    except Exception as error:  # whatever dask and dask-jobqueue make of a value
        raise UserError(
            f"{file} does not describe a Slurm cluster: {first_line(error).split('. ')[0].rstrip(':')}; "
            "see configs/launch/slurm.yaml"
        ) from None
    stack.enter_context(cluster)
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not installed; run this on a machine that can submit Slurm jobs")
    # unlike scale(), it submits lost jobs again
    cluster.adapt(minimum_jobs=jobs, maximum_jobs=jobs)
    return cluster


def _job_class(base: type) -> type:
    from distributed.deploy.spec import ProcessInterface

    class Job(base):  # type: ignore[misc]
        """A job that says why it was refused, instead of raising it where nobody hears it."""

        refusal: str | None = None

        async def start(self) -> None:
            with self.job_file() as file:
                try:
                    self.job_id = self._job_id_from_submit_output(await self._submit_job(file))
                except (RuntimeError, ValueError, OSError) as error:
                    self.refusal = slurm_errors(str(error)) or first_line(error)
            await ProcessInterface.start(self)

        async def close(self) -> None:
            await super().close()
            await ProcessInterface.close(self)

    return Job


@contextlib.contextmanager
def watched(cluster: Any, client: Any, jobs: int) -> Iterator[None]:
    """Have lost jobs submitted again. When that is no use, all units are cancelled and the block ends with a
    `UserError` that says why."""
    stop, said = threading.Event(), list[str]()
    thread = threading.Thread(target=_watch, args=(cluster, client, jobs, stop, said), daemon=True, name="dvla-slurm")
    thread.start()
    try:
        yield
    except UserError as error:
        raise (UserError(said[0]) if said else error) from None
    finally:
        stop.set()
        thread.join()


def _watch(cluster: Any, client: Any, jobs: int, stop: threading.Event, said: list[str]) -> None:
    from distributed import Future

    failures, accepted, pause = 0, False, CHECK_SECONDS
    while not stop.wait(pause):
        if said:
            client.cancel([Future(key, client) for key in list(client.futures)])
            continue
        submitted = dict(cluster.workers)
        accepted |= any(job.job_id for job in submitted.values())
        connected = [str(worker.name) for worker in list(cluster.scheduler.workers.values())]
        lost = _lost(submitted, connected)
        failures = 0 if connected else failures + len(lost)
        pause = min(2 * pause, LONGEST_SECONDS) if lost else CHECK_SECONDS
        last = submitted[lost[-1]] if lost else None
        if last is not None and not connected and (failures >= ATTEMPTS * jobs or (last.refusal and not accepted)):
            said.append(
                f"Slurm refused a worker's job: {last.refusal}; change the file of --slurm and rerun"
                if last.refusal
                else f"{failures} Slurm jobs ended before their worker connected; see the log of job {last.job_id} "
                f"({Path(last.log_directory or '.') / f'*{last.job_id}.*'}) and rerun"
            )
            pause = 0
        for name in lost:
            cluster.loop.add_callback(cluster.workers.pop, name, None)  # which has it submitted again


def _lost(submitted: dict[str, Any], connected: list[str]) -> list[str]:
    """Names of the jobs that were refused, or are not queued any more and have no worker; none while squeue fails."""
    waiting = {
        name: job
        for name, job in submitted.items()
        if not any(worker == name or worker.startswith(f"{name}-") for worker in connected)
    }
    if not waiting:
        return []
    command = ["squeue", "--noheader", "--format=%A", f"--user={getpass.getuser()}"]
    try:
        queued = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return [name for name, job in waiting.items() if job.refusal]
    return [name for name, job in waiting.items() if job.refusal or job.job_id and job.job_id not in queued]
