"""Slots, field maps, rotation forms and normalisation: identities and properties."""

import json

import numpy as np
import pytest
from dvla.batch import UNIFIED_DIM as BATCH_DIM
from dvla.cache.actions import EMBODIMENTS, SLOTS, UNIFIED_DIM, ActionMap, FieldSpec
from dvla.cache.dataset_config import DatasetConfig, config_names, find_config, load_config
from dvla.cache.normalize import Normalizer, RunningStatistics, Statistics
from dvla.cache.rotations import WIDTH, from_rot6d, matrix_from_rot6d, to_rot6d
from dvla.errors import UserError
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

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


@given(hnp.arrays(np.float64, 3, elements=numbers(-3.1, 3.1)))
def test_euler_is_fixed_axis_xyz(angles):
    expected = elementary(2, angles[2]) @ elementary(1, angles[1]) @ elementary(0, angles[0])
    np.testing.assert_allclose(matrix_from_rot6d(to_rot6d("euler_xyz", angles)), expected, atol=1e-12)


@given(st.integers(0, 2), numbers(-7.0, 7.0))
def test_axis_angle_and_quaternion_about_one_axis(axis, angle):
    unit = np.eye(3)[axis]
    quaternion = np.append(unit * np.sin(angle / 2), np.cos(angle / 2))  # x y z w
    for form, value in (("axis_angle", unit * angle), ("quat_xyzw", quaternion), ("quat_xyzw", -3 * quaternion)):
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


@given(numbers(-3.1, 3.1), numbers(-1.4, 1.4), numbers(-3.1, 3.1))
def test_euler_round_trip(roll, pitch, yaw):
    native = np.array([roll, pitch, yaw])
    mapping = ActionMap([FieldSpec(rotation="euler_xyz")], 10.0)
    np.testing.assert_allclose(mapping.to_native(mapping.to_unified(native)), native, atol=2e-6)


@given(numbers(-3.0, 3.0), st.sampled_from([-1.0, 1.0]), numbers(-3.0, 3.0))
def test_euler_gimbal_lock_keeps_the_rotation(roll, sign, yaw):
    six = to_rot6d("euler_xyz", np.array([roll, sign * np.pi / 2, yaw]))
    np.testing.assert_allclose(to_rot6d("euler_xyz", from_rot6d("euler_xyz", six)), six, atol=1e-6)


@given(hnp.arrays(np.float64, (3, 6), elements=numbers(-2, 2)))
def test_any_six_numbers_give_a_rotation(values):
    matrix = matrix_from_rot6d(values)
    np.testing.assert_allclose(matrix @ np.swapaxes(matrix, -1, -2), np.broadcast_to(np.eye(3), (3, 3, 3)), atol=1e-6)
    np.testing.assert_allclose(np.linalg.det(matrix), 1.0, atol=1e-6)
    np.testing.assert_allclose(matrix_from_rot6d(np.zeros(6)), np.eye(3))


def test_quaternion_of_length_zero_is_refused():
    with pytest.raises(UserError, match="length 0"):
        to_rot6d("quat_xyzw", np.zeros(4))


# --- field maps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", config_names())
@pytest.mark.parametrize("part", ["action", "state"])
def test_round_trip_of_every_shipped_config(name, part):
    specs = getattr(load_config(name), part)
    mapping = ActionMap(specs, 15.0)

    @given(st.data())
    @settings(max_examples=30)
    def check(data):
        native = data.draw(rows(mapping.native_dim, -1.0, 1.0))
        start = 0
        for spec in specs:  # a rotation's random numbers stand for an axis-angle
            if spec.rotation:
                part = slice(start, start + spec.width)
                native[:, part] = from_rot6d(spec.rotation, to_rot6d("axis_angle", native[:, start:start + 3]))
            start += spec.width
        unified = mapping.to_unified(native)
        assert unified.dtype == np.float32 and (unified[:, ~mapping.mask] == 0).all()
        np.testing.assert_allclose(mapping.to_native(unified), native, atol=1e-6)

    check()


@given(rows(3), numbers(1.0, 100.0), numbers(0.01, 10.0), numbers(-2.0, 2.0))
def test_scale_offset_and_delta(native, hz, scale, offset):
    mapping = ActionMap([FieldSpec(field="eef_vel_z", scale=scale, offset=offset, delta=True),
                         FieldSpec(drop=1, fill=7.0),
                         FieldSpec(field="left_gripper_open", scale=-scale, offset=offset)], hz)
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


@pytest.mark.parametrize("name", config_names())
def test_description_round_trip(name):
    mapping = ActionMap(load_config(name).action, 30.0)
    again = ActionMap.from_dict(json.loads(json.dumps(mapping.to_dict())))
    assert again.specs == mapping.specs and again.to_dict() == mapping.to_dict()
    x = np.random.default_rng(0).normal(size=(4, mapping.native_dim))
    np.testing.assert_array_equal(again.to_unified(x), mapping.to_unified(x))


