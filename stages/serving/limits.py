"""Limits of a robot's actions and state for clients (`dvla_client.limits`): what the data of its policy held.

Letters: d native width.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..policy.robot import RobotInterface

NARROW = 0.01  # half range, in a slot's unit, that a nearly constant dimension of an action has at least
NARROW_STATE = 0.05  # and of a state, which is measured


def describe_limits(robot: RobotInterface) -> dict[str, Any]:
    """The metadata's "limits": lists [d] in native units, None for a dimension that has none."""
    action, state = robot.action_stats, robot.state_stats
    low, high = action.min.copy(), action.max.copy()
    low[robot.relative] += state.min[robot.relative]  # a displacement from the state
    high[robot.relative] += state.max[robot.relative]
    bounds = {
        "action": robot.action_map.bounds(*_widened(low, high, NARROW)),
        "state": robot.state_map.bounds(*_widened(state.min, state.max, NARROW_STATE)),
    }
    limits: dict[str, Any] = {
        kind: {"low": _listed(ends[0]), "high": _listed(ends[1])} for kind, ends in bounds.items()
    }
    limits["action"]["step"] = None
    if robot.action_step is not None:
        step = np.maximum(robot.action_step, NARROW)
        least, most = robot.action_map.bounds(np.zeros_like(step), step)
        limits["action"]["step"] = _listed(most - least)
    return limits


def _widened(low: np.ndarray, high: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    middle, half = (low + high) / 2, np.maximum((high - low) / 2, least)
    return middle - half, middle + half


def _listed(values: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]
