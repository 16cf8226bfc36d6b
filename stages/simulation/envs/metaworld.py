"""Meta-World v3: 50 Sawyer tasks with scripted experts, seen by two cameras, rendered without a display.

Letters: S image size in pixels. Actions are 4-d in [-1, 1]: the hand's displacement (1 = 0.01 m per step) and the
gripper's effort (-1 open, +1 closed). The state is the first four numbers of Meta-World's own observation.
"""

from __future__ import annotations

import functools
import sys
import warnings
import zlib
from collections.abc import Generator
from typing import Any

import numpy as np

from ....errors import UserError
from .base import SPLITS, Environment, Setup, require_modules
from .mujoco_render import load_mujoco, renderer, unseen_hidden

PREFIX = "metaworld/"
DEFAULT_MAX_STEPS = 150
# Instruction of each task, and its step limit where the scripted expert needs more than the default.
TASKS: dict[str, tuple[str, int]] = {
    "assembly-v3": ("pick up the nut and place it onto the peg", DEFAULT_MAX_STEPS),
    "basketball-v3": ("put the basketball into the basket", DEFAULT_MAX_STEPS),
    "bin-picking-v3": ("move the puck from one bin to the other", 300),
    "box-close-v3": ("close the box with the cover", 200),
    "button-press-topdown-v3": ("press the button from the top", DEFAULT_MAX_STEPS),
    "button-press-topdown-wall-v3": ("press the button from the top behind the wall", DEFAULT_MAX_STEPS),
    "button-press-v3": ("press the button", DEFAULT_MAX_STEPS),
    "button-press-wall-v3": ("press the button behind the wall", DEFAULT_MAX_STEPS),
    "coffee-button-v3": ("press the button of the coffee machine", DEFAULT_MAX_STEPS),
    "coffee-pull-v3": ("pull the mug away from the coffee machine", DEFAULT_MAX_STEPS),
    "coffee-push-v3": ("push the mug under the coffee machine", DEFAULT_MAX_STEPS),
    "dial-turn-v3": ("turn the dial", DEFAULT_MAX_STEPS),
    "disassemble-v3": ("take the nut off the peg", 250),
    "door-close-v3": ("close the door", DEFAULT_MAX_STEPS),
    "door-lock-v3": ("lock the door", 200),
    "door-open-v3": ("open the door", DEFAULT_MAX_STEPS),
    "door-unlock-v3": ("unlock the door", DEFAULT_MAX_STEPS),
    "drawer-close-v3": ("close the drawer", DEFAULT_MAX_STEPS),
    "drawer-open-v3": ("open the drawer", DEFAULT_MAX_STEPS),
    "faucet-close-v3": ("close the faucet", DEFAULT_MAX_STEPS),
    "faucet-open-v3": ("open the faucet", DEFAULT_MAX_STEPS),
    "hammer-v3": ("hammer the nail into the wall", DEFAULT_MAX_STEPS),
    "hand-insert-v3": ("insert the gripper into the hole", DEFAULT_MAX_STEPS),
    "handle-press-side-v3": ("press the handle down from the side", DEFAULT_MAX_STEPS),
    "handle-press-v3": ("press the handle down", DEFAULT_MAX_STEPS),
    "handle-pull-side-v3": ("pull the handle up from the side", DEFAULT_MAX_STEPS),
    "handle-pull-v3": ("pull the handle up", 200),
    "lever-pull-v3": ("pull the lever", DEFAULT_MAX_STEPS),
    "peg-insert-side-v3": ("insert the peg into the hole from the side", 450),
    "peg-unplug-side-v3": ("unplug the peg sideways", 200),
    "pick-out-of-hole-v3": ("pick the puck out of the hole", 200),
    "pick-place-v3": ("pick up the puck and place it at the goal", DEFAULT_MAX_STEPS),
    "pick-place-wall-v3": ("pick up the puck and place it at the goal behind the wall", DEFAULT_MAX_STEPS),
    "plate-slide-back-side-v3": ("slide the plate out of the cabinet sideways", DEFAULT_MAX_STEPS),
    "plate-slide-back-v3": ("slide the plate out of the cabinet", DEFAULT_MAX_STEPS),
    "plate-slide-side-v3": ("slide the plate into the cabinet sideways", DEFAULT_MAX_STEPS),
    "plate-slide-v3": ("slide the plate into the cabinet", DEFAULT_MAX_STEPS),
    "push-back-v3": ("push the puck back to the goal", 400),
    "push-v3": ("push the puck to the goal", DEFAULT_MAX_STEPS),
    "push-wall-v3": ("push the puck around the wall to the goal", DEFAULT_MAX_STEPS),
    "reach-v3": ("reach the goal", DEFAULT_MAX_STEPS),
    "reach-wall-v3": ("reach the goal behind the wall", DEFAULT_MAX_STEPS),
    "shelf-place-v3": ("place the puck onto the shelf", 300),
    "soccer-v3": ("kick the ball into the goal", DEFAULT_MAX_STEPS),
    "stick-pull-v3": ("pull the box with the stick", 250),
    "stick-push-v3": ("push the box with the stick", DEFAULT_MAX_STEPS),
    "sweep-into-v3": ("sweep the puck into the hole", DEFAULT_MAX_STEPS),
    "sweep-v3": ("sweep the puck off the table", DEFAULT_MAX_STEPS),
    "window-close-v3": ("close the window", DEFAULT_MAX_STEPS),
    "window-open-v3": ("open the window", DEFAULT_MAX_STEPS),
}
require = functools.partial(require_modules, "metaworld", "sim", "metaworld", "mujoco")
NAMES = tuple(PREFIX + task for task in sorted(TASKS))
# View name -> (Meta-World's camera, pixel order that shows it upright).
CAMERAS: dict[str, tuple[str, tuple[slice, slice]]] = {
    "corner2": ("corner2", (slice(None, None, -1), slice(None, None, -1))),
    "gripper": ("gripperPOV", (slice(None), slice(None))),
}
GAIN = 10.0  # of the experts of our own tasks: action per meter
CORNER2_POSITION = (0.75, 0.075, 0.7)  # meters; as in LeRobot's Meta-World environment and datasets


