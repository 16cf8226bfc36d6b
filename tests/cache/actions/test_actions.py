"""Slots, field maps and rotation forms: identities and properties. The shipped field maps: test_families.py."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dvla.batch import UNIFIED_DIM as BATCH_DIM
from dvla.cache.actions.action_map import ActionMap, FieldSpec
from dvla.cache.actions.rotations import (
    WIDTH,
    NotARotation,
    conjugate,
    from_quaternion,
    from_rot6d,
    matrix_from_rot6d,
    multiply,
    rotate,
    to_quaternion,
    to_rot6d,
)
from dvla.cache.actions.slots import EMBODIMENTS, SLOTS, UNIFIED_DIM
from dvla.cache.readers.search import load_config
from dvla.errors import UserError

FORMS = tuple(WIDTH)


def numbers(low: float, high: float):
    return st.floats(float(np.float32(low)), float(np.float32(high)), allow_nan=False, width=32)


def rows(width: int, low: float = -4.0, high: float = 4.0):
    return hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.just(width)), elements=numbers(low, high))


# --- slots ---------------------------------------------------------------------------------------------------------


def test_slots_equal_rdt(shared_dir):
    rdt = json.loads((shared_dir / "facts" / "rdt_state_vec.json").read_text())
    assert len(rdt) == 144 and {name: SLOTS.get(name) for name in rdt} == rdt
    added = {n for n, s in SLOTS.items() if s < 103 and n not in rdt}
    assert added == {"head_joint_0", "head_joint_1", "spine_joint", *(f"torso_joint_{i}_pos" for i in range(4))}


def test_slots_beyond_rdt_and_their_aliases():
    assert UNIFIED_DIM == BATCH_DIM == 128 and max(SLOTS.values()) == 126
    assert [SLOTS[f"dex_finger_joint_{i}_pos"] for i in range(24)] == list(range(103, 127))
    assert all(SLOTS[f"right_{n}"] == SLOTS[n] for n in SLOTS if f"right_{n}" in SLOTS)
    assert all(SLOTS[f"left_dex_finger_joint_{i}_pos"] == SLOTS[f"dex_finger_joint_{12 + i}_pos"] for i in range(12))
    assert [SLOTS[n] for n in ("head_joint_0", "head_joint_1", "spine_joint")] == [45, 46, 47]
    assert EMBODIMENTS.index("gripper_eef") == 0 and EMBODIMENTS.index("bimanual_dex") == 6 and len(EMBODIMENTS) == 7


# --- rotations -----------------------------------------------------------------------------------------------------


def elementary(axis: int, angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    matrix = np.eye(3)
    a, b = [(1, 2), (2, 0), (0, 1)][axis]
    matrix[a, a], matrix[b, b], matrix[b, a], matrix[a, b] = c, c, s, -s
    return matrix


@settings(deadline=None)
@given(hnp.arrays(np.float64, 3, elements=numbers(-3.1, 3.1)))
def test_euler_is_fixed_axis_xyz(angles):
    expected = elementary(2, angles[2]) @ elementary(1, angles[1]) @ elementary(0, angles[0])
    np.testing.assert_allclose(matrix_from_rot6d(to_rot6d("euler_xyz", angles)), expected, atol=1e-12)


@settings(deadline=None)
@given(st.integers(0, 2), numbers(-7.0, 7.0))
def test_axis_angle_and_quaternion_about_one_axis(axis, angle):
    unit = np.eye(3)[axis]
    quaternion = np.append(unit * np.sin(angle / 2), np.cos(angle / 2))  # x y z w
    for form, value in (("axis_angle", unit * angle), ("quat_xyzw", quaternion), ("quat_xyzw", -1.5 * quaternion)):
        np.testing.assert_allclose(matrix_from_rot6d(to_rot6d(form, value)), elementary(axis, angle), atol=1e-7)


def test_six_d_is_the_first_two_columns():
    matrix = elementary(2, 0.3) @ elementary(0, 1.1)
    six = to_rot6d("euler_xyz", np.array([1.1, 0.0, 0.3]))
    np.testing.assert_allclose(six, np.concatenate([matrix[:, 0], matrix[:, 1]]), atol=1e-12)


axes = hnp.arrays(np.float64, 3, elements=numbers(-1, 1)).filter(lambda v: np.linalg.norm(v) > 0.1)
near_pi = st.one_of(numbers(0.0, 3.1415925), st.floats(np.pi - 1e-3, np.pi), st.floats(0.0, 1e-6))


@settings(max_examples=300)
@given(st.sampled_from(FORMS), axes, near_pi)
def test_rotation_round_trip_through_float32_slots(form, axis, angle):
    """native → unified (float32) → native: the same rotation to 1e-6 for every form and every angle, π included."""
    six = to_rot6d("axis_angle", axis / np.linalg.norm(axis) * angle)
    native = from_rot6d(form, six)
    mapping = ActionMap([FieldSpec(rotation=form, prefix="left_eef_angle")], 10.0)
    back = mapping.to_native(mapping.to_unified(native))
    np.testing.assert_allclose(to_rot6d(form, back), six, atol=1e-6)
    if form in ("quat_xyzw", "axis_angle") and angle < 3.14159:  # away from π the representation itself is unique
        np.testing.assert_allclose(back, native, atol=1e-6)


@settings(deadline=None)
@given(numbers(-3.1, 3.1), numbers(-1.4, 1.4), numbers(-3.1, 3.1))
def test_euler_round_trip(roll, pitch, yaw):
    native = np.array([roll, pitch, yaw])
    mapping = ActionMap([FieldSpec(rotation="euler_xyz")], 10.0)
    np.testing.assert_allclose(mapping.to_native(mapping.to_unified(native)), native, atol=2e-6)


@settings(deadline=None)
@given(numbers(-3.0, 3.0), st.sampled_from([-1.0, 1.0]), numbers(-3.0, 3.0))
def test_euler_gimbal_lock_keeps_the_rotation(roll, sign, yaw):
    six = to_rot6d("euler_xyz", np.array([roll, sign * np.pi / 2, yaw]))
    np.testing.assert_allclose(to_rot6d("euler_xyz", from_rot6d("euler_xyz", six)), six, atol=1e-6)


@settings(deadline=None)
@given(hnp.arrays(np.float64, (3, 6), elements=numbers(-2, 2)))
def test_any_six_numbers_give_a_rotation(values):
    matrix = matrix_from_rot6d(values)
    np.testing.assert_allclose(matrix @ np.swapaxes(matrix, -1, -2), np.broadcast_to(np.eye(3), (3, 3, 3)), atol=1e-6)
    np.testing.assert_allclose(np.linalg.det(matrix), 1.0, atol=1e-6)
    np.testing.assert_allclose(matrix_from_rot6d(np.zeros(6)), np.eye(3))


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        ("quat_xyzw", (0, 0, 0.5, 0), (0, 0, 0, 0)),
        ("quat_xyzw", (0, 0, 0, -2), (0, 0, 0, 2.001)),
        ("quat_xyzw", (0.5, 0.5, 0.5, 0.5), (0.2, 0.2, 0.2, 0.2)),
        ("matrix", (0, -1, 0, 1, 0, 0, 0, 0, 1), (0, 1, 0, 1, 0, 0, 0, 0, 1)),  # a reflection
        ("matrix", (1, 0, 0, 0, 1, 0.004, 0, 0, 1), (0,) * 9),
        ("matrix", np.eye(3).ravel(), 1.1 * np.eye(3).ravel()),
        ("rot6d", (0, 1, 0, 0, 0, 1), (1, 0, 0, 1, 0, 0)),
        ("rot6d", (1, 0, 0, 0.004, 1, 0), (0,) * 6),
    ],
)
def test_what_is_no_rotation_is_refused_by_row(form, good, bad):
    mapping = ActionMap([FieldSpec(field="gripper_open"), FieldSpec(rotation=form)], 10.0)
    native = np.array([[0, *good], [0, *good], [0, *bad]], dtype=float)
    mapping.check(native[:2])
    for call in (mapping.check, mapping.to_unified):
        with pytest.raises(
            NotARotation, match=rf"^row 2: \(.*\) is not a rotation as {form}; .*check the field map"
        ) as caught:
            call(native)
        assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)


def test_matrix_is_row_major():
    turn = elementary(2, 0.3) @ elementary(0, 1.1)
    np.testing.assert_allclose(to_rot6d("matrix", turn.ravel()), np.concatenate([turn[:, 0], turn[:, 1]]), atol=1e-12)
    np.testing.assert_allclose(from_rot6d("matrix", to_rot6d("matrix", turn.ravel())), turn.ravel(), atol=1e-12)
    stored = turn.astype(np.float16)  # rounded, then made orthonormal again
    np.testing.assert_allclose(matrix_from_rot6d(to_rot6d("matrix", stored.ravel())), turn, atol=2e-3)


@settings(deadline=None)
@given(st.sampled_from(FORMS), axes, near_pi, axes)
def test_quaternions_and_forms_are_the_same_rotations(form, axis, angle, vector):
    given_as = to_rot6d("axis_angle", axis / np.linalg.norm(axis) * angle)
    native, matrix = from_rot6d(form, given_as), matrix_from_rot6d(given_as)
    q = to_quaternion(form, native)
    np.testing.assert_allclose(
        rotate(q, vector), matrix @ vector, atol=1e-7
    )  # Euler near gimbal lock: 1e-8 · its condition
    np.testing.assert_allclose(to_rot6d(form, from_quaternion(form, q)), to_rot6d(form, native), atol=1e-7)
    np.testing.assert_allclose(rotate(multiply(q, q), vector), matrix @ matrix @ vector, atol=1e-7)
    np.testing.assert_allclose(multiply(q, conjugate(q)), [0, 0, 0, 1], atol=1e-12)


# --- field maps ----------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(rows(3), numbers(1.0, 100.0), numbers(0.01, 10.0), numbers(-2.0, 2.0))
def test_scale_offset_and_delta(native, hz, scale, offset):
    mapping = ActionMap(
        [
            FieldSpec(field="eef_vel_z", scale=scale, offset=offset, delta=True),
            FieldSpec(drop=1, fill=7.0),
            FieldSpec(field="left_gripper_open", scale=-scale, offset=offset),
        ],
        hz,
    )
    unified = mapping.to_unified(native)
    exact = native.astype(np.float64)
    np.testing.assert_allclose(unified[:, 41], (exact[:, 0] * scale + offset) * hz, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(unified[:, 60], -exact[:, 2] * scale + offset, rtol=1e-6, atol=1e-6)
    assert mapping.mask.nonzero()[0].tolist() == [41, 60] and not mapping.rotation_slots.any()
    back = mapping.to_native(unified)
    rounding = 1e-6 * (1 + np.abs(exact) + abs(offset) / scale)  # float32 slots hold native·scale + offset
    assert (np.abs(back - exact) <= rounding)[:, [0, 2]].all() and (back[:, 1] == 7.0).all()
    assert mapping.field_names == ("eef_vel_z", "dropped", "left_gripper_open") and mapping.native_dim == 3


def test_delta_is_displacement_times_frequency():
    """1 cm per step at 80 Hz is 0.8 m/s; a closed Meta-World gripper (effort +1) is 0, an open one 1."""
    mapping = ActionMap(load_config("metaworld").action, 80.0)
    unified = mapping.to_unified(np.array([[1.0, -0.5, 0.0, 1.0], [0.0, 0.0, 0.0, -1.0]]))
    np.testing.assert_allclose(unified[:, [39, 40, 41, 10]], [[0.8, -0.4, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]], atol=1e-7)


def test_leading_shapes_and_rotation_slots():
    mapping = ActionMap(load_config("bc_z").state, 5.0)
    native = np.zeros((2, 3, 8))
    native[..., 6] = 1.0  # w
    assert mapping.to_unified(native).shape == (2, 3, 128)
    assert mapping.rotation_slots.nonzero()[0].tolist() == list(range(33, 39))
    np.testing.assert_array_equal(mapping.to_native(mapping.to_unified(native[0, 0])), native[0, 0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"field": "arm_joint_0_poss"}, "did you mean 'arm_joint_0_pos'"),
        ({"field": "eef_angle_0"}, "use 'rotation:' .*rot6d"),
        ({"field": "arm_joint_0_pos", "delta": True}, "velocity slot"),
        ({"field": "arm_joint_0_pos", "scale": 0.0}, "scale not 0"),
        ({}, "exactly one of"),
        ({"field": "arm_joint_0_pos", "drop": 1}, "exactly one of"),
        ({"drop": 0}, "1 to 4096"),
        ({"drop": 1, "scale": 2.0}, "only"),
        ({"rotation": "quat_xyzw", "prefix": "eef_angel"}, "did you mean 'eef_angle'"),
        ({"rotation": "quat_xyzw", "scale": 2.0}, "only"),
        ({"drop": 1, "legacy": True}, "legacy not to 'drop'"),
    ],
)
def test_wrong_entries_are_refused_by_name(values, message):
    with pytest.raises(UserError, match=message):
        FieldSpec(**values)


def test_wrong_maps_are_refused():
    joint = FieldSpec(field="arm_joint_0_pos")
    with pytest.raises(UserError, match="two entries .* 'arm_joint_0_pos'"):
        ActionMap([joint, FieldSpec(field="right_arm_joint_0_pos")], 10.0)
    with pytest.raises(UserError, match="describes 1 dimensions, the data has 2"):
        ActionMap([joint], 10.0).to_unified(np.zeros((5, 2)))
    with pytest.raises(UserError, match="must be positive"):
        ActionMap([joint], 0.0)
    with pytest.raises(UserError, match="schema version 0"):
        ActionMap.from_dict({**ActionMap([joint], 10.0).to_dict(), "version": 0})


def test_legacy_numbers_in_rotation_slots_are_plain_scaled_slots():
    raw = FieldSpec(fields=("eef_angle_0", "eef_angle_1"), legacy=True, scale=2.0)
    mapping = ActionMap([raw, FieldSpec(rotation="euler_xyz", prefix="left_eef_angle")], 10.0)
    native = np.array([[0.3, 5.0, 0.1, 0.2, 0.3]])
    unified = mapping.to_unified(native)
    np.testing.assert_allclose(unified[0, 33:35], [0.6, 10.0], rtol=1e-6)
    assert mapping.rotation_slots.nonzero()[0].tolist() == list(range(83, 89)) and mapping.mask[33:35].all()
    np.testing.assert_allclose(mapping.to_native(unified), native, atol=1e-6)
    assert ActionMap.from_dict(json.loads(json.dumps(mapping.to_dict()))).specs == mapping.specs


@pytest.mark.parametrize("form", FORMS)
def test_legacy_rotations_are_quaternions_in_four_plain_slots(form):
    mapping = ActionMap([FieldSpec(rotation=form, legacy=True)], 10.0)
    assert mapping.mask.nonzero()[0].tolist() == [33, 34, 35, 36] and not mapping.rotation_slots.any()
    native = from_rot6d(form, to_rot6d("axis_angle", np.array([[0.3, -0.2, 0.1], [0.0, 3.0, 0.5], [0.0, 0.0, 0.0]])))
    unified = mapping.to_unified(native)
    np.testing.assert_allclose(unified[:, 33:37], from_rot6d("quat_xyzw", to_rot6d(form, native)), atol=1e-6)
    np.testing.assert_allclose(mapping.to_native(unified), native, atol=1e-6)
    np.testing.assert_allclose(to_rot6d(form, mapping.to_native(np.zeros((1, 128)))), [[1, 0, 0, 0, 1, 0]])
    with pytest.raises(NotARotation):
        ActionMap([FieldSpec(rotation="matrix", legacy=True)], 10.0).check(np.zeros((1, 9)))


def test_hand_pose_is_read_from_whatever_form():
    mapping = ActionMap(load_config("stanford_hydra").state, 10.0)
    pose = mapping.hand_pose(np.array([0.4, -0.1, 0.2, 0.0, 0.0, np.pi / 2, 0.0, 0.05]))
    np.testing.assert_allclose(pose, [0.4, -0.1, 0.2, 0, 0, np.sqrt(0.5), np.sqrt(0.5)], atol=1e-7)
    assert pose.dtype == np.float64
