"""What robots send `dvla serve` and get: compressed images, other names, limits, and a control loop around it."""

from __future__ import annotations

import copy
import io
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import dvla
import dvla_client
from dvla.cache.vlm.tiny_qwen3vl import make_tiny_qwen3vl
from dvla.errors import UserError
from dvla.stages.policy.policy import Policy
from dvla.stages.policy.robot import RobotInterface
from dvla.stages.serving.config import ServeConfig
from dvla.stages.serving.fields import ObservationReader
from dvla.stages.serving.limits import describe_limits
from dvla.stages.serving.server import PolicyServer, in_background
from dvla.stages.simulation.envs import Observation
from support.run_samples import TINY, make_robot, make_run, observations, so101

SEEN = observations(1)[0]
SIDE = 64  # of what the encoder sees


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    base = tmp_path_factory.mktemp("serve")
    return Policy.from_pretrained(make_run(base / "run", make_tiny_qwen3vl(base / "vlm", TINY)))


@pytest.fixture(scope="module")
def port(policy: Policy) -> Iterator[int]:
    with in_background(PolicyServer(policy, ServeConfig(port=0))) as found:
        yield found


def message(**changes: Any) -> dict[str, Any]:
    return {"images": SEEN.images, "state": SEEN.state, "prompt": SEEN.instruction} | changes


def smooth() -> dict[str, Any]:
    """An observation whose images survive compression."""
    image = np.asarray(Image.fromarray(SEEN.images["front"][:6, :8]).resize((160, 120)))
    return message(images={"front": image, "wrist": image[::-1]})


def test_the_metadata_says_what_the_encoder_sees(port: int) -> None:
    with dvla.PolicyClient(port=port) as client:
        about = client.metadata
    assert about["images"] == {
        "side": SIDE,
        "padding": dvla_client.images.PADDING_RULE,
        "encodings": ["raw", "jpeg", "webp"],
    }
    assert len(about["limits"]["action"]["low"]) == 3 and about["limits"]["action"]["step"] is None


@pytest.mark.parametrize("form", ["native", "raw", "jpeg", "webp"])
def test_images_in_every_form(policy: Policy, port: int, form: str) -> None:
    seen = smooth()
    expected = policy.act(seen["images"], seen["prompt"], seen["state"])
    spread = np.abs(expected).mean()
    with dvla.PolicyClient(port=port, images=form, quality=95) as client:
        assert client.form == form and isinstance(client, dvla_client.PolicyClient)
        sizes, found = len(client.pack(seen)), client.infer(seen)["actions"]
    if form == "native":
        np.testing.assert_array_equal(found, expected)
    assert np.abs(found - expected).mean() < 0.05 * spread
    raw = 2 * 3 * (120 * 160 if form == "native" else SIDE * SIDE)
    assert raw < sizes < raw + 600 if form in ("native", "raw") else sizes < raw / 2


@pytest.mark.parametrize(
    ("about", "form"),
    [
        ({"images": None}, "native"),  # an earlier server
        ({"images": {"side": SIDE, "padding": "another", "encodings": ["raw", "jpeg"]}}, "native"),
        ({"images": {"side": SIDE, "padding": dvla_client.images.PADDING_RULE, "encodings": ["raw"]}}, "raw"),
    ],
)
def test_a_server_gets_what_it_knows(policy: Policy, about: dict[str, Any], form: str) -> None:
    server = PolicyServer(policy, ServeConfig(port=0))
    server.metadata |= about
    with in_background(server) as port, dvla.PolicyClient(port=port, images="jpeg") as client:
        assert client.form == form and client.infer(smooth())["actions"].shape == (4, 3)


def test_settings_of_images_are_checked() -> None:
    for settings in ({"images": "png"}, {"quality": 0}):
        with pytest.raises(UserError, match="give native, raw, jpeg, webp, and 1 to 100"):
            dvla.PolicyClient(**settings)  # type: ignore[arg-type]


# --- images that are none ---------------------------------------------------------------------------------------------


