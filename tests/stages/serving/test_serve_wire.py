"""What travels between a robot and a policy server, and what becomes of it: bytes, names of fields, chunks, tokens.

No connections.
"""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dvla.errors import UserError
from dvla.stages.serving.access import allowed, read_token, require_token
from dvla.stages.serving.fields import ObservationReader
from dvla.stages.serving.metrics import COUNTS, TIMES, Metrics
from dvla.stages.serving.session import Session
from dvla.stages.serving.wire import pack, unpack
from dvla.stages.simulation.envs import Observation

ARRAYS = hnp.arrays(
    st.sampled_from(["|b1", "|u1", "<i2", ">i4", "<u8", "<f2", "<f4", ">f8"]),
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
)
IMAGE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
STATE = np.array([0.5, -1.0, 2.0], np.float32)


def message(**changes: Any) -> dict[str, Any]:
    return {"images": {"front": IMAGE, "wrist": IMAGE + 1}, "state": STATE, "prompt": "push the puck"} | changes


def reader(*fields: str, views: tuple[str, ...] = ("front", "wrist")) -> ObservationReader:
    return ObservationReader(views, ("x", "y", "gripper"), fields)


def refusal(call: Any, *arguments: Any) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- bytes ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(ARRAYS)
def test_arrays_survive(array: np.ndarray) -> None:
    found = unpack(pack({"a": [array, array[..., :0] if array.ndim else array]}))["a"]
    for a, b in zip(found, [array, array[..., :0] if array.ndim else array]):
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_the_form_is_openpis() -> None:
    array = np.array([[1.5, 2.0]], np.float32)
    assert msgpack.unpackb(pack({"a": array, "n": np.int16(3)})) == {
        "a": {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": "<f4", b"shape": [1, 2]},
        "n": {b"__npgeneric__": True, b"data": 3, b"dtype": "<i2"},
    }
    number = unpack(pack(np.float32(0.25)))
    assert number == 0.25 and number.dtype == np.float32


def test_openpis_own_encoding_is_read_and_written_alike() -> None:
    theirs = pytest.importorskip("openpi_client.msgpack_numpy")
    whole = {**message(), "n": np.float32(2.5), "flag": np.bool_(True), "empty": np.zeros((0, 3), np.int64)}
    assert theirs.packb(whole) == pack(whole)
    np.testing.assert_equal(theirs.unpackb(pack(whole)), unpack(theirs.packb(whole)))


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60))
def test_garbage_is_a_user_error_or_a_value(data: bytes) -> None:
    try:
        unpack(data)
    except UserError as error:
        assert "\n" not in str(error)


def test_every_truncation_is_refused() -> None:
    data = pack(message())
    for end in [*range(0, 60), len(data) // 2, len(data) - 1]:
        refusal(unpack, data[:end])
    refusal(unpack, data + b"\x00")


@pytest.mark.parametrize(
    "data",
    [
        b"\xdd" + (2**20).to_bytes(4, "big") + b"\x90" * 2**20,  # empty lists: a byte each, and 56 in memory
        b"\xdd" + (2**20).to_bytes(4, "big") + b"\x80" * 2**20,
        b"\xdc\xff\xff" + (b"\xdc\xff\xff" + b"\x90" * 65535) * 16,
        (b"\xdd" + (2**24).to_bytes(4, "big")) * 500 + bytes(2**24),  # lists that claim more than there is
        b"\xdf" + (2**17).to_bytes(4, "big") + b"".join(b"\xa7%07d\xc0" % i for i in range(2**17)),
    ],
    ids=["lists", "maps", "lists of lists", "claims", "keys"],
)
def test_a_message_does_not_multiply_in_memory(data: bytes) -> None:
    tracemalloc.start()
    try:
        refusal(unpack, data)
        assert tracemalloc.get_traced_memory()[1] < 300 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "data, dtype", [(300, "|u1"), (-1, "|u1"), (2**64 - 1, "<i8"), (float("inf"), "<i4"), ("x", "<f4")]
)
def test_numbers_that_their_type_cannot_hold_are_refused(data: Any, dtype: str) -> None:
    message = msgpack.packb({b"__npgeneric__": True, b"data": data, b"dtype": dtype})
    assert "not a msgpack message" in refusal(unpack, message)


