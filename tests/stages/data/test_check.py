"""The doctor: a clean dataset gives no finding, and data that breaks one rule gives exactly that one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from rich.console import Console

from dvla.errors import Kind, UserError
from dvla.stages.data.check import check as check_module
from dvla.stages.data.check.check import CheckConfig, CheckReport, as_json, as_text, check, findings_table
from dvla.stages.data.check.numeric_rules import LIMITS
from dvla.stages.data.check.table_stats import LAGS
from support.doctor_samples import EPISODES, HZ, ROWS, MemorySource, Record, config, path, records
from support.repository import ROOT


@pytest.fixture
def examine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., CheckReport]:
    def run(
        made: list[Record],
        deltas: bool = False,
        fps: float = HZ,
        settings: dict[str, Any] | None = None,
        **changes: Any,
    ) -> CheckReport:
        monkeypatch.setattr(
            check_module, "open_source", lambda *_, **__: MemorySource(made, config(deltas, **changes), fps)
        )
        return check(CheckConfig(".", **(settings or {})))

    return run


# --- cases: name → (rule, severity, how the clean dataset is changed) -------------------------------------------------

Change = Callable[[list[Record]], Any]


def fails(message: str, kind: Kind = "unusable-episode") -> Change:
    return lambda made: vars(made[2]).update(fails=message, kind=kind)


def scaled(
    table: str, columns: slice, factor: float, episodes: slice = slice(None), rows: slice = slice(None)
) -> Change:
    def change(made: list[Record]) -> None:
        for record in made[episodes]:
            getattr(record, table)[rows, columns] *= factor

    return change


def filled(columns: slice, value: float, tables: tuple[str, ...] = ("action",)) -> Change:
    def change(made: list[Record]) -> None:
        for record in made:
            for table in tables:
                getattr(record, table)[:, columns] = value

    return change


def clipped(table: str, column: int) -> Change:
    def change(made: list[Record]) -> None:
        values = np.concatenate([getattr(r, table)[:, column] for r in made])
        for record in made:
            np.minimum(
                getattr(record, table)[:, column], np.quantile(values, 0.7), out=getattr(record, table)[:, column]
            )

    return change


def cut(rows: int) -> Change:
    def change(made: list[Record]) -> None:
        r = made[2]
        r.action, r.state, r.times, r.listed = r.action[:rows], r.state[:rows], r.times[:rows], rows
        r.pictures = {n: p[:rows] for n, p in r.pictures.items()}

    return change


def retimed(times: Callable[[np.ndarray], np.ndarray]) -> Change:
    return lambda made: setattr(made[2], "times", times(made[2].times))


def seen(pictures: Callable[[np.ndarray], np.ndarray]) -> Change:
    return lambda made: made[2].pictures.update(wrist=pictures(made[2].pictures["wrist"]))


def slower_camera(share: int) -> Change:
    def change(made: list[Record]) -> None:
        for record in made:
            record.pictures["front"] = record.pictures["front"][np.arange(ROWS) // share * share]

    return change


def moved_pose(made: list[Record]) -> None:
    made[1].state[30:, 3] += 1.0


def flipped(made: list[Record]) -> None:
    made[3].state[20:, 6:10] *= -1


def turned(made: list[Record]) -> None:
    made[3].state[40:, 6:10] = made[3].state[40:, 6:10] @ np.array(
        [[0, 0, 0, 1], [0, 0, 1, 0], [0, -1, 0, 0], [-1, 0, 0, 0]], np.float32
    )


def shifted(rows: int) -> Change:
    def change(made: list[Record]) -> None:
        for e, record in enumerate(made):
            poses = path(e, ROWS + 8).astype(np.float32)
            record.state, record.action = poses[4 : ROWS + 4], poses[4 + rows : ROWS + 4 + rows]

    return change


def renamed(*texts: str) -> Change:
    return lambda made: [setattr(r, "text", text) for r, text in zip(made, texts)]


def twin(made: list[Record]) -> None:
    made[4].action, made[4].state = made[1].action.copy(), made[1].state.copy()


BY_POSES: dict[str, tuple[str, str, Change]] = {
    "file gone": ("missing-file", "error", fails("data/episode_2.parquet is missing", "missing-file")),
    "NaN": ("not-finite", "error", fails("column 'action' is nan at frame 3, dimension 2", "not-finite")),
    "NaN in the array": ("not-finite", "error", lambda made: made[2].action.__setitem__((3, 2), np.nan)),
    "time repeats": ("time-order", "error", retimed(lambda t: np.where(np.arange(ROWS) == 9, t[8], t))),
    "fewer images": ("row-count", "error", seen(lambda p: p[:-1])),
    "rows against the list": ("row-count", "error", lambda made: setattr(made[2], "listed", 61)),
    "undecodable": (
        "unreadable-file",
        "error",
        lambda made: vars(made[2]).update(undecodable="frame 3 of a.mp4 cannot be decoded", kind="unreadable-file"),
    ),
    "anything else": ("unusable-episode", "error", fails("the moon is in the wrong house")),
    "a fault of the reader": ("unexpected-error", "error", fails("unexpected TypeError: no", "unexpected-error")),
    "one row": ("single-row", "warning", cut(1)),
    "short": ("short-episode", "info", cut(9)),
    "copied": ("twin-episodes", "warning", twin),
    "gap": ("time-gap", "warning", retimed(lambda t: t + 0.2 * (np.arange(ROWS) >= 30))),
    "drift": ("time-drift", "warning", retimed(lambda t: t * 1.05)),
    "black camera": ("camera-black", "error", seen(lambda p: p // 200)),
    "frozen camera": ("camera-frozen", "error", seen(lambda p: np.repeat(p[:1], ROWS, 0))),
    "slow camera": ("camera-repeats", "info", slower_camera(2)),
    "very slow camera": ("camera-repeats", "warning", slower_camera(6)),
    "size changes": ("picture-size", "warning", seen(lambda p: np.repeat(p, 2, 1))),
    "constant joint": ("constant", "warning", filled(slice(1, 2), 0.5, ("action", "state"))),
    "constant gripper": ("constant", "info", filled(slice(10, 11), 1.0)),
    "constant state": ("constant", "warning", filled(slice(None), 0.5, ("state",))),
    "clipped": ("saturated", "warning", clipped("state", 4)),
    "degrees": ("unit-joint", "error", scaled("state", slice(0, 3), 57.3)),
    "wound up": ("unit-joint", "warning", scaled("state", slice(0, 1), 9.0)),
    "millimetres": ("unit-position", "error", scaled("state", slice(3, 6), 1000.0)),
    "gripper in percent": ("unit-gripper", "error", scaled("action", slice(10, 11), 100.0)),
    "gripper beyond its end": ("unit-gripper", "warning", scaled("action", slice(10, 11), 1.3)),
    "no unit quaternion": ("rotation-norm", "error", scaled("action", slice(6, 10), 1.1)),
    "one bad quaternion": ("rotation-norm", "warning", scaled("action", slice(6, 10), 1.1, slice(1), slice(1))),
    "zero quaternion": ("rotation-norm", "error", scaled("action", slice(6, 10), 0.0, slice(1), slice(1))),
    "sign of a quaternion": ("quaternion-flip", "info", flipped),
    "rotation jumps": ("rotation-jump", "warning", turned),
    "state jumps": ("jump", "warning", moved_pose),
    "action after the state": ("action-late", "warning", shifted(-3)),
    "action is the state": ("action-is-state", "warning", shifted(0)),
    "no instruction": ("instruction-empty", "warning", renamed("", "")),
    "spellings": ("instruction-spelling", "warning", renamed("do task 0", "Do  task 0.", "do task 1")),
}
BY_DELTAS: dict[str, tuple[str, str, Change]] = {
    "Euler degrees": ("unit-angle", "error", scaled("state", slice(3, 6), 57.3)),
    "millimetres a step": ("unit-speed", "error", scaled("action", slice(0, 3), 1000.0)),
    "degrees a step": ("unit-turn", "warning", scaled("action", slice(3, 6), 57.3)),
    "clipped command": ("saturated", "info", clipped("action", 1)),
    "wrong sign": ("action-sign", "warning", scaled("action", slice(0, 1), -1.0)),
    "wrong scale": ("action-scale", "warning", scaled("action", slice(2, 3), 0.05)),
    "no action": ("constant", "error", filled(slice(None), 0.0)),
}
ELSEWHERE = {  # tested below
    *("listed-count", "unlisted-files", "rate-differs", "license-missing", "glitch", "clipped", "idle")
}


@pytest.mark.parametrize("deltas", [False, True])
@pytest.mark.parametrize("everything", [False, True])
def test_a_healthy_dataset_has_no_finding(examine: Callable[..., CheckReport], deltas: bool, everything: bool) -> None:
    report = examine(records(deltas), deltas, settings={"everything": everything})
    assert report.findings == () and not report.must_fix
    assert report.summary.startswith(
        f"memory: 6 of 6 episodes usable, 360 rows; {720 if everything else 96} images of 6 episodes decoded\n  "
        "0 errors, 0 warnings, 0 notes"
    )


@pytest.mark.parametrize(
    ("cases", "name"),
    [(cases, name) for cases in (BY_POSES, BY_DELTAS) for name in cases],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_breaking_one_rule_is_that_finding(
    examine: Callable[..., CheckReport], cases: dict[str, Any], name: str
) -> None:
    rule, severity, change = cases[name]
    made = records(cases is BY_DELTAS)
    change(made)
    changes = (
        {"state": ()} if rule == "unit-speed" else {}
    )  # with a state, it would also be seen to move less than the action says
    report = examine(made, cases is BY_DELTAS, **changes)
    assert {(f.rule, f.severity) for f in report.findings} == {(rule, severity)}, [f.message for f in report.findings]
    assert all("\n" not in f.message for f in report.findings) and report.must_fix == (severity == "error")


PARTS = ("rules", "numeric_rules", "pauses")


def test_every_rule_is_tested() -> None:
    source = "".join((ROOT / "stages/data/check" / f"{part}.py").read_text() for part in PARTS)
    ids = set(re.findall(r'(?:Finding|about_episodes|about_cameras)\(\s*"([a-z-]+)"', source))
    ids |= {f"unit-{kind}" for kind in LIMITS} | set(get_args(Kind))
    assert ids == {c[0] for c in (*BY_POSES.values(), *BY_DELTAS.values())} | ELSEWHERE


def test_a_row_far_from_all_others_is_named(examine: Callable[..., CheckReport]) -> None:
    made = records()
    made[2].state[31, 1] = made[2].state[7, 4] = 1e4
    made[4].state[5, 1] = -2e5
    found = {f.rule: f for f in examine(made).findings}["glitch"]
    assert found.message.startswith("state arm_joint_1_pos is -2e+05 at episode 4 row 5, ") and found.episodes == (2, 4)
    assert "leave it out with --exclude-episodes 4" in found.message


def test_the_share_of_idle_frames_is_told(examine: Callable[..., CheckReport]) -> None:
    made = records()
    for record in made[:3]:
        for rows in (record.action, record.state):
            rows[20:50] = rows[20]
    report = examine(made)
    (found,) = (f for f in report.findings if f.rule == "idle")
    assert found.message.startswith("17% of frames are idle: ") and "--drop-idle" in found.message
    assert as_json(report)["idle_share"] == pytest.approx(1 / 6, abs=1e-3)


def test_a_burst_is_no_glitch(examine: Callable[..., CheckReport]) -> None:
    made = records()
    made[2].state[20:40, 1] = 1e4  # a tenth of all rows: wrong, but not rare
    assert "glitch" not in {f.rule for f in examine(made).findings}


@pytest.mark.parametrize(("scheme", "expected"), [("std5-clipped", {"clipped"}), (None, set())])
def test_values_that_normalization_cuts_off(
    examine: Callable[..., CheckReport], scheme: str | None, expected: set[str]
) -> None:
    made = records()
    for record in made:
        record.action[:, 10] = 1.0
    made[1].action[30:32, 10] = 0.0  # closed in two of 360 rows
    found = {f.rule: f.message for f in examine(made, normalize=scheme).findings}
    assert set(found) == expected
    assert not expected or found["clipped"].startswith("0.56 % of action gripper_open is beyond the range of std5-")


def test_a_number_that_its_slot_s_unit_makes_infinite(examine: Callable[..., CheckReport]) -> None:
    made = records(True)
    made[2].action[3, 1] = 2e38  # times the rate beyond float32
    assert {(f.rule, f.episodes) for f in examine(made, True).findings if f.severity == "error"} == {
        ("not-finite", (2,))
    }


def test_findings_say_where(examine: Callable[..., CheckReport]) -> None:
    made = records()
    moved_pose(made)
    for number in (0, 1, 2, 4):
        made[number].fails, made[number].kind = f"clip {number}00 is missing", "missing-file"
    (missing,) = [f for f in examine(made).findings if f.rule == "missing-file"]
    assert (
        missing.message == "episode 0: clip 000 is missing; the same in 4 of 6 episodes (0-2, 4)"
        and missing.episodes == (0, 1, 2, 4)
    )
    made = records()
    moved_pose(made)
    (jump,) = examine(made).findings
    assert (
        jump.message.startswith("state 3 (eef_pos_x) jumps by 0.99")
        and "episode 1 frame 30" in jump.message
        and jump.episodes == (1,)
    )
    made = records()
    scaled("state", slice(0, 3), 57.3)(made)
    (unit,) = examine(made).findings
    assert (
        unit.message.startswith("state 0-2 (arm_joint_0_pos, arm_joint_1_pos, … 1 more) leaves -6.333 … 6.333")
        and "0.0174533" in unit.message
    )


def test_what_must_not_be_called_wrong(examine: Callable[..., CheckReport]) -> None:
    """A motion to and fro goes against itself half a period later; a slow motion's next step is like its last."""
    made = records(deltas=True)
    for e, record in enumerate(made):
        place = 0.3 + 0.05 * np.sin(2 * np.pi * np.arange(ROWS + 1)[:, None] / 12 + np.arange(3) + 0.7 * e)
        record.state[:, :3], record.action[:, :3] = place[:-1], np.diff(place, axis=0)
    assert examine(made, deltas=True).findings == ()
    made = records()
    for e, record in enumerate(made):
        slow = 0.4 * np.sin(0.02 * np.arange(ROWS + 1)[:, None] + np.arange(6) + e)
        record.state[:, :6], record.action[:, :6] = slow[:-1], slow[1:]
    report = examine(made)
    assert report.facts.following.correlation()[LAGS.index(0)].min() > 0.999 and report.findings == ()


