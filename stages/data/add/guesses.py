"""Guesses, from its name, which unified field a dimension of a dataset is. A guess is shown, never trusted: dimensions
whose names do not tell are `unknown`, and units, signs and rotation forms are asked for.

Understood: joints as in ALOHA, SO-100, Koch, Unitree or numbered ("left_waist", "shoulder_pan.pos", "kLeftElbow",
"joint_0"), positions x y z, roll pitch yaw or rx ry rz, quaternions qx qy qz qw, grippers, fingers, base velocities,
head, torso.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ....cache.actions.slots import SLOTS

_HAND = {"eef", "ee", "tcp", "hand", "end", "effector", "cartesian"}
_ANGLE = {"rotation", "rot", "angle", "orientation", "euler"}
_QUATERNION = {"q", "quat", "quaternion"}
# fmt: off
_NOISE = _HAND | _ANGLE | _QUATERNION | {
    "main", "follower", "leader", "robot", "arm", "k", "pos", "position", "state", "observation", "action",
    "target", "goal", "cmd", "command", "value", "rad", "deg", "m", "open", "closed", "closedness", "width",
    "delta", "rel", "relative", "world", "vector", "left", "right", "single",
}
_ARM = {
    "joint", "j", "shoulder", "elbow", "wrist", "forearm", "waist", "pan", "lift", "flex", "pitch", "roll", "yaw",
    "rotate", "upper",
}
# fmt: on
_FINGERS = {"thumb", "index", "middle", "ring", "pinky", "little", "finger"}
_DROPPED = {"terminate", "done", "pad", "padding", "terminated"}
_GROUPS = (
    ("quat:x", "quat:y", "quat:z", "quat:w"),
    ("turn:roll", "turn:pitch", "turn:yaw"),
    ("vector:x", "vector:y", "vector:z"),
)


@dataclass(frozen=True)
class Target:
    """What the next native dimensions are taken for."""

    kind: str  # field, rotation (absolute, or per step), drop or unknown
    native: tuple[str, ...]  # their names in the files; "action[3]" where they have none
    slot: str = ""  # of a field: its unified name
    form: str = ""  # of a rotation: "quat_xyzw"; "" = three numbers whose form is asked for
    prefix: str = ""  # of a rotation: eef_angle or left_eef_angle
    guessed: bool = True  # False: given by an option

    @property
    def width(self) -> int:
        """Native dimensions."""
        return len(self.native)


def guess(names: Sequence[str], given: Mapping[int, Target] | None = None) -> list[Target]:
    """Targets that cover every dimension, in order. `given`: first dimension → its target by an option."""
    given = given or {}
    taken = {i for first, target in given.items() for i in range(first, first + target.width)}
    words = [_words(name) for name in names]
    sides = {s for w in words for s in _side(w)}
    roles = ["given" if i in taken else _role(w, bool(sides)) for i, w in enumerate(words)]
    count: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], int] = {}  # the number in the first name of a kind and side
    targets: list[Target] = []
    i = 0
    while i < len(names):
        side = "left_" if "left" in words[i] else ""
        kind, _, part = roles[i].partition(":")
        group = next((g for g in _GROUPS if tuple(roles[i : i + len(g)]) == g), ())
        if len(set(map(_side, words[i : i + len(group)]))) > 1:
            group = ()  # of two arms
        if kind == "given":
            targets.append(given[i])
        elif group:
            form = "quat_xyzw" if len(group) == 4 else ""
            targets.append(Target("rotation", tuple(names[i : i + len(group)]), form=form, prefix=f"{side}eef_angle"))
        else:
            written = next((int(w) for w in words[i] if w.isdigit()), None)
            base = first.setdefault((kind, side), 0 if written is None else written)
            # joints are numbered from 0 or 1, without gaps
            in_order = kind != "joint" or base < 2 and written in (None, base + count[kind, side])
            targets.append(_field(names[i], kind if in_order else "", part, side, count[kind, side], sides))
            count[kind, side] += 1
        i += targets[-1].width
    return targets


def _field(name: str, kind: str, part: str, side: str, number: int, sides: set[str]) -> Target:
    """The `number`-th dimension of this kind and side."""
    if kind == "drop":
        return Target("drop", (name,))
    slot = {
        "joint": f"{side}arm_joint_{number}_pos",
        "finger": f"{side}dex_finger_joint_{number}_pos",
        "position": f"{side}eef_pos_{part}",
        "head": f"head_joint_{number}",
        "torso": f"torso_joint_{number}_pos",
        "spine": "spine_joint" if not number else "",
        "gripper": f"{side}gripper_open" if not number else "",
        "base": {"x": "base_vel_x", "y": "base_vel_y", "theta": "base_angular_vel"}.get(part),
    }.get(kind)
    crowded = kind == "finger" and len(sides) > 1 and number >= 12  # there the left hand begins
    return Target("field", (name,), slot) if slot in SLOTS and not crowded else Target("unknown", (name,))


def _words(name: str) -> tuple[str, ...]:
    """ "kLeftShoulderPitch" → k left shoulder pitch; "joint_0.pos" → joint 0 pos."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    return tuple(re.findall(r"[a-z]+|\d+", apart.lower()))


def _side(words: Sequence[str]) -> tuple[str, ...]:
    return tuple(s for s in ("left", "right") if s in words)


def _role(words: Sequence[str], sided: bool) -> str:
    """kind or kind:part of a dimension, "unknown" if its name does not tell. `sided`: some names have left or right."""
    names = {w for w in words if not w.isdigit()}
    core = names - _NOISE
    only = next(iter(core)) if len(core) == 1 else ""
    if names & _DROPPED:
        return "drop"
    if "gripper" in names:
        return "gripper" if only == "gripper" else "unknown"
    if names & _FINGERS:
        return "finger"
    if not core and any(w.isdigit() for w in words) and names & {"arm", "hand"}:  # GR00T's left_arm.0, left_hand.0
        return "finger" if "hand" in names else "joint"
    for kind, marks in (("head", {"head", "neck"}), ("spine", {"spine"}), ("torso", {"torso", "trunk"})):
        if names & marks:
            return kind if core <= marks | _ARM | {"tilt"} else "unknown"
    if "waist" in names and sided and not _side(words):
        return "torso"
    if only in ("qx", "qy", "qz", "qw") or (only and only in "xyzw" and names & _QUATERNION):
        return f"quat:{only[-1]}"
    if "vel" in names and not names & _HAND:
        return f"base:{next(iter(core - {'vel'}))}" if core - {"vel"} in ({"x"}, {"y"}, {"theta"}) else "unknown"
    if only in ("x", "y", "z") and names & _ANGLE:
        return f"vector:{only}"
    if only in ("x", "y", "z", "dx", "dy", "dz"):
        return f"position:{only[-1]}"
    if only.removeprefix("d") in ("rx", "ry", "rz"):
        return f"vector:{only[-1]}"
    if only.removeprefix("d") in ("roll", "pitch", "yaw"):
        return f"turn:{only.removeprefix('d')}"
    return "joint" if core and core <= _ARM and "hand" not in names else "unknown"
