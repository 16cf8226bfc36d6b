"""Meta-World v3: 50 Sawyer tasks with scripted experts, seen by two cameras, rendered without a display.

Letters: S picture size in pixels. Actions are 4-d in [-1, 1]: the hand's displacement (1 = 0.01 m per step) and the
gripper's effort (-1 open, +1 closed). The state is the first four numbers of Meta-World's own observation.
"""

from __future__ import annotations

import atexit
import ctypes.util
import functools
import importlib.util
import os
import sys
import warnings
import zlib
from typing import Any

import numpy as np

from ...errors import UserError
from .base import SPLITS, Observation, Split, StepResult

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
# View name -> (Meta-World's camera, pixel order that shows it upright).
CAMERAS: dict[str, tuple[str, tuple[slice, slice]]] = {
    "corner2": ("corner2", (slice(None, None, -1), slice(None, None, -1))),
    "gripper": ("gripperPOV", (slice(None), slice(None))),
}
CORNER2_POSITION = (0.75, 0.075, 0.7)  # metres; where LeRobot's Meta-World environment and datasets have it
HIDDEN_GROUP = 5                       # MuJoCo geom group that is never drawn
MAX_RENDERERS = 4                      # GL contexts kept open in one process


def names() -> tuple[str, ...]:
    """All task names with the `metaworld/` prefix, sorted."""
    return tuple(PREFIX + task for task in sorted(TASKS))


def require() -> None:
    """`UserError` with the install step when Meta-World is missing."""
    if importlib.util.find_spec("metaworld") is None or importlib.util.find_spec("mujoco") is None:
        raise UserError("the simulator metaworld is not installed; install it with: pip install 'dvla[sim]'")


def choose_gl_backend() -> str | None:
    """Set MUJOCO_GL and PYOPENGL_PLATFORM for rendering without a display, before mujoco is first imported.

    A choice the user made stays. Off-screen Mesa is taken when libOSMesa is found, else EGL, else rendering is switched
    off (state-only use still works). Returns the backend in force, None where MuJoCo's own default applies.
    """
    if "MUJOCO_GL" not in os.environ and sys.platform.startswith("linux") and "mujoco" not in sys.modules:
        found = (name for name, library in (("osmesa", "OSMesa"), ("egl", "EGL")) if ctypes.util.find_library(library))
        os.environ["MUJOCO_GL"] = next(found, "disable")
    backend = os.environ.get("MUJOCO_GL")
    if backend in ("osmesa", "egl"):
        os.environ.setdefault("PYOPENGL_PLATFORM", backend)
    return backend


@functools.cache
def _modules() -> tuple[Any, Any, Any]:
    """(mujoco, metaworld's task classes by name, its expert classes by name), imported on first use (about 2 s)."""
    require()
    choose_gl_backend()
    try:
        import mujoco
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP
    except (ImportError, AttributeError) as error:  # PyOpenGL raises AttributeError when the chosen library is absent
        raise UserError(f"metaworld cannot be imported with MUJOCO_GL={os.environ.get('MUJOCO_GL')}: {error}; "
                        "install libosmesa6 (or libegl1) or unset MUJOCO_GL") from error
    return mujoco, ALL_V3_ENVIRONMENTS, ENV_POLICY_MAP


