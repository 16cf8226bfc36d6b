"""A policy with a history acts on the steps before: the same by hand, in rollouts, behind the server and in LeRobot."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dvla.cache.actions.action_map import ActionMap, FieldSpec
from dvla.cache.actions.history import History
from dvla.cache.vlm.tiny_qwen3vl import make_tiny_qwen3vl
from dvla.common.documents import json_bytes, read_json
from dvla.errors import UserError
from dvla.stages.policy import checkpoint as ck
from dvla.stages.policy import policy as policy_module
from dvla.stages.policy.document import read_document
from dvla.stages.policy.export import export_policy
from dvla.stages.policy.graph import TOLERANCE, graph_inputs
from dvla.stages.policy.history import Past, asked_later
from dvla.stages.policy.observation import Observation
from dvla.stages.policy.policy import Policy
from dvla.stages.serving.client import PolicyClient
from dvla.stages.serving.config import ServeConfig
from dvla.stages.serving.server import PolicyServer, in_background
from dvla.stages.simulation.envs import make_environment
from dvla.stages.simulation.rollout import RolloutConfig, rollout
from support import toy_environment
from support.run_samples import TINY, make_robot, make_run

HISTORY = History((0, -2, -3), (0, -1))
STEPS, REPLAN = 11, 3


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3vl(tmp_path_factory.mktemp("vlm") / "tiny", TINY)


@pytest.fixture(scope="module")
def run(vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy for the robot of `toy_environment`, which sees two earlier frames and one earlier state."""
    fields = ActionMap([FieldSpec(field="right_eef_pos_x")], 10.0).to_dict()
    robot = {**make_robot(), "views": ["front"], "action_map": fields, "state_map": fields, "environment": "toy/far"}
    return make_run(tmp_path_factory.mktemp("history") / "run", vlm, robot=robot, history=HISTORY)


@pytest.fixture
def policy(run: Path) -> Policy:
    return Policy.from_pretrained(run, environment="toy/far")


def views(observation: Observation) -> tuple[Any, ...]:
    return observation.images, observation.instruction, observation.state


def message(observation: Observation) -> dict[str, Any]:
    return {"images": observation.images, "state": observation.state, "prompt": observation.instruction}


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[Any]]]:
    """The toy tasks; what is executed and at which steps images are made is noted."""
    toy_environment.install(monkeypatch)
    noted: dict[str, list[Any]] = {"actions": [], "rendered": []}
    advance, image = toy_environment.Line._advance, toy_environment.Line.image

    def noting_advance(self: Any, action: np.ndarray) -> Any:
        noted["actions"].append(action.copy())
        return advance(self, action)

    def noting_image(self: Any, view: str) -> np.ndarray:
        noted["rendered"].append(self.steps)
        drawn = image(self, view)
        drawn[: 1 + self.steps % 8, :, 0] = 255  # so that frames differ where the point rests
        return drawn

    monkeypatch.setattr(toy_environment.Line, "_advance", noting_advance)
    monkeypatch.setattr(toy_environment.Line, "image", noting_image)
    yield noted


def episode(act: Callable[[int, Observation], np.ndarray | None], steps: int = STEPS) -> np.ndarray:
    """The chunks that `act(step, observation)` gives in one episode of which each `REPLAN` steps are executed."""
    env = make_environment("toy/far", "eval", 0, 48, max_steps=STEPS)
    seen, chunks, left = env.reset(0), [], []
    for step in range(steps):
        chunk = act(step, seen)
        if chunk is not None:
            chunks.append(chunk)
            left = list(chunk[:REPLAN])
        seen = env.step(left.pop(0)).observation
    return np.stack(chunks)


def by_hand(policy: Policy) -> Callable[[int, Observation], np.ndarray | None]:
    policy.reset()

    def act(step: int, seen: Observation) -> np.ndarray | None:
        if step % REPLAN == 0:
            return policy.act(*views(seen))
        policy.observe(*views(seen))
        return None

    return act


