"""A few seeded mutations of every form of a cache: no traceback, no hang, no memory beyond 2 GiB, nothing silent.

`python tests/fuzz/fuzz_caches.py` does thousands; its counts are in docs/security.md.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz.short_form import run_fuzz

COUNT = 6
SAMPLES, FAULTS = 6, ("silent", "traceback", "hang", "memory", "died")


@pytest.mark.slow
def test_a_damaged_cache_is_right_or_refused(tmp_path: Path) -> None:
    done, found = run_fuzz("fuzz_caches.py", tmp_path, "--count", str(COUNT), "--seed", "7")
    faults = [
        f"{x['sample']} {x['index']} {x['file']}: {x['what']}\n{x['text']}" for x in found if x["result"] in FAULTS
    ]
    assert done.returncode == 0 and not faults, "\n\n".join(faults) or done.stderr[-2000:]
    assert len(found) == COUNT * SAMPLES
