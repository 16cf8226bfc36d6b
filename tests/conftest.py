"""Fixtures shared by the tests."""

import shutil
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_configure() -> None:
    """A shell starts what is in the background with Ctrl-C ignored, and so would all that the tests start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test sees the dataset configs of the person who runs it, or leaves one behind."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.getbasetemp() / "none" / uuid.uuid4().hex))


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """What a test has done to the handling of signals, LeRobot's commands among others, ends with it."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Optional material (facts, goldens, real recordings) in a folder `shared` beside the repository."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip("no shared material beside the repository")
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A finished cache of made-up features; not to be changed."""
    from support.synthetic_cache import build

    path = tmp_path_factory.mktemp("synthetic") / "cache"
    build(path)
    return path


@pytest.fixture(scope="session")
def recorded(tmp_path_factory) -> dict[str, Path]:
    """Kind → dataset written by lerobot: h264 (episodes in one file), hevc (a file each), image (PNG in parquet)."""
    from support.lerobot_samples import KINDS, record

    base = tmp_path_factory.mktemp("lerobot")
    return {kind: record(base / kind, *how) for kind, how in KINDS.items()}


@pytest.fixture
def copy_of(recorded, tmp_path):
    """`copy_of(kind)` → a copy of that dataset that the test may damage."""
    return lambda kind: shutil.copytree(recorded[kind], tmp_path / kind)


@pytest.fixture
def episode_folder(tmp_path):
    """A folder of Episode-HDF5 files."""
    from support.hdf5_samples import write_episode_folder

    return write_episode_folder(tmp_path / "sample")


@pytest.fixture
def demos(tmp_path):
    """A robomimic file."""
    from support.hdf5_samples import write_robomimic

    return write_robomimic(tmp_path / "can" / "image.hdf5")


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder of RLDS episodes with every kind of feature; not to be changed."""
    from support.rlds_samples import write_toy

    return write_toy(tmp_path_factory.mktemp("rlds"))


@pytest.fixture
def toy_copy(toy, tmp_path):
    """A copy of `toy` that the test may damage."""
    return shutil.copytree(toy.parent, tmp_path / "toy") / toy.name


@pytest.fixture
def dvla(monkeypatch, capsys):
    """`dvla(*arguments)` → `cli_runner.Result` of one command line."""
    from support.cli_runner import runner

    return runner(monkeypatch, capsys)
