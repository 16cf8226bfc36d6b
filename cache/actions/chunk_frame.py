"""Chunks of actions relative to the state at their start, and back: what `action_frame: chunk` means.

Joints and positions become differences to that state, a rotation R becomes R₀ᵀ·R (its 6D form: both columns turned into
the frame that the hand has at the start). Grippers, fingers and velocities stay as they are, as does every slot that
the state lacks. Both ways are linear in the action, so that one undoes the other exactly.
"""

from __future__ import annotations

import copy

import numpy as np

from .rotations import matrix_from_rot6d
from .slots import ROTATION_PREFIXES, SLOTS, kind_of, slots

RELATIVE = np.array([kind_of(slot.name) in ("joint", "position") for slot in slots()])  # [128] become differences
ROTATIONS = sorted({SLOTS[f"{prefix}_0"] for prefix in ROTATION_PREFIXES})  # first slots of 6D rotations


class ChunkFrame:
    """The slots of one dataset that become relative: `plain` and the first of six of each of `rotations`."""

    def __init__(self, shared: np.ndarray, rotation: np.ndarray) -> None:
        """`shared` [128] bool: slots that action and state fill; `rotation`: those that are 6D rotations in both."""
        self.plain = np.flatnonzero(shared & RELATIVE)
        self.rotations = [i for i in ROTATIONS if (shared & rotation)[i : i + 6].all()]

    def __bool__(self) -> bool:
        """Whether anything becomes relative."""
        return bool(len(self.plain) or self.rotations)

    def on(self, used: np.ndarray) -> ChunkFrame:
        """The same for vectors of the slots `used` [n] alone, ascending, among which all relative ones are."""
        few = copy.copy(self)
        few.plain = np.searchsorted(used, self.plain)
        few.rotations = np.searchsorted(used, self.rotations).tolist()
        return few

    def encode(self, action: np.ndarray, state: np.ndarray) -> np.ndarray:
        """Unified actions `[..., T, 128]` relative to the unified state `[..., 128]` at the chunk's start, float32."""
        return self._moved(action, state, -1)

    def decode(self, action: np.ndarray, state: np.ndarray) -> np.ndarray:
        """Inverse of `encode`."""
        return self._moved(action, state, 1)

    def _moved(self, action: np.ndarray, state: np.ndarray, sign: int) -> np.ndarray:
        if state.shape != (*action.shape[:-2], action.shape[-1]):
            raise ValueError(f"chunks {action.shape} do not start at states {state.shape}")
        out = np.array(action, np.float32)
        out[..., self.plain] += sign * state[..., None, self.plain].astype(np.float32)
        for first in self.rotations:
            start = matrix_from_rot6d(state[..., first : first + 6])  # [..., 3, 3]
            six = action[..., first : first + 6]  # [..., T, 6]: two columns c of each R
            columns = six.reshape(*state.shape[:-1], -1, 3)  # [..., 2T, 3], of all steps at once
            turned = columns @ (start if sign < 0 else start.swapaxes(-1, -2))  # (R₀ᵀ·c)ᵀ = cᵀ·R₀
            out[..., first : first + 6] = turned.reshape(six.shape)
        return out
