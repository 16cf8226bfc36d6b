"""The ManiSkill adapter; tests that need ManiSkill or its Vulkan driver are skipped with a reason without them."""

from __future__ import annotations

import ctypes.util
import importlib.util

import numpy as np
import pytest

from dvla.cache.actions.action_map import ActionMap
from dvla.cache.readers.search import load_config
from dvla.errors import UserError
from dvla.stages.simulation.config import RecordConfig
from dvla.stages.simulation.envs import environment_names, make_environment
from dvla.stages.simulation.envs import maniskill as adapter
from dvla.stages.simulation.record import demonstrate
from dvla.stages.simulation.rollout import assert_disjoint
from support.simulators import simulated

PUSH = "maniskill/PushCube-v1"
SIZE = 16


@pytest.fixture(scope="module")
def push():
    yield from simulated(PUSH, image_size=SIZE)


def test_missing_simulator_names_the_install_step(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'dvla\[maniskill\]'"):
        make_environment(PUSH)


def test_every_task_is_listed():
    proposed = {"PegInsertionSide-v1", "PickCube-v1", "StackCube-v1", "PlugCharger-v1", "PushCube-v1"}
    assert {"maniskill/" + task for task in proposed} <= set(environment_names())
    with pytest.raises(UserError, match="did you mean 'maniskill/PickCube-v1'"):
        make_environment("maniskill/PickCub-v1")


def test_a_script_and_its_caller_take_turns():
    order: list[str] = []

    def solve(step):
        for i in range(3):
            order.append(f"plan {i}")
            print("chatter")
            step(np.full(2, i))

    for i, action in enumerate(adapter.taking_turns(solve)):
        assert action.tolist() == [i, i]
        order.append(f"act {i}")
    assert order == ["plan 0", "act 0", "plan 1", "act 1", "plan 2", "act 2"]


def test_a_script_left_early_ends_and_its_errors_arrive(capsys):
    ended: list[bool] = []

    def solve(step):
        try:
            while True:
                step(np.zeros(1))
        finally:
            ended.append(True)

    turns = adapter.taking_turns(solve)
    next(turns)
    turns.close()
    assert ended == [True]

    def broken(step):
        print("chatter")
        step(np.zeros(1))
        raise RuntimeError("no plan")

    turns = adapter.taking_turns(broken)
    next(turns)
    with pytest.raises(RuntimeError, match="no plan"):
        next(turns)
    assert capsys.readouterr().out == ""


def test_the_field_map_gives_actions_back():
    family = load_config("maniskill")
    assert "maniskill_panda" in family.match and family.embodiment == "gripper_joint"
    mapping = ActionMap(family.action, adapter.ManiSkillEnvironment.control_hz)
    actions = np.linspace(-1, 1, 24).reshape(3, 8).astype(np.float32)
    unified = mapping.to_unified(actions)
    assert mapping.mask.nonzero()[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 10]
    np.testing.assert_allclose(unified[:, 10], actions[:, 7] / 2 + 0.5, atol=1e-6)  # 1 open
    np.testing.assert_allclose(mapping.to_native(unified), actions, atol=1e-6)


def test_starts_are_reproduced_and_splits_are_disjoint(push):
    vectors: dict[str, list[tuple[float, ...]]] = {}
    for split in ("train", "eval"):
        env = make_environment(PUSH, split, render=False)
        vectors[split] = []
        for start in range(4):
            env.reset(start)
            vectors[split].append(env.start_vector)
        env.step(env.sample_action(np.random.default_rng(0)))
        state = env.reset(1).state
        assert env.start_vector == vectors[split][1]
        np.testing.assert_array_equal(state[:7], np.float32(env.start_vector[-9:-2]))
        env.close()
    assert len({*vectors["train"], *vectors["eval"]}) == 8
    assert_disjoint(vectors["train"], vectors["eval"])


def test_step_contract(push):
    before = push.reset(0).state
    result = push.step(np.append(before[:7] + [0.05, 0, 0, 0, 0, 0, 0], 1.0))
    assert result.observation.step == 1 and not result.done and result.observation.images == {}
    assert 0 < result.observation.state[0] - before[0] < 0.05 and result.observation.state[7] > 0.95
    with pytest.raises(ValueError, match="8 finite numbers"):
        push.step(np.zeros(7))


def test_expert_solves_with_images_only_of_successes(push):
    config = RecordConfig(PUSH, 1, None, image_size=SIZE, extra_steps=2)
    done = demonstrate(push, 0, config)
    assert done.success and set(done.images) == {"base", "hand"} and len(done.action) < push.max_steps
    assert done.images["base"].shape == (len(done.action), SIZE, SIZE, 3)
    first, last = (done.images["base"][t].astype(int) for t in (0, -1))
    assert np.abs(first - last).max() > 50
    # Upright: the far floor (grey) above, the near table (brown: red well above blue) below.
    warmth = first[..., 0] - first[..., 2]
    assert warmth[-4:].mean() > warmth[:2].mean() + 20
    push.max_steps, limit = 3, push.max_steps
    try:
        assert demonstrate(push, 1, config).images == {} and not demonstrate(push, 1, config).success
    finally:
        push.max_steps = limit


def test_mujoco_still_draws_after_maniskill(push):
    if importlib.util.find_spec("metaworld") is None:
        pytest.skip("metaworld is not installed (pip install 'dvla[sim]')")
    env = make_environment(
        "metaworld/push-v3", image_size=SIZE
    )  # ManiSkill imports mujoco too, and knows no OpenGL library
    try:
        assert set(env.reset(0).images) == set(env.views)
    except UserError as error:
        assert not any(ctypes.util.find_library(name) for name in ("OSMesa", "EGL")), error
    finally:
        env.close()
