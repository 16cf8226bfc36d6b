"""What every simulator adapter gives to recording, rollouts and evaluation.

Letters: H, W picture size in pixels, ds state width, da action width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = ("train", "eval")


@dataclass(frozen=True)
class Observation:
    """What a policy may see at one control step."""

    images: dict[str, np.ndarray]   # view name -> uint8 [H, W, 3] RGB; empty when no pictures were asked for
    instruction: str                # natural language task
    state: np.ndarray               # [ds] float32, native units of `Environment.state_names`
    start: int = 0                  # which start of the split this episode began from
    step: int = 0                   # control steps since reset; (start, step) keys a policy's noise, whatever the batch


@dataclass(frozen=True)
class StepResult:
    """Outcome of one control step."""

    observation: Observation
    reward: float
    success: bool                   # the task is solved in this very state
    done: bool                      # success, or the episode's step limit is reached
    info: dict[str, float] = field(default_factory=dict)  # whatever else the simulator measured


class Environment(Protocol):
    """One robot task. A start is a pure function of (name, split, seed, start number); splits never share a start."""

    name: str                       # e.g. "metaworld/push-v3"
    instruction: str
    control_hz: float
    robot_type: str                 # as written into recorded datasets
    views: tuple[str, ...]          # camera names, in the order policies and datasets use
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    max_steps: int                  # control steps after which `done` is reported
    image_size: int                 # H = W
    start: int                      # number of the current start
    steps: int                      # control steps since reset

    @property
    def start_vector(self) -> tuple[float, ...]:
        """The random numbers that define the current start; equal vectors mean equal starts."""
        ...

    def reset(self, start: int, render: bool | None = None) -> Observation:
        """Go to start number `start` >= 0. `render` overrides for this call whether pictures are taken."""
        ...

    def step(self, action: np.ndarray, render: bool | None = None) -> StepResult:
        """Apply a native action `[da]`, clipped to its limits. Allowed after `done` (recording goes on a little).

        Raises `ValueError` for a wrong shape or a non-finite action.
        """
        ...

    def picture(self, view: str) -> np.ndarray:
        """The current state seen from one camera, uint8 `[H, W, 3]`."""
        ...

    def expert_action(self) -> np.ndarray:
        """The scripted expert's action `[da]` float32 for the current state, inside the action limits."""
        ...

    def sample_action(self, rng: np.random.Generator) -> np.ndarray:
        """A uniformly random action `[da]` float32."""
        ...

    def close(self) -> None:
        """Free the simulator; calling twice is fine."""
        ...
