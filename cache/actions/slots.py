"""The unified 128-d vector: slots, their names, units and kinds (RDT's table, with fingers, head, spine and torso)."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

UNIFIED_DIM = 128
ACTION_SCHEMA_VERSION = 1  # raised when a slot or a conversion changes; part of the cache fingerprint
EMBODIMENTS = (
    "gripper_eef",
    "gripper_joint",
    "bimanual",
    "dex_hand",
    "gripper_delta_eef",
    "bimanual_mobile",
    "bimanual_dex",
)  # the id fed to the model is the position


def _slots() -> dict[str, int]:
    def arm(side: str, base: int) -> dict[str, int]:
        part: dict[str, int] = {}
        for kind, joints, grips in (("pos", base, base + 10), ("vel", base + 15, base + 25)):
            part |= {f"{side}arm_joint_{i}_{kind}": joints + i for i in range(10)}
            part |= {f"{side}gripper_joint_{i}_{kind}": grips + i for i in range(5)}
        part |= {f"{side}gripper_open": base + 10, f"{side}gripper_open_vel": base + 25}
        part |= {f"{side}eef_pos_{a}": base + 30 + i for i, a in enumerate("xyz")}
        part |= {f"{side}eef_angle_{i}": base + 33 + i for i in range(6)}
        part |= {f"{side}eef_vel_{a}": base + 39 + i for i, a in enumerate("xyz")}
        part |= {f"{side}eef_angular_vel_{a}": base + 42 + i for i, a in enumerate(("roll", "pitch", "yaw"))}
        return part

    table = arm("", 0) | arm("right_", 0) | arm("left_", 50)
    table |= {"base_vel_x": 100, "base_vel_y": 101, "base_angular_vel": 102}
    table |= {"head_joint_0": 45, "head_joint_1": 46, "spine_joint": 47}
    table |= {f"torso_joint_{i}_pos": 95 + i for i in range(4)}
    table |= {f"dex_finger_joint_{i}_pos": 103 + i for i in range(24)}
    table |= {f"right_dex_finger_joint_{i}_pos": 103 + i for i in range(12)}
    table |= {f"left_dex_finger_joint_{i}_pos": 115 + i for i in range(12)}
    return table


SLOTS: dict[str, int] = _slots()  # name → slot; several names may share one (arm_joint_0_pos = right_arm_joint_0_pos)
ROTATION_PREFIXES = ("eef_angle", "right_eef_angle", "left_eef_angle")
SIX_D = frozenset(SLOTS[f"{p}_{i}"] for p in ROTATION_PREFIXES for i in range(6))


def expand(pattern: str) -> list[str]:
    """`"arm_joint_{0..2}_pos"` → the three names; a name without a range stands for itself."""
    found = re.fullmatch(r"(.*)\{(\d{1,3})\.\.(\d{1,3})\}(.*)", pattern)
    if not found:
        return [pattern]
    head, first, last, tail = found.groups()
    return [f"{head}{i}{tail}" for i in range(int(first), int(last) + 1)]


KINDS = {  # how unified field names end → what the number is
    r"gripper_open": "gripper",
    r"(gripper|finger)_joint_\d+_pos": "finger",
    r"(joint_\d+_pos|head_joint_\d|spine_joint)": "joint",
    r"eef_pos_[xyz]": "position",
    r"(eef_vel_[xyz]|base_vel_[xy])": "speed",
    r"(angular_vel(_\w+)?|arm_joint_\d+_vel)": "turn",
}


def kind_of(name: str) -> str:
    """What a unified field is, by its name: a value of KINDS or "other"."""
    return next((kind for pattern, kind in KINDS.items() if re.search(pattern + "$", name)), "other")


def unit_of(slot: str) -> str:
    """Unit of a unified slot by its name."""
    if "gripper_open" in slot:
        return "1/s" if slot.endswith("_vel") else "1 open"
    if "eef_angle" in slot:
        return "6D"
    length = "eef_pos" in slot or "eef_vel" in slot or "base_vel" in slot
    return ("m" if length else "rad") + ("/s" if "_vel" in slot else "")


@dataclass(frozen=True)
class Slot:
    """One of the 128: its name, the part of the robot it belongs to, the unit of its values before normalization."""

    name: str
    region: str
    unit: str


@functools.cache
def slots() -> tuple[Slot, ...]:
    """All 128 in order. Of several names of a slot the first of the table is taken, but for grippers, which nearly
    always are one opening; a slot without a name is "slot 96"."""
    names: dict[int, str] = {}
    for name, number in sorted(SLOTS.items(), key=lambda item: "gripper_open" not in item[0]):
        names.setdefault(number, name)
    return tuple(_slot(names.get(i, f"slot {i}")) for i in range(UNIFIED_DIM))


def _slot(name: str) -> Slot:
    side = "left " if name.startswith("left_") else ""
    plain = name.removeprefix("left_")
    regions = {
        "gripper": "gripper",
        "arm_joint": "arm velocity" if "_vel" in plain else "arm",
        "eef_pos": "hand position",
        "eef_angle": "hand rotation",
        "eef": "hand velocity",
        "base": "base",
        "head": "torso and head",
        "spine": "torso and head",
        "torso": "torso and head",
        "dex_finger": "fingers",
    }
    region = next((region for start, region in regions.items() if plain.startswith(start)), None)
    if region is None:
        return Slot(name, "other", "")
    unit = unit_of(name)
    return Slot(name, side + region, "1 open, 0 closed" if unit == "1 open" else unit)
