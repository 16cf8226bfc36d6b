"""The files that LeRobot loads a policy by, written without LeRobot: every exported policy has them.

config.json                     type, features, horizon; `lerobot/config.py` reads it as `DvlaConfig`
policy_preprocessor.json        names (`--rename_map`), a batch dimension, the device
policy_postprocessor.json       back to the CPU; nothing is normalized: a policy works in the robot's units
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...cache.actions.action_map import ActionMap
from .observation import LEROBOT_IMAGES, LEROBOT_STATE
from .robot import RobotInterface

TYPE = "dvla"  # of a policy, as LeRobot registers it
SIDE = 224  # image size that is declared where the cache did not say; any is accepted
NAMES = ("config.json", "policy_preprocessor.json", "policy_postprocessor.json")
_DEVICE = {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}}
_BEFORE = (
    {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
    {"registry_name": "to_batch_processor", "config": {}},
    _DEVICE,
)


def lerobot_files(document: Mapping[str, Any]) -> dict[str, Any]:
    """Name → JSON document of LeRobot's files for a policy.json.

    A policy of several datasets gets the first one's robot; `--policy.dataset=NAME` chooses another."""
    first, several = document["datasets"][0], len(document["datasets"]) > 1
    robot = RobotInterface(first)
    views = () if document["conditions"]["blind"] else robot.views
    sizes = first.get("view_sizes", {})
    inputs = {f"{LEROBOT_IMAGES}{v}": _feature("VISUAL", [3, *sizes.get(v, (SIDE, SIDE))]) for v in views}
    inputs[LEROBOT_STATE] = _feature("STATE", [robot.state_map.native_dim])
    config = {
        "type": TYPE,
        "input_features": inputs,
        "output_features": {"action": _feature("ACTION", [robot.action_map.native_dim])},
        "action_feature_names": native_names(robot.action_map),
        "horizon": document["net"]["dit"]["horizon"],
        "n_action_steps": None,
        "dataset": robot.name if several else None,
        "device": None,  # a GPU where there is one
    }
    before, after = (
        {"name": name.removesuffix(".json"), "steps": list(steps)}
        for name, steps in zip(NAMES[1:], (_BEFORE, [_DEVICE]))
    )
    return dict(zip(NAMES, (config, before, after)))


def native_names(fields: ActionMap) -> list[str] | None:
    """The robot's own names of a field map's dimensions, by which LeRobot orders; None where its config has none."""
    return list(fields.native_names) if all(spec.native for spec in fields.specs) else None


def _feature(kind: str, shape: Sequence[int]) -> dict[str, Any]:
    return {"type": kind, "shape": list(shape)}
