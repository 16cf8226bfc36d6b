"""Simulators that may not be installed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from dvla.errors import UserError
from dvla.stages.simulation.envs import Environment, make_environment


def simulated(name: str, **settings: Any) -> Iterator[Environment]:
    """An environment without pictures, for a fixture to yield from; skips where its simulator is missing."""
    try:
        env = make_environment(name, render=False, **settings)
    except UserError as error:
        pytest.skip(str(error))
    yield env
    env.close()
