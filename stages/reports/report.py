"""`dvla report`: a run as one page, from its folder alone; it may still be training."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ... import __version__
from ...cache.actions.slots import EMBODIMENTS
from ...common.documents import read_file, read_json
from ...common.figures import LIGHT, Style, finish, new_figure
from ...common.text import first_line, printable, public
from ...drifting.metrics import METRICS
from ...errors import UserError
from ..policy import checkpoint as ck
from ..policy.document import read_document
from ..policy.evaluation import read_summary
from ..training.checks import read_environment
from ..training.config import read_settings
from ..training.panels.catalogue import PANELS
from ..training.panels.data import PanelData
from ..training.panels.schedule import panel_steps
from ..training.run_folder import whole_settings
from ..training.run_log import evaluations, read_log
from .html import file_uri, image_uri, number, picture, require_page, write_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure


MOST_PICTURE, MOST_PIXELS = 64 << 20, 1 << 26  # bytes of a file, pixels of an image
MAX_VIDEO = 6 << 20  # bytes of a video that is embedded
SOURCE = ("name", "license", "views", "control_hz", "environment", "dataset_config", "action_map", "state_map")
TITLES = {"mse": "MSE", "mae": "MAE", "correlation": "correlation", "coverage": "coverage, %", "nl2": "NL2"}


@dataclass(frozen=True)
class ReportConfig:
    """What `dvla report` needs."""

    run: Path  # run folder
    out: Path  # the page
    evaluations: tuple[Path, ...] = ()  # folders of `dvla eval --out`
    steps: int = 12  # positions of the panels' slider at most


@dataclass(frozen=True)
class RunFacts:
    """A run's folder as read. `state` and `policy` are empty before the first checkpoint."""

    path: Path
    config: dict[str, Any]
    log: list[dict[str, Any]]
    state: dict[str, Any]
    policy: dict[str, Any]
    environment: dict[str, Any]

    @property
    def name(self) -> str:
        """The folder's name, with its parent's."""
        path = self.path.resolve()
        return f"{path.parent.name}/{path.name}"

    @property
    def datasets(self) -> tuple[str, ...]:
        """Names, from the policy or, before there is one, from the evaluations."""
        if self.policy:
            return tuple(d["name"] for d in self.policy["datasets"])
        names = (
            key.removeprefix("eval/mse/")
            for line in evaluations(self.log)[-1:]
            for key in line
            if key.startswith("eval/mse/")
        )
        return tuple(name for name in names if not name.startswith("embodiment/"))


def read_run(path: Path) -> RunFacts:
    """The run at `path`; `UserError` when there is none, or it has logged nothing yet."""
    if not (path / "config.json").exists():
        raise UserError(f"{path} is not a run folder of `dvla train` or `dvla finetune` (it has no config.json)")
    log = read_log(path) if (path / "log.jsonl").exists() else []
    if not log:
        raise UserError(f"run {path} has logged nothing yet; wait for its first line")
    found = ck.checkpoints(path)
    state = read_json(found[-1] / "state.json", ck.StateForm) if found else {}
    policy = read_document(found[-1]) if found else {}
    return RunFacts(path, whole_settings(read_settings(path, whole=False)), log, state, policy, read_environment(path))


def log_data(run: RunFacts) -> PanelData:
    """Panel data without predictions, for the panels of the log."""
    bodies = tuple(int(d["embodiment"]) for d in run.policy["datasets"]) if run.policy else (0,) * len(run.datasets)
    none, slots = np.zeros((0, 0, 128), np.float32), np.zeros((0, 128))
    return PanelData(
        step=run.log[-1]["step"],
        datasets=run.datasets,
        embodiments=bodies,
        dataset=np.zeros(0, int),
        target=none,
        draws=none[:, None],
        active=none > 0,
        drift=none[None, :, None],
        mean_square=np.zeros(0),
        temperatures=tuple(run.config["loss"]["temperatures"]),
        center=slots,
        half_range=slots,
        hz=np.zeros(0),
        log=run.log,
    )


