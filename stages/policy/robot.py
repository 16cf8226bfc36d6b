"""The robot's side of a policy: native state in, native actions out, for one dataset's embodiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...cache.actions.action_map import ActionMap
from ...cache.actions.normalizer import Normalizer
from ...cache.actions.statistics import Statistics
from ...cache.store.cache import CacheDataset
from ...errors import UserError, unknown


def describe_dataset(dataset: CacheDataset) -> dict[str, Any]:
    """What a policy must know of a dataset to act in its robot's units, as JSON."""
    a = dataset.attributes
    keys = (
        "action_map",
        "state_map",
        "action_stats",
        "proprio_stats",
        "environment",
        "starts",
        "embodiment",
        "control_hz",
        "license",
        "dataset_config",
    )
    return {"name": dataset.name, "views": list(dataset.views), **{key: a[key] for key in keys}}


class RobotInterface:
    """One dataset's maps both ways: native state → proprio, model output → native actions."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.name, self.views, self.environment = values["name"], tuple(values["views"]), values["environment"]
        self.starts: list[list[float]] = values["starts"]  # start vectors of the training episodes, where simulated
        self.embodiment, self.control_hz = int(values["embodiment"]), float(values["control_hz"])
        self.action_map, self.state_map = (ActionMap.from_dict(values[k]) for k in ("action_map", "state_map"))
        self._action = Normalizer(
            Statistics.from_dict(values["action_stats"]), self.action_map.mask, self.action_map.rotation_slots
        )
        self._state = Normalizer(
            Statistics.from_dict(values["proprio_stats"]), self.state_map.mask, self.state_map.rotation_slots
        )

    def proprio(self, state: np.ndarray) -> np.ndarray:
        """Native state [N,ds] → [N,128] normalised."""
        return self._state.normalize(self.state_map.to_unified(state))

    def actions(self, normalised: np.ndarray) -> np.ndarray:
        """Model output [N,T,128] → native [N,T,d] float32."""
        return self.action_map.to_native(self._action.denormalize(normalised))


def choose_dataset(
    datasets: Sequence[Mapping[str, Any]], name: str | None, environment: str | None
) -> Mapping[str, Any]:
    """The dataset entry whose robot the policy shall drive."""
    names = [d["name"] for d in datasets]
    if name is not None:
        if name not in names:
            raise unknown("dataset of this policy", name, names)
        return datasets[names.index(name)]
    if environment is not None:
        fitting = [d for d in datasets if d["environment"] == environment]
        if len(fitting) == 1:
            return fitting[0]
        trained = sorted({d["environment"] for d in datasets if d["environment"]})
        raise UserError(
            f"this policy has {len(fitting)} datasets recorded in '{environment}' (trained environments: "
            f"{', '.join(trained) or 'none'}); name the dataset whose robot it shall drive: {', '.join(names)}"
        )
    if len(datasets) == 1:
        return datasets[0]
    raise UserError(f"this policy was trained on {', '.join(names)}; say which with dataset=…")
