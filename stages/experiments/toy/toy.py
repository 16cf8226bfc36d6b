"""`dvla toy`: what drifting does, shown on problems whose answer is known.

In the plane: the paper's swiss roll and checkerboard by pure drifting. Actions: a robot that may pass an obstacle on
either side, learned from one demonstration per observation by regression, flow matching, diffusion, drifting and
hybrids.

Everything lies in one folder: `settings.json`, `runs/` with one file per finished training run (an interrupted toy
resumes after the last of them), then `summary.json`, `tables.md` and the figures.
"""

from __future__ import annotations

import dataclasses
import io
import re
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ....common.documents import Form, Positive, json_bytes, read_file, read_json, require_file
from ....common.files import write_file
from ....common.progress import Progress
from ....drifting.config import POLICY_TEMPERATURES
from ....errors import UserError
from .figures import action_figure, curve_figure, evolution_figure, evolution_gif, sample_figure
from .tables import action_rows, action_table, markdown, plane_rows, plane_table
from .train import ActionRun, PlaneRun, Tick, expert_metrics, train_actions, train_plane


@dataclass(frozen=True)
class ToyScale:
    """How much of everything. Full: about twenty minutes of one core."""

    plane_steps: int
    action_steps: int
    seeds: int  # of every action run


FULL = ToyScale(plane_steps=2000, action_steps=2000, seeds=3)
QUICK = ToyScale(plane_steps=40, action_steps=40, seeds=1)

RECIPES: dict[str, dict[str, Any]] = {
    "Algorithm 2, τ 0.05": {"temperatures": (0.05,), "floor": None},  # as in the paper's notebook
    "released field, floor 1e-6": {},
    "released field, floor 1e-12": {"floor": 1e-12},
    "released field, floor 1e-6, spread 0.5": {"skip_std": 0.5},
}
METHODS = {
    "regression (MSE)": ActionRun("mse"),
    "flow": ActionRun("flow"),
    "diffusion": ActionRun("diffusion"),
    "drifting": ActionRun("pure_drift"),
    "hybrid λ 0.01": ActionRun("hybrid", drift_weight=0.01),
    "hybrid λ 0.03": ActionRun("hybrid", drift_weight=0.03),
    "hybrid λ 0.1": ActionRun("hybrid", drift_weight=0.1),
    "hybrid λ 1": ActionRun("hybrid", drift_weight=1.0),
}
SWEEPS = {  # each changes the defaults of `ActionRun` that its name says
    "drifting, G 1": ActionRun("pure_drift", draws=1),
    "drifting, G 2": ActionRun("pure_drift", draws=2),
    "drifting, G 4": ActionRun("pure_drift", draws=4),
    "drifting, G 16": ActionRun("pure_drift", draws=16),
    "hybrid λ 0.1, G 2": ActionRun("hybrid", draws=2, drift_weight=0.1),
    "hybrid λ 0.03, G 4": ActionRun("hybrid", draws=4, drift_weight=0.03),
    "hybrid λ 0.1, G 4": ActionRun("hybrid", draws=4, drift_weight=0.1),
    "hybrid λ 1, G 4": ActionRun("hybrid", draws=4, drift_weight=1.0),
    "drifting, P 4": ActionRun("pure_drift", positives=4),
    "drifting, P 16": ActionRun("pure_drift", positives=16),
    "drifting, τ to 1": ActionRun("pure_drift", temperatures=POLICY_TEMPERATURES),
    "drifting, G 4, τ to 1": ActionRun("pure_drift", draws=4, temperatures=POLICY_TEMPERATURES),
    "hybrid λ 1, G 4, τ to 1": ActionRun("hybrid", draws=4, temperatures=POLICY_TEMPERATURES),
    "drifting, 16 action steps, τ to 1": ActionRun("pure_drift", horizon=16, temperatures=POLICY_TEMPERATURES),
    "drifting, floor 1e-12": ActionRun("pure_drift", floor=1e-12),
    "drifting, no floor (Algorithm 2)": ActionRun("pure_drift", floor=None),
    "drifting, spread 0": ActionRun("pure_drift", skip_std=0.0),
    "drifting, spread 1": ActionRun("pure_drift", skip_std=1.0),
    "hybrid λ 0.1, G 4, spread 0": ActionRun("hybrid", draws=4, drift_weight=0.1, skip_std=0.0),
    "drifting, 128 observations": ActionRun("pure_drift", observations=128),
    "drifting, P 16, 128 observations": ActionRun("pure_drift", observations=128, positives=16),
    "flow, 128 observations": ActionRun("flow", observations=128),
    "drifting, 16 action steps": ActionRun("pure_drift", horizon=16),
    "flow, 16 action steps": ActionRun("flow", horizon=16),
    "drifting, 4 × training": ActionRun("pure_drift", longer=4),
    "flow, 4 × training": ActionRun("flow", longer=4),
}


