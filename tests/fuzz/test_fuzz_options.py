"""A few dozen hostile command lines, recipes and machines: one line each, no traceback, no hang, no half file.

`python tests/fuzz/fuzz_options.py` does thousands; its counts are in docs/security.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz.fuzz_options import FAULTS, KINDS
from support.repository import ROOT

COUNT = 10


@pytest.mark.slow
def test_every_option_and_machine_ends_in_one_line(tmp_path: Path) -> None:
    """In a process of its own: it forks, and this one has threads."""
    kinds = [kind for kind in KINDS if kind != "machine" or os.geteuid() == 0 and Path("/proc/self/fd").is_dir()]
    words = [word for kind in kinds for word in ("--kind", kind)]
    command = [sys.executable, "tests/fuzz/fuzz_options.py", *words, "--count", str(COUNT), "--seed", "11"]
    done = subprocess.run([*command, "--out", tmp_path / "all"], cwd=ROOT, capture_output=True, text=True)
    found = [json.loads(line) for line in (tmp_path / "all").read_text().splitlines()]
    faults = [f"{x['kind']} {x['index']} {x['line']}\n{x['text']}" for x in found if x["result"] in FAULTS]
    assert done.returncode == 0 and not faults, "\n\n".join(faults) or done.stderr[-2000:]
    assert len(found) == COUNT * len(kinds)
