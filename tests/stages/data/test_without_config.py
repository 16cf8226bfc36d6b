"""Every command that looks at data works on a dataset that no config describes, of any format; what builds refuses it
in one line; `data add` then describes it."""

from __future__ import annotations

import functools
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from dvla.cache.actions.slots import SLOTS
from dvla.cache.readers import open_source
from dvla.cache.readers.search import load_config, registered_folder
from dvla.stages.data.add.guesses import guess
from dvla.stages.data.add.proposals import Vector, propose
from dvla.stages.data.add.questions import QUESTIONS
from support.cli_runner import Dvla, argv, refused, runner
from support.hdf5_samples import write_replay_buffer, write_robomimic
from support.rlds_samples import write_toy
from support.robot_samples import ramp, write_robot


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Dvla:
    """`run(*arguments)` runs any command."""
    return runner(monkeypatch, capsys)


@pytest.fixture
def dvla(run: Dvla) -> Dvla:
    """`dvla(*arguments)` runs one `dvla data` command."""
    return functools.partial(run, "data")


def squeezed(text: str) -> str:
    return " ".join(text.split())


ARM = [*(f"joint_{i}" for i in range(6)), "gripper"]
VALUES = ramp([(0.5 + i, 1.5 + i) for i in range(4)] + [(-1.0, 1.0)] * 2 + [(0.0, 0.9)])


def lerobot(root: Path) -> Path:
    return write_robot(root / "bench", "toaster", ARM, VALUES)


def replay_buffer(root: Path) -> Path:
    return write_replay_buffer(root / "cubes.zarr")


def robomimic(root: Path) -> Path:
    return write_robomimic(root / "toast/demo.hdf5", env_name="Toast")


def rlds(root: Path) -> Path:
    return write_toy(root)


FORMATS = {
    lerobot: ("action 6 gripper 0 0.9", "rate 10 Hz"),
    replay_buffer: ("action 1 action[1]", "rate not in the files"),
    robomimic: ("obs/robot0_eef_quat 3 obs/robot0_eef_quat[3]", "rate 20 Hz"),
    rlds: ("action/move", "rate not in the files"),
}


@pytest.mark.parametrize("write", FORMATS)
def test_everything_that_needs_no_map(run: Dvla, dvla: Dvla, tmp_path: Path, write) -> None:
    root = write(tmp_path)
    number = open_source(root, unmapped=True).episode_ids[-1]
    shown = dvla("show", root, "--episode", number)
    assert shown.code == 0, shown
    for words in (*FORMATS[write], "config none fits", f"episode {number}: "):
        assert words in squeezed(shown.out)
    assert "no dataset config fits" in shown.err and f"run `dvla data add {root}`" in shown.err
    checked = dvla("check", root)
    assert checked.code in (0, 1) and "not checked: units, rotations, action against state" in checked.out
    assert "episodes usable" in checked.out and "unexpected" not in checked.out
    stats = dvla("stats", root, "--native")
    assert stats.code == 0 and "action, native" in stats.out and "unified" not in stats.out
    assert dvla("video", root, "--episode", number, "-o", tmp_path / "e.mp4").code == 0
    assert (tmp_path / "e.mp4").stat().st_size > 1000
    listed = dvla("list", root.parent if write is robomimic else root)
    assert listed.code == 0 and "none" in squeezed(listed.out) and listed.err == ""
    line = "no dataset config fits", f"run `dvla data add {root}`"
    refused(dvla("export", root, "--out", tmp_path / "x"), *line)
    result = run("cache", "build", root, "--vlm", "tiny_qwen3vl", "--vlm-path", tmp_path, "--out", tmp_path / "x")
    refused(result, *line)
    assert len(result.err) < 120 + len(str(root)) and not (tmp_path / "x").exists()


def test_a_name_that_fits_another_width(dvla: Dvla, tmp_path: Path) -> None:
    """A config that fits by name and does not describe the files is named, and they are shown without it."""
    root = write_robot(tmp_path / "taco_play", None, 3, VALUES[:, :3])
    shown = dvla("show", root)
    assert shown.code == 0 and "config none fits" in squeezed(shown.out)
    assert "has 3 dimensions, dataset config 'taco_play' describes 7" in shown.err
    assert "taco_play" in dvla("list", root).err
    refused(dvla("export", root, "--out", tmp_path / "x"), "dataset config 'taco_play' describes 7")


def test_without_a_camera(dvla: Dvla, tmp_path: Path) -> None:
    root = write_robomimic(tmp_path / "low/low_dim.hdf5", env_name="Toast", images=False)
    shown = dvla("show", root, "--episode", 10)
    assert shown.code == 0 and "cameras none" in squeezed(shown.out) and "robot0_eef_pos" in shown.out
    assert dvla("stats", root).code == 0
    refused(dvla("export", root, "--out", tmp_path / "x"), "no dataset config fits")


