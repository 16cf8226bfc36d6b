"""An exported policy drives an SO-101 arm through LeRobot's own commands, up to the motor bus, which is a stand-in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from dvla.cache.readers import open_source
from dvla.cache.readers.search import load_config
from dvla.cache.vlm.tiny_qwen3vl import make_tiny_qwen3vl
from dvla.stages.policy.export import export_policy
from dvla.stages.policy.policy import Policy
from dvla.stages.simulation.envs import Observation
from support import so101_standin as standin
from support.lerobot_plugins import site
from support.repository import ROOT
from support.run_samples import TINY, VIEWS, make_run, so101

pytest.importorskip("lerobot", reason="needs lerobot (the extra lerobot)")
pytest.importorskip("lerobot.robots.so_follower", reason="needs what lerobot's robots need")
ROLLS_OUT = find_spec("lerobot.rollout") is not None  # lerobot 0.6; before, `lerobot-record` takes a policy
needs_rollout = pytest.mark.skipif(not ROLLS_OUT, reason="needs lerobot-rollout of lerobot 0.6")
TASK, T = "pick it up", 4
ROBOT = ["--robot.type=so101_follower", "--robot.port=follower", "--robot.id=one", f"--robot.cameras={standin.CAMERAS}"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("so101")
    run = make_run(base / "run", make_tiny_qwen3vl(base / "vlm", TINY), robot=so101())
    return export_policy(run, base / "policy").path


@pytest.fixture
def arm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, list[float]]]:
    """The events of a stand-in arm in this process."""
    standin.put_in(monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)
    return standin.EVENTS


def command(name: str, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """Run a script of LeRobot's in this process."""
    import importlib

    from dvla.stages.policy import lerobot  # noqa: F401  what the plug-in's package imports

    monkeypatch.setattr("sys.argv", [name, *words])
    module = importlib.import_module(f"lerobot.scripts.{name.replace('-', '_')}")
    getattr(module, name.removeprefix("lerobot-"))()


def planned(exported: Path, state: list[float], episode: int, step: int) -> np.ndarray:
    """The chunk [T,6] that the policy plans from what the stand-in's cameras show and this state."""
    images = {view: standin.image_of(i) for i, view in enumerate(VIEWS)}
    seen = Observation(images, TASK, np.array(state, np.float32), 4096 * episode, step)
    return Policy.from_pretrained(exported).act_batch([seen])[0]


def require_policys(events: list[tuple[str, list[float]]], exported: Path, episode: int, chunk: int = T) -> None:
    """What arrived at the motors is what the policy plans from what was read before: two chunks at least."""
    ticks = [
        (before[1], event[1]) for before, event in zip(events, events[1:]) if (before[0], event[0]) == ("read", "write")
    ]
    assert len(ticks) >= 2 * chunk
    for begin in (0, chunk):
        sent = np.array([values for _, values in ticks[begin : begin + chunk]])
        np.testing.assert_allclose(
            sent, planned(exported, ticks[begin][0], episode, begin)[:chunk], rtol=1e-5, atol=1e-4
        )


