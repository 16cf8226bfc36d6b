"""`dvla serve` on a port of this machine: answers as the policy does, and keeps running whatever clients do."""

from __future__ import annotations

import contextlib
import copy
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from dvla.cache.vlm.tiny_qwen3vl import make_tiny_qwen3vl
from dvla.errors import UserError
from dvla.stages.policy.policy import Policy
from dvla.stages.serving.access import listen
from dvla.stages.serving.client import PolicyClient
from dvla.stages.serving.config import ServeConfig
from dvla.stages.serving.server import PolicyServer, in_background
from dvla.stages.serving.wire import pack, unpack
from dvla.stages.simulation.envs import Observation
from support.cli_runner import Dvla, refused, until
from support.repository import ROOT
from support.run_samples import TINY, VIEWS, make_run, observations
from support.tolerances import assert_same_actions

TOKEN = "a-token-of-enough-letters"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("serve")
    return make_run(base / "run", make_tiny_qwen3vl(base / "vlm", TINY))


@pytest.fixture(scope="module")
def policy(run: Path) -> Policy:
    return Policy.from_pretrained(run)


def acting(policy: Policy, act_batch: Callable[..., np.ndarray]) -> Policy:
    """The policy with another `act_batch`."""
    other = copy.copy(policy)
    other.act_batch = act_batch  # type: ignore[method-assign]
    return other


class Gate:
    """A policy whose forward passes wait until the gate is open; `passes` are their observations."""

    def __init__(self, policy: Policy) -> None:
        self.open, self.passes, self._policy = threading.Event(), [], policy
        self.policy = acting(policy, self._act)

    def _act(self, seen: Sequence[Observation], mark: Callable[[str], None]) -> np.ndarray:
        self.passes.append(list(seen))
        assert self.open.wait(20)
        return self._policy.act_batch(seen, mark)


@contextlib.contextmanager
def serving(policy: Policy, token: str | None = None, **config: Any) -> Iterator[tuple[PolicyServer, int]]:
    server = PolicyServer(policy, ServeConfig(**{"port": 0} | config), token)
    with in_background(server) as port:
        yield server, port


def message(seen: Observation) -> dict[str, Any]:
    return {"images": seen.images, "state": seen.state, "prompt": seen.instruction}


def raw(port: int, **options: Any) -> ClientConnection:
    """A connection whose metadata has been read."""
    address = f"ws://127.0.0.1:{port}"
    connection = connect(address, compression=None, max_size=None, proxy=None, **options).__enter__()
    assert unpack(connection.recv())["robot"] == "toy"
    return connection


def get(port: int, path: str, token: str | None = None) -> tuple[int, str]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", headers={"Authorization": f"Api-Key {token}"} if token else {}
    )
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


# --- what it answers --------------------------------------------------------------------------------------------------


def test_it_answers_as_the_policy_acts(policy: Policy) -> None:
    seen = observations(1)[0]
    with serving(policy) as (server, port), PolicyClient(port=port) as client:
        assert client.metadata == {**server.metadata, "execute": None}
        assert (client.metadata["views"], client.metadata["horizon"], len(client.metadata["actions"])) == (
            list(VIEWS),
            4,
            3,
        )
        first, second = client.infer(message(seen)), client.infer(message(seen))
        np.testing.assert_array_equal(first["actions"], policy.act(seen.images, seen.instruction, seen.state))
        assert first["actions"].dtype == np.float32 and not np.array_equal(
            first["actions"], second["actions"]
        )  # step 1: other noise
        assert (
            first["server_timing"]["batch"] == 1
            and second["server_timing"]["prev_total_ms"] >= second["server_timing"]["infer_ms"] / 1e3
        )
        client.reset()
        assert server.metrics.counts["requests"] == 2
    with serving(policy) as (_, port), PolicyClient(port=port) as client:
        np.testing.assert_array_equal(client.infer(message(seen))["actions"], first["actions"])


