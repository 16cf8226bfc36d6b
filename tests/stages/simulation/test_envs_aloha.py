"""The gym-aloha adapter; skipped with a reason where gym-aloha is missing. The first tests need no simulator."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest

from dvla.cache.actions.action_map import ActionMap
from dvla.errors import UserError
from dvla.stages.simulation.config import RecordConfig
from dvla.stages.simulation.envs import aloha as adapter
from dvla.stages.simulation.envs import environment_names, make_environment
from dvla.stages.simulation.record import demonstrate
from dvla.stages.simulation.rollout import assert_disjoint
from support.family import family_of
from support.simulators import simulated

TASKS = ("insertion", "transfer_cube")
SIZE = 48


@pytest.fixture(scope="module", params=TASKS)
def task(request):
    yield from simulated("aloha_sim/" + request.param, image_size=SIZE)


@pytest.fixture(scope="module")
def simulator():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MUJOCO_GL", "disable")  # else dm_control, imported here, shuts our OpenGL display down at exit
        return pytest.importorskip(
            "gym_aloha.tasks.sim", reason="gym-aloha is not installed (pip install 'dvla[aloha]')"
        )


def test_missing_simulator_names_the_install_step(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'dvla\[aloha\]'"):
        make_environment("aloha_sim/insertion")


def test_every_task_is_listed():
    assert {"aloha_sim/" + task for task in TASKS} == set(adapter.NAMES) <= set(environment_names())


def test_the_field_map_of_recordings_gives_actions_back():
    family = family_of("lerobot", [adapter.AlohaEnvironment.robot_type, "my_recording"])
    assert (family.name, family.embodiment) == ("aloha", "bimanual")
    mapping = ActionMap(family.action, adapter.AlohaEnvironment.control_hz)
    actions = np.linspace(0, 1, 42).reshape(3, 14).astype(np.float32)
    unified = mapping.to_unified(actions)
    assert adapter.AlohaEnvironment.action_names[13] == "right_gripper"
    np.testing.assert_allclose(unified[:, [60, 10]], actions[:, [6, 13]], atol=1e-6)  # left, right: 1 open
    np.testing.assert_allclose(mapping.to_native(unified), actions, atol=1e-6)


def test_starts_are_reproduced_and_splits_are_disjoint(task):
    vectors: dict[str, list[tuple[float, ...]]] = {}
    for split in ("train", "eval"):
        env = make_environment(task.name, split, render=False)
        for start in range(6):
            env.reset(start)
            vectors.setdefault(split, []).append(env.start_vector)
            for name, place in zip(
                ("box",) if env.task == "transfer_cube" else ("peg", "socket"),
                np.reshape(env.start_vector, (-1, 2)),
                strict=True,
            ):
                np.testing.assert_array_equal(env._data.body(name).xpos, [*place, 0.05])
        env.step(env.sample_action(np.random.default_rng(0)))
        assert env.reset(2).state.tolist() == env.reset(3).state.tolist()  # the arms rest
        env.close()
    assert_disjoint(vectors["train"], vectors["eval"])
    assert len({*vectors["train"], *vectors["eval"]}) == 12
    task.reset(4)
    assert task.start_vector == vectors["train"][4]


def test_step_contract(task):
    before = task.reset(0).state
    action = before.copy()
    action[[0, 6, 13]] = before[0] + 0.2, 1.0, 7.0  # left waist; both grippers open, one asked beyond its limit
    for _ in range(30):
        result = task.step(action)
    after = result.observation.state
    assert result.observation.step == 30 and not result.done and result.observation.images == {}
    assert 0.1 < after[0] - before[0] < 0.2 and abs(after[7] - before[7]) < 0.02
    np.testing.assert_allclose(after[[6, 13]], 1.0, atol=0.1)
    with pytest.raises(ValueError, match="14 finite numbers"):
        task.step(np.zeros(7))


def test_inverse_kinematics_reach_what_they_are_asked_for(task):
    task.reset(0)
    hands, rng = adapter._Expert(task._data), np.random.default_rng(0)
    for side, sign in (("left", -1), ("right", 1)):
        for _ in range(20):
            xyz = np.array([sign * rng.uniform(0.0, 0.2), rng.uniform(0.4, 0.6), rng.uniform(0.02, 0.3)])
            pitch = rng.uniform(0.0, 1.2)
            joints = task._data.qpos[:16].reshape(2, 8)[int(side == "right")]
            joints[:6] = adapter.joint_angles(side, xyz, pitch, rng.uniform(-1, 1))
            task._mujoco.mj_forward(task._model, task._data)
            reached, level = hands._forward(side)
            np.testing.assert_allclose(reached, xyz, atol=2e-3)
            assert level == pytest.approx(pitch, abs=0.01)


def test_expert_solves_and_state_and_reward_are_gym_alohas(task, simulator):
    kind = simulator.TransferCubeTask if task.task == "transfer_cube" else simulator.InsertionTask
    name = task._mujoco.mj_id2name
    physics = SimpleNamespace(
        data=task._data,
        model=SimpleNamespace(id2name=lambda index, _: name(task._model, task._mujoco.mjtObj.mjOBJ_GEOM, index)),
    )
    theirs, rewards = kind(), []
    task.reset(0)
    for _ in range(task.max_steps):
        result = task.step(task.expert_action())
        assert result.reward == theirs.get_reward(physics)
        rewards.append(result.reward)
        if result.success:
            break
    assert result.success and {0.0, 2.0, 4.0} <= set(rewards)
    np.testing.assert_allclose(task._state(), theirs.get_qpos(physics), atol=1e-9)


def test_an_unstable_episode_is_lost_until_the_next_one(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes MUJOCO_LOG.TXT
    monkeypatch.setattr(task, "_reward", lambda: 4)
    task.reset(0)
    task._data.qvel[0] = 1e12
    for _ in range(2):
        result = task.step(task.expert_action())
        assert not result.success and result.reward == 0 and result.info == {"unstable": 1.0}
        assert np.isfinite(result.observation.state).all()
    task.reset(0)
    assert task.step(task.expert_action()).success


def test_demonstration_has_images_of_both_cameras(task):
    config = RecordConfig(task.name, 1, None, image_size=SIZE, max_steps=3, keep_failures=True)
    limit, task.max_steps = task.max_steps, 3
    try:
        done = demonstrate(task, 1, config)
        rehearsed = demonstrate(task, 1, RecordConfig(task.name, 1, None, image_size=SIZE))
    except UserError as error:  # no OpenGL library
        pytest.skip(str(error))
    finally:
        task.max_steps = limit
    assert not done.success and not rehearsed.success and rehearsed.images == {}
    for view in ("top", "angle"):
        image = done.images[view][0].astype(int)
        assert done.images[view].shape == (3, SIZE, SIZE, 3)
        row, column = (where.mean() for where in np.nonzero(image[..., 0] - image[..., 1] > 60))  # the cube or peg
        # Upright: the right hand's object lies right of the middle, and the dark wall is above the table.
        assert column > SIZE / 2 and row > SIZE / 3
        assert image[:4].mean() < image[SIZE // 2 :].mean()
