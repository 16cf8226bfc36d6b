"""ManiSkill 3: table-top tasks of a Panda arm with motion-planning experts, seen from the front and from the hand.

Letters: S image size in pixels. An action is the seven joints' target angles (rad) and the gripper's (-1 closed, 1
open); the state is the seven measured angles and the gripper's opening (0 closed, 1 open). ManiSkill hides goal markers
from cameras and gives their positions as numbers; here they are rendered, so that images show the entire task. The
front camera's field of view is narrower than ManiSkill's where that would leave the cubes a few pixels wide.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import io
import logging
import queue
import threading
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ....errors import UserError
from .base import Environment, Setup, require_modules, start_seed
from .mujoco_render import choose_gl_backend

PREFIX = "maniskill/"
FINGER_TRAVEL = 0.04  # meters of one finger, fully open
DRIVER = (
    "SAPIEN found no usable Vulkan driver (Debian 12's own Mesa is too old); install one with: make vulkan "
    "(mesa-vulkan-drivers 23 or newer), or set VK_ICD_FILENAMES to a driver's .json file"
)


@dataclass(frozen=True)
class Task:
    """What ManiSkill does not define for a task."""

    instruction: str
    max_steps: int  # control steps; the experts need more than ManiSkill's own limits
    expert: str  # function of mani_skill.examples.motionplanning.panda.solutions
    fov: float | None = 1.2  # field of view of the front camera, rad; None = ManiSkill's
    noise: float = 0.05  # rad of a joint for recording noise 1; experts that insert tolerate little


TASKS = {
    "LiftPegUpright-v1": Task("lift the peg and set it upright", 250, "solveLiftPegUpright"),
    "PegInsertionSide-v1": Task("insert the peg into the hole from the side", 250, "solvePegInsertionSide", None, 0.01),
    "PickCube-v1": Task("pick up the red cube and hold it at the green marker", 120, "solvePickCube"),
    "PlugCharger-v1": Task("plug the charger into the receptacle", 300, "solvePlugCharger", noise=0.01),
    "PullCube-v1": Task("pull the cube onto the target", 100, "solvePullCube", None),
    "PushCube-v1": Task("push the cube onto the target", 100, "solvePushCube"),
    "StackCube-v1": Task("stack the red cube onto the green cube", 160, "solveStackCube"),
}
require = functools.partial(require_modules, "ManiSkill", "maniskill", "mani_skill", "sapien", "mplib")
NAMES = tuple(PREFIX + task for task in sorted(TASKS))
VIEWS = {"base": "base_camera", "hand": "hand_camera"}  # view name -> ManiSkill's sensor


@functools.cache
def _modules() -> tuple[Any, Any]:
    """(ManiSkill's registered tasks by name, the module of its experts), imported on first use (about 5 s)."""
    require()
    render_backend()
    _restore_copy_into()  # before mplib is imported, which copies the table
    choose_gl_backend()  # before mujoco is imported, which ManiSkill does: another simulator may follow in this process
    import mani_skill.envs  # noqa: F401  registers the tasks
    from mani_skill.examples.motionplanning.panda import solutions
    from mani_skill.utils.registration import REGISTERED_ENVS

    for name in ("mani_skill", "mani_skill "):  # one logger's name ends in a space
        logging.getLogger(name).setLevel(logging.ERROR)  # warns that the camera on the hand is not in its own lists
    return REGISTERED_ENVS, solutions


def _restore_copy_into() -> None:
    """Let mplib 0.1.1 run with NumPy 2: it is compiled against NumPy 1 and crashes where it copies an array.

    It calls PyArray_CopyInto through slot 82 of NumPy's table of C functions, which NumPy 2 left empty; slot 50 is the
    same function in both (pybind11's numpy.h says so, where later versions changed the number).
    """
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    functions = importlib.import_module("numpy._core._multiarray_umath")._ARRAY_API
    table = ctypes.cast(pointer(functions, None), ctypes.POINTER(ctypes.c_void_p))
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0" and not table[82]:
        table[82] = table[50]


@functools.cache
def render_backend() -> str:
    """ManiSkill's render backend, "gpu" or "cpu". `UserError` without a usable Vulkan driver.

    Checked before a scene is made, which needs a driver even without images and may end the process without one.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a missing libvulkan: SAPIEN brings one
        import sapien
    sapien.render.set_log_level("off")
    try:
        sapien.render.get_device_summary()
    except RuntimeError as error:
        raise UserError(f"ManiSkill cannot run: {DRIVER}") from error
    try:
        return "gpu" if sapien.Device("cuda").can_render() else "cpu"
    except RuntimeError:
        return "cpu"


class ManiSkillEnvironment(Environment):
    """One ManiSkill task; see `base.Environment`. Build it through `make_environment`."""

    control_hz = 20.0
    robot_type = "maniskill_panda"
    views = tuple(VIEWS)
    state_names = (*(f"joint_{i}" for i in range(7)), "gripper")
    action_names = state_names
    rehearse = True

    def __init__(self, setup: Setup) -> None:
        registered, self._solutions = _modules()
        task = TASKS[setup.task]
        cameras: dict[str, Any] = {"shader_pack": "minimal", "width": setup.image_size, "height": setup.image_size}
        if task.fov is not None:
            cameras["base_camera"] = {"fov": task.fov}
        self._sim = registered[setup.task].cls(
            num_envs=1,
            obs_mode="none",
            control_mode="pd_joint_pos",
            robot_uids="panda_wristcam",
            sim_backend="physx_cpu",
            render_backend=render_backend(),
            sensor_configs=cameras,
        )
        space = self._sim.single_action_space
        super().__init__(setup, task.instruction, task.max_steps, space.low, space.high)
        assert self._sim.control_freq == self.control_hz
        self.noise_scale = np.array([task.noise] * 7 + [0.0])  # none on the gripper, which would drop things
        self._solve = getattr(self._solutions, task.expert)

    def image(self, view: str) -> np.ndarray:
        camera = self._sim._sensors[VIEWS[view]]
        self._sim.scene.update_render()
        camera.capture()
        rgb = camera.get_obs(rgb=True, depth=False, position=False, segmentation=False)["rgb"]
        return np.ascontiguousarray(rgb[0].cpu().numpy())

    def close(self) -> None:
        super().close()
        if self._sim is not None:
            self._sim.close()
            self._sim = None

    def _begin(self, start: int) -> None:
        self._sim.reset(seed=start_seed(self._setup, start))
        for marker in self._sim._hidden_objects:
            marker.show_visual()
        state = self._sim.get_state_dict()
        poses = [pose[0, :7] for name, pose in sorted(state["actors"].items()) if name != "table-workspace"]
        sizes = [self._sim.peg_half_sizes[0]] if self.task == "PegInsertionSide-v1" else []
        self._vector = np.concatenate([*poses, *sizes, self._sim.agent.robot.get_qpos()[0]])

    def _advance(self, action: np.ndarray) -> tuple[float, bool, dict[str, float]]:
        _, reward, _, _, info = self._result = self._sim.step(action.astype(np.float32))
        numbers = {k: float(v) for k, v in info.items() if np.size(v) == 1}
        return float(reward), bool(info["success"]), numbers

    def _state(self) -> np.ndarray:
        position = self._sim.agent.robot.get_qpos()[0].numpy()  # [9]: joints, two fingers (m)
        return np.append(position[:7], position[7:].mean() / FINGER_TRAVEL)

    def _rest_action(self) -> np.ndarray:
        return np.append(self._state()[:7], 1.0)

    def _expert(self) -> Generator[np.ndarray, None, None]:
        return taking_turns(lambda step: self._solve(_Puppet(self._sim, step, lambda: self._result)))


class _Puppet:
    """A motion planner's environment: it reads the real state, but its steps are executed elsewhere."""

    def __init__(self, sim: Any, step: Callable[[np.ndarray], None], result: Callable[[], tuple]) -> None:
        self.unwrapped, self._step, self._result = sim, step, result

    def reset(self, seed: int | None = None) -> None:
        """The episode has begun already."""

    def step(self, action: np.ndarray) -> tuple:
        self._step(action)
        return self._result()


class _Abandoned(BaseException):
    """Ends a solver whose episode has ended; not an Exception, which a solver might catch."""


def taking_turns(solve: Callable[[Callable[[np.ndarray], None]], Any]) -> Generator[np.ndarray, None, None]:
    """The actions that `solve(step)` passes to its blocking calls `step(action)`, one by one.

    `solve` runs in its own thread, but never at the same time as the caller: they take turns. Its output is dropped,
    its exceptions are raised here, and closing the generator ends it.
    """
    actions: queue.SimpleQueue[tuple[np.ndarray | None, BaseException | None]] = queue.SimpleQueue()
    turns: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def wait() -> None:
        if not turns.get():
            raise _Abandoned

    def step(action: np.ndarray) -> None:
        actions.put((np.array(action, np.float64), None))
        wait()

    def run() -> None:
        try:
            wait()
            solve(step)
            actions.put((None, None))
        except _Abandoned:
            pass
        except BaseException as error:
            actions.put((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            with contextlib.redirect_stdout(io.StringIO()):
                turns.put(True)
                action, error = actions.get()
            if error is not None:
                raise error
            if action is None:
                return
            yield action
    finally:
        turns.put(False)
        thread.join()


make = ManiSkillEnvironment
