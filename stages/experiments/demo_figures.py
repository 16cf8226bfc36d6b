"""Pictures of runs: loss curves, speed, success beside its baselines. In the panels' style."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...common.figures import BLUE, GREEN, GREY, LIGHT, ORANGE, PURPLE, finish, new_figure
from ..training.run_log import evaluations, read_log

COLOURS = {"stage two": BLUE, "stage three": ORANGE, "expert": GREEN, "blind": GREY, "random": PURPLE}


def loss_figure(runs: dict[str, Path], path: Path) -> None:
    """Training MSE and held-out MSE over steps, one panel per run folder."""
    figure = new_figure(LIGHT, 5 * len(runs), 3.5)
    for axis, (name, run) in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs.items()):
        lines = read_log(run)
        axis.plot([e["step"] for e in lines], [e["mse"] for e in lines], color=BLUE, label="training batch")
        held_out = [(e["step"], e["eval/mse"]) for e in evaluations(lines)]
        if held_out:
            axis.plot(*zip(*held_out), marker="o", color=ORANGE, label="held-out episodes (averaged weights)")
        axis.set(
            title=f"{name}: MSE {lines[0]['mse']:.4f} → {lines[-1]['mse']:.4f}",
            xlabel="step",
            ylabel="action MSE (normalised units)",
            yscale="log",
        )
    finish(figure, "", LIGHT).savefig(path, dpi=120)


def switch_figure(before: Path, after: Path, path: Path) -> None:
    """Loss across the switch from stage two's run to stage three's: training batches of both, held-out error of both, and one and the same
    batch through cached and live features before stage three's first step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axis = figure.subplots()
    old, new = read_log(before), read_log(after)
    end, first = old[-1]["step"], new[0]
    for name, lines, offset in (("stage two", old, 0), ("stage three", new, end)):
        axis.plot(
            [offset + e["step"] for e in lines],
            [e["mse"] for e in lines],
            color=COLOURS[name],
            lw=1,
            label=f"{name}, training batches",
        )
        held_out = [(offset + e["step"], e["eval/mse"]) for e in evaluations(lines)]
        if held_out:
            axis.plot(*zip(*held_out), "o-", color=COLOURS[name], label=f"{name}, held-out episodes (averaged weights)")
    axis.axvline(end, color="black", lw=0.8, ls=":")
    found = (first.get("switch/cached_loss"), first.get("switch/live_loss"))
    title = (
        "nothing was compared"
        if None in found
        else f"one batch, loss {found[0]:.5f} from the cache and {found[1]:.5f} live"
    )
    axis.set(
        title=f"The VLM comes back at step {end}:\n{title}",
        xlabel="step",
        ylabel="action MSE (normalised units)",
        yscale="log",
    )
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def success_figure(stages: dict[str, dict[str, Any]], path: Path) -> None:
    """Success with its 95 % interval per task: expert, each stage, blind, random. `stages`: name → summary of `dvla eval`."""
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
            axis.bar(i, rate, color=COLOURS.get(name, BLUE))
            axis.errorbar(i, rate, [[max(0, rate - low)], [max(0, high - rate)]], color="black", capsize=4)
        axis.set(
            title=f"{task}\n{last['episodes']} unseen starts",
            ylabel="success rate",
            ylim=(0, 1.05),
            xticks=range(len(bars)),
            xticklabels=list(bars),
        )
    finish(figure, "", LIGHT).savefig(path, dpi=120)
