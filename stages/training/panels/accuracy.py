"""Panels of errors: A3 prediction scatter, A4 error by dimension, B2 by dimension and time, B3 by region, B5 by time.

Letters: N observations, T action steps.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from ....cache.actions.slots import slots
from ....common.figures import LIGHT, Style, finish, grid, label_bars, new_figure, say_nothing
from .data import PanelData, grade

UNIT = "normalized units"
GOOD_R2 = 0.8  # from which on a dimension counts as predicted
HARD = 2.0  # × the median error from which on a dimension stands out
GROWTH = 50.0  # percent from first to last step that is too much


def prediction_scatter(data: PanelData, style: Style = LIGHT) -> Figure:
    """A3: predicted against expert values of up to 12 dimensions, each with its R²; good: points on the diagonal."""
    shown = data.shown()
    figure = new_figure(style, 9, 2.4 * -(-len(shown) // 4) + 0.7)
    explained = {}
    for axis, i in zip(grid(figure, len(shown), 4), shown):
        on = data.active[..., i]
        a, p = data.target[..., i][on], data.pred[..., i][on]
        explained[i] = 1 - np.square(p - a).mean() / max(a.var(), 1e-12)
        low, high = min(a.min(), p.min()), max(a.max(), p.max())
        axis.plot([low, high], [low, high], color=style.expert, linewidth=1)
        axis.plot(a, p, ".", color=style.predicted, markersize=2, alpha=0.4, rasterized=True)
        axis.set_title(f"{slots()[i].name}\n" + ("constant" if a.std() < 1e-4 else f"R² {explained[i]:.2f}"))
    figure.supxlabel(f"expert ({UNIT})", fontsize=8, color=style.text)
    figure.supylabel("predicted", fontsize=8, color=style.text)
    moving = [r for i, r in explained.items() if data.target[..., i][data.active[..., i]].std() >= 1e-4]
    good = sum(r >= GOOD_R2 for r in moving)
    verdict = (
        "no dimension is predicted better than by its mean"
        if moving and max(moving) <= 0.05
        else f"median R² {np.median(moving):.2f}"
        if moving
        else "the expert never moves"
    )
    return finish(
        figure, f"{good} of {len(moving)} moving dimensions predicted (R² ≥ {GOOD_R2}); {verdict} (A3)", style
    )


def error_by_dimension(data: PanelData, style: Style = LIGHT) -> Figure:
    """A4: mean absolute error of every dimension, colored by region; good: low bars of one length."""
    values = data.of_slot("mae")
    used = data.used
    figure = new_figure(style, 8, 0.2 * len(used) + 1.8)
    axis = figure.subplots()
    regions = list(dict.fromkeys(slots()[i].region for i in used))
    for n, region in enumerate(regions):
        mine = [j for j, i in enumerate(used) if slots()[i].region == region]
        axis.barh(mine, values[[used[j] for j in mine]], color=style.cycle[n % len(style.cycle)], label=region)
    median, worst = float(np.median(values[used])), max(used, key=lambda i: values[i])
    axis.axvline(median, color=style.text, linewidth=0.8, linestyle="--")
    axis.set_yticks(range(len(used)), [slots()[i].name for i in used])
    axis.invert_yaxis()
    axis.set_xlabel(f"mean absolute error ({UNIT}); dashed: median")
    times = values[worst] / max(median, 1e-9)
    stands = f"{times:.1f} × the median" if times >= HARD else "none stands out"
    return finish(
        figure, f"Hardest dimension: {slots()[worst].name}, MAE {values[worst]:.3f}, {stands} (A4)", style, "outside"
    )


def error_heatmap(data: PanelData, style: Style = LIGHT) -> Figure:
    """B2: mean absolute error by dimension and step of the chunk; good: one color."""
    used = data.used
    count = data.active[..., used].sum(0)  # [T,n]
    error = np.where(count > 0, np.nansum(np.abs(data.error[..., used]), 0) / np.maximum(count, 1), np.nan).T  # [n,T]
    figure = new_figure(style, 8, 0.2 * len(used) + 1.5)
    axis = figure.subplots()
    steps = (0.5, error.shape[1] + 0.5, len(used) - 0.5, -0.5)  # the first is step 1
    image = axis.imshow(error, aspect="auto", cmap=style.map, vmin=0, interpolation="nearest", extent=steps)
    axis.set_yticks(range(len(used)), [slots()[i].name for i in used])
    axis.set_xlabel("step of the chunk")
    figure.colorbar(image, ax=axis).set_label(f"MAE ({UNIT.split(',')[0]})")
    row, column = np.unravel_index(np.nanargmax(error), error.shape)
    times = error[row, column] / max(np.nanmean(error), 1e-9)
    where = f"{slots()[used[row]].name} at step {column + 1}, {error[row, column]:.3f}, {times:.1f} × the mean"
    return finish(figure, f"{'Hot spot' if times >= 3 else 'No hot spot; largest error'}: {where} (B2)", style)


def region_summary(data: PanelData, style: Style = LIGHT) -> Figure:
    """B3: error, correlation and coverage of each region; good: all similar."""
    names = list(dict.fromkeys(slots()[i].region for i in data.used))
    figure = new_figure(style, 9, 0.42 * len(names) + 1.6)
    kinds = (
        ("mae", f"MAE ({UNIT.split(',')[0]})", None),
        ("correlation", "correlation with the expert", 1.0),
        ("coverage", "coverage of the expert's range, %", 100.0),
    )
    found: dict[str, np.ndarray] = {}
    for axis, (metric, label, best) in zip(figure.subplots(1, 3, sharey=True), kinds):
        values = data.of_slot(metric)
        members = [
            [values[i] for i in data.used if slots()[i].region == name and np.isfinite(values[i])] for name in names
        ]
        found[metric] = np.array([np.mean(m) if m else np.nan for m in members])
        axis.barh(
            range(len(names)),
            np.nan_to_num(found[metric]),
            color=[style.cycle[n % len(style.cycle)] for n in range(len(names))],
        )
        label_bars(axis, found[metric], "constant")
        if best is not None:
            axis.axvline(best, color=style.text, linewidth=0.8, linestyle="--")
        axis.set_xlabel(label)
        axis.margins(x=0.2)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    return finish(figure, f"{_region_verdict(names, found['correlation'], found['coverage'])} (B3)", style)


def _region_verdict(names: list[str], correlation: np.ndarray, coverage: np.ndarray) -> str:
    if not np.isfinite(correlation).any():
        return "The expert never moves: no region can be judged"
    worst, best = int(np.nanargmin(correlation)), np.nanmax(correlation)
    if best < 0.2:
        return f"No region is predicted: the best correlation is {best:.2f}"
    weakest = f"eakest region: {names[worst]}, correlation {correlation[worst]:.2f}, coverage {coverage[worst]:.0f} %"
    return f"Regions are similar; w{weakest}" if best - correlation[worst] < 0.2 else f"W{weakest}"


def temporal_error(data: PanelData, style: Style = LIGHT) -> Figure:
    """B5: error by step of the chunk with the middle 80 % of observations; good: flat or rising slowly."""
    count = data.active.sum(2)  # [N,T]
    each = np.where(count > 0, np.nansum(np.abs(data.error), 2) / np.maximum(count, 1), np.nan)  # [N,T]
    seen = np.isfinite(each).any(0)
    if not seen.any():
        return say_nothing(new_figure(style), "No step of the chunks counts (B5)", style)
    mean, (low, high) = np.nanmean(each[:, seen], 0), np.nanpercentile(each[:, seen], (10, 90), axis=0)
    figure = new_figure(style, 8, 3.6)
    axis, steps = figure.subplots(), np.flatnonzero(seen) + 1
    band = f"middle 80 % of {len(each)} {data.what}"
    axis.fill_between(steps, low, high, color=style.predicted, alpha=0.25, linewidth=0, label=band)
    axis.plot(steps, mean, color=style.predicted, marker="o", markersize=4, label="mean")
    axis.set(xlabel="step of the chunk", ylabel=f"MAE ({UNIT})", ylim=(0, None))
    growth = 100 * (mean[-1] / max(mean[0], 1e-9) - 1)
    if mean[0] <= 1e-6:
        return finish(figure, "There is no error at the first step (B5)", style, "lower left")
    verdict = grade(
        growth,
        (10, "the end of a chunk is no harder than its beginning"),
        (GROWTH, "it rises slowly"),
        beyond="it rises too fast, the end of a chunk is guessed",
    )
    return finish(figure, f"Error {growth:+.0f} % from first to last step: {verdict} (B5)", style, "lower left")
