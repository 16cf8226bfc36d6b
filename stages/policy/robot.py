"""The robot's side of a policy: native state in, native actions out, for one dataset's embodiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...cache.actions.action_map import ActionMap
from ...cache.actions.chunk_frame import ChunkFrame
from ...cache.actions.normalizer import Normalizer
from ...cache.actions.schemes import EARLIER, FRAMES
from ...cache.actions.statistics import Statistics
from ...cache.store.dataset import CacheDataset
from ...common.hub import HUB_ID
from ...errors import UserError, unknown

DESCRIBED = (  # attributes of a cache's dataset
    *("action_map", "state_map", "action_stats", "proprio_stats", "environment", "starts"),
    *("embodiment", "control_hz", "license", "dataset_config"),
)
NOTED = ("config", "view_sizes", "source", "action_step")  # not written by every release; acting does without
LOOKED_AT = 256  # episodes whose actions tell the largest step


def describe_dataset(dataset: CacheDataset) -> dict[str, Any]:
    """What a policy must know of a dataset to act in its robot's units and to read such data again, as JSON.

    Without "normalize" it is `EARLIER`, without "action_frame" absolute; statistics are those of the frame."""
    described = {key: dataset.attributes[key] for key in DESCRIBED}
    described |= {f"{kind}_stats": stats.to_dict() for kind, stats in dataset.scale_statistics.items()}
    described |= {} if dataset.scheme == EARLIER else {"normalize": dataset.scheme}
    described |= {} if dataset.frame is None else {"action_frame": "chunk"}
    described |= {key: dataset.attributes[key] for key in NOTED if key in dataset.attributes}
    described["action_step"] = _largest_step(dataset).tolist()
    if HUB_ID.fullmatch(described.get("source", "")) is None:
        described.pop("source", None)  # a folder of some machine
    return {"name": dataset.name, "views": list(dataset.views), **described}


def _largest_step(dataset: CacheDataset) -> np.ndarray:
    """float64 [128]: the largest change of an action from one frame to the next, in episodes spread over the data."""
    largest = np.zeros(dataset.action.shape[1])
    episodes = np.flatnonzero(~dataset.quarantined)
    for i in episodes[:: -(-len(episodes) // LOOKED_AT) or 1]:
        start = int(dataset.episode_start[i])
        steps = np.abs(np.diff(dataset.action[start : start + int(dataset.episode_length[i])], axis=0))
        largest = np.maximum(largest, steps.max(axis=0, initial=0))
    return largest


class RobotInterface:
    """One dataset's maps both ways: native state → proprio, model output → native actions."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.name, self.views, self.environment = values["name"], tuple(values["views"]), values["environment"]
        self.starts: list[list[float]] = values["starts"]  # initial states of the training episodes, where simulated
        self.embodiment, self.control_hz = int(values["embodiment"]), float(values["control_hz"])
        self.action_map, self.state_map = (ActionMap.from_dict(values[k]) for k in ("action_map", "state_map"))
        self.action_stats, self.state_stats = (
            Statistics.from_dict(values[f"{k}_stats"]) for k in ("action", "proprio")
        )
        self.action_step: list[float] | None = values.get("action_step")  # unified, the largest; None: not known
        self._action, self._state = (
            Normalizer(stats, fields.mask, fields.rotation_slots, values.get("normalize", EARLIER))
            for stats, fields in ((self.action_stats, self.action_map), (self.state_stats, self.state_map))
        )
        masks = ((m.mask, m.rotation_slots) for m in (self.action_map, self.state_map))
        shared, rotation = (a & b for a, b in zip(*masks))
        frame = values.get("action_frame", "absolute")
        if frame not in FRAMES:
            raise unknown("action_frame", frame, FRAMES)
        self._frame = ChunkFrame(shared, rotation) if frame == "chunk" else None
        self.relative = self._frame.plain if self._frame else np.zeros(0, int)  # slots of actions that add to the state

    def proprio(self, state: np.ndarray) -> np.ndarray:
        """Native state [N,ds] → [N,128] normalized."""
        return self._state.normalize(self.state_map.to_unified(state))

    def actions(self, normalized: np.ndarray, state: np.ndarray | None = None) -> np.ndarray:
        """Model output [N,T,128] → native [N,T,d] float32.

        `state` [N,ds]: the native one that was acted on; only chunk-relative actions need it (`ValueError`)."""
        unified = self._action.denormalize(normalized)
        if self._frame is not None:
            if state is None:
                raise ValueError("these actions are relative to the state at the chunk's start; give it")
            unified = self._frame.decode(unified, self.state_map.to_unified(state))
        return self.action_map.to_native(unified)


def choose_dataset(
    datasets: Sequence[Mapping[str, Any]], name: str | None, environment: str | None
) -> Mapping[str, Any]:
    """The dataset entry whose robot and normalization a policy uses; `UserError` where that is ambiguous."""
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
            f"choose the dataset whose robot and normalization to use, one of {', '.join(names)}: this policy has "
            f"{len(fitting)} recorded in '{environment}' (its environments: {', '.join(trained) or 'none'})"
        )
    if len(datasets) == 1:
        return datasets[0]
    raise UserError(f"choose the dataset whose robot and normalization to use, one of {', '.join(names)}")
