"""What `dvla data add` proposes as an answer: from the names of dimensions and the range of their values.

A proposal is certain where nothing else would explain the files; only such a one is taken without being asked for.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .guesses import Target

_TURN = 6.5  # rad: a little more than a full turn
_OPENING = re.compile(r"open|width|aperture")
_CLOSING = re.compile(r"clos")
_LEROBOT = re.compile(r"(bi_)?(so_?10[01]|so_follower|so-10[01]|koch|lekiwi|omx).*")  # 0 closed, 100 open


@dataclass(frozen=True)
class Proposal:
    """An answer, as one would type it."""

    answer: str
    certain: bool
    why: str


@dataclass(frozen=True)
class Vector:
    """What is known of the action or the state."""

    targets: Sequence[Target]
    low: np.ndarray  # [d] smallest value of each dimension in the data
    high: np.ndarray  # [d]

    def dims(self, pattern: str) -> list[int]:
        """Dimensions of the targets whose slot matches; "rotation" for those of rotations."""
        found, at = [], 0
        for target in self.targets:
            slot = "rotation" if target.kind == "rotation" else target.slot
            found += list(range(at, at + target.width)) if re.search(pattern, slot) else []
            at += target.width
        return found

    def span(self, pattern: str) -> tuple[float, float] | None:
        """Smallest and largest value of such dimensions; None without any, or without data."""
        dims = self.dims(pattern)
        if not dims or not np.isfinite(self.low[dims]).all():
            return None
        return float(self.low[dims].min()), float(self.high[dims].max())

    def names(self, pattern: str) -> str:
        """Their names in the files, in lower case."""
        every = [n for t in self.targets for n in t.native]
        return " ".join(every[i] for i in self.dims(pattern)).lower()


def propose(option: str, vectors: Mapping[str, Vector], robot: str, given: Mapping[str, str]) -> Proposal | None:
    """A proposal for an option; None where nothing tells. `given`: what was answered before."""
    action, state = vectors["action"], vectors["state"]
    both = [v for v in (action, state) if v.targets]
    spans = {p: [s for v in both if (s := v.span(p))] for p in ("arm_joint", "finger", "eef_pos")}
    if option == "--embodiment":
        return _embodiment(action, given.get("--action-kind", ""))
    if option == "--action-kind":
        return _kind(action, state)
    if option == "--joint-unit":
        return _angle(spans["arm_joint"])
    if option == "--finger-unit":
        return _finger(spans["finger"])
    if option == "--position-unit":
        return _length(spans["eef_pos"])
    if option == "--delta-scale":
        return Proposal("m,rad", False, "values of 1 as 1 m and 1 rad")
    if option == "--base-unit":
        return _base(action)
    if option in ("--gripper", "--state-gripper"):
        return _gripper(state if option == "--state-gripper" else action if action.dims("gripper") else state, robot)
    if option == "--rotation":
        named = " ".join(v.names("rotation") for v in both)
        if re.search(r"roll|pitch|yaw|euler|rpy", named):
            return Proposal("euler_xyz", True, "roll, pitch, yaw by name")
        return Proposal("axis_angle", "axis" in named or "rotvec" in named, "three numbers rx, ry, rz")
    return None


def _embodiment(action: Vector, kind: str) -> Proposal | None:
    slots = [t.slot or t.prefix for t in action.targets if t.kind != "drop"]
    if any(t.kind == "unknown" for t in action.targets) or not slots:
        return None
    two = any(s.startswith("left_") for s in slots) and not all(s.startswith("left_") for s in slots)
    has = {part: any(part in s for s in slots) for part in ("finger", "base_", "torso", "eef")}
    if two:
        found = "bimanual_dex" if has["finger"] else "bimanual_mobile" if has["base_"] else "bimanual"
    elif has["finger"]:
        found = "dex_hand"
    elif has["eef"]:
        found = "gripper_eef" if kind in ("", "absolute") else "gripper_delta_eef"
    else:
        found = "gripper_joint"
    return Proposal(found, bool(kind) or not has["eef"], "by its dimensions")


def _kind(action: Vector, state: Vector) -> Proposal | None:
    """Displacements say so in their names or are small about zero; targets are where the state is, too."""
    names = [n.lower() for t in action.targets for n in t.native if "gripper" not in n.lower()]
    if any("delta" in n or re.fullmatch(r"d_?(x|y|z|r?[xyz]|roll|pitch|yaw)", n) for n in names):
        return Proposal("delta", True, "by name")
    if names and all(n.endswith((".pos", "_pos", "_position")) for n in names):
        return Proposal("absolute", True, "by name")
    if any("vel" in n for n in names if not re.match(r"(x|y|theta|base).*vel", n)):
        return Proposal("velocity", True, "by name")
    slots = {t.slot: i for i, t in _starts(state.targets) if t.slot and "gripper" not in t.slot}
    pairs = [(i, slots[t.slot]) for i, t in _starts(action.targets) if t.slot in slots]
    known = [(a, s) for a, s in pairs if np.isfinite([action.low[a], state.low[s]]).all()]
    if not known:
        return None
    a, s = (np.array(side) for side in zip(*known))
    width = np.maximum(state.high[s] - state.low[s], 1e-6)
    apart = np.maximum(np.abs(action.low[a] - state.low[s]), np.abs(action.high[a] - state.high[s])) / width
    if np.median(apart) < 0.5:
        offset = np.abs(state.low[s] + state.high[s]) / 2 > 0.5 * width  # not about zero, as displacements are
        certain = bool(np.median(apart) < 0.25 and (offset.any() or len(known) > 3))
        return Proposal("absolute", certain, "the action goes where the state does")
    small = np.maximum(np.abs(action.low[a]), np.abs(action.high[a])) < 0.3 * np.maximum(width, np.abs(state.high[s]))
    return Proposal("delta", False, "small numbers about zero") if small.mean() > 0.5 else None


def _starts(targets: Sequence[Target]) -> list[tuple[int, Target]]:
    """(first dimension, target)."""
    ends = itertools.accumulate(t.width for t in targets)
    return [(end - t.width, t) for end, t in zip(ends, targets)]


def _reach(spans: Sequence[tuple[float, float]]) -> float:
    return max((abs(x) for span in spans for x in span), default=0.0)


def _angle(spans: Sequence[tuple[float, float]]) -> Proposal | None:
    top = _reach(spans)
    if not spans or top > 720:
        return None
    why = f"they reach {top:.4g}"
    if top <= _TURN:
        return Proposal("rad", top > 1.001, why)
    if 99 < top <= 100.001:
        return Proposal("percent", False, f"{why}, the end of ±100")
    return Proposal("deg", top > 100.001, why)


def _finger(spans: Sequence[tuple[float, float]]) -> Proposal | None:
    if not spans:
        return None
    top, low = _reach(spans), min(s[0] for s in spans)
    if low >= 0 and top <= 1.001:
        return Proposal("1", False, "they lie in 0 … 1")
    return Proposal("rad" if top <= _TURN else "deg", 1.001 < top <= _TURN, f"they reach {top:.4g}")


def _length(spans: Sequence[tuple[float, float]]) -> Proposal | None:
    top = _reach(spans)
    if not spans:
        return None
    unit = "m" if top <= 3 else "cm" if top <= 150 else "mm"
    return Proposal(unit, 0.05 < top <= 3 or 250 < top <= 3000, f"they reach {top:.4g}")


def _base(action: Vector) -> Proposal | None:
    turn = action.span("base_angular")
    if not turn:
        return Proposal("m,rad", False, "SI units")
    fast = _reach([turn]) > _TURN
    return Proposal("m,deg" if fast else "m,rad", False, f"the turn reaches {_reach([turn]):.4g} per second")


def _gripper(vector: Vector, robot: str) -> Proposal | None:
    span, names = vector.span("gripper_open"), vector.names("gripper_open")
    if span is None or span[0] == span[1]:
        return None
    low, high = span
    ends = next(
        (
            (f"{a:g}", f"{b:g}")
            for a, b in ((0, 1), (-1, 1), (0, 100), (0, 850), (0, 255), (0, 0.04), (0, 0.08))
            if a - 0.02 * (b - a) <= low < a + 0.25 * (b - a) and a + 0.5 * (b - a) <= high <= b + 0.02 * (b - a)
        ),
        (f"{low:.4g}", f"{high:.4g}"),
    )
    said = "closed" if _CLOSING.search(names) else "open" if _OPENING.search(names) else ""
    if _LEROBOT.fullmatch(robot.lower()) and ends == ("0", "100"):
        return Proposal("100,0", True, f"lerobot's {robot}: 100 is open")
    answer = ",".join(ends if said == "closed" else ends[::-1])
    widths = ends in (("0", "0.04"), ("0", "0.08"), ("0", "850"))
    return Proposal(answer, bool(said) or widths, f"it goes from {low:.4g} to {high:.4g}")
