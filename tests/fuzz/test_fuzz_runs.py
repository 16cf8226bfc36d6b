"""A few seeded damages of runs, policies and VLM checkpoints: no traceback, hang or silent change, nothing
half-written.

`python tests/fuzz/fuzz_runs.py` does thousands; its counts are in docs/security.md.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz.short_form import run_fuzz

COUNT = 12


@pytest.mark.slow
def test_damage_is_refused_in_one_line(tmp_path: Path) -> None:
    done, found = run_fuzz("fuzz_runs.py", tmp_path, "--count", str(COUNT), "--actions", "1", "--seed", "3")
    assert done.returncode == 0, found
    assert len(found) == COUNT and "refused" in [each["result"] for each in found]
