"""What training prints: progress lines, and at the end the held-out error, the checkpoint and the next command."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...common.console import say
from ...common.progress import Progress
from ...common.text import duration

if TYPE_CHECKING:
    from .context import TrainReport

BOUND = {"disk": "I/O-bound", "host→device": "copy-bound"}  # the usual case, compute-bound, is not printed


def training_lines(show: Progress, steps: int) -> Callable[[dict[str, Any]], None]:
    """A callback for lines of log.jsonl: moves the bar of `show` and prints each line, within 80 columns."""
    first: list[tuple[int, float]] = []  # (step, time) of the first line: the rate to come is that since then

    def on_log(line: dict[str, Any]) -> None:
        step, now = line["step"], time.perf_counter()
        show("training", step, steps)
        first[:] = first or [(step, now)]
        ((begin, began),) = first
        done = step - begin
        words = [
            f"step {step:>{len(str(steps))}}/{steps}",
            f"loss {line['loss']:.4f}",
            f"mse {line['mse']:.4f}",
            f"{line['samples_per_second']:.0f} samples/s",
            BOUND.get(line.get("binds", ""), ""),
            f"{duration((now - began) / done * (steps - step))} left" if done and step < steps else "",
        ]
        say("  ".join(filter(None, words)))
        if "eval/mse" in line:
            say(f"held-out mse {line['eval/mse']:.4f} at step {step}")

    return on_log


def closing_lines(report: TrainReport, steps: int, next_command: str) -> list[str]:
    """Where the run stands after this call, and the command to run next.

    The loss is not among them: a drifting loss hovers and tells nothing of progress; the held-out error does.
    """
    error = "" if report.eval_mse is None else f", held-out mse {report.eval_mse:.4f}"
    lines = [f"{report.run}: step {report.step} of {steps}{error}"]
    if not report.step:
        return lines
    lines.append(f"checkpoint: {report.run}/checkpoints/step-{report.step:08d}")
    if report.step < steps:  # an interrupted command ends with its own advice
        return lines if report.interrupted else [*lines, "rerun without --stop-after to resume"]
    return [*lines, f"next: {next_command}"]