@functools.cache
def _modules() -> tuple[Any, Any, Any]:
    """(mujoco, metaworld's task classes by name, its expert classes by name), imported on first use (about 2 s)."""
    require()
    mujoco = load_mujoco()
    try:
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"metaworld cannot be imported: {error}; install it again with: pip install 'dvla[sim]'"
        ) from error
    return mujoco, ALL_V3_ENVIRONMENTS, ENV_POLICY_MAP


class MetaWorldEnvironment(Environment):
    """One Meta-World task; see `base.Environment`. Build it through `make_environment`."""

    control_hz = 80.0
    robot_type = "metaworld_sawyer"
    views = tuple(CAMERAS)
    state_names = ("x", "y", "z", "gripper")
    action_names = ("dx", "dy", "dz", "gripper")

    def __init__(
        self, setup: Setup, scene: str | None = None, instruction: str = "", limit: int = DEFAULT_MAX_STEPS
    ) -> None:
        """`scene`: the Meta-World task whose scene a task of our own uses, with its own instruction and step limit."""
        self._mujoco, self._tasks, self._experts = _modules()
        self._scene = scene or setup.task
        if scene is None:
            instruction, limit = TASKS[setup.task]
        super().__init__(setup, instruction, limit, -np.ones(4), np.ones(4))
        self._sim = self._tasks[self._scene]()
        # Experts read the goal, which Meta-World hides by default; the cached space has the hidden goal's bounds.
        self._sim._partially_observable = False
        self._sim.__dict__.pop("sawyer_observation_space", None)
        self._sim._set_task_called = True
        # The base class limits steps; the simulator would raise at its own limit.
        self._sim.max_path_length = sys.maxsize
        self._sim._get_state_rand_vec = self._random_vector
        self._model, self._data = self._sim.model, self._sim.data
        self._model.camera("corner2").pos = CORNER2_POSITION
        self._rng = np.random.default_rng(0)
        self._fixed: np.ndarray | None = None

    def image(self, view: str) -> np.ndarray:
        camera, upright = CAMERAS[view]
        shared = renderer(self.name, self.image_size, lambda: self._tasks[self._scene]().model)
        with unseen_hidden(self._model, self._data, camera):
            image = shared.render(self._model, self._data, camera)
        return np.ascontiguousarray(image[upright])

    def close(self) -> None:
        super().close()
        self._sim.close()

    def _begin(self, start: int) -> None:
        # Meta-World samples positions of object and goal itself and rejects some, so let it sample from our generator
        # until it accepts, then reset with that vector fixed: its first pass still moves bodies of the previous
        # episode.
        key = [zlib.crc32(self.task.encode()), SPLITS.index(self.split), self.seed, start]
        self._rng, self._fixed = np.random.default_rng(key), None
        self._sim.reset_model()
        self._fixed = self._vector
        self._sim.reset()
        self._mujoco.mj_forward(self._model, self._data)  # the simulator's own observation may lag by one update
        self._sim._prev_obs = self._sim._get_curr_obs_combined_no_goal()
        self._obs = self._sim._get_obs()

    def _advance(self, action: np.ndarray) -> tuple[float, bool, dict[str, float]]:
        self._obs, reward, _, _, info = self._sim.step(action)
        return reward, bool(info["success"]), {k: float(v) for k, v in info.items()}

    def _state(self) -> np.ndarray:
        return self._obs[:4]

    def _expert(self) -> Generator[np.ndarray, None, None]:
        expert = self._experts[self.task]()
        while True:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the experts exceed [-1, 1] on purpose and warn about it
                action = expert.get_action(self._obs)
            yield action

    def _toward(self, place: np.ndarray) -> np.ndarray:
        """The action straight to a position at full speed, slower at the end; the fingers stay open."""
        step = GAIN * (place - self._obs[:3])
        return np.append(step / max(1.0, float(np.abs(step).max())), -1.0)

    def _random_vector(self) -> np.ndarray:
        """Replaces Meta-World's own sampling. A vector belongs to one split by its checksum, so splits share none."""
        if self._fixed is not None:
            return self._fixed.copy()
        space = self._sim._random_reset_space
        for _ in range(1000):
            vector = self._rng.uniform(space.low, space.high)
            if zlib.crc32(vector.tobytes()) % len(SPLITS) == SPLITS.index(self.split):
                self._vector = vector
                self._sim._last_rand_vec = vector.copy()
                return vector.copy()
        raise RuntimeError(f"{self.name} has no initial state in split {self.split}")


make = MetaWorldEnvironment
