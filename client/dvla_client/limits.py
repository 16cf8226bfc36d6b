"""Limits of a robot's actions and state, from the statistics of the dataset that its policy was trained on.

The server's metadata has them: the smallest and largest value of each dimension of action and state in the data, and
the largest change of an action from one control step to the next; None where a dimension has none, as a rotation's.
Letters: d action width, ds state width, T steps of a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .errors import ClientError

MODES = ("clip", "stop")
MARGIN = 0.1  # by which an action may leave the data's range or its largest step, as a share of it
STATE_MARGIN = 0.5  # by which a state may leave the data's range


class Limits:
    """Checks actions and states; `mode`: actions beyond the limits are clipped to them, or refused (`ClientError`)."""

    def __init__(self, metadata: Mapping[str, Any], mode: str = "clip", margin: float = MARGIN) -> None:
        if mode not in MODES or not 0 <= margin < np.inf:
            raise ClientError(f"limits '{mode}' with margin {margin}: give {' or '.join(MODES)}, and a share from 0 up")
        self.mode, self._names, self._states = mode, metadata["actions"], metadata["state"]
        found = metadata.get("limits") or {}
        action, state = found.get("action", {}), found.get("state", {})
        self.low, self.high = _range(action, len(self._names), margin)  # [d]
        self.step = _filled(action.get("step"), len(self._names), np.inf) * (1 + margin)  # [d]
        self._state_low, self._state_high = _range(state, len(self._states), STATE_MARGIN)  # [ds]

    def require_state(self, state: Any) -> None:
        """`ClientError` naming the first dimension of the state [ds] that is not finite or far outside the data."""
        values = np.asarray(state, np.float64).reshape(-1)
        if len(values) != len(self._states):
            raise ClientError(f"the state has {len(values)} numbers, the robot's has {len(self._states)}")
        wrong = ~((values >= self._state_low) & (values <= self._state_high)) | ~np.isfinite(values)  # NaN too
        if wrong.any():
            i = int(wrong.argmax())
            low, high = self._state_low[i], self._state_high[i]
            raise ClientError(
                f"state '{self._states[i]}' is {values[i]:.4g}, and the policy knows {low:.4g} to {high:.4g}: bring "
                "the robot to where its demonstrations were, and check its units"
            )

    def apply(self, action: np.ndarray, before: np.ndarray | None) -> tuple[np.ndarray, str]:
        """(the action [d] within the limits, one line about what was beyond them or ""); `before` [d]: the action of
        the step before. `ClientError` with that line where `mode` is "stop", and always for one that is not finite."""
        if not np.isfinite(action).all():
            raise ClientError(f"action '{self._names[int((~np.isfinite(action)).argmax())]}' is not a finite number")
        low, high = self.low, self.high
        if before is not None:  # within the range first: a step towards it is never refused
            low, high = (
                np.maximum(low, np.minimum(before, high) - self.step),
                np.minimum(high, np.maximum(before, low) + self.step),
            )
        slack = 1e-6 * np.maximum(1, np.abs(action))  # float32's rounding
        wrong = (action < low - slack) | (action > high + slack)
        if not wrong.any():
            return action, ""
        i = int(wrong.argmax())
        line = f"action '{self._names[i]}' is {action[i]:.4g}, its limits are {low[i]:.4g} to {high[i]:.4g}"
        if self.mode == "stop":
            raise ClientError(line)
        return np.clip(action, low, high).astype(action.dtype), line

    def chunk(self, actions: np.ndarray, before: np.ndarray | None = None) -> np.ndarray:
        """A chunk [T, d] within the limits, as `apply` to one step after the other."""
        out = []
        for action in actions:
            before, _ = self.apply(action, before)
            out.append(before)
        return np.stack(out)


def _filled(values: Sequence[float | None] | None, width: int, none: float) -> np.ndarray:
    if values is None:
        return np.full(width, none)
    if len(values) != width:
        raise ClientError(f"the server's limits have {len(values)} dimensions, expected {width}")
    return np.array([none if value is None else value for value in values], np.float64)


def _range(found: Mapping[str, Any], width: int, margin: float) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) with a margin on both sides."""
    low, high = _filled(found.get("low"), width, -np.inf), _filled(found.get("high"), width, np.inf)
    slack = margin * np.where(np.isfinite(high - low), high - low, 0)
    return low - slack, high + slack