def report(config: ReportConfig) -> int:
    """Write the page; returns its bytes. `UserError` for what is no run or evaluation, or that cannot be written."""
    require_page(config.out)
    if config.steps < 1:
        raise UserError(f"--steps {config.steps}: give at least 1")
    run, held = read_run(config.run), [read_evaluation(folder) for folder in config.evaluations]
    data, last = log_data(run), run.log[-1]
    curves = [PANELS[key].draw for key in ("D2", "A2", "D3") if key != "D3" or evaluations(run.log)]
    drawn = panels(run, config.steps)
    return write_page(
        config.out,
        "report.html",
        version=__version__,
        made=time.strftime("%Y-%m-%d %H:%M"),
        name=run.name,
        verdict=verdict(run),
        tiles=tiles(run, held),
        curves=[
            *(picture(lambda style: draw(data, style)) for draw in curves),  # noqa: B023 (drawn at once)
            picture(lambda style: speed_figure(run.log, style)),
        ],
        metrics=[TITLES[m] for m in METRICS],
        rows=dataset_rows(run),
        eval_step=(evaluations(run.log) or [last])[-1]["step"],
        **drawn,
        evaluations=held,
        drawn_style=run.config["panels"]["style"],
        sections=[
            ("summary", "Summary"),
            *([("findings", "Findings")] if drawn["findings"] else []),
            ("curves", "Curves"),
            ("datasets", "Datasets"),
            ("panels", "Panels"),
            *([("rollouts", "Rollouts")] if held else []),
            ("settings", "Settings"),
        ],
        config=public(run.config),
        fingerprint=public(run.policy.get("encoder", {})),
        sources=public([{k: d.get(k) for k in SOURCE} for d in run.policy.get("datasets", [])]),
        environment=run.environment or {"not recorded": "an earlier release began the run"},
    )


def verdict(run: RunFacts) -> str:
    """The state of the run, in one sentence."""
    last, steps, held = run.log[-1], run.config["steps"], evaluations(run.log)
    stands = f"Step {last['step']:,} of {steps:,}"
    if not held:
        return f"{stands}; loss {run.log[0]['loss']:.4f} → {last['loss']:.4f}, no evaluation on held-out episodes yet."
    best = min(held, key=lambda line: line["eval/mse"])
    coverage = held[-1].get("eval/coverage")
    how = "" if coverage is None else " The policy has collapsed (coverage below 20 %)." if coverage < 20 else ""
    newest = "which is its best" if best is held[-1] else f"best {best['eval/mse']:.4f} at step {best['step']:,}"
    return f"{stands}; held-out MSE {held[0]['eval/mse']:.4f} → {held[-1]['eval/mse']:.4f}, {newest}.{how}"


