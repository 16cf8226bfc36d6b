"""Which action belongs to which control step: the chunks of a policy on the robot's own count of steps.

No clock is involved: a chunk that was asked for at tick a has the actions of the ticks a, a + 1, …, so that those whose
tick has passed when it arrives are dropped. Letters: T steps of a chunk, d action width.
"""

from __future__ import annotations

import numpy as np

from .errors import ClientError


class Chunks:
    """The planned actions by tick. A newer chunk replaces an older one, or is averaged with it (`ensemble`)."""

    def __init__(self, ensemble: float | None = None, averaged: np.ndarray | None = None) -> None:
        """`ensemble` m: the i-th oldest of the predictions for a tick has weight exp(-m·i), as in ACT; None: the newest
        alone counts. `averaged` bool [d]: the dimensions that an average makes sense of; in others, as those of a
        rotation, the newest counts."""
        self._ensemble, self._averaged = ensemble, averaged
        self._plan: dict[int, tuple[np.ndarray, float, int]] = {}  # tick → (mean, sum of weights, predictions)
        self._asked = -1  # tick of the newest chunk

    def merge(self, asked: int, chunk: np.ndarray, now: int) -> bool:
        """Take in a chunk [T, d] for the ticks from `asked` on, at tick `now`; False if it is too late for any of them,
        or older than one that was taken in."""
        if chunk.ndim != 2 or not len(chunk):
            raise ClientError(f"a chunk must be actions [T, d], got {list(chunk.shape)}; serve without --execute")
        if asked <= self._asked or asked + len(chunk) <= now:
            return False
        self._asked = asked
        before, self._plan = self._plan, {}
        for tick in range(max(now, asked), asked + len(chunk)):
            action, weight, count = chunk[tick - asked], 1.0, 1
            if self._ensemble is not None and tick in before:
                mean, total, seen = before[tick]
                weight = float(np.exp(-self._ensemble * seen))
                both = (mean * total + action * weight) / (total + weight)
                action = both if self._averaged is None else np.where(self._averaged, both, action)
                weight, count = total + weight, seen + 1
            self._plan[tick] = (np.asarray(action, np.float32), weight, count)
        return True

    def pop(self, now: int) -> np.ndarray | None:
        """The action [d] of this tick, None if there is none; earlier ones are forgotten."""
        for tick in [tick for tick in self._plan if tick < now]:
            del self._plan[tick]
        found = self._plan.pop(now, None)
        return None if found is None else found[0]

    def left(self, now: int) -> int:
        """Actions from this tick on."""
        return sum(tick >= now for tick in self._plan)