def test_ranges_and_report(dvla: Dvla, tmp_path: Path) -> None:
    root, out = lerobot(tmp_path), tmp_path / "r.json"
    assert dvla("stats", root, "--out", out).code == 0
    report = json.loads(out.read_text())
    assert report["datasets"][0]["config"] is None and report["action"]["unified"] == {}
    assert list(report["state"]["native"]) == [f"{i} {name}" for i, name in enumerate(ARM)]
    assert report["state"]["native"]["3 joint_3"]["max"] == pytest.approx(4.5)
    out = tmp_path / "check.json"
    assert dvla("check", root, "--out", out).code == 0
    found = json.loads(out.read_text())
    assert found["dataset_config"] is None and [d["name"] for d in found["dimensions"]] == ARM * 2


# --- add -------------------------------------------------------------------------------------------------------------


def test_certain_answers_are_taken_and_the_rest_is_asked_in_one_line(dvla: Dvla, tmp_path: Path) -> None:
    root = lerobot(tmp_path)
    result = dvla("add", root)
    refused(result, "add --gripper 1,0 (proposed) (--yes takes what is proposed)")
    assert "--joint-unit" not in result.err and "--embodiment" not in result.err  # certain
    assert not registered_folder().exists()
    assert dvla("add", root, "--gripper", "closed=0.9 open=0").code == 0
    config = open_source(root).config
    assert config.origin == str(registered_folder() / "bench.yaml") and config.embodiment == "gripper_joint"
    end = open_source(root).action_map.to_unified(VALUES)[-1]
    assert end[SLOTS["arm_joint_3_pos"]] == pytest.approx(4.5) and end[SLOTS["gripper_open"]] == pytest.approx(
        0, abs=1e-6
    )
    assert "registered: bench" in squeezed(dvla("list").out)


def test_yes_takes_every_proposal(dvla: Dvla, tmp_path: Path) -> None:
    assert dvla("add", lerobot(tmp_path), "--yes").code == 0
    note = load_config("bench").note
    assert "--action-kind absolute, --joint-unit rad, --gripper 1,0" in note


