"""The RLBench adapter: conversions on recorded structures, and the rest against a stand-in with RLBench's documented
calls."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
from PIL import Image

from dvla.cache.actions.action_map import ActionMap
from dvla.cache.readers import open_source
from dvla.cache.readers.search import load_config
from dvla.errors import UserError
from dvla.stages.simulation.config import RecordConfig
from dvla.stages.simulation.envs import environment_names, make_environment
from dvla.stages.simulation.envs import rlbench as adapter
from dvla.stages.simulation.record import demonstrate
from dvla.stages.simulation.rollout import ExpertPolicy, RandomPolicy, RolloutConfig, rollout
from support.family import family_of
from support.rlbench_samples import CAMERAS, LENGTH, observations, picture, write_tree

JAR = "rlbench/close_jar"


def seen(length: int, seed: int = 0) -> list:
    """Recorded observations with the images that a live one has."""
    found = observations(length, seed)
    for t, one in enumerate(found):
        for number, camera in enumerate(CAMERAS):
            setattr(one, f"{camera}_rgb", picture(seed, t, number))
        one.task_low_dim_state = np.arange(3.0) + seed
    return found


def module(monkeypatch, name: str, **content) -> None:
    made = types.ModuleType(name)
    made.__dict__.update(content)
    monkeypatch.setitem(sys.modules, name, made)


class Refused(Exception):
    """Stands for rlbench.backend.exceptions.InvalidActionError."""


class Failed(Exception):
    """Stands for rlbench.backend.exceptions.DemoError."""


class Mode:
    """Stands for an arm's action mode; `reach` is how far in m a pose may be away."""

    def __init__(self, reach: float) -> None:
        self.reach = reach


class Task:
    """Stands for rlbench.task_environment.TaskEnvironment: the hand goes where it is told; success is at z > 1.2."""

    def __init__(self, mode) -> None:
        self.mode, self._scene, self.demo_fails, self.steps = mode, self, False, []

    def sample_variation(self):
        self.variation = int(np.random.randint(0, 20))
        return self.variation

    def reset(self):
        self.now = seen(1, seed=int(np.random.randint(0, 1000)))[0]
        self.now.gripper_pose[:3] = 0.3, 0.0, 1.0
        return [f"close jar {self.variation}", "screw it shut"], self.now

    def get_observation(self):
        return self.now

    def step(self, action):
        if np.linalg.norm(action[:3] - self.now.gripper_pose[:3]) > self.mode.arm_action_mode.reach:
            raise Refused
        self.steps.append((self.mode.arm_action_mode.reach, action))
        self.now = seen(1)[0]
        self.now.gripper_pose, self.now.gripper_open = action[:7], action[7]
        return self.now, float(action[2] > 1.2), False

    def get_demo(self):
        if self.demo_fails:
            raise Failed
        demo = seen(6, seed=3)
        demo[0] = self.now
        self.now = demo[-1]
        return demo


