"""A few seeded mutations of every form of a cache: no traceback, no hang, no memory beyond 2 GiB, nothing silent.

`python tests/fuzz/fuzz_caches.py` does thousands; its counts are in docs/security.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.repository import ROOT

COUNT = 6
SAMPLES, FAULTS = 6, ("silent", "traceback", "hang", "memory", "died")


@pytest.mark.slow
def test_a_damaged_cache_is_right_or_refused(tmp_path: Path) -> None:
    """In a process of its own: it forks, and this one has threads."""
    command = [sys.executable, "tests/fuzz/fuzz_caches.py", "--count", str(COUNT), "--seed", "7"]
    done = subprocess.run([*command, "--out", tmp_path / "all"], cwd=ROOT, capture_output=True, text=True)
    found = [json.loads(line) for line in (tmp_path / "all").read_text().splitlines()]
    faults = [
        f"{x['sample']} {x['index']} {x['file']}: {x['what']}\n{x['text']}" for x in found if x["result"] in FAULTS
    ]
    assert done.returncode == 0 and not faults, "\n\n".join(faults) or done.stderr[-2000:]
    assert len(found) == COUNT * SAMPLES
