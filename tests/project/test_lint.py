"""ruff and mypy over the package, as `make lint` runs them."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from support.repository import ROOT, pins


def is_pinned(*packages: str) -> bool:
    """Whether they are here in the versions of this Python's constraints: those of others have other annotations."""
    here = {d.name.lower(): d.version for d in importlib.metadata.distributions()}
    return all(here.get(name, "").split("+")[0] == pins()[name] for name in packages)


@pytest.mark.slow
@pytest.mark.skipif(
    not is_pinned("mypy", "types-pyyaml", "types-protobuf", "numpy", "torch", "transformers"),
    reason="needs the pinned versions of mypy and of what it reads",
)
def test_the_package_is_typed(tmp_path: Path) -> None:
    (tmp_path / "dvla").symlink_to(ROOT)  # the root folder is the package
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--config-file",
            str(ROOT / "pyproject.toml"),
            "--cache-dir",
            str(tmp_path / "cache"),
            "-p",
            "dvla",
        ],
        env={"MYPYPATH": str(tmp_path), "PATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.skipif(not is_pinned("ruff"), reason="needs the pinned version of ruff")
@pytest.mark.parametrize("words", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff_has_nothing_to_say(words: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *words, "--no-cache", str(ROOT)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
