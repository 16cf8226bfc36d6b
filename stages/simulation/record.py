"""Demonstrations from a scripted expert, written as a LeRobot dataset (v3.0, mp4) by LeRobot's own writer.

Files: `OUT/` is the dataset; `OUT/meta/dvla.json` holds the simulated initial state of each episode, so that an
evaluation can prove that its own are held out. While recording, everything lies in the sibling `.OUT.partial/`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...common.files import hold
from ...common.packages import require_package
from ...common.progress import Count
from ...errors import UserError
from .config import RecordConfig
from .envs import Environment, check_environment, make_environment
from .lerobot_writer import LeRobotWriter

MARKER = "dvla-recording.lock"  # a partial folder with this file was made by a recording and may be removed


@dataclass(frozen=True)
class RecordResult:
    """What was recorded."""

    out: Path
    episodes: int  # episodes in the dataset
    frames: int  # control steps in the dataset
    attempted: int  # initial states tried, in order from 0
    succeeded: int  # of these, how many the expert solved


@dataclass(frozen=True)
class Demonstration:
    """One attempt of T steps. Row t holds the observation before step t and the expert's clean action."""

    start: int
    start_vector: tuple[float, ...]
    success: bool
    instruction: str
    images: dict[str, np.ndarray]  # view -> uint8 [T, S, S, 3]; empty after a failed rehearsal
    state: np.ndarray  # [T, ds] float32
    action: np.ndarray  # [T, da] float32, noise-free


def record(config: RecordConfig, on_progress: Count | None = None) -> RecordResult:
    """Record `config.episodes` demonstrations into `config.out`; `on_progress(kept, wanted)` after each.

    Initial states 0, 1, 2, … of the split are tried in order and failed attempts dropped, so the content is a pure
    function of the settings other than `out` and `workers`. Uses no network.

    Raises:
        UserError: when the folder exists, a setting is out of range, LeRobot or the simulator is missing, or the expert
            fails most of its attempts.
    """
    _check(config)
    with _partial_folder(config.out) as partial:
        starts: dict[int, int] = {}
        vectors: dict[int, list[float]] = {}
        attempted = succeeded = frames = 0
        limit = 3 * config.episodes + 10
        # This order imports LeRobot while the workers start.
        with (
            _demonstrations(config, limit) as attempts,
            contextlib.closing(_writer(config, partial / "dataset")) as writer,
        ):
            for demonstration in attempts:
                attempted += 1
                succeeded += demonstration.success
                if demonstration.success or config.keep_failures:
                    writer.add(
                        demonstration.instruction, demonstration.images, demonstration.state, demonstration.action
                    )
                    starts[len(starts)] = demonstration.start
                    vectors[len(vectors)] = list(demonstration.start_vector)
                    frames += len(demonstration.action)
                    if on_progress is not None:
                        on_progress(len(starts), config.episodes)
                if len(starts) == config.episodes:
                    break
        if len(starts) < config.episodes:
            raise UserError(
                f"the expert of {config.env} solved only {succeeded} of {attempted} initial states, "
                f"you requested {config.episodes}; lower --noise or raise --max-steps"
            )
        provenance = {
            "environment": config.env,
            "split": config.split,
            "seed": config.seed,
            "starts": vectors,
            "start_numbers": starts,
            "noise": config.noise,
            "observation_noise": config.observation_noise,
            "pixel_noise": config.pixel_noise,
            "attempted": attempted,
            "succeeded": succeeded,
        }
        (partial / "dataset" / "meta" / "dvla.json").write_text(json.dumps(provenance, indent=1) + "\n")
        _refuse_existing(config.out)
        os.rename(partial / "dataset", config.out)
    return RecordResult(config.out, len(starts), frames, attempted, succeeded)


def demonstrate(env: Environment, start: int, config: RecordConfig) -> Demonstration:
    """Let the expert act from one initial state; stops `extra_steps` after the first success or at the step limit.

    Where the environment asks for a rehearsal, an attempt that fails without rendering is not repeated with it, unless
    failures are kept.
    """
    if env.rehearse and not config.keep_failures:
        rehearsed = _attempted(env, start, config, render=False)
        if not rehearsed.success:
            return rehearsed
    return with_observation_noise(_attempted(env, start, config, render=True), config)


def with_observation_noise(demonstration: Demonstration, config: RecordConfig) -> Demonstration:
    """The demonstration with Gaussian noise on its observations, a pure function of (seed, start).

    Each number of the state gets noise in proportion to its standard deviation over the T steps.
    """
    rng = np.random.default_rng([config.seed, demonstration.start, 1])  # apart from the noise on actions
    state, images = demonstration.state, demonstration.images
    if config.observation_noise:
        noise = rng.normal(0.0, config.observation_noise, state.shape) * state.std(axis=0)
        state = (state + noise).astype(np.float32)
    if config.pixel_noise:
        images = {
            view: np.stack([_noisy(f, rng, config.pixel_noise) for f in frames]) for view, frames in images.items()
        }
    return dataclasses.replace(demonstration, state=state, images=images)


