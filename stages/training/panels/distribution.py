"""Panels of what is predicted, as a distribution and as a movement: B1 histograms, B4 trajectories, C2 modes, C3
smoothness.

Letters: N observations, G draws of each, T action steps, D entries of a chunk.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ....cache.actions.slots import SLOTS, slots
from ....common.figures import LIGHT, Style, finish, grid, new_figure, say_nothing
from .data import PanelData, principal

COLLAPSED = 20.0  # percent of the expert's range below which a policy has collapsed
COVERED = 80.0  # percent from which on it has not
SHOWN = 4  # trajectories, datasets
JITTER = 1.5  # × the expert's jerk from which on a policy jitters


def action_distribution(data: PanelData, style: Style = LIGHT) -> Figure:
    """B1: histograms of up to 12 dimensions, expert and predicted, each with its coverage; good: 100 %, below 20 % a
    collapse."""
    places = data.shown()
    figure = new_figure(style, 9, 2.0 * -(-len(places) // 4) + 0.8)
    coverage = data.of_slot("coverage")
    for n, (axis, i) in enumerate(zip(grid(figure, len(places), 4), places)):
        on = data.active[..., i]
        a, p = data.target[..., i][on], data.pred[..., i][on]
        edges: Any = np.linspace(min(a.min(), p.min()), max(a.max(), p.max()) + 1e-9, 31)
        axis.hist(a, edges, density=True, color=style.expert, alpha=0.55, label=None if n else "expert")
        axis.hist(
            p,
            edges,
            density=True,
            histtype="step",
            color=style.predicted,
            linewidth=1.5,
            label=None if n else "predicted",
        )
        axis.set_title(
            f"{slots()[i].name}\n" + ("constant" if np.isnan(coverage[i]) else f"coverage {coverage[i]:.0f} %")
        )
        axis.set_yticks([])
    figure.supxlabel("action (normalised units, 1 is 5 σ of the expert)", fontsize=8, color=style.text)
    figure.supylabel("density", fontsize=8, color=style.text)
    value = data.result.get("coverage")
    if value is None:
        return finish(figure, "The expert never moves: coverage is not defined (B1)", style)
    verdict = (
        "the policy has collapsed"
        if value < COLLAPSED
        else "it predicts too little variety"
        if value < COVERED
        else "it covers what the expert does"
        if value < 120
        else "it strays beyond what the expert does"
    )
    return finish(figure, f"Coverage {value:.0f} %: {verdict} (B1)", style)


def trajectories(data: PanelData, style: Style = LIGHT) -> Figure:
    """B4: the way of the hand in four chunks, seen from above (x, y) and from the side (x, z), expert and predicted;
    good: one line.

    Positions as they are, velocities summed up; a robot whose actions are joints has no way that could be drawn without
    its geometry, so its three most moved dimensions stand in."""
    picked = [int(i) for i in np.linspace(0, len(data.target) - 1, min(SHOWN, len(data.target))).round()]
    figure = new_figure(style, 2.6 * len(picked) + 0.4, 5.2)
    axes = figure.subplots(2, len(picked), squeeze=False)
    gaps, reach = [], []
    for column, row in enumerate(picked):
        expert, predicted, names, unit = _ways(data, row)  # [T+1,3] each
        gaps.append(np.linalg.norm(predicted - expert, axis=1).mean())
        reach.append(np.linalg.norm(expert.max(0) - expert.min(0)))
        for axis, (a, b) in zip(axes[:, column], ((0, 1), (0, 2))):
            for e, p in zip(expert, predicted):
                axis.plot([e[a], p[a]], [e[b], p[b]], color=style.faint, linewidth=0.8)
            axis.plot(
                expert[:, a],
                expert[:, b],
                color=style.expert,
                marker="o",
                markersize=2.5,
                label="expert" if not column and b == 1 else None,
            )
            axis.plot(
                predicted[:, a],
                predicted[:, b],
                color=style.predicted,
                marker=".",
                markersize=4,
                linestyle="--",
                label="predicted" if not column and b == 1 else None,
            )
            axis.set(xlabel=f"{names[a]} ({unit})", ylabel=f"{names[b]} ({unit})")
            axis.locator_params(nbins=4)
            axis.margins(0.15)
        axes[0, column].set_title(f"{data.datasets[data.dataset[row]]}\nobservation {row}")
    share = 100 * np.mean(gaps) / max(np.mean(reach), 1e-9)
    verdict = "the ways overlap" if share < 10 else "the ways are near each other" if share < 30 else "the ways part"
    return finish(figure, f"Mean gap {share:.0f} % of the way's extent: {verdict} (B4)", style)


def _ways(data: PanelData, row: int) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], str]:
    """Expert's and predicted way [T or T+1,3] of observation `row`, the names of its three coordinates and their
    unit."""
    k, on = data.dataset[row], data.active[row]  # [T,128]
    steps = on.any(1)
    native = [x[row][steps] * data.half_range[k] + data.center[k] for x in (data.target, data.pred)]  # [t,128] each
    for side in ("", "left_"):
        position, velocity = ([SLOTS[f"{side}eef_{kind}_{a}"] for a in "xyz"] for kind in ("pos", "vel"))
        if on[:, position].any():
            expert, predicted = (x[:, position] * on[steps][:, position] for x in native)
            return expert, predicted, ("x", "y", "z"), "m"
        if on[:, velocity].any():
            ways = (np.cumsum(x[:, velocity] * on[steps][:, velocity], 0) / data.hz[k] for x in native)
            expert, predicted = (np.vstack([np.zeros(3), way]) for way in ways)
            return expert, predicted, ("x", "y", "z"), "m"
    moved = np.argsort([-np.ptp(native[0][:, i]) if on[:, i].any() else 1.0 for i in range(on.shape[1])])[:3]
    units = {slots()[i].unit for i in moved}
    return (
        native[0][:, moved],
        native[1][:, moved],
        tuple(slots()[i].name for i in moved),
        units.pop() if len(units) == 1 else "native units",
    )


def mode_coverage(data: PanelData, style: Style = LIGHT) -> Figure:
    """C2: chunks of the largest datasets in the principal plane of the expert's; good: the clouds overlap."""
    if not data.groups:
        return say_nothing(new_figure(style), "Too few whole chunks to compare (C2)", style)
    shown = data.groups[:SHOWN]
    figure = new_figure(style, max(5.5, 4 * min(2, len(shown)) + 0.5), 3.8 * -(-len(shown) // 2) + 0.6)
    for n, (axis, (k, rows)) in enumerate(zip(grid(figure, len(shown), 2), shown)):
        expert, predicted = data.flat(data.target, k, rows), data.flat(data.pred, k, rows)  # [n,D] each
        mean, axes, shares = principal(expert)
        for values, marker, colour, label in (
            (expert, "*", style.expert, "expert"),
            (predicted, ".", style.predicted, "predicted"),
        ):
            axis.plot(
                *((values - mean) @ axes.T).T, marker, color=colour, markersize=6, alpha=0.7, label=None if n else label
            )
        axis.set(
            title=f"{data.datasets[k]}, {len(rows)} chunks",
            xlabel=f"1st principal axis ({100 * shares[0]:.0f} % of the variance)",
            ylabel=f"2nd ({100 * shares[1]:.0f} %)",
        )
    if "mode_coverage" not in data.result:
        return finish(figure, "Too few chunks for a number; see whether the clouds overlap (C2)", style)
    covered, distance = data.result["mode_coverage"], data.result["mmd"]
    verdict = (
        "most of what it does is missing"
        if covered < 50
        else "the clouds overlap"
        if covered > 80
        else "parts are missing"
    )
    return finish(
        figure, f"{covered:.0f} % of the expert's modes are predicted: {verdict}; MMD² {distance:.3f} (C2)", style
    )


def smoothness(data: PanelData, style: Style = LIGHT) -> Figure:
    """C3: how fast, how jerkily and at which frequencies actions change within a chunk; good: as the expert's."""
    whole = np.flatnonzero(np.all(data.active.any(2), 1))
    steps = data.target.shape[1]
    if steps < 4 or not len(whole):
        return say_nothing(
            new_figure(style),
            f"Chunks of {steps} steps are too short for a jerk (C3)" if steps < 4 else "No chunk is whole (C3)",
            style,
        )
    on = np.all(data.active[whole], 1)  # [n,128]
    count = np.maximum(on.sum(1), 1)  # [n]
    figure = new_figure(style, 10, 3.6)
    left, middle, right = figure.subplots(1, 3)
    jerks, rates = [], {data.hz[k] for k in data.dataset[whole]}
    hz = rates.pop() if len(rates) == 1 else None
    for chunks, colour, name, marker in (
        (data.target, style.expert, "expert", "o"),
        (data.pred, style.predicted, "predicted", "."),
    ):
        values = np.where(on[:, None], chunks[whole], 0)  # [n,T,128]
        speed, jerk = (np.abs(np.diff(values, order, axis=1)).sum(2) / count[:, None] for order in (1, 3))
        power = (np.abs(np.fft.rfft(values - values.mean(1, keepdims=True), axis=1)) ** 2).sum(2) / count[
            :, None
        ]  # [n,T//2+1]
        jerks.append(jerk.mean())
        left.plot(range(1, steps), speed.mean(0), color=colour, marker=marker, label=name)
        middle.plot(range(3, steps), jerk.mean(0), color=colour, marker=marker)
        right.plot(np.fft.rfftfreq(steps, 1 / (hz or 1))[1:], power.mean(0)[1:] + 1e-12, color=colour, marker=marker)
    left.set(xlabel="step of the chunk", ylabel="|change| per step (normalised units)", ylim=(0, None))
    middle.set(xlabel="step of the chunk", ylabel="|jerk| per step³", ylim=(0, None))
    right.set(xlabel="frequency (Hz)" if hz else "frequency (cycles per step)", ylabel="power", yscale="log")
    for axis in (left, middle):
        axis.locator_params(axis="x", integer=True, nbins=6)
        axis.set_ylim(top=1.3 * axis.get_ylim()[1])  # room for the legend
    ratio = jerks[1] / max(jerks[0], 1e-12)
    if jerks[0] < 1e-9:
        return finish(figure, "The expert moves without any jerk: nothing to compare (C3)", style)
    verdict = (
        "it jitters"
        if ratio > JITTER
        else "smoother than the expert"
        if ratio < 1 / JITTER
        else "as smooth as the expert"
    )
    return finish(figure, f"Jerk {ratio:.2g} × the expert's: {verdict} (C3)", style)
