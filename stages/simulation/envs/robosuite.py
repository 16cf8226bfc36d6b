"""robosuite's Panda arms with dexterous hands (Inspire, five fingers): Lift with one, and a task of our own with two.

dex_lift: scene, initial states, controller, reward and success criterion are robosuite's. dex_two_lift: two such arms
side by side, each with a cube before it, both to be lifted; both hands are right hands. The experts are our own. Images
are rendered without robosuite's renderer, and only on request. The cube has one size, where robosuite samples one per
instance.

An action is 12 numbers in [-1, 1] for each hand, left before right: the hand's displacement (1 = 0.05 m) and rotation
(1 = 0.5 rad, axis-angle) relative to its current pose, in the axes of the arm's base; then targets of the six finger
drives, -1 extended, 1 bent: pinky, ring, middle, index, thumb's bend, thumb's rotation. The state is 13 numbers for
each hand: its position in the frame of the base (m), its orientation (quaternion xyzw), and the angle of the first
joint of each drive (rad). The hand's frame: fingers along -y, palm towards z, thumb at -x. Letters: K hands.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Generator
from typing import Any

import numpy as np

from ....cache.actions.rotations import conjugate, from_quaternion, multiply, rotate, to_quaternion
from ....errors import UserError
from .base import Environment, Setup, require_modules, seeded, start_seed
from .mujoco_render import HIDDEN_GROUP, load_mujoco, renderer, unseen_hidden, unstable

PREFIX = "robosuite/"
TASKS = {"dex_lift": "lift the red cube with the hand", "dex_two_lift": "lift both cubes, each with one hand"}
require = functools.partial(require_modules, "robosuite", "robosuite", "robosuite", "mujoco")
NAMES = tuple(PREFIX + task for task in sorted(TASKS))
MAX_STEPS = 160  # the experts need about 85
MOVE, TURN = 0.05, 0.5  # m and rad of the hand's command 1 (robosuite's default_panda_dex.json)
DRIVES = ("pinky", "ring", "middle", "index", "thumb_bend", "thumb_rotation")
FINGERS = (
    *("pinky_proximal", "ring_proximal", "middle_proximal", "index_proximal"),
    *("thumb_proximal_2", "thumb_proximal_1"),
)
COLLISION_GROUP = 0  # robosuite's geom group of collision shapes, which are not rendered
HAND = "gripper{}_right_grip_site"  # what the controller of an arm moves
BASE = "robot{}_base"  # its frame, aligned with the world's axes
NEUTRAL = np.array([0.0, 0.70711, 0.70711, 0.0])  # quaternion xyzw of the hand, fingers down, about as initially


@functools.cache
def _robosuite() -> Any:
    """The package, imported on first use (about 3 s)."""
    require()
    load_mujoco()
    # Its logger warns about a settings file and packages for other robots.
    logging.getLogger("robosuite_logs").addFilter(lambda record: record.levelno >= logging.ERROR)
    try:
        import robosuite
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"robosuite cannot be imported: {error}; install it again with: pip install 'dvla[robosuite]'"
        ) from error
    return robosuite


class DexLiftEnvironment(Environment):
    """robosuite's Lift with one hand; see `base.Environment`. Build it through `make_environment`."""

    control_hz = 20.0
    robot_type = "robosuite_panda_dex"
    views: tuple[str, ...] = ("agent", "hand")
    state_names: tuple[str, ...] = ("x", "y", "z", "qx", "qy", "qz", "qw", *DRIVES)
    action_names: tuple[str, ...] = ("dx", "dy", "dz", "rx", "ry", "rz", *DRIVES)
    noise_scale = np.array([0.5] * 6 + [0.0] * 6)  # none on the fingers, which would drop the cube
    cameras: tuple[str, ...] = ("agentview", "robot0_eye_in_hand")  # of `views`
    cubes: tuple[str, ...] = ("cube_main",)  # body of each hand's cube

    def __init__(self, setup: Setup) -> None:
        load_mujoco()
        with seeded(0):
            self._sim = self._make_simulator(
                has_renderer=False,
                has_offscreen_renderer=False,
                use_camera_obs=False,
                hard_reset=False,
                ignore_done=True,
                control_freq=int(self.control_hz),
            )
        super().__init__(setup, TASKS[setup.task], MAX_STEPS, *self._sim.action_spec)
        self._model, self._data = self._sim.sim.model._model, self._sim.sim.data._data
        self._model.geom_group[self._model.geom_group == COLLISION_GROUP] = HIDDEN_GROUP
        joints = [
            [self._model.joint(f"gripper{k}_right_joint_r_{finger}").qposadr[0] for finger in FINGERS]
            for k in range(len(self.cubes))
        ]
        self._fingers = np.array(joints)  # [K, 6]

    def _make_simulator(self, **settings: Any) -> Any:
        return _robosuite().make("Lift", robots="PandaDexRH", use_object_obs=False, reward_shaping=True, **settings)

    def image(self, view: str) -> np.ndarray:
        camera = self.cameras[self.views.index(view)]
        shared = renderer(self.name, self.image_size, lambda: copy.copy(self._model))
        with unseen_hidden(self._model, self._data, camera):
            return shared.render(self._model, self._data, camera).copy()

    def close(self) -> None:
        super().close()
        self._sim.close()

    def _begin(self, start: int) -> None:
        with seeded(start_seed(self._setup, start)):
            self._sim.reset()
        self._vector = self._data.qpos.copy()  # the arms' noisy angles, the fingers, the cubes' poses

    def _advance(self, action: np.ndarray) -> tuple[float, bool, dict[str, float]]:
        _, reward, _, _ = self._sim.step(action)
        if unstable(self._data):
            return 0.0, False, {"unstable": 1.0}
        return float(reward), bool(self._sim._check_success()), {}

    def hand(self, k: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """(position [3] m in the frame of its base, quaternion xyzw [4]) of a hand."""
        site = self._data.site(HAND.format(k))
        quaternion = to_quaternion("matrix", site.xmat)
        return site.xpos - self._data.body(BASE.format(k)).xpos, quaternion * (
            1.0 if quaternion @ NEUTRAL >= 0 else -1.0
        )

    def cube(self, k: int = 0) -> tuple[np.ndarray, float]:
        """(position [3] m in the base's frame, rotation of its sides about z in rad, -π/4 to π/4) of a hand's cube."""
        body = self._data.body(self.cubes[k])
        quarter = np.pi / 2
        return (
            body.xpos - self._data.body(BASE.format(k)).xpos,
            float((np.arctan2(body.xmat[3], body.xmat[0]) + quarter / 2) % quarter - quarter / 2),
        )

    def _state(self) -> np.ndarray:
        return np.concatenate(
            [part for k, fingers in enumerate(self._fingers) for part in (*self.hand(k), self._data.qpos[fingers])]
        )

    def _rest_action(self) -> np.ndarray:
        return np.tile(np.concatenate([np.zeros(6), OPEN]), len(self.cubes))

    def _expert(self) -> Generator[np.ndarray, None, None]:
        for actions in zip(*(_lift(self, k) for k in range(len(self.cubes)))):  # all take the same number of steps
            yield np.concatenate(actions)


class TwoHandEnvironment(DexLiftEnvironment):
    """Two arms with a hand each, and two cubes."""

    robot_type = "robosuite_two_panda_dex"
    views = ("agent", "left_hand", "right_hand")
    state_names = tuple(f"{side}_{name}" for side in ("left", "right") for name in DexLiftEnvironment.state_names)
    action_names = tuple(f"{side}_{name}" for side in ("left", "right") for name in DexLiftEnvironment.action_names)
    noise_scale = np.tile(DexLiftEnvironment.noise_scale, 2)
    cameras = ("agentview", "robot0_eye_in_hand", "robot1_eye_in_hand")
    cubes = ("left_cube_main", "right_cube_main")

    def _make_simulator(self, **settings: Any) -> Any:
        return _two_lift()(
            robots=["PandaDexRH", "PandaDexRH"],
            env_configuration="parallel",
            initialization_noise="default",
            **settings,
        )


@functools.cache
def _two_lift() -> type:
    """The robosuite task with two hands, defined on first use: its base classes need robosuite."""
    _robosuite()
    from robosuite.environments.manipulation.two_arm_env import TwoArmEnv
    from robosuite.models.arenas import TableArena
    from robosuite.models.objects import BoxObject
    from robosuite.models.tasks import ManipulationTask
    from robosuite.utils.placement_samplers import SequentialCompositeSampler, UniformRandomSampler

    class TwoHandLift(TwoArmEnv):
        """Cubes as in Lift, 0.3 m apart, each within 0.03 m of the point before its arm; the arms are 0.5 m apart."""

        table, sides = (0.8, 0.8, 0.05), {"left": 1, "right": -1}
        table_offset = np.array((0, 0, 0.8))

        def _load_model(self) -> None:
            super()._load_model()
            for robot, sign in zip(self.robots, self.sides.values()):
                place = np.array(robot.robot_model.base_xpos_offset["table"](self.table[0]))
                robot.robot_model.set_base_xpos(place + [0, 0.25 * sign, 0])
            arena = TableArena(table_full_size=self.table, table_offset=self.table_offset)
            arena.set_origin([0, 0, 0])
            colors = {"left": [0.1, 0.2, 0.9, 1], "right": [0.9, 0.1, 0.1, 1]}
            cubes = [BoxObject(name=f"{side}_cube", size=[0.021] * 3, rgba=colors[side]) for side in self.sides]
            self.placement_initializer = SequentialCompositeSampler(name="cubes")
            for cube, sign in zip(cubes, self.sides.values()):
                self.placement_initializer.append_sampler(
                    UniformRandomSampler(
                        name=f"{cube.name}_place",
                        mujoco_objects=cube,
                        x_range=[-0.03, 0.03],
                        y_range=[0.15 * sign - 0.03, 0.15 * sign + 0.03],
                        rotation=None,
                        ensure_object_boundary_in_range=False,
                        ensure_valid_placement=True,
                        reference_pos=self.table_offset,
                        z_offset=0.01,
                    )
                )
            self.model = ManipulationTask(arena, [robot.robot_model for robot in self.robots], cubes)

        def _reset_internal(self) -> None:
            super()._reset_internal()
            for place, quaternion, cube in self.placement_initializer.sample().values():
                self.sim.data.set_joint_qpos(cube.joints[0], np.concatenate([place, quaternion]))

        def heights(self) -> list[float]:
            """Heights of the cubes' centers above the table, m."""
            return [
                float(self.sim.data.get_body_xpos(f"{side}_cube_main")[2] - self.table_offset[2]) for side in self.sides
            ]

        def reward(self, action: Any = None) -> float:
            """Fraction of the cubes that are lifted."""
            return float(np.mean([height > 0.04 for height in self.heights()]))

        def _check_success(self) -> bool:
            return self.reward() == 1.0

    return TwoHandLift


OPEN, CLOSED = -np.ones(6), np.ones(6)  # of the finger drives
GRASP = np.array([-0.015, -0.14, 0.035])  # m, position of the cube in the hand's frame when the fingers close
TILT = 0.85  # rad of the fingers from straight down: the palm faces the cube, the tips stay off the table
GAIN = 2.0  # command per error: the controller covers about half of a displacement in one step


def _lift(env: DexLiftEnvironment, k: int) -> Generator[np.ndarray, None, None]:
    """Hand k: above its cube, down, aligned with the cube's sides, close, up.

    It reads the cube's pose once, its own at every step.
    """
    place, turn = env.cube(k)
    about_z = np.array([0, 0, np.sin(turn / 2), np.cos(turn / 2)])
    lean = np.array([np.sin(TILT / 2), 0, 0, np.cos(TILT / 2)])
    facing = multiply(multiply(about_z, NEUTRAL), lean)
    grasp = place - rotate(facing, GRASP)
    yield from _move(env, k, 25, grasp + [0, 0, 0.08], facing, OPEN, OPEN)
    yield from _move(env, k, 20, grasp, facing, OPEN, OPEN)
    yield from _move(env, k, 25, grasp, facing, OPEN, CLOSED)
    yield from _move(env, k, 40, grasp + [0, 0, 0.12], facing, CLOSED, CLOSED)


def _move(
    env: DexLiftEnvironment,
    k: int,
    steps: int,
    to: np.ndarray,
    facing: np.ndarray,
    grip: np.ndarray,
    grip_at_end: np.ndarray,
) -> Generator[np.ndarray, None, None]:
    """The hand straight to a position [3], turning to a quaternion [4]; the fingers from one command to the next."""
    begin, _ = env.hand(k)
    for i in range(steps):
        share = min(1.0, (i + 1) / (0.8 * steps))  # the rest of the time is left for settling
        place, turned = env.hand(k)
        ahead = begin + share * (to - begin) - place
        turn = from_quaternion("axis_angle", multiply(facing, conjugate(turned)))
        yield np.concatenate([GAIN * ahead / MOVE, GAIN * turn / TURN, grip + share * (grip_at_end - grip)])


def make(setup: Setup) -> DexLiftEnvironment:
    """The environment of a task."""
    return (DexLiftEnvironment if setup.task == "dex_lift" else TwoHandEnvironment)(setup)
