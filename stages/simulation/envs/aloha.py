"""gym-aloha's two ViperX arms at one table: hand over a cube, put a peg into a socket. Experts are written here.

gym-aloha's scenes, ranges of initial states and success criterion are kept; its environment, which renders three 480 x
640 images per step and ends after 300 steps, is not used. The cameras have a narrower field of view than its own, where
a cube of 4 cm would be a few pixels wide.

Letters: S image size in pixels. Action and state are 14 numbers: six joint angles (rad) and the gripper (0 closed, 1
open) of the left arm, then of the right one; actions are targets. x points from the left arm to the right, y away from
the front, z up; meters.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np

from .base import Environment, Setup, require_modules, start_seed
from .mujoco_render import load_mujoco, renderer, unseen_hidden, unstable

PREFIX = "aloha_sim/"
MAX_STEPS = 400  # the experts need 340 and 275
# Instruction and scene.
TASKS = {
    "insertion": ("insert the red peg into the blue socket", "bimanual_viperx_insertion.xml"),
    "transfer_cube": (
        "pick up the cube with the right arm and hand it to the left arm",
        "bimanual_viperx_transfer_cube.xml",
    ),
}
require = functools.partial(require_modules, "gym-aloha", "aloha", "gym_aloha", "mujoco")
NAMES = tuple(PREFIX + task for task in sorted(TASKS))
FIELD_OF_VIEW = 55  # degrees; gym-aloha's is 78
JOINTS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
REST = np.array([0, -0.96, 1.16, 0, -0.3, 0])  # rad, of both arms; gym-aloha's START_ARM_POSE
REST_FINGER = 0.02239  # m
FINGER_CLOSED, FINGER_OPEN = 0.01844, 0.058  # m, of 0 and 1 of the gripper
SUBSTEPS = 10  # of 2 ms in one control step
# Where objects are at first: low and high of x, y (gym_aloha.utils); z is 0.05.
PEG, SOCKET, CUBE = ((0.1, 0.2), (0.4, 0.6)), ((-0.2, -0.1), (0.4, 0.6)), ((0.0, 0.2), (0.4, 0.6))


class AlohaEnvironment(Environment):
    """One gym-aloha task; see `base.Environment`. Build it through `make_environment`."""

    control_hz = 50.0
    robot_type = "aloha_sim_viperx"
    views = ("top", "angle")
    state_names = tuple(f"{side}_{joint}" for side in ("left", "right") for joint in JOINTS)
    action_names = state_names
    noise_scale = np.tile([0.05] * 6 + [0.0], 2)  # rad
    rehearse = True

    def __init__(self, setup: Setup) -> None:
        require()
        self._mujoco = load_mujoco()
        instruction, scene = TASKS[setup.task]
        spec = importlib.util.find_spec("gym_aloha")
        assert spec is not None and spec.submodule_search_locations is not None  # a package, which is there
        folder = Path(next(iter(spec.submodule_search_locations)))
        self._scene = str(folder / "assets" / scene)
        self._model = self._mujoco.MjModel.from_xml_path(self._scene)
        self._data = self._mujoco.MjData(self._model)
        for view in self.views:
            self._model.camera(view).fovy = FIELD_OF_VIEW
        joints = self._model.actuator_ctrlrange.reshape(2, 8, 2)[:, :6]  # of each arm; then come its two fingers
        gripper = np.broadcast_to([0.0, 1.0], (2, 1, 2))
        low, high = np.concatenate([joints, gripper], axis=1).reshape(14, 2).T
        super().__init__(setup, instruction, MAX_STEPS, low, high)

    def image(self, view: str) -> np.ndarray:
        shared = renderer(self.name, self.image_size, lambda: self._mujoco.MjModel.from_xml_path(self._scene))
        with unseen_hidden(self._model, self._data, view):
            return shared.render(self._model, self._data, view).copy()

    def _begin(self, start: int) -> None:
        rng = np.random.default_rng(start_seed(self._setup, start))
        places = (CUBE,) if self.task == "transfer_cube" else (PEG, SOCKET)
        self._vector = np.concatenate([rng.uniform(*np.transpose(place)) for place in places])
        self._mujoco.mj_resetData(self._model, self._data)
        arm = [*REST, REST_FINGER, -REST_FINGER]
        poses = [[x, y, 0.05, 1, 0, 0, 0] for x, y in self._vector.reshape(-1, 2)]
        self._data.qpos[:] = np.concatenate([arm, arm, *poses])
        self._data.ctrl[:] = [*arm, *arm]
        self._mujoco.mj_forward(self._model, self._data)

    def _advance(self, action: np.ndarray) -> tuple[float, bool, dict[str, float]]:
        fingers = FINGER_CLOSED + action[[6, 13]] * (FINGER_OPEN - FINGER_CLOSED)
        arms = [[*action[7 * i : 7 * i + 6], fingers[i], -fingers[i]] for i in (0, 1)]
        self._data.ctrl[:] = np.concatenate(arms)
        for _ in range(SUBSTEPS):
            self._mujoco.mj_step(self._model, self._data)
        if unstable(self._data):  # after targets that jump from limit to limit
            return 0.0, False, {"unstable": 1.0}
        reward = float(self._reward())
        return reward, reward == 4, {}

    def _state(self) -> np.ndarray:
        arms = self._data.qpos[:16].reshape(2, 8)
        opening = (arms[:, 6:7] - FINGER_CLOSED) / (FINGER_OPEN - FINGER_CLOSED)
        return np.concatenate([arms[:, :6], opening], axis=1).ravel()

    def _rest_action(self) -> np.ndarray:
        return self._state()

    def _reward(self) -> int:
        """gym-aloha's 0 to 4 (gym_aloha.tasks.sim): 4 = handed over in the air, or the peg touches the socket's pin."""
        geom = self._model.geom
        touching = {frozenset((geom(c.geom1).name, geom(c.geom2).name)) for c in self._data.contact}

        def touch(these: tuple[str, ...], other: str) -> bool:
            return any(frozenset((this, other)) in touching for this in these)

        left, right = (f"vx300s_{side}/10_{side}_gripper_finger" for side in ("left", "right"))
        if self.task == "transfer_cube":
            in_air = not touch(("red_box",), "table")
            if touch(("red_box",), left):
                return 3 + in_air
            return 1 + in_air if touch(("red_box",), right) else 0
        sockets = tuple(f"socket-{i}" for i in range(1, 5))
        if touch(("red_peg",), "pin"):
            return 4
        in_air = not touch((*sockets, "red_peg"), "table")
        if touch(sockets, "red_peg") and in_air:
            return 3
        return 1 + in_air if touch(sockets, left) and touch(("red_peg",), right) else 0

    def _expert(self) -> Generator[np.ndarray, None, None]:
        expert = _Expert(self._data)
        return expert.transfer() if self.task == "transfer_cube" else expert.insert()


GRASP = 0.14  # m from the hand's link to where the fingers hold things
UPPER, FORE = (0.05955, 0.3), 0.3  # m: shoulder to elbow (forward, up), elbow to wrist
HAND = 0.069744 + GRASP  # m: wrist to grasp
SHOULDER_HEIGHT, BASE_X, BASE_Y = 0.12705, 0.469, 0.5  # m
# Dry friction holds a joint until its position controller's error exceeds friction / kp (rad), which is added.
FRICTION = np.array([50 / 800, 60 / 1600, 60 / 800, 30 / 10, 30 / 50, 30 / 20])


def joint_angles(side: str, xyz: np.ndarray, pitch: float, roll: float) -> np.ndarray:
    """`[6]` rad that put the fingers' grasp point of an arm at `xyz` (m), pointing `pitch` (rad) below the horizontal.

    The hand keeps the direction of the arm: forearm_roll is 0. For a point out of reach the arm is stretched toward it.
    """
    toward = 1.0 if side == "left" else -1.0
    forward, aside = toward * (xyz[0] + toward * BASE_X), toward * (xyz[1] - BASE_Y)
    wrist = np.array([np.hypot(forward, aside) - HAND * np.cos(pitch), xyz[2] - SHOULDER_HEIGHT + HAND * np.sin(pitch)])
    upper, distance = float(np.hypot(*UPPER)), float(np.hypot(*wrist))
    cosine = (upper**2 + distance**2 - FORE**2) / (2 * upper * distance)
    alpha = np.arctan2(wrist[1], wrist[0]) + np.arccos(np.clip(cosine, -1, 1))  # of the upper arm, elbow up
    elbow = upper * np.array([np.cos(alpha), np.sin(alpha)])
    down = -np.arctan2(wrist[1] - elbow[1], wrist[0] - elbow[0])  # of the forearm
    shoulder = np.arctan2(UPPER[1], UPPER[0]) - alpha
    return np.array([np.arctan2(aside, forward), shoulder, down - shoulder, 0.0, pitch - down, roll])


class _Expert:
    """Waypoints of both hands, reached by inverse kinematics and a push against friction until the joints arrive."""

    def __init__(self, data: Any) -> None:
        self._data = data
        # side -> last target of its hand: xyz [3], pitch, roll (rad), gripper opening
        self._hands: dict[str, tuple] = {side: (*self._forward(side), 0.0, 0.0) for side in ("left", "right")}
        self._push = np.zeros((2, 6))  # rad added to the targets against friction

    def _forward(self, side: str) -> tuple[np.ndarray, float]:
        """(grasp point [3], pitch) of a hand now."""
        link = self._data.body(f"vx300s_{side}/gripper_link")
        axis = link.xmat.reshape(3, 3)[:, 0]
        return link.xpos + GRASP * axis, float(np.arcsin(-axis[2]))

    def _move(
        self, steps: int, left: tuple | None = None, right: tuple | None = None
    ) -> Generator[np.ndarray, None, None]:
        """Both hands to (xyz, pitch, roll, grip) in straight lines; None = stay."""
        begin = self._hands
        end = {"left": left or begin["left"], "right": right or begin["right"]}
        for i in range(steps):
            share = min(1.0, (i + 1) / (0.8 * steps))  # the rest of the time is left for settling
            target, grips = np.zeros((2, 6)), []
            for k, side in enumerate(("left", "right")):
                a, b = begin[side], end[side]
                xyz, pitch, roll = (a[j] + share * (b[j] - a[j]) for j in range(3))
                target[k] = joint_angles(side, xyz, pitch, roll)
                grips.append(b[3])
            measured = self._data.qpos[:16].reshape(2, 8)[:, :6]
            self._push = np.clip(self._push + 0.15 * (target - measured), -FRICTION, FRICTION)
            command = target + self._push
            yield np.concatenate([command[0], grips[:1], command[1], grips[1:]])
        self._hands = end

    def _object(self, name: str) -> np.ndarray:
        return self._data.body(name).xpos.copy()

    def transfer(self) -> Generator[np.ndarray, None, None]:
        """The right hand picks the cube up and holds it out, the left hand takes it over."""
        pick, level, across = np.deg2rad(50), 0.0, np.pi / 2
        meet = np.array([0.0, 0.5, 0.28])
        away = np.array([-0.15, 0.5, 0.28])
        yield from self._move(10)
        cube = self._object("box")
        yield from self._move(60, (away, level, across, 1.0), (cube + [0, 0, 0.08], pick, 0.0, 1.0))
        yield from self._move(35, None, (cube, pick, 0.0, 1.0))
        yield from self._move(25, None, (cube, pick, 0.0, 0.0))
        yield from self._move(30, None, (cube + [0, 0, 0.1], pick, 0.0, 0.0))
        yield from self._move(60, None, (meet, pick, 0.0, 0.0))
        cube = self._object("box")
        yield from self._move(20, (cube + [-0.05, 0, 0], level, across, 1.0))
        yield from self._move(30, (cube + [-0.005, 0, 0], level, across, 1.0))
        yield from self._move(30, (cube + [-0.005, 0, 0], level, across, 0.0))
        yield from self._move(20, None, (meet, pick, 0.0, 1.0))
        yield from self._move(30, None, (meet + [0.1, 0, 0.05], pick, 0.0, 1.0))

    def insert(self) -> Generator[np.ndarray, None, None]:
        """The right hand takes the peg and the left one the socket; they meet in the air."""
        pick, align, approach = np.deg2rad(60), 2, 4
        yield from self._move(10)
        peg, socket = self._object("peg"), self._object("socket")
        # Held near their outer ends, so that the hands do not collide; fingers that press on the table do not close.
        left, right = socket + [-0.02, 0, 0], peg + [0.02, 0, 0.01]
        above = np.array([0, 0, 0.08])
        yield from self._move(60, (left + above, pick, 0.0, 1.0), (right + above, pick, 0.0, 1.0))
        yield from self._move(40, (left, pick, 0.0, 1.0), (right, pick, 0.0, 1.0))
        yield from self._move(25, (left, pick, 0.0, 0.0), (right, pick, 0.0, 0.0))
        left, right, pitch = np.array([-0.14, 0.5, 0.2]), np.array([0.14, 0.5, 0.2]), pick
        yield from self._move(70, (left, pick, 0.0, 0.0), (right, pick, 0.0, 0.0))
        # The peg droops and slips a little in its grip: measure again before each move, first aligning, then closing
        # in.
        for k in range(align + approach):
            apart = np.clip(
                self._object("socket") - self._object("peg"), -0.04, 0.04
            )  # it is larger if the peg was dropped
            right = right + [0, apart[1], apart[2]]
            pitch -= np.clip(np.arcsin(self._data.body("peg").xmat[6]), -0.1, 0.1)  # of the peg's axis out of level
            if k >= align:  # the peg touches the pin at 0.1 m
                gap = self._object("peg")[0] - self._object("socket")[0] - 0.07
                step = np.array([gap / (align + approach - k) / 2, 0, 0])
                left, right = left + step, right - step
            yield from self._move(25, (left, pick, 0.0, 0.0), (right, pitch, 0.0, 0.0))


make = AlohaEnvironment
