"""The robosuite adapter; skipped with a reason where robosuite is missing. The first tests need no simulator."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from dvla.cache.actions.action_map import ActionMap
from dvla.cache.actions.rotations import rotate, to_quaternion
from dvla.cache.actions.slots import SLOTS
from dvla.errors import UserError
from dvla.stages.simulation.config import RecordConfig
from dvla.stages.simulation.envs import environment_names, make_environment
from dvla.stages.simulation.envs import robosuite as adapter
from dvla.stages.simulation.record import demonstrate
from dvla.stages.simulation.rollout import assert_disjoint
from support.family import family_of
from support.simulators import simulated

LIFT, TWO = "robosuite/dex_lift", "robosuite/dex_two_lift"
SIZE = 48
KIND = adapter.DexLiftEnvironment


@pytest.fixture(scope="module")
def lift():
    yield from simulated(LIFT, image_size=SIZE)


def test_missing_simulator_names_the_install_step(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'dvla\[robosuite\]'"):
        make_environment(LIFT)


def test_every_task_is_listed():
    assert set(adapter.NAMES) == {LIFT, TWO} <= set(environment_names())


def test_the_field_map_of_recordings_gives_actions_back():
    family = family_of("lerobot", [KIND.robot_type, "my_recording"])
    assert (family.name, family.embodiment) == ("robosuite", "dex_hand")
    mapping = ActionMap(family.action, KIND.control_hz)
    actions = np.linspace(-1, 1, 36).reshape(3, 12).astype(np.float32)
    unified = mapping.to_unified(actions)
    np.testing.assert_allclose(unified[:, SLOTS["eef_vel_x"]], actions[:, 0] * adapter.MOVE * 20, atol=1e-6)  # m/s
    np.testing.assert_allclose(
        unified[:, SLOTS["eef_angular_vel_yaw"]], actions[:, 5] * adapter.TURN * 20, atol=1e-6
    )  # rad/s
    assert np.nonzero(mapping.mask)[0].tolist() == [*range(39, 45), *range(103, 109)]
    np.testing.assert_allclose(mapping.to_native(unified), actions, atol=1e-6)


def test_the_field_map_of_two_hands_is_that_of_one_twice():
    one, two = (family_of("lerobot", [kind.robot_type]) for kind in (KIND, adapter.TwoHandEnvironment))
    assert (two.name, two.embodiment) == ("robosuite_two", "bimanual_dex")
    actions = np.random.default_rng(0).uniform(-1, 1, (5, 24)).astype(np.float32)
    mapping, single = ActionMap(two.action, KIND.control_hz), ActionMap(one.action, KIND.control_hz)
    unified = mapping.to_unified(actions)
    np.testing.assert_allclose(mapping.to_native(unified), actions, atol=1e-6)
    np.testing.assert_allclose(
        unified[:, [*range(39, 45), *range(103, 109)]], single.to_unified(actions[:, 12:])[:, single.mask], atol=1e-6
    )
    np.testing.assert_allclose(
        unified[:, [*range(89, 95), *range(115, 121)]], single.to_unified(actions[:, :12])[:, single.mask], atol=1e-6
    )
    assert (
        adapter.TwoHandEnvironment.action_names[12] == "right_dx"
        and ActionMap(two.state, KIND.control_hz).native_dim == 26
    )


def test_the_finger_targets_of_the_field_map_are_the_simulators(lift):
    mapping = ActionMap(family_of("lerobot", [KIND.robot_type]).action, KIND.control_hz)
    for sign, bound in ((-1, 0), (1, 1)):
        fingers = mapping.to_unified(np.full((1, 12), sign, np.float32))[0, 103:109]
        ranges = [lift._model.actuator(f"gripper0_right_{finger}_drive").ctrlrange[bound] for finger in adapter.FINGERS]
        np.testing.assert_allclose(fingers, ranges, atol=1e-6)


def test_starts_are_reproduced_and_splits_are_disjoint(lift):
    before = np.random.get_state()[1].tolist()
    vectors: dict[str, list[tuple[float, ...]]] = {}
    for split in ("train", "eval"):
        env = make_environment(LIFT, split, render=False)
        for start in range(4):
            env.reset(start)
            vectors.setdefault(split, []).append(env.start_vector)
        env.close()
    assert np.random.get_state()[1].tolist() == before  # robosuite draws from numpy's global generator
    assert_disjoint(vectors["train"], vectors["eval"])
    assert len({*vectors["train"], *vectors["eval"]}) == 8
    lift.reset(1)
    for _ in range(3):
        lift.step(lift.sample_action(np.random.default_rng(0)))
    state = lift.reset(2).state
    assert lift.start_vector == vectors["train"][2]
    lift.reset(3)
    assert lift.reset(2).state.tolist() == state.tolist()


@pytest.mark.parametrize("part", range(3))
def test_displacements_and_turns_are_along_the_axes_of_the_base(lift, part):
    lift.reset(0)
    place, facing = lift.hand()
    action = lift._rest_action()
    action[part] = 0.5
    for _ in range(10):
        result = lift.step(action)
    moved = result.observation.state[:3] - place
    assert moved[part] > 0.05 and np.abs(np.delete(moved, part)).max() < 0.4 * moved[part]
    lift.reset(0)
    action = lift._rest_action()
    action[3 + part] = 0.2
    for _ in range(5):
        lift.step(action)
    _, turned = lift.hand()
    axis = np.eye(3)[part]
    np.testing.assert_allclose(
        rotate(turned, rotate(facing * [-1, -1, -1, 1], axis)), axis, atol=0.15
    )  # the axis of the turn stays
    assert np.abs(turned @ facing) < 0.999


def test_step_contract(lift):
    lift.reset(0)
    action = lift._rest_action()
    action[9:] = 1.0, 1.0, 7.0  # index finger and thumb bend, more than allowed
    for _ in range(12):
        result = lift.step(action)
    fingers = result.observation.state[7:]
    assert result.observation.images == {} and not result.done and result.observation.state.shape == (13,)
    assert (fingers[3:] > [0.5, 0.4, 0.8]).all() and (np.abs(fingers[:3]) < 0.15).all()
    np.testing.assert_allclose(
        to_quaternion("matrix", lift._data.site(adapter.HAND.format(0)).xmat) @ result.observation.state[3:7],
        1,
        atol=1e-6,
    )
    with pytest.raises(ValueError, match="12 finite numbers"):
        lift.step(np.zeros(7))


def test_the_expert_lifts_the_cube_and_success_is_robosuites(lift):
    heights, rewards = [], []
    for start in (0, 1):
        lift.reset(start)
        for _ in range(lift.max_steps):
            result = lift.step(lift.expert_action())
            heights.append(lift._data.body(KIND.cubes[0]).xpos[2])
            rewards.append(result.reward)
            assert result.success == (heights[-1] > 0.84)
            if result.success:
                break
        assert result.success and result.reward == 1.0
    assert min(rewards) < 0.5  # the shaped reward grows as the hand comes nearer


def test_an_unstable_episode_is_lost_until_the_next_one(lift, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes MUJOCO_LOG.TXT
    lift.reset(0)
    lift._data.qvel[0] = 1e12
    result = lift.step(lift._rest_action())
    assert not result.success and result.info == {"unstable": 1.0} and np.isfinite(result.observation.state).all()
    lift.reset(0)
    assert lift.step(lift._rest_action()).info == {}


def test_demonstration_has_images_of_both_cameras(lift):
    config = RecordConfig(LIFT, 1, None, image_size=SIZE, keep_failures=True, extra_steps=0)
    limit, lift.max_steps = lift.max_steps, 3
    try:
        done = demonstrate(lift, 1, config)
    except UserError as error:  # no OpenGL library
        pytest.skip(str(error))
    finally:
        lift.max_steps = limit
    for view in ("agent", "hand"):
        image = done.images[view][0].astype(int)
        assert done.images[view].shape == (3, SIZE, SIZE, 3)
        assert (image[..., 0] - image[..., 1] > 60).sum() > 4  # the red cube
    assert done.action.shape == (3, 12) and done.state.shape == (3, 13)


@pytest.mark.slow
def test_two_hands_lift_a_cube_each():
    try:
        env = make_environment(TWO, "eval", image_size=SIZE, render=False)
        observation = env.reset(0, render=True)
    except UserError as error:
        pytest.skip(str(error))
    assert {v: p.shape for v, p in observation.images.items()} == {
        v: (SIZE, SIZE, 3) for v in ("agent", "left_hand", "right_hand")
    }
    assert observation.state.shape == (26,) and not np.allclose(
        observation.state[:13], observation.state[13:], atol=1e-4
    )
    vector = env.start_vector
    left = env._rest_action()
    left[[0, 9]] = 0.5, 1.0  # the left arm forward, its index finger bent; the right one rests
    for _ in range(5):
        moved = env.step(left).observation.state
    assert moved[0] - observation.state[0] > 0.02 and moved[10] > 0.3
    assert np.abs(moved[13:] - observation.state[13:]).max() < 0.1
    env.reset(0)
    assert env.start_vector == vector
    rewards = set()
    for _ in range(env.max_steps):
        result = env.step(env.expert_action())
        rewards.add(result.reward)
        if result.success:
            break
    assert result.success and 0.0 in rewards and result.reward == 1.0
    env.close()
