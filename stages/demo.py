"""`dvla demo`: the whole road on one machine, by the commands a user would type.

Everything lies under one folder: `data/`, `vlm/`, `cache/`, `stage2/`, `blind/`, `stage3/`, `eval2/`, `eval3/`, pictures and
`summary.json`. Finished commands are noted in `progress.json`; an interrupted demo goes on where it stopped.
"""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cache.shard import write_file
from ..errors import UserError
from . import checkpoint as ck
from .envs import check_environment
from .plots import loss_figure, success_figure


@dataclass(frozen=True)
class DemoScale:
    """How much of everything. The full size is chosen for two CPU cores and 15 minutes."""

    tasks: dict[str, int]               # environment → demonstrations
    pretrain_steps: int                 # of the toy vision tower; 0 = random weights
    train: tuple[str, ...]              # options of both stage-two runs
    finetune: tuple[str, ...]           # options of stage three
    episodes: int                       # evaluation starts per task
    noise: float = 0.2                  # on executed actions while recording


SHAPE = ("--model-size", "tiny", "--draws", "2", "--cond-mask-prob", "0", "--set", "dit.horizon=8", "--set", "dit.width=128",
         "--set", "loss.drift_weight=0.005", "--set", "optimizer.warmup=50", "--set", "optimizer.projector_lr_scale=1.0")
FULL = DemoScale(
    tasks={"metaworld/button-press-topdown-v3": 40, "metaworld/drawer-open-v3": 40}, pretrain_steps=0,
    train=(*SHAPE, "--batch-size", "64", "--lr", "1e-3", "--steps", "1200", "--set", "eval_every=400", "--set", "save_every=400",
           "--set", "log_every=100"),
    finetune=("--batch-size", "32", "--lr", "4e-4", "--vlm-lr-scale", "1.0", "--steps", "200", "--set", "log_every=50",
              "--set", "eval_every=100", "--set", "save_every=100"),
    episodes=20)
QUICK = DemoScale(
    tasks={"metaworld/button-press-topdown-v3": 2, "metaworld/drawer-open-v3": 2}, pretrain_steps=2,
    train=(*SHAPE, "--batch-size", "8", "--lr", "1e-3", "--steps", "6", "--set", "eval_every=3", "--set", "save_every=3",
           "--set", "log_every=2", "--set", "eval_batches=2"),
    finetune=("--batch-size", "4", "--lr", "4e-4", "--vlm-lr-scale", "1.0", "--steps", "3", "--set", "log_every=1",
              "--set", "eval_every=3", "--set", "save_every=3"),
    episodes=2)


def commands(out: Path, scale: DemoScale, seed: int) -> list[tuple[str, list[str]]]:
    """(name, arguments of `dvla`) of every step, in order."""
    data = {env: str(out / "data" / env.split("/")[1]) for env in scale.tasks}
    sources, number = list(data.values()), str(seed)
    tiny = ["vlm", "tiny", "--arch", "qwen3vl", "--out", str(out / "vlm"), "--seed", number]
    if scale.pretrain_steps:
        tiny += [x for source in sources for x in ("--pretrain", source)] + ["--steps", str(scale.pretrain_steps)]
    cache, stage2, stage3, blind = (str(out / name) for name in ("cache", "stage2", "stage3", "blind"))
    training = ["train", "--from-cache", cache, "--seed", number, *scale.train]
    sourced = [x for source in sources for x in ("--source", source)]
    evaluation = [x for env in scale.tasks for x in ("--env", env)] + ["--episodes", str(scale.episodes), "--blind", blind, "--seed", number]
    return [
        *((f"record {env.split('/')[1]}", ["data", "record", "--env", env, "--episodes", str(n), "--noise", str(scale.noise),
                                           "--seed", number, "--out", data[env], "--workers", "2"]) for env, n in scale.tasks.items()),
        ("vlm", tiny),
        ("cache build", ["cache", "build", *sources, "--vlm", "tiny_qwen3vl", "--vlm-path", str(out / "vlm"), "--out", cache,
                         "--shard-frames", "1024"]),
        ("cache verify", ["cache", "verify", cache, "--live", "32"]),
        ("train", [*training, "--out", stage2]),
        ("train blind", [*training, "--blind", "--out", blind]),
        ("eval stage two", ["eval", stage2, *evaluation, "--out", str(out / "eval2")]),
        ("finetune", ["finetune", "--lora", stage2, *sourced, "--seed", number, *scale.finetune, "--out", stage3]),
        ("eval stage three", ["eval", stage3, *evaluation, "--out", str(out / "eval3")]),
    ]


