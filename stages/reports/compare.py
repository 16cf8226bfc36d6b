"""`dvla compare`: several runs side by side, on the console and as a page.

Letters: R runs, K datasets of any of them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ... import __version__
from ...common.figures import LIGHT, Style, finish, new_figure
from ...common.text import public
from ...errors import UserError
from ..training.run_log import evaluations
from .html import number, picture, write_page
from .report import RunFacts, read_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS = {
    "eval/mse": ("held-out MSE", min),
    "eval/mae": ("MAE", min),
    "eval/nl2": ("NL2", min),
    "eval/correlation": ("correlation", max),
    "eval/coverage": ("coverage, %", None),
    "eval/mode_coverage": ("modes reached, %", max),
    "eval/mmd": ("MMD²", min),
}
"""Log entry → (its name, which value is best; None: neither)."""
BEST = "best held-out MSE"
NATIVE = "eval/native/"  # of errors in a unit, which alone compare runs of other normalizations or action frames
NAMES = ("out", "wandb.name")  # settings that differ between equal runs


@dataclass(frozen=True)
class Row:
    """One line of a table: a value for each run, None where it has none, and which of them are best."""

    name: str
    values: tuple[Any, ...]
    best: tuple[int, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """R runs: settings that differ, results at each run's newest step and evaluation, held-out MSE by dataset."""

    names: tuple[str, ...]
    runs: tuple[RunFacts, ...]
    settings: tuple[Row, ...]
    results: tuple[Row, ...]
    datasets: tuple[Row, ...]


def compare(paths: Sequence[Path]) -> Comparison:
    """Compare runs; `UserError` for fewer than two, the same one twice, or a folder that is no run."""
    different = len({p.resolve() for p in paths})
    if len(paths) < 2 or different < len(paths):
        raise UserError(f"give at least two different run folders to compare; got {different}")
    runs = tuple(read_run(p) for p in paths)
    flat = [_dotted(public(run.config)) for run in runs]
    keys = sorted({key for settings in flat for key in settings} - set(NAMES))
    differ = [Row(key, tuple(settings.get(key, "–") for settings in flat)) for key in keys]
    newest = [(evaluations(run.log) or [{}])[-1] for run in runs]
    native = sorted({key for line in newest for key in line if key.startswith(NATIVE)})
    results = [
        Row("step", tuple(run.log[-1]["step"] for run in runs)),
        Row("of steps", tuple(run.config["steps"] for run in runs)),
        Row("loss", tuple(run.log[-1]["loss"] for run in runs)),
        *(_judged(name, [line.get(key) for line in newest], better) for key, (name, better) in METRICS.items()),
        *(_judged(f"RMSE, {key.removeprefix(NATIVE)}", [x.get(key) for x in newest], min) for key in native),
        _judged(BEST, [min((x["eval/mse"] for x in evaluations(run.log)), default=None) for run in runs], min),
        _judged("samples/s", [float(np.median([line["samples_per_second"] for line in run.log])) for run in runs], max),
        Row("waiting for data, %", tuple(100 * run.log[-1]["wait_share"] for run in runs)),
    ]
    datasets = list(dict.fromkeys(name for run in runs for name in run.datasets))
    return Comparison(
        _names(paths),
        runs,
        tuple(row for row in differ if len({str(v) for v in row.values}) > 1),
        tuple(row for row in results if any(v is not None for v in row.values)),
        tuple(_judged(name, [line.get(f"eval/mse/{name}") for line in newest], min) for name in datasets),
    )


def _names(paths: Sequence[Path]) -> tuple[str, ...]:
    """The runs' folders without what all have in common."""
    resolved = [str(p.resolve()) for p in paths]
    common = os.path.commonpath(resolved)
    return tuple(os.path.relpath(path, common) if path != common else Path(path).name for path in resolved)


def _judged(name: str, values: Sequence[Any], better: Any) -> Row:
    known = [v for v in values if v is not None]
    best = better(known) if better is not None and len(set(known)) > 1 else None
    return Row(name, tuple(values), tuple(i for i, v in enumerate(values) if best is not None and v == best))


def _dotted(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return out


def comparison_figure(found: Comparison, style: Style = LIGHT) -> Figure:
    """Held-out MSE, error of the training batches, correlation and drift over the steps, a color for each run."""
    figure = new_figure(style, 12, 6)
    (held, error), (correlation, drift) = figure.subplots(2, 2)
    for n, (name, run) in enumerate(zip(found.names, found.runs)):
        how = {"color": style.cycle[n % len(style.cycle)], "linestyle": ("-", "--", ":")[n // len(style.cycle) % 3]}
        lines, seen = run.log, evaluations(run.log)
        held.plot([x["step"] for x in seen], [x["eval/mse"] for x in seen], marker="o", label=name, **how)
        error.plot([x["step"] for x in lines], [x["mse"] for x in lines], **how)
        correlation.plot(
            [x["step"] for x in seen], [x.get("eval/correlation", np.nan) for x in seen], marker="o", **how
        )
        drifting = [x for x in lines if x.get("mean_square") and max(x["mean_square"]) > 0]
        if drifting:
            drift.plot([x["step"] for x in drifting], [np.mean(x["mean_square"]) ** 0.5 for x in drifting], **how)
            drift.set_yscale("log")
    held.set(xlabel="training step", ylabel="held-out MSE (normalized²)", yscale="log")
    error.set(xlabel="training step", ylabel="MSE of the training batch", yscale="log")
    correlation.set(xlabel="training step", ylabel="held-out correlation")
    drift.set(xlabel="training step", ylabel="RMS drift (mean over τ)")
    return finish(figure, verdict(found), style, "outside")


def verdict(found: Comparison) -> str:
    """Which run is best, in one sentence."""
    row = next((row for row in found.results if row.name == BEST), None)
    if row is None or not row.best:
        return "No run is ahead: fewer than two have held-out errors that differ"
    best, first = row.values[row.best[0]], found.names[row.best[0]]
    second = min(v for i, v in enumerate(row.values) if v is not None and i not in row.best)
    larger = f"{second / max(best, 1e-12):.2f} × as large"
    return f"{first} has the smallest held-out MSE, {best:.4g}; the next run's is {larger}"


def show_comparison(found: Comparison) -> None:
    """Print the tables on the console."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Column, Table

    from ...common.console import console, say

    for title, rows in (
        ("settings that differ", found.settings),
        ("results", found.results),
        ("held-out MSE by dataset", found.datasets),
    ):
        if rows:
            table = Table(
                title,
                *(Column(escape(name), justify="right", overflow="fold") for name in found.names),
                box=SIMPLE_HEAD,
            )
            for row in rows:
                cells = [escape(number(value)) for value in row.values]
                table.add_row(
                    escape(row.name),
                    *(f"[bold green]{cell}[/bold green]" if i in row.best else cell for i, cell in enumerate(cells)),
                )
            console.print(table)
    say(verdict(found))


def write_comparison(found: Comparison, out: Path) -> int:
    """Write the page; returns its bytes. `UserError` where it cannot be written."""
    tables = [
        ("Results", "Newest step and evaluation of each run. Bold: best.", found.results),
        ("Held-out MSE by dataset", "Averaged weights, normalized units.", found.datasets),
        ("Settings that differ", "", found.settings),
    ]
    return write_page(
        out,
        "compare.html",
        version=__version__,
        made=time.strftime("%Y-%m-%d %H:%M"),
        names=found.names,
        verdict=verdict(found),
        tables=[table for table in tables if table[2]],
        curves=picture(lambda style: comparison_figure(found, style)),
        configs=[(name, public(run.config)) for name, run in zip(found.names, found.runs)],
    )
