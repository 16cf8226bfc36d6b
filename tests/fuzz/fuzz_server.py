"""Fuzz `dvla serve`: damaged and absurd messages, and clients that break off, send garbage or do not read.

    python tests/fuzz/fuzz_server.py --count 2000 --seed 0
    python tests/fuzz/fuzz_server.py --seed 0 --only 137      # one again

One server, in a process of its own, gets all of it. After each trial it must answer a sound request as before, and what
it printed is counted. `python` runs the `dvla` that it finds: another checkout is tried with PYTHONPATH.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from PIL import Image
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dvla.cache.actions.history import History  # noqa: E402
from dvla.cache.vlm.tiny_qwen3vl import make_tiny_qwen3vl  # noqa: E402
from dvla.stages.serving.wire import pack, unpack  # noqa: E402
from support.run_samples import TINY, make_run, observations  # noqa: E402

SECONDS = 10.0  # for an answer
LIMIT_MIB = 1  # of a message
# right: answered with actions; refused: with one line; closed: as it must be; the rest are faults.
OUTCOMES = ("right", "refused", "closed", "dropped", "silent", "noise", "wrong", "died")
FAULTS = OUTCOMES[3:]
SOUND = {"images": observations(1)[0].images, "state": observations(1)[0].state, "prompt": "push the puck"}


@dataclass
class Server:
    """A `dvla serve` in a process of its own."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path  # what it prints
    read: int = 0  # bytes of it

    def new(self) -> str:
        """What it printed since the last call."""
        text = self.log.read_bytes()[self.read :]
        self.read += len(text)
        return text.decode(errors="replace")

    def nbytes(self) -> int:
        """Resident memory."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def server(where: Path) -> Iterator[Server]:
    """A server of a tiny policy, whose files are in `where`."""
    history, log = History((0, -2, -5), (0, -1)), where / "log"
    run = make_run(where / "run", make_tiny_qwen3vl(where / "vlm", TINY), history=history)
    command = [sys.executable, "-m", "dvla.cli", "serve", str(run), "--port", "0", "--device", "cpu"]
    with open(log, "wb") as out:
        environment = {**os.environ, "COLUMNS": "500", "OMP_NUM_THREADS": "1"}
        limits = ["--max-message-mib", str(LIMIT_MIB), "--max-clients", "4"]
        process = subprocess.Popen([*command, *limits], stdout=out, stderr=out, env=environment, cwd=where)
    try:
        while not (found := re.search(rb"ws://127.0.0.1:(\d+)", log.read_bytes())):
            if process.poll() is not None:
                raise SystemExit(log.read_text())
            time.sleep(0.05)
        yield Server(process, int(found[1]), log, log.stat().st_size)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


def client(port: int) -> ClientConnection:
    """A connection whose metadata has been read."""
    address, limits = f"ws://127.0.0.1:{port}", {"compression": None, "max_size": None, "proxy": None}
    connection = connect(address, open_timeout=SECONDS, **limits).__enter__()  # closed by the caller
    connection.recv(SECONDS)
    return connection


# --- messages ---------------------------------------------------------------------------------------------------------

NUMBERS = (float("nan"), float("inf"), -float("inf"), 1e300, -1e300, 3.4e38, 1e-320, 2**63, 2**64 - 1, -(2**63), 0)
OTHERS: tuple[Any, ...] = (None, True, "", "x" * 5000, "\x00\x1b[2J", b"", b"\xff" * 9, [], {}, [[]], [{}], {"a": {}})


def array(rng: random.Random) -> Any:
    """An array's map, as a client could write it."""
    dtype = rng.choice(
        ("|u1", "<f4", "<f8", "<f2", ">f4", "<f16", "<i8", "<u3", "|b1", "|O", "<U4", "<M8", "", "f4,f4", 3)
    )
    shape = rng.choice(([3], [64, 64, 3], [0], [], [2**63, 0], [-1], [2**40, 2**40], [1] * 9, [1.5], "3", None, [True]))
    data = rng.choice((b"", bytes(12), bytes(64 * 64 * 3), b"\xff" * 24, None, "text"))
    return {b"__ndarray__": rng.choice((True, False)), b"data": data, b"dtype": dtype, b"shape": shape}


def generic(rng: random.Random) -> Any:
    """A NumPy number's map."""
    data = rng.choice((300, -1, 1e400, None, "x", b"x", [], [1, 2], {}, 2**64 - 1, float("nan")))
    return {
        b"__npgeneric__": True,
        b"data": data,
        b"dtype": rng.choice(("|u1", "<f4", "<i2", "|b1", "<f2", "|O", None)),
    }