@pytest.fixture
def simulator(monkeypatch, tmp_path):
    """A stand-in for the packages, CoppeliaSim and the display."""

    class Simulator:
        open = False

        def __init__(self, mode, obs_config, headless):
            assert (
                headless
                and obs_config.wrist_camera.image_size in ((16, 16), (128, 128))
                and not obs_config.wrist_camera.depth
            )
            self.mode, self.running = mode, False

        def launch(self):
            assert not Simulator.open, "PyRep allows one"
            self.running = Simulator.open = True

        def get_task(self, kind):
            assert self.running and kind.__name__ == "CloseJar"
            return Task(self.mode)

        def shutdown(self):
            self.running = Simulator.open = False

    class Camera:
        def set_all(self, value):
            self.rgb = self.depth = self.mask = value

    def config(**asked):
        assert asked == {"task_low_dim_state": True}
        return types.SimpleNamespace(**{f"{camera}_camera": Camera() for camera in CAMERAS})

    exceptions = {name: type(name, (Exception,), {}) for name in ("NoWaypointsError", "WaypointError")}
    for name in ("rlbench", "rlbench.backend", "rlbench.action_modes", "rlbench.tasks", "pyrep"):
        module(monkeypatch, name, __path__=[], __spec__=object())
    module(monkeypatch, "pyrep.errors", ConfigurationPathError=KeyError, IKError=IndexError)
    module(
        monkeypatch,
        "rlbench.action_modes.action_mode",
        MoveArmThenGripper=lambda arm, gripper: types.SimpleNamespace(arm_action_mode=arm),
    )
    module(
        monkeypatch,
        "rlbench.action_modes.arm_action_modes",
        EndEffectorPoseViaIK=lambda: Mode(0.1),
        EndEffectorPoseViaPlanning=lambda: Mode(1.0),
    )
    module(monkeypatch, "rlbench.action_modes.gripper_action_modes", Discrete=object)
    module(monkeypatch, "rlbench.backend.exceptions", DemoError=Failed, InvalidActionError=Refused, **exceptions)
    module(monkeypatch, "rlbench.environment", Environment=Simulator)
    module(monkeypatch, "rlbench.observation_config", ObservationConfig=config)
    module(monkeypatch, "rlbench.tasks.close_jar", CloseJar=type("CloseJar", (), {}))
    monkeypatch.setenv("COPPELIASIM_ROOT", str(tmp_path))
    monkeypatch.setenv("DISPLAY", ":99")


def test_what_is_missing_is_said_with_the_install_step(monkeypatch):
    assert set(adapter.NAMES) <= set(environment_names())
    monkeypatch.delenv("COPPELIASIM_ROOT", raising=False)
    monkeypatch.delenv("DISPLAY", raising=False)
    with pytest.raises(
        UserError, match=r"rlbench and pyrep.*CoppeliaSim 4\.1.*DISPLAY.*docker/Dockerfile\.rlbench"
    ) as refused:
        make_environment(JAR)
    assert "\n" not in str(refused.value)


def test_observations_and_actions_are_those_that_recorded_data_gives(tmp_path):
    """The same demonstration, as files through the reader and as RLBench's objects through the adapter."""
    episode = open_source(write_tree(tmp_path / "rlbench", 1) / "close_jar").load(0)
    demo = observations(LENGTH, seed=0)
    for t, one in enumerate(demo):
        for number, camera in enumerate(CAMERAS):
            setattr(one, f"{camera}_rgb", picture(0, t, number))
    for t, one in enumerate(demo):
        images, state = adapter.to_observation(one)
        np.testing.assert_allclose(state, episode.state[t], atol=1e-6)
        for view in episode.views:
            np.testing.assert_array_equal(images[view.name], list(view.frames())[t])
    np.testing.assert_allclose(adapter.demonstrated(demo), episode.action[: LENGTH - 1], atol=1e-6)
    assert {v.name for v in episode.views} == set(adapter.CAMERAS)


def test_float_images_become_bytes_and_missing_ones_are_named():
    one = seen(1)[0]
    whole = one.front_rgb
    one.front_rgb = whole / 255.0
    np.testing.assert_array_equal(adapter.to_observation(one, ("front",))[0]["front"], whole)
    with pytest.raises(UserError, match="no image wrist_rgb"):
        adapter.to_observation(observations(1, 0)[0], ("wrist",))
    one.gripper_pose = None
    with pytest.raises(UserError, match="no gripper_pose"):
        adapter.to_observation(one)


def test_actions_that_rlbench_would_refuse_are_made_allowed():
    action = np.array([0.1, 0.2, 0.9, 0, 0, 3, 4, 0.6], np.float32)
    np.testing.assert_allclose(adapter.to_action(action), [0.1, 0.2, 0.9, 0, 0, 0.6, 0.8, 1.0], atol=1e-7)
    assert adapter.to_action(np.append(action[:3], [0, 0, 0, 0, 0.4]))[3:].tolist() == [
        0,
        0,
        0,
        1,
        0,
    ]  # no rotation: none


