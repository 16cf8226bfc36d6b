"""`dvla eval`: closed-loop success of a policy on unseen starts, always beside the expert, a random and a blind policy.

Files in the output folder: `summary.json`, `videos/<task>.mp4` and `.png` (green border: success, red: failure).
"""

from __future__ import annotations

import functools
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..cache.shard import write_file
from ..errors import UserError
from . import checkpoint as ck
from .envs import check_environment
from .policy import Policy, RobotInterface, choose_dataset
from .rollout import EpisodeResult, ExpertPolicy, RandomPolicy, RolloutConfig, assert_disjoint, rollout, wilson_interval
from .video_out import write_grid, write_grid_image

BASELINES = ("expert", "random", "blind")


@dataclass(frozen=True)
class EvalConfig:
    """What `dvla eval` needs."""

    policy: str                         # run or checkpoint folder
    environments: tuple[str, ...]       # e.g. ("metaworld/push-v3",)
    episodes: int                       # starts per task, 0 … episodes-1 of the eval split
    out: Path | None = None             # folder to create; None = print only
    blind: str | None = None            # run of a blind policy; None = the same policy shown black pictures
    seed: int = 0                       # chooses the eval starts
    replan: int = 4                     # steps of each chunk to execute
    max_steps: int | None = None        # None = the task's own
    image_size: int = 128               # picture side in pixels, as recorded
    workers: int = 1                    # processes
    videos: int = 10                    # episodes filmed per task
    vlm_path: str | None = None         # where the VLM is now


def evaluate_policy(config: EvalConfig, progress: Callable[[str, int, int], None] = lambda *_: None) -> dict[str, Any]:
    """Roll out policy and baselines; returns (and writes) the summary.

    `summary["tasks"][task]`: `success`, `ci95`, `episodes`, `mean_return`, `ms_per_action`, and the rates `expert`, `random`,
    `blind` on the same starts with `<name>_ci95`. `UserError` for an unknown task, a policy not trained on it, a start that
    was trained on, or an output folder that exists.
    """
    if config.out is not None and config.out.exists():
        raise UserError(f"{config.out} exists; choose another --out")
    if config.episodes < 1 or not config.environments:
        raise UserError(f"{config.episodes} episodes of {len(config.environments)} environments; at least 1 of each is needed")
    document = ck.read_json(ck.resolve(config.policy) / "policy.json")
    for name in config.environments:
        check_environment(name)
        choose_dataset(document["datasets"], None, name)
    began, tasks, films = time.perf_counter(), {}, {}
    for name in config.environments:
        robot = RobotInterface(choose_dataset(document["datasets"], None, name))
        results = _roll(config, name, "policy", progress)
        assert_disjoint(robot.starts, [r.start_vector for r in results])
        entry = {**_rate(results), "mean_return": float(np.mean([r.return_ for r in results])),
                 "ms_per_action": 1e3 * float(np.mean([r.seconds_per_action for r in results]))}
        for baseline in BASELINES:
            rate = _rate(_roll(config, name, baseline, progress))
            entry |= {baseline: rate["success"], f"{baseline}_ci95": rate["ci95"]}
        tasks[name] = entry
        films[name] = [r for r in results if r.frames is not None]
    summary = {"policy": str(config.policy), "tasks": tasks, "seconds": time.perf_counter() - began,
               "blind_is": config.blind or "the same policy shown black pictures",
               "settings": {k: v for k, v in asdict(config).items() if k not in ("out", "policy", "blind")}}
    if config.out is not None:
        _write(config.out, summary, films)
    return summary


def _roll(config: EvalConfig, environment: str, who: str, progress: Callable[[str, int, int], None]) -> list[EpisodeResult]:
    settings = RolloutConfig(split="eval", seed=config.seed, image_size=config.image_size, max_steps=config.max_steps,
                             replan=config.replan, workers=config.workers if who in ("policy", "blind") else 1,
                             record_video=config.videos if who == "policy" and config.out is not None else 0)
    factory = functools.partial(make_policy, config, environment, who)
    return rollout(factory() if settings.workers == 1 else None, environment, range(config.episodes), settings,
                   lambda done, total: progress(f"{environment}: {who}", done, total), factory)


def make_policy(config: EvalConfig, environment: str, who: str) -> Any:
    """The policy under test or one of its baselines; picklable arguments, so that worker processes can call it."""
    if who == "expert":
        return ExpertPolicy()
    if who == "random":
        return RandomPolicy(config.seed)
    blind = who == "blind"
    if config.workers > 1:
        _one_thread()
    return Policy.from_pretrained(config.blind if blind and config.blind else config.policy, environment=environment,
                                  blind=blind, seed=config.seed, vlm_path=config.vlm_path)


def _one_thread() -> None:
    """Several worker processes share the cores: more threads in each would only get in each other's way."""
    import torch

    torch.set_num_threads(1)


def _rate(results: list[EpisodeResult]) -> dict[str, Any]:
    """Success rate with Wilson's 95 % interval."""
    won = sum(r.success for r in results)
    return {"success": won / len(results), "ci95": list(wilson_interval(won, len(results))), "episodes": len(results)}


def _write(out: Path, summary: dict[str, Any], films: dict[str, list[EpisodeResult]]) -> None:
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        for name, results in films.items():
            if results:
                stem = name.replace("/", "_")
                frames, won = [r.frames for r in results], [r.success for r in results]
                labels = [f"start {r.start}" for r in results]
                write_grid(frames, won, partial / "videos" / f"{stem}.mp4", labels)
                write_grid_image(frames, won, partial / "videos" / f"{stem}.png", labels)
        write_file(partial / "summary.json", ck.json_bytes(summary))
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
