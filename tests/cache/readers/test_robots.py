"""Robots that people have: a dataset in the exact layout of each driver opens with the right slots and units, chosen by
names and by the data's range, and comes back as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dvla.cache.actions.slots import SLOTS
from dvla.cache.readers import open_source
from dvla.cache.readers.search import NoConfig, config_names, load_config
from dvla.errors import UserError
from support.robot_samples import ramp, write_robot

SO = ["shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper"]
POS = [f"{j}.pos" for j in SO]
BI = [f"{side}_{j}" for side in ("left", "right") for j in POS]
KIWI = [*(f"arm_{j}" for j in POS), "x.vel", "y.vel", "theta.vel"]
VIPER = ["waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper"]
SHADOW = ["waist", "shoulder", "shoulder_shadow", "elbow", "elbow_shadow", *VIPER[3:]]
LEFT, RIGHT = ([f"{side}_{j}" for j in VIPER] for side in ("left", "right"))
PANDA = [*(f"panda_joint{i}" for i in range(1, 8)), "panda_finger_joint1"]
UR = ["shoulder_pan_joint", "shoulder_lift_joint", "elbow_joint", "wrist_1_joint", "wrist_2_joint", "wrist_3_joint"]
GR1 = {"left_arm": 7, "left_hand": 6, "left_leg": 6, "neck": 3, "right_arm": 7, "right_hand": 6, "right_leg": 6}
GR1 |= {"waist": 3}
DEG, NORM, TICKS = [(-120.0, 110.0)] * 5, [(-100.0, 99.5)] * 5, [(0.0, 100.0)]
RAD6, RAD7 = [(-3.0, 3.0)] * 6, [(-2.8, 2.8)] * 7
RADIAN = np.pi / 180
LEFT_ARM, ARM = ([SLOTS[f"{side}arm_joint_{i}_pos"] for i in range(10)] for side in ("left_", ""))


def slices(**changes: int) -> dict:
    found, at = {}, 0
    for name, width in {**GR1, **changes}.items():
        found[name] = {"start": at, "end": at + width}
        at += width
    return {"state": found, "action": found}


# robot type, names, limits, family, slot → unified value at the end
CASES = {
    "so100 of 2024": (
        *("so100", [f"main_{j}" for j in SO], [(-10.0, 190.0)] * 5 + TICKS, "so100"),
        {ARM[0]: 190 * RADIAN, ARM[4]: 190 * RADIAN, SLOTS["gripper_open"]: 1.0},
    ),
    "so101 in degrees": ("so101_follower", POS, DEG + TICKS, "so100", {ARM[2]: 110 * RADIAN}),
    "so101 normalized": ("so101_follower", POS, NORM + TICKS, "so100_percent", {ARM[2]: 0.995}),
    "so100 without names": ("so100", 6, DEG + TICKS, "so100", {ARM[0]: 110 * RADIAN}),
    "so100 with numbers": ("so100", [f"motor_{i}" for i in range(6)], DEG + TICKS, "so100", {ARM[1]: 110 * RADIAN}),
    "two so100": (
        *("bi_so100_follower", BI, (DEG + TICKS) * 2, "so100_two"),
        {LEFT_ARM[0]: 110 * RADIAN, ARM[4]: 110 * RADIAN, SLOTS["left_gripper_open"]: 1.0},
    ),
    "two so101 normalized": ("bi_so_follower", BI, (NORM + TICKS) * 2, "so100_two_percent", {LEFT_ARM[3]: 0.995}),
    "koch": ("koch_follower", POS, NORM + TICKS, "koch_percent", {ARM[0]: 0.995}),
    "koch in degrees": ("koch", POS, DEG + TICKS, "koch", {ARM[0]: 110 * RADIAN}),
    "lekiwi": (
        *("lekiwi", KIWI, DEG + TICKS + [(0.0, 0.3), (0.0, -0.2), (0.0, 90.0)], "lekiwi"),
        {
            SLOTS["base_vel_x"]: 0.3,
            SLOTS["base_vel_y"]: -0.2,
            SLOTS["base_angular_vel"]: np.pi / 2,
            ARM[1]: 110 * RADIAN,
        },
    ),
    "aloha": ("aloha", LEFT + RIGHT, (RAD6 + [(0, 1.0)]) * 2, "aloha", {LEFT_ARM[0]: 3.0, SLOTS["gripper_open"]: 1.0}),
    "aloha, right first": (
        *("aloha", RIGHT + LEFT, RAD6 + [(1.0, 0.0)] + RAD6 + [(0.0, 1.0)], "aloha_right_first"),
        {SLOTS["gripper_open"]: 0.0, SLOTS["left_gripper_open"]: 1.0},
    ),
    "aloha with shadows": (
        *("aloha", [f"{s}_{j}" for s in ("left", "right") for j in SHADOW], ([(-90.0, 80.0)] * 8 + TICKS) * 2),
        *("aloha_shadow", {LEFT_ARM[1]: 80 * RADIAN, LEFT_ARM[6]: 80 * RADIAN, SLOTS["left_gripper_open"]: 1.0}),
    ),
    "xarm": (
        "xarm7",
        [*(f"joint{i}.pos" for i in range(1, 8)), "gripper.pos"],
        RAD7 + [(0.0, 850.0)],
        "xarm",
        {ARM[6]: 2.8},
    ),
    "xarm6 in degrees": (
        *("xarm", [*(f"joint_{i}" for i in range(1, 7)), "gripper"], [(-90.0, 170.0)] * 6 + [(850.0, 0.0)]),
        *("xarm6_degrees", {ARM[5]: 170 * RADIAN, SLOTS["gripper_open"]: 0.0}),
    ),
    "ur5": ("ur5e", [*UR, "gripper"], RAD6 + [(0.0, 1.0)], "ur5", {ARM[0]: 3.0, SLOTS["gripper_open"]: 0.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_layout_and_units(tmp_path: Path, case: str) -> None:
    robot, names, limits, family, expected = CASES[case]
    values = ramp(limits)
    source = open_source(write_robot(tmp_path / "cubes", robot, names, values))
    assert source.config.name == family
    episode = source.load(0)
    for mapping, native in ((source.action_map, episode.action), (source.state_map, episode.state)):
        unified = mapping.to_unified(native)
        assert {slot: pytest.approx(unified[-1, slot], abs=1e-4) for slot in expected} == expected
        np.testing.assert_allclose(mapping.to_native(unified), values, rtol=1e-5, atol=1e-4)
    assert len(source.action_map.native_units) == len(limits) == len(source.action_map.native_names)


def test_own_names_and_units_of_the_robot(tmp_path: Path) -> None:
    config = load_config("so100")
    source = open_source(write_robot(tmp_path / "d", "so101_follower", POS, ramp(DEG + TICKS)))
    assert source.config == config and source.action_map.native_names == tuple(POS)
    assert source.action_map.native_units == ("deg",) * 5 + ("%",)


def test_mobile_aloha_and_franka(tmp_path: Path) -> None:
    """The state is of another width than the action."""
    arms = ramp((RAD6 + [(0.0, 1.0)]) * 2)
    base = ramp([(0.0, 0.4), (0.0, -0.5)])
    root = write_robot(tmp_path / "m", "aloha", 16, np.hstack([arms, base]), state=arms)
    source = open_source(root)
    assert source.config.name == "aloha_mobile"
    end = source.action_map.to_unified(source.load(0).action)[-1]
    assert end[SLOTS["base_vel_x"]] == pytest.approx(0.4) and end[SLOTS["base_angular_vel"]] == pytest.approx(-0.5)
    action, finger = ramp(RAD7 + [(0.0, 0.04)]), ramp([(0.0, 0.04)])
    root = write_robot(tmp_path / "f", "franka", PANDA, action, state=np.hstack([action, finger]))
    source = open_source(root)
    assert source.config.name == "franka"
    assert source.action_map.to_unified(source.load(0).action)[-1, SLOTS["gripper_open"]] == pytest.approx(1.0)


def test_libero_in_both_layouts(tmp_path: Path) -> None:
    action, state = ramp([(-1.0, 1.0)] * 7), ramp([(-0.5, 0.5)] * 6 + [(0.0, 0.04), (0.0, -0.04)])
    for i, (columns, family) in enumerate(
        ((("action", "observation.state"), "libero"), (("actions", "state"), "libero_openpi"))
    ):
        root = write_robot(tmp_path / f"{i}/libero", "panda", 7, action, state=state, columns=columns)
        source = open_source(root)
        assert source.config.name == family
        end = source.action_map.to_unified(source.load(0).action)[-1]
        assert end[SLOTS["eef_vel_x"]] == pytest.approx(0.05 * 10) and end[SLOTS["gripper_open"]] == 0.0


def test_gr1_in_the_order_of_its_modality(tmp_path: Path) -> None:
    values = ramp([(-1.0, i / 50) for i in range(44)]).astype(np.float64)
    root = write_robot(tmp_path / "g", "GR1ArmsAndWaistFourierHands", 44, values, modality=slices())
    source = open_source(root)
    assert source.config.name == "gr1"
    end = source.action_map.to_unified(source.load(0).action)[-1]
    found = [end[SLOTS[n]] for n in ("left_arm_joint_0_pos", "left_dex_finger_joint_0_pos", "arm_joint_6_pos")]
    assert found == pytest.approx([0.0, 7 / 50, 28 / 50]) and end[SLOTS["torso_joint_2_pos"]] == pytest.approx(43 / 50)
    other = write_robot(tmp_path / "o", "gr1", 44, values, modality=slices(left_hand=7, neck=2))
    with pytest.raises(UserError, match=r"'gr1' has other names \(left_hand\.6\)"):
        open_source(other)


REFUSED = {
    "neither degrees nor normalized for sure": ("so101", POS, [(-60.0, 73.2)] * 5 + TICKS, "73.2, which does not tell"),
    "radians": ("so100", POS, [(-1.5, 1.5)] * 5 + TICKS, "so100 or so100_percent"),
    "motor ticks": ("so100", POS, [(100.0, 3900.0)] * 5 + TICKS, "reach 3900"),
    "another order": ("so100", POS[::-1], DEG + TICKS, r"other names \(gripper.pos\)"),
    "velocities": ("ur5", [f"{j}_vel" for j in (*UR, "gripper")], RAD6 + [(0, 1.0)], "other names"),
    "six of another robot": ("so100", ["x", "y", "z", "roll", "pitch", "yaw"], DEG + TICKS, r"other names \(x\)"),
    "a hand's displacement": ("xarm", ["dx", "dy", "dz", "rx", "ry", "rz", "gripper"], RAD6 + [(0, 1.0)], "no dataset"),
    "eight joints": ("so100", 8, [(-120.0, 110.0)] * 8, "'so100' has other widths"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_not_guessed(tmp_path: Path, case: str) -> None:
    robot, names, limits, reason = REFUSED[case]
    root = write_robot(tmp_path / "cubes", robot, names, ramp(limits))
    with pytest.raises(NoConfig, match=reason) as caught:
        open_source(root)
    assert "data add" in str(caught.value) and len(str(caught.value)) < 300
    assert not open_source(root, unmapped=True).config.mapped


def test_the_dataset_rather_than_its_robot(tmp_path: Path) -> None:
    names = [*(f"joint_{i}" for i in range(7)), "gripper"]
    root = write_robot(tmp_path / "droid_1.0.1", "Franka", names, ramp(RAD7 + [(0.0, 1.0)]))
    assert open_source(root).config.name == "droid"


def test_what_is_stored_of_old_families_is_unchanged() -> None:
    """A cache's document of a config has no entry that its family does not use."""
    for name in config_names():
        document = load_config(name).document()
        assert {"fits", "origin", "mapped"}.isdisjoint(document)
    assert {"native", "unit"}.isdisjoint(load_config("aloha").document()["action"][0])
    assert load_config("so100").document()["action"][0]["unit"] == "deg"