def test_one_action_a_step_costs_a_pass_every_few(policy: Policy) -> None:
    seen = observations(1)[0]
    with serving(policy, execute=3) as (server, port), PolicyClient(port=port) as client:
        assert client.metadata["execute"] == 3
        named = {part: len(client.metadata[part]) for part in ("state_names", "action_names", "action_units")}
        expected = {"state_names": "state", "action_names": "actions", "action_units": "actions"}
        assert named == {part: len(client.metadata[of]) for part, of in expected.items()}
        actions = [client.infer(message(seen))["actions"], client.infer({})["actions"], client.infer({})["actions"]]
        np.testing.assert_array_equal(actions, policy.act(seen.images, seen.instruction, seen.state)[:3])
        assert (server.metrics.counts["batches"], server.metrics.counts["queued"]) == (1, 2)
        with pytest.raises(UserError, match="'prompt' .* is missing"):
            client.infer({})
        client.infer(message(seen))
        client.reset()
        assert client.infer(message(seen))["chunk_left"] == 2 and server.metrics.counts["batches"] == 3


def test_a_blind_policy_asks_for_no_images(run: Path) -> None:
    seen = observations(1)[0]
    with serving(Policy.from_pretrained(run, blind=True)) as (_, port), PolicyClient(port=port) as client:
        assert client.metadata["views"] == []
        assert client.infer({"state": seen.state, "prompt": seen.instruction})["actions"].shape == (4, 3)


def test_what_waits_goes_through_one_pass(policy: Policy) -> None:
    """Four clients ask while the first one's pass is at work; with at most three a pass, that makes passes of 1, 3 and
    1."""
    gate, seen = Gate(policy), observations(3) + observations(2)
    found: dict[int, np.ndarray] = {}

    def ask(i: int, port: int) -> None:
        with PolicyClient(port=port) as client:
            found[i] = client.infer(message(seen[i]))["actions"]

    with serving(gate.policy, max_batch=3, max_wait_ms=0.0) as (server, port):
        threads = [threading.Thread(target=ask, args=(i, port)) for i in range(5)]
        threads[0].start()
        until(lambda: len(gate.passes) == 1)
        for thread in threads[1:]:
            thread.start()
        until(lambda: server._batcher._waiting.qsize() == 4)
        gate.open.set()
        for thread in threads:
            thread.join(20)
        assert [len(one) for one in gate.passes] == [1, 3, 1] and server.metrics.counts["batches"] == 3
    for i, one in enumerate(seen):
        assert_same_actions(found[i], policy.act(one.images, one.instruction, one.state))


def test_requests_wait_for_each_other(policy: Policy) -> None:
    """Two clients are connected: the first one's request waits for the other's, which comes within the time allowed."""
    gate, seen = Gate(policy), observations(2)
    gate.open.set()
    with serving(gate.policy, max_wait_ms=15e3) as (_, port), raw(port) as one, raw(port) as two:
        one.send(pack(message(seen[0])))
        time.sleep(0.05)
        assert not gate.passes
        two.send(pack(message(seen[1])))
        assert all(unpack(c.recv(10))["server_timing"]["batch"] == 2 for c in (one, two))


def test_warming_up_covers_what_costs_something_once(policy: Policy) -> None:
    passes: list[tuple[int, str]] = []

    def act(seen: Sequence[Observation], mark: Callable[[str], None] = lambda part: None) -> np.ndarray:
        passes.append((len(seen), seen[0].instruction))
        return policy.act_batch(seen, mark)

    server = PolicyServer(acting(policy, act), ServeConfig(max_batch=4))
    assert server.warm_up() > 0 and {size for size, _ in passes} == {1}
    passes.clear()
    server.warm_up(compiled=True)
    assert {size for size, _ in passes} == {1, 2, 4} and len(set(passes)) == 6 and passes[-1][0] == 1


# --- what is wrong with a message -------------------------------------------------------------------------------------


def truncated(seen: Observation) -> bytes:
    return pack(message(seen))[:-5]


