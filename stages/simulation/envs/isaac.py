"""DexGraspNet 2.0 in Isaac Gym: a floating LEAP hand grasps one object of a cluttered scene, one action an episode.

Isaac Gym Preview 4 needs Python 3.8 and an NVIDIA GPU, so it runs as a separate program (isaac_worker.py), in the image
of docker/Dockerfile.dexgrasp; it was never run here. `waypoints`, `object_pose` and `lifted` are pure functions and
tested.

Scenes, images and the expert (the recorded grasp) are those of the dataset, read by cache/readers/dexgraspnet from the
folder in DVLA_DEXGRASPNET, which also needs meshdata/ and robot_models/ of the project. An action is that of
configs/datasets/dexgraspnet.yaml, 28 numbers: position (m), rotation matrix (rows) in the target frame, 16 joints (rad,
LEAP's motor order). The hand approaches from 0.1 m further out with open fingers, closes, presses and lifts by 0.2 m;
success is DexGraspNet's: the target 0.03 m up. Differences from its own evaluation: fingers open and press by a fixed
angle, and gravity is always on.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ....cache.actions.rotations import conjugate, from_quaternion, matrix_from_rot6d, to_quaternion
from ....cache.readers.dexgraspnet.scene import load_matrix
from ....cache.readers.dexgraspnet.source import GRASPS_PER_OBJECT, DexGraspNetSource
from ....common.packages import require_package
from ....errors import UserError
from .base import SPLITS, Environment, Setup

PREFIX = "isaac_dexgrasp/"
TASKS = ("leap",)
NAMES = tuple(PREFIX + task for task in TASKS)
JOINTS = tuple(f"j{i}" for i in range(16))
FLEXION = np.array([i for i in range(16) if i % 4])  # joints that bend a finger; its first one moves it sideways
OPEN_BY, PRESS_BY = -0.25, 0.2  # rad
AWAY, UP, LIFTED = 0.1, 0.2, 0.03  # m
STEPS = (30, 20, 20, 60)  # of 1/60 s: approach, close, press, lift
HAND, OBJECT = "robot_models/urdf/leap_hand_simplified_free.urdf", "meshdata/{:03d}/nontextured_simplified.urdf"
IMAGE = "docker build -f docker/Dockerfile.dexgrasp -t dvla:dexgrasp . (docs/simulators.md)"
_POSED = re.compile(
    r"<obj_id>\s*(\d+)\s*</obj_id>.*?<pos_in_world>([^<]*)</pos_in_world>\s*<ori_in_world>([^<]*)</ori_in_world>", re.S
)


def require() -> None:
    """`UserError` with the install step when Isaac Gym or the dataset is missing."""
    if not os.access(os.environ.get("DVLA_ISAAC_PYTHON", ""), os.X_OK):
        raise UserError(
            "the simulator Isaac Gym is not installed: DVLA_ISAAC_PYTHON names no Python 3.8 that has it; download "
            f"Preview 4 from NVIDIA, accepting its license, then: {IMAGE}"
        )
    root = os.environ.get("DVLA_DEXGRASPNET", "")
    missing = [
        name for name in ("dex_grasps_new", "scenes", "meshdata", "robot_models") if not (Path(root) / name).is_dir()
    ]
    if not root or missing:
        raise UserError(
            f"DVLA_DEXGRASPNET={root or '(not set)'} must name a folder of DexGraspNet 2.0; missing in it: "
            f"{', '.join(missing)}"
        )
    require_package("pyvista", "rendering DexGraspNet's scenes", "render")


def waypoints(action: np.ndarray, center: np.ndarray) -> np.ndarray:
    """A grasp [28] in the target frame, with origin `center` [3] m in the table's → waypoints [5, 22] in the table's.

    Columns: position (m), intrinsic x-y-z angles of the root's three joints (rad), 16 finger joints (rad). Rows: away
    from the object with open fingers, at it with open fingers, closed, pressed, lifted.
    """
    action = np.asarray(action, np.float64)
    place, joints = action[:3], action[12:28]
    matrix = matrix_from_rot6d(action[3:12].reshape(3, 3)[:, :2].T.ravel())  # a policy's may not be orthonormal
    # R = Rx·Ry·Rz is the inverse of Rz(-c)·Ry(-b)·Rx(-a), whose angles are what "euler_xyz" means.
    angles = -from_quaternion("euler_xyz", conjugate(to_quaternion("matrix", matrix.ravel())))
    out = place / max(float(np.linalg.norm(place)), 1e-6)  # the object's center is the target frame's origin
    bend = np.isin(np.arange(16), FLEXION)
    opened, pressed = joints + OPEN_BY * bend, joints + PRESS_BY * bend
    here = place + center
    rows = [(here + AWAY * out, opened), (here, opened), (here, joints), (here, pressed), (here + [0, 0, UP], pressed)]
    return np.stack([np.concatenate([at, angles, fingers]) for at, fingers in rows])


def object_pose(place: Sequence[float], quaternion_wxyz: Sequence[float], to_table: np.ndarray) -> np.ndarray:
    """An annotation's pose in its camera's frame → [7] m and quaternion xyzw in the table's; `to_table` [4, 4]."""
    w, x, y, z = quaternion_wxyz
    turned = to_table[:3, :3] @ from_quaternion("matrix", np.array([x, y, z, w])).reshape(3, 3)
    return np.concatenate(
        [to_table[:3, :3] @ np.asarray(place) + to_table[:3, 3], to_quaternion("matrix", turned.ravel())]
    )


