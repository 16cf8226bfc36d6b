"""The doctor on files: recordings, damage, exit codes; and what it remembers of rows, steps and rotations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dvla import cli
from dvla.cache.actions.action_map import ActionMap, FieldSpec
from dvla.cache.actions.slots import kind_of
from dvla.errors import UserError
from dvla.stages.data.check.check import CheckConfig, check, rhythm
from dvla.stages.data.check.findings import ranges
from dvla.stages.data.check.images import sample_episodes, sample_frames, thumbnail
from dvla.stages.data.check.numeric_rules import limits
from dvla.stages.data.check.table_stats import (
    LAGS,
    Following,
    Steps,
    TableStats,
    dimensions,
    rotation_defect,
    step_angles,
)
from support.doctor_samples import HZ, PLACES, path
from support.hdf5_samples import edit
from support.lerobot_samples import FPS, LENGTHS, convert_to_v2, rewrite, with_column

# --- on files ---------------------------------------------------------------------------------------------------------


def plausible(table: Any) -> Any:
    """Recorded files hold random numbers; these are smooth, with the gripper between its ends, and the state follows
    the action."""
    values = np.concatenate(
        [np.stack([path(e, n + 1)[:, [3, 4, 5, 10]] for _ in "a"])[0][:-1] for e, n in enumerate(LENGTHS)]
    )
    action = np.concatenate([np.diff(path(e, n + 1)[:, [3, 4, 5, 10]], axis=0) * 100 for e, n in enumerate(LENGTHS)])
    action[:, 3] = np.clip(action[:, 3], -1, 1)
    return with_column(with_column(table, "observation.state", values.tolist()), "action", action.tolist())


@pytest.fixture
def healthy(copy_of: Any) -> Callable[[str], Path]:
    def make(kind: str) -> Path:
        root = copy_of(kind)
        files = sorted((root / "data").glob("*/*.parquet"))
        if len(files) == 1:
            rewrite(files[0], plausible)
        return root

    return make


@pytest.mark.parametrize("kind", ["h264", "image"])
def test_recorded_by_lerobot(healthy: Callable[[str], Path], kind: str) -> None:
    report = check(CheckConfig(str(healthy(kind)), everything=True))
    assert {f.rule for f in report.findings} == {"short-episode"}, [f.message for f in report.findings]
    assert sum(p.frames for p in report.facts.images) == 2 * sum(LENGTHS)


def test_older_layout_listed_and_present(healthy: Callable[[str], Path], tmp_path: Path) -> None:
    """v2.1 with 100 episodes listed and 3 present, one file that is not listed, totals that are wrong."""
    root = convert_to_v2(healthy("image"), tmp_path / "v2")
    assert {f.rule for f in check(CheckConfig(str(root), dataset_config="metaworld")).findings} == {"short-episode"}
    lines = [json.dumps({"episode_index": i, "tasks": ["push the puck"], "length": 10}) for i in range(3, 100)]
    with (root / "meta/episodes.jsonl").open("a") as file:
        file.write("\n".join(lines) + "\n")
    report = check(CheckConfig(str(root), dataset_config="metaworld"))
    assert [(f.rule, f.severity) for f in report.findings] == [
        ("missing-file", "error"),
        ("partly-present", "warning"),
        ("listed-count", "warning"),
        ("listed-count", "warning"),
        ("short-episode", "info"),
    ]
    assert report.findings[0].message == (
        "episode 3: data/chunk-000/episode_000003.parquet is missing; the same in 97 of 100 episodes (3-99)"
    )
    assert report.findings[1].message.startswith("3 of 100 episodes present: 3 tables;")
    assert "gives a total of 3 episodes but lists 100" in report.findings[2].message
    (root / "meta/episodes.jsonl").write_text(
        "\n".join(lines[:0] + (root / "meta/episodes.jsonl").read_text().splitlines()[:2]) + "\n"
    )
    report = check(CheckConfig(str(root), dataset_config="metaworld"))
    (unlisted,) = [f for f in report.findings if f.rule == "unlisted-files"]
    assert unlisted.episodes == (2,)


def test_damaged_files(healthy: Callable[[str], Path]) -> None:
    """A truncated video of another episode than those that are decoded."""
    root = healthy("hevc")
    for i, file in enumerate(sorted((root / "data").glob("*/*.parquet"))):
        if i == 2:
            file.write_bytes(file.read_bytes()[:-20])
    video = sorted(root.glob("videos/*front/*/*.mp4"))[1]
    video.write_bytes(video.read_bytes()[:1000])
    report = check(CheckConfig(str(root), episodes=1))
    unreadable = [f for f in report.findings if f.rule == "unreadable-file"]
    assert {f.episodes for f in unreadable} == {(1,), (2,)} and "file-001.mp4" in " ".join(
        f.message for f in unreadable
    )
    assert report.facts.lengths.keys() == {0, 1}


def test_exit_codes(healthy: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = healthy("h264")
    cli.run(["data", "check", str(root), "--out", str(tmp_path / "report.json")])
    assert (
        "3 of 3 episodes usable" in capsys.readouterr().out
        and json.loads((tmp_path / "report.json").read_text())["must_fix"] is False
    )
    with pytest.raises(UserError, match="report.json exists"):
        cli.run(["data", "check", str(root), "--out", str(tmp_path / "report.json")])
    sorted(root.glob("videos/*front/*/*.mp4"))[0].unlink()
    with pytest.raises(SystemExit) as ended:
        cli.run(["data", "check", str(root)])
    assert ended.value.code == 1 and "missing-file" in capsys.readouterr().out


def test_real_recordings(shared_dir: Path) -> None:
    robot = check(CheckConfig(str(shared_dir / "data" / "unitree_g1_inspire_v21")))
    serious = [(f.rule, f.severity) for f in robot.findings if f.severity != "info"]
    assert serious == [("missing-file", "error"), ("partly-present", "warning")]
    assert len(robot.findings[0].episodes) == 95 and "95 of 100" in robot.findings[0].message
    bridge = check(CheckConfig(str(shared_dir / "data" / "octo_bridge_debug_rlds")))
    # the two splits of this sample hold the same episodes
    assert [(f.rule, f.severity) for f in bridge.findings if f.severity != "info"] == [("twin-episodes", "warning")]
    assert bridge.findings[0].episodes == tuple(range(25, 50))


# --- what is remembered -----------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(0, 2**31))
def test_streamed_extremes_equal_those_of_the_whole(lengths: list[int], seed: int) -> None:
    rng, mapping = np.random.default_rng(seed), ActionMap(PLACES, HZ)
    parts = [rng.integers(-4, 5, (n, 7)).astype(np.float32) for n in lengths]
    stats, whole = TableStats("state", mapping, *limits(dimensions("state", mapping))), np.concatenate(parts)
    for i, part in enumerate(parts):
        stats.update(i, part)
    np.testing.assert_array_equal(stats.low, whole.min(0))
    np.testing.assert_array_equal(stats.high, whole.max(0))
    np.testing.assert_array_equal(stats.at_low, (whole == whole.min(0)).sum(0))
    np.testing.assert_array_equal(stats.at_high, (whole == whole.max(0)).sum(0))
    np.testing.assert_array_equal(stats.odd[:3], (np.abs(whole[:, :3]) > 3).sum(0))
    for d in range(3):
        assert abs(stats.worst[d]) == (4 if (np.abs(whole[:, d]) == 4).any() else 0)
        episode, frame = stats.worst_at[d]
        assert episode < 0 or parts[episode][frame, d] == stats.worst[d]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 400), st.floats(0.5, 0.99), st.integers(0, 2**31))
def test_quantile_of_steps_is_within_half_an_octave(count: int, q: float, seed: int) -> None:
    rng, steps = np.random.default_rng(seed), Steps(2)
    sizes = np.exp(rng.normal(-3, 2, (count, 2)))
    sizes[:, 1] = 0
    for part in np.array_split(sizes, 3):
        steps.update(7, part)
    exact = np.quantile(sizes[:, 0], q, method="inverted_cdf")
    assert exact <= steps.quantile(q)[0] <= exact * 2**0.5 * 1.0001 and steps.quantile(q)[1] == 0
    assert steps.largest(0)[0][0] == sizes[:, 0].max()


@pytest.mark.parametrize("lag", [-3, 0, 5])
def test_following_finds_the_lag(lag: int) -> None:
    rng = np.random.default_rng(0)
    walk = np.cumsum(np.convolve(rng.normal(size=500), np.ones(3), "same"))[:, None]
    action, state = walk[20:400], walk[20 - lag : 400 - lag]
    dims = dimensions("action", ActionMap((FieldSpec(field="arm_joint_0_pos"),), HZ))
    following = Following(dims, dims, HZ)
    for part in (slice(0, 100), slice(100, 380)):
        following.update(action[part], state[part])
    best = int(following.correlation().mean(1).argmax())
    assert LAGS[best] == lag and following.slope(lag)[0] == pytest.approx(1, abs=1e-6)


def test_rotations() -> None:
    half = np.pi / 6
    quaternions = np.array([[0, 0, 0, 1.0], [0, 0, np.sin(half), np.cos(half)], [0, 0, 0, 2.0]])
    np.testing.assert_allclose(step_angles("quat_xyzw", quaternions), [np.pi / 3] * 2)
    np.testing.assert_allclose(rotation_defect("quat_xyzw", quaternions), [0, 0, 1])
    np.testing.assert_allclose(
        rotation_defect("rot6d", np.array([[1.0, 0, 0, 0, 1, 0], [1, 0, 0, 1, 0, 0], [2, 0, 0, 0, 1, 0]])), [0, 1, 3]
    )
    assert step_angles("axis_angle", np.array([[0, 0, 0.1], [0, 0, 0.1 - 2 * np.pi]])) == pytest.approx(0, abs=1e-6)


def test_kinds() -> None:
    names = {
        "left_arm_joint_3_pos": "joint",
        "torso_joint_0_pos": "joint",
        "spine_joint": "joint",
        "right_gripper_open": "gripper",
        "left_dex_finger_joint_2_pos": "finger",
        "gripper_joint_1_pos": "finger",
        "left_eef_pos_z": "position",
        "eef_vel_x": "speed",
        "base_vel_y": "speed",
        "base_angular_vel": "turn",
        "eef_angular_vel_yaw": "turn",
        "arm_joint_2_vel": "turn",
        "gripper_open_vel": "other",
    }
    assert {name: kind_of(name) for name in names} == names


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.booleans())
def test_sampled_frames(length: int, frames: int, odd: bool) -> None:
    chosen = sample_frames(length, frames, odd)
    count = sum(b - a for a, b in chosen)
    assert all(0 <= a < b <= length for a, b in chosen) and all(a[1] <= b[0] for a, b in zip(chosen, chosen[1:]))
    assert count == length if length <= frames else 1 <= count <= max(2, frames)
    if length > frames >= 4:
        assert chosen[0][0] <= 1 and chosen[-1][1] >= length - 1 and len({a % 2 for a, _ in chosen}) == 1


@pytest.mark.parametrize("size", [(32, 40), (37, 61), (5, 3), (480, 8)])
def test_thumbnail_is_the_mean_of_blocks(size: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    by, bx = min(8, size[0]), min(8, size[1])
    small = thumbnail(picture)
    assert small.shape == (size[0] // by, size[1] // bx, 3) and small.dtype == np.float32
    for y, x in np.ndindex(small.shape[:2]):
        np.testing.assert_allclose(
            small[y, x], picture[y * by : (y + 1) * by, x * bx : (x + 1) * bx].reshape(-1, 3).mean(0), rtol=1e-6
        )


def test_sampled_episodes_and_ranges() -> None:
    assert (
        sample_episodes([3, 5, 8, 9, 20], 3) == [3, 8, 20]
        and sample_episodes([1, 2], 5) == [1, 2]
        and sample_episodes([1, 2], 0) == []
    )
    assert ranges([5, 0, 1, 2, 2]) == "0-2, 5" and ranges(range(0, 40, 2)) == "0, 2, 4, 6, 8, 10, … 14 more"


def test_rhythm() -> None:
    even = np.arange(50) / FPS
    assert rhythm(even, FPS) == ([], None) and rhythm(even[:1], FPS) == ([], None)
    gaps, drift = rhythm(even + 0.5 * (np.arange(50) > 9), FPS)
    assert [g[0] for g in gaps] == [10] and drift is None
    assert rhythm(even[:12] * 1.01, FPS)[1] is None and rhythm(even[:12] * 1.05, FPS)[1] is not None  # half a row off
    gaps, drift = rhythm(even * 2, FPS)
    assert gaps == [] and drift is not None and drift[1] == pytest.approx(FPS / 2)


def test_failed_demonstrations_are_named(demos):
    edit(demos, lambda f: f["data/demo_2"].attrs.update(success=False))
    (found,) = [f for f in check(CheckConfig(source=str(demos), episodes=0)).findings if f.rule.startswith("failed")]
    assert found.episodes == (2,) and "--success-only leaves it out" in found.message
