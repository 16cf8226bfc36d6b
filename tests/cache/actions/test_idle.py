"""Pauses of demonstrations: half a second or more in which nothing moves, whatever the robot."""

from __future__ import annotations

import numpy as np
import pytest

from dvla.cache.actions.idle import bands, idle_frames
from dvla.cache.actions.slots import SLOTS
from dvla.cache.actions.statistics import statistics_of

HZ, REST = 20.0, 40  # frames per second, frames of the pause
JOINTS = [SLOTS[f"arm_joint_{i}_pos"] for i in range(3)]
GRIPPER, SPEED = SLOTS["gripper_open"], SLOTS["eef_vel_x"]


def demonstration(seed: int = 0) -> np.ndarray:
    """[100, 128]: joints that move for 30 frames, rest for 40 and move for 30."""
    steps = np.random.default_rng(seed).uniform(0.02, 0.05, (100, 3)) * [1, -1, 1]
    steps[30 : 30 + REST] = 0
    out = np.zeros((100, 128), np.float32)
    out[:, JOINTS] = np.cumsum(steps, axis=0)
    return out


def found(*tables: np.ndarray, hz: float = HZ) -> np.ndarray:
    """The idle frames of the one demonstration of a dataset."""
    used = [np.flatnonzero(t.any(0)) for t in tables]
    masks = [np.isin(np.arange(128), u) for u in used]
    return np.flatnonzero(idle_frames([(t, bands(statistics_of(t), m)) for t, m in zip(tables, masks)], hz))


def test_a_pause_is_idle_but_for_its_margins() -> None:
    idle = found(demonstration())
    assert idle.tolist() == list(range(29 + 5, 69 - 4))  # from the last pose of the motion on; margins of 5 frames
    assert found(demonstration()[:30]).size == 0  # motion alone


def test_a_pause_shorter_than_half_a_second_is_motion() -> None:
    x = demonstration()
    short = np.concatenate([x[:38], x[70:] - x[70] + x[37]])  # ten frames at rest: half a second
    assert found(short).size == 0
    assert found(x, hz=90.0).size == 0  # 40 frames are less than half a second


def test_the_ends_of_a_demonstration_need_no_margin() -> None:
    x = demonstration()
    waiting = np.concatenate([np.repeat(x[:1], 30, axis=0), x[:30], np.repeat(x[29:30], 30, axis=0)])
    idle = found(waiting)
    assert idle[0] == 0 and idle[-1] == len(waiting) - 1 and not np.isin(np.arange(27, 64), idle).any()


def test_one_that_never_moves_keeps_its_first_frame() -> None:
    moving, still = demonstration(), np.ones((50, 128), np.float32)
    mask = np.isin(np.arange(128), JOINTS)
    band = bands(statistics_of(moving), mask)
    assert np.flatnonzero(~idle_frames([(still, band)], HZ)).tolist() == [0]


@pytest.mark.parametrize("frame", [40, 50, 69])
def test_a_gripper_that_closes_is_motion_however_rare(frame: int) -> None:
    x = demonstration()
    x[:, GRIPPER] = 1.0
    x[frame:, GRIPPER] = 0.0
    idle = found(x)
    assert not np.isin([frame - 1, frame], idle).any()
    many = np.concatenate([demonstration(i) for i in range(40)])  # closed in 1 of 4000 rows
    many[:, GRIPPER] = 1.0
    many[frame, GRIPPER] = 0.0
    band = bands(statistics_of(many), many.any(0))
    assert not idle_frames([(many[:100], band)], HZ)[frame - 1 : frame + 2].any()


def test_noise_at_rest_is_no_motion_and_slow_motion_is() -> None:
    x, rng = demonstration(), np.random.default_rng(1)
    noisy = x.copy()
    noisy[:, JOINTS] += rng.choice([0, 0.0015], (100, 3)).astype(np.float32)  # a tick of a 12-bit encoder
    noisy[:, SLOTS["arm_joint_3_pos"]] = rng.normal(0, 0.0005, 100)  # a joint that is never used
    assert len(found(noisy)) >= 28
    slow = x.copy()
    slow[30:70, JOINTS[0]] += np.linspace(0, 0.1, 40, dtype=np.float32)  # 3 degrees per second
    assert found(slow).size == 0


def test_commands_and_state_both_rest() -> None:
    state, action = demonstration(), demonstration()
    action[45:, JOINTS] += 0.3  # told to move while the arm is stuck
    assert not np.isin(np.arange(44, 47), found(action, state)).any()
    assert len(found(state, state)) == 31


def test_without_numbers_nothing_is_idle() -> None:
    assert not idle_frames([(np.zeros((100, 128), np.float32), np.zeros(128, np.float32))], HZ).any()


def test_a_velocity_rests_at_zero_only() -> None:
    x = np.zeros((100, 128), np.float32)
    x[:, SPEED] = 0.2  # steady motion
    assert found(x).size == 0
    x[30:70, SPEED] = 0.001
    assert found(x).tolist() == list(range(35, 65))
