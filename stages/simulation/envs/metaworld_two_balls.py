"""Two tasks in Meta-World's reach scene with a ball on either side of the hand, of which one must be reached.

- `metaworld/reach-ball-by-color`: one ball is green, one blue, and the instruction names a color. Initial states 2n and
  2n+1 show the same image with the one and the other instruction, and every other pair has the colors exchanged, so
  neither the image nor the instruction alone says which side is right.
- `metaworld/reach-ball-from-memory`: the blue ball is the right one. After `SHOWN` steps both are hidden, and after
  `HIDDEN` more they come back, both gray; the expert stays where it is until then. No image from which it moves says
  which side is right, and no chunk of up to `HIDDEN` + 1 steps reaches from an image that does into the movement.

A hand that touches the wrong ball has failed, whatever it does afterwards: always the same side, or a side at random,
succeeds in half of the initial states. Positions are in meters: x to the right as seen from the robot, z up.
"""

from __future__ import annotations

from collections.abc import Generator

import numpy as np

from .base import Setup
from .metaworld import PREFIX, MetaWorldEnvironment, require

__all__ = ["NAMES", "make", "require"]

BY_COLOR, FROM_MEMORY = "reach-ball-by-color", "reach-ball-from-memory"
NAMES = (PREFIX + BY_COLOR, PREFIX + FROM_MEMORY)
SCENE = "reach-v3"
COLORS = {"green": (0.0, 1.0, 0.0, 1.0), "blue": (0.0, 0.0, 1.0, 1.0)}
GRAY, UNSEEN = (0.6, 0.6, 0.6, 1.0), (0.0, 0.0, 0.0, 0.0)
SITES = ("goal", "basesite")  # of the scene, which become the balls on the left and on the right
ASIDE = 0.15  # |x| of the balls, from their middle
MIDDLE_LOW, MIDDLE_HIGH = (-0.02, 0.73, 0.13), (0.02, 0.77, 0.17)
RADIUS = 0.08  # of a ball: a hand whose middle is inside touches it, one within Meta-World's 0.05 has reached it
PUCK = (0.3, 0.6, 0.015)  # out of the way
SHOWN, HIDDEN = 8, 8  # steps
MAX_STEPS = {BY_COLOR: 60, FROM_MEMORY: 80}  # the experts need about 25 and 40


class TwoBalls(MetaWorldEnvironment):
    """See the module. Build it through `make_environment`."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup, SCENE, "reach the ball that was blue", MAX_STEPS[setup.task])
        space = self._sim._random_reset_space  # of the positions of the puck and of the balls' middle
        space.low[:], space.high[:] = (*PUCK, *MIDDLE_LOW), (*PUCK, *MIDDLE_HIGH)
        self._balls = np.zeros((2, 3))  # left, right
        self._right, self._asked, self._touched = 0, 0, False  # the ball to reach; the color asked for; the other one

    @property
    def start_vector(self) -> tuple[float, ...]:
        return (*super().start_vector, float(self._right), float(self._asked))

    def _begin(self, start: int) -> None:
        super()._begin(start // 2)
        self._balls[:] = self._vector[3:]
        self._balls[:, 0] += (-ASIDE, ASIDE)
        self._asked, self._touched = 1, False
        if self.task == BY_COLOR:
            self._asked = start % 2
            self.instruction = f"reach the {tuple(COLORS)[self._asked]} ball"
        self._right = (start + start // 2) % 2
        self._sim._target_pos = self._balls[self._right]
        for name, place in zip(SITES, self._balls):
            body = self._data.body(self._model.site(name).bodyid[0])
            self._model.site(name).size[0], self._model.site(name).sameframe = RADIUS, 0  # its position is read
            self._model.site(name).pos = body.xmat.reshape(3, 3).T @ (place - body.xpos)
        self._hold = self._obs[:3].copy()
        self._show(0)

    def _advance(self, action: np.ndarray) -> tuple[float, bool, dict[str, float]]:
        reward, success, info = super()._advance(action)
        self._touched |= bool(np.linalg.norm(self._sim.tcp_center - self._balls[1 - self._right]) <= RADIUS)
        self._show(self.steps + 1)
        return reward, success and not self._touched, {**info, "touched": float(self._touched)}

    def _show(self, step: int) -> None:
        """Color the balls as they are seen after `step` steps."""
        green, blue = COLORS.values()
        right, other = (blue, green) if self._asked else (green, blue)
        if self.task == FROM_MEMORY:
            right, other = (blue if step < SHOWN else GRAY), GRAY
            if SHOWN <= step < SHOWN + HIDDEN:
                right = other = UNSEEN
        for side, name in enumerate(SITES):
            self._model.site(name).rgba = right if side == self._right else other
        self._mujoco.mj_kinematics(self._model, self._data)  # the balls' positions, for the next image

    def _expert(self) -> Generator[np.ndarray, None, None]:
        while True:
            waits = self.task == FROM_MEMORY and self.steps < SHOWN + HIDDEN
            # the state's position lies above the middle between the fingers
            above = self._obs[:3] - self._sim.tcp_center
            yield self._toward(self._hold if waits else self._balls[self._right] + above)


make = TwoBalls
