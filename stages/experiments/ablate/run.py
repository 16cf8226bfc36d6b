"""`dvla ablate`: run a recipe's cells, several side by side, and keep a table of what is finished. See ablate_recipe.py for the folder.

What is done is seen in the folder: a cell is finished when its evaluations are there, and a training that was interrupted goes on.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.markup import escape

from ....cache.store.manifest import MANIFEST
from ....common import fingerprint as fp
from ....common.files import hold, json_bytes, read_json, write_file
from ....common.signals import terminable
from ....common.text import duration
from ....errors import UserError
from ...simulation.envs import check_environment
from ..runner import start, stop
from .recipe import Cell, Recipe, cells, preparation, rows
from .table import training_seconds, write

POLL = 0.5  # seconds between looks at the running cells
PREPARED = ("data", "cache")  # what may be there before: demonstrations and a cache that were made by hand


def ablate(
    recipe: Recipe,
    out: Path,
    jobs: int,
    from_cache: str | None,
    say: Callable[..., None],
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Record, build, train and evaluate what is missing, `jobs` cells at a time; returns what results.json holds.

    `UserError` for a folder that holds something else or the results of another recipe (the differences are named), and at the end where a
    cell failed; the others are run all the same.
    """
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: give at least 1")
    for env in recipe.environments:
        check_environment(env)
    todo = cells(recipe, out, from_cache)
    settings = begin(recipe, out, from_cache)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    with _alone(out), terminable() as check:
        if from_cache is None:
            for product, command in preparation(recipe, out, jobs):
                if not product.exists():
                    _prepare(command, environment, say)
        write(recipe, out, settings)
        failed = _run_all(todo, out, jobs, environment, say, progress, lambda: write(recipe, out, settings), check)
    found = write(recipe, out, settings)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(todo)} cells failed: {', '.join(failed)}; see {out}/logs, then run the same command again"
        )
    return found


