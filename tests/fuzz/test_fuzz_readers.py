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

COUNT = 16


@pytest.mark.slow
def test_damage_costs_episodes_only(tmp_path: Path) -> None:
    """In a process of its own: it forks, and this one has threads."""
    command = [sys.executable, "tests/fuzz/fuzz_readers.py", "--count", str(COUNT), "--seed", "7"]
    done = subprocess.run([*command, "--out", tmp_path / "all"], cwd=ROOT, capture_output=True, text=True)
    found = [json.loads(line) for line in (tmp_path / "all").read_text().splitlines()]
    faults = [
        f"{x['format']} {x['index']} {x['file']}: {x['what']}\n{x['text']}" for x in found if x["result"] in FAULTS
    ]
    assert done.returncode == 0 and not faults, "\n\n".join(faults) or done.stderr[-2000:]
    assert len(found) == COUNT * len(FORMATS)