class MetaWorldEnvironment:
    """One Meta-World task; see `base.Environment`. Build it through `make_environment`."""

    control_hz = 80.0
    robot_type = "metaworld_sawyer"
    views = tuple(CAMERAS)
    state_names = ("x", "y", "z", "gripper")
    action_names = ("dx", "dy", "dz", "gripper")

    def __init__(self, name: str, split: Split, seed: int, image_size: int, render: bool,
                 max_steps: int | None) -> None:
        self._mujoco, tasks, self._experts = _modules()
        self.name, self.split, self.seed, self.image_size, self.render = name, split, seed, image_size, render
        self.task = name.removeprefix(PREFIX)
        self.instruction, limit = TASKS[self.task]
        self.max_steps = max_steps or limit
        self._sim = tasks[self.task]()
        # Experts read the goal, which Meta-World hides by default; the cached space holds the hidden goal's bounds.
        self._sim._partially_observable = False
        self._sim.__dict__.pop("sawyer_observation_space", None)
        self._sim._set_task_called = True
        self._sim.max_path_length = sys.maxsize  # the step limit is ours; the simulator would raise at its own
        self._sim._get_state_rand_vec = self._random_vector
        self._model, self._data = self._sim.model, self._sim.data
        self._model.camera("corner2").pos = CORNER2_POSITION
        self._groups = self._model.geom_group.copy()
        self._rng = np.random.default_rng(0)
        self._fixed: np.ndarray | None = None
        self._vector = np.zeros(0)
        self.start, self.steps = -1, 0

    @property
    def start_vector(self) -> tuple[float, ...]:
        return tuple(float(v) for v in self._vector)

    def reset(self, start: int, render: bool | None = None) -> Observation:
        if start < 0:
            raise ValueError(f"start must be 0 or more, got {start}")
        # Meta-World draws object and goal places itself and rejects some, so let it draw from our generator until it is
        # content, then reset with that vector held: its first pass still moves bodies of the previous episode.
        key = [zlib.crc32(self.task.encode()), SPLITS.index(self.split), self.seed, start]
        self._rng, self._fixed = np.random.default_rng(key), None
        self._sim.reset_model()
        self._fixed = self._vector
        self._sim.reset()
        self._mujoco.mj_forward(self._model, self._data)  # the simulator's own observation may lag by one update
        self._sim._prev_obs = self._sim._get_curr_obs_combined_no_goal()
        self._obs = self._sim._get_obs()
        self._expert = self._experts[self.task]()
        self.start, self.steps = start, 0
        return self._observe(render)

    def step(self, action: np.ndarray, render: bool | None = None) -> StepResult:
        action = np.asarray(action, np.float64)
        if action.shape != (4,) or not np.isfinite(action).all():
            raise ValueError(f"{self.name}: an action is 4 finite numbers, got {action}")
        self._obs, reward, _, _, info = self._sim.step(np.clip(action, -1.0, 1.0))
        self.steps += 1
        success = bool(info["success"])
        return StepResult(self._observe(render), float(reward), success, success or self.steps >= self.max_steps,
                          {k: float(v) for k, v in info.items()})

    def picture(self, view: str) -> np.ndarray:
        camera, upright = CAMERAS[view]
        self._hide_unseen(camera)
        picture = _renderer(self.task, self.image_size).render(self._model, self._data, camera)
        self._model.geom_group[:] = self._groups
        return np.ascontiguousarray(picture[upright])

    def expert_action(self) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the experts overshoot [-1, 1] on purpose and warn about it
            action = self._expert.get_action(self._obs)
        return np.clip(action, -1.0, 1.0).astype(np.float32)

    def sample_action(self, rng: np.random.Generator) -> np.ndarray:
        return rng.uniform(-1.0, 1.0, 4).astype(np.float32)

    def close(self) -> None:
        self._sim.close()

    def _observe(self, render: bool | None) -> Observation:
        wanted = self.render if render is None else render
        images = {view: self.picture(view) for view in self.views} if wanted else {}
        return Observation(images, self.instruction, self._obs[:4].astype(np.float32), self.start, self.steps)

    def _random_vector(self) -> np.ndarray:
        """Stands in for Meta-World's own draw. A vector belongs to one split by its checksum, so splits cannot meet."""
        if self._fixed is not None:
            return self._fixed.copy()
        space = self._sim._random_reset_space
        for _ in range(1000):
            vector = self._rng.uniform(space.low, space.high)
            if zlib.crc32(vector.tobytes()) % len(SPLITS) == SPLITS.index(self.split):
                self._vector = vector
                self._sim._last_rand_vec = vector.copy()
                return vector.copy()
        raise RuntimeError(f"{self.name} has no start in split {self.split}")

    def _hide_unseen(self, camera: str) -> None:
        """Move geoms whose bounding sphere lies outside the camera's field of view to a hidden group.

        The picture stays the same; MuJoCo would still push their vertices (67 000 faces of robot) through a software
        renderer, which takes most of the time for the camera in the hand.
        """
        index = self._model.camera(camera).id
        xyz = (self._data.geom_xpos - self._data.cam_xpos[index]) @ self._data.cam_xmat[index].reshape(3, 3)
        half, depth, radius = np.deg2rad(self._model.cam_fovy[index]) / 2, -xyz[:, 2], self._model.geom_rbound
        seen = depth >= -radius
        for axis in (0, 1):  # signed distance to the field's side planes
            seen &= np.abs(xyz[:, axis]) * np.cos(half) - depth * np.sin(half) <= radius
        seen |= radius == 0  # planes have no bound
        self._model.geom_group[:] = np.where(seen, self._groups, HIDDEN_GROUP)


