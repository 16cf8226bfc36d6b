"""A short run of the server's fuzz; `make fuzz` does more."""

from __future__ import annotations

import contextlib
import resource
import socket
import time
from pathlib import Path

from fuzz import fuzz_server


def test_damaged_messages_and_broken_sockets(tmp_path: Path) -> None:
    counts, lines = fuzz_server.fuzz(150, 1, tmp_path)
    assert not [name for name in fuzz_server.FAULTS if counts[name]], "\n".join(lines)
    assert counts["refused"] > 30 and counts["closed"] > 10 and counts["right"] > 1


def test_more_connections_than_files_are_one_line(tmp_path: Path) -> None:
    """Another client is served as soon as there is a file for it."""
    with fuzz_server.server(tmp_path) as server, contextlib.ExitStack() as stack:
        few = len(list(Path(f"/proc/{server.process.pid}/fd").iterdir())) + 8
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (few, few))
        for _ in range(20):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        time.sleep(1.2)  # asyncio tries again every second
        printed = server.new()
        assert "Too many open files" in printed and len(printed.splitlines()) == 1, printed
        stack.close()
        with fuzz_server.client(server.port) as connection:
            connection.send(fuzz_server.pack(fuzz_server.SOUND))
            assert isinstance(connection.recv(10), bytes)
