"""A few trials of a fuzz in a process of its own: it forks, and that of the tests has threads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.repository import ROOT


def run_fuzz(
    script: str, folder: Path, *arguments: str
) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    """How `tests/fuzz/<script>` ended, and its outcomes; `folder` is for a file of them."""
    command = [sys.executable, f"tests/fuzz/{script}", *arguments, "--out", str(folder / "all")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (folder / "all").exists(), done.stderr
    return done, [json.loads(line) for line in (folder / "all").read_text().splitlines()]
