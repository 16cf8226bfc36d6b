"""Simulated tasks by name: `make_environment("metaworld/push-v3")`."""

from __future__ import annotations

from ....errors import UserError, unknown
from ...policy.observation import Observation
from . import aloha, isaac, maniskill, metaworld, metaworld_two_balls, metaworld_two_ways, rlbench, robosuite
from .base import SPLITS, Environment, Setup, Split, StepResult

__all__ = [
    "Environment",
    "Observation",
    "Split",
    "StepResult",
    "check_environment",
    "environment_names",
    "make_environment",
    "opens_alone",
]

# Each has NAMES of its tasks, require() that raises if its simulator is missing, and make(setup).
ADAPTERS = (metaworld, metaworld_two_ways, metaworld_two_balls, maniskill, aloha, robosuite, rlbench, isaac)


def environment_names() -> tuple[str, ...]:
    """Every task name, sorted. Needs no simulator to be installed."""
    return tuple(sorted(name for adapter in ADAPTERS for name in adapter.NAMES))


def check_environment(
    name: str, split: str = "train", seed: int = 0, image_size: int = 128, max_steps: int | None = None
) -> None:
    """`UserError` for an unknown name, a simulator that is not installed, or a setting out of range."""
    if name not in environment_names():
        raise unknown("environment", name, environment_names())
    _adapter(name).require()
    if split not in SPLITS:
        raise unknown("split", str(split), SPLITS)
    if seed < 0:
        raise UserError(f"seed must be 0 or more, got {seed}")
    if not 16 <= image_size <= 2048:
        raise UserError(f"image_size must be 16 to 2048 pixels, got {image_size}")
    if max_steps is not None and max_steps < 1:
        raise UserError(f"max_steps must be 1 or more, got {max_steps}")


def make_environment(
    name: str,
    split: Split = "train",
    seed: int = 0,
    image_size: int = 128,
    render: bool = True,
    max_steps: int | None = None,
) -> Environment:
    """Open the task `name`.

    `split` and `seed` choose the set of initial states; those of train and eval are disjoint for all seeds.
    `render=False` renders no images unless a call asks for them. `max_steps=None` uses the task's own limit.
    Raises `UserError` as `check_environment` does.
    """
    check_environment(name, split, seed, image_size, max_steps)
    return _adapter(name).make(Setup(name, split, seed, image_size, render, max_steps))


def opens_alone(name: str) -> bool:
    """Whether only one environment of this simulator can be open in a process."""
    return getattr(_adapter(name).make, "alone", False)


def _adapter(name: str):
    return next(adapter for adapter in ADAPTERS if name in adapter.NAMES)
