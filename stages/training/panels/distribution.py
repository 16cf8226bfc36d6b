"""Panels of distributions and movements: B1 histograms, B4 trajectories, C2 modes, C3 smoothness.

Letters: N observations, T action steps, D entries of a chunk.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ....cache.actions.slots import SLOTS, slots
from ....common.figures import LIGHT, Style, finish, grid, new_figure, say_nothing
from .data import PanelData, grade, principal

COLLAPSED = 20.0  # percent of the expert's range below which a policy has collapsed
COVERED = 80.0  # percent from which on it covers the expert's range
SHOWN = 4  # trajectories, datasets
JITTER = 1.5  # × the expert's jerk from which on a policy jitters


def action_distribution(data: PanelData, style: Style = LIGHT) -> Figure:
    """B1: histograms of up to 12 dimensions with their coverage; good: 100 %, below 20 % the policy has collapsed."""
    shown = data.shown()
    figure = new_figure(style, 9, 2.0 * -(-len(shown) // 4) + 0.8)
    coverage = data.of_slot("coverage")
    for n, (axis, i) in enumerate(zip(grid(figure, len(shown), 4), shown)):
        on = data.active[..., i]
        a, p = data.target[..., i][on], data.pred[..., i][on]
        edges: Any = np.linspace(min(a.min(), p.min()), max(a.max(), p.max()) + 1e-9, 31)
        names = (None, None) if n else ("expert", "predicted")
        axis.hist(a, edges, density=True, color=style.expert, alpha=0.55, label=names[0])
        how: dict[str, Any] = {"histtype": "step", "color": style.predicted, "linewidth": 1.5}
        axis.hist(p, edges, density=True, label=names[1], **how)
        reached = "constant" if np.isnan(coverage[i]) else f"coverage {coverage[i]:.0f} %"
        axis.set_title(f"{slots()[i].name}\n{reached}")
        axis.set_yticks([])
    figure.supxlabel("action (normalized units)", fontsize=8, color=style.text)
    figure.supylabel("density", fontsize=8, color=style.text)
    value = data.result.get("coverage")
    if value is None:
        return finish(figure, "The expert never moves: coverage is not defined (B1)", style)
    verdict = grade(
        value,
        (COLLAPSED, "the policy has collapsed"),
        (COVERED, "predictions vary too little"),
        (120, "predictions cover the expert's range"),
        beyond="predictions exceed the expert's range",
    )
    return finish(figure, f"Coverage {value:.0f} %: {verdict} (B1)", style)


def trajectories(data: PanelData, style: Style = LIGHT) -> Figure:
    """B4: end-effector trajectories of four chunks, from above (x, y) and from the side (x, z); good: they overlap.

    Velocities are integrated. Joint actions give no trajectory without the robot's geometry: their three most moved
    dimensions stand in."""
    picked = [int(i) for i in np.linspace(0, len(data.target) - 1, min(SHOWN, len(data.target))).round()]
    figure = new_figure(style, 2.6 * len(picked) + 0.4, 5.2)
    axes = figure.subplots(2, len(picked), squeeze=False)
    gaps, reach = [], []
    for column, row in enumerate(picked):
        expert, predicted, names, unit = _trajectories(data, row)  # [T+1,3] each
        gaps.append(np.linalg.norm(predicted - expert, axis=1).mean())
        reach.append(np.linalg.norm(expert.max(0) - expert.min(0)))
        for axis, (a, b) in zip(axes[:, column], ((0, 1), (0, 2))):
            for e, p in zip(expert, predicted):
                axis.plot([e[a], p[a]], [e[b], p[b]], color=style.faint, linewidth=0.8)
            labels = ("expert", "predicted") if not column and b == 1 else (None, None)
            axis.plot(*expert[:, [a, b]].T, color=style.expert, marker="o", markersize=2.5, label=labels[0])
            how: dict[str, Any] = {"color": style.predicted, "marker": ".", "markersize": 4, "linestyle": "--"}
            axis.plot(*predicted[:, [a, b]].T, label=labels[1], **how)
            axis.set(xlabel=f"{names[a]} ({unit})", ylabel=f"{names[b]} ({unit})")
            axis.locator_params(nbins=4)
            axis.margins(0.15)
        axes[0, column].set_title(f"{data.datasets[data.dataset[row]]}\nobservation {row}")
    share = 100 * np.mean(gaps) / max(np.mean(reach), 1e-9)
    verdict = grade(share, (10, "they overlap"), (30, "they are close"), beyond="they diverge")
    return finish(figure, f"Mean gap of trajectories {share:.0f} % of their extent: {verdict} (B4)", style)


def _trajectories(data: PanelData, row: int) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], str]:
    """Expert and predicted trajectory [T or T+1,3] of observation `row`, names of the three coordinates, their unit."""
    k, on = data.dataset[row], data.active[row]  # [T,128]
    steps = on.any(1)
    native = [x[row][steps] * data.half_range[k] + data.center[k] for x in (data.target, data.pred)]  # [t,128] each
    for side in ("", "left_"):
        position, velocity = ([SLOTS[f"{side}eef_{kind}_{a}"] for a in "xyz"] for kind in ("pos", "vel"))
        if on[:, position].any():
            expert, predicted = (x[:, position] * on[steps][:, position] for x in native)
            return expert, predicted, ("x", "y", "z"), "m"
        if on[:, velocity].any():
            moves = (np.cumsum(x[:, velocity] * on[steps][:, velocity], 0) / data.hz[k] for x in native)
            expert, predicted = (np.vstack([np.zeros(3), move]) for move in moves)
            return expert, predicted, ("x", "y", "z"), "m"
    moved = np.argsort([-np.ptp(native[0][:, i]) if on[:, i].any() else 1.0 for i in range(on.shape[1])])[:3]
    names, units = tuple(slots()[i].name for i in moved), {slots()[i].unit for i in moved}
    return native[0][:, moved], native[1][:, moved], names, units.pop() if len(units) == 1 else "native units"


def mode_coverage(data: PanelData, style: Style = LIGHT) -> Figure:
    """C2: chunks of the largest datasets in the principal plane of the expert's; good: the clouds overlap."""
    if not data.groups:
        return say_nothing(new_figure(style), "Too few complete chunks to compare (C2)", style)
    shown = data.groups[:SHOWN]
    figure = new_figure(style, max(5.5, 4 * min(2, len(shown)) + 0.5), 3.8 * -(-len(shown) // 2) + 0.6)
    for n, (axis, (k, rows)) in enumerate(zip(grid(figure, len(shown), 2), shown)):
        expert, predicted = data.flat(data.target, k, rows), data.flat(data.pred, k, rows)  # [n,D] each
        mean, axes, shares = principal(expert)
        for values, marker, color, label in (
            (expert, "*", style.expert, "expert"),
            (predicted, ".", style.predicted, "predicted"),
        ):
            how: dict[str, Any] = {"color": color, "markersize": 6, "alpha": 0.7, "label": None if n else label}
            axis.plot(*((values - mean) @ axes.T).T, marker, **how)
        axis.set(
            title=f"{data.datasets[k]}, {len(rows)} chunks",
            xlabel=f"1st principal axis ({100 * shares[0]:.0f} % of the variance)",
            ylabel=f"2nd ({100 * shares[1]:.0f} %)",
        )
    if "mode_coverage" not in data.result:
        return finish(figure, "Too few chunks for a number: look whether the clouds overlap (C2)", style)
    covered, distance = data.result["mode_coverage"], data.result["mmd"]
    verdict = grade(covered, (50, "most are missing"), (80, "some are missing"), beyond="the clouds overlap")
    finding = f"{covered:.0f} % of the expert's modes are predicted: {verdict}; MMD² {distance:.3f} (C2)"
    return finish(figure, finding, style)


def smoothness(data: PanelData, style: Style = LIGHT) -> Figure:
    """C3: speed, jerk and spectrum of actions within a chunk; good: as the expert's."""
    complete = np.flatnonzero(np.all(data.active.any(2), 1))
    steps = data.target.shape[1]
    if steps < 4:
        return say_nothing(new_figure(style), f"Chunks of {steps} steps are too short for a jerk (C3)", style)
    if not len(complete):
        return say_nothing(new_figure(style), "No chunk is complete (C3)", style)
    on = np.all(data.active[complete], 1)  # [n,128]
    count = np.maximum(on.sum(1), 1)  # [n]
    figure = new_figure(style, 10, 3.6)
    left, middle, right = figure.subplots(1, 3)
    jerks, rates = [], {data.hz[k] for k in data.dataset[complete]}
    hz = rates.pop() if len(rates) == 1 else None
    for chunks, color, name, marker in (
        (data.target, style.expert, "expert", "o"),
        (data.pred, style.predicted, "predicted", "."),
    ):
        values = np.where(on[:, None], chunks[complete], 0)  # [n,T,128]
        speed, jerk = (np.abs(np.diff(values, order, axis=1)).sum(2) / count[:, None] for order in (1, 3))
        waves = np.fft.rfft(values - values.mean(1, keepdims=True), axis=1)  # [n,T//2+1,128]
        power = (np.abs(waves) ** 2).sum(2) / count[:, None]  # [n,T//2+1]
        jerks.append(jerk.mean())
        left.plot(range(1, steps), speed.mean(0), color=color, marker=marker, label=name)
        middle.plot(range(3, steps), jerk.mean(0), color=color, marker=marker)
        right.plot(np.fft.rfftfreq(steps, 1 / (hz or 1))[1:], power.mean(0)[1:] + 1e-12, color=color, marker=marker)
    left.set(xlabel="step of the chunk", ylabel="|change| per step (normalized units)", ylim=(0, None))
    middle.set(xlabel="step of the chunk", ylabel="|jerk| per step³", ylim=(0, None))
    right.set(xlabel="frequency (Hz)" if hz else "frequency (cycles per step)", ylabel="power", yscale="log")
    for axis in (left, middle):
        axis.locator_params(axis="x", integer=True, nbins=6)
        axis.set_ylim(top=1.3 * axis.get_ylim()[1])  # room for the legend
    ratio = jerks[1] / max(jerks[0], 1e-12)
    if jerks[0] < 1e-9:
        return finish(figure, "The expert moves without jerk: there is nothing to compare (C3)", style)
    steps = ((1 / JITTER, "smoother than the expert"), (JITTER, "as smooth as the expert"))
    verdict = grade(ratio, *steps, beyond="it jitters")
    return finish(figure, f"Jerk {ratio:.2g} × the expert's: {verdict} (C3)", style)