BAD: dict[str, tuple[Callable[[Observation], bytes | str], str]] = {
    "text": (lambda seen: "hello", "binary"),
    "nothing": (lambda seen: b"", "msgpack"),
    "garbage": (lambda seen: b"\xc1\xff\x00" * 50, "msgpack"),
    "truncated": (truncated, "msgpack"),
    "a list": (lambda seen: pack([1, 2]), "got list"),
    "nested too deep": (lambda seen: b"\x91" * 5000, "msgpack"),
    "no view": (lambda seen: pack({**message(seen), "images": {"front": seen.images["front"]}}), "'images/wrist'"),
    "wrong dtype": (
        lambda seen: pack({**message(seen), "images": {v: p / 255 for v, p in seen.images.items()}}),
        "uint8 [H, W, 3]",
    ),
    "wrong shape": (
        lambda seen: pack({**message(seen), "state": np.zeros(5)}),
        "has 5 numbers; the robot's state has 3",
    ),
    "not finite": (lambda seen: pack({**message(seen), "state": np.full(3, np.nan)}), "not finite"),
    "a number out of range": (
        lambda seen: msgpack.packb({"state": {b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}}),
        "not a msgpack message: Python integer 300 out of bounds",
    ),
    "an infinite number": (
        lambda seen: pack({**message(seen), "state": [0.0, 1e300, -float("inf")]}),
        "has numbers that are not finite: right_eef_pos_y, right_gripper_open",
    ),
    "a long list": (lambda seen: msgpack.packb({"state": [0] * 70_000}), "exceeds max_array_len"),
    "pickle": (
        lambda seen: msgpack.packb(
            {**{"prompt": "x"}, "state": {b"__ndarray__": True, b"data": b"c", b"dtype": "|O", b"shape": [1]}}
        ),
        "'|O'",
    ),
}


@pytest.fixture(scope="module")
def plain_server(policy: Policy) -> Iterator[tuple[PolicyServer, int]]:
    with serving(policy) as one:
        yield one


@pytest.mark.parametrize("name", BAD)
def test_bad_messages_are_answered_in_one_line(
    plain_server: tuple[PolicyServer, int], policy: Policy, name: str
) -> None:
    (server, port), (make, words), seen = plain_server, BAD[name], observations(1)[0]
    before = server.metrics.counts["malformed"]
    with raw(port) as connection:
        for _ in range(2):
            connection.send(make(seen))
            answer = connection.recv(10)
            assert isinstance(answer, str) and words in answer and "\n" not in answer
        connection.send(pack(message(seen)))  # the connection is still usable
        np.testing.assert_array_equal(
            unpack(connection.recv(10))["actions"], policy.act(seen.images, seen.instruction, seen.state)
        )
    assert server.metrics.counts["malformed"] == before + 2


def test_an_instruction_too_long_for_the_encoder_is_its_sender_s_alone(policy: Policy) -> None:
    """It is refused before it shares a forward pass with others, and none is needed to start."""
    encoder = copy.copy(policy.encoder)

    def require_fits(views: int, instructions: Sequence[str]) -> None:
        if max(map(len, instructions)) > 6:
            raise UserError("the prompt is too long; give --prompt-tokens")

    encoder.require_fits = require_fits
    narrow = copy.copy(policy)
    narrow.encoder = encoder
    seen = observations(1)[0]
    server = PolicyServer(narrow, ServeConfig(port=0))
    server.warm_up()
    with in_background(server) as port, PolicyClient(port=port) as client:
        with pytest.raises(UserError, match="--prompt-tokens"):
            client.infer({**message(seen), "prompt": "push the puck"})
        assert client.infer({**message(seen), "prompt": "push"})["actions"].ndim == 2


def test_a_message_that_is_too_large_closes_its_connection_only(policy: Policy) -> None:
    seen = observations(1)[0]
    with serving(policy, max_message_mib=1 / 16) as (_, port), raw(port) as other:
        with raw(port) as connection, pytest.raises(ConnectionClosed) as error:
            connection.send(bytes(2**17))
            connection.recv(10)
        assert error.value.rcvd.code == 1009
        other.send(pack(message(seen)))
        assert isinstance(other.recv(10), bytes)