def array_map(**changes: Any) -> bytes:
    fields = {"__ndarray__": True, "data": bytes(8), "dtype": "<f4", "shape": [2]} | changes
    return msgpack.packb({key.encode(): value for key, value in fields.items() if value is not None})


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"dtype": "|O"}, "'|O'"),
        ({"dtype": "<c8"}, "'<c8'"),
        ({"dtype": "<U2"}, "'<U2'"),
        ({"dtype": "f4,f4"}, "'f4,f4'"),
        ({"dtype": "<f3"}, "f3"),
        ({"dtype": ["<f4"]}, "dtype"),
        ({"dtype": None}, "dtype"),
        ({"data": "text"}, "needs 8 bytes of data, got str"),
        ({"data": bytes(7)}, "got 7"),
        ({"shape": [-2]}, "shape"),
        ({"shape": 2}, "shape"),
        ({"shape": [True, 2]}, "shape"),
        ({"shape": [2**62, 2**62]}, "got 8"),
        ({"shape": [1] * 9}, "shape"),
    ],
)
def test_arrays_that_are_none_are_refused(changes: dict[str, Any], words: str) -> None:
    assert unpack(array_map()).tolist() == [0, 0]
    assert words in refusal(unpack, array_map(**changes))


@pytest.mark.parametrize(
    "value", [np.array([object()]), np.array([1j]), np.array(["text"]), np.zeros(2, "f4,i4"), {1, 2}, object()]
)
def test_what_would_need_pickle_is_not_sent(value: Any) -> None:
    refusal(pack, {"a": value})


# --- fields -----------------------------------------------------------------------------------------------------------

FLAT = {
    "observation/images/front": IMAGE,
    "observation/images/wrist": IMAGE + 1,
    "observation/state": STATE.tolist(),
    "prompt": "push the puck",
}
DROID = {
    "observation/exterior_image_1_left": IMAGE,
    "observation/wrist_image_left": IMAGE + 1,
    "observation/joint_position": STATE[:2].astype(np.float64),
    "observation/gripper_position": 2.0,
    "prompt": "push the puck",
}
DROID_FIELDS = (
    "images/front=observation/exterior_image_1_left",
    "images/wrist=observation/wrist_image_left",
    "state=observation/joint_position, observation/gripper_position",
)


@pytest.mark.parametrize(
    "given_, fields",
    [
        (message(), ()),
        ({"observation": message(), "prompt": "push the puck"}, ()),
        (FLAT, ()),
        (DROID, DROID_FIELDS),
        ({**message(), "seq": 3, b"x": 1}, ()),
        (message(images={"front": IMAGE.transpose(2, 0, 1), "wrist": IMAGE + 1}), ()),
    ],
)
def test_all_names_give_the_same_observation(given_: dict[Any, Any], fields: tuple[str, ...]) -> None:
    found = reader(*fields).observation(unpack(pack(given_)), 3, 4)
    assert list(found.images) == ["front", "wrist"] and (found.instruction, found.start, found.step) == (
        "push the puck",
        3,
        4,
    )
    np.testing.assert_array_equal(found.images["front"], IMAGE)
    np.testing.assert_array_equal(found.images["wrist"], IMAGE + 1)
    np.testing.assert_array_equal(found.state, STATE)
    assert found.state.dtype == np.float32


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in message().items() if key != name}


