"""The toys' numbers as rows of plain values, rich tables and Markdown."""

from __future__ import annotations

import statistics
from typing import Any

from rich.table import Table

from ....common.console import markdown_table, table

METRICS = {
    "share_error": "share error",
    "coverage": "both modes covered",
    "between": "off both modes",
    "distance": "distance to mode",
}


def plane_rows(plane: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Run → its settings, distances and curve; not its samples."""
    return {name: {key: value for key, value in result.items() if key != "samples"} for name, result in plane.items()}


def action_rows(actions: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row per run and number of passes: settings, and of every metric [mean, sample std] over the seeds."""
    rows = []
    for name, results in actions.items():
        for passes in results[0]["metrics"]:
            values = {m: [r["metrics"][passes][m] for r in results] for m in METRICS}
            settings = {
                k: v for k, v in results[0].items() if k not in ("metrics", "shown", "seed", "steps", "seconds")
            }
            rows.append(
                {
                    "name": name,
                    "passes": int(passes),
                    "seeds": [r["seed"] for r in results],
                    **settings,
                    **{m: [statistics.fmean(v), statistics.stdev(v) if len(v) > 1 else 0.0] for m, v in values.items()},
                }
            )
    return rows


def _plane_cells(rows: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    head = ["target, recipe", "initial", "final", "data to data", "ratio", "nearest", "nearest, data", "steps", "s"]
    return head, [
        [
            name,
            *(f"{r[key]:.3f}" for key in ("start", "distance", "data_to_data")),
            f"{r['ratio']:.1f}",
            *(f"{r[key]:.3f}" for key in ("nearest", "nearest_data")),
            str(r["steps"]),
            f"{r['seconds']:.0f}",
        ]
        for name, r in rows.items()
    ]


def label(row: dict[str, Any]) -> str:
    """Name of a row, with the forward passes of methods that take several."""
    return (
        f"{row['name']}, {row['passes']} pass{'es' * (row['passes'] > 1)}"
        if row["kind"] in ("flow", "diffusion")
        else row["name"]
    )


def _action_cells(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    def cell(metric: str, mean: float, std: float) -> str:
        if len(rows[0]["seeds"]) == 1:
            return f"{mean:.3f}" if metric == "distance" else f"{100 * mean:.1f} %"
        return f"{mean:.3f} ± {std:.3f}" if metric == "distance" else f"{100 * mean:.1f} ± {100 * std:.1f} %"

    return ["method", "passes", *METRICS.values()], [
        [r["name"], str(r["passes"]), *(cell(m, *r[m]) for m in METRICS)] for r in rows
    ]


def over_seeds(rows: list[dict[str, Any]]) -> str:
    """Over how many seeds the numbers of `action_rows` are."""
    seeds = len(rows[0]["seeds"])
    return "one seed" if seeds == 1 else f"mean ± std over {seeds} seeds"


def plane_table(rows: dict[str, dict[str, Any]]) -> Table:
    """Sliced-Wasserstein distances in the plane."""
    title = "Sliced-Wasserstein distance to fresh data, and mean distance to the nearest of 2048 fresh points"
    return table(*_plane_cells(rows), title=title)


def action_table(rows: list[dict[str, Any]]) -> Table:
    """The two-way toy, mean ± std over seeds."""
    return table(*_action_cells(rows), title=f"Two ways around an obstacle, {over_seeds(rows)}")


def markdown(summary: dict[str, Any]) -> str:
    """Both tables."""
    both = (_plane_cells(summary["plane"]), _action_cells(summary["actions"]))
    return "\n".join(markdown_table(*cells) for cells in both)
