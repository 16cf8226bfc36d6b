"""Rules of `dvla data check` about numbers in the tables: units, rotations, clipping, jumps, action against state."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from ....cache.actions.extremes import cut_off
from .findings import Facts, Finding, Severity, likewise, named, places
from .table_stats import LAGS, Dimension

SATURATED = 0.1  # share of rows at exactly the smallest or largest value
RARE = 0.01  # share of rows up to which values out of bounds are outliers, not a wrong unit
JUMP = 16.0  # a step this many times larger than 99 of 100 steps is a jump …
JUMP_OF_RANGE = 0.2  # … where it also is this share of the dimension's range
TURN = (0.5, 2.0)  # rad: a smaller turn within one row is no jump, a larger one always is
COPIED = 0.999  # correlation of steps from which one column repeats the other
SLOPES = (0.1, 10.0)  # measured way per commanded displacement
_ROUND, _TWICE = 2 * math.pi + 0.05, 4 * math.pi
LIMITS: dict[str, tuple[float, float, float, float, str]] = {  # kind → odd below, above; wrong below, above; hint
    "joint": (-_ROUND, _ROUND, -_TWICE, _TWICE, "joints are rad: degrees? scale: 0.0174533"),
    "angle": (-_ROUND, _ROUND, -_TWICE, _TWICE, "angles are rad: degrees?"),
    "position": (-3.0, 3.0, -10.0, 10.0, "positions are m: mm or cm? scale: 0.001 or 0.01"),
    "gripper": (-0.05, 1.05, -0.5, 1.5, "gripper_open is 0 closed to 1 open: give scale and offset"),
    "speed": (-5.0, 5.0, -50.0, 50.0, "velocities are m/s: check scale, delta and control_hz"),
    "turn": (-30.0, 30.0, -300.0, 300.0, "angular velocities are rad/s: check scale, delta and control_hz"),
}


def limits(dims: Sequence[Dimension]) -> tuple[np.ndarray, np.ndarray]:
    """Bounds [d, 2] on mapped values beyond which they are odd, and beyond which wrong; infinite where unknown."""
    free = (-math.inf, math.inf, -math.inf, math.inf, "")
    bounds = np.array([LIMITS.get(d.kind, free)[:4] for d in dims], np.float64).reshape(-1, 4)
    return bounds[:, :2], bounds[:, 2:]


def constant(facts: Facts) -> Iterator[Finding]:
    """Dimensions with one value in all the dataset. Grippers and rotations may rest in a task, the whole action not."""
    for table in facts.tables:
        used = [d for d in table.dims if d.kind != "dropped"]
        dims = [d for d in used if table.rows > 1 and table.low[d.index] == table.high[d.index]]
        if dims and len(dims) == len(used):
            name = table.dims[0].table
            severity: Severity = "error" if name == "action" else "warning"
            yield Finding("constant", severity, f"every {name} of the dataset is the same; wrong columns?")
            continue
        for harmless in (False, True):
            some = [d for d in dims if (d.kind in ("gripper", "finger", "rotation", "angle", "turn")) == harmless]
            if some:
                values = ", ".join(f"{table.low[d.index]:.4g}" for d in some[:4])
                yield Finding("constant", "info" if harmless else "warning", f"{named(some)} never changes ({values})")


def saturated(facts: Facts) -> Iterator[Finding]:
    """Dimensions that often are at exactly their smallest or largest value. Grippers live there; commanded velocities
    are clipped on purpose, so for them it is only reported."""
    for table in (t for t in facts.tables if t.rows >= 50):
        for d in (d for d in table.dims if d.kind not in ("gripper", "finger", "rotation", "dropped")):
            at_low, at_high = table.at_low[d.index], table.at_high[d.index]
            low, high, share = table.low[d.index], table.high[d.index], max(at_low, at_high) / table.rows
            if low == high or share <= SATURATED:
                continue
            command = d.table == "action" and d.kind in ("speed", "turn")
            which = f"largest value {high:.4g}" if at_high >= at_low else f"smallest value {low:.4g}"
            why = "commands are clipped" if command else "clipped, or a sensor at its limit?"
            message = f"{d} is at exactly its {which} in {share:.0%} of the rows; {why}"
            yield Finding("saturated", "info" if command else "warning", message)


def units(facts: Facts) -> Iterator[Finding]:
    """Values that are odd or impossible in the unit their slot has; one finding per table and kind."""
    for table in facts.tables:
        for kind, (low, high, _, _, hint) in LIMITS.items():
            odd = [d for d in table.dims if d.kind == kind and table.odd[d.index]]
            if not odd:
                continue
            worst = max(odd, key=lambda d: table.odd[d.index])
            episode, frame = table.worst_at[worst.index]
            wrong = any(table.wrong[d.index] > RARE * table.rows for d in odd)
            yield Finding(
                f"unit-{kind}",
                "error" if wrong else "warning",
                f"{named(odd)} leaves {low:.4g} … {high:.4g}: {table.worst[worst.index]:.4g} at episode {episode} "
                f"frame {frame}, {table.odd[worst.index]} of {table.rows} rows; {hint}",
            )


def rotations(facts: Facts) -> Iterator[Finding]:
    """Rows that are not a rotation, and sign flips of quaternions (harmless here: they are stored as 6D)."""
    for table in facts.tables:
        for r in table.rotations:
            what = f"{table.dims[0].table} {r.span.start}-{r.span.stop - 1} ({r.form})"
            if r.defective:
                severity: Severity = "error" if r.defective > RARE * r.rows or r.worst > 0.5 else "warning"
                yield Finding(
                    "rotation-norm",
                    severity,
                    f"{what} is not a rotation in {r.defective} of {r.rows} rows, off by {r.worst:.3g} at episode "
                    f"{r.worst_at[0]} frame {r.worst_at[1]}; other columns, order or form?",
                )
            if r.flips:
                first = f"episode {r.first_flip[0]} frame {r.first_flip[1]}"
                message = f"{what} changes sign {r.flips} times, first at {first}; q and -q are one rotation"
                yield Finding("quaternion-flip", "info", message)
            if table.odd[r.span].any():  # angles in another unit: what they turn is not known
                continue
            usual = float(r.steps.quantile(0.99)[0])
            turns = [t for t in r.steps.largest(0) if t[0] > min(TURN[1], max(TURN[0], JUMP * usual))]
            if turns:
                yield Finding(
                    "rotation-jump",
                    "warning",
                    f"{what} turns {turns[0][0]:.3g} rad within one row at {places(turns)}; 99 of 100 turns are below "
                    f"{min(math.pi, usual):.2g}",
                )


def jumps(facts: Facts) -> Iterator[Finding]:
    """Steps far larger than a dimension's usual ones. Grippers and fingers snap, rotations have a rule of their own."""
    for table in facts.tables:
        usual = table.steps.quantile(0.99)
        for d in (d for d in table.dims if d.kind not in ("gripper", "finger", "angle", "rotation", "dropped")):
            limit = max(JUMP * usual[d.index], JUMP_OF_RANGE * (table.high[d.index] - table.low[d.index]))
            large = [s for s in table.steps.largest(d.index) if s[0] > limit]
            if large:
                below = f"99 of 100 steps are below {usual[d.index]:.2g}"
                message = f"{d} jumps by {large[0][0]:.4g} at {places(large)}; {below}"
                yield Finding("jump", "warning", message, tuple(sorted({s[1] for s in large})))


