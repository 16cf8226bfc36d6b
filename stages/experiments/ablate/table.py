"""Results of `dvla ablate`: evaluations and training logs, collected in results.json and table.md."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from statistics import fmean
from typing import Any

from ....common.console import markdown_table
from ....common.documents import json_bytes
from ....common.files import write_file
from ....common.text import duration
from ...policy.evaluation import read_summary
from ...simulation.rollout import wilson_interval
from ...training.config import read_settings
from ...training.run_log import evaluations, read_log
from .recipe import REFERENCES, Recipe, cache_of, rows, slug


def results(recipe: Recipe, out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """All that has finished, as in results.json.

    Args:
        settings: what recipe.json holds.

    Returns:
        `rows[name]`, which include expert, random and, where there is one, blind, but no row without finished cells:
        `tasks[env]` (`success`, `ci95`, `episodes` over all seeds, `by_seed`, `mean_return`, `ms_per_action`,
        `ms_per_chunk`), `steps_per_second`, and by seed `held_out_mse`, `train_seconds`, `eval_seconds`.
    """
    found: dict[str, Any] = {}
    for name, variant in rows(recipe).items():
        of = slug(variant.of or name)
        found[name] = _row(recipe, _by_seed(recipe, out / "eval", slug(name)), _by_seed(recipe, out / "runs", of))
        if found[name] is not None:
            found[name] |= {"of": variant.of, "cache": cache_of(recipe, out, variant.of or name).name}
    if recipe.blind is not None:
        found["blind"] = _row(recipe, _by_seed(recipe, out / "eval", "blind"), _by_seed(recipe, out / "runs", "blind"))
    references = _by_seed(recipe, out / "eval", "references")
    for name in REFERENCES:
        found[name] = _row(recipe, {seed: folder / name for seed, folder in references.items()}, {})
    if found["random"] is not None:
        found["random"]["eval_seconds"] = {}  # rolled out with the expert, whose seconds cover both
    return {
        "settings": settings,
        "seeds": list(recipe.seeds),
        "episodes": recipe.episodes,
        "title": recipe.title,
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "platform": platform.platform()},
        "rows": {name: row for name, row in found.items() if row is not None},
    }


def _by_seed(recipe: Recipe, folder: Path, name: str) -> dict[int, Path]:
    return {seed: folder / f"{name}-{seed}" for seed in recipe.seeds}


def _row(recipe: Recipe, evaluations: dict[int, Path], runs: dict[int, Path]) -> dict[str, Any] | None:
    """One row, over the seeds whose evaluation is finished; None where there is none."""
    summaries = {
        seed: read_summary(folder) for seed, folder in evaluations.items() if (folder / "summary.json").exists()
    }
    if not summaries:
        return None
    tasks = {}
    for env in recipe.environments:
        each = {seed: summary["tasks"][env] for seed, summary in summaries.items()}
        won, total = sum(sum(one["successes"]) for one in each.values()), sum(one["episodes"] for one in each.values())
        chunk = [one["ms_per_chunk"] for one in each.values() if one["ms_per_chunk"] is not None]
        tasks[env] = {
            "success": won / total,
            "ci95": list(wilson_interval(won, total)),
            "episodes": total,
            "by_seed": {str(seed): one["success"] for seed, one in each.items()},
            "mean_return": fmean(one["mean_return"] for one in each.values()),
            "ms_per_action": fmean(one["ms_per_action"] for one in each.values()),
            "ms_per_chunk": fmean(chunk) if chunk else None,
        }
    trained = {seed: _training(runs[seed]) for seed in summaries if seed in runs}
    return {
        "tasks": tasks,
        "seeds": list(summaries),
        "eval_seconds": {str(s): summary["seconds"] for s, summary in summaries.items()},
        "held_out_mse": {str(s): t["held_out_mse"] for s, t in trained.items()},
        "train_seconds": {str(s): t["seconds"] for s, t in trained.items()},
        "steps_per_second": fmean(t["steps_per_second"] for t in trained.values()) if trained else None,
    }


def _training(run: Path) -> dict[str, Any]:
    """Speed, time and last held-out error of a run, from its log."""
    lines, seconds = read_log(run), training_seconds(run)
    held = evaluations(lines)
    return {
        "seconds": seconds,
        "steps_per_second": lines[-1]["step"] / seconds,
        "held_out_mse": held[-1]["eval/mse"] if held else None,
    }


def training_seconds(run: Path) -> float:
    """Seconds that the steps of a run took, from its log and settings."""
    config, seconds, before = read_settings(run, whole=False), 0.0, 0
    for line in read_log(run):
        seconds += (line["step"] - before) * config["batch_size"] * config["accumulate"] / line["samples_per_second"]
        before = line["step"]
    return seconds


def cells(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of the table."""
    names = found["rows"]
    envs = list(next(iter(names.values()))["tasks"]) if names else []
    tail = ["mean", "ms/chunk", "ms/action", "held-out MSE", "steps/s", "training", "seeds"]
    head = ["", *(env.partition("/")[2] for env in envs), *tail]
    out = []
    for name, row in names.items():
        tasks = [row["tasks"][env] for env in envs]
        chunk = [t["ms_per_chunk"] for t in tasks if t["ms_per_chunk"] is not None]
        own = row.get("of") is None  # or training, speed and held-out error are another row's
        errors = [e for e in row["held_out_mse"].values() if e is not None and own]
        seconds = row["train_seconds"].values() if own else ()
        acts = name not in REFERENCES
        out.append(
            [
                name,
                *map(_success, tasks),
                f"{fmean(t['success'] for t in tasks):.0%}",
                f"{fmean(chunk):.1f}" if chunk else "–",
                f"{fmean(t['ms_per_action'] for t in tasks):.2f}" if acts else "–",
                f"{fmean(errors):.4f}" if errors else "–",
                f"{row['steps_per_second']:.1f}" if seconds else "–",
                duration(fmean(seconds)) if seconds else "–" if own else f"see {row['of']}",
                ", ".join(map(str, row["seeds"])),
            ]
        )
    return head, out


def _success(task: dict[str, Any]) -> str:
    low, high = task["ci95"]
    seeds = " / ".join(f"{100 * rate:.0f}" for rate in task["by_seed"].values())
    each = f"; {seeds}" if len(task["by_seed"]) > 1 else ""
    return f"{task['success']:.0%} ({100 * low:.0f} – {100 * high:.0f}{each})"


def document(found: dict[str, Any]) -> str:
    """table.md."""
    seconds = sum(
        sum(row["eval_seconds"].values()) + (0 if row.get("of") else sum(row["train_seconds"].values()))
        for row in found["rows"].values()
    )
    return (
        f"**{found['title']}**\n\n{markdown_table(*cells(found))}\n"
        f"Success over all seeds (95 % Wilson interval; each seed), {found['episodes']} held-out initial states per "
        "task and seed, the same for all rows of a seed; ms/chunk: one call for one observation, images included; "
        "ms/action: policy time per control step in the rollouts, where episodes share calls; held-out MSE: on "
        "held-out demonstrations; training: mean time of one run. Training and evaluation took "
        f"{duration(seconds)} in total on {found['hardware']['cores']} CPU cores.\n"
    )


def write(recipe: Recipe, out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Write results.json and table.md of what has finished; returns the former."""
    found = results(recipe, out, settings)
    write_file(out / "results.json", json_bytes(found))
    write_file(out / "table.md", document(found).encode())
    return found
