"""What `dvla data add` asks because the files do not tell it, and how answers are parsed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ....cache.actions.slots import EMBODIMENTS
from ....errors import UserError, unknown
from .proposals import Proposal

_LENGTHS = {"m": 1.0, "cm": 0.01, "mm": 0.001}
_ANGLES = {"rad": 1.0, "deg": math.pi / 180, "percent": 0.01}  # percent: -100 … 100 of a joint's range becomes -1 … 1
_FORMS = ("euler_xyz", "axis_angle")  # of three numbers
_KINDS = ("absolute", "delta", "velocity")
_SAME = {  # what people also say → the word used here
    **dict.fromkeys(("meter", "meters", "metre", "metres"), "m"),
    **dict.fromkeys(("centimeter", "centimeters", "centimetre", "centimetres"), "cm"),
    **dict.fromkeys(("millimeter", "millimeters", "millimetre", "millimetres"), "mm"),
    **dict.fromkeys(("radian", "radians"), "rad"),
    **dict.fromkeys(("degree", "degrees", "°"), "deg"),
    **dict.fromkeys(("%", "percentage", "normalized", "normalised", "±100", "-100..100"), "percent"),
    **dict.fromkeys(("position", "positions", "pos", "target", "targets", "abs", "absolute_position"), "absolute"),
    **dict.fromkeys(("relative", "rel", "displacement", "displacements", "deltas", "incremental"), "delta"),
    **dict.fromkeys(("vel", "velocities", "speed"), "velocity"),
    **dict.fromkeys(("euler", "rpy", "roll_pitch_yaw", "xyz"), "euler_xyz"),
    **dict.fromkeys(("rotvec", "rotation_vector", "axisangle"), "axis_angle"),
    **dict.fromkeys(("joint", "joints", "single_arm", "one_arm"), "gripper_joint"),
    **dict.fromkeys(("eef", "end_effector"), "gripper_eef"),
    **dict.fromkeys(("two_arms", "dual_arm", "bimanual_joint"), "bimanual"),
}


def plain(text: str) -> str:
    """An answer as it is looked up: "Axis-Angle" → axis_angle, "degrees" → deg."""
    word = re.sub(r"[\s_-]+", "_", text.strip().lower()) if re.search(r"[a-z]", text.lower()) else text.strip()
    return _SAME.get(word, word)


def _one_of(kind: str, allowed: tuple[str, ...]) -> Callable[[str], str]:
    def read(text: str) -> str:
        word = plain(text)
        if word not in allowed:
            raise unknown(kind, text, allowed)
        return word

    return read


def _number(text: str, names: Mapping[str, float]) -> float:
    word = plain(text)
    try:
        value = names[word] if word in names else float(word)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"'{text}' is no number" + (f" and none of {', '.join(names)}" if names else ""))
    return value


def _unit(names: Mapping[str, float]) -> Callable[[str], float]:
    def read(text: str) -> float:
        if not (value := _number(text, names)):
            raise UserError("a unit of 0 would erase the values; give another number")
        return value

    return read


def _pair(
    read_first: Callable[[str], float], read_second: Callable[[str], float]
) -> Callable[[str], tuple[float, float]]:
    def read(text: str) -> tuple[float, float]:
        parts = [p.strip() for p in re.split(r"[,;/]", text)]
        if len(parts) != 2:
            raise UserError(f"'{text}': give two values with a comma between them, like 1,0")
        return read_first(parts[0]), read_second(parts[1])

    return read


def _ends(text: str) -> tuple[float, float]:
    named = dict(re.findall(r"(open|clos)\w*\s*[:= ]\s*([-+\d.e]+)", text.lower()))
    if named.keys() == {"open", "clos"}:  # "closed=0 open=100"
        text = f"{named['open']},{named['clos']}"
    first, second = _pair(lambda t: _number(t, {}), lambda t: _number(t, {}))(text)
    if first == second:
        raise UserError(f"'{text}': open and closed are the same number; give two")
    return first, second


def _rate(text: str) -> float:
    if (value := _number(text.lower().removesuffix("hz"), {})) <= 0:
        raise UserError(f"'{text}': give a number of rows per second above 0")
    return value


@dataclass(frozen=True)
class Question:
    """Something that the files do not tell."""

    option: str  # that answers it, e.g. "--joint-unit"
    text: str
    read: Callable[[str], Any]  # the answer's value; `UserError` for an invalid one
    prefix: str = ""  # of the option's value before the answer: "action.0-3=" for --field
    proposal: Proposal | None = None

    @property
    def usage(self) -> str:
        """How to answer on the command line."""
        if self.proposal:
            return f"{self.option} {self.proposal.answer} (proposed)"
        return f"{self.option}{f' {self.prefix}…' if self.prefix else ''}: {self.text}"


_PER_UNIT = "or radians per unit"

QUESTIONS = {
    q.option: q
    for q in (
        Question("--embodiment", f"embodiment, one of {', '.join(EMBODIMENTS)}", _one_of("embodiment", EMBODIMENTS)),
        Question(
            "--action-kind",
            "kind of action: absolute (targets), delta (displacement per step) or velocity",
            _one_of("kind of action", _KINDS),
        ),
        Question("--joint-unit", f"unit of joints: rad, deg, percent (±100 of the range) {_PER_UNIT}", _unit(_ANGLES)),
        Question(
            "--finger-unit",
            f"unit of finger joints: rad, deg, percent {_PER_UNIT} (1 keeps normalized values)",
            _unit(_ANGLES),
        ),
        Question("--position-unit", "unit of positions: m, cm, mm, or meters per unit", _unit(_LENGTHS)),
        Question(
            "--delta-scale",
            "meters and radians of a value of 1 in end-effector displacements or velocities, e.g. 1,1 or 0.02,0.05",
            _pair(_unit(_LENGTHS), _unit(_ANGLES)),
        ),
        Question(
            "--base-unit",
            "units of the base velocity per second, e.g. m,rad or m,deg",
            _pair(_unit(_LENGTHS), _unit(_ANGLES)),
        ),
        Question("--gripper", "gripper values when open and when closed, e.g. 1,0 or 0,100", _ends),
        Question("--state-gripper", "gripper values of the state when open and when closed, where they differ", _ends),
        Question(
            "--rotation",
            f"form of the three rotation values, in radians: {' or '.join(_FORMS)}",
            _one_of("rotation form", _FORMS),
        ),
        Question("--control-hz", "rows per second, which the files do not give", _rate),
    )
}
