"""Distributions by whose names LeRobot finds plug-ins: dvla's own, as its wheel installs it, and a robot's."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from support.repository import ROOT


def build_backend() -> ModuleType:
    """`plugin/build_backend.py`."""
    spec = importlib.util.spec_from_file_location("build_backend", ROOT / "plugin" / "build_backend.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def site(folder: Path) -> list[str]:
    """Entries of `sys.path` as if dvla's wheel were installed, and a package of the stand-in robot."""
    backend = build_backend()
    for name, files in (
        (backend.NAME, backend.metadata("1")),
        ("lerobot_robot_standin", {"METADATA": "Metadata-Version: 2.1\nName: lerobot_robot_standin\nVersion: 1\n"}),
    ):
        (folder / f"{name}-1.dist-info").mkdir(parents=True)
        for file, text in files.items():
            (folder / f"{name}-1.dist-info" / file).write_text(text)
    (folder / "lerobot_robot_standin.py").write_text(
        "from support import so101_standin\nso101_standin.put_in(setattr)\n"
    )
    return [str(folder), str(ROOT / "plugin"), str(ROOT / "tests")]
