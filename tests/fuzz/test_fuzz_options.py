"""A few dozen hostile command lines, recipes and machines: one line each, no traceback, no hang, no half file.

`python tests/fuzz/fuzz_options.py` does thousands; its counts are in docs/security.md.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fuzz.fuzz_options import FAULTS, KINDS
from fuzz.short_form import run_fuzz

COUNT = 10


@pytest.mark.slow
def test_every_option_and_machine_ends_in_one_line(tmp_path: Path) -> None:
    kinds = [kind for kind in KINDS if kind != "machine" or os.geteuid() == 0 and Path("/proc/self/fd").is_dir()]
    words = [word for kind in kinds for word in ("--kind", kind)]
    done, found = run_fuzz("fuzz_options.py", tmp_path, *words, "--count", str(COUNT), "--seed", "11")
    faults = [f"{x['kind']} {x['index']} {x['line']}\n{x['text']}" for x in found if x["result"] in FAULTS]
    assert done.returncode == 0 and not faults, "\n\n".join(faults) or done.stderr[-2000:]
    assert len(found) == COUNT * len(kinds)
