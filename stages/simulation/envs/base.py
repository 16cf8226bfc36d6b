"""The interface of every simulator adapter, and the half of it that they share.

Letters: H, W image size in pixels, ds state width, da action width.
"""

from __future__ import annotations

import abc
import contextlib
import importlib.util
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ....errors import UserError
from ...policy.observation import Observation

Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = ("train", "eval")


@dataclass(frozen=True)
class StepResult:
    """Outcome of one control step."""

    observation: Observation
    reward: float
    success: bool  # the task is solved in this state
    done: bool  # success, or the episode's step limit is reached
    info: dict[str, float] = field(default_factory=dict)  # whatever else the simulator measured


@dataclass(frozen=True)
class Setup:
    """The arguments of `make_environment`."""

    name: str  # e.g. "metaworld/push-v3"
    split: Split = "train"  # of the initial states
    seed: int = 0  # chooses a set of them within the split
    image_size: int = 128  # H = W of images
    render: bool = True  # default of calls that do not say whether to render
    max_steps: int | None = None  # step limit; None = the task's own

    @property
    def task(self) -> str:
        """The name without its simulator."""
        return self.name.partition("/")[2]


class Environment(abc.ABC):
    """One robot task. An initial state is a pure function of (name, split, seed, number); splits never share one.

    An adapter sets the class attributes, passes its limits to `__init__`, and implements the abstract methods.
    """

    control_hz: float
    robot_type: str  # as written into recorded datasets
    views: tuple[str, ...]  # camera names, in the order policies and datasets use
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    noise_scale: float | np.ndarray = 1.0  # action units of recording noise 1; one number or [da]
    alone = False  # only one can be open in a process
    unrecordable = ""  # why demonstrations cannot be recorded, if they cannot
    rehearse = False  # recording tries without rendering first: the expert fails often or rendering is slow
    _vector: np.ndarray = np.zeros(0)  # the random numbers of the current initial state

    def __init__(self, setup: Setup, instruction: str, max_steps: int, low: np.ndarray, high: np.ndarray) -> None:
        self._setup, self.name, self.task = setup, setup.name, setup.task
        self.split, self.seed = setup.split, setup.seed
        self.image_size, self.render = setup.image_size, setup.render
        self.instruction = instruction
        self.max_steps = setup.max_steps or max_steps  # control steps after which `done` is reported
        self.action_low, self.action_high = np.asarray(low, np.float64), np.asarray(high, np.float64)  # [da]
        self.start, self.steps = -1, 0  # number of the initial state; control steps since reset
        self._plan: Generator[np.ndarray, None, None] | None = None  # the running expert
        self._planned: tuple[int, np.ndarray] = (-1, np.zeros(0))  # the step of its last action, and that action

    def reset(self, start: int, render: bool | None = None) -> Observation:
        """Go to initial state number `start` >= 0; `render` overrides the setup's for this call."""
        if start < 0:
            raise ValueError(f"start must be 0 or more, got {start}")
        self._drop_plan()
        self._begin(start)
        self.start, self.steps = start, 0
        return self._observe(render)

    def step(self, action: np.ndarray, render: bool | None = None) -> StepResult:
        """Apply a native action `[da]`, clipped to its limits. Allowed after `done`, where recording continues."""
        action = np.asarray(action, np.float64)
        width = len(self.action_names)
        if action.shape != (width,) or not np.isfinite(action).all():
            raise ValueError(f"{self.name}: an action must be {width} finite numbers, got {action}")
        reward, success, info = self._advance(np.clip(action, self.action_low, self.action_high))
        self.steps += 1
        return StepResult(self._observe(render), float(reward), success, success or self.steps >= self.max_steps, info)

    def expert_action(self) -> np.ndarray:
        """The scripted expert's action `[da]` float32 for the current state, inside the action limits.

        It follows the episode from the beginning; once its script has ended, it repeats its last action.
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
        """Free the simulator; may be called twice."""
        self._drop_plan()

    @property
    def start_vector(self) -> tuple[float, ...]:
        """The random numbers that define the initial state; equal vectors mean equal states."""
        return tuple(float(v) for v in self._vector)

    @abc.abstractmethod
    def image(self, view: str) -> np.ndarray:
        """The current state as one camera sees it, uint8 `[H, W, 3]`."""

    @abc.abstractmethod
    def _begin(self, start: int) -> None:
        """Put the simulator into the initial state."""

    @abc.abstractmethod
    def _advance(self, action: np.ndarray) -> tuple[float, bool, dict[str, float]]:
        """One control step with `[da]` float64 inside the limits: reward, success, info."""

    @abc.abstractmethod
    def _state(self) -> np.ndarray:
        """Proprioception `[ds]` of the current state."""

    @abc.abstractmethod
    def _expert(self) -> Generator[np.ndarray, None, None]:
        """The expert of one episode: a generator of actions `[da]`, resumed once the action has been executed."""

    def _rest_action(self) -> np.ndarray:
        """`[da]` that does nothing: the action of an expert that gives up at once."""
        return np.clip(np.zeros(len(self.action_names)), self.action_low, self.action_high)

    def _observe(self, render: bool | None) -> Observation:
        wanted = self.render if render is None else render
        images = {view: self.image(view) for view in self.views} if wanted else {}
        return Observation(images, self.instruction, self._state().astype(np.float32), self.start, self.steps)

    def _drop_plan(self) -> None:
        if self._plan is not None:
            self._plan.close()  # runs the generator's `finally` now, not at garbage collection
            self._plan = None


def require_modules(simulator: str, extra: str, *modules: str) -> None:
    """`UserError` with the install step if one of `modules` is missing."""
    if any(importlib.util.find_spec(module) is None for module in modules):
        raise UserError(f"the simulator {simulator} is not installed; install it with: pip install 'dvla[{extra}]'")


def start_seed(setup: Setup, start: int) -> int:
    """32-bit seed of an initial state. Its lowest bit is the split, so splits never share a seed."""
    split = SPLITS.index(setup.split)
    key = np.random.SeedSequence([zlib.crc32(setup.task.encode()), split, setup.seed, start])
    return int(key.generate_state(1)[0] & 0x7FFFFFFF) * len(SPLITS) + split


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed numpy's global generator, for simulators that sample from it, and restore its state afterwards."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)
