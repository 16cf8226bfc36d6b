"""What a policy sees of its environment at one step, also as torch tensors and in LeRobot's form.

Letters: H, W image size (or H frames), Hp past states, V views, K tokens of one image, D feature width, ds native state
width, B observations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import UserError, unknown

if TYPE_CHECKING:
    import torch
LEROBOT_IMAGES, LEROBOT_STATE = "observation.images.", "observation.state"  # LeRobot's names
OVERSHOOT = 0.1  # by which resampling may leave [0, 1]


@dataclass(eq=False)
class Step:
    """What is kept of a control step for later ones (history.py)."""

    images: Mapping[str, np.ndarray]  # until they are encoded; empty where none were taken
    state: np.ndarray  # [ds]
    features: torch.Tensor | None = None  # [V,K,D]
    instruction: str = ""  # that the features were made with


@dataclass(frozen=True)
class Window:
    """The steps that a policy sees at one step; None for those that were not pushed."""

    frames: tuple[Step | None, ...]  # [H], the current one first
    states: tuple[Step | None, ...]  # [Hp]


@dataclass(frozen=True)
class Observation:
    """What a policy may see at one control step."""

    images: dict[str, np.ndarray]  # view name -> uint8 [H, W, 3] RGB; empty where no images are needed
    instruction: str  # natural language task
    state: np.ndarray  # [ds] float32, native units of `Environment.state_names`
    start: int = 0  # which initial state of the split this episode began from
    step: int = 0  # control steps since reset; (start, step) keys a policy's noise, whatever the batch
    # steps before this one (`Past.push`), for a policy with a history; None: it sees none
    window: Window | None = field(default=None, repr=False, compare=False)


def as_image(value: Any, view: str) -> np.ndarray:
    """uint8 [H, W, 3] of an image that is so already, or floating [3, H, W] in [0, 1]; an array, or a tensor on any
    device.

    `UserError` naming the view for anything else."""
    image = _array(value)
    if image.ndim == 3 and image.dtype == np.uint8 and image.shape[2] == 3 and image.size:
        return image
    if image.ndim == 3 and image.dtype.kind == "f" and image.shape[0] == 3 and image.size:
        low, high = image.min(), image.max()
        if low >= -OVERSHOOT and high <= 1 + OVERSHOOT:  # neither holds for NaN
            return np.ascontiguousarray(np.rint(image * 255).clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
        raise UserError(f"image '{view}' has values from {low:g} to {high:g}; scale images of float to [0, 1]")
    raise UserError(
        f"image '{view}' is {image.dtype} {list(image.shape)}; give uint8 [H, W, 3], or float [3, H, W] in [0, 1]"
    )


def as_observation(
    images: Mapping[str, Any], instruction: Any, state: Any, views: Sequence[str], state_names: Sequence[str]
) -> Observation:
    """The observation of a policy that needs `views`; other images are ignored. `UserError` for what it cannot use."""
    if not isinstance(instruction, str):
        raise UserError(f"the instruction must be text, got {type(instruction).__name__}")
    values = _array(state)
    if values.shape != (len(state_names),) or values.dtype.kind not in "biuf" or not np.isfinite(values).all():
        raise UserError(
            f"the state is {values.dtype} {list(values.shape)}; give [{len(state_names)}] finite numbers: "
            + ", ".join(state_names)
        )
    require_views(views, images)
    return Observation({v: as_image(images[v], v) for v in views}, instruction, values.astype(np.float32))


def from_lerobot(observation: Mapping[str, Any], views: Sequence[str], state_names: Sequence[str]) -> list[Observation]:
    """The B observations of LeRobot's dict: `observation.images.<view>` [B, 3, H, W], `observation.state` [B, ds] and
    `task`, one text or a list of B; or the one of a dict without the dimension B. `UserError` naming what is missing or
    wrong."""
    needed = [LEROBOT_STATE, *(LEROBOT_IMAGES + view for view in views)]
    for key in needed:
        if key not in observation:
            given = ", ".join(k for k in observation if k.startswith("observation")) or "nothing"
            raise UserError(f"{key} is missing; the observation has {given}: rename it (in LeRobot with --rename_map)")
    alone = np.ndim(observation[LEROBOT_STATE]) == 1
    values = {key: [observation[key]] if alone else observation[key] for key in needed}
    count, task = len(values[LEROBOT_STATE]), observation.get("task") or ""
    values["task"] = [task] * count if isinstance(task, str) else task
    for key, found in values.items():
        if len(found) != count:
            raise UserError(f"{key} has {len(found)} entries, {LEROBOT_STATE} has {count}; their counts must match")
    return [
        as_observation(
            {view: values[LEROBOT_IMAGES + view][i] for view in views},
            values["task"][i],
            values[LEROBOT_STATE][i],
            views,
            state_names,
        )
        for i in range(count)
    ]


def require_views(views: Sequence[str], images: Mapping[str, Any]) -> None:
    """`UserError` for a view that the policy needs and the observation lacks."""
    for view in views:
        if view not in images:
            if images:
                raise unknown("view", view, images)
            raise UserError(f"the policy needs images of {', '.join(views)}; the observation has none")


def _array(value: Any) -> np.ndarray:
    """NumPy's array of a tensor on any device, or of numbers."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value  # NumPy has no bfloat16
    return np.asarray(value)
