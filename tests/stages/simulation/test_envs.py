"""Simulated tasks, recording and rollouts. Needs metaworld and a headless OpenGL; skipped with a reason otherwise."""

from __future__ import annotations

import ctypes.util
import gc
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from dvla.errors import UserError
from dvla.stages.simulation.config import RecordConfig
from dvla.stages.simulation.envs import Observation, environment_names, make_environment, mujoco_render
from dvla.stages.simulation.envs import metaworld as adapter
from dvla.stages.simulation.envs.metaworld_two_balls import HIDDEN, SHOWN
from dvla.stages.simulation.film import LABEL_HEIGHT, write_grids
from dvla.stages.simulation.record import MARKER, record
from dvla.stages.simulation.rollout import (
    ExpertPolicy,
    RandomPolicy,
    RolloutConfig,
    assert_disjoint,
    rollout,
    wilson_interval,
)

PUSH = "metaworld/push-v3"
SIZE = 48


@pytest.fixture(scope="module")
def push():
    try:  # not importorskip: the adapter has to choose the OpenGL library before mujoco is imported
        env = make_environment(PUSH, image_size=SIZE)
        env.reset(0)
    except UserError as error:
        pytest.skip(str(error))
    yield env
    env.close()


def starts(name: str, split: str, count: int, seed: int = 0) -> list[tuple[float, ...]]:
    env = make_environment(name, split, seed, render=False)
    vectors = []
    for start in range(count):
        env.reset(start)
        assert tuple(env._sim._last_rand_vec) == env.start_vector  # what Meta-World really used
        vectors.append(env.start_vector)
    env.close()
    return vectors


FINGERPRINT = """
import hashlib, sys
from dvla.stages.simulation.envs import make_environment

def fingerprint(env, start):
    observation = env.reset(start)
    digest = hashlib.sha256(repr(env.start_vector).encode() + observation.state.tobytes())
    for view in env.views:
        digest.update(observation.images[view].tobytes())
    return digest.hexdigest()
"""


def test_names_and_settings_are_checked():
    assert len(adapter.NAMES) == 50 and set(adapter.NAMES) <= set(environment_names())
    with pytest.raises(UserError, match="did you mean 'metaworld/push-v3'"):
        make_environment("metaworld/psh-v3")
    with pytest.raises(UserError, match="image_size must be 16"):
        make_environment(PUSH, image_size=4)
    with pytest.raises(UserError, match="unknown split 'test'"):
        make_environment(PUSH, split="test")


