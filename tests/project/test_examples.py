"""What lies in examples/ runs as it stands."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from dvla.cache.vlm.tiny_qwen3vl import make_tiny_qwen3vl
from dvla.stages.policy.policy import Policy
from dvla.stages.serving.server import PolicyServer, ServeConfig, in_background
from support.repository import ROOT
from support.run_samples import TINY, make_run

EXAMPLES = ROOT / "examples"


def random_client(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, EXAMPLES / "random_client.py", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_random_client(tmp_path: Path) -> None:
    policy = Policy.from_pretrained(make_run(tmp_path / "run", make_tiny_qwen3vl(tmp_path / "vlm", TINY)))
    with in_background(PolicyServer(policy, ServeConfig(port=0))) as port:
        done = random_client("--port", port, "--steps", 3)
    assert done.returncode == 0, done.stderr
    assert "robot toy, views front, wrist" in done.stdout and done.stdout.count("[4, 3]") == 3
    assert "3 answers, median" in done.stdout
    again = random_client("--port", port)  # nobody is there any more
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and f"127.0.0.1:{port}" in again.stderr


def cells(path: Path) -> list[dict[str, Any]]:
    """Cells of a notebook, as nbformat 4.5 wants them."""
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5) and notebook.keys() == {
        "cells",
        "metadata",
        "nbformat",
        "nbformat_minor",
    }
    found = notebook["cells"]
    assert len({cell["id"] for cell in found}) == len(found)
    for cell in found:
        assert re.fullmatch(r"[\w-]{1,64}", cell["id"]) and isinstance(cell["metadata"], dict)
        assert all(isinstance(line, str) for line in cell["source"])
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
        else:
            assert cell["cell_type"] == "markdown" and cell.keys() == {"cell_type", "id", "metadata", "source"}
    return found


@pytest.mark.slow
def test_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code cells in order; a line that begins with ! is a command, in which {names} are filled in."""
    for library in ("metaworld", "lerobot"):
        if find_spec(library) is None:
            pytest.skip(f"needs {library}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    matplotlib.use("agg")
    names: dict[str, Any] = {}

    def run(line: str) -> None:
        words = line.format(**names).replace("dvla ", f"{sys.executable} -m dvla.cli ", 1).split()
        done = subprocess.run(words, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{line}: {done.stderr[-1500:]}"

    names["run_command"] = run
    for cell in cells(EXAMPLES / "quick_demo.ipynb"):
        if cell["cell_type"] == "code":
            text = re.sub(r"^!(.*)$", lambda match: f"run_command({match[1]!r})", "".join(cell["source"]), flags=re.M)
            exec(compile(text, cell["id"], "exec"), names)
    assert np.isfinite(names["predicted"]).all() and names["predicted"].shape == names["expert"].shape
    assert (tmp_path / "eval" / "summary.json").is_file() and len(names["cache"]) == sum(
        int(n) for n in names["cache"].datasets[0].episode_length
    )
