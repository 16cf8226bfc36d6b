"""DexGraspNet in Isaac Gym: conversions on tensors of the documented shapes, and the whole adapter against a stand-in
program."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from dvla.cache.actions.rotations import from_quaternion, to_quaternion
from dvla.cache.readers.search import load_config
from dvla.errors import UserError
from dvla.stages.simulation.config import RecordConfig
from dvla.stages.simulation.envs import environment_names, make_environment
from dvla.stages.simulation.envs import isaac as adapter
from dvla.stages.simulation.envs import isaac_worker as worker
from dvla.stages.simulation.record import record
from dvla.stages.simulation.rollout import assert_disjoint
from support.dex_samples import NAMES, OBJECTS, balls, write_dexgraspnet
from support.fake_isaacgym import write_isaacgym

LEAP = "isaac_dexgrasp/leap"
pytest.importorskip("scipy")  # the samples' camera matrices


def turn(axis: int, angle: float) -> np.ndarray:
    vector = np.zeros(4)
    vector[axis], vector[3] = np.sin(angle / 2), np.cos(angle / 2)
    return from_quaternion("matrix", vector).reshape(3, 3)


def grasp(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(action [28], its rotation matrix)."""
    matrix = from_quaternion("matrix", rng.normal(size=4))
    return np.concatenate([rng.uniform(-0.2, 0.2, 3), matrix, rng.uniform(-0.5, 1.5, 16)]), matrix.reshape(3, 3)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = write_dexgraspnet(tmp_path_factory.mktemp("dexgraspnet"), scenes=(0, 1, 2, 3), grasps=10)
    for scene in range(4):
        folder = root / "scenes" / f"scene_{scene:04d}" / "realsense"
        to_scene = np.linalg.inv(np.load(folder / "cam0_wrt_table.npy"))
        entries = ""
        for number in OBJECTS:
            place = to_scene[:3, :3] @ balls(number)[0][0] + to_scene[:3, 3]
            x, y, z, w = to_quaternion("matrix", to_scene[:3, :3].ravel())  # upright on the table
            entries += (
                f"<obj>\n<obj_id>{number}</obj_id>\n<obj_name>{NAMES.get(number, 'x')}</obj_name>\n"
                f"<obj_path>x</obj_path>\n<pos_in_world>{' '.join(map(str, place))}</pos_in_world>\n"
                f"<ori_in_world>{w} {x} {y} {z}</ori_in_world>\n</obj>\n"
            )
        (folder / "annotations/0000.xml").write_text(f"<scene>\n{entries}</scene>\n")
    for name in (adapter.HAND, *(adapter.OBJECT.format(n) for n in OBJECTS)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("<robot/>")
    return root


@pytest.fixture
def simulator(dataset, tmp_path, monkeypatch):
    pytest.importorskip("pyvista")
    monkeypatch.setenv("DVLA_DEXGRASPNET", str(dataset))
    monkeypatch.setenv("DVLA_ISAAC_PYTHON", sys.executable)
    monkeypatch.setenv("PYTHONPATH", str(write_isaacgym(tmp_path)))


def test_what_is_missing_is_said_with_the_install_step(monkeypatch, tmp_path):
    assert set(adapter.NAMES) <= set(environment_names())
    monkeypatch.delenv("DVLA_ISAAC_PYTHON", raising=False)
    with pytest.raises(UserError, match=r"Isaac Gym is not installed.*license.*docker/Dockerfile\.dexgrasp") as refused:
        make_environment(LEAP)
    assert "\n" not in str(refused.value)
    monkeypatch.setenv("DVLA_ISAAC_PYTHON", sys.executable)
    (tmp_path / "scenes").mkdir()
    monkeypatch.setenv("DVLA_DEXGRASPNET", str(tmp_path))
    with pytest.raises(UserError, match="missing in it: dex_grasps_new, meshdata, robot_models"):
        make_environment(LEAP)


def test_an_action_is_what_the_dataset_holds():
    config = load_config("dexgraspnet")
    assert sum({"target_translation": 3, "target_rotation": 9}.get(c, 1) for c in config.action_columns) == len(
        adapter.DexGraspEnvironment.action_names
    )
    assert config.action_columns[2:] == adapter.JOINTS


def test_way_points_hold_the_grasp_in_the_tables_frame():
    rng = np.random.default_rng(0)
    for _ in range(20):
        action, matrix = grasp(rng)
        centre = rng.uniform(-0.3, 0.3, 3)
        rows = adapter.waypoints(action, centre)
        assert rows.shape == (5, 22)
        for row in rows:  # the root's joints turn about x, then the turned y, then the turned z
            np.testing.assert_allclose(turn(0, row[3]) @ turn(1, row[4]) @ turn(2, row[5]), matrix, atol=1e-9)
        away, there, closed, pressed, up = rows
        np.testing.assert_allclose(closed[:3], action[:3] + centre)
        np.testing.assert_allclose(closed[6:], action[12:])
        np.testing.assert_allclose(away[:3] - closed[:3], 0.1 * action[:3] / np.linalg.norm(action[:3]))
        np.testing.assert_allclose(up - pressed, [0, 0, 0.2] + [0] * 19, atol=1e-12)
        sideways = [6, 10, 14, 18]  # the first joint of each finger
        np.testing.assert_allclose(there[sideways], closed[sideways])
        assert (np.delete(pressed[6:], [0, 4, 8, 12]) > np.delete(there[6:], [0, 4, 8, 12])).all()


def test_a_policys_rotation_need_not_be_exact():
    action, _ = grasp(np.random.default_rng(1))
    rough = action.copy()
    rough[3:12] *= 1.2
    np.testing.assert_allclose(adapter.waypoints(rough, np.zeros(3)), adapter.waypoints(action, np.zeros(3)), atol=1e-9)
    assert np.isfinite(adapter.waypoints(np.zeros(28), np.zeros(3))).all()


def test_root_states_tell_how_far_objects_rose():
    before = np.zeros((3, 13))
    after = before.copy()
    after[:, 2] = 0.0, 0.05, -0.1
    np.testing.assert_allclose(adapter.lifted(before, after), [0, 0.05, -0.1])
    with pytest.raises(ValueError, match=r"\[N, 13\]"):
        adapter.lifted(before[:, :7], after[:, :7])


def test_annotated_objects_stand_where_the_scene_has_them(dataset):
    for scene in (0, 3):
        poses = adapter.scene_objects(dataset, scene)
        assert set(poses) == set(OBJECTS)
        for number, pose in poses.items():
            np.testing.assert_allclose(pose, [*balls(number)[0][0], 0, 0, 0, 1], atol=1e-6)


def test_the_worker_finds_its_joints_by_name_and_goes_in_straight_lines():
    names = ["j1", "x", "y", "z", "a", "b", "c", "j0"]
    assert worker.drive_order(names, ["j0", "j1"]) == [7, 0, 1, 2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match="six of a virtual root"):
        worker.drive_order(names[1:], ["j0", "j1"])
    assert list(worker.targets([[0.0], [1.0], [3.0]], [2, 1])) == [[0.5], [1.0], [3.0]]


@pytest.mark.slow
def test_recorded_grasps_lift_their_objects_and_others_do_not(simulator):
    vectors = {}
    for split in ("train", "eval"):
        env = make_environment(LEAP, split, image_size=32, render=split == "eval")
        vectors[split] = []
        for start in range(2 if split == "train" else 1):
            observation = env.reset(start)
            vectors[split].append(env.start_vector)
            assert observation.instruction.startswith("grasp the ") and observation.state.shape == (0,)
            assert {view: image.shape for view, image in observation.images.items()} == {
                v: (32, 32, 3) for v in (env.views if split == "eval" else ())
            }
            result = env.step(env.expert_action())
            assert result.success and result.done and result.info["lifted"] == pytest.approx(0.2, abs=1e-5)
            env.reset(start, render=False)
            far = env.expert_action()
            far[:3] = 0.4, 0.4, 0.4
            result = env.step(far)
            assert not result.success and result.done and result.info["lifted"] == 0
        env.close()
        env.close()
    assert_disjoint(vectors["train"], vectors["eval"])


def test_what_goes_wrong_in_the_worker_is_said(simulator, dataset, monkeypatch):
    env = make_environment(LEAP, image_size=32, render=False)
    env.reset(0)
    monkeypatch.setattr(adapter, "HAND", "robot_models/none.urdf")
    with pytest.raises(UserError, match="could not simulate a grasp: AssertionError"):
        env.step(env.expert_action())
    env.close()
    with pytest.raises(UserError, match="grasps of split train; you requested number 9999"):
        env.reset(9999)


def test_recording_is_refused_in_one_line(simulator, tmp_path):
    pytest.importorskip("lerobot")
    with pytest.raises(UserError, match="cannot be recorded: its demonstrations are the dataset"):
        record(RecordConfig(LEAP, 1, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
