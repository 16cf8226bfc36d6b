"""Memory of this process."""

from __future__ import annotations

import os
from pathlib import Path

from dvla.common.device import peak_line, peak_memory
from dvla.common.text import size


def test_peak_memory() -> None:
    now = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = peak_memory()
    assert 0.9 * now < peak < 100 * now  # statm counts late
    assert peak_line() == f"peak memory of this process: {size(peak_memory())}"
