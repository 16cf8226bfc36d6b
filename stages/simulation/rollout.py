"""Closed-loop rollouts of a policy in simulated tasks, several environments in lock-step.

Letters: N environments in the batch, T steps of an action chunk, d action width, H, W image size, F recorded frames.
"""

from __future__ import annotations

import abc
import functools
import math
import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ...cache.actions.history import NO_HISTORY, History
from ...common.progress import Count
from ...errors import UserError
from ..policy.history import Past, asked_later
from .envs import Environment, Observation, Split, check_environment, make_environment, opens_alone


class Policy(Protocol):
    """What `rollout` needs of a policy. To make an episode independent of its batch, draw noise from (start, step)."""

    needs_images: bool  # False: observations come without images, nothing is rendered
    # It may have a `history`; then its observations come with their `window`.

    def act_batch(self, observations: Sequence[Observation]) -> np.ndarray:
        """Action chunks `[N, T, d]` float32 in native units for N observations of one task."""
        ...


class SimulatorPolicy(abc.ABC):
    """A reference policy that may access the simulator itself."""

    needs_images = False

    @abc.abstractmethod
    def act_environments(self, environments: Sequence[Environment]) -> np.ndarray:
        """Action chunks `[N, T, d]` float32."""


class ExpertPolicy(SimulatorPolicy):
    """The scripted expert, one step at a time."""

    def act_environments(self, environments: Sequence[Environment]) -> np.ndarray:
        return np.stack([env.expert_action() for env in environments])[:, None]  # [N, 1, d]


class RandomPolicy(SimulatorPolicy):
    """Uniform actions, a pure function of (seed, start, step)."""

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def act_environments(self, environments: Sequence[Environment]) -> np.ndarray:
        return np.stack(
            [env.sample_action(np.random.default_rng([self._seed, env.start, env.steps])) for env in environments]
        )[:, None]  # [N, 1, d]


@dataclass(frozen=True)
class RolloutConfig:
    """How to roll out."""

    split: Split = "eval"  # which set of initial states
    seed: int = 0  # chooses the set within the split
    image_size: int = 128  # side of the images in pixels
    max_steps: int | None = None  # step limit; None = the task's own
    replan: int = 4  # steps of each chunk to execute before asking the policy again
    batch: int = 16  # environments in lock-step in one process
    workers: int = 1  # processes; more than one needs `policy_factory`
    record_video: int = 0  # how many episodes to record, from the first one
    video_frames_every: int = 4  # control steps between recorded frames


@dataclass(frozen=True)
class EpisodeResult:
    """One finished episode."""

    start: int  # number of the initial state
    success: bool  # solved at some step
    steps: int  # control steps taken; the episode ends with the first success
    return_: float  # sum of rewards
    start_vector: tuple[float, ...]  # the simulator's random numbers that define the initial state
    seconds_per_action: float  # policy time per control step, a batched call shared equally by its N observations
    frames: np.ndarray | None  # uint8 [F, H, W, 3] of the first camera, or None when not recorded