def begin(recipe: Recipe, out: Path, from_cache: str | None) -> dict[str, Any]:
    """Make the folder, or see that it holds the same recipe; returns what recipe.json holds.

    Cells do not depend on each other, so rows and seeds may be added to what was begun, or left out; what a row is may not change.
    """
    common = {k: v for k, v in asdict(recipe).items() if k not in ("variants", "axes")}
    settings = {
        **common,
        "seeds": list(recipe.seeds),
        "from_cache": from_cache,
        "rows": {name: asdict(row) for name, row in rows(recipe).items()},
    }
    path = out / "recipe.json"
    if path.exists():
        before = read_json(path)
        known = before["rows"].keys() & settings["rows"].keys()
        was, now = (
            {
                **{k: v for k, v in one.items() if k not in ("title", "seeds")},
                "rows": {name: one["rows"][name] for name in known},
            }
            for one in (before, settings)
        )
        if lines := fp.diff(was, now, was="it has", now="now asked"):
            raise UserError(
                f"{out} was begun with another recipe: {'; '.join(lines[:6])}. Choose another --out, or repeat its settings"
            )
        settings["rows"] = {**before["rows"], **settings["rows"]}
    elif out.exists() and any(
        p.name not in PREPARED and not p.name.startswith(("vlm-", "cache-", ".")) for p in out.iterdir()
    ):
        raise UserError(f"{out} holds other files; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_file(path, json_bytes(settings))
    return settings


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Two at once in one folder would train the same cells."""
    with open(out / ".lock", "ab") as file:
        hold(file, f"another process is at work in {out}")
        yield


def _prepare(command: tuple[str, ...], environment: dict[str, str], say: Callable[..., None]) -> None:
    say(f"[bold]$ dvla {escape(shlex.join(command))}[/bold]")
    process = start(command, environment)
    try:
        code = process.wait()
    finally:
        stop([process])
    if code:
        raise (
            KeyboardInterrupt
            if code == 130
            else UserError(f"dvla {' '.join(command[:2])} stopped with exit code {code}; what it said stands above")
        )


class _Job:
    """A cell at work: its commands one after the other, each in a process of its own, what they print in one log."""

    def __init__(self, cell: Cell, log: Path, environment: dict[str, str]) -> None:
        self.cell, self.log, self.began = cell, log, time.perf_counter()
        self._environment = environment
        log.parent.mkdir(parents=True, exist_ok=True)
        self._left = [command for command in cell.commands if command[0] != "eval" or not Path(command[-1]).exists()]
        self._start()

    def _start(self) -> None:
        command = self._left.pop(0)
        with open(self.log, "a") as output:
            output.write(f"$ dvla {shlex.join(command)}\n")
            output.flush()
            self.process = start(command, self._environment, output)

    def ended(self) -> int | None:
        """Exit code when all commands are done or one has failed; None while at work."""
        code = self.process.poll()
        if code == 0 and self._left:
            self._start()
            return None
        return code


def _run_all(
    todo: list[Cell],
    out: Path,
    jobs: int,
    environment: dict[str, str],
    say: Callable[..., None],
    progress: Callable[[str, int, int], None],
    note: Callable[[], Any],
    check: Callable[[], None],
) -> list[str]:
    """Run the cells that are not done, in order; returns the names of those that failed."""
    waiting = [cell for cell in todo if not all(product.exists() for product in cell.products)]
    done, failed, times = len(todo) - len(waiting), [], []
    running: list[_Job] = []
    if done:
        say(f"{done} of {len(todo)} cells were done before")
    progress("cells", done, len(todo))
    try:
        while waiting or running:
            check()
            while waiting and len(running) < jobs:
                cell = waiting.pop(0)
                running.append(_Job(cell, out / "logs" / f"{cell.name}.log", environment))
            for job in [job for job in running if job.ended() is not None]:
                running.remove(job)
                took = time.perf_counter() - job.began
                if code := job.process.returncode:
                    failed.append(job.cell.name)
                    last = "".join(job.log.read_text().strip().splitlines()[-1:])
                    say(
                        f"[red]{escape(job.cell.name)} failed with exit code {code}: {escape(last)}; see {escape(str(job.log))}[/red]"
                    )
                    continue
                done += 1
                times.append(took)
                note()
                progress("cells", done, len(todo))
                left = fmean(times) * (len(waiting) + len(running)) / jobs
                say(
                    f"{job.cell.name}: {duration(took)}; {done} of {len(todo)} cells"
                    + (f", about {duration(left)} left" if waiting or running else "")
                )
            time.sleep(POLL)
    finally:
        stop([job.process for job in running])
    return failed


def outline(
    recipe: Recipe, out: Path, jobs: int, from_cache: str | None
) -> tuple[list[tuple[str, str, list[str]]], str]:
    """What would run: (name, state, commands) of every step, and a line with an estimate from the cells that are finished here, if any."""
    steps = (
        []
        if from_cache
        else [
            (product.name if product.name != MANIFEST else product.parent.name, product.exists(), [command])
            for product, command in preparation(recipe, out, jobs)
        ]
    )
    todo = cells(recipe, out, from_cache)
    done = [cell for cell in todo if all(product.exists() for product in cell.products)]
    steps += [(cell.name, cell in done, list(cell.commands)) for cell in todo]
    trainings = sum(command[0] == "train" for cell in todo for command in cell.commands)
    rollouts = sum(
        recipe.episodes * len(recipe.environments) * command.count("--compare")
        + recipe.episodes * len(recipe.environments)
        for cell in todo
        for command in cell.commands
        if command[0] == "eval"
    )
    line = f"{len(todo)} cells: {trainings} trainings, {rollouts} rollouts; {len(done)} done."
    times = [_seconds(out, cell) for cell in done]
    if times and len(done) < len(todo):
        line += f" A finished cell took {duration(fmean(times))}: about {duration(fmean(times) * (len(todo) - len(done)) / jobs)} left with --jobs {jobs}."
    elif not done:
        line += " How long they take is known when the first ones are finished; `dvla train --dry-run` with a cell's options tells its speed."
    return [
        (name, "done" if state else "to do", [shlex.join(command) for command in commands])
        for name, state, commands in steps
    ], line


def _seconds(out: Path, cell: Cell) -> float:
    """How long a finished cell's training and evaluations took."""
    summaries = [read_json(path) for product in cell.products for path in [next(product.rglob("summary.json"))]]
    return sum(s["seconds"] for s in summaries) + sum(
        training_seconds(Path(c[-1])) for c in cell.commands if c[0] == "train"
    )