@pytest.mark.parametrize(("values", "message"), [
    ({"field": "arm_joint_0_poss"}, "did you mean 'arm_joint_0_pos'"),
    ({"field": "eef_angle_0"}, "use 'rotation:' .*rot6d"),
    ({"field": "arm_joint_0_pos", "delta": True}, "velocity slot"),
    ({"field": "arm_joint_0_pos", "scale": 0.0}, "scale not 0"),
    ({}, "exactly one of"),
    ({"field": "arm_joint_0_pos", "drop": 1}, "exactly one of"),
    ({"drop": 0}, "at least 1"),
    ({"drop": 1, "scale": 2.0}, "only"),
    ({"rotation": "quat_xyzw", "prefix": "eef_angel"}, "did you mean 'eef_angle'"),
])
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


# --- dataset configs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("robot", "repo", "expected"), [
    ("Unitree_G1_Inspire", "anything", "unitree_g1_inspire"),
    ("metaworld_sawyer", "push", "metaworld"),
    ("unknown", "lerobot/aloha_sim_transfer_cube_human_image", "aloha"),
    ("unknown", "lerobot/droid_1.0.1", "droid"),
    (None, "berkeley_autolab_ur5", "bc_z"),
])
def test_config_detection(robot, repo, expected):
    assert find_config("lerobot", (robot, repo)).name == expected


def test_config_errors(tmp_path):
    with pytest.raises(UserError, match="no dataset config fits a lerobot dataset called 'y' or 'x'"):
        find_config("lerobot", ("y", "x"))
    with pytest.raises(UserError, match="did you mean 'metaworld'"):
        find_config("lerobot", ("x",), "metawrld")
    path = tmp_path / "mine.yaml"
    path.write_text("match: [a]\nembodiment: bimanul\naction: [{field: gripper_open}]\nstate: []\n")
    with pytest.raises(UserError, match="mine.yaml: .*did you mean 'bimanual'"):
        load_config(path)
    path.write_text(path.read_text().replace("bimanul", "bimanual").replace("gripper_open", "gripper_opn"))
    with pytest.raises(UserError, match="mine.yaml: .*did you mean 'gripper_open'"):
        find_config("lerobot", ("x",), path)
    path.write_text(path.read_text().replace("gripper_opn", "gripper_open"))
    config = find_config("lerobot", ("x",), path)
    assert isinstance(config, DatasetConfig) and config.name == "mine" and config.embodiment_id == 2


# --- statistics and normalisation ----------------------------------------------------------------------------------


@given(hnp.arrays(np.float64, st.tuples(st.integers(2, 20), st.just(4)), elements=numbers(-100, 100)), st.data())
def test_streamed_and_merged_statistics_equal_those_of_the_whole(x, data):
    cut = data.draw(st.integers(1, len(x) - 1))
    parts = []
    for piece in (x[:cut], x[cut:]):
        running = RunningStatistics()
        running.update(piece[:1])
        running.update(piece[1:])
        parts.append(running.result())
    for stats in (parts[0].merge(parts[1]), parts[1].merge(parts[0])):
        for name, value in (("mean", x.mean(0)), ("std", x.std(0)), ("min", x.min(0)), ("max", x.max(0))):
            np.testing.assert_allclose(getattr(stats, name), value, rtol=1e-9, atol=1e-6)
        assert stats.count == len(x)
    again = Statistics.from_dict(json.loads(json.dumps(parts[0].to_dict())))
    assert again.to_dict() == parts[0].to_dict()


def test_statistics_refuse_nothing_and_nan():
    with pytest.raises(ValueError, match="no rows"):
        RunningStatistics().result()
    with pytest.raises(ValueError, match="non-finite"):
        RunningStatistics().update(np.array([[0.0, np.nan]]))


def sample_normalizer() -> tuple[Normalizer, np.ndarray, np.ndarray]:
    mask, rotation = np.zeros(128, dtype=bool), np.zeros(128, dtype=bool)
    mask[[0, 1, 10, *range(33, 39)]] = True
    rotation[33:39] = True
    rng = np.random.default_rng(1)
    table = np.zeros((500, 128))
    table[:, 0], table[:, 1], table[:, 10] = rng.normal(3, 2, 500), 0.5, rng.normal(0, 0.001, 500)  # slot 1 is constant
    table[:, 33:39] = rng.normal(0, 0.4, (500, 6))
    stats = RunningStatistics()
    stats.update(table)
    return Normalizer(stats.result(), mask, rotation), table, mask


def test_normalisation_formula_mask_and_rotations():
    normalizer, table, mask = sample_normalizer()
    unclipped = np.abs((table[:, 0] - table[:, 0].mean()) / (5 * table[:, 0].std()))
    y = normalizer.normalize(table)
    assert y.dtype == np.float32 and np.abs(y[:, :33]).max() <= 1 and (y[:, ~mask] == 0).all() and unclipped.max() < 1
    np.testing.assert_allclose(np.abs(y[:, 0]), unclipped, atol=1e-5)
    np.testing.assert_allclose(y[:, 10], (table[:, 10] - table[:, 10].mean()) / 0.05, atol=1e-5)  # the floor: 5 · 0.01
    np.testing.assert_array_equal(y[:, 33:39], table[:, 33:39].astype(np.float32))
    np.testing.assert_allclose(normalizer.denormalize(y), table * mask, atol=1e-5)
    far = table[:1] + 1e3
    assert normalizer.normalize(far)[0, 0] == 1.0 and normalizer.normalize(far)[0, 33] > 100  # clipped; rotations never
    assert (normalizer.center[33:39] == 0).all() and (normalizer.half_range[33:39] == 1).all()