def encoded(form: str = "JPEG", size: tuple[int, int] = (90, 70), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(file, form, **options)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A JPEG of a few bytes whose header claims another size."""
    data = encoded()
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


WRONG = {
    "a truncated JPEG": (encoded(size=(900, 700))[:-300], "'images/front' cannot be decoded"),
    "the header of a JPEG": (encoded()[:20], "'images/front' is not an image (JPEG, WEBP)"),
    "a bomb": (bomb(60000, 60000), "'images/front' is not an image"),
    "a smaller bomb": (bomb(12000, 9000), "'images/front' is 12000x9000 pixels; at most 8192 a side"),
    "a large JPEG": (encoded(size=(4000, 3500)), "is 4000x3500 pixels; at most 11.2 million are decoded: resize it"),
    "a PNG": (encoded("PNG"), "'images/front' is not an image (JPEG, WEBP)"),
    "scans": (encoded(progressive=True) + b"\xff\xda" * 70, "scans; at most 64 are read"),
    "nothing": (b"", "'images/front' is not an image"),
    "noise": (bytes(range(256)) * 9, "'images/front' is not an image"),
    "a truncated WebP": (encoded("WEBP")[:-30], "'images/front'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_images_that_are_none_are_one_line(port: int, name: str) -> None:
    data, words = WRONG[name]
    with dvla.PolicyClient(port=port) as client:
        began = time.perf_counter()
        with pytest.raises(UserError) as error:
            client.infer(message(images={"front": data, "wrist": encoded()}))
        assert words in str(error.value) and len(str(error.value)) < 300
        assert time.perf_counter() - began < 5
        assert client.infer(message(images={"front": encoded(), "wrist": encoded("WEBP")}))["actions"].shape == (4, 3)


def test_any_size_is_padded_and_gray_has_three_channels() -> None:
    reader = ObservationReader(("front",), ("x", "y", "z"))
    gray = io.BytesIO()
    Image.new("L", (30, 50), 7).save(gray, "JPEG")
    found = reader.observation({"images/front": gray.getvalue(), "state": [0, 0, 0], "prompt": "go"})
    assert found.images["front"].shape == (50, 30, 3) and found.images["front"].dtype == np.uint8


# --- other names ------------------------------------------------------------------------------------------------------

FRONT, WRIST = SEEN.images["front"], SEEN.images["wrist"]
NAMES: dict[str, dict[str, Any]] = {
    "lerobot": {
        "observation.images.front": FRONT,
        "observation.images.wrist": WRIST,
        "observation.state": SEEN.state,
        "task": SEEN.instruction,
    },
    "openpi": {
        "observation/image": FRONT,
        "observation/wrist_image": WRIST,
        "observation/state": SEEN.state,
        "prompt": SEEN.instruction,
    },
    "nested": {"observation": {"image": FRONT, "wrist_image": WRIST, "state": SEEN.state}, "task": SEEN.instruction},
    "both": {**message(), "image": WRIST, "task": "another", "wrist_image": FRONT},
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_lerobot_and_openpi(policy: Policy, port: int, name: str) -> None:
    with dvla.PolicyClient(port=port) as client:
        found = client.infer(NAMES[name])["actions"]
    np.testing.assert_array_equal(found, policy.act(SEEN.images, SEEN.instruction, SEEN.state))


@pytest.mark.parametrize("views", [("front", "side"), ("left_wrist", "right_wrist")])
def test_a_name_that_could_mean_two_views_is_none(views: tuple[str, ...]) -> None:
    reader = ObservationReader(views, ("x", "y", "z"))
    with pytest.raises(UserError, match=f"'images/{views[0]}' .* is missing"):
        reader.observation({"image": FRONT, "wrist_image": WRIST, "state": [0, 0, 0], "prompt": "go"})


def test_a_field_map_wins() -> None:
    reader = ObservationReader(("front",), ("x", "y", "z"), ("images/front=cam", "prompt=order"))
    with pytest.raises(UserError, match="'cam' .* is missing"):
        reader.observation({"image": FRONT, "state": [0, 0, 0], "order": "go"})
    assert reader.observation({"cam": FRONT, "state": [0, 0, 0], "order": "go", "task": "x"}).instruction == "go"


def test_a_task_that_is_no_text_is_not_the_prompt() -> None:
    reader = ObservationReader((), ("x", "y", "z"))
    assert reader.observation({"state": [0, 0, 0], "task": 3}, otherwise="go").instruction == "go"


# --- limits -----------------------------------------------------------------------------------------------------------


def test_limits_are_the_data_s() -> None:
    values = {**make_robot(), "action_step": [0.25] * 128}
    robot = RobotInterface(values)
    limits, stats = describe_limits(robot), robot.action_stats
    slots = [int(np.flatnonzero(robot.action_map.to_unified(row))[0]) for row in np.eye(3)]
    np.testing.assert_allclose(limits["action"]["low"], stats.min[slots])
    np.testing.assert_allclose(limits["action"]["high"], stats.max[slots])
    np.testing.assert_allclose(limits["action"]["step"], 0.25)


def test_limits_are_in_the_robot_s_units() -> None:
    values: dict[str, Any] = {**so101(), "action_step": [np.deg2rad(5)] * 128}
    robot = RobotInterface(values)
    joints = np.random.default_rng(0).uniform(-60, 60, (50, 6))
    limits = describe_limits(robot)
    data = robot.action_map.to_native(robot.action_map.to_unified(joints))
    np.testing.assert_allclose(limits["action"]["low"][:5], data.min(0)[:5], atol=1e-4)
    np.testing.assert_allclose(limits["action"]["high"][:5], data.max(0)[:5], atol=1e-4)
    np.testing.assert_allclose(limits["action"]["step"][:5], 5, atol=1e-6)
    near = describe_limits(RobotInterface({**values, "action_frame": "chunk"}))["action"]
    assert near["low"][0] == pytest.approx(2 * data.min(0)[0], abs=1e-3)  # displacements from any state of the data


def test_the_server_limits(policy: Policy) -> None:
    far = copy.copy(policy)
    far.act_batch = lambda seen, mark: 0 * policy.act_batch(seen, mark) + 9  # type: ignore[method-assign]
    for mode, words in (("clip", ""), ("stop", "action 'right_eef_pos_x' is 9, its limits are")):
        server = PolicyServer(far, ServeConfig(port=0, limits=mode))  # type: ignore[arg-type]
        with in_background(server) as port, dvla.PolicyClient(port=port) as client:
            if words:
                with pytest.raises(UserError, match=words):
                    client.infer(message())
            else:
                high = np.array(client.metadata["limits"]["action"]["high"])
                assert (client.infer(message())["actions"] < 1.5 * high).all()
            with pytest.raises(UserError, match="state 'right_eef_pos_y' is 50, and the policy knows"):
                client.infer(message(state=[0, 50, 0]))
    with in_background(PolicyServer(far, ServeConfig(port=0))) as port, dvla.PolicyClient(port=port) as client:
        assert (client.infer(message(state=[0, 50, 0]))["actions"] == 9).all()  # only as an option


# --- a control loop ---------------------------------------------------------------------------------------------------


def test_a_robot_at_50_hz(port: int) -> None:
    """In real time, over a socket, with JPEG: every tick is counted once, and the chunks overlap."""
    log: list[np.ndarray] = []
    with dvla.PolicyClient(port=port, images="jpeg") as client:
        loop = dvla_client.ControlLoop(client, smooth, log.append, hz=50, replan=1, silence=20.0)
        report = loop.run(ticks=50)
        assert client.infer(smooth())["actions"].shape == (4, 3)  # the connection is as it was
    assert report.ticks == 50 == report.acted + report.idle + report.waited and len(log) == report.acted > 0
    assert report.ended == "done" and report.chunks > 2 and report.refused == 0


def test_a_loop_outlives_its_server(policy: Policy) -> None:
    server = PolicyServer(policy, ServeConfig(port=0))
    with in_background(server) as port:
        client = dvla.PolicyClient(port=port)
    log: list[Any] = []
    report = dvla_client.ControlLoop(
        client, smooth, log.append, hz=50, silence=0.3, hold=lambda: log.append(None)
    ).run()
    assert report.ended.startswith("silence") and report.lost >= 1 and not report.acted and log[-1] is None


def test_the_client_s_version_is_dvla_s() -> None:
    assert dvla_client.__version__ == dvla.__version__


def test_an_observation_with_an_image_s_bytes_is_a_frame() -> None:
    reader = ObservationReader(("front",), ("x", "y", "z"))
    assert reader.brings_frame({"observation.images.front": encoded()}) and not reader.brings_frame({"task": "go"})


def test_checkpoints_say_the_largest_step(tmp_path: Path) -> None:
    from dvla.cache.store.cache import Cache
    from dvla.stages.policy.robot import describe_dataset
    from support import synthetic_cache as synthetic

    synthetic.build(tmp_path / "cache")
    data = Cache.open(tmp_path / "cache").datasets[0]
    kept = [i for i in range(len(data.episode_id)) if not data.quarantined[i]]
    spans = [slice(int(s), int(s + n)) for s, n in zip(data.episode_start[kept], data.episode_length[kept])]
    largest = np.max([np.abs(np.diff(data.action[span], axis=0)).max(0, initial=0) for span in spans], axis=0)
    np.testing.assert_array_equal(describe_dataset(data)["action_step"], largest)
    assert isinstance(SEEN, Observation) and largest.max() > 0