def demo(out: Path, quick: bool, seed: int, run: Callable[[list[str]], None], say: Callable[..., None],
         table: Callable[[dict[str, dict[str, Any]]], Any]) -> dict[str, Any]:
    """Run every command with `run`, then print the table and write `summary.json`. `UserError` when `out` holds another demo."""
    scale = QUICK if quick else FULL
    for env in scale.tasks:
        check_environment(env)
    steps = commands(out, scale, seed)
    done = _progress(out, steps)
    for name, arguments in steps:
        say(f"\n[bold]$ dvla {shlex.join(arguments)}[/bold]")
        if name in done:
            say(f"done before, in {done[name]:.0f} s")
            continue
        began = time.perf_counter()
        run(arguments)
        done[name] = time.perf_counter() - began
        write_file(out / "progress.json", ck.json_bytes({"commands": [a for _, a in steps], "seconds": done}))
    summary = summarise(out, done, seed)
    write_file(out / "summary.json", ck.json_bytes(summary))
    stages = {"stage two": ck.read_json(out / "eval2" / "summary.json"), "stage three": ck.read_json(out / "eval3" / "summary.json")}
    loss_figure({"stage two": out / "stage2" / "log.jsonl", "stage three (LoRA)": out / "stage3" / "log.jsonl"}, out / "loss.png")
    success_figure(stages, out / "success.png")
    for folder in ("eval2", "eval3"):
        for picture in (out / folder / "videos").glob("*"):
            shutil.copyfile(picture, out / f"{folder}_{picture.name}")
    say("")
    say(table(stages))
    say(f"{summary['wall_s']:.0f} s in all; {summary['frames']} frames, cache {summary['cache_bytes'] / 2**20:.0f} MiB, "
        f"{summary['samples_per_second']:.0f} samples/s in stage two; loss {_arrow(summary['loss']['stage_two'])}, then with LoRA "
        f"{_arrow(summary['loss']['stage_three'])}")
    say("Every rate is over the same unseen starts; blind is a policy trained the same way that never saw a picture."
        + (" A quick demo shows that the road is whole, not that a policy learns." if quick else ""))
    say(f"pictures and numbers: {out}/summary.json, loss.png, success.png, eval2_*.mp4, eval3_*.mp4")
    return summary


def summarise(out: Path, seconds: dict[str, float], seed: int) -> dict[str, Any]:
    """`summary.json`: `tasks` is the result after stage three, `stages` has it after both."""
    manifest = ck.read_json(out / "cache" / "manifest.json")
    stages = {name: ck.read_json(out / folder / "summary.json")["tasks"] for name, folder in (("stage_two", "eval2"), ("stage_three", "eval3"))}
    logs = {name: _log(out / folder / "log.jsonl") for name, folder in (("stage_two", "stage2"), ("stage_three", "stage3"))}
    return {"wall_s": sum(seconds.values()), "seconds": seconds, "seed": seed, "frames": manifest["frames"],
            "cache_bytes": manifest["bytes"], "samples_per_second": logs["stage_two"][-1]["samples_per_second"],
            "loss": {name: [lines[0]["loss"], lines[-1]["loss"]] for name, lines in logs.items()},
            "held_out_mse": {name: lines[-1].get("eval/mse") for name, lines in logs.items()},
            "tasks": stages["stage_three"], "stages": stages}


def _progress(out: Path, steps: list[tuple[str, list[str]]]) -> dict[str, float]:
    """Seconds of the commands finished before; makes the folder."""
    path = out / "progress.json"
    if path.exists():
        before = ck.read_json(path)
        if before["commands"] != [a for _, a in steps]:
            raise UserError(f"{out} holds a demo with other settings; choose another --out")
        return before["seconds"]
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} holds other files; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_file(path, ck.json_bytes({"commands": [a for _, a in steps], "seconds": {}}))
    return {}


def _log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _arrow(pair: list[float]) -> str:
    return f"{pair[0]:.4f} → {pair[1]:.4f}"
