"""Panels of the drift: A1 its field, A2 its magnitude over the run, A5 by temperature, C1 the effect of following it.

Letters: N observations, G noise samples of each, D entries of a chunk, τ temperatures.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ....common.figures import LIGHT, Style, finish, new_figure, say_nothing
from ....drifting.metrics import drift_strength
from .data import PanelData, grade, principal

ARROWS = 300  # at most in a figure
FINE = 0.5  # ratio of the drift at the lowest and at the highest temperature below which fine detail is learned
IMPROVED = 50.0  # percent of the distance that the drift should remove
NEAR = 0.1  # of the expert's spread: predictions this close to their expert have arrived
LOST = 0.9  # of the expert's spread: predictions this far from their expert are independent of it
SMOOTH = 0.9  # of the running mean of A2
ARROW: dict[str, Any] = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.003, "alpha": 0.6}


def drifting_field(data: PanelData, style: Style = LIGHT) -> Figure:
    """A1: every prediction relative to its expert chunk (the star), and its drift; good: arrows to the star."""
    active = data.active[:, None]  # [N,1,T,128]
    away: np.ndarray = np.where(active, data.draws - data.target[:, None], 0).reshape(
        -1, data.active[0].size
    )  # [N·G,D]
    arrow = data.drift.sum(0).reshape(away.shape)  # [N·G,D]
    used = np.flatnonzero(data.active.any(0).ravel())
    away, arrow = away[:, used], arrow[:, used]
    length, distance = np.linalg.norm(arrow, axis=1), np.linalg.norm(away, axis=1)
    root = np.sqrt(np.maximum(np.repeat(data.active.sum((1, 2)), data.draws.shape[1]), 1))
    towards = -(arrow * away).sum(1) / np.maximum(length * distance, 1e-12)  # cosine
    _, axes, _ = principal(np.concatenate([away, -away]))  # around the expert
    at, to = away @ axes.T, arrow @ axes.T  # [N·G,2] each
    # Stretched so that one sees where they point.
    times = min(1e4, 0.15 * np.ptp(at) / max(np.percentile(np.linalg.norm(to, axis=1), 90), 1e-9))
    digits = 10.0 ** np.floor(np.log10(max(times, 1e-9)))
    times = round(times / digits) * digits
    figure = new_figure(style, 8, 5)
    axis = figure.subplots()
    chosen = np.linspace(0, len(at) - 1, min(ARROWS, len(at))).astype(int)
    axis.plot(*at[chosen].T, ".", color=style.predicted, markersize=4, label="prediction")
    axis.quiver(*at[chosen].T, *times * to[chosen].T, color=style.text, label=f"its drift × {times:g}", **ARROW)
    axis.plot(0, 0, "*", color=style.expert, markersize=18, label="its expert chunk")
    axis.set(aspect="equal", adjustable="datalim", ylabel="2nd principal axis")
    axis.set_xlabel("prediction − expert, 1st principal axis (normalized units)")
    size = float((length / root).mean())
    if distance.max() < 1e-6:
        return finish(figure, "Every prediction equals its expert chunk: there is no drift (A1)", style)
    share, far = 100 * (towards > 0).mean(), (distance / root).mean()
    arrows = f"{share:.0f} % of the drift arrows point to the expert"
    return finish(figure, f"{arrows}; mean length {size:.3g}, mean distance {far:.3g} per entry (A1)", style)


def drift_trend(data: PanelData, style: Style = LIGHT) -> Figure:
    """A2: mean(F²) of the training batches over the run, at each temperature, with its running mean; good: falling."""
    lines = [line for line in data.log if line.get("mean_square") and all(x > 0 for x in line["mean_square"])]
    if len(lines) < 2:
        why = "No drift is logged: this head has none, or the run has just begun (A2)"
        return say_nothing(new_figure(style), why, style)
    steps = np.array([line["step"] for line in lines])
    values = np.array([line["mean_square"] for line in lines])  # [n,τ]
    figure = new_figure(style, 8, 4)
    axis = figure.subplots()
    strength = np.log(values)
    smooth = np.empty_like(strength)
    smooth[0] = strength[0]
    for n in range(1, len(strength)):  # less smoothing at first, so that it does not lag
        keep = min(SMOOTH, n / (n + 2))
        smooth[n] = keep * smooth[n - 1] + (1 - keep) * strength[n]
    for n, tau in enumerate(_temperatures(data, values.shape[1])):
        axis.plot(steps, values[:, n], color=style.cycle[n], alpha=0.3, linewidth=0.8)
        axis.plot(steps, np.exp(smooth[:, n]), color=style.cycle[n], label=f"τ {tau}")
    axis.set(yscale="log", xlabel="training step", ylabel="drift, mean(F²) in units of the mean distance")
    change = float((smooth[-1] - smooth[0]).mean())
    recent = float((smooth[-1] - smooth[2 * len(smooth) // 3]).mean())
    flat = "flat, a hybrid head may need a greater loss.drift_weight"
    verdict = "rising" if change > 0.1 else grade(recent, (-0.05, "still falling"), beyond=flat)
    trend = f"λ {np.mean(strength[0]):.2f} → {np.mean(smooth[-1]):.2f} (ln of mean(F²))"
    return finish(figure, f"{trend}: {verdict} (A2)", style)


def temperature_drift(data: PanelData, style: Style = LIGHT) -> Figure:
    """A5: strength of the drift at each temperature; good: lowest below half of highest, fine detail is learned."""
    size = np.sqrt(np.maximum(data.mean_square, 0))  # [τ]
    figure = new_figure(style, 6, 3.6)
    axis = figure.subplots()
    axis.bar(range(len(size)), size, color=style.cycle[: len(size)])
    for n, name in enumerate(drift_strength(data.mean_square.tolist(), data.temperatures).items()):
        axis.text(n, size[n], f"λ {name[1]:.2f}", ha="center", va="bottom", fontsize=8)
    axis.set_xticks(range(len(size)), [f"τ {tau:g}" for tau in data.temperatures])
    axis.set_xlabel("temperature: from near samples (small) to far ones")
    axis.set_ylabel("RMS drift (in units of the mean distance)")
    axis.margins(y=0.15)
    if size.max() < 1e-6:
        return finish(figure, "There is no drift at any temperature (A5)", style)
    if data.apart > LOST:
        return finish(figure, f"{_distance(data.apart)}: neither coarse nor fine structure is learned (A5)", style)
    ratio = size[int(np.argmin(data.temperatures))] / max(size[int(np.argmax(data.temperatures))], 1e-12)
    verdict = grade(ratio, (FINE, "fine detail is learned"), beyond="fine detail is not learned yet")
    return finish(figure, f"Drift at the lowest over the highest temperature {ratio:.2f}: {verdict} (A5)", style)


def _distance(spreads: float) -> str:
    return f"Predictions are {spreads:.2f} of the expert's spread away from their expert"


def transport_map(data: PanelData, style: Style = LIGHT) -> Figure:
    """C1: predictions and expert chunks of the largest dataset in their principal plane with the drift as arrows, and
    their distance before and after following it, at its best length; good: more than half is removed."""
    if not data.groups:
        return say_nothing(new_figure(style), "Too few complete chunks to compare (C1)", style)
    k, rows = data.groups[0]
    expert, draws, arrow = (
        data.flat(x, k, rows) for x in (data.target, data.draws, data.drift.sum(0))
    )  # [n,D], [n,G,D] ×2
    gap = expert[:, None] - draws  # [n,G,D]
    best = max(0.0, float((gap * arrow).sum() / max((arrow * arrow).sum(), 1e-12)))  # one length for all, least squares
    root = np.sqrt(expert.shape[1])
    before, after = (np.linalg.norm(x, axis=2).ravel() / root for x in (gap, gap - best * arrow))
    mean, axes, shares = principal(expert)
    at, to, stars = (
        (x.reshape(-1, expert.shape[1]) - shift) @ axes.T
        for x, shift in ((draws, mean), (best * arrow, 0), (expert, mean))
    )
    figure = new_figure(style, 10, 4.5)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    chosen = np.linspace(0, len(at) - 1, min(ARROWS, len(at))).astype(int)
    left.plot(*stars.T, "*", color=style.expert, markersize=7, label="expert")
    left.plot(*at[chosen].T, ".", color=style.predicted, markersize=3, label="prediction")
    left.quiver(*at[chosen].T, *to[chosen].T, color=style.text, **ARROW)
    left.set(
        title=f"{data.datasets[k]}: {len(rows)} {data.what}, {draws.shape[1]} predictions each",
        xlabel=f"1st principal axis ({100 * shares[0]:.0f} % of the variance)",
        ylabel=f"2nd ({100 * shares[1]:.0f} %)",
    )
    edges = np.linspace(0, max(before.max(), after.max(), 1e-6), 31)
    right.hist(before, edges, color=style.predicted, alpha=0.6, label=f"before, mean {before.mean():.3g}")
    right.hist(after, edges, histtype="step", color=style.text, linewidth=1.5, label=f"after, mean {after.mean():.3g}")
    right.set(xlabel="distance to the expert chunk, per entry (normalized units)", ylabel="predictions")
    spread = before.mean() / max(np.linalg.norm(expert - mean, axis=1).mean() / root, 1e-9)
    if spread < NEAR:
        return finish(figure, f"{_distance(spread)}: little is left to transport (C1)", style)
    improved = 100 * (1 - after.mean() / before.mean())
    good = "" if improved > IMPROVED else f" (good: over {IMPROVED:.0f} %)"
    return finish(figure, f"{_distance(spread)}; following the drift removes {improved:.0f} % of it{good} (C1)", style)


def _temperatures(data: PanelData, count: int) -> list[str]:
    known = len(data.temperatures) == count
    return [f"{tau:g}" for tau in data.temperatures] if known else [f"{n + 1}" for n in range(count)]
