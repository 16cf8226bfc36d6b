"""The GPU check in its dry form: toy sizes on a CPU. All of it by hand: `make gpu-check DRY=1`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from support.repository import ROOT

LINE = re.compile(r"(PASS|FAIL|NUM |SKIP) (\w+)/(.+?)  ")


def check(tmp_path: Path, **settings: str) -> tuple[int, str]:
    """(exit code, what it printed) of the command."""
    given = {"DRY": "1", "PY": sys.executable, "OUT": str(tmp_path / "out"), "WORK": str(tmp_path / "work"), **settings}
    command = ["bash", str(ROOT / "benchmarks/gpu_check.sh")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, **given})
    assert not done.stderr, done.stderr[-2000:]
    assert (tmp_path / "out" / "gpu_check.log").read_text() == done.stdout
    return done.returncode, done.stdout


@pytest.mark.slow
def test_sections_without_a_recording(tmp_path: Path) -> None:
    code, said = check(tmp_path, SECTIONS="core loader", RECORDING=str(tmp_path))
    found = [match.groups() for match in map(LINE.match, said.splitlines()) if match]
    kinds = {kind for kind, _, _ in found}
    assert code == 0 and kinds == {"PASS", "NUM ", "SKIP"}, said
    assert {section for _, section, _ in found} == {"core", "loader"}
    skipped = [line for line in said.splitlines() if line.startswith("SKIP")]
    assert all(line.endswith("needs CUDA") for line in skipped)  # and nothing else is
    assert re.search(r"^== \d+ PASS, 0 FAIL, \d+ numbers, \d+ skipped, \d+ s$", said, re.M)


@pytest.fixture
def items(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from gpu_check import items

    monkeypatch.setattr(items, "ITEMS", [])
    return items


def test_no_item_stops_the_others(items: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = ModuleType(__name__)

    def fails(place: object) -> str:
        raise ValueError("of no\nuse")

    def needs(place: object) -> str:
        return place.of("thing")  # type: ignore[attr-defined]

    items.item("first")(lambda place: "fine")
    items.item("second")(fails)
    items.item("third")(needs)
    items.item("fourth", cuda=True)(fails)
    items.item("of {}", each=lambda place: (1, 2))(lambda place, n: items.Number(f"{n} s"))
    items.item("last")(lambda place: items.passed(False, "1e-1"))
    place = items.Place(torch.device("cpu"), True, tmp_path, tmp_path, ROOT, 60.0, "core")
    items.run(module, place)
    said = [line.partition("  [")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == [
        "PASS core/first  fine",
        f"FAIL core/second  ValueError: of no use (test_gpu_check.py:{fails.__code__.co_firstlineno + 1})",
        "SKIP core/third  an earlier item has not made the thing",
        "SKIP core/fourth  needs CUDA",
        "NUM  core/of 1  1 s",
        "NUM  core/of 2  2 s",
        "FAIL core/last  1e-1",
    ]
    assert "of no\nuse" in (tmp_path / "trace-core-second.txt").read_text()
    late = items.Place(torch.device("cpu"), True, tmp_path, tmp_path, ROOT, -1.0, "core")
    items.run(module, late)
    assert {line[:5] for line in capsys.readouterr().out.splitlines()} == {"SKIP "}


def test_a_section_that_ends_early_is_a_failure(tmp_path: Path) -> None:
    """And the exit code says so; the log holds all that was printed."""
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    code, said = check(tmp_path, SECTIONS="core ranks", PY=str(broken), RECORDING=str(tmp_path))
    assert code == 1 and "FAIL core/section  ended with code 3" in said and "FAIL ranks/section" in said