def image_file(rng: random.Random) -> Any:
    """Bytes of a JPEG, WebP or other file, sound or damaged, of a size that its header may lie about."""
    file, size = io.BytesIO(), rng.choice(((64, 64), (1, 1), (90, 70), (1, 64), (3000, 2000)))
    form = rng.choice(("JPEG", "JPEG", "WEBP", "PNG", "GIF"))
    Image.new(rng.choice(("RGB", "L")), size, 7).save(file, form)
    data = bytearray(file.getvalue())
    for _ in range(rng.choice((0, 1, 1, 5))):
        at = rng.randrange(len(data))
        change = rng.randrange(3)
        if change == 0:
            data[at] = rng.choice((0, 0x7F, 0xD8, 0xDA, 0xFF))
        elif change == 1:
            del data[at : at + rng.choice((1, 100, 10**6))]
            data = data or bytearray(1)
        else:
            data[at:at] = rng.randbytes(rng.choice((1, 40))) * rng.choice((1, 500))
    return bytes(data)


def nested(rng: random.Random) -> Any:
    """Deep, long or wide."""
    depth = rng.choice((4, 100, 510, 600, 5000))
    kind = rng.randrange(5)
    if kind == 0:
        return msgpack.ExtType(rng.randrange(128), b"x" * rng.randrange(9))
    if kind == 1:
        return [0] * rng.choice((1000, 70_000, 900_000))
    if kind == 2:
        return {str(i): i for i in range(rng.choice((100, 5000, 60_000)))}
    if kind == 3:
        return [[] for _ in range(rng.choice((1000, 60_000)))]
    value: Any = 0
    for _ in range(min(depth, 400)):
        value = [value]
    return value


def packed(value: Any) -> Any:
    """An array's map."""
    return msgpack.unpackb(pack(value), strict_map_key=False)


def damaged(rng: random.Random) -> bytes:
    """A message: a sound one whose values or bytes are others."""
    kind = rng.randrange(6)
    sound: dict[Any, Any] = {**SOUND, "images": dict(SOUND["images"])}
    if kind < 3:
        value = rng.choice(
            (array, generic, nested, image_file, lambda r: r.choice(NUMBERS), lambda r: r.choice(OTHERS))
        )(rng)
        if isinstance(value, bytes) and rng.random() < 0.8:
            return msgpack.packb({**sound, "images": dict.fromkeys(SOUND["images"], value)}, default=packed)
        key = rng.choice(
            (
                "state",
                "prompt",
                "images",
                "reset",
                "act",
                "step",
                "front",
                "observation",
                7,
                b"x",
                "images/front",
                "task",
                "image",
                "d",
            )
        )
        if key == "state" and rng.random() < 0.5:
            value = [*SOUND["state"][:2].tolist(), value]
        if key == "front":
            sound["images"]["front"] = value
        else:
            sound[key] = value
        return msgpack.packb(sound, default=packed)
    if kind == 3:
        return rng.randbytes(rng.choice((0, 1, 2, 9, 100, 4000)))
    if kind == 4:  # headers that claim more than there is
        head = rng.choice((b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9")) + struct.pack(
            ">I", rng.choice((2**32 - 1, 2**24, 9))
        )
        return head * rng.choice((1, 3, 400)) + rng.randbytes(rng.choice((0, 50, 2**19)))
    data = bytearray(pack(sound))
    for _ in range(rng.choice((1, 1, 3, 20))):
        at = rng.choice((rng.randrange(min(120, len(data))), rng.randrange(len(data))))
        change = rng.randrange(4)
        if change == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif change == 1:
            data[at] = rng.choice((0, 0x7F, 0x80, 0xC1, 0xDC, 0xDF, 0xFF))
        elif change == 2:
            del data[at : at + rng.choice((1, 4, 4000))]
        else:
            data[at:at] = rng.randbytes(rng.choice((1, 4)))
        data = data or bytearray(1)
    return bytes(data)


def send_damaged(port: int, rng: random.Random) -> str:
    """The outcome of one or several damaged messages on one connection, which stays usable."""
    result = "right"
    with client(port) as connection:
        for _ in range(rng.choice((1, 1, 4))):
            data: Any = damaged(rng)
            if rng.random() < 0.1:
                data = data.decode("latin-1")
            if rng.random() < 0.1:
                data = [data[at : at + 5000] for at in range(0, len(data), 5000)] or [data]
            if rng.random() < 0.05:
                data = bytes(LIMIT_MIB * 2**20 + rng.choice((1, 2**20)))
            large = sum(map(len, data if isinstance(data, list) else [data])) > LIMIT_MIB * 2**20
            try:
                connection.send(data)
                answer = connection.recv(SECONDS)
            except TimeoutError:
                return "silent"
            except ConnectionClosed as error:
                return "closed" if large and error.rcvd and error.rcvd.code == 1009 else "dropped"
            if isinstance(answer, str):
                if "\n" in answer or len(answer) > 1000:
                    return "noise"
                result = "refused"
        connection.send(pack(SOUND))
        if not isinstance(connection.recv(SECONDS), bytes):
            return "wrong"
    return result


# --- sockets ----------------------------------------------------------------------------------------------------------

UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def frame(opcode: int, data: bytes, final: bool = True, masked: bool = True, claim: int | None = None) -> bytes:
    """A WebSocket frame; `claim`: the length it says it has."""
    length, mask = len(data) if claim is None else claim, b"\0\0\0\0" if masked else b""
    return struct.pack(">BBQ", opcode | final << 7, 127 | masked << 7, length) + mask + data


def break_socket(port: int, rng: random.Random) -> str:
    """Clients that break the protocol, or off. They are closed or ignored, without an answer that matters."""
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as stranger, contextlib.suppress(OSError):
        kind = rng.randrange(9)
        if kind == 0:
            stranger.sendall(rng.randbytes(rng.choice((1, 100, 70_000))))
        elif kind == 1:
            stranger.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(512))  # TLS
        elif kind == 2:
            stranger.sendall(
                b"GET /" + b"a" * rng.choice((10, 9000)) + b" HTTP/1.1\r\n" + b"X: y\r\n" * rng.choice((1, 300))
            )
        elif kind == 3:
            lines = UPGRADE.split(b"\r\n")
            lines[rng.randrange(len(lines))] = rng.choice(
                (b"", b"\xff\xfe", b"Host: \xc3\x28", b"Sec-WebSocket-Version: 99")
            )
            stranger.sendall(b"\r\n".join(lines))
        else:
            stranger.sendall(UPGRADE)
            stranger.recv(rng.choice((1, 200, 5000)))
            data = rng.randbytes(rng.choice((0, 10, 5000)))
            opcode = rng.choice((0, 1, 2, 2, 3, 8, 9, 10, 11))
            stranger.sendall(
                frame(
                    opcode, data, rng.random() < 0.7, rng.random() < 0.8, rng.choice((None, None, 2**62, len(data) + 9))
                )
            )
            if kind == 5:
                stranger.sendall(frame(9, b"ping") * rng.choice((1, 2000)))
            elif kind == 6:  # many messages, and no answer is read
                stranger.sendall(frame(2, pack({"reset": True})) * 300)
        ending = rng.randrange(4)
        if ending == 0:
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, no farewell
        elif ending == 1:
            stranger.shutdown(socket.SHUT_WR)
            stranger.settimeout(rng.choice((0.0, 0.2)))
            stranger.recv(100)
        elif ending == 2:
            stranger.shutdown(socket.SHUT_RD)
    return "closed"


