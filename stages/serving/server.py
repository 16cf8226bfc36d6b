"""`dvla serve`: a policy behind a WebSocket on this machine, in the protocol of openpi's client.

On connecting, a client receives what the policy expects (`metadata`). Each of its messages, a packed observation
(`fields.py`), is answered with a packed map with `actions` and `server_timing`; an error with one line of text, after
which the connection remains usable. `GET /healthz` and `GET /metrics` answer on the same port.

Requests with an Origin header are refused: they come from pages in a browser, which could connect to this machine
without its user's knowledge.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import wire  # first: it says what to install where websockets is missing

# isort: split
import numpy as np
from websockets.asyncio.server import Request, Response, ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from dvla_client import ClientError, Limits

from ... import __version__
from ...batch import UNIFIED_DIM
from ...cache.vlm.preprocess import PADDING_RULE
from ...common.signals import handled
from ...errors import UserError
from ..policy.compile import compile_blocks
from ..policy.observation import Observation
from ..policy.policy import Policy
from .access import allowed, listen, names_this_machine
from .batcher import Batcher, PolicyFailed
from .config import ServeConfig
from .fields import ENCODINGS, ObservationReader
from .limits import describe_limits
from .metrics import Metrics
from .session import Session

FULL = 1013  # close code "try again later"
CLOSING = 2.0  # seconds that a client has to answer a closing handshake
QUIET = 60.0  # seconds between two lines about connections that could not be served


class PolicyServer:
    """Serves one policy to its clients: `run` in the main thread, or `in_background`."""

    def __init__(
        self,
        policy: Policy,
        config: ServeConfig = ServeConfig(),  # noqa: B008  # frozen
        token: str | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """`token`: what clients must send.

        `UserError` for a bad field map, or more steps to execute than a chunk has.
        """
        robot, self.horizon = policy.robot, policy.net.config.dit.horizon
        if config.execute is not None and not 1 <= config.execute <= self.horizon:
            raise UserError(
                f"--execute {config.execute}: a chunk of this policy has {self.horizon} steps; give 1 to {self.horizon}"
            )
        views = list(robot.views) if policy.needs_images else []
        state, actions = list(robot.state_map.field_names), list(robot.action_map.field_names)
        about = {"state": state, "actions": actions, "limits": describe_limits(robot)}
        self._limits = None if config.limits == "off" else Limits(about, config.limits)
        checked = {} if self._limits is None else {"require_state": self._limits.require_state}
        self._reader = ObservationReader(
            views, state, config.fields, policy.require_fits, most=config.max_message, **checked
        )
        self._policy, self.config, self._token = policy, config, token
        self.metrics = Metrics()
        self._batcher = Batcher(policy, config.max_batch, config.max_wait_ms / 1e3, self.metrics, say)
        self._say, self._said = say, -QUIET
        self._stopped = False
        self._wake: Callable[[], object] = lambda: None  # wakes the event loop, once there is one
        self.metadata = {
            "server": "dvla",
            "version": __version__,
            "robot": robot.name,
            "views": views,
            **about,
            "images": {"side": policy.encoder.image.resolution, "padding": PADDING_RULE, "encodings": list(ENCODINGS)},
            "state_names": list(robot.state_map.native_names),  # the robot's own, with its units
            "state_units": list(robot.state_map.native_units),
            "action_names": list(robot.action_map.native_names),
            "action_units": list(robot.action_map.native_units),
            "horizon": self.horizon,
            "control_hz": robot.control_hz,
            "execute": config.execute,
            "history": list(policy.history.frames),  # offsets in control steps of the frames that it sees
            "proprio_history": list(policy.history.proprio),
            "max_message": config.max_message,
        }

    def warm_up(self, compiled: bool = False) -> float:
        """Make the first forward passes; seconds of one with a single request.

        Where each batch size costs something once (memory on CUDA, a compilation), also passes with two requests and
        the largest batch, all with a short and a longer instruction.
        """
        policy, side = self._policy, self._policy.encoder.image.resolution
        images = {view: np.zeros((side, side, 3), np.uint8) for view in policy.robot.views}
        state = policy.robot.state_map.to_native(np.zeros(UNIFIED_DIM))
        most = self.config.max_batch if compiled or policy.encoder.device.type == "cuda" else 1
        return self._batcher.warm_up(
            [
                [Observation(images, text, state)] * size
                for size in dict.fromkeys((most, min(2, most), 1))
                for text in ("go", self._longer("go on, and do what a longer sentence says"))
            ]
        )

    def _longer(self, text: str) -> str:
        """As much of `text`, which may be one word, as the policy's encoder has room for."""
        while " " in text:
            try:
                self._policy.require_fits(text)
                break
            except UserError:
                text = text.rpartition(" ")[0]
        return text

    def run(self, sock: socket.socket, ready: Callable[[], None] = lambda: None) -> int | None:
        """Serve until `stop` or a signal, whose number is returned; connections are then closed (1001, going away).

        `ready` is called once connections are accepted.
        """
        stopped: list[int] = []

        def on_signal(number: int, frame: Any) -> None:
            if number == signal.SIGINT and number in stopped:
                raise KeyboardInterrupt  # the second Ctrl-C does not wait
            stopped.append(number)
            self.stop()

        # Ignored where it was started in the background: Ctrl-C is not meant for it.
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        with handled(on_signal, (signal.SIGTERM,) if ignored else (signal.SIGTERM, signal.SIGINT)):
            asyncio.run(self._serve(sock, ready))
        return stopped[0] if stopped else None

    def stop(self) -> None:
        """Make `run` return, even if it has not begun; from any thread or signal handler."""
        self._stopped = True
        self._wake()

    async def _serve(self, sock: socket.socket, ready: Callable[[], None]) -> None:
        c, ended, loop = self.config, asyncio.Event(), asyncio.get_running_loop()
        quiet = logging.getLogger("dvla.serve")  # malformed requests from others are not worth logging
        quiet.addHandler(logging.NullHandler())
        quiet.propagate = False
        loop.set_exception_handler(lambda _, found: self._trouble(found["message"], found.get("exception")))
        self._wake = lambda: loop.call_soon_threadsafe(ended.set)
        if self._stopped:  # a signal may have come before there was a loop
            ended.set()
        work = asyncio.create_task(self._batcher.work())
        work.add_done_callback(lambda task: ended.set())
        logging.getLogger("asyncio").addFilter(_unbroken)
        try:
            async with serve(
                self._client,
                sock=sock,
                process_request=self._request,
                origins=[None],
                compression=None,
                max_size=c.max_message,
                max_queue=1,
                ping_interval=c.ping_interval,
                ping_timeout=c.ping_interval,
                close_timeout=CLOSING,
                logger=quiet,
                server_header=None,
            ):
                ready()
                await ended.wait()
        finally:
            self._wake = lambda: None
            logging.getLogger("asyncio").removeFilter(_unbroken)
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work

    def _trouble(self, what: str, error: BaseException | None) -> None:
        """Say in a line what went wrong with a connection, unless that was done lately: others can cause it."""
        if time.monotonic() - self._said >= QUIET:
            self._said = time.monotonic()
            self._say(" ".join(f"{what}: {error!r}".split())[:300])

    def _request(self, connection: ServerConnection, request: Request) -> Response | None:
        """The response to an HTTP request; None begins a WebSocket."""
        path = request.path.partition("?")[0]
        if self._token is None and not names_this_machine(request.headers.get("Host"), self.config.host):
            self.metrics.counts["unauthorised"] += 1
            return connection.respond(
                http.HTTPStatus.FORBIDDEN, "this server answers to an address, to localhost or to its --host\n"
            )
        if path == "/healthz":
            return (
                connection.respond(http.HTTPStatus.OK, "OK\n")
                if self._batcher.healthy
                else connection.respond(
                    http.HTTPStatus.SERVICE_UNAVAILABLE, "the latest forward passes failed; see the server's log\n"
                )
            )
        if not allowed(request.headers.get_all("Authorization"), self._token):
            self.metrics.counts["unauthorised"] += 1
            return connection.respond(
                http.HTTPStatus.UNAUTHORIZED, "a token is required: Authorization: Api-Key TOKEN\n"
            )
        return connection.respond(http.HTTPStatus.OK, self.metrics.text()) if path == "/metrics" else None

    async def _client(self, connection: ServerConnection) -> None:
        """Serve one connection until it ends."""
        if self.metrics.clients >= self.config.max_clients:
            self.metrics.counts["full"] += 1
            await connection.close(FULL, f"{self.metrics.clients} clients are connected, the maximum of this server")
            return
        self.metrics.clients += 1
        session, gone, before = (
            Session(self._reader, self.config.execute, self._policy.history),
            asyncio.create_task(connection.wait_closed()),
            None,
        )
        try:
            await self._send(connection, wire.pack(self.metadata))
            async for data in connection:
                began = time.perf_counter()
                answer = await self._answer(session, data, gone, before)
                if answer is None:
                    break
                if isinstance(answer, bytes):
                    self.metrics.took("total", time.perf_counter() - began)
                await self._send(connection, answer)
                before = time.perf_counter() - began
        except ConnectionClosed:
            pass
        except TimeoutError:
            self.metrics.counts["slow"] += 1
            connection.transport.abort()  # a closing handshake would wait for the client too
        finally:
            self.metrics.clients -= 1
            gone.cancel()

    async def _send(self, connection: ServerConnection, data: bytes | str) -> None:
        """`TimeoutError` when the client does not read."""
        async with asyncio.timeout(self.config.send_timeout):
            await connection.send(data)

    async def _answer(
        self, session: Session, data: bytes | str, gone: asyncio.Task[None], before: float | None
    ) -> bytes | str | None:
        """The answer to one message: bytes, one line of text for an error, or None if the client has gone.

        `before`: seconds that the last message took.
        """
        counts, timing = self.metrics.counts, {} if before is None else {"prev_total_ms": before * 1e3}
        try:
            if isinstance(data, str):
                raise UserError("a message must be binary (msgpack), got text")
            asked = session.ask(wire.unpack(data))
            if not isinstance(asked, Observation):
                counts["queued"] += "actions" in asked
                return wire.pack(asked | {"server_timing": timing})
            future = self._batcher.submit(asked)
            either: set[asyncio.Future[Any]] = {future, gone}
            await asyncio.wait(either, timeout=self.config.answer_timeout, return_when=asyncio.FIRST_COMPLETED)
            if not future.done():
                future.cancel()
                counts["vanished" if gone.done() else "timeouts"] += 1
                return None if gone.done() else f"not answered within {self.config.answer_timeout:g} s; ask again"
            found = future.result()
            counts["requests"] += 1
            timing |= {"infer_ms": found.infer * 1e3, "queue_ms": found.queue * 1e3, "batch": found.size}
            actions = found.actions if self._limits is None else self._limits.chunk(found.actions)
            return wire.pack(session.answer(asked, actions) | {"server_timing": timing})
        except (UserError, ClientError) as error:
            counts["malformed"] += 1
            return " ".join(str(error).split())
        except PolicyFailed as error:
            counts["failed"] += 1
            return str(error)
        except Exception as error:  # whatever it is, the client can ask for something else
            counts["malformed"] += 1
            self._trouble("a message could not be read", error)
            return f"the message could not be read: {type(error).__name__}"


def _unbroken(record: logging.LogRecord) -> bool:
    """Leaves out what asyncio logs for each write to a socket that its client has closed."""
    return not record.getMessage().startswith("socket.send() raised exception")


def load_policy(path: Path, device: str, compile: bool = False, **options: Any) -> Policy:
    """The policy to serve; `options` as for `Policy.from_pretrained`."""
    policy = Policy.from_pretrained(path, device=device, **options)
    if compile:
        compile_blocks(policy.net)
    return policy


@contextlib.contextmanager
def in_background(server: PolicyServer) -> Iterator[int]:
    """Run the server in a thread; gives its port."""
    sock, ready = listen(server.config.host, server.config.port), threading.Event()
    port = sock.getsockname()[1]
    thread = threading.Thread(target=server.run, args=(sock, ready.set), daemon=True)
    thread.start()
    while not ready.wait(0.1):
        if not thread.is_alive():
            raise RuntimeError("the server ended before it was ready")
    try:
        yield port
    finally:
        server.stop()
        thread.join()
