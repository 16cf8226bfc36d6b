"""Runs lists of `dvla` commands, in order or several at a time, for `demo`, `cotrain` and `ablate`.

`run_in_order` notes what has finished in `OUT/progress.json`, so that an interrupted list resumes; `run_side_by_side`
runs jobs that are finished once their products exist. Both end the processes at work when they are interrupted.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape

from ...common.documents import Form, json_bytes, read_json
from ...common.files import write_file
from ...errors import UserError

Command = tuple[str, ...]


class _Progress(Form):
    """progress.json: the commands, and the seconds of those that have finished."""

    road: list[list[list[str]]]
    seconds: dict[str, float]


POLL = 0.5  # seconds between checks of the running jobs


@dataclass(frozen=True)
class Job:
    """`dvla` commands that belong together: a step of the demo, a cell of an ablation."""

    name: str
    commands: tuple[Command, ...]  # run one after the other
    beside: tuple[Command, ...] = ()  # run meanwhile, each in a process of its own
    products: tuple[Path, ...] = ()  # the job has finished once all of them exist; none: once progress.json lists it
    purpose: str = ""  # one line that is printed above the commands

    @property
    def finished(self) -> bool:
        return bool(self.products) and all(product.exists() for product in self.products)


class Running:
    """A job at work: its commands one after the other, each in its own process, their output appended to one log."""

    def __init__(
        self, name: str, commands: Sequence[Command], environment: Mapping[str, str], log: Path | None
    ) -> None:
        """`log` None: the commands print where this process prints."""
        self.name, self.log, self.began = name, log, time.perf_counter()
        self._left, self._environment = list(commands), environment
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
        self._start()

    def _start(self) -> None:
        command = self._left.pop(0)
        with open(self.log, "a") if self.log else contextlib.nullcontext() as output:
            if output is not None:
                output.write(f"$ dvla {shlex.join(command)}\n")
                output.flush()
            self.process = subprocess.Popen(
                command_line(command),
                env=self._environment,
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
            )

    def poll(self) -> int | None:
        """Exit code once all commands have ended or one has failed; None while at work."""
        code = self.process.poll()
        if code == 0 and self._left:
            self._start()
            return None
        return code

    def wait(self) -> int:
        """The exit code, when it is there."""
        while (code := self.process.wait()) == 0 and self._left:
            self._start()
        return code

    def last_line(self) -> str:
        """What the log ends with: the reason of a failure."""
        return "".join(self.log.read_text().strip().splitlines()[-1:]) if self.log else ""


def command_line(command: Sequence[str]) -> list[str]:
    """`dvla COMMAND…` as this interpreter runs it."""
    return [sys.executable, "-m", f"{__package__.partition('.')[0]}.cli", *command]


def stop(running: Sequence[Running]) -> None:
    """End what still runs: training saves a checkpoint, and resumes next time."""
    for one in running:
        if one.process.poll() is None:
            one.process.terminate()
    for one in running:
        one.process.wait()


def options(**values: Any) -> Command:
    """Keywords as command-line options: `from_cache="c"` → `--from-cache c`; a list or tuple repeats its option."""
    return tuple(
        word
        for name, value in values.items()
        for one in (value if isinstance(value, (list, tuple)) else [value])
        for word in (f"--{name.replace('_', '-')}", str(one))
    )


def split_options(where: str, text: str, reserved: Sequence[str], owner: str) -> Command:
    """The words of a string of options that the user gave in `where`.

    Raises:
        UserError: for quotes that do not match, or an option in `reserved`, which the command `owner` sets itself.
    """
    try:
        found = tuple(shlex.split(text))
    except ValueError as error:
        raise UserError(f"{where} {text!r}: {error}") from None
    for word in found:
        if word.split("=")[0] in reserved:
            raise UserError(f"{where} {text!r}: {word.split('=')[0]} is set by `{owner}` itself; leave it out")
    return found


def announce(job: Job, say: Callable[..., None]) -> None:
    """Print what the job is for, and its commands as one would type them."""
    say("")
    if job.purpose:
        say(f"[cyan]{escape(job.purpose)}[/cyan]")
    *meanwhile, last = (*job.commands, *job.beside)
    for command in meanwhile:
        say(f"[bold]$ dvla {escape(shlex.join(command))} &[/bold]")
    say(f"[bold]$ dvla {escape(shlex.join(last))}[/bold]")


def run_in_order(
    out: Path, jobs: Sequence[Job], run: Callable[[list[str]], None], say: Callable[..., None], what: str
) -> dict[str, float]:
    """Announce every job, and run those that `progress.json` does not list; `run` runs one command in this process.

    Returns:
        Seconds by job.

    Raises:
        UserError: when `out` holds something else than this `what`, or a command beside another one fails.
    """
    seconds = _progress(out, jobs, what)
    for job in jobs:
        announce(job, say)
        if job.name in seconds:
            say(f"already done, in {seconds[job.name]:.0f} s")
            continue
        began = time.perf_counter()
        _run_together(job, out, run, what)
        seconds[job.name] = time.perf_counter() - began
        _note(out, jobs, seconds)
    return seconds


def _run_together(job: Job, out: Path, run: Callable[[list[str]], None], what: str) -> None:
    """The job's commands in this process, those beside them in processes that log to `<out>/<name>.log`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # a core for each
    beside: list[Running] = []
    try:
        for command in job.beside:
            beside.append(Running(command[0], [command], environment, out / f"{Path(command[-1]).name}.log"))
        for command in job.commands:
            run(list(command))
        for one in beside:
            if code := one.wait():
                raise UserError(
                    f"dvla {one.name} failed with exit code {code} ({one.last_line():.80}); "
                    f"see {one.log}, then rerun the {what} to resume"
                )
    finally:
        stop(beside)


def run_side_by_side(
    jobs: Iterable[Job],
    most: int,
    logs: Path,
    environment: Mapping[str, str],
    check: Callable[[], None],
    ended: Callable[[Running, int, int], None],
) -> None:
    """Run jobs, at most `most` at a time, each with a log in `logs`; an exception ends those at work.

    `check()` is called between polls and may raise; `ended(job, exit code, jobs left)` after each job, failed ones too.
    """
    waiting = list(jobs)
    running: list[Running] = []
    try:
        while waiting or running:
            check()
            while waiting and len(running) < most:
                job = waiting.pop(0)
                running.append(Running(job.name, job.commands, environment, logs / f"{job.name}.log"))
            for one in list(running):
                if (code := one.poll()) is not None:
                    running.remove(one)
                    ended(one, code, len(waiting) + len(running))
            time.sleep(POLL)
    finally:
        stop(running)


def _progress(out: Path, jobs: Sequence[Job], what: str) -> dict[str, float]:
    """Seconds of the jobs finished before; makes the folder."""
    path = out / "progress.json"
    if path.exists():
        before = read_json(path, _Progress, f"delete it to begin the {what} anew")
        if before["road"] != _commands(jobs):
            raise UserError(f"{out} holds a {what} with other settings; choose another --out")
        return before["seconds"]
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} holds other files; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    _note(out, jobs, {})
    return {}


def _note(out: Path, jobs: Sequence[Job], seconds: dict[str, float]) -> None:
    write_file(out / "progress.json", json_bytes({"road": _commands(jobs), "seconds": seconds}))


def _commands(jobs: Sequence[Job]) -> list[list[list[str]]]:
    return [[list(command) for command in (*job.commands, *job.beside)] for job in jobs]