# --- the queue -------------------------------------------------------------------------------------------------------


def test_what_is_kept_is_what_can_be_seen() -> None:
    past, image = Past(History((0, -2, -5), (0, -3))), np.zeros((4, 4, 3), np.uint8)
    for step in range(40):
        seen = past.push(Observation({"front": image}, "go", np.array([step]), step=step)).window
        assert seen is not None and past.nbytes == min(step + 1, 6) * image.nbytes  # bounded
        assert [s and s.state[0] for s in seen.frames] == [step, *(step - o if step >= o else None for o in (2, 5))]
        assert [s and s.state[0] for s in seen.states] == [step - 3 if step >= 3 else None]
    again = past.push(Observation({"front": image}, "go", np.array([7]), step=39)).window
    assert again is not None and [s and s.state[0] for s in again.frames] == [7, 37, 34]
    assert past.push(Observation({}, "go", np.array([0]), step=0)).window.frames[1:] == (None, None)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
@pytest.mark.parametrize("offsets", [(0,), (0, -1), (0, -2, -3), (0, -7)])
def test_only_what_is_seen_later_is_rendered(chunk: int, offsets: tuple[int, ...]) -> None:
    seen = {pass_ * chunk + o for pass_ in range(99) for o in offsets}
    for step in range(1, 60):
        assert asked_later(History(offsets), (step - 1) % chunk + 1, chunk) == (step in seen)


# --- acting ----------------------------------------------------------------------------------------------------------


def test_by_hand_in_a_rollout_and_behind_the_server(policy: Policy, world: dict[str, list[Any]]) -> None:
    """The same actions, bit for bit; steps that no pass sees are not rendered in the rollout."""
    expected = episode(by_hand(policy))
    done, world["actions"][:], world["rendered"][:] = list(world["actions"]), [], []

    config = RolloutConfig(image_size=48, max_steps=STEPS, replan=REPLAN, batch=1)
    (result,) = rollout(policy, "toy/far", [0], config)
    assert result.steps == STEPS
    np.testing.assert_array_equal(world["actions"], done)
    passes = range(0, STEPS, REPLAN)
    assert set(world["rendered"]) == {p + o for p in range(0, 99, REPLAN) for o in HISTORY.frames} & set(
        range(STEPS + 1)
    )
    assert len(passes) == len(expected)

    with in_background(PolicyServer(policy, ServeConfig(port=0))) as port, PolicyClient(port=port) as client:
        assert (client.metadata["history"], client.metadata["proprio_history"]) == ([0, -2, -3], [0, -1])

        def asking(step: int, seen: Observation) -> np.ndarray | None:
            if step % REPLAN == 0:
                return client.infer(message(seen))["actions"]
            client.observe(message(seen))
            return None

        np.testing.assert_array_equal(episode(asking), expected)
        client.reset()

        def saying(step: int, seen: Observation) -> np.ndarray | None:
            """Only what is seen, by its step."""
            if step % REPLAN == 0:
                return client.infer({**message(seen), "step": step})["actions"]
            if asked_later(HISTORY, step % REPLAN, REPLAN) or step % REPLAN == REPLAN - 1:  # for past states too
                client.observe({**message(seen), "step": step})
            return None

        other = episode(saying)
    policy.reset()
    np.testing.assert_array_equal(episode(by_hand(policy)), other)  # the second episode on this connection, and here

    with in_background(PolicyServer(policy, ServeConfig(port=0, execute=REPLAN))) as port:
        with PolicyClient(port=port) as client:
            world["actions"].clear()
            env = make_environment("toy/far", "eval", 0, 48, max_steps=STEPS)
            seen = env.reset(0)
            for _ in range(STEPS):
                seen = env.step(client.infer(message(seen))["actions"]).observation
    np.testing.assert_array_equal(world["actions"], done)