def trial(found: Server, number: int, seed: int, reference: np.ndarray) -> tuple[str, str]:
    """(outcome, what the server printed) of one trial."""
    rng = random.Random(f"server {seed} {number}")
    attack: Callable[[int, random.Random], str] = send_damaged if rng.random() < 0.75 else break_socket
    try:
        result = attack(found.port, rng)
        with client(found.port) as connection:
            connection.send(pack(SOUND))
            answer = unpack(connection.recv(SECONDS))  # type: ignore[arg-type]
            if not np.array_equal(answer["actions"], reference):
                result = "wrong"
    except (OSError, TimeoutError, ConnectionClosed) as error:
        result = "died" if found.process.poll() is not None else f"wrong ({type(error).__name__})"
    printed = found.new()
    noisy = "Traceback" in printed or len(printed.splitlines()) > 1
    return ("noise" if noisy and result.split()[0] not in FAULTS else result.split()[0]), printed


def fuzz(count: int, seed: int, where: Path, only: int | None = None) -> tuple[Counter[str], list[str]]:
    """(outcomes, a line for each fault) of `count` trials; the last line tells the server's memory."""
    counts: Counter[str] = Counter()
    with server(where) as found:
        with client(found.port) as connection:
            connection.send(pack(SOUND))
            reference = unpack(connection.recv(SECONDS))["actions"]  # type: ignore[arg-type]
        before, lines = found.nbytes(), []
        for number in range(count) if only is None else [only]:
            result, printed = trial(found, number, seed, reference)
            counts[result] += 1
            if result in FAULTS:
                lines.append(f"{number}: {result}: {printed[-300:]!r}")
            if found.process.poll() is not None:
                break
        grown = (found.nbytes() - before) / 2**20 if found.process.poll() is None else float("nan")
    return counts, [*lines, f"memory grew by {grown:.0f} MiB"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this trial alone")
    asked = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as where:
        counts, lines = fuzz(asked.count, asked.seed, Path(where), asked.only)
    print(*lines, sep="\n")
    print(f"{sum(counts.values())} trials, seed {asked.seed}, {time.monotonic() - began:.0f} s: {dict(counts)}")
    sys.exit(any(counts[name] for name in FAULTS))


if __name__ == "__main__":
    main()