def glitches(facts: Facts) -> Iterator[Finding]:
    """Values far from all others of their slot, which stretch the range that is normalized; one finding per table."""
    for found in (f.glitches for f in facts.extremes if f.glitches):
        episodes, worst = tuple(g.episode for g in found), max(found, key=lambda g: g.stretch)
        remedy = f"leave it out with --exclude-episodes {worst.episode}"
        yield Finding("glitch", "warning", f"{worst}; {remedy}{likewise(episodes)}", episodes)


def clipped(facts: Facts) -> Iterator[Finding]:
    """Slots of which the normalization that the dataset config asks for cuts off too much."""
    for found in facts.extremes:
        for name, share in found.clipped:
            yield Finding("clipped", "warning", cut_off(name, share, found.scheme))


def action_follows(facts: Facts) -> Iterator[Finding]:
    """The state should follow the action: later, the same way and, for displacements, about as far."""
    follow = facts.following
    if not follow.pairs or sum(facts.lengths.values()) < 100:
        return
    correlation = follow.correlation()  # [lags, pairs]
    mean = correlation.mean(1)
    best, after = int(mean.argmax()), float(mean[LAGS.index(0) :].max())
    copied = LAGS[best] == 0 and (correlation[best] > COPIED).all()
    if copied and all(a.kind != "speed" for a, _ in follow.pairs):
        moving = named([a for a, _ in follow.pairs])
        yield Finding(
            "action-is-state",
            "warning",
            f"{moving} moves exactly as the state of the same row does: a policy would learn to stay where it is; "
            "action_shift: 1?",
        )
    if LAGS[best] < 0 and mean[best] > 0.6 and (mean[best] > after + 0.05 or mean[best] > COPIED > after):
        yield Finding(
            "action-late",
            "warning",
            f"the action repeats what the state did {-LAGS[best]} rows before (correlation of their steps "
            f"{mean[best]:.2f}, {after:.2f} in the other direction); action_shift: {1 - LAGS[best]}?",
        )
    for i, (a, s) in enumerate(follow.pairs):
        along, against = float(correlation[:, i].max()), -float(correlation[:, i].min())
        if against > max(0.5, along + 0.2):  # a motion to and fro goes against itself, half a period later
            message = f"{s} moves against {a} (correlation {-against:.2f}); sign or axes?"
            yield Finding("action-sign", "warning", message)
        slope = float(follow.slope(LAGS[int(correlation[:, i].argmax())])[i])
        if along > 0.5 and a.kind == "speed" and not SLOPES[0] < slope < SLOPES[1]:
            message = f"{s} moves {slope:.3g} times as far as {a} says; check its scale and control_hz"
            yield Finding("action-scale", "warning", message)
