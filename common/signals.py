"""Handling of Ctrl-C and of SIGTERM, which schedulers send before a job's time is up, in long-running work.

Only the main thread can set handlers; in other threads nothing is set.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

Handler = Callable[[int, Any], None]


@contextlib.contextmanager
def handled(handler: Handler, numbers: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)) -> Iterator[None]:
    """Send these signals to `handler` inside the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM append to, so that a loop can stop after a complete step.

    A second SIGINT acts as usual. A second SIGTERM does nothing: a scheduler sends it to every process of a job, and
    a launcher forwards it to those it started.
    """
    stopped: list[int] = []
    usual = signal.getsignal(signal.SIGINT)

    def stop(number: int, frame: Any) -> None:
        stopped.append(number)
        signal.signal(signal.SIGINT, usual)

    with handled(stop):
        yield stopped


@contextlib.contextmanager
def terminable() -> Iterator[Callable[[], None]]:
    """Make SIGTERM raise `KeyboardInterrupt`, as Ctrl-C does, so that everything is closed on the way out.

    Yields a check to call now and then: it raises again where the exception was lost because it was raised in a
    finalizer (Python drops those).
    """
    seen: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    def check() -> None:
        if seen:
            raise KeyboardInterrupt

    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # started in the background, where Ctrl-C is ignored
    with handled(interrupt, (signal.SIGTERM,) if ignored else (signal.SIGTERM, signal.SIGINT)):
        yield check
