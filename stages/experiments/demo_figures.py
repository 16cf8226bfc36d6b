"""The demo's figures: loss curves, the switch to stage three, success beside its baselines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...common.figures import BLUE, GREEN, GREY, LIGHT, ORANGE, PURPLE, finish, new_figure, save
from ..training.run_log import evaluations, read_log

COLORS = {"stage two": BLUE, "stage three": ORANGE, "expert": GREEN, "blind": GREY, "random": PURPLE}
UNIT = "action MSE (normalized)"


def loss_figure(runs: dict[str, Path], path: Path) -> None:
    """Training MSE and held-out MSE over steps, one axes per run folder."""
    figure = new_figure(LIGHT, 5 * len(runs), 3.5)
    for axis, (name, run) in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs.items()):
        lines = read_log(run)
        _curves(axis, lines, 0, BLUE, ORANGE, "")
        title = f"{name}: MSE {lines[0]['mse']:.4f} → {lines[-1]['mse']:.4f}"
        axis.set(title=title, xlabel="step", ylabel=UNIT, yscale="log")
    save(finish(figure, "", LIGHT, "outside"), path, 120)


def switch_figure(before: Path, after: Path, path: Path) -> None:
    """Loss across the switch from stage two to stage three.

    Shows training batches and held-out error of both runs; the title compares one and the same batch through cached and
    live features before stage three's first step.
    """
    figure = new_figure(LIGHT, 7, 3.8)
    axis = figure.subplots()
    old, new = read_log(before), read_log(after)
    end, first = old[-1]["step"], new[0]
    for name, lines, offset in (("stage two", old, 0), ("stage three", new, end)):
        _curves(axis, lines, offset, COLORS[name], COLORS[name], f"{name}, ")
    axis.axvline(end, color="black", lw=0.8, ls=":")
    cached, live = first.get("switch/cached_loss"), first.get("switch/live_loss")
    compared = "not compared" if None in (cached, live) else f"{cached:.5f} from the cache, {live:.5f} live"
    title = f"The VLM returns at step {end}.\nLoss of one batch: {compared}"
    axis.set(title=title, xlabel="step", ylabel=UNIT, yscale="log")
    save(finish(figure, "", LIGHT, "outside"), path, 120)


def _curves(axis: Any, lines: list[dict[str, Any]], offset: int, color: str, held_out_color: str, name: str) -> None:
    """A run's MSE on training batches and, where it was evaluated, on held-out episodes; steps begin at `offset`."""
    steps = [offset + line["step"] for line in lines]
    axis.plot(steps, [line["mse"] for line in lines], color=color, label=f"{name}training batches")
    if held_out := [(offset + line["step"], line["eval/mse"]) for line in evaluations(lines)]:
        label = f"{name}held-out episodes (averaged weights)"
        axis.plot(*zip(*held_out), marker="o", color=held_out_color, label=label)


def success_figure(stages: dict[str, dict[str, Any]], path: Path) -> None:
    """Success with its 95 % interval per task: expert, each stage, blind, random.

    `stages`: name → summary of `dvla eval`.
    """
    tasks = list(next(iter(stages.values()))["tasks"])
    figure = new_figure(LIGHT, 5.5 * len(tasks), 3.5)
    for axis, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks):
        rows = {name: summary["tasks"][task] for name, summary in stages.items()}
        last = next(reversed(rows.values()))
        bars = {
            "expert": (last["expert"], last["expert_ci95"]),
            **{n: (r["success"], r["ci95"]) for n, r in rows.items()},
            "blind": (last["blind"], last["blind_ci95"]),
            "random": (last["random"], last["random_ci95"]),
        }
        for i, (name, (rate, (low, high))) in enumerate(bars.items()):
            axis.bar(i, rate, color=COLORS.get(name, BLUE))
            axis.errorbar(i, rate, [[max(0, rate - low)], [max(0, high - rate)]], color="black", capsize=4)
        axis.set(
            title=f"{task}\n{last['episodes']} held-out initial states",
            ylabel="success rate",
            ylim=(0, 1.05),
            xticks=range(len(bars)),
            xticklabels=list(bars),
        )
    save(finish(figure, "", LIGHT), path, 120)