def test_settings_of_the_config(examine: Callable[..., CheckReport]) -> None:
    assert [f.rule for f in examine(records(), license="").findings] == ["license-missing"]
    assert [f.rule for f in examine(records(), control_hz=10.0).findings] == ["rate-differs"]


def test_one_row_in_every_episode_is_a_dataset_of_poses(examine: Callable[..., CheckReport]) -> None:
    made = records()
    for i in range(EPISODES):
        cut(1)([None, None, made[i]])
    assert [(f.rule, f.severity) for f in examine(made).findings] == [("single-row", "info")]


def test_without_a_state(examine: Callable[..., CheckReport]) -> None:
    made = records()
    seen(lambda p: np.repeat(p[:1], ROWS, 0))(made)
    assert [f.rule for f in examine(made, state=()).findings] == ["camera-frozen"]


def test_nothing_usable_and_nothing_listed(examine: Callable[..., CheckReport]) -> None:
    made = records()
    for record in made:
        record.fails = "all is lost"
    report = examine(made)
    assert [f.rule for f in report.findings] == ["unusable-episode"] and as_json(report)["dimensions"] == []


def test_sampling_finds_a_missing_file_outside_the_sample(examine: Callable[..., CheckReport]) -> None:
    """Images of every episode are opened, those of the sample are decoded."""
    made = records()
    seen(lambda p: p[:-1])(made)
    report = examine(made, settings={"episodes": 1, "frames": 2})
    assert [f.rule for f in report.findings] == ["row-count"] and sum(p.frames for p in report.facts.images) == 4


