"""What Ctrl-C and SIGTERM do inside the blocks that handle them."""

from __future__ import annotations

import signal

import pytest

from dvla.common.signals import signals, terminable


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_whose_exception_is_lost_raises_at_the_next_check() -> None:
    class Finalized:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    reached = []
    with pytest.raises(KeyboardInterrupt), terminable() as check:
        check()
        Finalized()
        reached.append("Python dropped it")
        check()
    assert reached and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_does_not_wait_for_the_step() -> None:
    with pytest.raises(KeyboardInterrupt), signals() as stopped:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
    assert stopped == [signal.SIGTERM, signal.SIGTERM] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