def lifted(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """How far objects rose, [N] m, from root states [N, 13] (position 3, quaternion xyzw 4, velocities 6)."""
    before, after = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if before.ndim != 2 or before.shape != after.shape or before.shape[1] != 13:
        raise ValueError(f"root states are [N, 13], got {before.shape} and {after.shape}")
    return after[:, 2] - before[:, 2]


class DexGraspEnvironment(Environment):
    """DexGraspNet's grasping; see `base.Environment`. Build it through `make_environment`."""

    control_hz = 1.0
    robot_type = "dexgraspnet_leap"
    views = ("front", "side", "top", "wrist")
    state_names = ()
    action_names = ("x", "y", "z", *(f"r{i}{j}" for i in range(3) for j in range(3)), *JOINTS)
    unrecordable = "its demonstrations are the dataset DexGraspNet 2.0 itself: build a cache from that"

    def __init__(self, setup: Setup) -> None:
        require()
        self._root = Path(os.environ["DVLA_DEXGRASPNET"])
        self._source = DexGraspNetSource(str(self._root))
        low = np.concatenate([[-0.5] * 3, [-1.0] * 9, [-np.pi] * 16])
        super().__init__(setup, self._source.config.instruction, 1, low, -low)
        ours = SPLITS.index(setup.split)
        episodes = [e for e in self._source.episode_ids if split_of(_scene(e)) == ours]
        if not episodes:
            raise UserError(f"{self._root} has no scene of split {setup.split}; more than one scene is needed")
        self._episodes = np.random.default_rng([setup.seed, ours]).permutation(episodes)
        self._worker: subprocess.Popen[str] | None = None

    @property
    def start_vector(self) -> tuple[float, ...]:
        return float(_scene(self._id)), float(self._object())

    def image(self, view: str) -> np.ndarray:
        chosen = next(v for v in self._episode.views if v.name == view)
        frame = Image.fromarray(next(chosen.frames()))
        return np.asarray(frame.resize((self.image_size, self.image_size), Image.Resampling.BOX))

    def close(self) -> None:
        super().close()
        if self._worker is not None:
            assert self._worker.stdin is not None
            self._worker.stdin.close()
            self._worker.wait()
            self._worker = None

    def _object(self) -> int:
        return self._id // GRASPS_PER_OBJECT % 1000

    def _begin(self, start: int) -> None:
        if start >= len(self._episodes):
            raise UserError(
                f"{self._root} has {len(self._episodes)} grasps of split {self.split}; you requested number {start}"
            )
        self._id = int(self._episodes[start])
        self._episode = self._source.load(self._id)
        self.instruction = self._episode.instruction

    def _advance(self, action: np.ndarray) -> tuple[float, bool, dict[str, float]]:
        objects = scene_objects(self._root, _scene(self._id))
        request = {
            "hand": str(self._root / HAND),
            "joints": JOINTS,
            "steps": STEPS,
            "waypoints": waypoints(action, self._source.center_of(self._id)).tolist(),
            "objects": [
                {"urdf": str(self._root / OBJECT.format(n)), "pose": pose.tolist()} for n, pose in objects.items()
            ],
        }
        answer = self._ask(request)
        risen = dict(zip(objects, lifted(answer["before"], answer["after"])))
        own = float(risen[self._object()])
        return float(own > LIFTED), own > LIFTED, {"lifted": own, "any_lifted": float(max(risen.values()) > LIFTED)}

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._worker is None:
            self._worker = subprocess.Popen(
                [os.environ["DVLA_ISAAC_PYTHON"], str(Path(__file__).with_name("isaac_worker.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._worker.stdin is not None and self._worker.stdout is not None  # pipes
        try:
            self._worker.stdin.write(json.dumps(request) + "\n")
            self._worker.stdin.flush()
            line = self._worker.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line else {"error": "it ended before it answered; its messages are above"}
        if "error" in answer:
            raise UserError(f"Isaac Gym could not simulate a grasp: {answer['error']}")
        return answer

    def _state(self) -> np.ndarray:
        return np.zeros(0)

    def _rest_action(self) -> np.ndarray:
        return self._episode.action[0]

    def _expert(self) -> Generator[np.ndarray, None, None]:
        yield self._episode.action[0]


def split_of(scene: int) -> int:
    """Index in SPLITS of a scene, by a checksum of its number."""
    return int(np.random.SeedSequence(scene).generate_state(1)[0]) % len(SPLITS)


def _scene(episode_id: int) -> int:
    return episode_id // GRASPS_PER_OBJECT // 1000


def scene_objects(root: Path, scene: int) -> dict[int, np.ndarray]:
    """Object number → pose [7] in the table's frame, from the scene's first annotation. `UserError` without one."""
    folder = root / "scenes" / f"scene_{scene:04d}" / "realsense"
    for path in sorted((folder / "annotations").glob("*.xml")):
        found = _POSED.findall(path.read_text(errors="replace"))
        if found and path.stem.isdecimal():
            camera = load_matrix(folder / "camera_poses.npy", several=True)[int(path.stem)]
            to_table = load_matrix(folder / "cam0_wrt_table.npy") @ camera
            return {
                int(n): object_pose([float(v) for v in p.split()], [float(v) for v in q.split()], to_table)
                for n, p, q in found
            }
    raise UserError(
        f"{folder} has no annotation with pos_in_world and ori_in_world of its objects; unpack scenes.tar.gz again"
    )


make = DexGraspEnvironment