@pytest.mark.parametrize("values", [{"frames": 0}, {"episodes": -1}, {"episodes": 3, "everything": True}])
def test_bad_settings(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="--episodes"):
        check(CheckConfig(".", **values))


# --- the report -------------------------------------------------------------------------------------------------------


def test_report_is_json_and_never_overwrites(examine: Callable[..., CheckReport], tmp_path: Path) -> None:
    made, out = records(), tmp_path / "new" / "report.json"
    moved_pose(made)
    report = examine(made, settings={"out": out})
    loaded = json.loads(out.read_text())
    assert loaded == json.loads(as_text(as_json(report))) and loaded["rows"] == 360 and not loaded["must_fix"]
    assert [(f["rule"], f["episodes"]) for f in loaded["findings"]] == [("jump", [1])]
    assert loaded["dimensions"][0]["name"] == "arm_joint_0_pos" and len(loaded["dimensions"]) == 22
    assert list(out.parent.iterdir()) == [out]
    with pytest.raises(UserError, match="exists; choose another"):
        examine(records(), settings={"out": out})
    assert json.loads(out.read_text()) == loaded


def test_interrupting_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def progress(stage: str, done: int, total: int) -> None:
        if stage.endswith("images"):
            raise KeyboardInterrupt

    monkeypatch.setattr(check_module, "open_source", lambda *_, **__: MemorySource(records(), config()))
    with pytest.raises(KeyboardInterrupt):
        check(CheckConfig(".", out=tmp_path / "report.json"), progress)
    assert list(tmp_path.iterdir()) == []


def test_table_of_findings(examine: Callable[..., CheckReport]) -> None:
    made = records()
    made[0].fails, made[0].kind = "a [file] is missing", "missing-file"
    console = Console(width=120)
    with console.capture() as captured:
        console.print(findings_table(examine(made)))
    assert "error" in captured.get() and "missing-file" in captured.get() and "a [file] is missing" in captured.get()
