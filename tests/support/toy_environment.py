"""A simulated task that needs no simulator: move a point to the right. For tests of what runs policies in tasks."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import pytest

from dvla.stages.simulation import envs
from dvla.stages.simulation.envs.base import Environment, Setup, start_seed

PREFIX = "toy/"
NAMES = ("toy/near", "toy/far")


class Line(Environment):
    """x starts in [0, 0.1); solved at 0.5 (near) or 1 (far); an action moves by at most 0.1."""

    control_hz, robot_type, views, state_names, action_names = 10.0, "line", ("front",), ("x",), ("dx",)

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup, "go right", 20, -np.ones(1) * 0.1, np.ones(1) * 0.1)
        self._setup, self.x, self._drawn = setup, 0.0, 0.0

    @property
    def start_vector(self) -> tuple[float, ...]:
        return (self._drawn,)

    def image(self, view: str) -> np.ndarray:
        return np.full((self.image_size, self.image_size, 3), int(200 * np.clip(self.x, 0, 1)), np.uint8)

    def _begin(self, start: int) -> None:
        self.x = self._drawn = float(np.random.default_rng(start_seed(self._setup, start)).uniform(0, 0.1))

    def _advance(self, action: np.ndarray) -> tuple[float, bool, dict[str, float]]:
        self.x += float(action[0])
        return self.x, self.x >= (0.5 if self.task == "near" else 1.0), {}

    def _state(self) -> np.ndarray:
        return np.array([self.x])

    def _expert(self) -> Generator[np.ndarray, None, None]:
        while True:
            yield np.array([0.1])


class Adapter:
    """What `stages/envs` asks of a module."""

    NAMES = NAMES

    @staticmethod
    def require() -> None:
        pass

    make = Line


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks `toy/near` and `toy/far` exist meanwhile."""
    monkeypatch.setattr(envs, "ADAPTERS", (*envs.ADAPTERS, Adapter))
