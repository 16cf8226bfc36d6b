"""`dvla demo`: the full pipeline, end to end, on one machine, by the commands a user would type.

Everything lies in one folder: `data/`, `vlm/`, `cache/`, `stage2/`, `blind/`, `stage3/`, `eval2/`, `eval3/`, figures,
`report.html` and `summary.json`. Finished commands are noted in `progress.json`; an interrupted demo resumes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...cache.store.manifest import read_manifest
from ...common.documents import json_bytes
from ...common.files import write_file
from ..policy.evaluation import read_summary
from ..simulation.envs import check_environment
from ..training.run_log import read_log
from .demo_figures import loss_figure, success_figure, switch_figure
from .runner import Command, Job, options, run_in_order


@dataclass(frozen=True)
class DemoScale:
    """How much of everything. The full size is chosen for two CPU cores and 15 minutes."""

    demonstrations: int  # per task
    train: str  # options of both stage-two runs
    finetune: str  # options of stage three
    episodes: int  # evaluated initial states per task


TASKS = ("metaworld/button-press-topdown-v3", "metaworld/drawer-open-v3")
NOISE = 0.2  # on executed actions while recording
SHAPE = (
    "--model-size tiny --cond-mask-prob 0 --set dit.horizon=8 --set dit.width=128 --set optimizer.warmup=50 "
    "--set optimizer.projector_lr_scale=1.0 --set cpu_threads=1 "
)
FULL = DemoScale(
    demonstrations=40,
    train=SHAPE + "--batch-size 32 --lr 1e-3 --steps 1200 --set eval_every=400 --set save_every=200 "
    "--set log_every=20 --set panels.every=200 --set panels.share=0.1",
    finetune="--batch-size 16 --lr 2e-4 --vlm-lr-scale 1.0 --steps 100 --set log_every=5 --set eval_every=50 "
    "--set save_every=50",
    episodes=20,
)
QUICK = DemoScale(
    demonstrations=2,
    train=SHAPE + "--batch-size 8 --lr 1e-3 --steps 6 --set eval_every=3 --set save_every=3 --set log_every=2 "
    "--set eval_batches=2",
    finetune="--batch-size 4 --lr 2e-4 --vlm-lr-scale 1.0 --steps 3 --set log_every=1 --set eval_every=3 "
    "--set save_every=3",
    episodes=2,
)


def steps(out: Path, scale: DemoScale, seed: int) -> list[Job]:
    """The commands of the demo, in order."""
    data = {env: str(out / "data" / env.split("/")[1]) for env in TASKS}
    return _cached(out, data, scale, seed) + _trained(out, list(data.values()), scale, seed)


def _cached(out: Path, data: dict[str, str], scale: DemoScale, seed: int) -> list[Job]:
    """Demonstrations, a VLM and stage one. `data`: task → dataset folder."""
    vlm, cache = str(out / "vlm"), str(out / "cache")

    def record(env: str) -> Job:
        settings = options(env=env, episodes=scale.demonstrations, noise=NOISE, seed=seed, workers=2, out=data[env])
        return Job(
            f"record {env.split('/')[1]}",
            (("data", "record", *settings),),
            purpose=f"Record {scale.demonstrations} demonstrations of a scripted expert in simulation.",
        )

    build = options(vlm="tiny_qwen3vl", vlm_path=vlm, shard_frames=1024, out=cache)
    return [
        *map(record, TASKS),
        Job(
            "vlm tiny",
            (("vlm", "tiny", "--arch", "qwen3vl", *options(seed=seed, out=vlm)),),
            purpose="Make a toy VLM with random weights, so that nothing is downloaded.",
        ),
        Job(
            "cache build",
            (("cache", "build", *data.values(), *build),),
            purpose="Stage one: run the frozen VLM once over every frame and cache its features.",
        ),
        Job(
            "cache verify",
            (("cache", "verify", cache, "--live", "32"),),
            purpose="Check the cache: checksums, and 32 frames against the live VLM.",
        ),
    ]


def _trained(out: Path, sources: list[str], scale: DemoScale, seed: int) -> list[Job]:
    """Stages two and three, each evaluated, and a report."""
    stage2, blind, stage3 = (str(out / name) for name in ("stage2", "blind", "stage3"))
    training = ("train", *options(from_cache=out / "cache", seed=seed), *scale.train.split())
    tuning = ("finetune", "--lora", stage2, *options(source=sources, seed=seed), *scale.finetune.split())

    def evaluation(policy: str, folder: str) -> Command:
        settings = options(env=TASKS, episodes=scale.episodes, blind=blind, seed=seed, out=out / folder)
        return ("eval", policy, *settings)

    return [
        Job(
            "train",
            ((*training, "--out", stage2),),
            beside=((*training, "--blind", "--out", blind),),
            purpose="Stage two: train the policy from the cache, and beside it a blind baseline that sees no images.",
        ),
        Job(
            "finetune, eval stage two",
            ((*tuning, "--out", stage3),),
            beside=(evaluation(stage2, "eval2"),),
            purpose="Stage three: fine-tune with the live VLM and LoRA; meanwhile evaluate the policy of stage two.",
        ),
        Job(
            "eval stage three",
            (evaluation(stage3, "eval3"),),
            purpose="Evaluate the fine-tuned policy on the same held-out initial states.",
        ),
        Job(
            "report",
            (("report", stage2, "--eval", str(out / "eval2"), "-o", str(out / "report.html")),),
            purpose="Put curves, panels and rollouts of stage two on one page.",
        ),
    ]


def demo(
    out: Path,
    quick: bool,
    seed: int,
    run: Callable[[list[str]], None],
    say: Callable[..., None],
    table: Callable[[dict[str, dict[str, Any]]], Any],
) -> dict[str, Any]:
    """Run every command (`run` runs one in this process), then print the results and write `summary.json`.

    Raises:
        UserError: when `out` holds something else or another demo, or when a command beside another one fails.
    """
    for env in TASKS:
        check_environment(env)
    seconds = run_in_order(out, steps(out, QUICK if quick else FULL, seed), run, say, "demo")
    summary = summarize(out, seconds, seed)
    write_file(out / "summary.json", json_bytes(summary))
    stages = {
        "stage two": read_summary(out / "eval2"),
        "stage three": read_summary(out / "eval3"),
    }
    loss_figure({"stage two": out / "stage2", "stage three (LoRA)": out / "stage3"}, out / "loss.png")
    switch_figure(out / "stage2", out / "stage3", out / "switch.png")
    success_figure(stages, out / "success.png")
    for folder in ("eval2", "eval3"):
        for video in (out / folder / "videos").glob("*"):
            shutil.copyfile(video, out / f"{folder}_{video.name}")
    say("")
    say(table(stages))
    for line in closing_lines(out, summary, quick):
        say(line, markup=False)
    return summary


def closing_lines(out: Path, summary: dict[str, Any], quick: bool) -> list[str]:
    """What the demo measured, what it is worth, where it lies, and the command to try next."""
    errors = [
        f"{name.replace('_', ' ')} {error:.4f}" for name, error in summary["held_out_mse"].items() if error is not None
    ]
    lines = [
        "All rates share the same held-out initial states; blind: a policy trained",
        "with images blanked. The toy VLM has random weights.",
        f"Held-out action error (MSE, normalized): {', '.join(errors) or 'not measured'}",
        f"{summary['wall_s']:.0f} s in total; {summary['frames']} frames, cache "
        f"{summary['cache_bytes'] / 2**20:.0f} MiB, stage two {summary['samples_per_second']:.0f} samples/s",
        f"Checkpoint: {out / 'stage3'}",
        f"Report: {out / 'report.html'}; also summary.json, *.png and *.mp4 there",
        "Next, your own data: dvla data check FOLDER_OR_HUB_ID",
    ]
    if quick:
        lines.insert(2, "A quick demo shows that the pipeline runs, not that a policy learns.")
    return lines


def summarize(out: Path, seconds: dict[str, float], seed: int) -> dict[str, Any]:
    """`summary.json`: `tasks` is the result after stage three, `stages` has it after both."""
    manifest = read_manifest(out / "cache")
    stages = {
        name: read_summary(out / folder)["tasks"] for name, folder in (("stage_two", "eval2"), ("stage_three", "eval3"))
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