def test_the_client_knows_what_is_too_large(policy: Policy) -> None:
    seen = observations(1)[0]
    large = {**message(seen), "images": {view: np.zeros((200, 200, 3), np.uint8) for view in VIEWS}}
    with serving(policy, max_message_mib=1 / 16) as (_, port), PolicyClient(port=port) as client:
        with pytest.raises(UserError, match=r"has 24\d{4} bytes; .* takes 65536: send smaller images, or") as error:
            client.infer(large)
        assert "\n" not in str(error.value)
        client.infer(message(seen))


def test_what_nobody_foresaw_is_a_line_for_the_client_and_one_for_the_log(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("of\nall things")

    server, seen, said = PolicyServer(policy, ServeConfig(port=0)), observations(1)[0], []
    server._say = said.append
    with in_background(server) as port, raw(port) as connection:
        with monkeypatch.context() as patch:
            patch.setattr("dvla.stages.serving.session.Session.ask", broken)
            for _ in range(3):
                connection.send(pack(message(seen)))
                assert connection.recv(10) == "the message could not be read: ZeroDivisionError"
        connection.send(pack(message(seen)))
        assert isinstance(connection.recv(10), bytes)
    assert said == ["a message could not be read: ZeroDivisionError('of\\nall things')"]


def test_strangers_do_no_harm(plain_server: tuple[PolicyServer, int]) -> None:
    _, port = plain_server
    for sent in (
        b"\x00\xff garbage \r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n",
        b"",
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as stranger:
            stranger.sendall(sent)
            stranger.shutdown(socket.SHUT_WR)
            while stranger.recv(4096):
                pass
    assert get(port, "/healthz") == (200, "OK\n")
    with PolicyClient(port=port) as client:
        client.infer(message(observations(1)[0]))


# --- what is wrong with the policy ------------------------------------------------------------------------------------


def test_one_request_does_not_spoil_the_others(policy: Policy) -> None:
    def act(seen: Sequence[Observation], mark: Callable[[str], None]) -> np.ndarray:
        if any(one.instruction == "fail" for one in seen):
            raise ValueError("no\nidea")
        if any(one.instruction == "refuse" for one in seen):
            raise UserError("that is too long")
        out = policy.act_batch(seen, mark)
        return out * np.array([np.nan if one.instruction == "nan" else 1.0 for one in seen])[:, None, None]

    seen, answers, log = observations(1)[0], {}, []
    server = PolicyServer(acting(policy, act), ServeConfig(port=0, max_wait_ms=15e3), say=log.append)
    prompts = ("push the puck", "fail", "refuse", "nan")
    with in_background(server) as port, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(raw(port)) for _ in prompts]
        for client, prompt in zip(clients, prompts):
            client.send(pack({**message(seen), "prompt": prompt}))
        answers = [client.recv(10) for client in clients]
        assert_same_actions(unpack(answers[0])["actions"], policy.act(seen.images, prompts[0], seen.state))
        assert answers[1:] == [
            "the policy failed: ValueError: no idea",
            "that is too long",
            "the policy returned actions that are not finite",
        ]
        for client in clients:  # all still usable, and now they wait for nobody
            client.send(pack(message(seen)))
        assert all(isinstance(client.recv(10), bytes) for client in clients)
        assert (server.metrics.counts["failed"], server.metrics.counts["malformed"]) == (2, 1)
    assert len(log) == 1 and "Traceback" in log[0]  # for who runs the server


def test_health_tells_of_a_policy_that_keeps_failing(policy: Policy) -> None:
    broken = threading.Event()
    broken.set()

    def act(seen: Sequence[Observation], mark: Callable[[str], None]) -> np.ndarray:
        if broken.is_set():
            raise RuntimeError("CUDA error")
        return policy.act_batch(seen, mark)

    with serving(acting(policy, act)) as (_, port), PolicyClient(port=port) as client:
        for _ in range(3):
            assert get(port, "/healthz")[0] == 200
            with pytest.raises(UserError, match="RuntimeError: CUDA error"):
                client.infer(message(observations(1)[0]))
        assert get(port, "/healthz")[0] == 503
        broken.clear()
        client.infer(message(observations(1)[0]))
        assert get(port, "/healthz")[0] == 200


# --- clients that are slow, gone, or too many -------------------------------------------------------------------------


def test_a_request_that_takes_too_long_is_given_up(policy: Policy) -> None:
    gate, seen = Gate(policy), observations(1)[0]
    with serving(gate.policy, answer_timeout=0.2) as (server, port), raw(port) as connection:
        connection.send(pack(message(seen)))
        assert "not answered within 0.2 s" in connection.recv(10)
        gate.open.set()
        until(lambda: server.metrics.counts["batches"] == 1)
        connection.send(pack(message(seen)))  # and its late answer is not taken for the next one's
        np.testing.assert_array_equal(
            unpack(connection.recv(10))["actions"], policy.act(seen.images, seen.instruction, seen.state)
        )
        assert server.metrics.counts["timeouts"] == 1


def test_what_vanished_clients_asked_is_not_computed(policy: Policy) -> None:
    gate, seen = Gate(policy), observations(3)
    with serving(gate.policy, max_wait_ms=0.0) as (server, port), raw(port) as first:
        first.send(pack(message(seen[0])))
        until(lambda: len(gate.passes) == 1)  # this one is at work, and those queue behind it
        gone = [raw(port), raw(port)]
        for connection in gone:
            connection.send(pack(message(seen[1])))
        until(lambda: server._batcher._waiting.qsize() == 2)
        for connection in gone:
            connection.socket.shutdown(socket.SHUT_RDWR)  # without a word
        until(lambda: server.metrics.counts["vanished"] == 2)
        gate.open.set()
        assert isinstance(first.recv(10), bytes)
        first.send(pack(message(seen[2])))
        assert isinstance(first.recv(10), bytes)
        assert [[one.instruction for one in each] for each in gate.passes] == [
            [seen[0].instruction],
            [seen[2].instruction],
        ]
        until(lambda: server.metrics.clients == 1)


def test_a_client_that_vanishes_during_its_pass_does_no_harm(policy: Policy) -> None:
    gate, seen = Gate(policy), observations(1)[0]
    with serving(gate.policy) as (server, port):
        connection = raw(port)
        connection.send(pack(message(seen)))
        until(lambda: len(gate.passes) == 1)
        connection.socket.shutdown(socket.SHUT_RDWR)
        until(lambda: server.metrics.clients == 0)
        gate.open.set()
        with PolicyClient(port=port) as client:
            client.infer(message(seen))


def test_a_client_that_never_reads_is_disconnected(policy: Policy) -> None:
    def act(seen: Sequence[Observation], mark: Callable[[str], None]) -> np.ndarray:
        policy.act_batch(seen, mark)
        return np.zeros((len(seen), 4000, 1000), np.float32)  # 16 MB: more than a socket's buffers

    with serving(acting(policy, act), send_timeout=0.3, max_wait_ms=0.0) as (server, port):
        deaf = raw(port, max_queue=1)
        for _ in range(6):  # read nothing: the client library's buffer is full after a few frames
            deaf.send(pack(message(observations(1)[0])))
        with raw(port) as other:
            until(lambda: server.metrics.counts["slow"] == 1)
            other.send(pack(message(observations(1)[0])))
            assert unpack(other.recv(20))["actions"].shape == (4000, 1000)
        until(lambda: server.metrics.clients == 0)


def test_a_silent_connection_that_is_gone_is_closed(policy: Policy) -> None:
    """A peer that answers no ping: its host lost power, or its process hangs."""
    with serving(policy, ping_interval=0.2) as (server, port), socket.create_connection(("127.0.0.1", port)) as peer:
        peer.sendall(
            b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        until(lambda: server.metrics.clients == 1)
        until(lambda: server.metrics.clients == 0)


def test_one_client_too_many_is_told(policy: Policy) -> None:
    with serving(policy, max_clients=2) as (server, port), raw(port), PolicyClient(port=port):
        with pytest.raises(UserError, match="closed the connection.*2 clients are connected"):
            PolicyClient(port=port)
        assert server.metrics.counts["full"] == 1 and get(port, "/healthz")[0] == 200
    with serving(policy, max_clients=1) as (server, port):
        for _ in range(3):
            with PolicyClient(port=port) as client:
                client.infer(message(observations(1)[0]))
            until(lambda: server.metrics.clients == 0)


# --- who is let in ----------------------------------------------------------------------------------------------------


def test_a_token_is_asked_for(policy: Policy) -> None:
    with serving(policy, TOKEN) as (server, port):
        for wrong in (None, TOKEN + "x", TOKEN[:-1]):
            with pytest.raises(UserError, match="401"):
                PolicyClient(port=port, token=wrong)
        assert (
            get(port, "/metrics")[0] == 401
            and get(port, "/healthz")[0] == 200
            and get(port, "/metrics", TOKEN)[0] == 200
        )
        with PolicyClient(port=port, token=TOKEN) as client:
            client.infer(message(observations(1)[0]))
        assert server.metrics.counts["unauthorised"] == 4


def test_pages_in_a_browser_are_refused(plain_server: tuple[PolicyServer, int]) -> None:
    with pytest.raises(InvalidStatus) as error:
        raw(plain_server[1], origin="http://example.com")
    assert error.value.response.status_code == 403


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("localhost.evil.example", 403),
        ("", 403),
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("127.0.0.1:9", 200),
        ("[::1]:9", 200),
    ],
)
def test_a_page_that_pointed_its_own_name_here_is_refused(
    plain_server: tuple[PolicyServer, int], name: str, status: int
) -> None:
    """DNS rebinding: its requests have no Origin, but its name as the host."""
    connection = http.client.HTTPConnection("127.0.0.1", plain_server[1], timeout=10)
    connection.request("GET", "/metrics", headers={"Host": name})
    assert connection.getresponse().status == status
    connection.close()


