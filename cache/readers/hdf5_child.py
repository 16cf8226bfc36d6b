"""Whether parts of HDF5 files can be looked at: tried in a process of its own, once for each state of a file.

libhdf5 loops or crashes over some damaged files, which nothing in its own process can end.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from . import hdf5_probe

_MOST_DEATHS = 3  # parts of one file; then none of it is tried
_Version = tuple[str, int, int]  # path, size and time of a file


class _Child:
    """The process, started when it is first needed and again when a file has ended it."""

    def __init__(self) -> None:
        self.pid, self.lock = os.getpid(), threading.Lock()
        self.known: dict[tuple[_Version, str, bool], bool] = {}
        self.deaths: dict[_Version, int] = {}
        self.usable = bool(sys.executable)
        self.process: subprocess.Popen[bytes] | None = None
        atexit.register(self.stop)

    def asks(self, version: _Version, name: str, below: bool) -> bool:
        with self.lock:
            if self.deaths.get(version, 0) >= _MOST_DEATHS:
                return False
            key = version, name, below
            if key not in self.known:
                self.known[key] = not self.usable or self._answers(version[0], name, below)
                self.deaths[version] = self.deaths.get(version, 0) + (not self.known[key])
            return self.known[key]

    def _answers(self, path: str, name: str, below: bool) -> bool:
        process = self.process = self.process or self._start()
        if process is None:  # no process can be started here: files are read as they are
            self.usable = False
            return True
        assert process.stdin and process.stdout
        try:
            process.stdin.write(json.dumps([path, name, below]).encode() + b"\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = b""
        if not answer:
            self.stop()
        return bool(answer)

    def _start(self) -> subprocess.Popen[bytes] | None:
        command, pipe = [sys.executable, hdf5_probe.__file__], subprocess.PIPE
        try:
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        except OSError:
            return None
        assert process.stdout
        return process if process.stdout.readline() else None

    def stop(self) -> None:
        if self.process is not None and self.pid == os.getpid():
            self.process.kill()
            with contextlib.suppress(OSError, ValueError):
                self.process.communicate()
        self.process = None


_child: _Child | None = None
_making = threading.Lock()
_inherited: list[_Child | None] = []  # of the process that was forked: not ours to ask, nor to end


def _forget() -> None:
    global _child, _making
    _inherited.append(_child)
    _child, _making = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)


def can_be_read(path: Path, name: str = "", below: bool = False) -> bool:
    """Whether a group of a file can be looked at without an end to this process, or a loop.

    Args:
        name: of the group, "" for the file itself.
        below: whether what is below its members is looked at, too.
    """
    global _child
    with _making:
        child = _child = _child or _Child()
    found = os.stat(path)
    return child.asks((os.path.abspath(path), found.st_size, found.st_mtime_ns), name, below)
