"""`dvla demo`: the whole road on one machine, by the commands a user would type.

Everything lies under one folder: `data/`, `vlm/`, `cache/`, `stage2/`, `blind/`, `stage3/`, `eval2/`, `eval3/`, pictures,
`report.html` and `summary.json`. Finished commands are noted in `progress.json`; an interrupted demo goes on where it stopped.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...cache.store.manifest import read_manifest
from ...common.files import json_bytes, read_json, write_file
from ...errors import UserError
from ..simulation.envs import check_environment
from ..training.run_log import read_log
from .demo_figures import loss_figure, success_figure, switch_figure
from .runner import Step, start, stop, travel


@dataclass(frozen=True)
class DemoScale:
    """How much of everything. The full size is chosen for two CPU cores and 15 minutes."""

    tasks: dict[str, int]  # environment → demonstrations
    train: tuple[str, ...]  # options of both stage-two runs
    finetune: tuple[str, ...]  # options of stage three
    episodes: int  # evaluation starts per task
    noise: float = 0.2  # on executed actions while recording


SHAPE = (
    "--model-size",
    "tiny",
    "--cond-mask-prob",
    "0",
    "--set",
    "dit.horizon=8",
    "--set",
    "dit.width=128",
    "--set",
    "optimizer.warmup=50",
    "--set",
    "optimizer.projector_lr_scale=1.0",
    "--set",
    "cpu_threads=1",
)
FULL = DemoScale(
    tasks={"metaworld/button-press-topdown-v3": 40, "metaworld/drawer-open-v3": 40},
    train=(
        *SHAPE,
        "--batch-size",
        "32",
        "--lr",
        "1e-3",
        "--steps",
        "1200",
        "--set",
        "eval_every=400",
        "--set",
        "save_every=200",
        "--set",
        "log_every=20",
        "--set",
        "panels.every=200",
        "--set",
        "panels.share=0.1",
    ),
    finetune=(
        "--batch-size",
        "16",
        "--lr",
        "2e-4",
        "--vlm-lr-scale",
        "1.0",
        "--steps",
        "100",
        "--set",
        "log_every=5",
        "--set",
        "eval_every=50",
        "--set",
        "save_every=50",
    ),
    episodes=20,
)
QUICK = DemoScale(
    tasks={"metaworld/button-press-topdown-v3": 2, "metaworld/drawer-open-v3": 2},
    train=(
        *SHAPE,
        "--batch-size",
        "8",
        "--lr",
        "1e-3",
        "--steps",
        "6",
        "--set",
        "eval_every=3",
        "--set",
        "save_every=3",
        "--set",
        "log_every=2",
        "--set",
        "eval_batches=2",
    ),
    finetune=(
        "--batch-size",
        "4",
        "--lr",
        "2e-4",
        "--vlm-lr-scale",
        "1.0",
        "--steps",
        "3",
        "--set",
        "log_every=1",
        "--set",
        "eval_every=3",
        "--set",
        "save_every=3",
    ),
    episodes=2,
)


def steps(out: Path, scale: DemoScale, seed: int) -> list[Step]:
    """The road, in order."""
    data = {env: str(out / "data" / env.split("/")[1]) for env in scale.tasks}
    sources, vlm, number = tuple(data.values()), str(out / "vlm"), ("--seed", str(seed))
    cache, stage2, stage3, blind = (str(out / name) for name in ("cache", "stage2", "stage3", "blind"))
    training = ("train", "--from-cache", cache, *number, *scale.train)
    evaluation = (
        *(x for env in scale.tasks for x in ("--env", env)),
        "--episodes",
        str(scale.episodes),
        "--blind",
        blind,
        *number,
    )
    finetune = (
        "finetune",
        "--lora",
        stage2,
        *(x for source in sources for x in ("--source", source)),
        *number,
        *scale.finetune,
    )
    return [
        *(
            Step(
                f"record {env.split('/')[1]}",
                (
                    (
                        "data",
                        "record",
                        "--env",
                        env,
                        "--episodes",
                        str(n),
                        "--noise",
                        str(scale.noise),
                        *number,
                        "--workers",
                        "2",
                        "--out",
                        data[env],
                    ),
                ),
            )
            for env, n in scale.tasks.items()
        ),
        Step("vlm tiny", (("vlm", "tiny", "--arch", "qwen3vl", *number, "--out", vlm),)),
        Step(
            "cache build",
            (
                (
                    "cache",
                    "build",
                    *sources,
                    "--vlm",
                    "tiny_qwen3vl",
                    "--vlm-path",
                    vlm,
                    "--shard-frames",
                    "1024",
                    "--out",
                    cache,
                ),
            ),
        ),
        Step("cache verify", (("cache", "verify", cache, "--live", "32"),)),
        Step("train", ((*training, "--out", stage2), (*training, "--blind", "--out", blind))),
        Step(
            "finetune, eval stage two",
            ((*finetune, "--out", stage3), ("eval", stage2, *evaluation, "--out", str(out / "eval2"))),
        ),
        Step("eval stage three", (("eval", stage3, *evaluation, "--out", str(out / "eval3")),)),
        Step("report", (("report", stage2, "--eval", str(out / "eval2"), "-o", str(out / "report.html")),)),
    ]


def demo(
    out: Path,
    quick: bool,
    seed: int,
    run: Callable[[list[str]], None],
    say: Callable[..., None],
    table: Callable[[dict[str, dict[str, Any]]], Any],
) -> dict[str, Any]:
    """Run every command (`run` runs one in this process), then print the table and write `summary.json`.

    `UserError` when `out` holds something else, another demo, or when a command beside another one fails.
    """
    scale = QUICK if quick else FULL
    for env in scale.tasks:
        check_environment(env)
    road = steps(out, scale, seed)
    done = travel(out, road, lambda step: _run(step, out, run), say, "demo")
    summary = summarise(out, done, seed)
    write_file(out / "summary.json", json_bytes(summary))
    stages = {
        "stage two": read_json(out / "eval2" / "summary.json"),
        "stage three": read_json(out / "eval3" / "summary.json"),
    }
    loss_figure({"stage two": out / "stage2", "stage three (LoRA)": out / "stage3"}, out / "loss.png")
    switch_figure(out / "stage2", out / "stage3", out / "switch.png")
    success_figure(stages, out / "success.png")
    for folder in ("eval2", "eval3"):
        for picture in (out / folder / "videos").glob("*"):
            shutil.copyfile(picture, out / f"{folder}_{picture.name}")
    say("")
    say(table(stages))
    say(
        f"{summary['wall_s']:.0f} s in all; {summary['frames']} frames, cache {summary['cache_bytes'] / 2**20:.0f} MiB, "
        f"{summary['samples_per_second']:.0f} samples/s in stage two; loss {_arrow(summary['loss']['stage_two'])}, then with LoRA "
        f"{_arrow(summary['loss']['stage_three'])}"
    )
    say(
        "Every rate is over the same unseen starts; blind is a policy trained the same way that never saw a picture. "
        "The toy VLM has random weights."
        + (" A quick demo shows that the road is whole, not that a policy learns." if quick else "")
    )
    say(
        f"pictures and numbers: {out}/summary.json, report.html, loss.png, switch.png, success.png, eval2_*.mp4, eval3_*.mp4"
    )
    return summary


def _run(step: Step, out: Path, run: Callable[[list[str]], None]) -> None:
    """The step's first command in this process, the others in processes beside it; their output goes to `<out>/<name>.log`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # two commands, two cores
    logs = [out / f"{Path(command[-1]).name}.log" for command in step.commands[1:]]
    beside = []
    try:
        for command, log in zip(step.commands[1:], logs):
            with open(log, "w") as output:
                beside.append(start(command, environment, output))
        run(list(step.commands[0]))
        for command, process, log in zip(step.commands[1:], beside, logs):
            if code := process.wait():
                last = log.read_text().strip().splitlines()[-1:]
                raise UserError(
                    f"dvla {command[0]} beside it stopped with exit code {code} ({''.join(last)}); see {log}, then run the demo again"
                )
    finally:
        stop(beside)


def summarise(out: Path, seconds: dict[str, float], seed: int) -> dict[str, Any]:
    """`summary.json`: `tasks` is the result after stage three, `stages` has it after both."""
    manifest = read_manifest(out / "cache")
    stages = {
        name: read_json(out / folder / "summary.json")["tasks"]
        for name, folder in (("stage_two", "eval2"), ("stage_three", "eval3"))
    }
    logs = {name: read_log(out / folder) for name, folder in (("stage_two", "stage2"), ("stage_three", "stage3"))}
    return {
        "wall_s": sum(seconds.values()),
        "seconds": seconds,
        "seed": seed,
        "frames": manifest["frames"],
        "cache_bytes": manifest["bytes"],
        "samples_per_second": logs["stage_two"][-1]["samples_per_second"],
        "loss": {name: [lines[0]["loss"], lines[-1]["loss"]] for name, lines in logs.items()},
        "held_out_mse": {name: lines[-1].get("eval/mse") for name, lines in logs.items()},
        "tasks": stages["stage_three"],
        "stages": stages,
    }


def _arrow(pair: list[float]) -> str:
    return f"{pair[0]:.4f} → {pair[1]:.4f}"