def toy(out: Path, quick: bool, seed: int, say: Callable[..., None], show: Progress) -> dict[str, Any]:
    """Train what is missing, then write tables, figures and `summary.json`, which is returned.

    Uses one thread, which is fastest for networks this small.

    Raises:
        UserError: when `out` holds something else or a toy with other settings.
    """
    scale = QUICK if quick else FULL
    _claim(
        out,
        {
            "scale": dataclasses.asdict(scale),
            "seed": seed,
            "plane": {name: dataclasses.asdict(run) for name, run in _plane().items()},
            "actions": {name: dataclasses.asdict(run) for name, run in (METHODS | SWEEPS).items()},
        },
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        plane, actions = _train_plane(out, scale, seed, show), _train_actions(out, scale, seed, show)
    finally:
        torch.set_num_threads(threads)
    results = [*plane.values(), *(one for repeated in actions.values() for one in repeated)]
    actions = {"expert": [expert_metrics(s) for s in range(seed, seed + scale.seeds)], **actions}
    summary = {
        "seed": seed,
        "seeds": scale.seeds,
        "quick": quick,
        "seconds": sum(result["seconds"] for result in results),
        "plane": plane_rows(plane),
        "actions": action_rows(actions),
    }
    write_file(out / "summary.json", json_bytes(summary))
    write_file(out / "tables.md", markdown(summary).encode())
    evolution_figure(plane, out / "plane.png")
    evolution_gif(plane, next(iter(RECIPES)), out / "plane.gif")
    curve_figure(plane, out / "plane_curves.png")
    action_figure(summary["actions"], out / "actions.png")
    sample_figure(actions, out / "action_samples.png")
    say(plane_table(summary["plane"]))
    say(action_table(summary["actions"]))
    say(f"{summary['seconds']:.0f} s of training, seed {seed}")
    if quick:
        say("A quick toy shows that everything runs, not what drifting can do.")
    say(f"Results: {out}/summary.json, tables.md, plane.png, plane.gif, plane_curves.png, actions.png,")
    say("action_samples.png")
    return summary


def _train_plane(out: Path, scale: ToyScale, seed: int, show: Progress) -> dict[str, dict[str, Any]]:
    """Run → result, of pure drifting in the plane."""
    steps, runs = scale.plane_steps, _plane()
    bar = _bar(show, "in the plane", [steps] * len(runs))
    return {
        name: _run(out, name, lambda tick: train_plane(run, steps, seed, tick), next(bar)) for name, run in runs.items()
    }


def _train_actions(out: Path, scale: ToyScale, seed: int, show: Progress) -> dict[str, list[dict[str, Any]]]:
    """Run → a result per seed, of every method on the two-way toy."""
    steps, runs = scale.action_steps, METHODS | SWEEPS
    bar = _bar(show, "actions", [steps * run.longer for run in runs.values() for _ in range(scale.seeds)])

    def trained(name: str, run: ActionRun, seed: int) -> dict[str, Any]:
        return _run(out, f"{name}, seed {seed}", lambda tick: train_actions(run, steps, seed, tick), next(bar))

    return {name: [trained(name, run, seed + i) for i in range(scale.seeds)] for name, run in runs.items()}


def _plane() -> dict[str, PlaneRun]:
    return {
        f"{picture}, {name}": PlaneRun(picture, **settings)
        for picture in ("swiss roll", "checkerboard")
        for name, settings in RECIPES.items()
    }


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Make the folder, or check that it holds this very toy."""
    path, wanted = out / "settings.json", json_bytes({"toy": settings})
    if path.exists():
        if read_file(path) != wanted:
            raise UserError(f"{out} holds a toy with other settings; choose another --out")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} holds other files; choose another --out")
    else:
        write_file(path, wanted)


def _bar(show: Progress, name: str, steps: list[int]) -> Iterator[Tick]:
    """One `Tick` per run of `steps` steps, all advancing the same progress bar."""
    for i in range(len(steps)):

        def tick(step: int, before: int = sum(steps[:i])) -> None:
            show(name, before + step, sum(steps))

        yield tick


class ResultForm(Form, extra="allow"):
    """The numbers of one run; each kind has more of its own."""

    steps: Positive
    seconds: float


def _run(out: Path, name: str, train: Callable[[Tick], dict[str, Any]], tick: Tick) -> dict[str, Any]:
    """The result of one run, with tensors as arrays: read from `runs/` if it has finished before, else trained and
    saved."""
    file = re.sub(r"[^\w.]+", "_", name)
    numbers, arrays = out / "runs" / f"{file}.json", out / "runs" / f"{file}.npz"
    if not numbers.exists():
        began = time.perf_counter()
        result = train(tick)
        tensors: dict[str, Any] = {
            key: value.numpy() for key, value in result.items() if isinstance(value, torch.Tensor)
        }
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **tensors)
        write_file(arrays, buffer.getvalue())
        plain = {key: value for key, value in result.items() if key not in tensors}
        # The numbers come last: a run that has them is complete.
        write_file(numbers, json_bytes({**plain, "seconds": time.perf_counter() - began}))
    result = read_json(numbers, ResultForm, f"delete {numbers} and rerun the command")
    tick(result["steps"])
    require_file(arrays)
    try:
        with np.load(arrays, allow_pickle=False) as stored:
            return {**result, **stored}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {arrays} ({error}); delete {numbers} and rerun the command") from None