def rollout(
    policy: Policy | SimulatorPolicy | None,
    environment_name: str,
    starts: Sequence[int],
    config: RolloutConfig,
    on_progress: Count | None = None,
    policy_factory: Callable[[], Policy | SimulatorPolicy] | None = None,
) -> list[EpisodeResult]:
    """Run one episode from every initial state in `starts`; results in the order of `starts`.

    Args:
        policy: acts in this process; may be None with several workers.
        starts: numbers of initial states.
        on_progress: called with (done, total) after each episode, or each batch of a worker.
        policy_factory: builds a policy in each process if `config.workers > 1`; picklable.

    Raises:
        UserError: for an unknown environment or a setting out of range.
    """
    check_environment(environment_name, config.split, config.seed, config.image_size, config.max_steps)
    for name in ("replan", "batch", "workers", "video_frames_every"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} must be 1 or more, got {getattr(config, name)}")
    starts = list(starts)
    if not starts:
        raise UserError("0 episodes requested; give at least 1")
    if len(set(starts)) != len(starts):
        raise ValueError("an initial state is listed twice")
    size = 1 if opens_alone(environment_name) else min(config.batch, -(-len(starts) // config.workers))
    pieces = [starts[i : i + size] for i in range(0, len(starts), size)]
    recorded = frozenset(starts[: config.record_video])
    finished = 0

    def count(number: int) -> None:
        nonlocal finished
        finished += number
        if on_progress is not None:
            on_progress(finished, len(starts))

    if config.workers == 1:
        if policy is None:
            raise ValueError("rollout in one process needs a policy")
        runner = _Runner(policy, environment_name, config, recorded)
        try:
            return [result for piece in pieces for result in runner.run(piece, lambda: count(1))]
        finally:
            runner.close()
    if policy_factory is None:
        raise ValueError("rollout with several workers needs a policy_factory")
    return _in_workers((policy_factory, environment_name, config, recorded), pieces, count)


def _in_workers(setup: Setup, pieces: list[list[int]], count: Callable[[int], None]) -> list[EpisodeResult]:
    """Results of `pieces`, lists of initial states, from several processes; `count(n)` after each piece of n."""
    # Spawned, not forked: neither a GL context nor a CUDA context survives a fork.
    pool = ProcessPoolExecutor(setup[2].workers, multiprocessing.get_context("spawn"), _start_worker, setup)
    try:
        futures = [pool.submit(_run_in_worker, piece) for piece in pieces]
        for future in as_completed(futures):
            count(len(future.result()))
        return [result for future in futures for result in future.result()]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def wilson_interval(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a success rate (E. B. Wilson, 1927); z = 1.96 for 95 %."""
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n}")
    rate = successes / n
    center = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)


def assert_disjoint(starts_a: Iterable[Sequence[float]], starts_b: Iterable[Sequence[float]]) -> None:
    """`UserError` naming an initial state that occurs in both: those trained on, and those of the evaluation."""
    known = {tuple(float(v) for v in vector) for vector in starts_a}
    for vector in starts_b:
        if tuple(float(v) for v in vector) in known:
            shown = ", ".join(f"{v:.4f}" for v in vector)
            raise UserError(f"initial state ({shown}) was also trained on; evaluate on another split or seed")


@dataclass
class _Episode:
    """An episode in progress."""

    env: Environment
    observation: Observation
    recorded: bool
    past: Past
    frames: list[np.ndarray] = field(default_factory=list)
    success: bool = False
    done: bool = False
    steps: int = 0
    return_: float = 0.0
    policy_seconds: float = 0.0

    def record(self) -> None:
        if self.recorded:
            view = self.env.views[0]
            image = self.observation.images.get(view)
            self.frames.append(self.env.image(view) if image is None else image)

    def result(self) -> EpisodeResult:
        return EpisodeResult(
            self.env.start,
            self.success,
            self.steps,
            self.return_,
            self.env.start_vector,
            self.policy_seconds / self.steps,
            np.stack(self.frames) if self.recorded else None,
        )


class _Runner:
    """One process's policy and environments."""

    def __init__(
        self, policy: Policy | SimulatorPolicy, name: str, config: RolloutConfig, recorded: frozenset[int]
    ) -> None:
        self._policy, self._name, self._config, self._recorded = policy, name, config, recorded
        self._environments: list[Environment] = []

    def run(self, starts: Sequence[int], on_episode: Callable[[], None]) -> list[EpisodeResult]:
        """One episode from each initial state, in lock-step; finished ones leave the batch."""
        config, images = self._config, self._policy.needs_images
        history: History = getattr(self._policy, "history", NO_HISTORY)
        while len(self._environments) < len(starts):
            self._environments.append(
                make_environment(
                    self._name, config.split, config.seed, config.image_size, render=False, max_steps=config.max_steps
                )
            )
        episodes = [
            _Episode(env, env.reset(start, images), start in self._recorded, Past(history))
            for env, start in zip(self._environments, starts)
        ]
        for episode in episodes:
            episode.observation = episode.past.push(episode.observation)
            episode.record()
        active = episodes
        while active:
            chunks, seconds = self._act(active)
            executed = chunks[:, : config.replan]
            for episode, chunk in zip(active, executed):
                episode.policy_seconds += seconds / len(active)
                for i, action in enumerate(chunk, 1):
                    self._step(episode, action, render=images and asked_later(history, i, len(chunk)))
                    if episode.done:
                        on_episode()
                        break
            active = [episode for episode in active if not episode.done]
        return [episode.result() for episode in episodes]

    def close(self) -> None:
        for env in self._environments:
            env.close()

    def _act(self, active: Sequence[_Episode]) -> tuple[np.ndarray, float]:
        began = time.perf_counter()
        if isinstance(self._policy, SimulatorPolicy):
            chunks = self._policy.act_environments([episode.env for episode in active])
        else:
            chunks = self._policy.act_batch([episode.observation for episode in active])
        seconds = time.perf_counter() - began
        chunks = np.asarray(chunks, np.float32)  # [N, T, d]
        if chunks.ndim != 3 or len(chunks) != len(active) or chunks.shape[1] == 0:
            raise ValueError(f"a policy must return [N={len(active)}, T, d] actions, got shape {chunks.shape}")
        return chunks, seconds

    def _step(self, episode: _Episode, action: np.ndarray, render: bool) -> None:
        result = episode.env.step(action, render)
        episode.observation = episode.past.push(result.observation)
        episode.done, episode.success = result.done, result.success
        episode.steps += 1
        episode.return_ += result.reward
        if result.done or episode.steps % self._config.video_frames_every == 0:
            episode.record()


Setup = tuple[Callable[[], Policy | SimulatorPolicy], str, RolloutConfig, frozenset[int]]
"""A worker process's setup: policy factory, environment, config, initial states to record."""
_setup: Setup | None = None


def _start_worker(*setup: Any) -> None:
    """Keep a worker's setup; it is built on first use, where an error reaches the parent unchanged."""
    global _setup
    _setup = setup


@functools.cache
def _worker_runner() -> _Runner:
    assert _setup is not None
    policy_factory, name, config, recorded = _setup
    return _Runner(policy_factory(), name, config, recorded)


def _run_in_worker(starts: Sequence[int]) -> list[EpisodeResult]:
    return _worker_runner().run(starts, lambda: None)
