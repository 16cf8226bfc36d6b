"""Chunks relative to the state at their start: what changes, what does not, and that it is undone exactly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dvla.cache.actions.chunk_frame import ChunkFrame
from dvla.cache.actions.rotations import matrix_from_rot6d, to_rot6d
from dvla.cache.actions.slots import SLOTS

ANGLES = ("eef_angle", "left_eef_angle")


def slots_of(*names: str) -> list[int]:
    return [SLOTS[name] for name in names]


def everything() -> tuple[ChunkFrame, np.ndarray]:
    """A frame of data that fills all slots in action and state, and which of them are 6D rotations."""
    rotation = np.zeros(128, bool)
    for prefix in ANGLES:
        rotation[SLOTS[f"{prefix}_0"] : SLOTS[f"{prefix}_0"] + 6] = True
    return ChunkFrame(np.ones(128, bool), rotation), rotation


def vectors(seed: int, *shape: int) -> np.ndarray:
    """Unified vectors of which the 6D slots hold rotations."""
    rng = np.random.default_rng(seed)
    out = rng.normal(0, 3, (*shape, 128))
    for prefix in ANGLES:
        out[..., SLOTS[f"{prefix}_0"] : SLOTS[f"{prefix}_0"] + 6] = to_rot6d("quat_xyzw", unit(rng, *shape))
    return out.astype(np.float32)


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    q = rng.normal(size=(*shape, 4))
    return q / np.linalg.norm(q, axis=-1, keepdims=True)


@given(st.integers(0, 1 << 30), st.integers(1, 5), st.integers(1, 4))
def test_one_way_undoes_the_other(seed: int, steps: int, chunks: int) -> None:
    frame, _ = everything()
    action, state = vectors(seed, chunks, steps), vectors(seed + 1, chunks)
    relative = frame.encode(action, state)
    assert relative.dtype == np.float32
    np.testing.assert_allclose(frame.decode(relative, state), action, rtol=0, atol=1e-5)
    # what a network gives is no rotation: its columns come through a change of frame all the same
    rough = np.random.default_rng(seed).normal(size=relative.shape).astype(np.float32)
    np.testing.assert_allclose(frame.encode(frame.decode(rough, state), state), rough, rtol=0, atol=1e-5)


def test_a_robot_that_stays_has_no_relative_motion() -> None:
    frame, rotation = everything()
    state = vectors(0, 1)
    relative = frame.encode(np.repeat(state[:, None], 3, 1), state)[0]
    np.testing.assert_array_equal(relative[:, frame.plain], 0)
    for first in frame.rotations:
        np.testing.assert_allclose(relative[:, first : first + 6], [[1, 0, 0, 0, 1, 0]] * 3, atol=1e-6)
    kept = np.setdiff1d(np.flatnonzero(~rotation), frame.plain)
    np.testing.assert_array_equal(relative[:, kept], np.repeat(state, 3, 0)[:, kept])


def test_rotations_are_of_the_hand() -> None:
    """R₀ᵀ·R: a turn about the hand's own axis is the same however the hand is held."""
    frame, _ = everything()
    angle, first = np.array([0.0, 0.0, 0.3]), SLOTS["eef_angle_0"]
    turn = matrix_from_rot6d(to_rot6d("axis_angle", angle))
    for seed in range(4):
        state = vectors(seed, 1)
        action = state[:, None].copy()
        held = matrix_from_rot6d(state[0, first : first + 6]) @ turn
        action[0, 0, first : first + 6] = held[:, :2].T.ravel()
        relative = frame.encode(action, state)[0, 0, first : first + 6]
        np.testing.assert_allclose(relative, turn[:, :2].T.ravel(), atol=1e-6)


def test_which_slots_become_relative() -> None:
    frame, rotation = everything()
    moving = slots_of("arm_joint_3_pos", "left_arm_joint_0_pos", "eef_pos_x", "left_eef_pos_z", "torso_joint_1_pos")
    assert set(moving) <= set(frame.plain.tolist()) and frame.rotations == [33, 83]
    still = slots_of("gripper_open", "left_gripper_open", "eef_vel_x", "arm_joint_0_vel", "base_vel_x")
    still += slots_of("dex_finger_joint_4_pos", "gripper_joint_1_pos", "base_angular_vel", "eef_angular_vel_yaw")
    assert not set(still) & set(frame.plain.tolist())
    shared = np.zeros(128, bool)
    shared[slots_of("arm_joint_0_pos", "eef_vel_x", "eef_angle_0")] = True  # of a rotation one entry alone: a number
    few = ChunkFrame(shared, rotation)
    assert few.plain.tolist() == slots_of("arm_joint_0_pos") and few.rotations == [] and few
    assert not ChunkFrame(np.zeros(128, bool), rotation)
    assert ChunkFrame(np.ones(128, bool), np.zeros(128, bool)).rotations == []  # legacy 6D slots: plain numbers


def test_chunks_must_start_somewhere() -> None:
    frame, _ = everything()
    with pytest.raises(ValueError, match=r"chunks \(2, 3, 128\) do not start at states \(3, 128\)"):
        frame.encode(np.zeros((2, 3, 128)), np.zeros((3, 128)))
