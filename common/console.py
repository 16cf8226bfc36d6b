"""What commands print through: consoles, progress bars, tables, JSON files."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from .progress import Progress
from .text import duration, printable


class _Console(Console):
    """A console that prints no control character of a text, wherever that comes from."""

    def print(self, *objects: Any, **how: Any) -> None:
        super().print(*(printable(each) if isinstance(each, str) else each for each in objects), **how)


# A closed standard stream is opened on nothing, before a file of ours takes its number.
for _name, _mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
    if getattr(sys, _name) is None:
        setattr(sys, _name, open(os.devnull, _mode))
console = _Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 170)
errors = _Console(stderr=True, highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """Print a line as it is."""
    console.print(line, markup=False)


LINE_SECONDS = 30.0  # between two lines of progress where there is no terminal


@contextlib.contextmanager
def progress_bars(every: float | None = LINE_SECONDS) -> Iterator[Progress]:
    """`show(name, done, total)`: a bar per name; off a terminal, a line per name and `every` seconds (None: none)."""
    if not console.is_terminal:
        yield (lambda *_: None) if every is None else progress_lines(every)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=console, speed_estimate_period=900) as bars:
        tasks: dict[str, Any] = {}

        def show(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(
                    printable(name), total=total, completed=done
                )  # a resumed run does not start at 0
            bars.update(tasks[name], completed=done, total=total)

        yield show


def progress_lines(every: float, clock: Callable[[], float] = time.monotonic) -> Progress:
    """A `show` that prints done, total, rate and time left of a name, at most once in `every` seconds."""
    first: dict[str, tuple[float, int]] = {}  # name → when it was first shown, and what was done then
    printed: dict[str, float] = {}

    def show(name: str, done: int, total: int) -> None:
        now = clock()
        began, before = first.setdefault(name, (now, done))
        if now == began or done >= total or now - printed.get(name, began) < every:
            return
        printed[name], rate = now, (done - before) / (now - began)
        left = f", {duration((total - done) / rate)} left" if rate else ""
        console.print(f"{name} {done}/{total}, {rate:.3g}/s{left}", markup=False)

    return show


UNITS = "[KMGT]?i?B|s|min|h|days"  # after a number
SHORT, LONG = 12, 40  # columns up to SHORT are never folded; those up to LONG rather cost another column its place


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None, drop: Sequence[str] = ()
) -> Table:
    """A table of plain words that fits the console: columns in `drop` go first, in that order, then long words fold."""
    columns = {name: [name, *map(printable, cells)] for name, *cells in zip(head, *map(list, rows))}
    widths = {name: max(len(line) for cell in cells for line in cell.split("\n")) for name, cells in columns.items()}
    for name in drop:
        if sum(min(width, LONG) + 2 for width in widths.values()) - 2 <= console.width:
            break
        widths.pop(name, None)
    narrow: dict[str, Any] = {"box": SIMPLE_HEAD, "show_edge": False, "pad_edge": False, "padding": (0, 1, 0, 0)}
    found = Table(title=escape(printable(title)) if title else None, title_justify="left", **narrow)
    for name, width in widths.items():
        numbers = all(re.fullmatch(rf"[-+–.,/\d%e ]*({UNITS})?", cell) for cell in columns[name][1:])
        found.add_column(
            escape(printable(name)),
            justify="right" if numbers else "left",
            no_wrap=width <= SHORT,
            min_width=min(width, SHORT),
            overflow="fold",
        )
    for row in zip(*(columns[name][1:] for name in widths)):
        found.add_row(*map(escape, row))
    return found


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def write_json(file: Path | None, values: Any) -> None:
    """Write a dataclass, a list of such, or a mapping as JSON; without a file, nothing. `UserError` if it cannot."""
    if file is None:
        return
    listed = (
        values
        if isinstance(values, dict)
        else [dataclasses.asdict(v) for v in values]
        if isinstance(values, list)
        else dataclasses.asdict(values)
    )
    from .files import write_output  # and numpy with it

    text = json.dumps(listed, indent=1, ensure_ascii=False) + "\n"
    write_output(file, text.encode(errors="backslashreplace"), "--json")
