"""A few dozen seeded mutations of every format: no traceback, no hang, no memory beyond 2 GiB, no process that dies.

`python tests/fuzz/fuzz_readers.py` does thousands; its counts are in docs/security.md.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz.fuzz_samples import FORMATS
from fuzz.short_form import run_fuzz
from fuzz.trial import FAULTS

COUNT = 16


@pytest.mark.slow
def test_damage_costs_episodes_only(tmp_path: Path) -> None:
    done, found = run_fuzz("fuzz_readers.py", tmp_path, "--count", str(COUNT), "--seed", "7")
    faults = [
        f"{x['format']} {x['index']} {x['file']}: {x['what']}\n{x['text']}" for x in found if x["result"] in FAULTS
    ]
    assert done.returncode == 0 and not faults, "\n\n".join(faults) or done.stderr[-2000:]
    assert len(found) == COUNT * len(FORMATS)
