"""Panels of the run: D1 the newest evaluation, D2 training curves, D3 curves by dataset, D4 what was trained on.

Letters: K datasets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ....cache.actions.slots import EMBODIMENTS
from ....common.figures import LIGHT, MARKERS, Style, finish, label_bars, new_figure, say_nothing
from ..run_log import evaluations
from .data import PanelData, grade

BALANCED = 0.2  # relative difference of a dataset's share from the configured one that is still balanced
STAGNANT = 0.02  # relative fall of the error over the last third of the evaluations below which a dataset stagnates


def by_dataset(line: dict[str, Any], metric: str, datasets: Sequence[str]) -> np.ndarray:
    """[K] of a metric of one evaluation, NaN where a dataset has none."""
    return np.array([line.get(f"eval/{metric}/{name}", np.nan) for name in datasets], float)


def eval_dashboard(data: PanelData, style: Style = LIGHT) -> Figure:
    """D1: error, correlation and coverage of every dataset at the newest evaluation, colored by embodiment."""
    found = evaluations(data.log)
    if not found:
        return say_nothing(new_figure(style), "No evaluation on held-out episodes yet (D1)", style)
    figure = new_figure(style, 11, 0.34 * len(data.datasets) + 1.7)
    bodies = sorted(set(data.embodiments))
    kinds = (
        ("mse", "MSE (normalized²)", None),
        ("mae", "MAE (normalized)", None),
        ("correlation", "correlation", 1.0),
        ("coverage", "coverage, %", 100.0),
    )
    for axis, (metric, title, best) in zip(figure.subplots(1, 4, sharey=True), kinds):
        values = by_dataset(found[-1], metric, data.datasets)
        for n, body in enumerate(bodies):
            mine = [k for k, b in enumerate(data.embodiments) if b == body]
            label = EMBODIMENTS[body] if metric == "coverage" else None
            axis.barh(mine, np.nan_to_num(values[mine]), color=style.cycle[n % len(style.cycle)], label=label)
        label_bars(axis, values, "–")
        axis.set_xlabel(title)
        axis.margins(x=0.3)
        if best is not None:
            axis.axvline(best, color=style.text, linewidth=0.8, linestyle="--")
        axis.locator_params(axis="x", nbins=4)
    axis.set_yticks(range(len(data.datasets)), data.datasets)
    axis.invert_yaxis()
    errors = by_dataset(found[-1], "mse", data.datasets)
    finding = f"Held-out MSE {found[-1]['eval/mse']:.4f} at step {found[-1]['step']}"
    if np.isfinite(errors).sum() > 1:
        finding += f"; worst: {data.datasets[int(np.nanargmax(errors))]}, {np.nanmax(errors):.4f}"
    return finish(figure, f"{finding} (D1)", style, "outside")


def training_curves(data: PanelData, style: Style = LIGHT) -> Figure:
    """D2: loss, error and drift over the run; good: error and drift fall (the loss of a drifting head hovers)."""
    lines = list(data.log)
    if len(lines) < 2:
        return say_nothing(new_figure(style), "The log has fewer than two lines (D2)", style)
    figure = new_figure(style, 11, 3.6)
    steps = [line["step"] for line in lines]
    left, middle, right = figure.subplots(1, 3)
    left.plot(steps, [line["loss"] for line in lines], color=style.expert)
    left.set(xlabel="training step", ylabel="total loss", title="loss")
    middle.plot(steps, [line["mse"] for line in lines], color=style.expert, label="training batch")
    held = evaluations(lines)
    if held:
        at, errors = [line["step"] for line in held], [line["eval/mse"] for line in held]
        middle.plot(at, errors, color=style.predicted, marker="o", label="held out, averaged weights")
    middle.set(xlabel="training step", ylabel="MSE (normalized²)", title="error", yscale="log")
    drifting = [line for line in lines if line.get("mean_square") and max(line["mean_square"]) > 0]
    right.set(xlabel="training step", ylabel="RMS drift (mean over τ)", title="this head has no drift")
    if drifting:
        drift = [np.sqrt(np.mean(line["mean_square"])) for line in drifting]
        right.plot([line["step"] for line in drifting], drift, color=style.cycle[2])
        right.set(yscale="log", title="drift")
    what, curve = ("Held-out MSE", errors) if len(held) > 1 else ("MSE", [line["mse"] for line in lines])
    times = curve[0] / max(curve[-1], 1e-12)
    falls = f"{times:.1f} × smaller"
    if len(held) > 3 and curve[-1] > 1.2 * min(curve):
        falls = "rising again since its best, it may overfit"
    verdict = grade(times, (1, "it got worse"), (1.1, "it hardly falls"), beyond=falls)
    return finish(figure, f"{what} {curve[0]:.4f} → {curve[-1]:.4f}: {verdict} (D2)", style)


def learning_curves(data: PanelData, style: Style = LIGHT) -> Figure:
    """D3: error and correlation of every dataset over the evaluations; good: all improve."""
    found = evaluations(data.log)
    if not found:
        return say_nothing(new_figure(style), "No evaluation on held-out episodes yet (D3)", style)
    figure = new_figure(style, 10, 4)
    left, right = figure.subplots(1, 2)
    steps = [line["step"] for line in found]
    errors = np.array([by_dataset(line, "mse", data.datasets) for line in found])  # [n,K]
    for k, name in enumerate(data.datasets):
        how = {
            "color": style.cycle[k % len(style.cycle)],
            "marker": MARKERS[k // len(style.cycle) % len(MARKERS)],
            "markersize": 4,
        }
        left.plot(steps, errors[:, k], label=name if len(data.datasets) <= 16 else None, **how)
        right.plot(steps, [by_dataset(line, "correlation", data.datasets)[k] for line in found], **how)
    left.set(xlabel="training step", ylabel="held-out MSE (normalized²)", yscale="log")
    right.set(xlabel="training step", ylabel="held-out correlation", ylim=(min(0, *right.get_ylim()), 1.02))
    if len(found) < 3:
        count = f"{len(found)} evaluation{'s' * (len(found) > 1)}"
        return finish(figure, f"{count}: too few to see which datasets improve (D3)", style)
    before, now = errors[-1 - max(1, len(found) // 3)], errors[-1]
    still = [name for name, a, b in zip(data.datasets, before, now) if np.isfinite(a) and b > (1 - STAGNANT) * a]
    named = ", ".join(still[:3]) + (", …" if len(still) > 3 else "")
    finding = f"{len(still)} of {len(data.datasets)} datasets no longer improve: {named}"
    return finish(figure, f"{finding if still else 'All datasets improve'} (D3)", style)


def data_balance(data: PanelData, style: Style = LIGHT) -> Figure:
    """D4: the share of each dataset in the training samples, as configured and as drawn; good: the same."""
    if data.configured is None or data.drawn is None or not data.drawn.sum():
        return say_nothing(new_figure(style), "No training samples yet (D4)", style)
    wanted, got = data.configured / data.configured.sum(), data.drawn / data.drawn.sum()
    figure = new_figure(style, 8, 0.5 * len(wanted) + 1.5)
    axis, rows = figure.subplots(), np.arange(len(wanted))
    axis.barh(rows - 0.2, 100 * wanted, 0.38, color=style.expert, label="configured")
    label = f"of the last {int(data.drawn.sum())} samples"
    axis.barh(rows + 0.2, 100 * got, 0.38, color=style.predicted, label=label)
    axis.set_yticks(rows, data.datasets)
    axis.invert_yaxis()
    axis.set_xlabel("share of the training samples, %")
    off = np.abs(got - wanted) / np.maximum(wanted, 1e-9)
    worst = int(off.argmax())
    verdict = "The mixture is as configured"
    if off[worst] >= BALANCED:
        has, should = 100 * got[worst], 100 * wanted[worst]
        verdict = f"{data.datasets[worst]} has {has:.1f} % of the samples, {should:.1f} % are configured"
    return finish(figure, f"{verdict}; smallest share {100 * got.min():.1f} % (D4)", style)
