"""Where a run's numbers go: one line per step in log.jsonl, also after a crash; trackers resume their run, have each
step once, and get no secret."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dvla.errors import UserError
from dvla.stages.training.config import TrainConfig, WandbConfig
from dvla.stages.training.run_log import RunLog, kept_lines
from dvla.stages.training.trackers.base import flat
from dvla.stages.training.trackers.catalogue import Trackers, require_trackers


def tracked(*trackers: str, mode: str = "disabled", project: str = "dvla", name: str | None = None) -> TrainConfig:
    return TrainConfig("", "", trackers=trackers, wandb=WandbConfig(mode, project, name))


OFF = tracked()


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]


def test_one_line_per_step_also_after_a_crash(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with RunLog(run, OFF, {}, step=0) as log:
        for step in (1, 50, 100, 150, 200):
            log.log({"step": step, "loss": 1 / step})
            assert steps(run)[-1] == step  # on disk at once
    with open(run / "log.jsonl", "a") as file:
        file.write('{"step": 250, "lo')  # killed while it wrote
    with RunLog(run, OFF, {}, step=100) as log:  # the newest checkpoint is step 100's
        assert steps(run) == [1, 50, 100]
        log.log({"step": 120, "loss": 0.5})
    assert steps(run) == [1, 50, 100, 120]
    before = (run / "log.jsonl").stat().st_mtime_ns
    RunLog(run, OFF, {}, step=120).close()  # a finished run is not rewritten
    assert (run / "log.jsonl").stat().st_mtime_ns == before
    assert sorted(p.name for p in run.iterdir()) == ["log.jsonl"]


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(
            UserError, match=r"cannot write .*log.jsonl: No space left on device; the checkpoints are intact"
        ),
        RunLog(tmp_path / "run", OFF, {}, step=0) as log,
    ):
        log._file.close()
        log._file = open("/dev/full", "w")
        log.log({"step": 1})
    with RunLog(tmp_path / "run", OFF, {}, step=0) as log:
        log.log({"step": 1})
    assert steps(tmp_path / "run") == [1]


def test_a_torn_last_line_is_dropped_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    whole = b'{"step": 1, "loss": NaN}\n{"step": 2}\n'
    assert kept_lines(whole + b'{"step": 3}\n{"st', path, 2) == whole
    for line, said in {
        b"not json": "Expecting value",
        b"[1]": "valid dictionary|mapping",
        b'{"loss": 2}': "'step' is missing",
        b'{"step": 1}': "its step 1 comes after 2",
        b'{"step": "3"}': "'step' is '3'",
        b"\xff": "utf-8",
        b"[" * 3000 + b"]" * 3000: "nested",
    }.items():
        with pytest.raises(UserError, match=f"log.jsonl line 3 .*({said})"):
            kept_lines(whole + line + b'\n{"step": 4}\n', path, 2)


def test_lines_for_charts() -> None:
    line = {"step": 3, "loss": float("nan"), "mean_square": [1.0, float("inf"), 2.0], "binds": "disk"}
    assert flat(line) == {"step": 3, "mean_square/0": 1.0, "mean_square/2": 2.0, "binds": "disk"}


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    require_trackers(OFF)
    for config, words in (
        (tracked(mode="online"), r"W&B mode online .* which is not installed: pip install 'dvla\[wandb\]'"),
        (tracked("wandb", mode="offline"), "W&B mode offline needs the package wandb"),
        (tracked("wandb"), "W&B mode online needs the package wandb"),
        (tracked("tensorboard"), r"--tracker tensorboard .* pip install 'dvla\[tensorboard\]'"),
        (tracked("trackio"), r"--tracker trackio .* pip install 'dvla\[trackio\]'"),
    ):
        with pytest.raises(UserError, match=words) as error:
            require_trackers(config)
        assert "\n" not in str(error.value)


def test_online_without_an_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(type(wandb.api), "api_key", None)
    with pytest.raises(
        UserError, match="this machine is not logged in: run `wandb login`, or train with --wandb-mode offline"
    ):
        require_trackers(tracked("wandb"))


def test_offline_keeps_its_run_id_and_says_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("DVLA_TEST_SECRET", "hunter2-environment")
    run, begun, settings = tmp_path / "run", [], {"cache": "s3://key:hunter2-address@host/bucket", "steps": 4}
    init = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **options: begun.append(options) or init(**options))
    for start in (0, 2):
        with RunLog(run, tracked(mode="offline", project="demo"), settings, step=start) as log:
            for step in (start + 1, start + 2):
                log.log({"step": step, "loss": 0.5, "mean_square": [1.0, 2.0]})
    identity = json.loads((run / "wandb.json").read_text())
    assert identity["project"] == "demo" and [options["id"] for options in begun] == [identity["id"]] * 2
    written = [*run.glob(f"wandb/offline-run-*/run-{identity['id']}.wandb")]
    assert len(written) == 2 and steps(run) == [1, 2, 3, 4]
    content = b"".join(path.read_bytes() for path in written)
    assert b"mean_square/1" in content and b"s3://host/bucket" in content and b"hunter2" not in content
    assert capfd.readouterr() == ("", "")
    (run / "wandb.json").write_text("{}")
    with pytest.raises(UserError, match="wandb.json is damaged: 'id' is missing.*; delete it to start a new wandb run"):
        RunLog(run, tracked(mode="offline"), settings, step=4)


# --- TensorBoard and trackio ------------------------------------------------------------------------------------------

SETTINGS = {"cache": "s3://key:hunter2-address@host/bucket", "optimizer": {"lr": 1e-3}}


def crashed_and_resumed(run: Path, config: TrainConfig, image: Path) -> list[str]:
    """Steps 1 to 4, of which the newest checkpoint has 2; then 3 to 5. What was said."""
    said: list[str] = []
    for start, stop in ((0, 4), (2, 5)):
        with RunLog(run, config, SETTINGS, step=start, say=said.append) as log:
            for step in range(start + 1, stop + 1):
                log.log({"step": step, "loss": 1 / step, "mean_square": [0.5, float("inf")], "binds": "disk"})
            log.images(stop, {"panels/A1 errors": (image, "they fall")})
    assert steps(run) == [1, 2, 3, 4, 5]
    return said


@pytest.fixture
def image(tmp_path: Path) -> Path:
    from PIL import Image

    Image.new("RGBA", (8, 6), (200, 0, 0, 255)).save(tmp_path / "A1.png")
    return tmp_path / "A1.png"


def test_tensorboard_has_each_step_once(tmp_path: Path, image: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard", reason="dvla[tensorboard] is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    assert crashed_and_resumed(run, tracked("tensorboard"), image) == []
    shown = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert shown.Tags()["scalars"] == ["loss", "mean_square/0"]
    losses = shown.Scalars("loss")
    assert len(losses) == 5 and {e.step: e.value for e in losses} == pytest.approx({n: 1 / n for n in range(1, 6)})
    assert [(e.step, e.width, e.height) for e in shown.Images("panels/A1 errors")] == [(5, 8, 6)]
    content = b"".join(p.read_bytes() for p in (run / "tensorboard").iterdir())
    assert b"s3://host/bucket" in content and b"hunter2" not in content
    assert capfd.readouterr().err == ""


def test_trackio_has_each_step_once(
    tmp_path: Path, image: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs whose folders have one name are two there."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("trackio", reason="dvla[trackio] is not installed")
    from trackio.sqlite_storage import SQLiteStorage

    runs = [tmp_path / name / "run" for name in ("a", "b")]
    for run in runs:
        assert crashed_and_resumed(run, tracked("trackio", project="demo"), image) == []
    ids = [json.loads((run / "trackio.json").read_text())["id"] for run in runs]
    assert sorted(SQLiteStorage.get_runs("demo")) == sorted(f"run-{own}" for own in ids)
    for own in ids:
        logs = SQLiteStorage.get_logs("demo", f"run-{own}")
        losses = {entry["step"]: entry["loss"] for entry in logs if "loss" in entry}
        assert len([e for e in logs if "loss" in e]) == 5 and losses == pytest.approx({n: 1 / n for n in range(1, 6)})
        assert [e["step"] for e in logs if "panels/A1 errors" in e] == [4, 5]
    assert b"hunter2" not in b"".join(p.read_bytes() for p in (tmp_path / "trackio").rglob("*") if p.is_file())
    assert capfd.readouterr() == ("", "")


class Broken:
    """A tracker whose folder went away."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def log(self, step: int, numbers: dict[str, object]) -> None:
        self.calls.append(f"log {step}")
        raise OSError(28, "No space\nleft")

    def close(self, failed: bool) -> None:
        self.calls.append(f"close {failed}")
        raise ValueError


def test_a_tracker_that_fails_is_left_and_the_run_goes_on(tmp_path: Path) -> None:
    said: list[str] = []
    with RunLog(tmp_path / "run", OFF, {}, step=0, say=said.append) as log:
        log._trackers._open["trackio"] = broken = Broken()
        for step in (1, 2):
            log.log({"step": step})
    assert steps(tmp_path / "run") == [1, 2] and broken.calls == ["log 1", "close True"]
    assert said == ["trackio failed and gets nothing more of this run: OSError: [Errno 28] No space"]


def test_a_tracker_that_cannot_begin_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("database is locked\nby another")

    monkeypatch.setattr("dvla.stages.training.trackers.catalogue.TrackioTracker", fail)
    with pytest.raises(UserError, match=r"^trackio did not start \(database is locked\); train without --tracker trac"):
        Trackers(tmp_path, tracked("trackio"), {}, 0, print)


def test_unknown_trackers_and_the_old_options() -> None:
    with pytest.raises(UserError, match="unknown tracker 'tensorbord'; did you mean 'tensorboard'"):
        tracked("tensorbord")
    with pytest.raises(UserError, match="unknown tracker"):
        TrainConfig("", "", trackers=("wandb", ""))
