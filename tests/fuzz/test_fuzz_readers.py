"""A few dozen seeded mutations of every format: no traceback, no hang, no memory beyond 2 GiB, no process that dies.

`python tests/fuzz/fuzz_readers.py` does thousands; its counts are in docs/security.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz.fuzz_samples import FORMATS
from fuzz.trial import FAULTS
from support.repository import ROOT

COUNT = 24


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_damage_costs_episodes_only(name: str, tmp_path: Path) -> None:
    """In a process of its own: it forks, and this one has threads."""
    command = [sys.executable, "tests/fuzz/fuzz_readers.py", "--format", name, "--count", str(COUNT), "--seed", "7"]
    done = subprocess.run([*command, "--out", tmp_path / "all"], cwd=ROOT, capture_output=True, text=True)
    head, counts = done.stdout.splitlines()
    assert done.returncode == 0, f"{head}\n{counts}\n{_faults(tmp_path / 'all')}"
    assert sum(map(int, counts.split()[2:-1])) == COUNT


def _faults(written: Path) -> str:
    found = map(json.loads, written.read_text().splitlines())
    return "\n\n".join(f"{x['index']} {x['file']}: {x['what']}\n{x['text']}" for x in found if x["result"] in FAULTS)
