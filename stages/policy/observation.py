"""What a policy sees of its environment at one step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Observation:
    """What a policy may see at one control step."""

    images: dict[str, np.ndarray]  # view name -> uint8 [H, W, 3] RGB; empty when no pictures were asked for
    instruction: str  # natural language task
    state: np.ndarray  # [ds] float32, native units of `Environment.state_names`
    start: int = 0  # which start of the split this episode began from
    step: int = 0  # control steps since reset; (start, step) keys a policy's noise, whatever the batch
