"""Rules of `dvla data check` about the numbers in the tables: units, rotations, clipping, jumps, action against
state."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .findings import Facts, Finding, Severity, named, places
from .table_stats import LAGS, Dimension

SATURATED = 0.1  # share of rows at exactly the smallest or largest value
RARE = 0.01  # share of rows up to which values out of bounds are outliers, not a wrong unit
JUMP = 16.0  # a step this many times larger than 99 of 100 steps is a jump …
JUMP_OF_RANGE = 0.2  # … where it also is this share of the dimension's range
TURN = (0.5, 2.0)  # rad: a smaller turn within one row is no jump, a larger one always is
COPIED = 0.999  # correlation of steps from which one column repeats the other
SLOPES = (0.1, 10.0)  # measured way per commanded displacement
LIMITS: dict[
    str, tuple[float, float, float, float, str]
] = {  # kind → odd below, odd above, wrong below, wrong above, hint
    "joint": (
        -2 * math.pi - 0.05,
        2 * math.pi + 0.05,
        -4 * math.pi,
        4 * math.pi,
        "joints are rad: degrees? scale: 0.0174533",
    ),
    "angle": (-2 * math.pi - 0.05, 2 * math.pi + 0.05, -4 * math.pi, 4 * math.pi, "angles are rad: degrees?"),
    "position": (-3.0, 3.0, -10.0, 10.0, "positions are m: mm or cm? scale: 0.001 or 0.01"),
    "gripper": (-0.05, 1.05, -0.5, 1.5, "gripper_open is 0 closed to 1 open: give scale and offset"),
    "speed": (-5.0, 5.0, -50.0, 50.0, "velocities are m/s: check scale, delta and control_hz"),
    "turn": (-30.0, 30.0, -300.0, 300.0, "angular velocities are rad/s: check scale, delta and control_hz"),
}


def limits(dims: Sequence[Dimension]) -> tuple[np.ndarray, np.ndarray]:
    """Bounds [d, 2] on mapped values, beyond which they are odd, and beyond which wrong; infinite where nothing is
    known."""
    free = (-math.inf, math.inf, -math.inf, math.inf, "")
    bounds = np.array([LIMITS.get(d.kind, free)[:4] for d in dims], np.float64).reshape(-1, 4)
    return bounds[:, :2], bounds[:, 2:]


def constant(facts: Facts) -> list[Finding]:
    """Dimensions with one value in the whole dataset. Grippers and rotations may well rest in a task; all of the action
    may not."""
    found = []
    for table in facts.tables:
        dims = [
            d
            for d in table.dims
            if table.rows > 1 and d.kind != "dropped" and table.low[d.index] == table.high[d.index]
        ]
        used = [d for d in table.dims if d.kind != "dropped"]
        if dims and len(dims) == len(used):
            severity: Severity = "error" if table.dims[0].table == "action" else "warning"
            found.append(
                Finding("constant", severity, f"every {table.dims[0].table} of the dataset is the same; wrong columns?")
            )
            continue
        for harmless in (False, True):
            some = [d for d in dims if (d.kind in ("gripper", "finger", "rotation", "angle", "turn")) == harmless]
            if some:
                found.append(
                    Finding(
                        "constant",
                        "info" if harmless else "warning",
                        f"{named(some)} never changes ({', '.join(f'{table.low[d.index]:.4g}' for d in some[:4])})",
                    )
                )
    return found


def saturated(facts: Facts) -> list[Finding]:
    """Dimensions that often are at exactly their smallest or largest value. Grippers live there; commanded velocities
    are clipped on purpose, so for them it is only said."""
    found = []
    for table in facts.tables:
        for d in table.dims:
            share = max(table.at_low[d.index], table.at_high[d.index]) / max(1, table.rows)
            low, high = table.low[d.index], table.high[d.index]
            if (
                d.kind in ("gripper", "finger", "rotation", "dropped")
                or low == high
                or share <= SATURATED
                or table.rows < 50
            ):
                continue
            command = d.table == "action" and d.kind in ("speed", "turn")
            which = (
                f"largest value {high:.4g}"
                if table.at_high[d.index] >= table.at_low[d.index]
                else f"smallest value {low:.4g}"
            )
            found.append(
                Finding(
                    "saturated",
                    "info" if command else "warning",
                    f"{d} is at exactly its {which} in {share:.0%} of the rows; "
                    + ("commands are clipped" if command else "clipped, or a sensor at its limit?"),
                )
            )
    return found


def units(facts: Facts) -> list[Finding]:
    """Values that are odd or impossible in the unit their slot has; one finding per table and kind."""
    found = []
    for table in facts.tables:
        for kind, (low, high, _, _, hint) in LIMITS.items():
            odd = [d for d in table.dims if d.kind == kind and table.odd[d.index]]
            if not odd:
                continue
            worst = max(odd, key=lambda d: table.odd[d.index])
            episode, frame = table.worst_at[worst.index]
            wrong = any(table.wrong[d.index] > RARE * table.rows for d in odd)
            found.append(
                Finding(
                    f"unit-{kind}",
                    "error" if wrong else "warning",
                    f"{named(odd)} leaves {low:.4g} … {high:.4g}: {table.worst[worst.index]:.4g} at episode {episode} "
                    f"frame {frame}, {table.odd[worst.index]} of {table.rows} rows; {hint}",
                )
            )
    return found


def rotations(facts: Facts) -> list[Finding]:
    """Rows that are no rotation, and sign flips of quaternions (harmless here: they are stored as 6D)."""
    found = []
    for table in facts.tables:
        for r in table.rotations:
            what = f"{table.dims[0].table} {r.span.start}-{r.span.stop - 1} ({r.form})"
            if r.defective:
                severity: Severity = "error" if r.defective > RARE * r.rows or r.worst > 0.5 else "warning"
                found.append(
                    Finding(
                        "rotation-norm",
                        severity,
                        f"{what} is no rotation in {r.defective} of {r.rows} rows, off by {r.worst:.3g} "
                        f"at episode {r.worst_at[0]} frame {r.worst_at[1]}; other columns, order or form?",
                    )
                )
            if r.flips:
                found.append(
                    Finding(
                        "quaternion-flip",
                        "info",
                        f"{what} changes sign {r.flips} times, first at episode {r.first_flip[0]} frame "
                        f"{r.first_flip[1]}; q and -q are one rotation",
                    )
                )
            if table.odd[r.span].any():  # angles in another unit: what they turn is not known
                continue
            limit = min(TURN[1], max(TURN[0], JUMP * float(r.steps.quantile(0.99)[0])))
            turns = [t for t in r.steps.largest(0) if t[0] > limit]
            if turns:
                found.append(
                    Finding(
                        "rotation-jump",
                        "warning",
                        f"{what} turns {turns[0][0]:.3g} rad within one row at {places(turns)}; "
                        f"99 of 100 turns are below {min(math.pi, r.steps.quantile(0.99)[0]):.2g}",
                    )
                )
    return found


def jumps(facts: Facts) -> list[Finding]:
    """Steps far larger than a dimension's usual ones. Grippers and fingers snap, rotations have a rule of their own."""
    found = []
    for table in facts.tables:
        usual = table.steps.quantile(0.99)
        for d in table.dims:
            if d.kind in ("gripper", "finger", "angle", "rotation", "dropped"):
                continue
            limit = max(JUMP * usual[d.index], JUMP_OF_RANGE * (table.high[d.index] - table.low[d.index]))
            large = [s for s in table.steps.largest(d.index) if s[0] > limit]
            if large:
                found.append(
                    Finding(
                        "jump",
                        "warning",
                        f"{d} jumps by {large[0][0]:.4g} at {places(large)}; 99 of 100 steps are below "
                        f"{usual[d.index]:.2g}",
                        tuple(sorted({s[1] for s in large})),
                    )
                )
    return found


