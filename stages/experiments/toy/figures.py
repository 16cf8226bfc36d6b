"""The toys' pictures, in the panels' colours."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from ....common.figures import BLUE, GREEN, GREY, ORANGE, PURPLE
from .data import NOISE, STEPS, modes
from .tables import METRICS, label, over_seeds

CLOSE, SHARP = (
    5,
    2,
)  # limits, as multiples of fresh data's own, under which a run is said to have drawn its picture: sliced-Wasserstein
# distance, and mean distance to the nearest data point (a blur passes the first, not the second)
LINES = ((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (PURPLE, ":"))


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _dots(axis: Any, points: np.ndarray, colour: str) -> None:
    """A square picture of samples [n,2]; coordinates have no unit and no meaning of their own."""
    axis.plot(points[:, 0], points[:, 1], ".", color=colour, markersize=1.5, alpha=0.6)
    axis.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal", xticks=[], yticks=[])


def _drawn(result: dict[str, Any]) -> bool:
    return result["ratio"] < CLOSE and result["nearest"] < SHARP * result["nearest_data"]


def _recipe(name: str, result: dict[str, Any]) -> str:
    return name.removeprefix(f"{result['picture']}, ")


def evolution_figure(plane: dict[str, dict[str, Any]], path: Path) -> None:
    """A row of snapshots per run, ending with its ratio to the data-to-data distance."""
    shown = 6
    figure = _figure(1.5 * shown + 0.6, 1.55 * len(plane) + 0.6)
    for axes, (name, result) in zip(figure.subplots(len(plane), shown, squeeze=False), plane.items()):
        picks = np.linspace(0, len(result["curve"]) - 1, shown).round().astype(int)
        for axis, at in zip(axes, picks):
            _dots(axis, result["samples"][at], BLUE if _drawn(result) else ORANGE)
            axis.set_title(
                f"step {result['curve'][at]['step']}: {result['curve'][at]['distance']:.2f}", fontsize=8, pad=2
            )
        axes[0].set_ylabel(f"{result['picture']}\n{_recipe(name, result)}".replace(", ", ",\n"), fontsize=8)
    drawn = sum(map(_drawn, plane.values()))
    figure.suptitle(
        f"Pure drifting draws the picture in {drawn} of {len(plane)} runs (blue, others orange): distance to data below {CLOSE} ×,\n"
        f"distance to the nearest data point below {SHARP} × fresh data's own. 1000 samples; above each picture: "
        "sliced-Wasserstein distance to fresh data",
        fontsize=9,
    )
    figure.savefig(path, dpi=75)


def evolution_gif(plane: dict[str, dict[str, Any]], recipe: str, path: Path) -> None:
    """Both pictures under one recipe, a frame per measured step, the last one held."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    runs = {name: result for name, result in plane.items() if _recipe(name, result) == recipe}
    frames = []
    for i in range(min(len(result["curve"]) for result in runs.values())):
        figure = _figure(2.6 * len(runs), 3.0)
        for axis, result in zip(np.atleast_1d(figure.subplots(1, len(runs))), runs.values()):
            _dots(axis, result["samples"][i], BLUE)
            axis.set_title(
                f"{result['picture']}, step {result['curve'][i]['step']}\ndistance {result['curve'][i]['distance']:.3f} "
                f"(data to data {result['data_to_data']:.3f})",
                fontsize=8,
            )
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer)
        frames.append(Image.open(buffer).convert("P", palette=Image.Palette.ADAPTIVE, colors=8))
    frames[0].save(
        path,
        save_all=True,
        append_images=frames[1:],
        duration=[200] * (len(frames) - 1) + [2500],
        loop=0,
        optimize=True,
    )


