"""What training prints: progress lines and the closing line."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...common.console import console
from ...common.text import duration

if TYPE_CHECKING:
    from .context import TrainReport


def training_lines(show: Callable[[str, int, int], None], steps: int) -> Callable[[dict[str, Any]], None]:
    """A callback that shows a line of log.jsonl: a bar where there is a terminal, and one line of text, which a log file keeps."""
    first: list[tuple[int, float]] = []  # (step, time) of the first line: the rate to come is that since then

    def on_log(line: dict[str, Any]) -> None:
        step, now = line["step"], time.perf_counter()
        show("training", step, steps)
        first[:] = first or [(step, now)]
        ((begin, began),) = first
        done = step - begin
        left = f"  {duration((now - began) / done * (steps - step))} left" if done and step < steps else ""
        held_out = f"  held-out mse {line['eval/mse']:.4f}" if "eval/mse" in line else ""
        binds = f", {line['binds']} binds" if "binds" in line else ""
        console.print(
            f"step {step:>6}/{steps}  loss {line['loss']:.4f}  mse {line['mse']:.4f}{held_out}  "
            f"{line['samples_per_second']:.0f} samples/s  waiting for data {line['wait_share']:.1%}{binds}{left}",
            markup=False,
        )

    return on_log


def closing_line(report: TrainReport) -> None:
    """Where the run stands."""
    loss = f", loss {report.first_loss:.4f} → {report.loss:.4f}" if report.first_loss is not None else ""
    console.print(f"{report.run}: {'saved at ' if report.interrupted else ''}step {report.step}{loss}")