WRONG = {
    "no view": (
        message(images={"front": IMAGE, "wirst": IMAGE}),
        ("'images/wrist' (uint8 [H, W, 3]) is missing", "'images/wirst'"),
    ),
    "no images": (without("images"), ("'images/front'", "is missing", "prompt, state")),
    "no state": (without("state"), ("'state' ([3] numbers) is missing",)),
    "no prompt": (without("prompt"), ("'prompt' (text) is missing",)),
    "float image": (
        message(images={"front": IMAGE / 255, "wrist": IMAGE}),
        ("'images/front' must be an image", "float64 [4, 6, 3]"),
    ),
    "gray image": (message(images={"front": IMAGE[..., 0], "wrist": IMAGE}), ("'images/front'", "uint8 [4, 6]")),
    "batch of pictures": (message(images={"front": IMAGE[None], "wrist": IMAGE}), ("uint8 [1, 4, 6, 3]",)),
    "empty image": (message(images={"front": IMAGE[:0], "wrist": IMAGE}), ("uint8 [0, 6, 3]",)),
    "thin image": (
        message(images={"front": np.zeros((1, 8000, 3), np.uint8), "wrist": IMAGE}),
        ("'images/front' is 8000x1 pixels; at most 8192 a side and 32:1",),
    ),
    "RGBA": (message(images={"front": np.zeros((4, 6, 4), np.uint8), "wrist": IMAGE}), ("uint8 [4, 6, 4]",)),
    "image as text": (message(images={"front": "image", "wrist": IMAGE}), ("got str 'image'",)),
    "short state": (message(state=STATE[:2]), ("'state' has 2 numbers; the robot's state has 3: x, y, gripper",)),
    "state matrix": (message(state=STATE[None]), ("must be numbers [3]; got float32 [1, 3]",)),
    "state as text": (message(state="0 0 0"), ("must be numbers [3]; got str",)),
    "ragged state": (message(state=[1, [2], 3]), ("must be numbers [3]; got list",)),
    "state not finite": (message(state=[0.0, np.nan, np.inf]), ("not finite: y, gripper",)),
    "state too large": (message(state=[0.0, 0.0, 1e300]), ("not finite: gripper",)),
    "prompt as number": (message(prompt=5), ("'prompt' must be text, got int 5",)),
    "endless prompt": (message(prompt="a" * 5000), ("5000 characters; at most 4096",)),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name: str) -> None:
    given_, words = WRONG[name]
    text = refusal(reader().observation, unpack(pack(given_)))
    assert all(word in text for word in words), text


def test_a_blind_policy_needs_no_images() -> None:
    assert reader(views=()).observation(without("images")).images == {}


@pytest.mark.parametrize(
    "field, words",
    [
        ("images/frnt=a", "did you mean 'images/front'"),
        ("images/front", "give native=theirs"),
        ("images/front=a,b", "only state may have several"),
        ("state=a,,b", "give native=theirs"),
    ],
)
def test_field_maps_that_are_none_are_refused(field: str, words: str) -> None:
    assert words in refusal(reader, field)


# --- chunks -----------------------------------------------------------------------------------------------------------

CHUNK = np.arange(12, dtype=np.float32).reshape(4, 3)


def test_whole_chunks_are_keyed_by_episode_and_step() -> None:
    session, keys = Session(reader(), None), []
    for i in range(6):
        asked = session.ask(message(reset=True) if i in (0, 3) else message())
        assert isinstance(asked, Observation)
        keys.append((asked.start, asked.step))
        np.testing.assert_array_equal(session.answer(asked, CHUNK)["actions"], CHUNK)
    assert keys == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert session.ask({"reset": True}) == {"reset": True} == session.ask({"reset": True})
    assert session.ask(message()).start == 2  # two resets in a row are one


def test_a_chunk_is_handed_out_step_by_step() -> None:
    session = Session(reader(), 3)
    for episode_step in (0, 3):
        asked = session.ask(message())
        assert isinstance(asked, Observation) and asked.step == episode_step
        answers = [session.answer(asked, CHUNK), session.ask({}), session.ask(message())]
        assert [a["chunk_left"] for a in answers] == [2, 1, 0]
        np.testing.assert_array_equal([a["actions"] for a in answers], CHUNK[:3])


@pytest.mark.parametrize("change", [{"reset": True}, {"prompt": "open the drawer"}])
def test_a_reset_or_another_prompt_drops_the_rest(change: dict[str, Any]) -> None:
    session = Session(reader(), 3)
    session.answer(session.ask(message()), CHUNK)
    asked = session.ask(message(**change))
    assert isinstance(asked, Observation) and asked.instruction == change.get("prompt", "push the puck")
    assert (asked.start, asked.step) == ((1, 0) if "reset" in change else (0, 1))
    session.answer(asked, CHUNK)
    session.ask({"reset": True})
    refusal(session.ask, {})


