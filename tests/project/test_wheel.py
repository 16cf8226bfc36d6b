"""The wheel: it installs dvla, the plug-in's package, and the metadata by which LeRobot finds that."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from support.repository import ROOT

BUILD = """import sys; sys.path.insert(0, "plugin"); import build_backend
for hook, out in zip(sys.argv[1::2], sys.argv[2::2]): getattr(build_backend, hook)(out)"""


def build(source: Path, **hooks: Path) -> None:
    words = [str(word) for pair in hooks.items() for word in pair]
    done = subprocess.run([sys.executable, "-c", BUILD, *words], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel, a source distribution and an editable wheel, built from a copy."""
    base = tmp_path_factory.mktemp("build")
    skip = shutil.ignore_patterns("tests", "docs", ".git*", "build", "*.egg-info", "__pycache__", ".venv*")
    shutil.copytree(ROOT, base / "source", ignore=skip)
    out = base / "out"
    (out / "editable").mkdir(parents=True)
    build(base / "source", build_wheel=out, build_editable=out / "editable", build_sdist=out)
    return out


@pytest.mark.parametrize("kind", [".", "editable"])
def test_lerobot_finds_what_it_installs(built: Path, tmp_path: Path, kind: str) -> None:
    (wheel,) = (built / kind).glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        assert file.testzip() is None and len(set(file.namelist())) == len(file.namelist())
        record = next(name for name in file.namelist() if name.endswith(".dist-info/RECORD"))
        listed = {line.split(",")[0] for line in file.read(record).decode().splitlines()}
        assert listed == set(file.namelist())
        tops = {name.split("/")[0] for name in listed}
        assert len([top for top in tops if top.endswith(".dist-info")]) == 1  # installers refuse a second one
        file.extractall(tmp_path)
    data = next(tmp_path.glob("*.data/purelib"))
    found = {d.metadata["Name"]: d for d in importlib.metadata.distributions(path=[str(data), str(tmp_path)])}
    assert set(found) == {"dvla", "lerobot_policy_dvla"}
    assert found["lerobot_policy_dvla"].version == found["dvla"].version
    if kind == ".":
        assert (tmp_path / "lerobot_policy_dvla/policy_server.py").is_file() and (tmp_path / "dvla/cli.py").is_file()
        assert (tmp_path / "dvla_client/loop.py").is_file() and (tmp_path / "dvla_client/py.typed").is_file()
        assert not (tmp_path / "client").exists() and not (tmp_path / "dvla/client").exists()
        assert not (tmp_path / "plugin").exists() and not (tmp_path / "dvla/plugin").exists()


def test_a_wheel_can_be_built_from_the_source_distribution(built: Path, tmp_path: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    assert (source / "plugin" / "build_backend.py").is_file()
    build(source, build_wheel=tmp_path)
    assert list(tmp_path.glob("*.whl"))
