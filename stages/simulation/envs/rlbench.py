"""RLBench (CoppeliaSim): tasks of a Franka arm with demonstrations from its own waypoints, seen by up to five cameras.

It needs CoppeliaSim 4.1, PyRep and a display, so it runs in the image of docker/Dockerfile.rlbench; nothing here was
run in CoppeliaSim. The conversions `to_observation`, `to_action` and `demonstrated` are pure functions, tested on
recorded structures.

Action and state are those of configs/datasets/rlbench.yaml: the hand's position (m, world) and quaternion xyzw, and the
gripper (1 open); an action is the pose one step later. A pose is reached by inverse kinematics or, if it is too far for
that, by a planned path; the robot does not move to one it cannot reach. Demonstrations are RLBench's own, replayed step
by step.

Initial states: numpy's generator, from which RLBench samples, is seeded, and also chooses the variation. RLBench tries
several placements until a path exists, and its planner is not repeatable, so a few initial states differ from run to
run (its issues 194 and 232). Letters: T steps.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections import deque
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from ....cache.actions.rotations import from_quaternion
from ....cache.readers.rlbench.layout import TASKS as PERACT
from ....errors import UserError
from .base import Environment, Setup, seeded, start_seed

PREFIX = "rlbench/"
# PerAct's 18; the three that only its fork of RLBench has are listed beside RLBench's own of the same kind.
TASKS = (*PERACT, "slide_block_to_target", "stack_wine", "sweep_to_dustpan")
NAMES = tuple(PREFIX + task for task in sorted(TASKS))
CAMERAS = ("front", "left_shoulder", "right_shoulder", "overhead", "wrist")
MAX_STEPS = 400  # of 0.05 s; RLBench's demonstrations of these tasks take up to about 300
# Position in m, beyond the arm's reach (RLBench itself refuses what it cannot reach); quaternion; gripper.
LOW = (-2, -2, -2, -1, -1, -1, -1, 0)
HIGH = (2, 2, 2, 1, 1, 1, 1, 1)
IMAGE = "docker build -f docker/Dockerfile.rlbench -t dvla:rlbench . (docs/simulators.md)"


def require() -> None:
    """`UserError` with the install step when RLBench, CoppeliaSim or a display is missing."""
    missing = []
    # The package named rlbench in registries is a different one, without `backend`.
    if importlib.util.find_spec("rlbench") is None or importlib.util.find_spec("pyrep") is None:
        missing.append("the packages rlbench and pyrep")
    if not os.path.isdir(os.environ.get("COPPELIASIM_ROOT", "")):
        missing.append("CoppeliaSim 4.1 (COPPELIASIM_ROOT names no folder)")
    if not os.environ.get("DISPLAY"):
        missing.append("a display (DISPLAY is not set; Xvfb will do)")
    if missing:
        raise UserError(
            f"the simulator RLBench is not installed, missing: {', '.join(missing)}; use its image: {IMAGE}"
        )


def to_observation(observation: Any, views: Sequence[str] = CAMERAS) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """RLBench's `Observation` → ({view: uint8 [H, W, 3]}, state [8] float32: gripper_pose, gripper_open).

    `UserError` if it lacks the pose or an image, which RLBench leaves out unless its config requests them.
    """
    pose, opening = observation.gripper_pose, observation.gripper_open
    if pose is None or opening is None:
        raise UserError("RLBench's observation has no gripper_pose or gripper_open")
    images = {}
    for view in views:
        image = getattr(observation, f"{view}_rgb", None)
        if image is None:
            raise UserError(f"RLBench's observation has no image {view}_rgb; cameras: {', '.join(CAMERAS)}")
        image = np.asarray(image)
        if image.dtype.kind == "f":  # PyRep's own, 0 to 1; RLBench since 1.1 gives bytes
            image = np.rint(np.clip(image, 0, 1) * 255)
        images[view] = np.ascontiguousarray(image.astype(np.uint8))
    return images, np.append(np.asarray(pose, np.float64), float(opening)).astype(np.float32)


def to_action(action: np.ndarray) -> np.ndarray:
    """Our action [8] → RLBench's [8] float64, which needs a unit quaternion and a gripper of 0 or 1."""
    action = np.asarray(action, np.float64)
    return np.concatenate([action[:3], from_quaternion("quat_xyzw", action[3:7]), [float(action[7] > 0.5)]])


def demonstrated(demo: Sequence[Any]) -> np.ndarray:
    """A demonstration of T observations → actions [T-1, 8] float32: pose and gripper measured one step later."""
    return np.stack([to_observation(later, ())[1] for later in demo[1:]])


