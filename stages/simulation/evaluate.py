"""`dvla eval`: closed-loop success on held-out initial states, beside the expert, a random and a blind policy.

One policy: OUT holds `summary.json`, `table.md` and `videos/<task>.mp4` and `.png` (green border: success, red:
failure). Several: OUT holds `table.md`, and such a folder for each.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ...common.console import markdown_table
from ...common.documents import json_bytes
from ...common.files import new_folder, write_file
from ...common.progress import Progress
from ..policy import checkpoint as ck
from ..policy.document import read_document
from ..policy.policy import Policy
from ..policy.robot import RobotInterface, choose_dataset
from .config import EvalConfig
from .envs import make_environment
from .film import write_grids
from .rollout import EpisodeResult, ExpertPolicy, RandomPolicy, RolloutConfig, assert_disjoint, rollout, wilson_interval
from .tables import success_cells

NAMED = ("expert", "random")  # policies without a folder
TIMED_CALLS = 10  # whose median is `ms_per_chunk`


def evaluate_policies(config: EvalConfig, progress: Progress = lambda *_: None) -> dict[str, dict[str, Any]]:
    """Roll out policies and baselines; returns (and writes) a summary for each policy, by its label.

    Returns:
        `summary["tasks"][task]`: `success`, `ci95`, `episodes`, `successes` (one per initial state), `mean_return`,
        `ms_per_action`, `ms_per_chunk`, and for each baseline, on the same initial states, `<name>`, `<name>_ci95`.
        `ms_per_action` is the policy's time per control step in the rollouts, where a batched call is shared by its
        episodes; `ms_per_chunk` that of one call for one observation (None where nothing is called).

    Raises:
        UserError: for an unknown task, a policy not trained on it, or an initial state that was trained on.
    """
    began = time.perf_counter()
    labels = label(config.policies)
    trained = [
        *(policy for policy in config.policies if policy not in NAMED),
        *([config.blind] if config.blind else []),
    ]
    # All are read before the first rollout, so that a wrong one is refused at once.
    robots = {(policy, env): _robot(policy, env) for policy in trained for env in config.environments}
    tasks: dict[str, dict[str, Any]] = {one: {} for one in labels}
    recorded: dict[str, dict[str, list[EpisodeResult]]] = {one: {} for one in labels}
    for env in config.environments:
        rows, episodes = _evaluate_task(config, env, labels, robots, progress)
        for one in labels:
            tasks[one][env], recorded[one][env] = rows[one], [r for r in episodes[one] if r.frames is not None]
    settings = {k: v for k, v in asdict(config).items() if k not in ("out", "policies", "blind")}
    summaries = {
        one: {
            "policy": policy,
            "tasks": tasks[one],
            "seconds": time.perf_counter() - began,
            "settings": settings,
            "blind_is": config.blind or "the same policy with images blanked",
        }
        for one, policy in zip(labels, config.policies)
    }
    if config.out is not None:
        with new_folder(config.out) as folder:
            for one, summary in summaries.items():
                _write(folder / one if len(summaries) > 1 else folder, summary, recorded[one])
            write_file(folder / "table.md", markdown_table(*success_cells(summaries)).encode())
    return summaries


def _evaluate_task(
    config: EvalConfig,
    env: str,
    labels: list[str],
    robots: dict[tuple[str, str], RobotInterface],
    progress: Progress,
) -> tuple[dict[str, dict[str, Any]], dict[str, list[EpisodeResult]]]:
    """(row of the summary, episodes) by label, of one task."""
    rows: dict[str, dict[str, Any]] = {}
    episodes: dict[str, list[EpisodeResult]] = {}
    for one, policy in zip(labels, config.policies):
        episodes[one], chunk = _roll(config, env, policy, progress, record=True)
        if policy not in NAMED:
            assert_disjoint(robots[policy, env].starts, [r.start_vector for r in episodes[one]])
        rows[one] = {
            **_rate(episodes[one]),
            "successes": [int(r.success) for r in episodes[one]],
            "mean_return": fmean(r.return_ for r in episodes[one]),
            "ms_per_action": 1e3 * fmean(r.seconds_per_action for r in episodes[one]),
            "ms_per_chunk": chunk,
        }
    shared = {who: rows[labels[config.policies.index(who)]] for who in NAMED if who in config.policies}
    for who in config.baselines:
        if who in NAMED and who not in shared:
            shared[who] = _rate(_roll(config, env, who, progress)[0])
        elif who == "blind" and config.blind:
            shared[who] = _rate(_roll(config, env, config.blind, progress, blind=True)[0])
    for one, policy in zip(labels, config.policies):
        beside = dict(shared)
        if "blind" in config.baselines and not config.blind and policy not in NAMED:
            beside["blind"] = _rate(_roll(config, env, policy, progress, blind=True)[0])
        for who in config.baselines:
            if who in beside:
                rows[one] = rows[one] | {who: beside[who]["success"], f"{who}_ci95": beside[who]["ci95"]}
    return rows, episodes


def label(policies: Sequence[str]) -> list[str]:
    """Names of policies in a table: the ends of their paths, as long as needed to tell them apart."""
    parts = [[part for part in Path(policy).parts if part not in ("/", "..", "checkpoints")] for policy in policies]
    for count in range(1, max(map(len, parts)) + 1):
        # "best" alone says nothing: one part more
        names = ["-".join(one[-count - one[-1:].count("best") :]) or "policy" for one in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{i}-{name}" for i, name in enumerate(names)]


def _robot(policy: str, environment: str) -> RobotInterface:
    document = read_document(ck.resolve(policy))
    return RobotInterface(choose_dataset(document["datasets"], None, environment))


def _roll(
    config: EvalConfig, environment: str, policy: str, progress: Progress, *, blind: bool = False, record: bool = False
) -> tuple[list[EpisodeResult], float | None]:
    """(episodes of one policy, its median milliseconds per call with one observation, measured where `record`)."""
    workers = 1 if policy in NAMED else config.workers
    settings = RolloutConfig(
        split="eval",
        seed=config.seed,
        image_size=config.image_size,
        max_steps=config.max_steps,
        replan=config.replan,
        workers=workers,
        record_video=config.videos if record and config.out is not None else 0,
    )
    factory = functools.partial(make_policy, config, environment, policy, blind)
    built = factory() if workers == 1 or record else None
    chunk = _chunk_ms(built, config, environment) if record and isinstance(built, Policy) else None
    shown = f"{environment}: {'blind' if blind else policy}"
    return rollout(
        built if workers == 1 else None,
        environment,
        range(config.episodes),
        settings,
        lambda done, total: progress(shown, done, total),
        factory,
    ), chunk


def make_policy(config: EvalConfig, environment: str, policy: str, blind: bool) -> Any:
    """The policy under test or one of its baselines; worker processes call it, so its arguments can be pickled."""
    if policy in NAMED:
        return ExpertPolicy() if policy == "expert" else RandomPolicy(config.seed)
    if config.workers > 1:
        _one_thread()
    return Policy.from_pretrained(
        policy,
        environment=environment,
        device=config.device,
        blind=blind,
        seed=config.seed,
        vlm_path=config.vlm_path,
        steps=config.sample_steps if not blind or not config.blind else None,
    )


def _one_thread() -> None:
    """Worker processes share the cores: several threads in each would compete."""
    import torch

    torch.set_num_threads(1)


def _chunk_ms(policy: Policy, config: EvalConfig, environment: str) -> float:
    """Median milliseconds of `act_batch` with one observation, image encoding included."""
    env = make_environment(
        environment, "eval", config.seed, config.image_size, render=policy.needs_images, max_steps=config.max_steps
    )
    try:
        observation = env.reset(0)
    finally:
        env.close()
    times = []
    for _ in range(TIMED_CALLS + 1):  # the first one warms up
        began = time.perf_counter()
        policy.act_batch([observation])
        times.append(time.perf_counter() - began)
    return 1e3 * median(times[1:])


def _rate(results: list[EpisodeResult]) -> dict[str, Any]:
    """Success rate with Wilson's 95 % interval."""
    won = sum(r.success for r in results)
    return {"success": won / len(results), "ci95": list(wilson_interval(won, len(results))), "episodes": len(results)}


def _write(folder: Path, summary: dict[str, Any], recorded: dict[str, list[EpisodeResult]]) -> None:
    folder.mkdir(exist_ok=True)
    for name, results in recorded.items():
        if results:
            frames, won = [r.frames for r in results if r.frames is not None], [r.success for r in results]
            write_grids(frames, won, [f"state {r.start}" for r in results], folder / "videos" / name.replace("/", "_"))
    write_file(folder / "summary.json", json_bytes(summary))
