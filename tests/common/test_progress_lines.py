"""Progress where there is no terminal: a line now and then, with what is done, how fast, and how long it will take."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from dvla.common import console


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    stream = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=stream, width=120, soft_wrap=True))
    return stream


def test_a_line_per_name_every_thirty_seconds(printed: io.StringIO) -> None:
    now = 100.0
    show = console.progress_lines(30.0, lambda: now)
    for second in range(71):
        now = 100.0 + second
        show("push/front: images", 500 + 10 * second, 2000)  # a resumed build: 500 were there before
        if second >= 20:
            show("push/wrist: images", second - 20, 1000)
    assert printed.getvalue().splitlines() == [
        "push/front: images 800/2000, 10/s, 2.0 min left",
        "push/wrist: images 30/1000, 1/s, 16.2 min left",
        "push/front: images 1100/2000, 10/s, 90 s left",
    ]


def test_what_is_finished_or_stands_still(printed: io.StringIO) -> None:
    now = 0.0
    show = console.progress_lines(30.0, lambda: now)
    show("tables: episodes", 0, 8)
    now = 60.0
    show("tables: episodes", 0, 8)
    now = 120.0
    show("tables: episodes", 8, 8)  # the closing lines say so
    assert printed.getvalue() == "tables: episodes 0/8, 0/s\n"


def test_how_often_is_asked_for_or_never(printed: io.StringIO) -> None:
    for every in (1e-9, None):
        with console.progress_bars(every) as show:
            for done in (1, 2, 3):
                show("[x]", done, 4)
    lines = printed.getvalue().splitlines()
    assert lines and all(line.startswith("[x] ") and "/4, " in line for line in lines)
