"""Ctrl-C and SIGTERM, the warning of a walltime: what long work does when they come. Handlers belong to the main thread; elsewhere nothing is set."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

Handler = Callable[[int, Any], None]


@contextlib.contextmanager
def handled(handler: Handler, numbers: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)) -> Iterator[None]:
    """These signals go to `handler` meanwhile."""
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
    """A list that is filled by SIGINT or SIGTERM, so that the loop ends after a whole step.

    A second SIGINT acts as usual; a second SIGTERM does nothing, since a scheduler sends it to every process of a job and a launcher
    then sends it on to those it started.
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
    """SIGTERM acts like Ctrl-C: `KeyboardInterrupt`, so that everything is closed on the way out.

    Gives a check to be called now and then: where a signal came, but its exception was lost since it was raised in a finaliser
    (Python drops those), it raises again.
    """
    seen: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    def check() -> None:
        if seen:
            raise KeyboardInterrupt

    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # started in the background: Ctrl-C is not for it
    with handled(interrupt, (signal.SIGTERM,) if ignored else (signal.SIGTERM, signal.SIGINT)):
        yield check
