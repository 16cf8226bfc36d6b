"""Command lines and trials under limits of time and memory, so that one that dies or hangs costs only itself.

`run_bounded` runs one line of `dvla` in this process; `trials` runs many trials, a few dozen to a process.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import resource
import select
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from dvla.cli import app
from dvla.common.options import run_command
from dvla.errors import UserError

CPU_SECONDS = 10.0  # a command that computes for longer hangs
WAIT_SECONDS = float(os.environ.get("FUZZ_WAIT", "40"))  # and one that takes so long, on a machine that may be busy
MOST_NBYTES = 2 << 30  # resident
BATCH = 40  # trials of one process
WALL_SECONDS = 60.0  # without a word of it, on a machine that may be busy

command = typer.main.get_command(app)


class Hang(BaseException):
    """Too much time, of the processor or in waiting."""


def trials(
    numbers: Sequence[int], trial: Callable[[int, Callable[[Any], None]], Any], last: Callable[[Any], bool]
) -> Iterator[tuple[int, Any, Any]]:
    """(number, what its trial announced, what it returned) of each number, in order.

    Args:
        trial: `trial(number, announce)`; what it announces and returns is pickled.
        last: whether a result is the last of its process (a hang, whose threads may go on).

    What a trial returned is "hang", or the name of a signal, where it ended its process.
    """
    todo = list(numbers)
    while todo:
        batch = todo[:BATCH]

        def work(send: Callable[[Any], None]) -> None:
            for number in batch:
                result = trial(number, lambda value: send(("announced", value)))
                send(("result", result))
                if last(result):
                    return

        announced: Any = None
        done = 0
        for said in in_child(work):
            if isinstance(said, tuple) and said[0] == "announced":
                announced = said[1]
                continue
            if isinstance(said, tuple) and said[0] == "broken":  # the fuzz itself
                raise RuntimeError(f"{announced}: {said[1]}")
            if not isinstance(said, tuple) and done == len(batch):
                continue
            yield todo.pop(0), announced, said[1] if isinstance(said, tuple) else said
            announced, done = None, done + 1


def in_child(work: Callable[[Callable[[Any], None]], None]) -> Iterator[Any]:
    """What `work(send)` sends from a process of its own; at its end "hang", or the signal that killed it."""
    receive, give = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(receive)
            _limit()
            with open(give, "wb") as pipe:

                def send(value: object) -> None:
                    data = pickle.dumps(value)
                    pipe.write(len(data).to_bytes(8, "big") + data)
                    pipe.flush()

                try:
                    work(send)
                except Exception:
                    send(("broken", traceback.format_exc()))
        finally:
            os._exit(0)
    os.close(give)
    with open(receive, "rb", buffering=0) as pipe:
        while True:
            if not select.select([pipe], [], [], WALL_SECONDS)[0]:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                yield "hang"
                return
            size = _exactly(pipe, 8)
            data = _exactly(pipe, int.from_bytes(size, "big")) if len(size) == 8 else b""
            if not data:
                break
            yield pickle.loads(data)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        yield signal.Signals(os.WTERMSIG(status)).name


def _exactly(pipe: io.FileIO, count: int) -> bytes:
    """`count` bytes of a pipe, fewer where its other end was closed."""
    data = bytearray()
    while len(data) < count and (more := pipe.read(count - len(data))):
        data += more
    return bytes(data)


def _limit() -> None:
    """Room for 2 GiB more than now; no core files; what C libraries print goes nowhere."""
    lines = Path("/proc/self/status").read_text().splitlines()
    now = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (now + MOST_NBYTES, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not os.environ.get("FUZZ_LOUD"):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)


def run_bounded(arguments: list[str]) -> tuple[str, str]:
    """(outcome, what was printed or raised) of one command line."""
    return bounded(lambda: run_command(command, arguments))


def bounded(work: Callable[[], None]) -> tuple[str, str]:
    """(outcome, what was printed or raised) of work that may hang, or raise anything."""
    printed = io.StringIO()
    try:
        with _watched() as others, contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            work()
    except UserError as error:
        text = str(error)
        if "\n" in text or not text:
            return "traceback", f"a message of several lines: {text!r}"
        return ("memory" if _of_memory(text) else "refused"), text
    except SystemExit as error:
        if error.code not in (0, 1):
            return "traceback", f"exit code {error.code}: {printed.getvalue()[-500:]}"
    except Hang:
        return "hang", traceback.format_exc()
    except BaseException:
        return "traceback", traceback.format_exc()
    text = printed.getvalue()
    if others:
        return "traceback", others[0]
    if "\x1b" in text:
        return "traceback", f"control characters reach the terminal: {text!r}"
    return ("memory" if _of_memory(text) or _peak() > MOST_NBYTES else "right"), text


def _of_memory(text: str) -> bool:
    return any(word in text for word in ("MemoryError", "Unable to allocate", "out of memory", "malloc"))


@contextlib.contextmanager
def _watched() -> Iterator[list[str]]:
    """Tracebacks of other threads; `Hang` after CPU_SECONDS of computing, or WAIT_SECONDS."""
    others: list[str] = []

    def late(*_: object) -> None:
        raise Hang

    def failed(args: threading.ExceptHookArgs) -> None:
        others.append("".join(traceback.format_exception(args.exc_type, args.exc_value, args.exc_traceback)))

    before, threading.excepthook = threading.excepthook, failed
    old = signal.signal(signal.SIGPROF, late), signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WAIT_SECONDS, 1.0)  # again, for what waits for its threads on the way out
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    try:
        yield others
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGPROF, old[0]), signal.signal(signal.SIGALRM, old[1])
        threading.excepthook = before


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
