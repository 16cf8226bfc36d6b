"""FeatureBatch: the one contract between the loader (or the live encoder) and the model.

Letters: B observations, L vision tokens of all views, D feature width, Lt text tokens, Dt their width (D, unless
features are taken before the VLM's projection into its language model), T action steps.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

UNIFIED_DIM = 128


@dataclass(frozen=True)
class FeatureBatch:
    """One training or inference batch. `tokens` and `text` are fp16 (or the live encoder's dtype); the rest
    float32/bool/int64.

    A loader on an 8-bit cache gives codes as `tokens` with both scales; they are decoded on the model's device, so that
    the bus carries bytes only. The model takes decoded batches alone.

    Actions and proprio are normalised. A False in a mask means: the model must not see it (tokens, text) or the loss
    must not count it (action dims, steps past the episode's end).
    """

    tokens: torch.Tensor  # [B, L, D] vision features, all views concatenated
    token_mask: torch.Tensor  # [B, L] bool
    view_id: torch.Tensor  # [B, L] int64, index of the camera of each token
    frame_id: torch.Tensor  # [B, L] int64, 0 = current frame
    text: torch.Tensor  # [B, Lt, Dt] instruction embeddings
    text_mask: torch.Tensor  # [B, Lt] bool
    proprio: torch.Tensor  # [B, 128] normalised, 0 where inactive
    action: torch.Tensor  # [B, T, 128] normalised, 0 where inactive or past the end
    action_mask: torch.Tensor  # [B, 128] bool, active slots
    step_mask: torch.Tensor  # [B, T] bool, False past the episode's end
    embodiment: torch.Tensor  # [B] int64
    control_hz: torch.Tensor  # [B] float32
    dataset: torch.Tensor  # [B] int64, index into the cache's dataset list
    frame_index: torch.Tensor  # [B] int64, row on the dataset's flat time axis
    token_scale: torch.Tensor | None = None  # [B, L] float32, of 8-bit tokens only
    channel_scale: torch.Tensor | None = None  # [D] float32, of 8-bit tokens only

    def check(self) -> FeatureBatch:
        """Raise `ValueError` naming the first field whose shape or dtype breaks the contract; return self."""
        b, l, d = self.tokens.shape
        (_, lt, dt), t = self.text.shape, self.action.shape[1]
        integer, boolean, real = torch.int64, torch.bool, torch.float32
        expected = {
            "token_mask": ((b, l), boolean),
            "view_id": ((b, l), integer),
            "frame_id": ((b, l), integer),
            "text": ((b, lt, dt), self.tokens.dtype if self.token_scale is None else torch.float16),
            "text_mask": ((b, lt), boolean),
            "proprio": ((b, UNIFIED_DIM), real),
            "action": ((b, t, UNIFIED_DIM), real),
            "action_mask": ((b, UNIFIED_DIM), boolean),
            "step_mask": ((b, t), boolean),
            "embodiment": ((b,), integer),
            "control_hz": ((b,), real),
            "dataset": ((b,), integer),
            "frame_index": ((b,), integer),
        }
        if self.token_scale is not None:
            expected |= {"token_scale": ((b, l), real), "channel_scale": ((d,), real)}
        if self.tokens.is_floating_point() != (self.token_scale is None):
            raise ValueError(
                f"FeatureBatch.tokens: expected a floating dtype, or 8-bit codes with scales, got {self.tokens.dtype}"
            )
        for name, (shape, dtype) in expected.items():
            value = getattr(self, name)
            if value is None or tuple(value.shape) != shape or value.dtype != dtype:
                raise ValueError(
                    f"FeatureBatch.{name}: expected {shape} {dtype}, got "
                    + ("None" if value is None else f"{tuple(value.shape)} {value.dtype}")
                )
        return self

    def to(self, device: torch.device | str, non_blocking: bool = False) -> FeatureBatch:
        """The same batch on `device`."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values |= {n: v.to(device, non_blocking=non_blocking) for n, v in values.items() if v is not None}
        return FeatureBatch(**values)

    def replace(self, **changes: torch.Tensor | None) -> FeatureBatch:
        """A copy with some fields replaced, checked again."""
        return dataclasses.replace(self, **changes).check()  # type: ignore[arg-type]  # of a None where none may be, `check` tells

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __repr__(self) -> str:
        fields = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        shapes = (
            f"{name} {str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for name, x in fields if x is not None
        )
        return f"FeatureBatch({', '.join(shapes)}, on {self.tokens.device})"