def test_metrics_over_http(policy: Policy) -> None:
    with serving(policy) as (_, port), PolicyClient(port=port) as client:
        for _ in range(3):
            client.infer(message(observations(1)[0]))
        status, text = get(port, "/metrics")
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert (
        status == 200
        and values["dvla_clients"] == "1"
        and values["dvla_requests_total"] == values["dvla_batches_total"] == "3"
    )
    for part in ("queue", "encode", "dit", "total"):
        assert (
            values[f"dvla_{part}_seconds_count"] == "3" and float(values[f'dvla_{part}_seconds{{quantile="0.5"}}']) >= 0
        )
    assert float(values["dvla_encode_seconds_sum"]) + float(values["dvla_dit_seconds_sum"]) <= float(
        values["dvla_total_seconds_sum"]
    )


# --- the client -------------------------------------------------------------------------------------------------------


def test_the_client_says_what_is_wrong(policy: Policy) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(UserError, match=f"cannot connect to the policy server at 127.0.0.1:{port}"):
        PolicyClient(port=port)
    gate = Gate(policy)
    with serving(gate.policy) as (_, port):
        with PolicyClient(port=port, timeout=0.2) as client:
            with pytest.raises(UserError, match="refused: 'prompt' .* is missing"):
                client.infer({"state": [0, 0, 0]})
            with pytest.raises(UserError, match="cannot be sent: object is not a map"):
                client.infer({"state": object()})
            with pytest.raises(UserError, match="did not answer within 0.2 s"):
                client.infer(message(observations(1)[0]))
            with pytest.raises(UserError, match="closed"):
                client.infer(message(observations(1)[0]))
        gate.open.set()