class RlbenchEnvironment(Environment):
    """One RLBench task; see `base.Environment`. Build it through `make_environment`."""

    control_hz = 20.0
    robot_type = "rlbench_panda"
    views = CAMERAS
    state_names = ("x", "y", "z", "qx", "qy", "qz", "qw", "gripper_open")
    action_names = state_names
    alone = True  # PyRep allows no more
    noise_scale = 0.0  # demonstrations are replayed, so noise on actions cannot be executed

    def __init__(self, setup: Setup) -> None:
        require()
        from pyrep.errors import ConfigurationPathError, IKError
        from rlbench.action_modes.action_mode import MoveArmThenGripper
        from rlbench.action_modes.arm_action_modes import EndEffectorPoseViaIK, EndEffectorPoseViaPlanning
        from rlbench.action_modes.gripper_action_modes import Discrete
        from rlbench.backend.exceptions import DemoError, InvalidActionError, NoWaypointsError, WaypointError
        from rlbench.environment import Environment as Simulator
        from rlbench.observation_config import ObservationConfig

        self._refused, self._unplanned = (
            InvalidActionError,
            (DemoError, WaypointError, NoWaypointsError, ConfigurationPathError, IKError),
        )
        self._arm_modes = EndEffectorPoseViaIK(), EndEffectorPoseViaPlanning()
        self._mode = MoveArmThenGripper(self._arm_modes[0], Discrete())
        config = ObservationConfig(task_low_dim_state=True)
        for camera in CAMERAS:
            wanted = getattr(config, f"{camera}_camera")
            wanted.set_all(False)
            wanted.rgb, wanted.image_size = True, (setup.image_size, setup.image_size)
        self._sim = Simulator(self._mode, obs_config=config, headless=True)
        super().__init__(setup, setup.task.replace("_", " "), MAX_STEPS, np.array(LOW), np.array(HIGH))
        self._coming: deque[Any] = deque()  # observations of the demonstration that is being replayed
        try:
            self._sim.launch()
            self._task = self._sim.get_task(_task_class(setup.task))
        except BaseException:
            self._sim.shutdown()
            raise

    def image(self, view: str) -> np.ndarray:
        return to_observation(self._seen, (view,))[0][view]

    def close(self) -> None:
        super().close()
        if self._sim is not None:
            self._sim.shutdown()
            self._sim = None

    def _begin(self, start: int) -> None:
        self._coming.clear()
        with seeded(start_seed(self._setup, start)):
            variation = self._task.sample_variation()
            descriptions, self._seen = self._task.reset()
        self.instruction = descriptions[0]
        self._vector = np.append(variation, self._seen.task_low_dim_state)

    def _advance(self, action: np.ndarray) -> tuple[float, bool, dict[str, float]]:
        if self._coming:
            if not np.allclose(action, to_observation(self._coming[0], ())[1], atol=1e-3):
                raise RuntimeError(f"{self.name}: RLBench's demonstration must be followed to its end")
            self._seen = self._coming.popleft()
            return float(not self._coming), not self._coming, {}  # RLBench discards demonstrations that fail
        for mode in self._arm_modes:
            self._mode.arm_action_mode = mode
            try:
                self._seen, reward, _ = self._task.step(to_action(action))
                return float(reward), reward > 0, {}
            except self._refused:
                continue
        self._seen = self._task.get_observation()
        return 0.0, False, {"refused": 1.0}

    def _state(self) -> np.ndarray:
        return to_observation(self._seen, ())[1]

    def _rest_action(self) -> np.ndarray:
        return self._state()

    def _expert(self) -> Generator[np.ndarray, None, None]:
        """RLBench plays its waypoints to the end; the recorded observations are then returned step by step."""
        try:
            demo = self._task._scene.get_demo()  # `get_demos` would start another episode
        except self._unplanned:
            return
        self._coming = deque(list(demo)[1:])
        yield from demonstrated(demo)


def _task_class(task: str) -> type:
    """The class of a task; `UserError` if the installed RLBench lacks it."""
    try:
        return getattr(
            importlib.import_module(f"rlbench.tasks.{task}"), "".join(word.capitalize() for word in task.split("_"))
        )
    except (ModuleNotFoundError, AttributeError) as error:
        raise UserError(
            f"the installed RLBench has no task {task}; PerAct's fork has its 18 tasks, RLBench's own has "
            "slide_block_to_target, stack_wine and sweep_to_dustpan instead of three of them"
        ) from error


make = RlbenchEnvironment