def test_the_field_map_of_recordings_is_that_of_rlbenchs_own_data():
    family = family_of("lerobot", [adapter.RlbenchEnvironment.robot_type])
    theirs = load_config("rlbench")
    assert (family.embodiment, family.action, family.state) == (theirs.embodiment, theirs.action, theirs.state)
    assert ActionMap(family.action, 20.0).native_dim == len(adapter.RlbenchEnvironment.action_names)


def test_starts_and_instructions_follow_from_the_seed(simulator):
    before = np.random.get_state()[1].tolist()
    vectors, texts = {}, {}
    for split in ("train", "eval"):
        env = make_environment(JAR, split, image_size=16)
        for start in (0, 1, 0):
            texts[split, start] = env.reset(start).instruction
            assert vectors.setdefault((split, start), env.start_vector) == env.start_vector
        env.close()
    assert np.random.get_state()[1].tolist() == before
    assert (
        len(set(vectors.values())) == 4
        and len(set(texts.values())) > 1
        and all(t.startswith("close jar") for t in texts.values())
    )


def test_near_poses_are_reached_directly_far_ones_by_a_plan_and_others_not_at_all(simulator):
    env = make_environment(JAR, image_size=16)
    observation = env.reset(0)
    assert observation.state[:3].tolist() == pytest.approx([0.3, 0, 1]) and observation.images["wrist"].shape == (
        12,
        16,
        3,
    )
    for z, reach in ((1.05, 0.1), (1.15, 0.1), (0.8, 1.0)):
        action = np.append(observation.state, [])
        action[2] = z
        result = env.step(action)
        assert env._task.steps[-1][0] == reach and result.observation.state[2] == pytest.approx(z) and not result.done
    action[2] = 2.0
    result = env.step(action)
    assert result.info == {"refused": 1.0} and result.observation.state[2] == pytest.approx(0.8) and result.reward == 0
    action[2] = 1.25
    result = env.step(action)
    assert result.success and result.done and result.reward == 1
    env.close()


def test_a_demonstration_is_played_back_and_recorded_with_its_instruction(simulator):
    env = make_environment(JAR, image_size=16)
    done = demonstrate(env, 2, RecordConfig(JAR, 1, None, image_size=16, noise=0.5, extra_steps=2))
    demo = seen(6, seed=3)
    assert done.success and done.instruction == env.instruction != "close jar" and len(done.action) == 7
    np.testing.assert_allclose(done.action[:5], adapter.demonstrated(demo), atol=1e-6)  # noise cannot be carried out
    np.testing.assert_allclose(done.state[1:6], adapter.demonstrated(demo), atol=1e-6)
    np.testing.assert_array_equal(done.images["front"][3], demo[3].front_rgb)
    Image.fromarray(done.images["wrist"][0])
    env.close()


def test_a_demonstration_cannot_be_left_halfway_and_may_fail(simulator):
    env = make_environment(JAR, image_size=16)
    env.reset(0)
    action = env.expert_action()
    with pytest.raises(RuntimeError, match="must be followed"):
        env.step(action + 0.1)
    env.reset(0)
    env._task.demo_fails = True
    np.testing.assert_allclose(env.expert_action(), env.reset(0).state, atol=1e-6)  # it stays where it is
    env.close()


def test_rollouts_open_one_environment_at_a_time(simulator):
    config = RolloutConfig(image_size=16, max_steps=2, batch=4)
    results = [rollout(policy, JAR, [0, 1, 2], config) for policy in (RandomPolicy(), ExpertPolicy())]
    assert [[r.start for r in one] for one in results] == [[0, 1, 2]] * 2


def test_a_task_that_the_installed_rlbench_lacks(simulator):
    with pytest.raises(UserError, match="no task place_wine_at_rack_location; PerAct's fork"):
        make_environment("rlbench/place_wine_at_rack_location")