def test_what_was_not_shown_is_masked(policy: Policy, world: dict[str, list[Any]]) -> None:
    """Asked without its past, or with frames lost on the way, a policy acts on what there is."""
    env = make_environment("toy/far", "eval", 0, 48)
    seen = [env.reset(0), *(env.step(np.full(1, 0.05)).observation for _ in range(3))]
    alone = dataclasses.replace(seen[3], step=3)
    batch = policy._batch([alone])
    frames = batch.token_mask.unflatten(1, (3, -1))
    assert frames.all(-1).tolist() == [[True, False, False]] and not frames[:, 1:].any()
    assert batch.past_mask is not None and not batch.past_mask.any() and not batch.past_proprio.any()
    past = Past(HISTORY)
    past.push(seen[0])
    past.push(dataclasses.replace(seen[1], images={}))  # lost; its state is not seen from step 3
    batch = policy._batch([past.push(seen[3])])
    assert batch.token_mask.unflatten(1, (3, -1)).any(-1).tolist() == [[True, False, True]]
    assert batch.past_mask is not None and batch.past_mask.tolist() == [[False]]
    np.testing.assert_array_equal(policy.act_batch([alone]), policy.act_batch([Past(HISTORY).push(alone)]))


def test_each_frame_is_encoded_once(
    policy: Policy, world: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts, encode = [], policy_module.encode_observations

    def counting(encoder: Any, images: Any, instructions: Any) -> Any:
        counts.append(len(images))
        return encode(encoder, images, instructions)

    monkeypatch.setattr(policy_module, "encode_observations", counting)
    episode(by_hand(policy))
    assert sum(counts) == len({p + o for p in range(0, STEPS, REPLAN) for o in HISTORY.frames if p + o >= 0})
    assert policy._pasts[0].nbytes == 2 * 48 * 48 * 3  # steps 8 and 10: images leave when they are encoded


def test_robots_and_episodes_do_not_mix(policy: Policy, world: dict[str, list[Any]]) -> None:
    """Several in one forward pass, each with its own past."""
    env = make_environment("toy/far", "eval", 0, 48)
    seen = [env.reset(0), *(env.step(np.full(1, 0.05)).observation for _ in range(5))]
    pasts = [Past(HISTORY) for _ in range(2)]
    for first, second in zip(seen[:5], reversed(seen[:5])):
        pasts[0].push(first)
        pasts[1].push(dataclasses.replace(second, step=first.step))
    both = [past.push(seen[5]) for past in pasts]
    together = policy.act_batch(both)
    apart = [policy.act_batch([one])[0] for one in both]
    np.testing.assert_allclose(together, np.stack(apart), atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-3
    policy.reset()
    begun = policy.act(*views(seen[0]))
    policy.observe(*views(seen[1]))
    policy.reset()
    again = policy.act(*views(seen[0]))
    assert not np.array_equal(begun, again)  # other noise, and
    window = policy._pasts[0].push(dataclasses.replace(seen[1], step=1)).window
    assert window is not None and window.frames[1] is None


def test_a_blind_policy_has_a_past_without_images(run: Path, world: dict[str, list[Any]]) -> None:
    policy = Policy.from_pretrained(run, blind=True)
    config = RolloutConfig(image_size=48, max_steps=STEPS, replan=REPLAN, batch=1)
    rollout(policy, "toy/far", [0], config)
    assert world["rendered"] == []
    past = Past(HISTORY)
    for step in range(3):
        batch = policy._batch([past.push(Observation({}, "go right", np.zeros(1, np.float32), step=step))])
    assert batch.token_mask.unflatten(1, (3, -1)).all(-1).tolist() == [[True, True, False]]


def test_frames_of_another_instruction_are_masked_where_features_depend_on_it(
    policy: Policy, world: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make_environment("toy/far", "eval", 0, 48)
    seen = [env.reset(0), *(env.step(np.full(1, 0.05)).observation for _ in range(4))]

    def there(reads: str) -> list[bool]:
        monkeypatch.setattr(type(policy.encoder), "reads", property(lambda _: reads))
        monkeypatch.setattr(policy.encoder, "visible", lambda _: policy.encoder.tokens)
        past = Past(HISTORY)
        policy.act_batch([past.push(seen[0])])  # encoded with this instruction
        past.push(seen[1])  # waits
        frames = policy._batch([past.push(dataclasses.replace(seen[3], instruction="go left"))]).token_mask
        return frames.unflatten(1, (3, -1)).any(-1)[0].tolist()

    assert there("image") == [True, True, True] and there("instruction") == [True, True, False]


# --- the server ------------------------------------------------------------------------------------------------------


def test_connections_do_not_mix_and_a_new_one_has_no_past(policy: Policy, world: dict[str, list[Any]]) -> None:
    expected = episode(by_hand(policy))
    with in_background(PolicyServer(policy, ServeConfig(port=0))) as port:
        with PolicyClient(port=port) as one, PolicyClient(port=port) as two:
            noise = np.random.default_rng(0)

            def asking(step: int, seen: Observation) -> np.ndarray | None:
                other = {**message(seen), "images": {"front": noise.integers(0, 255, (48, 48, 3), np.uint8)}}
                two.infer(other)
                if step % REPLAN == 0:
                    return one.infer(message(seen))["actions"]
                one.observe(message(seen))
                return None

            np.testing.assert_array_equal(episode(asking), expected)
        with PolicyClient(port=port) as three:
            env = make_environment("toy/far", "eval", 0, 48)
            np.testing.assert_array_equal(three.infer(message(env.reset(0)))["actions"], expected[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": 2}, "'step' is 2, the episode is at 6; steps go forward"),
        ({"step": "6"}, "'step' must be a whole number, got str"),
        ({"step": 2**40}, "'step' is 1099511627776"),
        ({"step": True}, "'step' must be a whole number, got bool"),
        ({"act": "no"}, "'act' must be true or false, got str"),
        ({"act": False, "images": {}}, "'images/front' (uint8 [H, W, 3]) is missing"),
        ({"act": False, "state": [0.0, 1.0]}, "'state' has 2 numbers"),
    ],
)
def test_bad_messages_change_nothing(
    policy: Policy, world: dict[str, list[Any]], change: dict[str, Any], words: str
) -> None:
    seen = make_environment("toy/far", "eval", 0, 48).reset(0)
    with in_background(PolicyServer(policy, ServeConfig(port=0))) as port, PolicyClient(port=port) as client:
        client.observe({**message(seen), "step": 5})
        with pytest.raises(UserError) as refused:
            client.infer({**message(seen), **change})
        assert words in str(refused.value) and len(str(refused.value)) < 250
        found = client.infer({**message(seen), "step": 6})["actions"]
    past = Past(HISTORY)
    past.push(dataclasses.replace(seen, step=5))
    np.testing.assert_array_equal(found, policy.act_batch([past.push(dataclasses.replace(seen, step=6))])[0])


def test_a_connection_keeps_only_so_many_images(
    policy: Policy, world: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dvla.stages.serving.session.WAITING", 3 * 48 * 48 * 3)
    seen = make_environment("toy/far", "eval", 0, 48).reset(0)
    with in_background(PolicyServer(policy, ServeConfig(port=0))) as port, PolicyClient(port=port) as client:
        for _ in range(3):
            client.observe(message(seen))
        with pytest.raises(
            UserError, match="the images of the last 3 steps would take 0 MiB, and a connection may keep 0"
        ):
            client.observe(message(seen))
        client.reset()
        assert client.infer(message(seen))["actions"].shape == (4, 1)


# --- LeRobot, graphs, documents --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    formats = ("torch-export", "onnx")
    return export_policy(run, tmp_path_factory.mktemp("exported") / "policy", formats, say=lambda _: None).path


def test_lerobot_shows_it_every_step(exported: Path, world: dict[str, list[Any]]) -> None:
    pytest.importorskip("lerobot")
    from dvla.stages.policy.lerobot import DvlaPolicy

    ours, theirs = Policy.from_pretrained(exported), DvlaPolicy.from_pretrained(exported)
    theirs.config.n_action_steps = REPLAN
    assert not theirs.supports_rtc()
    theirs.reset()
    ours._episode = 4096  # how LeRobot's first episode is numbered

    def batch(seen: Observation) -> dict[str, Any]:
        image = torch.from_numpy(seen.images["front"]).permute(2, 0, 1)[None].float() / 255
        state = torch.from_numpy(seen.state)[None]
        return {"observation.images.front": image, "observation.state": state, "task": seen.instruction}

    hand, actions, shown = by_hand(ours), [], []
    ours._episode = 4096

    def act(step: int, seen: Observation) -> np.ndarray | None:
        shown.append(seen)
        actions.append(theirs.select_action(batch(seen))[0].numpy())
        return hand(step, seen)

    expected = episode(act, STEPS - STEPS % REPLAN)
    np.testing.assert_array_equal(np.stack(actions), expected[:, :REPLAN].reshape(-1, 1))
    with pytest.warns(UserWarning, match="asked without them"):
        theirs.predict_action_chunk(batch(shown[0]))


@pytest.mark.parametrize("name", ["torch-export", "onnx"])
def test_a_graph_sees_the_history(exported: Path, world: dict[str, list[Any]], name: str) -> None:
    described = read_json(exported / "graph.json")
    assert described["inputs"]["frame_id"] == {"dtype": "int64", "shape": ["B", "L"]}
    assert described["inputs"]["past_proprio"]["shape"] == ["B", 1, 128] and described["difference"][name] <= TOLERANCE
    policy, env, past = Policy.from_pretrained(exported), make_environment("toy/far", "eval", 0, 48), Past(HISTORY)
    seen = past.push(env.reset(0))
    for _ in range(2):
        seen = past.push(env.step(np.full(1, 0.05)).observation)
    dit = policy.net.config.dit
    noise = policy._noise(seen, (dit.horizon, dit.noise_dim))[None, None]
    inputs = graph_inputs(policy._batch([seen]), noise, torch.ones(1))
    assert inputs.keys() == described["inputs"].keys()
    if name == "torch-export":
        out = torch.export.load(exported / "policy.pt2").module()(**inputs)
    else:
        ort = pytest.importorskip("onnxruntime")
        session = ort.InferenceSession(str(exported / "policy.onnx"), providers=["CPUExecutionProvider"])
        out = torch.from_numpy(session.run(["action"], {k: v.numpy() for k, v in inputs.items()})[0])
    expected = policy.act_batch([seen])
    np.testing.assert_allclose(policy.robot.actions(out[:, 0].detach().numpy()), expected, atol=1e-4 * np.ptp(expected))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"history": [0, 2]}, "history"),
        ({"history": [0, -2, -2]}, "begin with 0 and fall"),
        ({"history": []}, "history"),
        ({"history": [0]}, "net.past_states|its format"),
        ({"proprio_history": [0]}, "net.past_states is not the number of past states"),
        ({"format": 1}, "its format does not fit its history"),
        ({"history": [-k for k in range(12)]}, "history"),
        ({"history": [0, -2.5]}, "history"),
    ],
)
def test_a_damaged_history_is_refused(run: Path, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    document = {**read_json(ck.resolve(run) / "policy.json"), **change}
    if change == {"history": [0]}:
        document = {k: v for k, v in document.items() if k != "proprio_history"}
    (tmp_path / "policy.json").write_bytes(json_bytes(document))
    with pytest.raises(UserError, match=words) as refused:
        read_document(tmp_path)
    assert "policy.json" in str(refused.value) and "\n" not in str(refused.value)