def test_a_terminal_shows_the_proposal_as_default(dvla: Dvla, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    root = lerobot(tmp_path)
    monkeypatch.setattr(sys, "stdin", Terminal("\n" * 4))
    asked = dvla("add", root, "--out", tmp_path / "asked.yaml")
    assert asked.code == 0 and "(they reach 4.5) [rad]" in asked.out and "[gripper_joint]" in asked.out
    assert dvla("add", root, "--yes", "--out", tmp_path / "given.yaml").code == 0
    assert (tmp_path / "asked.yaml").read_text() == (tmp_path / "given.yaml").read_text()


def test_add_of_a_robomimic_file(dvla: Dvla, tmp_path: Path) -> None:
    root = robomimic(tmp_path)
    command = argv(
        f"add {root} --action-kind displacements --delta-scale 0.05,0.5 --gripper=-1,1 --state-gripper 0.04,0"
    )
    refused(dvla(*command), "--field action.0-6=…")
    field = "action.0-6=eef_vel_x,eef_vel_y,eef_vel_z,eef_angular_vel_roll,eef_angular_vel_pitch,eef_angular_vel_yaw,"
    more = ("--field", f"{field}gripper_open", "--field", "state.8=drop", "--embodiment", "gripper_delta_eef")
    result = dvla(*command, *more, "--position-unit", "metres")
    assert result.code == 0, result
    source = open_source(root)
    assert source.config.format == "robomimic" and source.config.match == ("toast",)
    table = source.table(0)
    shipped = load_config("robomimic")
    want = open_source(root, shipped)
    np.testing.assert_allclose(
        source.action_map.to_unified(table.action)[:, 39:45], want.action_map.to_unified(table.action)[:, 39:45]
    )
    np.testing.assert_allclose(
        source.state_map.to_unified(table.state)[:, 30:39], want.state_map.to_unified(table.state)[:, 30:39]
    )


def test_add_where_the_files_do_not_tell_the_rate(dvla: Dvla, tmp_path: Path) -> None:
    root = replay_buffer(tmp_path)
    fields = argv("--field action.0-1=eef_pos_x,eef_pos_y --field state.0-4=eef_pos_x,eef_pos_y,drop:3")
    command = ("add", root, *fields, *argv("--embodiment eef --action-kind target --position-unit millimeters"))
    refused(dvla(*command), "add --control-hz: rows per second, which the files do not give")
    refused(dvla(*command, "--control-hz", "0"), "--control-hz: '0': give a number of rows per second above 0")
    assert dvla(*command, "--control-hz", "10 Hz").code == 0
    source = open_source(root)
    assert source.control_hz == 10 and source.config.action[0].scale == pytest.approx(0.001)


def test_add_by_the_modality_of_gr00t(dvla: Dvla, tmp_path: Path) -> None:
    parts = {
        "left_arm": {"start": 0, "end": 2},
        "left_hand": {"start": 2, "end": 4},
        "right_arm": {"start": 4, "end": 6},
    }
    values = ramp([(0.5, 1.5 + i) for i in range(6)])
    root = write_robot(tmp_path / "mod", "new", 6, values, modality={"state": parts, "action": parts})
    result = dvla("add", root, "--yes")
    assert result.code == 0, result
    names = open_source(root).action_map
    assert names.field_names[:3] == ("left_arm_joint_0_pos", "left_arm_joint_1_pos", "left_dex_finger_joint_0_pos")
    assert names.native_names[2] == "left_hand.0" and open_source(root).config.embodiment == "bimanual_dex"


SYNONYMS = [
    ("--joint-unit", "degrees", "deg"),
    ("--joint-unit", "Radians", "rad"),
    ("--joint-unit", "%", "percent"),
    ("--position-unit", "millimetres", "mm"),
    ("--position-unit", "Meters", "m"),
    ("--action-kind", "position", "absolute"),
    ("--action-kind", "Relative", "delta"),
    ("--action-kind", "displacement", "delta"),
    ("--rotation", "axis-angle", "axis_angle"),
    ("--rotation", "RPY", "euler_xyz"),
    ("--gripper", "open=100, closed=0", "100,0"),
    ("--gripper", "closed 0 open 1", "1,0"),
    ("--delta-scale", "meters,degrees", "m,deg"),
    ("--embodiment", "Gripper Joint", "gripper_joint"),
    ("--control-hz", "30Hz", "30"),
]


@pytest.mark.parametrize("option, said, meant", SYNONYMS)
def test_synonyms(option: str, said: str, meant: str) -> None:
    read = QUESTIONS[option].read
    assert read(said) == read(meant)


PROPOSALS = [  # option, names, limits of the action, of the state, answer, certain
    ("--joint-unit", ARM, [(-3.0, 3.1)] * 6 + [(0, 1)], None, "rad", True),
    ("--joint-unit", ARM, [(-0.9, 0.9)] * 6 + [(0, 1)], None, "rad", False),
    ("--joint-unit", ARM, [(-170.0, 90.0)] * 6 + [(0, 1)], None, "deg", True),
    ("--joint-unit", ARM, [(-60.0, 70.0)] * 6 + [(0, 1)], None, "deg", False),
    ("--joint-unit", ARM, [(-100.0, 99.5)] * 6 + [(0, 1)], None, "percent", False),
    ("--joint-unit", ARM, [(0.0, 4095.0)] * 6 + [(0, 1)], None, None, False),
    ("--gripper", ["gripper_closedness"], [(0.0, 1.0)], None, "0,1", True),
    ("--gripper", ["gripper_width"], [(0.001, 0.079)], None, "0.08,0", True),
    ("--gripper", ["gripper"], [(0.0, 848.0)], None, "850,0", True),
    ("--gripper", ["gripper"], [(3.0, 97.0)], None, "100,0", False),
    ("--gripper", ["gripper"], [(0.0, 0.0)], None, None, False),
    ("--position-unit", ["x", "y", "z"], [(0.2, 0.7)] * 3, None, "m", True),
    ("--position-unit", ["x", "y", "z"], [(200.0, 700.0)] * 3, None, "mm", True),
    ("--action-kind", ["delta_x", "dy", "dz"], [(-1.0, 1.0)] * 3, None, "delta", True),
    ("--action-kind", ["x", "y", "z"], [(-0.02, 0.02)] * 3, [(0.2, 0.7)] * 3, "delta", False),
    ("--action-kind", ARM, [(0.5, 2.0)] * 7, [(0.52, 1.97)] * 7, "absolute", True),
    ("--embodiment", [f"{s}_{n}" for s in ("left", "right") for n in ARM], [(0, 1)] * 14, None, "bimanual", True),
]


@pytest.mark.parametrize("option, names, action, state, answer, certain", PROPOSALS)
def test_proposals(option, names, action, state, answer, certain) -> None:
    low, high = np.array(action, float).T
    vectors = {"action": Vector(guess(names), low, high)}
    vectors["state"] = Vector(guess(names), *np.array(state, float).T) if state else Vector([], low[:0], high[:0])
    found = propose(option, vectors, "", {})
    assert (found and found.answer, bool(found and found.certain)) == (answer, certain)


def test_lerobots_grippers_are_known() -> None:
    vectors = {"action": Vector(guess(["gripper.pos"]), np.array([1.0]), np.array([99.0]))}
    vectors["state"] = vectors["action"]
    found = propose("--gripper", vectors, "so101_follower", {})
    assert found is not None and (found.answer, found.certain) == ("100,0", True)