def tiles(run: RunFacts, held: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(label, value) of the numbers at the top."""
    last, line = run.log[-1], (evaluations(run.log) or [{}])[-1]
    found = [
        (f"of {run.config['steps']:,} steps", f"{last['step']:,}"),
        ("held-out MSE", number(line.get("eval/mse"))),
        ("correlation", number(line.get("eval/correlation"), 3)),
        ("coverage, %", number(line.get("eval/coverage"), 3)),
        ("modes reached, %", number(line.get("eval/mode_coverage"), 3)),
        ("MMD²", number(line.get("eval/mmd"), 2)),
        ("samples/s", number(float(last["samples_per_second"]), 3)),
        (f"waiting for data; bottleneck: {last.get('binds', 'compute')}", f"{100 * last['wait_share']:.1f} %"),
    ]
    if "stage_three" in run.config:
        found.append(("stage", "three"))
    for e in held:
        found += [(f"success, {task['name']}", task["success"]) for task in e["tasks"]]
    return [(label, value) for label, value in found if value != "–"]


def dataset_rows(run: RunFacts) -> list[dict[str, Any]]:
    """Rows of the newest evaluation: overall, by embodiment where there are several, by dataset."""
    held = evaluations(run.log)
    if not held:
        return []
    bodies = [f"embodiment/{name}" for name in EMBODIMENTS if f"eval/mse/embodiment/{name}" in held[-1]]
    names = ["", *(bodies if len(bodies) > 1 else []), *run.datasets]
    rows = []
    for name in names:
        suffix = f"/{name}" if name else ""
        rows.append(
            {
                "name": name or "all",
                "strong": not name or name in bodies,
                "values": [held[-1].get(f"eval/{m}{suffix}") for m in METRICS],
                "first": held[0].get(f"eval/mse{suffix}"),
            }
        )
    return rows


def panels(run: RunFacts, most: int) -> dict[str, Any]:
    """What `report.html` shows of the panels: at most `most` positions of the slider, every image once, and for each
    panel the index of its image at each position (None: not drawn yet)."""
    found = _drawn(run.path)
    steps = [step for step, _, titles in found if any(PANELS[key].predicts for key in titles)]
    steps = steps or [step for step, _, _ in found]
    chosen = sorted({round(i) for i in np.linspace(0, len(steps) - 1, min(most, len(steps)))})
    positions = [steps[i] for i in chosen]
    images: list[dict[str, Any]] = []
    shown, findings = [], []
    for key, panel in PANELS.items():
        at: list[int | None] = []
        for position in positions:
            earlier = [x for x in found if x[0] <= position and key in x[2]]
            index = at[-1] if at else None
            if earlier and (index is None or images[index]["step"] != earlier[-1][0]):
                step, folder, titles = earlier[-1]
                images.append({"step": step, "uri": file_uri(folder / f"{key}.png"), "finding": titles[key]})
                index = len(images) - 1
            at.append(index)
        if at and at[-1] is not None:
            shown.append({"key": key, "name": panel.name, "good": panel.good, "at": at})
            finding = images[at[-1]]["finding"].removesuffix(f" ({key})")
            findings.append({"key": key, "finding": finding, "good": panel.good})
    few = f"{len(positions)} of the {len(steps)} steps with panels; the others are in {run.path.name}/panels."
    return {
        "panels": shown,
        "positions": positions,
        "images": images,
        "findings": findings,
        "thinned": few if len(positions) < len(steps) else "",
        "last_step": positions[-1] if positions else 0,
    }


def _drawn(run: Path) -> list[tuple[int, Path, dict[str, str]]]:
    """(step, folder, panel → its title) of every step after which panels were drawn."""
    found = []
    for step, folder in panel_steps(run):
        if (folder / "findings.json").exists():
            titles = read_json(folder / "findings.json", dict[str, str], "remove that folder to leave its panels out")
            kept = {k: v for k, v in titles.items() if k in PANELS and (folder / f"{k}.png").is_file()}
            found.append((step, folder, kept))
    return found


def read_evaluation(folder: Path) -> dict[str, Any]:
    """What `dvla eval --out` wrote, for the macro `evaluation`. `UserError` for a folder without an evaluation."""
    summary = read_summary(folder)
    tasks, videos, notes = [], [], []
    baselines = [b for b in ("expert", "random", "blind") if any(b in entry for entry in summary["tasks"].values())]
    for name, entry in summary["tasks"].items():
        low, high = entry["ci95"]
        tasks.append(
            {
                "name": name,
                "success": f"{100 * entry['success']:.0f} %",
                "interval": f"{100 * low:.0f} – {100 * high:.0f} %",
                "episodes": entry["episodes"],
                "baselines": [f"{100 * entry[b]:.0f} %" if b in entry else "–" for b in baselines],
                "ms": entry.get("ms_per_action"),
            }
        )
        still, video = (folder / "videos" / f"{name.replace('/', '_')}{end}" for end in (".png", ".mp4"))
        fits = video.is_file() and video.stat().st_size <= MAX_VIDEO
        note = "green border: success, red: failure"
        if video.is_file() and not fits:
            note = f"the video is too large for this page: {video}"
        if fits or still.is_file():
            poster = _still(still) if still.is_file() else ""
            videos.append({"name": name, "still": poster, "video": file_uri(video) if fits else "", "note": note})
    if "blind_is" in summary and "blind" in baselines:
        notes.append(f"Blind: {summary['blind_is']}. All policies face the same held-out initial states.")
    return {
        "title": f"{folder.name}: {summary.get('policy', '')}",
        "tasks": tasks,
        "baselines": baselines,
        "videos": videos,
        "notes": notes,
    }


def _still(path: Path) -> str:
    """A video's still as JPEG: a quarter of the PNG. `UserError` for what is no image."""
    from PIL import Image

    data = read_file(path, MOST_PICTURE)
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels")
            return image_uri(image.convert("RGB"), "jpeg", quality=82)
    except Exception as error:
        raise UserError(
            f"{path} is damaged ({printable(first_line(error))[:100]}); remove it to leave it out"
        ) from None


def speed_figure(log: Sequence[dict[str, Any]], style: Style = LIGHT) -> Figure:
    """Observations per second over a run, and the share of the time spent waiting for data."""
    figure, steps = new_figure(style, 8, 3), [line["step"] for line in log]
    left, right = figure.subplots(1, 2)
    left.plot(steps, [line["samples_per_second"] for line in log], color=style.expert)
    left.set(xlabel="training step", ylabel="observations/s", ylim=(0, None))
    right.plot(steps, [100 * line["wait_share"] for line in log], color=style.predicted)
    right.set(xlabel="training step", ylabel="waiting for data, % of the time", ylim=(0, 100))
    rate = sorted(line["samples_per_second"] for line in log)[len(log) // 2]
    return finish(figure, f"{rate:.0f} observations/s (median); bottleneck: {log[-1].get('binds', 'compute')}", style)