def test_missing_simulator_names_the_install_step(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'dvla\[sim\]'"):
        make_environment(PUSH)


def test_task_table_is_metaworlds(push):
    _, tasks, experts = adapter._modules()
    assert set(tasks) == set(experts) == set(adapter.TASKS)


@pytest.mark.parametrize("name", [PUSH, "metaworld/drawer-open-v3", "metaworld/button-press-topdown-v3"])
def test_starts_differ_and_splits_are_disjoint(push, name):
    train, evaluation = starts(name, "train", 12), starts(name, "eval", 12)
    assert len(set(train + evaluation)) == 24
    assert_disjoint(train, evaluation)
    assert starts(name, "train", 2, seed=1)[0] != train[0]
    with pytest.raises(UserError, match="also trained on"):
        assert_disjoint(train, [*evaluation, list(train[5])])


def test_start_is_reproduced_after_other_episodes_and_in_another_process(push):
    scope: dict = {}
    exec(FINGERPRINT, scope)
    env = make_environment(PUSH, "eval", seed=3, image_size=SIZE)
    seen = []
    for start in (2, 5, 5):
        seen.append(scope["fingerprint"](env, start))
        for _ in range(8):
            env.step(env.sample_action(np.random.default_rng(0)), render=False)
    env.close()
    code = FINGERPRINT + f"print(fingerprint(make_environment({PUSH!r}, 'eval', seed=3, image_size={SIZE}), 5))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stderr == ""  # no complaints of the OpenGL library at exit either
    assert seen[0] != seen[1] == seen[2] == child.stdout.strip()


def test_images(push):
    first, second = push.reset(0), push.reset(1)
    for view in ("corner2", "gripper"):
        assert first.images[view].shape == (SIZE, SIZE, 3) and first.images[view].dtype == np.uint8
        assert (first.images[view] != second.images[view]).any()
        # Hiding what lies outside the field of view must not change the image.
        camera, upright = adapter.CAMERAS[view]
        whole = mujoco_render.renderer(PUSH, SIZE, lambda: None).render(push._model, push._data, camera)[upright]
        np.testing.assert_array_equal(second.images[view], whole)
    # Upright: the lower half of corner2 is the wooden table (brown: red well above blue), the top rows the grey wall.
    red, blue = (first.images["corner2"][..., c].astype(float) for c in (0, 2))
    assert (red - blue)[SIZE // 2 :].mean() > (red - blue)[: SIZE // 8, SIZE // 2 :].mean() + 20
    assert push.reset(0, render=False).images == {}


def test_images_survive_more_tasks_than_open_renderers(push, monkeypatch):
    monkeypatch.setattr(mujoco_render, "MAX_RENDERERS", 1)
    expected = push.reset(0).images
    other = make_environment("metaworld/drawer-open-v3", image_size=SIZE)
    theirs = other.reset(0).images
    for view in push.views:
        np.testing.assert_array_equal(push.image(view), expected[view])
        np.testing.assert_array_equal(other.image(view), theirs[view])
    assert len(mujoco_render._renderers) == 1
    other.close()


def test_step_contract(push):
    observation = push.reset(0, render=False)
    np.testing.assert_allclose(observation.state, push._obs[:4], atol=1e-6)
    before = observation.state
    result = push.step(np.array([5.0, 0, 0, 0]), render=False)  # clipped: at most a centimetre per step
    assert 0 < result.observation.state[0] - before[0] < 0.02 and result.observation.step == 1
    with pytest.raises(ValueError, match="4 finite numbers"):
        push.step(np.array([np.nan, 0, 0, 0]))
    with pytest.raises(ValueError, match="4 finite numbers"):
        push.step(np.zeros(3))


def test_expert_and_random_rollouts(push):
    config = RolloutConfig(image_size=SIZE, record_video=1, video_frames_every=10, batch=3)
    seen = []
    results = rollout(ExpertPolicy(), PUSH, range(4), config, lambda done, total: seen.append((done, total)))
    assert [r.start for r in results] == [0, 1, 2, 3] and all(r.success for r in results)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert len({r.steps for r in results}) > 1 and max(r.steps for r in results) <= 150
    assert results[0].frames.shape == (1 + -(-results[0].steps // 10), SIZE, SIZE, 3) and results[1].frames is None
    short = RolloutConfig(image_size=SIZE, max_steps=30)
    random = rollout(RandomPolicy(), PUSH, range(2), short)
    assert [(r.success, r.steps) for r in random] == [(False, 30)] * 2
    spread = RolloutConfig(image_size=SIZE, max_steps=30, workers=2)
    parallel = rollout(None, PUSH, range(2), spread, policy_factory=RandomPolicy)
    assert [(r.start_vector, r.return_) for r in parallel] == [(r.start_vector, r.return_) for r in random]


def test_chunks_are_replanned_and_finished_environments_leave_the_batch(push):
    calls: list[list[Observation]] = []

    class Chunked:
        needs_images = True

        def act_batch(self, observations):
            calls.append(list(observations))
            return np.zeros((len(observations), 6, 4), np.float32)

    rollout(Chunked(), PUSH, [7, 9], RolloutConfig(image_size=SIZE, max_steps=8, replan=3))
    assert [[(o.start, o.step) for o in call] for call in calls] == [[(7, s), (9, s)] for s in (0, 3, 6)]
    assert all(set(o.images) == {"corner2", "gripper"} for call in calls for o in call)

    class Expert(ExpertPolicy):
        sizes: list[int] = []

        def act_environments(self, environments):
            self.sizes.append(len(environments))
            return super().act_environments(environments)

    results = rollout(Expert(), PUSH, range(3), RolloutConfig(image_size=SIZE, replan=1))
    assert len(Expert.sizes) == max(r.steps for r in results)
    assert sum(Expert.sizes) == sum(r.steps for r in results)


def test_wilson_interval():
    low, high = wilson_interval(10, 20)
    assert (low, high) == pytest.approx((0.2993, 0.7007), abs=1e-4)
    assert wilson_interval(0, 20)[0] == 0.0 and wilson_interval(20, 20)[1] == 1.0
    assert wilson_interval(0, 20)[1] == pytest.approx(0.1611, abs=1e-4)
    with pytest.raises(ValueError):
        wilson_interval(3, 2)


def test_grid(tmp_path):
    episodes = [np.full((n, 33, 33, 3), 40 * n, np.uint8) for n in (3, 5, 2)]
    write_grids(episodes, [True, False, True], ["a", "b", "c"], tmp_path / "grid", columns=2)
    with av.open(str(tmp_path / "grid.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(frames) == 5
    image = np.asarray(Image.open(tmp_path / "grid.png"))
    green, red = image[LABEL_HEIGHT, 0].astype(int), image[LABEL_HEIGHT, 100].astype(int)
    assert green[1] > green[0] and red[0] > red[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["grid.mp4", "grid.png"]


RECORD = """
import json, sys
from pathlib import Path
from dvla.stages.simulation.config import RecordConfig
from dvla.stages.simulation.record import record
if __name__ == "__main__":
    record(RecordConfig(out=Path(sys.argv[1]), workers=int(sys.argv[2]), **json.loads(sys.argv[3])))
"""


@pytest.mark.slow
def test_recorded_dataset_is_lerobots_own_and_independent_of_workers(push, tmp_path, monkeypatch):
    pytest.importorskip("lerobot", reason="lerobot is not installed (pip install 'dvla[lerobot]')")
    import socket

    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("recording must not use the network"))
    settings = dict(env="metaworld/handle-press-v3", episodes=2, image_size=SIZE, seed=5, noise=0.2, extra_steps=4)
    seen = []
    result = record(RecordConfig(out=tmp_path / "one", **settings), lambda kept, wanted: seen.append((kept, wanted)))
    assert seen == [(1, 2), (2, 2)]
    assert [p.name for p in tmp_path.iterdir()] == ["one"]  # no partial folder is left

    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset("dvla/one", root=tmp_path / "one", video_backend="pyav")
    assert dataset.num_episodes == 2 and len(dataset) == result.frames and dataset.fps == 80
    assert dataset.meta.robot_type == "metaworld_sawyer"
    env = make_environment(settings["env"], "train", 5, SIZE)
    provenance = json.loads((tmp_path / "one" / "meta" / "dvla.json").read_text())
    first_rows = [int(i) for i in dataset.meta.episodes["dataset_from_index"]]
    for episode, row in enumerate(first_rows):
        observation = env.reset(provenance["start_numbers"][str(episode)])
        assert provenance["starts"][str(episode)] == list(env.start_vector)
        frame = dataset[row]
        assert frame["task"] == "press the handle down"
        np.testing.assert_array_equal(frame["observation.state"], observation.state)
        np.testing.assert_array_equal(frame["action"], env.expert_action())  # the label is the clean action
        for view in env.views:
            shown = frame[f"observation.images.{view}"].numpy().transpose(1, 2, 0) * 255
            assert np.abs(shown - observation.images[view]).mean() < 6

    # Each in a process of its own: what ran before in a process can change the first frames that its encoder writes
    # (seen after renderings of other libraries: up to 11 levels in four frames), whatever the number of workers.
    for name, workers in (("alone", 1), ("two", 2)):
        words = [sys.executable, "-c", RECORD, str(tmp_path / name), str(workers), json.dumps(settings)]
        subprocess.run(words, check=True, timeout=300)
    one, two = (
        {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}
        for name in ("alone", "two")
    )
    assert set(one) == set(two)
    differing = {str(p) for p in one if one[p] != two[p]} - {"meta/stats.json"}
    assert not differing
    stats = [json.loads(files[Path("meta/stats.json")]) for files in (one, two)]  # LeRobot's key order varies
    assert stats[0] == stats[1]


def test_recording_refuses_what_is_in_the_way(push, tmp_path):
    pytest.importorskip("lerobot", reason="lerobot is not installed (pip install 'dvla[lerobot]')")
    config = RecordConfig(PUSH, 1, tmp_path / "out", image_size=SIZE, max_steps=2)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        record(config)
    (tmp_path / "out").rmdir()
    foreign = tmp_path / ".out.partial"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="no recording made it"):
        record(config)
    assert (foreign / "notes.txt").read_text() == "mine"
    # A stale folder of ours goes; an expert that cannot finish in two steps is reported, and nothing is left behind.
    (foreign / MARKER).touch()
    (foreign / "dataset").mkdir()
    with pytest.raises(UserError, match="solved only 0 of 13 initial states"):
        record(config)

    def interrupt(kept, wanted):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(RecordConfig(PUSH, 2, tmp_path / "out", image_size=SIZE, max_steps=2, keep_failures=True), interrupt)
    gc.collect()
    assert list(tmp_path.iterdir()) == []


TWO_WAYS = "metaworld/reach-wall-two-ways"


def follow(env, actions, noise: float = 0.0):
    """(solved, touched, x of the hand beside the wall) of an episode of `actions` from where `env` is."""
    rng, beside = np.random.default_rng(env.start), 0.0
    for action in actions:
        result = env.step(action + noise * rng.normal(size=4), render=False)
        beside = env._obs[0] if abs(env._obs[1] - 0.75) < 0.02 else beside
        if result.done:
            return result.success, bool(result.info["touched"]), beside
    raise AssertionError("the episode did not end")


def test_two_ways_round_a_wall_and_their_mean_leads_into_it(push):
    env = make_environment(TWO_WAYS, render=False)
    for start in range(4):
        env.reset(start)
        solved, touched, beside = follow(env, (env.expert_action() for _ in range(200)), noise=0.2)
        assert solved and not touched and np.sign(beside) == (1 if start % 2 else -1) and abs(beside) > 0.1
        for side in (-1.0, 1.0):
            env.reset(start)
            assert follow(env, env.way(side))[:2] == (True, False)
        # What regression tends to: at every state, the mean of what the two experts do there.
        env.reset(start)
        assert follow(env, (np.mean(both, axis=0) for both in zip(env.way(-1.0), env.way(1.0))))[:2] == (False, True)
        env.reset(start)
        assert follow(env, env.way(0.0))[:2] == (False, True)
    # Who has touched the wall has failed, also when the goal is reached afterwards.
    env.reset(0)
    for _ in range(25):
        env.step(np.array([0, 1, 0, -1]), render=False)
    for _ in range(25):
        env.step(np.array([0, -1, 0, -1]), render=False)
    assert follow(env, env.way(1.0))[:2] == (False, True) and env._sim.tcp_center[1] > 0.85
    env.close()


def test_both_ways_are_shown_from_the_same_start(push):
    env, places = make_environment(TWO_WAYS, image_size=SIZE), {}
    for start in range(4):
        observation = env.reset(start)
        places[start] = (env.start_vector[:-1], env.start_vector[-1], observation)
    for left, right in ((0, 1), (2, 3)):
        assert places[left][0] == places[right][0] and (places[left][1], places[right][1]) == (-1.0, 1.0)
        np.testing.assert_array_equal(places[left][2].state, places[right][2].state)
        for view in env.views:
            np.testing.assert_array_equal(places[left][2].images[view], places[right][2].images[view])
    assert places[0][0] != places[2][0] and (places[0][2].images["corner2"] != places[2][2].images["corner2"]).any()
    unseen = make_environment(TWO_WAYS, "eval", render=False)
    vectors = []
    for start in range(8):
        unseen.reset(start)
        vectors.append(unseen.start_vector)
    assert len({vector[:-1] for vector in vectors}) == 8
    assert_disjoint([vector for vector, *_ in places.values()], [vector[:-1] for vector in vectors])
    env.close()
    unseen.close()


COLOR, MEMORY = "metaworld/reach-ball-by-color", "metaworld/reach-ball-from-memory"


def episode(env, start: int, aim=None, waits: int = 0) -> tuple[list[Observation], bool, bool]:
    """(observations, solved, touched the wrong ball) of the expert, or of a hand that waits, then moves to `aim`."""
    seen = [env.reset(start)]
    while True:
        action = env.expert_action() if aim is None else env._toward(aim if env.steps >= waits else env._obs[:3])
        result = env.step(action)
        seen.append(result.observation)
        if result.done:
            return seen, result.success, bool(result.info["touched"])


@pytest.mark.parametrize("name", [COLOR, MEMORY])
def test_one_of_two_balls(push, name):
    env = make_environment(name, image_size=SIZE, render=False, max_steps=45)
    for start in range(4):
        _, solved, touched = episode(env, start)
        assert solved and not touched
        *_, solved, touched = episode(env, start, env._balls[1 - env._right])
        assert touched and not solved
    # Whoever has been at the wrong ball has failed, also when the right one is reached afterwards.
    env.reset(0)
    for aim in (env._balls[1 - env._right], env._balls[env._right]):
        for _ in range(35):
            result = env.step(env._toward(aim))
    assert not result.success and np.linalg.norm(env._sim.tcp_center - env._balls[env._right]) < 0.06
    # Any four initial states in a row have the right ball on the left twice, and twice on the right.
    rights = [(env.reset(start), env._right)[1] for start in range(12)]
    assert {sum(rights[at : at + 4]) for at in (0, 4, 8)} == {2}
    held_out, train = make_environment(name, "eval", render=False), []
    for start in range(12):
        env.reset(start)
        train.append(env.start_vector)
    evaluation = [(held_out.reset(start), held_out.start_vector)[1] for start in range(12)]
    assert len(set(train)) == len(set(evaluation)) == 12
    assert_disjoint([v[:6] for v in train], [v[:6] for v in evaluation])
    env.close()
    held_out.close()


def test_neither_the_image_nor_the_instruction_says_which_ball(push):
    env = make_environment(COLOR, image_size=SIZE)
    seen = [(env.reset(start), env._right) for start in range(4)]
    assert [o.instruction for o, _ in seen] == 2 * ["reach the green ball", "reach the blue ball"]
    assert [right for _, right in seen] == [0, 1, 1, 0]  # the same instruction, either side
    for one, other in ((0, 1), (2, 3)):  # the same image, either instruction and side
        np.testing.assert_array_equal(seen[one][0].state, seen[other][0].state)
        for view in env.views:
            np.testing.assert_array_equal(seen[one][0].images[view], seen[other][0].images[view])
    assert (seen[0][0].images["corner2"] != seen[2][0].images["corner2"]).any()
    env.close()


def test_no_image_from_which_the_hand_moves_says_which_ball(push):
    env = make_environment(MEMORY, image_size=SIZE)
    (left, *_), (right, *_) = episode(env, 0), episode(env, 1)
    for step in range(SHOWN + HIDDEN + 1):
        same = all((left[step].images[view] == right[step].images[view]).all() for view in env.views)
        assert same == (step >= SHOWN)
        np.testing.assert_array_equal(left[step].state, right[step].state)
        assert np.abs(left[step].state[:3] - left[0].state[:3]).max() < 5e-3  # the expert waits
    assert (
        left[SHOWN].images["corner2"] != left[SHOWN + HIDDEN].images["corner2"]
    ).any()  # the state says when to move
    assert np.abs(left[SHOWN + HIDDEN + 4].state - right[SHOWN + HIDDEN + 4].state).max() > 0.02
    env.close()


def test_images_continue_after_another_library_shut_down_egl() -> None:
    """In a process of its own: it is set up for EGL, which VTK ends for the whole process when it closes a window."""
    if ctypes.util.find_library("EGL") is None:
        pytest.skip("needs libEGL")
    code = """
from dvla.stages.simulation.envs import make_environment
envs = [make_environment(f"metaworld/{task}-v3", image_size=48) for task in ("reach", "push", "drawer-open")]
images = lambda order: [{view: p.copy() for view, p in envs[i].reset(0).images.items()} for i in order]
before = images((0, 1, 2))
from mujoco import egl
for order in ((0, 1, 2), (2, 0, 1), (1, 1, 0)):  # those rendered first stay right when the others' contexts are freed
    egl.EGL.eglTerminate(egl.EGL_DISPLAY)
    for found in (images(order), images(order)):
        assert all((found[k][view] == before[i][view]).all() for k, i in enumerate(order) for view in before[i])
assert all(p.std() > 0 for one in before for p in one.values())
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYOPENGL_PLATFORM"} | {"MUJOCO_GL": "egl"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Error" not in done.stderr, done.stderr[-2000:]
