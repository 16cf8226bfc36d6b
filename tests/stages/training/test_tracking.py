"""Where a run's numbers go: one line per step in log.jsonl, also after a crash; W&B resumes its run and gets no
secret."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dvla.errors import UserError
from dvla.stages.training.config import WandbConfig
from dvla.stages.training.run_log import Tracker, flat, kept_lines, require_wandb

OFF = WandbConfig()


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]


def test_one_line_per_step_also_after_a_crash(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Tracker(run, OFF, {}, step=0) as tracker:
        for step in (1, 50, 100, 150, 200):
            tracker.log({"step": step, "loss": 1 / step})
            assert steps(run)[-1] == step  # on disk at once
    with open(run / "log.jsonl", "a") as file:
        file.write('{"step": 250, "lo')  # killed while it wrote
    with Tracker(run, OFF, {}, step=100) as tracker:  # the newest checkpoint is step 100's
        assert steps(run) == [1, 50, 100]
        tracker.log({"step": 120, "loss": 0.5})
    assert steps(run) == [1, 50, 100, 120]
    before = (run / "log.jsonl").stat().st_mtime_ns
    Tracker(run, OFF, {}, step=120).close()  # a finished run is not rewritten
    assert (run / "log.jsonl").stat().st_mtime_ns == before
    assert sorted(p.name for p in run.iterdir()) == ["log.jsonl"]


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(
            UserError, match=r"cannot write .*log.jsonl: No space left on device; the checkpoints are intact"
        ),
        Tracker(tmp_path / "run", OFF, {}, step=0) as tracker,
    ):
        tracker._file.close()
        tracker._file = open("/dev/full", "w")
        tracker.log({"step": 1})
    with Tracker(tmp_path / "run", OFF, {}, step=0) as tracker:
        tracker.log({"step": 1})
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
        b"[" * 3000: "nested too deeply",
    }.items():
        with pytest.raises(UserError, match=f"log.jsonl line 3 .*({said})"):
            kept_lines(whole + line + b'\n{"step": 4}\n', path, 2)


def test_lines_for_charts() -> None:
    line = {"step": 3, "loss": float("nan"), "mean_square": [1.0, float("inf"), 2.0], "binds": "disk"}
    assert flat(line) == {"step": 3, "mean_square/0": 1.0, "mean_square/2": 2.0, "binds": "disk"}


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    require_wandb(OFF)
    for mode in ("online", "offline"):
        with pytest.raises(
            UserError, match=r"W&B mode .* which is not installed: pip install 'dvla\[wandb\]'"
        ) as error:
            Tracker(tmp_path / "run", WandbConfig(mode), {}, step=0)
        assert "\n" not in str(error.value)


def test_online_without_an_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(type(wandb.api), "api_key", None)
    with pytest.raises(
        UserError, match="this machine is not logged in: run `wandb login`, or train with --wandb-mode offline"
    ):
        require_wandb(WandbConfig("online"))


def test_offline_keeps_its_run_id_and_says_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("DVLA_TEST_SECRET", "hunter2-environment")
    run, begun, settings = tmp_path / "run", [], {"cache": "s3://key:hunter2-address@host/bucket", "steps": 4}
    init = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **options: begun.append(options) or init(**options))
    for start in (0, 2):
        with Tracker(run, WandbConfig("offline", project="demo"), settings, step=start) as tracker:
            for step in (start + 1, start + 2):
                tracker.log({"step": step, "loss": 0.5, "mean_square": [1.0, 2.0]})
    identity = json.loads((run / "wandb.json").read_text())
    assert identity["project"] == "demo" and [options["id"] for options in begun] == [identity["id"]] * 2
    written = [*run.glob(f"wandb/offline-run-*/run-{identity['id']}.wandb")]
    assert len(written) == 2 and steps(run) == [1, 2, 3, 4]
    content = b"".join(path.read_bytes() for path in written)
    assert b"mean_square/1" in content and b"s3://host/bucket" in content and b"hunter2" not in content
    assert capfd.readouterr() == ("", "")
    (run / "wandb.json").write_text("{}")
    with pytest.raises(UserError, match="wandb.json is damaged: .*; delete it to start a new W&B run"):
        Tracker(run, WandbConfig("offline"), settings, step=4)