def test_lerobot_finds_it_by_itself(exported: Path, tmp_path: Path) -> None:
    """In a process of its own, with no option that names dvla: `lerobot-rollout`, before 0.6 `lerobot-record`."""
    paths = [*site(tmp_path / "site"), *filter(None, sys.path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "STANDIN_LOG": str(tmp_path / "log.json")}
    env |= {"HF_LEROBOT_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    words = words_of(exported, tmp_path / "eval")
    script = "lerobot.scripts.lerobot_rollout" if ROLLS_OUT else "lerobot.scripts.lerobot_record"
    done = subprocess.run([sys.executable, "-m", script, *words], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    events = [tuple(event) for event in json.loads((tmp_path / "log.json").read_text())]
    require_policys(events, exported, episode=1, chunk=2)
    lost = [*words_of(exported, tmp_path / "eval_2"), "--policy.vlm_path=nowhere/at-all"]
    done = subprocess.run([sys.executable, "-m", script, *lost], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and ("Traceback" not in done.stderr or not ROLLS_OUT)  # 0.4 shows one of its own
    assert done.stderr.splitlines()[-1].startswith("error: ") and "nowhere/at-all" in done.stderr.splitlines()[-1]


def words_of(exported: Path, out: Path) -> list[str]:
    return rollout_words(exported) if ROLLS_OUT else record_words(exported, out)


def rollout_words(exported: Path, seconds: float = 1.0) -> list[str]:
    return [
        *(f"--policy.path={exported}", "--policy.n_action_steps=2", "--policy.device=cpu", f"--task={TASK}"),
        *(*ROBOT, "--fps=10", f"--duration={seconds}", "--return_to_initial_position=false", "--play_sounds=false"),
    ]


def record_words(exported: Path, out: Path) -> list[str]:
    return [
        *(f"--policy.path={exported}", "--policy.n_action_steps=2", "--policy.device=cpu", *ROBOT),
        *("--dataset.repo_id=me/eval_pick", f"--dataset.root={out}", f"--dataset.single_task={TASK}"),
        *("--dataset.num_episodes=1", "--dataset.episode_time_s=1", "--dataset.fps=10", "--dataset.push_to_hub=false"),
        *("--dataset.vcodec=h264", "--play_sounds=false"),
    ]


@needs_rollout
@pytest.mark.parametrize("renamed", [False, True])
def test_rollout(exported: Path, arm: list, monkeypatch: pytest.MonkeyPatch, renamed: bool) -> None:
    words = rollout_words(exported)
    if renamed:
        words = [w.replace("front:", "top:") for w in words]
        words.append('--rename_map={"observation.images.top": "observation.images.front"}')
    command("lerobot-rollout", monkeypatch, *words)
    require_policys(arm, exported, episode=1, chunk=2)


@needs_rollout
def test_rollout_that_plans_in_the_background(exported: Path, arm: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real-time chunking: the first chunk is the policy's; later ones begin with what is being executed."""
    words = [w for w in rollout_words(exported, 2.0) if "n_action_steps" not in w]
    command("lerobot-rollout", monkeypatch, *words, "--inference.type=rtc", "--inference.queue_threshold=1")
    sent = np.array([values for kind, values in arm if kind == "write"])
    assert len(sent) > 2 * T and np.isfinite(sent).all()
    begun = [event[1] for event in arm[: arm.index(("write", sent[0].tolist()))]]
    first = planned(exported, begun[-1], 1, 0)
    assert any(np.allclose(sent[0], action, atol=1e-4) for action in first)


@needs_rollout
def test_recording_while_the_policy_acts(
    exported: Path, arm: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The strategy `episodic`, which records as `lerobot-record` did: the dataset holds the policy's actions."""
    words = [w for w in rollout_words(exported) if not w.startswith("--duration")]
    words += ["--strategy.type=episodic", "--strategy.reset_to_initial_position=false", f"--dataset.single_task={TASK}"]
    words += [f"--dataset.root={tmp_path / 'rollout'}", "--dataset.repo_id=me/rollout_pick", "--dataset.fps=10"]
    words += ["--dataset.num_episodes=1", "--dataset.episode_time_s=1", "--dataset.reset_time_s=0"]
    words += ["--dataset.push_to_hub=false", "--dataset.rgb_encoder.vcodec=h264"]
    command("lerobot-rollout", monkeypatch, *words)
    (root,) = tmp_path.glob("rollout*")
    require_recorded(root, arm)


def test_teleoperated_recording(arm: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`lerobot-record` with a leader arm: what it writes is read as the config of SO-101 describes it."""
    codec = "--dataset.rgb_encoder.vcodec=h264" if ROLLS_OUT else "--dataset.vcodec=h264"
    words = [*ROBOT, "--teleop.type=so101_leader", "--teleop.port=leader", "--teleop.id=two", codec]
    words += ["--dataset.repo_id=me/pick", f"--dataset.root={tmp_path / 'pick'}", f"--dataset.single_task={TASK}"]
    words += ["--dataset.num_episodes=1", "--dataset.episode_time_s=1", "--dataset.fps=10"]
    words += ["--dataset.push_to_hub=false", "--play_sounds=false"]
    command("lerobot-record", monkeypatch, *words)
    require_recorded(tmp_path / "pick", arm)


def require_recorded(root: Path, events: list[tuple[str, list[float]]]) -> None:
    """A recording has what went to the motors as its actions, and the cameras' images."""
    source = open_source(root, load_config("so100"))
    episode = source.load(source.episode_ids[0])
    sent = [values for kind, values in events if kind == "write"]
    assert episode.instruction == TASK and 5 <= episode.length <= len(sent)
    np.testing.assert_allclose(episode.action, sent[: episode.length], rtol=1e-6)
    assert [v.name for v in episode.views] == list(VIEWS)
    for i, view in enumerate(episode.views):
        off = np.abs(next(view.frames()).astype(int) - standin.image_of(i))
        assert off.mean() < 12


def test_asynchronous_inference(exported: Path, arm: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LeRobot's robot client with the policy server of the plug-in: images arrive as the cameras took them."""
    grpc = pytest.importorskip("grpc", reason="needs lerobot[async]")
    monkeypatch.syspath_prepend(str(ROOT / "plugin"))
    monkeypatch.setattr("sys.excepthook", sys.excepthook)  # put back what the plug-in replaces
    from concurrent.futures import ThreadPoolExecutor

    from lerobot.async_inference.configs import PolicyServerConfig, RobotClientConfig
    from lerobot.async_inference.robot_client import RobotClient
    from lerobot.cameras.opencv import OpenCVCameraConfig
    from lerobot.robots.so_follower import SO101FollowerConfig
    from lerobot.transport import services_pb2_grpc
    from lerobot_policy_dvla.policy_server import policy_server

    serving = policy_server.PolicyServer(PolicyServerConfig(fps=10))
    server = grpc.server(ThreadPoolExecutor(4))
    services_pb2_grpc.add_AsyncInferenceServicer_to_server(serving, server)
    port = server.add_insecure_port("localhost:0")
    server.start()
    cameras = {view: OpenCVCameraConfig(i, fps=30, width=64, height=48) for i, view in enumerate(VIEWS)}
    robot = SO101FollowerConfig(port="follower", id="one", cameras=cameras)
    asked = RobotClientConfig("dvla", str(exported), robot, T, fps=10, server_address=f"localhost:{port}")
    client = RobotClient(asked)
    assert client.start()
    receiving = threading.Thread(target=client.receive_actions, daemon=True)
    receiving.start()
    stop = threading.Timer(4.0, client.shutdown_event.set)
    stop.start()
    client.control_loop(task=TASK)
    client.stop()
    receiving.join(10)
    server.stop(None)
    sent = np.array([values for kind, values in arm if kind == "write"])
    assert len(sent) >= 1
    np.testing.assert_allclose(sent[0], planned(exported, arm[0][1], 0, 0)[0], rtol=1e-5, atol=1e-4)


def test_a_robot_of_another_order_or_width_is_refused(exported: Path) -> None:
    from types import SimpleNamespace

    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.configs.types import FeatureType, PolicyFeature

    from dvla.errors import UserError
    from dvla.stages.policy.lerobot import DvlaPolicy

    config = PreTrainedConfig.from_pretrained(exported)
    assert config.action_feature_names == standin.JOINTS
    assert config.image_features["observation.images.front"].shape == (3, 48, 64)
    for names, right in ((standin.JOINTS, True), (standin.JOINTS[::-1], False)):
        meta = SimpleNamespace(features={"action": {"names": names}, "observation.state": {"names": names}})
        if right:
            DvlaPolicy.from_pretrained(exported, config=config, dataset_meta=meta)
            continue
        with pytest.raises(UserError, match="the robot's action has the order gripper.pos"):
            DvlaPolicy.from_pretrained(exported, config=config, dataset_meta=meta)
    config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (14,))}
    with pytest.raises(UserError, match=r"takes actions of \[14\] numbers, this policy gives \[6\].*shoulder_pan.pos"):
        DvlaPolicy.from_pretrained(exported, config=config)
    with pytest.raises(UserError, match="give --policy.path"):
        DvlaPolicy(config, dataset_stats=None)


def test_it_moves_as_a_whole(exported: Path) -> None:
    from dvla.stages.policy.lerobot import DvlaPolicy

    policy = DvlaPolicy.from_pretrained(exported)
    assert policy.to("meta")._policy.encoder.device.type == policy._policy._null.device.type == "meta"


def test_chunks_are_handed_over(exported: Path) -> None:
    from dvla.stages.policy.lerobot.overlap import blend

    fields = Policy.from_pretrained(exported).robot.action_map
    new, old = torch.full((1, 8, 6), 10.0), torch.zeros(10, 6)
    old[:5] = 4.0  # LeRobot pads with zeros
    mixed = blend(fields, old, new, delay=2)
    np.testing.assert_allclose(mixed[0, :, 0], [4, 4, 5.5, 7, 8.5, 10, 10, 10], rtol=1e-5)
    assert mixed.shape == (1, 8, 6) and torch.equal(blend(fields, torch.zeros(10, 6), new, 3), new)
    np.testing.assert_allclose(blend(fields, old, new, delay=7)[0, :, 5], [4] * 5 + [10] * 3, rtol=1e-5)
