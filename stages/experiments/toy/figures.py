"""The toys' figures, in the colors of the panels."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from ....common.figures import BLUE, GREEN, GREY, LIGHT, ORANGE, PURPLE, new_figure, save
from ....common.files import write_file
from .data import NOISE, STEPS, modes
from .tables import METRICS, label, over_seeds

# A run matches its target below these multiples of fresh data's own values: of the sliced-Wasserstein distance, and of
# the mean distance to the nearest data point (a blur passes the first, not the second).
CLOSE, SHARP = 5, 2
LINES = ((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (PURPLE, ":"))


def _dots(axis: Any, points: np.ndarray, color: str) -> None:
    """A square scatter plot of samples [n,2]; their coordinates have no unit."""
    axis.plot(points[:, 0], points[:, 1], ".", color=color, markersize=1.5, alpha=0.6)
    axis.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal", xticks=[], yticks=[])


def _matches(result: dict[str, Any]) -> bool:
    return result["ratio"] < CLOSE and result["nearest"] < SHARP * result["nearest_data"]


def _recipe(name: str, result: dict[str, Any]) -> str:
    return name.removeprefix(f"{result['picture']}, ")


def evolution_figure(plane: dict[str, dict[str, Any]], path: Path) -> None:
    """A row of snapshots per run, with the distance to fresh data above each."""
    shown = 6
    figure = new_figure(LIGHT, 1.5 * shown + 0.6, 1.55 * len(plane) + 0.6)
    for axes, (name, result) in zip(figure.subplots(len(plane), shown, squeeze=False), plane.items()):
        picks = np.linspace(0, len(result["curve"]) - 1, shown).round().astype(int)
        for axis, at in zip(axes, picks):
            _dots(axis, result["samples"][at], BLUE if _matches(result) else ORANGE)
            point = result["curve"][at]
            axis.set_title(f"step {point['step']}: {point['distance']:.2f}", fontsize=8, pad=2)
        axes[0].set_ylabel(f"{result['picture']}\n{_recipe(name, result)}".replace(", ", ",\n"), fontsize=8)
    matched = sum(map(_matches, plane.values()))
    figure.suptitle(
        f"Pure drifting matches the target in {matched} of {len(plane)} runs (blue; others orange): sliced-Wasserstein "
        f"distance below {CLOSE} ×,\ndistance to the nearest data point below {SHARP} × fresh data's own. 1000 samples;"
        " above each plot: sliced-Wasserstein distance to fresh data",
        fontsize=9,
    )
    save(figure, path, 75)


def evolution_gif(plane: dict[str, dict[str, Any]], recipe: str, path: Path) -> None:
    """Both targets under one recipe, a frame per measured step; the last one is held."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    runs = {name: result for name, result in plane.items() if _recipe(name, result) == recipe}
    frames = []
    for i in range(min(len(result["curve"]) for result in runs.values())):
        figure = new_figure(LIGHT, 2.6 * len(runs), 3.0)
        for axis, result in zip(np.atleast_1d(figure.subplots(1, len(runs))), runs.values()):
            _dots(axis, result["samples"][i], BLUE)
            point, reference = result["curve"][i], result["data_to_data"]
            title = f"{result['picture']}, step {point['step']}\n"
            title += f"distance {point['distance']:.3f} (data to data {reference:.3f})"
            axis.set_title(title, fontsize=8)
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer)
        frames.append(Image.open(buffer).convert("P", palette=Image.Palette.ADAPTIVE, colors=8))
    duration = [200] * (len(frames) - 1) + [2500]  # ms
    gif = io.BytesIO()
    frames[0].save(gif, "gif", save_all=True, append_images=frames[1:], duration=duration, loop=0, optimize=True)
    write_file(path, gif.getvalue())


def curve_figure(plane: dict[str, dict[str, Any]], path: Path) -> None:
    """Distance (above) and λ (below) over steps, a column per target, a line per recipe."""
    targets = list(dict.fromkeys(result["picture"] for result in plane.values()))
    figure = new_figure(LIGHT, 5.2 * len(targets), 6.5)
    rows = figure.subplots(2, len(targets), sharex=True, squeeze=False)
    for column, target in enumerate(targets):
        above, below = rows[0][column], rows[1][column]
        runs = [(name, result) for name, result in plane.items() if result["picture"] == target]
        for (name, result), (color, line) in zip(runs, LINES):
            style = {"color": color, "linestyle": line}
            steps = [point["step"] for point in result["curve"]]
            above.plot(steps, [point["distance"] for point in result["curve"]], label=_recipe(name, result), **style)
            below.plot(steps, [np.mean(point["log_mean_square"]) for point in result["curve"]], **style)
        reference, best = runs[0][1]["data_to_data"], min(result["ratio"] for _, result in runs)
        above.axhline(reference, color="black", linewidth=0.8)
        above.text(0, reference, " data to data", va="bottom", fontsize=8)
        title = f"{target}: distance falls to {best:.1f} × data to data"
        above.set(title=title, ylabel="sliced-Wasserstein distance", yscale="log")
        above.set_yticks(ticks := [0.02, 0.05, 0.1, 0.2, 0.5, 1], [f"{tick:g}" for tick in ticks])
        above.minorticks_off()
        label = "log mean(F²), mean over temperatures"
        below.set(title="What training logs: log mean(F²)", xlabel="training step", ylabel=label)
    handles, names = rows[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize=8)
    save(figure, path, 90)