def test_clients_are_told_that_the_server_goes(policy: Policy) -> None:
    with serving(policy) as (_, port):
        connection = raw(port)
    with pytest.raises(ConnectionClosed) as error:
        connection.recv(10)
    assert error.value.rcvd.code == 1001


def test_a_stop_that_comes_early_is_not_lost(policy: Policy) -> None:
    server = PolicyServer(policy, ServeConfig(port=0))
    server.stop()
    assert server.run(listen(server.config.host, server.config.port)) is None


def test_openpis_client(plain_server: tuple[PolicyServer, int], policy: Policy) -> None:
    theirs = pytest.importorskip("openpi_client.websocket_client_policy")
    seen, client = observations(1)[0], theirs.WebsocketClientPolicy("127.0.0.1", plain_server[1])
    assert client.get_server_metadata()["robot"] == "toy"
    np.testing.assert_array_equal(
        client.infer(message(seen))["actions"], policy.act(seen.images, seen.instruction, seen.state)
    )
    with pytest.raises(RuntimeError, match="Error in inference server:\n'images/front'"):
        client.infer({"prompt": "push", "state": seen.state})


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_the_command_and_the_documented_client(
    run: Path, tmp_path: Path, dvla: Dvla, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    """The command serves in this thread; another one asks with the lines of docs/serving.md, and then sends the signal
    while a client is connected."""
    page = (ROOT / "docs" / "serving.md").read_text()
    snippet = page.split("<!-- standalone client; run by the tests -->\n```python\n")[1].split("```")[0]
    token, found, ready, serve = TOKEN if code else None, [], threading.Event(), PolicyServer.run

    def running(server: PolicyServer, sock: socket.socket, told: Callable[[], None]) -> int | None:
        found.append(sock.getsockname()[1])
        return serve(server, sock, lambda: (told(), ready.set()))

    def ask() -> None:
        try:
            assert ready.wait(60)
            header = f', additional_headers={{"Authorization": "Api-Key {token}"}}' if token else ""
            script = snippet.replace(":8000", f":{found[0]}").replace("max_size=None", f"max_size=None{header}")
            with PolicyClient(port=found[0], token=token):
                found.append(
                    subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
                )
        finally:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(PolicyServer, "run", running)
    monkeypatch.setenv("DVLA_TOKEN", TOKEN) if token else monkeypatch.delenv("DVLA_TOKEN", raising=False)
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    result = dvla("serve", run, "--port", 0, "--device", "cpu", *(["--host", "0.0.0.0"] if token else []))
    thread.join(20)
    assert result.code == code and f":{found[0]}" in result.out and "ended: 1 answer" in result.out, result
    assert "Traceback" not in result.err and TOKEN not in result.out + result.err
    assert np.array(found[1].stdout.replace("[", " ").replace("]", " ").split(), float).shape == (12,), found[1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_bad_options_are_refused_before_anything_is_loaded(
    run: Path, tmp_path: Path, dvla: Dvla, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DVLA_TOKEN", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(Policy, "from_pretrained", lambda *_, **__: pytest.fail("loaded the policy"))
        refused(dvla("serve", run, "--host", "0.0.0.0"), "DVLA_TOKEN", "--token-file")
        refused(dvla("serve", run, "--token-file", tmp_path / "none"), "cannot read", "none")
        refused(dvla("serve", run, "--port", 70000), "port is 70000; it must be")
        for option, value in (
            ("--max-batch", 0),
            ("--max-wait-ms", "inf"),
            ("--max-message-mib", "1e300"),
            ("--timeout", "nan"),
            ("--max-clients", 10**9),
        ):
            refused(dvla("serve", run, option, value), "it must be", option)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            refused(dvla("serve", run, "--port", taken.getsockname()[1]), "in use", "--port")
    refused(dvla("serve", tmp_path / "nothing", "--port", 0), "nothing")
    for options, words in (
        (("--execute", 9), "--execute 9: a chunk of this policy has 4 steps"),
        (("--field", "imges/front=a"), "did you mean 'images/front'"),
    ):
        result = dvla("serve", run, "--port", 0, "--device", "cpu", *options)
        assert result.code == 2 and words in result.err and len(result.err.splitlines()) == 1