def test_a_refused_message_changes_nothing() -> None:
    session = Session(reader(), 3)
    session.answer(session.ask(message()), CHUNK)
    for wrong in (["a list"], 5, {"prompt": 5}, {"reset": "yes"}, {"reset": True, "prompt": "push the puck"}):
        refusal(session.ask, wrong)
    assert session.ask({})["chunk_left"] == 1


# --- who may ask ------------------------------------------------------------------------------------------------------

TOKEN = "k" * 20


def test_tokens_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVLA_TOKEN", raising=False)
    assert read_token(None) is None
    monkeypatch.setenv("DVLA_TOKEN", TOKEN)
    (tmp_path / "token").write_text(f"{TOKEN[::-1]}x\n")
    assert (read_token(None), read_token(tmp_path / "token")) == (TOKEN, TOKEN + "x")
    for bad in ("short", "", "two words of enough letters", "gebührenpflichtig-sehr"):
        monkeypatch.setenv("DVLA_TOKEN", bad)
        text = refusal(read_token, None)
        assert "DVLA_TOKEN" in text and (not bad or bad not in text)
    (tmp_path / "token").write_bytes(b"\xff\xfe" * 20)
    assert "not text" in refusal(read_token, tmp_path / "token")
    assert "No such file" in refusal(read_token, tmp_path / "none")


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "192.0.2.7"])
def test_other_interfaces_need_a_token(host: str) -> None:
    assert "DVLA_TOKEN" in refusal(require_token, host, 8000, None)
    require_token(host, 8000, TOKEN)


def test_this_machine_needs_none() -> None:
    for host in ("127.0.0.1", "localhost", "127.1.2.3"):
        require_token(host, 8000, None)
    assert "not an interface" in refusal(require_token, "no such host.invalid", 8000, None)


def test_only_the_token_opens() -> None:
    assert (
        allowed([], None) and allowed([f"Api-Key {TOKEN}"], TOKEN) and allowed(["Basic x", f"Api-Key {TOKEN}"], TOKEN)
    )
    for headers in ([], [TOKEN], [f"Api-Key {TOKEN[:-1]}"], [f"Api-Key {TOKEN}x"], ["Api-Key "], ["Api-Key \udcff"]):
        assert not allowed(headers, TOKEN)


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_metrics_are_prometheus_text() -> None:
    metrics = Metrics()
    for i in range(100):
        metrics.took("queue", i / 100)
    metrics.counts["requests"] += 3
    values = dict(line.rsplit(" ", 1) for line in metrics.text().splitlines() if not line.startswith("#"))
    assert values["dvla_requests_total"] == "3" and values["dvla_clients"] == "0"
    assert (
        abs(float(values['dvla_queue_seconds{quantile="0.5"}']) - 0.495) < 1e-6
        and values["dvla_queue_seconds_count"] == "100"
    )
    assert (
        float(values['dvla_queue_seconds{quantile="0.99"}']) > 0.97 and 'dvla_dit_seconds{quantile="0.5"}' not in values
    )
    assert {f"dvla_{name}_total" for name in COUNTS} | {f"dvla_{name}_seconds_count" for name in TIMES} <= set(values)


def test_without_its_packages_serving_says_what_to_install() -> None:
    """Every other command works without them."""
    code = (
        "import sys\nsys.modules['msgpack'] = sys.modules['websockets'] = None\nfrom dvla import cli\n"
        "from dvla.errors import UserError\ncli.run(['train', '--help'])\n"
        "for room in ('client', 'server'):\n    try:\n        __import__(f'dvla.stages.serving.{room}')\n"
        "    except UserError as error:\n        print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.count("pip install 'dvla[serve]'") == 2


def test_the_client_needs_no_torch() -> None:
    code = "import sys, dvla.stages.serving.client; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "False"
    )
