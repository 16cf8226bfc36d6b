"""`metaworld/reach-wall-two-ways`: reach a goal behind a wall without touching the wall; the expert passes it on either
side.

The scene is Meta-World's reach-wall with a narrower wall in the middle and a larger goal. Every episode begins with the
hand at the same position, and training states 2n and 2n+1 have the goal at the same position: an initial observation
has two right answers, left (even) and right (odd), and their mean leads into the wall. A hand that touches the wall has
failed, whatever it does afterwards.

Positions are in meters: x to the right as seen from the robot, y away from it, z up.
"""

from __future__ import annotations

from collections.abc import Generator

import numpy as np

from .base import Setup
from .metaworld import PREFIX, MetaWorldEnvironment, require

__all__ = ["NAMES", "make", "require"]

TASK, SCENE = "reach-wall-two-ways", "reach-wall-v3"
NAMES = (PREFIX + TASK,)
INSTRUCTION = "reach the goal behind the wall without touching the wall"
MAX_STEPS = 100  # the expert needs 50 to 75
HAND = np.array([0.0, 0.56, 0.12])  # initial position of the hand; its fingers are lower than the wall
WALL, WALL_HALF_WIDTH = np.array([0.0, 0.75, 0.06]), 0.05
GOAL_LOW, GOAL_HIGH = (-0.1, 0.9, 0.075), (0.1, 0.9, 0.075)
GOAL_RADIUS = 0.035  # of the red ball that marks the goal
PUCK = (0.3, 0.6, 0.015)  # out of the way
ASIDE = 0.14  # |x| of the two ways
BESIDE, BEHIND = 0.67, 0.85  # y where the hand must have that x; y where the wall has been passed


class TwoWays(MetaWorldEnvironment):
    """See the module. Build it through `make_environment`."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup, SCENE, INSTRUCTION, MAX_STEPS)
        self._sim.hand_init_pos = HAND.copy()
        space = self._sim._random_reset_space  # of the positions of puck and goal
        space.low[:], space.high[:] = (*PUCK, *GOAL_LOW), (*PUCK, *GOAL_HIGH)
        wall = self._model.body("wall")
        wall.pos[:] = WALL
        self._wall = set(range(wall.geomadr[0], wall.geomadr[0] + wall.geomnum[0]))
        for geom in self._wall:  # smaller than before, so MuJoCo's precomputed bounds remain valid
            self._model.geom_size[geom][0] = WALL_HALF_WIDTH
        self._model.site("goal").size[0] = GOAL_RADIUS
        self._side, self._touched = 0.0, False

    @property
    def start_vector(self) -> tuple[float, ...]:
        return (*super().start_vector, self._side)

    def _begin(self, start: int) -> None:
        super()._begin(start // 2 if self.split == "train" else start)  # every scene is shown with both ways
        self._side = 1.0 if start % 2 else -1.0
        self._touched = False

    def _advance(self, action: np.ndarray) -> tuple[float, bool, dict[str, float]]:
        reward, success, info = super()._advance(action)
        self._touched |= any(c.geom1 in self._wall or c.geom2 in self._wall for c in self._data.contact)
        return reward, success and not self._touched, {**info, "touched": float(self._touched)}

    def _expert(self) -> Generator[np.ndarray, None, None]:
        return self.way(self._side)

    def way(self, side: float) -> Generator[np.ndarray, None, None]:
        """The expert that passes the wall on one side: -1 left, 1 right, 0 straight ahead, into it."""
        goal = self._sim._target_pos
        for place, reached in (
            (np.array([side * ASIDE, BESIDE, HAND[2]]), BESIDE - 0.02),
            (np.array([side * ASIDE, 1.0, HAND[2]]), BEHIND),
        ):
            while self._obs[1] < reached:
                yield self._toward(place)
        while True:
            yield self._toward(np.array([goal[0], goal[1], HAND[2]]))


make = TwoWays
