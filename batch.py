"""FeatureBatch: the one contract between the loader (or the live encoder) and the model.

Letters: B observations, H frames (the current one and, with a history, earlier ones), V views, P vision tokens of a
view, L = H·V·P (all views of the current frame first), D feature width, Lt text tokens, Dt their width (D, unless
features are taken before the VLM's projection into its language model), T action steps, Hp past states.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

UNIFIED_DIM = 128
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


def layout(
    b: int, l: int, d: int, text: tuple[int, int], t: int, tokens: torch.dtype, scaled: bool = False, past: int = 0
) -> Layout:
    """Shape and dtype of every field of a batch by name, for `text` (Lt, Dt) and the dtype of its `tokens`.

    `scaled`: the tokens are 8-bit codes with scales. `past`: Hp."""
    integer, boolean, real = torch.int64, torch.bool, torch.float32
    fields: Layout = {
        "tokens": ((b, l, d), tokens),
        "token_mask": ((b, l), boolean),
        "view_id": ((b, l), integer),
        "frame_id": ((b, l), integer),
        "text": ((b, *text), torch.float16 if scaled else tokens),
        "text_mask": ((b, text[0]), boolean),
        "proprio": ((b, UNIFIED_DIM), real),
        "action": ((b, t, UNIFIED_DIM), real),
        "action_mask": ((b, UNIFIED_DIM), boolean),
        "step_mask": ((b, t), boolean),
        "embodiment": ((b,), integer),
        "control_hz": ((b,), real),
        "dataset": ((b,), integer),
        "frame_index": ((b,), integer),
    }
    fields |= {"past_proprio": ((b, past, UNIFIED_DIM), real), "past_mask": ((b, past), boolean)} if past else {}
    return fields | ({"token_scale": ((b, l), real), "channel_scale": ((d,), real)} if scaled else {})


@dataclass(frozen=True)
class FeatureBatch:
    """One training or inference batch. `tokens` and `text` are fp16, or the live encoder's dtype; see `layout`.

    A loader on an 8-bit cache gives codes as `tokens` with both scales; they are decoded on the model's device, so that
    the bus carries bytes only. The model takes decoded batches alone.

    Actions and proprio are normalized. A False in a mask means: the model must not see it (tokens, text) or the loss
    must not count it (action slots, steps past the episode's end).
    """

    tokens: torch.Tensor  # [B, L, D] vision features, all frames and views concatenated
    token_mask: torch.Tensor  # [B, L] bool
    view_id: torch.Tensor  # [B, L] int64, index of the camera of each token
    frame_id: torch.Tensor  # [B, L] int64, which offset of the history: 0 = current frame
    text: torch.Tensor  # [B, Lt, Dt] instruction embeddings
    text_mask: torch.Tensor  # [B, Lt] bool
    proprio: torch.Tensor  # [B, 128] normalized, 0 where inactive
    action: torch.Tensor  # [B, T, 128] normalized, 0 where inactive or past the end
    action_mask: torch.Tensor  # [B, 128] bool, active slots
    step_mask: torch.Tensor  # [B, T] bool, False past the episode's end
    embodiment: torch.Tensor  # [B] int64
    control_hz: torch.Tensor  # [B] float32
    dataset: torch.Tensor  # [B] int64, index into the cache's dataset list
    frame_index: torch.Tensor  # [B] int64, row on the dataset's flat time axis
    token_scale: torch.Tensor | None = None  # [B, L] float32, of 8-bit tokens only
    channel_scale: torch.Tensor | None = None  # [D] float32, of 8-bit tokens only
    past_proprio: torch.Tensor | None = None  # [B, Hp, 128] normalized, 0 where masked; only with a proprio history
    past_mask: torch.Tensor | None = None  # [B, Hp] bool, False before the episode's start

    @classmethod
    def to_act_on(
        cls,
        tokens: torch.Tensor,
        text: torch.Tensor,
        text_mask: torch.Tensor,
        proprio: torch.Tensor,
        action_mask: torch.Tensor,
        *,
        horizon: int,
        embodiment: int,
        control_hz: float,
        frames: torch.Tensor | None = None,
        visible: torch.Tensor | None = None,
        past: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> FeatureBatch:
        """Observations of one robot whose actions are to be predicted (zeros here): `tokens` [B, H·V, P, D], of which
        those of the `frames` [B, H] bool (None: of the only one), and of each view the first `visible` [B] int64 (None:
        all), can be seen; `action_mask` [128] or [B, 128]; `past`: (states [B, Hp, 128], [B, Hp] bool which of them
        there are). Checked."""
        b, device = len(tokens), tokens.device
        zero = torch.zeros(b, dtype=torch.int64, device=device)
        frames = torch.ones(b, 1, dtype=torch.bool, device=device) if frames is None else frames
        frame_id, view_id = places(frames.shape[1], tokens.shape[1] // frames.shape[1], tokens.shape[2], device)  # [L]
        token_mask = frames[:, frame_id]
        if visible is not None:
            place = torch.arange(tokens.shape[2], device=device).repeat(tokens.shape[1])  # [L], in its view
            token_mask = token_mask & (place < visible.to(device)[:, None])
        return cls(
            tokens=tokens.flatten(1, 2),
            token_mask=token_mask,
            view_id=view_id.repeat(b, 1),
            frame_id=frame_id.repeat(b, 1),
            text=text.to(tokens.dtype),
            text_mask=text_mask,
            proprio=proprio,
            action=torch.zeros(b, horizon, UNIFIED_DIM, device=device),
            action_mask=action_mask.expand(b, -1).contiguous(),
            step_mask=torch.ones(b, horizon, dtype=torch.bool, device=device),
            embodiment=zero + embodiment,
            control_hz=torch.full((b,), control_hz, device=device),
            dataset=zero,
            frame_index=zero,
            past_proprio=None if past is None else past[0],
            past_mask=None if past is None else past[1],
        ).check()

    def check(self) -> FeatureBatch:
        """Raise `ValueError` naming the first field whose shape or dtype breaks the contract; return self."""
        (b, l, d), (_, *text), t = self.tokens.shape, self.text.shape, self.action.shape[1]
        scaled, past = self.token_scale is not None, 0 if self.past_proprio is None else self.past_proprio.shape[1]
        if self.tokens.is_floating_point() == scaled:
            raise ValueError(
                f"FeatureBatch.tokens: expected a floating dtype, or 8-bit codes with scales, got {self.tokens.dtype}"
            )
        for name, (shape, dtype) in layout(b, l, d, (text[0], text[1]), t, self.tokens.dtype, scaled, past).items():
            value = getattr(self, name)
            if value is None or tuple(value.shape) != shape or value.dtype != dtype:
                raise ValueError(
                    f"FeatureBatch.{name}: expected {shape} {dtype}, got "
                    + ("None" if value is None else f"{tuple(value.shape)} {value.dtype}")
                )
        return self

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> FeatureBatch:
        """The batch of `change(field)` for every field that it has."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values |= {name: change(value) for name, value in values.items() if value is not None}
        return FeatureBatch(**values)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> FeatureBatch:
        """The same batch on `device`."""
        return self.map(lambda value: value.to(device, non_blocking=non_blocking))

    def replace(self, **changes: torch.Tensor | None) -> FeatureBatch:
        """A copy with some fields replaced, checked again."""
        return dataclasses.replace(self, **changes).check()  # type: ignore[arg-type]  # `check` refuses a wrong None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __repr__(self) -> str:
        fields = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        shapes = (
            f"{name} {str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for name, x in fields if x is not None
        )
        return f"FeatureBatch({', '.join(shapes)}, on {self.tokens.device})"


def places(
    frames: int, views: int, tokens: int, device: torch.device | str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(frame_id, view_id) int64 [L] of the tokens of an observation."""
    at = torch.arange(frames * views, device=device).repeat_interleave(tokens)
    return at // max(views, 1), at % max(views, 1)


def random_batch(
    b: int, views: int, tokens: int, width: int, horizon: int, words: int = 16, dtype: torch.dtype = torch.float16
) -> FeatureBatch:
    """A batch of noise with ten active slots, the same in every call, to measure speed with."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    batch = FeatureBatch.to_act_on(
        normal(b, views, tokens, width).to(dtype),
        normal(b, words, width),
        torch.ones(b, words, dtype=torch.bool),
        normal(b, UNIFIED_DIM),
        torch.arange(UNIFIED_DIM) < 10,
        horizon=horizon,
        embodiment=0,
        control_hz=10.0,
    )
    return batch.replace(action=normal(b, horizon, UNIFIED_DIM), frame_index=torch.arange(b))
