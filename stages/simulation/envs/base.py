"""What every simulator adapter gives to recording, rollouts and evaluation, and the half of it that they share.

Letters: H, W picture size in pixels, ds state width, da action width.
"""

from __future__ import annotations

import abc
import contextlib
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ...policy.observation import Observation

Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = ("train", "eval")


@dataclass(frozen=True)
class StepResult:
    """Outcome of one control step."""

    observation: Observation
    reward: float
    success: bool  # the task is solved in this very state
    done: bool  # success, or the episode's step limit is reached
    info: dict[str, float] = field(default_factory=dict)  # whatever else the simulator measured


@dataclass(frozen=True)
class Setup:
    """How an environment was asked for; see `make_environment`."""

    name: str  # e.g. "metaworld/push-v3"
    split: Split = "train"  # family of starts
    seed: int = 0  # chooses the family within the split
    image_size: int = 128  # H = W of pictures
    render: bool = True  # whether pictures are taken where a call does not say
    max_steps: int | None = None  # step limit; None = the task's own

    @property
    def task(self) -> str:
        """The name without its simulator."""
        return self.name.partition("/")[2]


class Environment(abc.ABC):
    """One robot task. A start is a pure function of (name, split, seed, start number); splits never share a start.

    An adapter sets the class attributes, gives its limits to `__init__`, and writes the methods that are abstract here.
    """

    control_hz: float
    robot_type: str  # as written into recorded datasets
    views: tuple[str, ...]  # camera names, in the order policies and datasets use
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    noise_scale: float | np.ndarray = (
        1.0  # action noise of 1 while recording means so much, in action units; one number or [da]
    )
    alone = False  # only one of its kind can be open in a process
    unrecordable = ""  # why demonstrations cannot be recorded, where that is so
    rehearse = False  # recording tries without pictures first: the expert fails often or pictures are slow

    def __init__(self, setup: Setup, instruction: str, max_steps: int, low: np.ndarray, high: np.ndarray) -> None:
        self.name, self.task, self.split, self.seed = setup.name, setup.task, setup.split, setup.seed
        self.image_size, self.render = setup.image_size, setup.render
        self.instruction = instruction
        self.max_steps = setup.max_steps or max_steps  # control steps after which `done` is reported
        self.action_low, self.action_high = np.asarray(low, np.float64), np.asarray(high, np.float64)  # [da]
        self.start, self.steps = -1, 0  # number of the current start; control steps since reset
        self._plan: Generator[np.ndarray, None, None] | None = None  # the expert at work
        self._planned: tuple[int, np.ndarray] = (-1, np.zeros(0))  # the step it acted at last, and how

    def reset(self, start: int, render: bool | None = None) -> Observation:
        """Go to start number `start` >= 0. `render` overrides for this call whether pictures are taken."""
        if start < 0:
            raise ValueError(f"start must be 0 or more, got {start}")
        self._drop_plan()
        self._begin(start)
        self.start, self.steps = start, 0
        return self._observe(render)

    def step(self, action: np.ndarray, render: bool | None = None) -> StepResult:
        """Apply a native action `[da]`, clipped to its limits. Allowed after `done` (recording goes on a little).

        Raises `ValueError` for a wrong shape or a non-finite action.
        """
        action = np.asarray(action, np.float64)
        width = len(self.action_names)
        if action.shape != (width,) or not np.isfinite(action).all():
            raise ValueError(f"{self.name}: an action is {width} finite numbers, got {action}")
        reward, success, info = self._advance(np.clip(action, self.action_low, self.action_high))
        self.steps += 1
        return StepResult(self._observe(render), float(reward), success, success or self.steps >= self.max_steps, info)

    def expert_action(self) -> np.ndarray:
        """The scripted expert's action `[da]` float32 for the current state, inside the action limits.

        It follows the episode from its start; when its script has ended, its last action is repeated.
        """
        if self._plan is None:
            self._plan, self._planned = self._expert(), (-1, np.zeros(0))
        if self._planned[0] != self.steps:
            action = next(self._plan, None)
            if action is None and self._planned[0] < 0:
                action = self._rest_action()
            elif action is None:
                action = self._planned[1]
            self._planned = self.steps, np.clip(action, self.action_low, self.action_high).astype(np.float32)
        return self._planned[1].copy()

    def sample_action(self, rng: np.random.Generator) -> np.ndarray:
        """A uniformly random action `[da]` float32."""
        return rng.uniform(self.action_low, self.action_high).astype(np.float32)

    def close(self) -> None:
        """Free the simulator; calling twice is fine."""
        self._drop_plan()

    @property
    @abc.abstractmethod
    def start_vector(self) -> tuple[float, ...]:
        """The random numbers that define the current start; equal vectors mean equal starts."""

    @abc.abstractmethod
    def picture(self, view: str) -> np.ndarray:
        """The current state seen from one camera, uint8 `[H, W, 3]`."""

    @abc.abstractmethod
    def _begin(self, start: int) -> None:
        """Put the simulator into the start."""

    @abc.abstractmethod
    def _advance(self, action: np.ndarray) -> tuple[float, bool, dict[str, float]]:
        """One control step with `[da]` float64 inside the limits: reward, success, info."""

    @abc.abstractmethod
    def _state(self) -> np.ndarray:
        """Proprioception `[ds]` of the current state."""

    @abc.abstractmethod
    def _expert(self) -> Generator[np.ndarray, None, None]:
        """The expert of one episode: a generator that yields an action `[da]` and goes on when it has been carried out."""

    def _rest_action(self) -> np.ndarray:
        """`[da]` that does nothing: what an expert does that gives up at once."""
        return np.clip(np.zeros(len(self.action_names)), self.action_low, self.action_high)

    def _observe(self, render: bool | None) -> Observation:
        wanted = self.render if render is None else render
        images = {view: self.picture(view) for view in self.views} if wanted else {}
        return Observation(images, self.instruction, self._state().astype(np.float32), self.start, self.steps)

    def _drop_plan(self) -> None:
        if self._plan is not None:
            self._plan.close()  # a generator's `finally` runs now, not when the collector finds it
            self._plan = None


def start_seed(setup: Setup, start: int) -> int:
    """Seed of a start for simulators that draw from one 32-bit seed. Its lowest bit is the split, so splits never meet."""
    split = SPLITS.index(setup.split)
    key = np.random.SeedSequence([zlib.crc32(setup.task.encode()), split, setup.seed, start])
    return int(key.generate_state(1)[0] & 0x7FFFFFFF) * len(SPLITS) + split


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """For simulators that draw from numpy's global generator: it stands at `seed` meanwhile and is put back."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)
