"""A road of `dvla` commands under one folder: each printed as one would type it, run once, and noted when it is done.

`OUT/progress.json` holds the commands and how long the finished ones took; an interrupted road goes on where it stopped.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rich.markup import escape

from ...common.files import json_bytes, read_json, write_file
from ...errors import UserError


@dataclass(frozen=True)
class Step:
    """One or more `dvla` commands that run at the same time, each on a core of its own."""

    name: str
    commands: tuple[tuple[str, ...], ...]


def command_line(command: Sequence[str]) -> list[str]:
    """`dvla COMMAND…` as this interpreter runs it."""
    return [sys.executable, "-m", f"{__package__.partition('.')[0]}.cli", *command]


def start(command: Sequence[str], environment: Mapping[str, str], output: IO[str] | None = None) -> subprocess.Popen:
    """`dvla COMMAND…` in a process of its own, what it prints in `output` (None: where this process prints)."""
    return subprocess.Popen(
        command_line(command), env=environment, stdout=output, stderr=None if output is None else subprocess.STDOUT
    )


def stop(processes: Sequence[subprocess.Popen]) -> None:
    """End what still runs: training saves, and is gone on with next time."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        process.wait()


def words(where: str, text: str, own: Sequence[str], owner: str) -> tuple[str, ...]:
    """The words of a string of options. `UserError` for one of `own`, which the command `owner` sets itself; `where` names the string."""
    try:
        found = tuple(shlex.split(text))
    except ValueError as error:
        raise UserError(f"{where} {text!r}: {error}") from None
    for word in found:
        if word.split("=")[0] in own:
            raise UserError(f"{where} {text!r}: {word.split('=')[0]} is for `{owner}` to set; leave it out")
    return found


def travel(
    out: Path, road: Sequence[Step], perform: Callable[[Step], None], say: Callable[..., None], what: str
) -> dict[str, float]:
    """Print and `perform` every step that is not done yet; returns seconds by step. `UserError` when `out` holds something else than this
    road, which the message calls `what`."""
    done = _progress(out, road, what)
    for step in road:
        say("")
        for i, command in enumerate(step.commands):
            say(f"[bold]$ dvla {escape(shlex.join(command))}{' &' if i < len(step.commands) - 1 else ''}[/bold]")
        if step.name in done:
            say(f"done before, in {done[step.name]:.0f} s")
            continue
        began = time.perf_counter()
        perform(step)
        done[step.name] = time.perf_counter() - began
        _note(out, road, done)
    return done


def _progress(out: Path, road: Sequence[Step], what: str) -> dict[str, float]:
    """Seconds of the steps finished before; makes the folder."""
    path = out / "progress.json"
    if path.exists():
        before = read_json(path)
        if before["road"] != _road(road):
            raise UserError(f"{out} holds a {what} with other settings; choose another --out")
        return before["seconds"]
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} holds other files; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    _note(out, road, {})
    return {}


def _note(out: Path, road: Sequence[Step], seconds: dict[str, float]) -> None:
    write_file(out / "progress.json", json_bytes({"road": _road(road), "seconds": seconds}))


def _road(road: Sequence[Step]) -> list[list[list[str]]]:
    return [[list(command) for command in step.commands] for step in road]
