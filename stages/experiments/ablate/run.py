"""`dvla ablate`: runs a recipe's cells, several side by side, and keeps a table of those that have finished.

What is done shows in the folder, which recipe.py describes: a cell has finished when its evaluations exist, and an
interrupted training resumes.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.markup import escape

from ....common import fingerprint as fp
from ....common.documents import Form, json_bytes, read_json
from ....common.files import hold, write_file
from ....common.progress import Progress
from ....common.signals import terminable
from ....common.text import duration
from ....errors import UserError
from ...policy.evaluation import read_summary
from ...simulation.envs import check_environment
from ..runner import Job, Running, announce, run_side_by_side, stop
from .recipe import Recipe, cells, preparation, rows
from .table import training_seconds, write


class _Begun(Form):
    """recipe.json: a recipe with its rows spelled out."""

    title: str = ""
    environments: dict[str, int] = {}
    record: str = ""
    vlm: str | None = None
    cache: str = ""
    train: str = ""
    eval: str = ""
    blind: str | None = None
    seeds: list[int] = []
    episodes: int = 1
    from_cache: str | None = None
    rows: dict[str, dict[str, str | None]]


PREPARED = ("data", "cache")  # what a new folder may hold already: demonstrations and a cache made by hand


def ablate(
    recipe: Recipe,
    out: Path,
    jobs: int,
    from_cache: str | None,
    say: Callable[..., None],
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Record, build, train and evaluate what is missing, `jobs` cells at a time.

    Returns:
        What results.json holds.

    Raises:
        UserError: for a folder that holds something else or the results of another recipe (the differences are named),
            and at the end where a cell failed; the others run all the same.
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
        for job in preparation(recipe, out, jobs) if from_cache is None else ():
            if not job.finished:
                announce(job, say)
                _prepare(job, environment)
        found = write(recipe, out, settings)
        waiting = [cell for cell in todo if not cell.finished]
        done = len(todo) - len(waiting)
        failed: list[str] = []
        times: list[float] = []
        if done:
            say(f"{done} of {len(todo)} cells were already complete")
        progress("cells", done, len(todo))

        def ended(cell: Running, code: int, left: int) -> None:
            nonlocal found
            if code:
                failed.append(cell.name)
                reason = f"{cell.name} failed with exit code {code}: {cell.last_line()}; see {cell.log}"
                say(f"[red]{escape(reason)}[/red]")
                return
            times.append(time.perf_counter() - cell.began)
            found = write(recipe, out, settings)
            progress("cells", done + len(times), len(todo))
            rest = f", about {duration(fmean(times) * left / jobs)} left" if left else ""
            say(f"{cell.name}: {duration(times[-1])}; {done + len(times)} of {len(todo)} cells{rest}")

        run_side_by_side(map(_missing, waiting), jobs, out / "logs", environment, check, ended)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(todo)} cells failed; see {out}/logs, then rerun the same command to resume. "
            f"Failed: {', '.join(failed)}"
        )
    return found


def begin(recipe: Recipe, out: Path, from_cache: str | None) -> dict[str, Any]:
    """Make the folder, or check that it holds the same recipe.

    Cells do not depend on each other, so rows and seeds may be added or left out; a row's settings may not change.

    Returns:
        What recipe.json holds.
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
        before = read_json(path, _Begun, "choose another --out, or restore it")
        known = before["rows"].keys() & settings["rows"].keys()
        was, now = (
            {
                **{k: v for k, v in one.items() if k not in ("title", "seeds")},
                "rows": {name: one["rows"][name] for name in known},
            }
            for one in (before, settings)
        )
        if lines := fp.diff(was, now, was="folder has", now="you requested"):
            raise UserError(
                f"{out} was begun with another recipe; choose another --out, or repeat its settings: "
                f"{'; '.join(lines[:6])}"
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
    """Hold the folder's lock: two processes at once would train the same cells."""
    with open(out / ".lock", "ab") as file:
        hold(file, f"another process is working in {out}")
        yield


def _prepare(job: Job, environment: dict[str, str]) -> None:
    """Run a job in the foreground."""
    running = Running(job.name, job.commands, environment, log=None)
    try:
        code = running.wait()
    finally:
        stop([running])
    if code == 130:
        raise KeyboardInterrupt
    if code:
        name = " ".join(job.commands[0][:2])
        raise UserError(f"dvla {name} failed with exit code {code}; its messages are above")


def _missing(cell: Job) -> Job:
    """The cell without the evaluations that exist; its training runs again, which finds its own checkpoint."""
    return replace(cell, commands=tuple(c for c in cell.commands if c[0] != "eval" or not Path(c[-1]).exists()))


def outline(
    recipe: Recipe, out: Path, jobs: int, from_cache: str | None
) -> tuple[list[tuple[str, str, list[str]]], str]:
    """What would run: (name, state, commands) of every job, and a line with an estimate from finished cells."""
    todo = cells(recipe, out, from_cache)
    done = [cell for cell in todo if cell.finished]
    commands = [command for cell in todo for command in cell.commands]
    trainings = sum(command[0] == "train" for command in commands)
    policies = sum(1 + command.count("--compare") for command in commands if command[0] == "eval")
    rollouts = policies * recipe.episodes * len(recipe.environments)
    line = f"{len(todo)} cells: {trainings} trainings, {rollouts} rollouts; {len(done)} done."
    times = [_seconds(out, cell) for cell in done]
    if times and len(done) < len(todo):
        left = duration(fmean(times) * (len(todo) - len(done)) / jobs)
        line += f" A finished cell took {duration(fmean(times))}: about {left} left with --jobs {jobs}."
    elif not done:
        line += (
            " How long they take is known once the first ones have finished; "
            "`dvla train --dry-run` with a cell's options measures its speed."
        )
    listed = [*(() if from_cache else preparation(recipe, out, jobs)), *todo]
    return [(j.name, "done" if j.finished else "to do", [shlex.join(c) for c in j.commands]) for j in listed], line


def _seconds(out: Path, cell: Job) -> float:
    """How long a finished cell's training and evaluations took."""
    summaries = [read_summary(next(product.rglob("summary.json")).parent) for product in cell.products]
    trained = [Path(command[-1]) for command in cell.commands if command[0] == "train"]
    return sum(s["seconds"] for s in summaries) + sum(map(training_seconds, trained))