def curve_figure(plane: dict[str, dict[str, Any]], path: Path) -> None:
    """Distance (above) and λ (below) over steps, a column per picture, a line per recipe."""
    pictures = list(dict.fromkeys(result["picture"] for result in plane.values()))
    figure = _figure(5.2 * len(pictures), 6.5)
    rows = figure.subplots(2, len(pictures), sharex=True, squeeze=False)
    for column, picture in enumerate(pictures):
        above, below = rows[0][column], rows[1][column]
        runs = [(name, result) for name, result in plane.items() if result["picture"] == picture]
        for (name, result), (colour, line) in zip(runs, LINES):
            steps = [point["step"] for point in result["curve"]]
            above.plot(
                steps,
                [point["distance"] for point in result["curve"]],
                color=colour,
                linestyle=line,
                label=_recipe(name, result),
            )
            below.plot(
                steps, [np.mean(point["log_mean_square"]) for point in result["curve"]], color=colour, linestyle=line
            )
        reference, best = runs[0][1]["data_to_data"], min(result["ratio"] for _, result in runs)
        above.axhline(reference, color="black", linewidth=0.8)
        above.text(0, reference, " data to data", va="bottom", fontsize=8)
        above.set(
            title=f"{picture}: distance falls to {best:.1f} × data to data",
            ylabel="sliced-Wasserstein distance",
            yscale="log",
        )
        above.set_yticks(ticks := [0.02, 0.05, 0.1, 0.2, 0.5, 1], [f"{tick:g}" for tick in ticks])
        above.minorticks_off()
        below.set(
            title="what training sees: log mean(F²)",
            xlabel="training step",
            ylabel="log mean(F²), mean over temperatures",
        )
    handles, names = rows[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=90)


def _action_title(rows: list[dict[str, Any]]) -> str:
    """Which rows keep both ways, from the numbers."""
    lost = [label(row) for row in rows if row["coverage"][0] < 0.5]
    named = f"; lost by: {'; '.join(lost)}" if 0 < len(lost) <= 8 else ""
    return (
        f"Both ways round the obstacle live in most observations in {len(rows) - len(lost)} of {len(rows)} rows" + named
    )


def action_figure(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel per metric, a row per method, the std over seeds as a bar."""
    figure = _figure(13, 0.24 * len(rows) + 1.6)
    best = {
        "share_error": "lower is better",
        "coverage": "higher is better",
        "between": "lower is better",
        "distance": f"an expert: {NOISE}",
    }
    axes = figure.subplots(1, len(METRICS), sharey=True)
    for axis, (metric, name) in zip(axes, METRICS.items()):
        for i, row in enumerate(rows):
            mean, std = row[metric]
            colour = {"expert": "black", "mse": GREY, "flow": GREEN, "diffusion": GREEN, "hybrid": PURPLE}.get(
                row["kind"], BLUE
            )
            axis.errorbar(mean, -i, xerr=std, color=colour, marker="o", markersize=5, capsize=3)
        axis.set_title(f"{name}\n({best[metric]})", fontsize=10)
        axis.set_xlim(left=-0.02 * (max(row[metric][0] for row in rows) or 1))
        axis.grid(axis="both", linewidth=0.3)
        if metric == "distance":
            axis.set_xlabel("per entry, normalised action", fontsize=9)
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
    figure.savefig(path, dpi=90)


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
    """Chunks drawn for one unseen observation by ten methods, as ways on the table, ahead upwards; the first seed."""
    import torch

    names = [name for name in SHOWN if name in actions]
    figure = _figure(12, 4.8)
    centre = modes(torch.tensor([[-0.5, 0.0]]))[0].unflatten(1, (STEPS, 2)).numpy()  # [2,STEPS,2]
    for axis, name in zip(figure.subplots(2, 5, sharex=True, sharey=True).flat, names):
        first = actions[name][0]
        draws = np.asarray(first["shown"]).reshape(-1, STEPS, 2)  # [S,STEPS,2]
        for chunk, style in (
            (draws, {"color": BLUE, "alpha": 0.35, "linewidth": 0.8}),
            (centre, {"color": ORANGE, "linewidth": 1.5, "linestyle": "--"}),
        ):
            ways = np.concatenate([np.zeros_like(chunk[:, :1]), chunk], axis=1)  # [S,STEPS+1,2] from the origin
            axis.plot(-ways[..., 1].T, ways[..., 0].T, **style)
        passes = max(first["metrics"], key=int)
        method = f"{name}, {passes} passes" if int(passes) > 1 else name
        axis.set_title(f"{method}\n{first['metrics'][passes]['between']:.0%} off both modes", fontsize=9)
        axis.set(xlim=(-0.62, 0.62), ylim=(-0.2, 0.5))
    figure.supxlabel("left  ←  aside (normalised action)  →  right", fontsize=9)
    figure.supylabel("ahead (normalised action)", fontsize=9)
    figure.suptitle(
        "64 chunks (blue) drawn for one unseen observation; dashed: the expert's two ways, 70 % right; "
        "percentages: over 64 unseen observations",
        fontsize=10,
    )
    figure.savefig(path, dpi=80)