class _Renderer:
    """One GL context and scene; draws any instance of the task it was made for (they share meshes and textures)."""

    def __init__(self, task: str, size: int) -> None:
        self._mujoco, tasks, _ = _modules()
        if not hasattr(self._mujoco, "GLContext"):
            raise UserError("no headless OpenGL library was found for pictures; install libosmesa6 or libegl1")
        model = tasks[task]().model
        # Shadows, reflections and multisampling take five sixths of the time of a software renderer.
        model.vis.quality.shadowsize = model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        try:
            self._gl = self._mujoco.GLContext(size, size)
            self._gl.make_current()
            self._context = self._mujoco.MjrContext(model, self._mujoco.mjtFontScale.mjFONTSCALE_150)
        except Exception as error:  # whatever the GL binding in use raises
            raise UserError(f"cannot render with MUJOCO_GL={os.environ.get('MUJOCO_GL')}: {error}; "
                            "install libosmesa6 or libegl1, or set MUJOCO_GL to osmesa, egl or glfw") from error
        self._mujoco.mjr_setBuffer(self._mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = self._mujoco.MjvScene(model, 1000)
        for flag in (self._mujoco.mjtRndFlag.mjRND_SHADOW, self._mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._scene.flags[flag] = 0
        self._options, self._perturb = self._mujoco.MjvOption(), self._mujoco.MjvPerturb()
        self._options.geomgroup[HIDDEN_GROUP] = 0
        self._camera = self._mujoco.MjvCamera()
        self._camera.type = self._mujoco.mjtCamera.mjCAMERA_FIXED
        self._view = self._mujoco.MjrRect(0, 0, size, size)
        self._pixels = np.empty((size, size, 3), np.uint8)

    def render(self, model: Any, data: Any, camera: str) -> np.ndarray:
        """uint8 `[S, S, 3]`, top row first; a view of a reused buffer."""
        self._gl.make_current()
        self._camera.fixedcamid = model.camera(camera).id
        self._mujoco.mjv_updateScene(model, data, self._options, self._perturb, self._camera,
                                     self._mujoco.mjtCatBit.mjCAT_ALL, self._scene)
        self._mujoco.mjr_render(self._view, self._scene, self._context)
        self._mujoco.mjr_readPixels(self._pixels, None, self._view, self._context)
        return self._pixels[::-1]

    def close(self) -> None:
        """Free the GL objects; left to the garbage collector, they would be freed in whatever context is current."""
        self._gl.make_current()
        self._context.free()
        self._gl.free()


_renderers: dict[tuple[str, int], _Renderer] = {}   # the most recently used last


def _renderer(task: str, size: int) -> _Renderer:
    """Environments of one task and size in a process share a renderer: a GL context costs half a second and 50 MB."""
    found = _renderers.pop((task, size), None)
    if found is None:
        while len(_renderers) >= MAX_RENDERERS:
            _renderers.pop(next(iter(_renderers))).close()
        found = _Renderer(task, size)
        if not _renderers:
            atexit.register(_close_renderers)   # after the first context: MuJoCo's shutdown of EGL, set up with it, runs later
    _renderers[task, size] = found
    return found


def _close_renderers() -> None:
    """At exit: GL contexts cannot be freed any more once the display is shut down or modules are taken apart."""
    while _renderers:
        _renderers.popitem()[1].close()
