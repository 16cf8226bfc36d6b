"""Running command lines in this process, as the installed script would; the fixture `dvla` is in conftest.py."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest


class Result(NamedTuple):
    code: int
    out: str
    err: str


Dvla = Callable[..., Result]


def runner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Dvla:
    """`run(*arguments)` runs one command line."""
    from dvla import cli

    def run(*arguments: Any) -> Result:
        monkeypatch.setattr(sys, "argv", ["dvla", *map(str, arguments)])
        monkeypatch.setenv("DVLA_TRACEBACK", "1")  # an error that nobody foresaw fails the test
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as error:
            code = error.code or 0
        return Result(code, *capsys.readouterr())

    return run


def until(happened: Callable[[], Any], seconds: float = 20.0) -> None:
    """Wait for something that another process or thread does."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


def argv(line: str) -> list[str]:
    """The arguments of a command line."""
    return shlex.split(line)


def refused(result: Result, *words: str) -> None:
    """Exit code 2, one line on standard error with all `words`; on standard output at most what is loaded."""
    assert result.code == 2, result
    lines = result.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.err
    assert not [line for line in result.out.splitlines() if not line.startswith(("loading ", "loaded "))]
    assert "Traceback" not in result.err
    for word in words:
        assert word in lines[0], lines[0]
