"""What robosuite's controllers take as an action, by a file's env_args: compared with the dataset config and the rows.

Letters: T rows of an episode, da action width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ....errors import UserError
from ..config import DatasetConfig
from ..episode import CorruptEpisode

_POSE = 6  # dimensions of an OSC_POSE action: displacement and rotation
_FAR = 1.5  # times the range of a controller: it clips what is beyond a little, but takes nothing like that
_TRACKS = 0.15  # m: closer to the measured position in every row, an action is that position
_AWAY = 0.3  # m from the origin: a displacement per step is not that long, and not for a whole episode


def controllers_in(value: Any) -> Iterator[dict[str, Any]]:
    """Every controller description in `controller_configs`: one, a list of them, or grouped by part of the body."""
    if isinstance(value, dict):
        if "type" in value:
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from controllers_in(part)


def check_controllers(config: DatasetConfig, controllers: Sequence[dict[str, Any]], name: str) -> None:
    """`UserError` when the config scales the actions other than the controller did, or takes them for other things."""
    scales, meant = _scales(config), "displacements" if _is_relative(config) else "something else"
    poses = [c for c in controllers if c["type"] == "OSC_POSE"]
    if controllers and not poses and meant == "displacements":
        raise UserError(
            f"{name}: its controller is {controllers[0]['type']}, dataset config '{config.name}' describes {meant} "
            f"of OSC_POSE; write a dataset config for it"
        )
    for controller in poses:
        relative = bool(controller.get("control_delta", controller.get("input_type", "delta") == "delta"))
        if relative != (meant == "displacements"):
            raise UserError(
                f"{name}: its OSC_POSE actions are {'displacements' if relative else 'absolute poses'}, dataset "
                f"config '{config.name}' describes {meant}; write a dataset config for it"
            )
        given, moves = _range(controller, "input"), _range(controller, "output")
        if relative and moves is not None:
            taken = np.array([-1.0, 1.0])[:, None] if given is None else given
            unit = (moves[1] - moves[0]) / (taken[1] - taken[0])
            if not np.allclose(unit, scales, rtol=1e-3, atol=0):
                raise UserError(
                    f"{name}: its controller moves by {unit.round(6).tolist()} at full action, dataset config "
                    f"'{config.name}' scales by {scales}; write a dataset config with those scales"
                )


def check_actions(
    actions: np.ndarray, position: np.ndarray | None, config: DatasetConfig, controllers: Sequence[dict], where: str
) -> None:
    """`CorruptEpisode` for `actions` [T, da] that cannot be displacements though config and file say so: far beyond the
    controller's range, or the measured `position` [T, 3] m itself, which is what an absolute pose looks like."""
    if actions.ndim != 2 or not len(actions) or not _is_relative(config):
        return
    poses = [c for c in controllers if c["type"] == "OSC_POSE"]
    for arm, controller in enumerate(poses if actions.shape[1] == (_POSE + 1) * len(poses) else ()):
        span = _range(controller, "input")
        if span is None:
            continue
        middle, reach = span.mean(0), _FAR * (span[1] - span[0]) / 2
        first = arm * (_POSE + 1)
        beyond = np.abs(actions[:, first : first + _POSE] - middle) > reach  # [T, 6], False for NaN
        if beyond.any():
            row, dim = np.argwhere(beyond)[0]
            raise CorruptEpisode(
                f"{where}: its action is {actions[row, first + dim]:.4g} at frame {row}, dimension {first + dim}; the "
                f"controller takes {span[0, dim]:g} to {span[1, dim]:g} (absolute poses in a file that says "
                "displacements, or a glitch)"
            )
    if position is None or position.shape != (len(actions), 3) or actions.shape[1] < 3:
        return
    apart = np.abs(actions[:, :3] - position).max()
    if apart < _TRACKS and np.linalg.norm(position, axis=1).min() > _AWAY:
        raise CorruptEpisode(
            f"{where}: its actions are positions, at most {apart:.2g} m from those measured, dataset config "
            f"'{config.name}' describes displacements; write a dataset config for it"
        )


def _scales(config: DatasetConfig) -> list[float]:
    """Meters and radians per unit of action, of the dimensions that the config calls displacements."""
    return [s.scale for s in config.action if s.delta for _ in range(s.width)][:_POSE]


def _is_relative(config: DatasetConfig) -> bool:
    return len(_scales(config)) == _POSE


def _range(controller: dict[str, Any], side: str) -> np.ndarray | None:
    """[2, 6] lowest and highest "input" or "output" of a controller; None where that is not written down."""
    try:
        high = np.resize(np.asarray(controller.get(f"{side}_max"), np.float64), _POSE)  # NaN where there is none
        low = np.resize(np.asarray(controller.get(f"{side}_min", -high), np.float64), _POSE)
    except (TypeError, ValueError):
        return None
    span = np.array([low, high])
    return span if np.isfinite(span).all() and (span[1] > span[0]).all() else None