def action_follows(facts: Facts) -> list[Finding]:
    """The state should follow the action: later, the same way and, for displacements, about as far."""
    follow, found = facts.following, []
    if not follow.pairs or sum(facts.lengths.values()) < 100:
        return []
    correlation = follow.correlation()  # [lags, pairs]
    mean = correlation.mean(1)
    best, after = int(mean.argmax()), float(mean[LAGS.index(0) :].max())
    copied = LAGS[best] == 0 and (correlation[best] > COPIED).all()
    if copied and all(a.kind != "speed" for a, _ in follow.pairs):
        found.append(
            Finding(
                "action-is-state",
                "warning",
                f"{named([a for a, _ in follow.pairs])} moves exactly as the state of the same row does: "
                "a policy would learn to stay where it is; action_shift: 1?",
            )
        )
    if LAGS[best] < 0 and mean[best] > 0.6 and (mean[best] > after + 0.05 or mean[best] > COPIED > after):
        found.append(
            Finding(
                "action-late",
                "warning",
                f"the action repeats what the state did {-LAGS[best]} rows before (correlation of their "
                f"steps {mean[best]:.2f}, {after:.2f} the other way); action_shift: {1 - LAGS[best]}?",
            )
        )
    for i, (a, s) in enumerate(follow.pairs):
        along, against = float(correlation[:, i].max()), -float(correlation[:, i].min())
        if against > max(0.5, along + 0.2):  # a motion to and fro goes against itself, half a period later
            found.append(
                Finding("action-sign", "warning", f"{s} moves against {a} (correlation {-against:.2f}); sign or axes?")
            )
        slope = float(follow.slope(LAGS[int(correlation[:, i].argmax())])[i])
        if along > 0.5 and a.kind == "speed" and not SLOPES[0] < slope < SLOPES[1]:
            found.append(
                Finding(
                    "action-scale",
                    "warning",
                    f"{s} moves {slope:.3g} times as far as {a} says; check its scale and control_hz",
                )
            )
    return found