def _noisy(image: np.ndarray, rng: np.random.Generator, levels: float) -> np.ndarray:
    noisy = image + rng.standard_normal(image.shape, np.float32) * levels
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def _attempted(env: Environment, start: int, config: RecordConfig, render: bool) -> Demonstration:
    noise = np.random.default_rng([config.seed, start])
    observation = env.reset(start, render)
    observations, actions = [], []
    solved_at: int | None = None
    for step in range(env.max_steps + config.extra_steps):
        clean = env.expert_action()
        observations.append(observation)
        actions.append(clean)
        result = env.step(clean + env.noise_scale * noise.normal(0.0, config.noise, clean.shape), render)
        observation = result.observation
        if result.success and solved_at is None:
            solved_at = step
        if step >= (env.max_steps - 1 if solved_at is None else solved_at + config.extra_steps):
            break
    images = {view: np.stack([o.images[view] for o in observations]) for view in env.views} if render else {}
    return Demonstration(
        start,
        env.start_vector,
        solved_at is not None,
        env.instruction,
        images,
        np.stack([o.state for o in observations]),
        np.stack(actions),
    )


def _check(config: RecordConfig) -> None:
    check_environment(config.env, config.split, config.seed, config.image_size, config.max_steps)
    least = {"episodes": 1, "workers": 1, "extra_steps": 0, "noise": 0, "observation_noise": 0, "pixel_noise": 0}
    for name, low in least.items():
        if getattr(config, name) < low:
            raise UserError(f"{name} must be {low} or more, got {getattr(config, name)}")
    if config.image_size % 2:
        raise UserError(f"image_size must be even for video, got {config.image_size}")
    _refuse_existing(config.out)
    require_package("lerobot", "recording", "lerobot")


def _refuse_existing(out: Path) -> None:
    if Path(out).exists():
        raise UserError(f"{out} exists already; choose another --out or remove it")


@contextlib.contextmanager
def _partial_folder(out: Path) -> Iterator[Path]:
    """The sibling folder `.<name>.partial`, locked, removed at the end; a recording may have left it behind."""
    out = Path(out).absolute()
    partial = out.parent / f".{out.name}.partial"
    if partial.exists() and not (partial / MARKER).is_file():
        raise UserError(f"move {partial} away: the recording needs this name, and no recording made it")
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / MARKER, "w") as marker:
        hold(marker, f"another recording into {out} is running")
        shutil.rmtree(partial / "dataset", ignore_errors=True)
        try:
            yield partial
        finally:
            shutil.rmtree(partial)


@contextlib.contextmanager
def _demonstrations(config: RecordConfig, count: int) -> Iterator[Iterator[Demonstration]]:
    """Attempts from initial states 0 … count-1, in this order with any number of workers. Processes start at once."""
    if config.workers == 1:
        try:
            yield (_attempt(config, start) for start in range(count))
        finally:
            _environment.cache_clear()
        return
    # Spawned, not forked: a GL context does not survive a fork.
    pool = ProcessPoolExecutor(config.workers, multiprocessing.get_context("spawn"))
    try:
        # Only a few at a time: the images of a whole recording need not fit into memory.
        pending = deque(pool.submit(_attempt, config, start) for start in range(min(config.workers + 1, count)))

        def in_order() -> Iterator[Demonstration]:
            for start in range(len(pending), count + len(pending)):
                demonstration = pending.popleft().result()
                if start < count:
                    pending.append(pool.submit(_attempt, config, start))
                yield demonstration

        yield in_order()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@functools.lru_cache(maxsize=1)
def _environment(config: RecordConfig) -> Environment:
    """This process's environment, kept from one attempt to the next."""
    return make_environment(config.env, config.split, config.seed, config.image_size, max_steps=config.max_steps)


def _attempt(config: RecordConfig, start: int) -> Demonstration:
    return demonstrate(_environment(config), start, config)


def _writer(config: RecordConfig, root: Path) -> LeRobotWriter:
    env = make_environment(config.env, config.split, config.seed, config.image_size, max_steps=config.max_steps)
    try:
        if env.unrecordable:
            raise UserError(f"{config.env} cannot be recorded: {env.unrecordable}")
        return LeRobotWriter(
            root,
            name=Path(config.out).name,
            fps=int(env.control_hz),
            robot_type=env.robot_type,
            views={view: (config.image_size, config.image_size) for view in env.views},
            state_names=env.state_names,
            action_names=env.action_names,
            longest=env.max_steps + config.extra_steps,
        )
    finally:
        env.close()