def _action_title(rows: list[dict[str, Any]]) -> str:
    """How many rows keep both modes, and which lose one."""
    lost = [label(row) for row in rows if row["coverage"][0] < 0.5]
    named = f"; not by: {'; '.join(lost)}" if 0 < len(lost) <= 8 else ""
    kept = f"{len(rows) - len(lost)} of {len(rows)} rows"
    return f"Both ways around the obstacle are covered for most observations by {kept}{named}"


def action_figure(rows: list[dict[str, Any]], path: Path) -> None:
    """One axes per metric, a row per method, the std over seeds as an error bar."""
    figure = new_figure(LIGHT, 13, 0.24 * len(rows) + 1.6)
    colors = {"expert": "black", "mse": GREY, "flow": GREEN, "diffusion": GREEN, "hybrid": PURPLE}
    best = {
        "share_error": "lower is better",
        "coverage": "higher is better",
        "between": "lower is better",
        "distance": f"expert: {NOISE}",
    }
    axes = figure.subplots(1, len(METRICS), sharey=True)
    for axis, (metric, name) in zip(axes, METRICS.items()):
        for i, row in enumerate(rows):
            mean, std = row[metric]
            color = colors.get(row["kind"], BLUE)
            axis.errorbar(mean, -i, xerr=std, color=color, marker="o", markersize=5, capsize=3)
        axis.set_title(f"{name}\n({best[metric]})", fontsize=10)
        axis.set_xlim(left=-0.02 * (max(row[metric][0] for row in rows) or 1))
        axis.grid(axis="both", linewidth=0.3)
        if metric == "distance":
            axis.set_xlabel("per entry, normalized action", fontsize=9)
            axis.locator_params(axis="x", nbins=5)
        else:
            axis.xaxis.set_major_formatter("{x:.0%}")
            axis.set_xlim(right=min(axis.get_xlim()[1], 1.05))
    axes[0].set_yticks([-i for i in range(len(rows))], [label(row) for row in rows], fontsize=9)
    axes[0].set_ylim(-len(rows) + 0.3, 0.7)
    figure.suptitle(
        "\n".join([*textwrap.wrap(_action_title(rows), 150), f"one demonstration per observation; {over_seeds(rows)}"]),
        fontsize=10,
    )
    save(figure, path, 90)


SHOWN = (
    "expert",
    "regression (MSE)",
    "flow",
    "diffusion",
    "drifting",
    "hybrid λ 1",
    "hybrid λ 0.1",
    "hybrid λ 0.01",
    "drifting, G 2",
    "drifting, G 1",
)


def sample_figure(actions: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Chunks sampled for one held-out observation by ten methods, as paths on the table, forward upwards; the first
    seed."""
    import torch

    names = [name for name in SHOWN if name in actions]
    figure = new_figure(LIGHT, 12, 4.8)
    center = modes(torch.tensor([[-0.5, 0.0]]))[0].unflatten(1, (STEPS, 2)).numpy()  # [2,STEPS,2]
    for axis, name in zip(figure.subplots(2, 5, sharex=True, sharey=True).flat, names):
        first = actions[name][0]
        samples = np.asarray(first["shown"]).reshape(-1, STEPS, 2)  # [S,STEPS,2]
        for chunk, style in (
            (samples, {"color": BLUE, "alpha": 0.35, "linewidth": 0.8}),
            (center, {"color": ORANGE, "linewidth": 1.5, "linestyle": "--"}),
        ):
            paths = np.concatenate([np.zeros_like(chunk[:, :1]), chunk], axis=1)  # [S,STEPS+1,2] from the origin
            axis.plot(-paths[..., 1].T, paths[..., 0].T, **style)
        passes = max(first["metrics"], key=int)
        method = f"{name}, {passes} passes" if int(passes) > 1 else name
        axis.set_title(f"{method}\n{first['metrics'][passes]['between']:.0%} off both modes", fontsize=9)
        axis.set(xlim=(-0.62, 0.62), ylim=(-0.2, 0.5))
    figure.supxlabel("left  ←  sideways (normalized action)  →  right", fontsize=9)
    figure.supylabel("forward (normalized action)", fontsize=9)
    figure.suptitle(
        "64 chunks (blue) sampled for one held-out observation; dashed: the expert's two paths, 70 % right; "
        "percentages: over 64 held-out observations",
        fontsize=10,
    )
    save(figure, path, 80)
