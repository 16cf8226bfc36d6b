"""A few seeded damages of runs, policies and VLM checkpoints: no traceback, hang or silent change, nothing
half-written.

`python tests/fuzz/fuzz_runs.py` does thousands; its counts are in docs/security.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.repository import ROOT

COUNT = 12


@pytest.mark.slow
def test_damage_is_refused_in_one_line(tmp_path: Path) -> None:
    """In a process of its own: it forks, and this one has threads."""
    command = [sys.executable, "tests/fuzz/fuzz_runs.py", "--count", str(COUNT), "--actions", "1", "--seed", "3"]
    done = subprocess.run([*command, "--out", tmp_path / "all"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (tmp_path / "all").read_text() if (tmp_path / "all").exists() else done.stderr
    found = [json.loads(line)["result"] for line in (tmp_path / "all").read_text().splitlines()]
    assert len(found) == COUNT and "refused" in found
