"""What the commands show: consoles, progress bars, tables, closing lines."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from .doctor import Finding
    from .train import TrainReport

console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """`show(name, done, total)`: one rich bar per name; on a pipe or in a log file, nothing but the closing lines."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, speed_estimate_period=900) as bars:
        tasks: dict[str, Any] = {}

        def show(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total, completed=done)   # a resumed run does not start at 0
            bars.update(tasks[name], completed=done, total=total)

        yield show


def success_table(summaries: dict[str, dict[str, Any]]) -> Table:
    """One row per task and policy: success with interval, beside expert, random and blind."""
    return table(*success_cells(summaries))


def success_cells(summaries: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of that table. `summaries`: name → summary of `dvla eval`."""
    head = ["task", "policy", "success", "95 % interval", "expert", "random", "blind", "mean return", "ms/action", "ms/chunk"]
    rows = []
    for task in next(iter(summaries.values()))["tasks"]:
        for name, summary in summaries.items():
            row = summary["tasks"][task]
            low, high = row["ci95"]
            chunk = row.get("ms_per_chunk")
            rows.append([task, name, f"{row['success']:.0%} of {row['episodes']}", f"{low:.0%} – {high:.0%}",
                         *(f"{row[b]:.0%}" if b in row else "–" for b in ("expert", "random", "blind")), f"{row['mean_return']:.1f}",
                         f"{row['ms_per_action']:.1f}", "–" if chunk is None else f"{chunk:.1f}"])
    return head, rows


def table(head: list[str], rows: list[list[str]], title: str | None = None) -> Table:
    """A table of plain words."""
    found = Table(*head, title=title)
    for row in rows:
        found.add_row(*map(escape, row))
    return found


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def doctor_table(findings: list[Finding]) -> Table:
    """One row per piece: version, or what its absence costs and how to get it."""
    table = Table("piece", "found", "without it", "to get it")
    for f in findings:
        table.add_row(f.name, f.found or "[red]missing[/red]", *(("", "") if f.found else (escape(f.costs), escape(f.install))))
    return table


def training_lines(show: Callable[[str, int, int], None], steps: int) -> Callable[[dict[str, Any]], None]:
    """A callback that shows a line of log.jsonl: a bar where there is a terminal, and one line of text, which a log file keeps."""
    first: list[tuple[int, float]] = []     # (step, time) of the first line: the rate to come is that since then

    def on_log(line: dict[str, Any]) -> None:
        step, now = line["step"], time.perf_counter()
        show("training", step, steps)
        first[:] = first or [(step, now)]
        (begin, began), = first
        done = step - begin
        left = f"  {duration((now - began) / done * (steps - step))} left" if done and step < steps else ""
        held_out = f"  held-out mse {line['eval/mse']:.4f}" if "eval/mse" in line else ""
        binds = f", {line['binds']} binds" if "binds" in line else ""
        console.print(f"step {step:>6}/{steps}  loss {line['loss']:.4f}  mse {line['mse']:.4f}{held_out}  "
                      f"{line['samples_per_second']:.0f} samples/s  waiting for data {line['wait_share']:.1%}{binds}{left}", markup=False)
    return on_log


def closing_line(report: TrainReport) -> None:
    """Where the run stands."""
    loss = f", loss {report.first_loss:.4f} → {report.loss:.4f}" if report.first_loss is not None else ""
    console.print(f"{report.run}: {'saved at ' if report.interrupted else ''}step {report.step}{loss}")


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:.1f} days"


def size(nbytes: int) -> str:
    """Bytes for people."""
    value, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.1f} {unit}"
