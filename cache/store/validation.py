"""Checks of what is written to a cache: features and tables of the contract's shapes and dtypes, finite values.

Letters: N frames, n instructions, Lt text tokens, D width.
"""

from __future__ import annotations

import numpy as np

from ...errors import UserError
from ..actions.slots import UNIFIED_DIM
from .plan import BuildPlan, DatasetPlan, DatasetTables, ShardTask


def check_features(block: np.ndarray, scale: np.ndarray | None, task: ShardTask, first: int, plan: BuildPlan) -> None:
    """Shapes and dtypes of the contract (`ValueError`), and finite values (`UserError`)."""
    format, dtype = plan.format, np.dtype(plan.format.zarr_dtype)
    if block.dtype != dtype or block.ndim != 3 or (scale is None) == format.quantized:
        wanted, given = (" and scales" if scaled else "" for scaled in (format.quantized, scale is not None))
        raise ValueError(
            f"{task}: expected {dtype} [k, tokens, width]{wanted}, got {block.dtype} {list(block.shape)}{given}"
        )
    if scale is not None:
        if scale.shape != block.shape[:2] or scale.dtype != np.float32:
            raise ValueError(f"{task}: expected scales float32 {block.shape[:2]}, got {scale.dtype} {scale.shape}")
        bad = ~np.isfinite(scale).all(axis=1)
    else:  # the bits of ±inf and NaN are the largest integers, signed and unsigned: 10x faster than isfinite
        suspect = block.size and (block.view(np.int16).max() >= 0x7C00 or block.view(np.uint16).max() >= 0xFC00)
        bad = ~np.isfinite(block).all(axis=(1, 2)) if suspect else np.zeros(len(block), bool)
    if bad.any():
        raise UserError(
            f"{task.dataset}/{task.array}: the feature of row {first + int(bad.argmax())} is not finite in "
            f"{format.dtype}; check the weights, or encode in another dtype"
        )


def checked_arrays(plan: DatasetPlan, build: BuildPlan, t: DatasetTables) -> dict[str, np.ndarray]:
    """The arrays of a dataset's tables by path. `ValueError` unless they have the contract's shapes and dtypes."""
    frames, n, width, slots = plan.frames, len(plan.instructions), build.width, UNIFIED_DIM
    text_width = t.text.shape[-1]  # `width`, unless features are taken before the projection into the language model
    row = {text: i for i, text in enumerate(plan.instructions)}
    expected = {
        "action": (t.action, (frames, slots), "f4"),
        "proprio": (t.proprio, (frames, slots), "f4"),
        "action_mask": (t.action_mask, (slots,), "?"),
        "proprio_mask": (t.proprio_mask, (slots,), "?"),
        "timestamp": (t.timestamp, (frames,), "f8"),
        "text/embedding": (t.text, (n, t.text.shape[1], text_width), "f2"),
        "text/length": (t.text_length, (n,), "i8"),
        "null_text": (t.null_text, (len(t.null_text), text_width), "f2"),
        **{f"null/{view}": (t.null_features[view], (build.tokens, width), "f2") for view in plan.views},
    }
    for name, (values, shape, dtype) in expected.items():
        if values.shape != shape or values.dtype != np.dtype(dtype):
            raise ValueError(
                f"{plan.name}/{name}: expected {shape} {np.dtype(dtype)}, got {values.shape} {values.dtype}"
            )
    arrays = {name: values for name, (values, _, _) in expected.items()}
    used = np.arange(t.text.shape[1]) < t.text_length[:, None]
    arrays["text/embedding"] = np.where(used[..., None], t.text, np.float16(0))  # bytes do not depend on padding
    episodes = {
        "start": plan.starts.tolist(),
        "length": [e.length for e in plan.episodes],
        "id": [e.episode_id for e in plan.episodes],
        "instruction": [row[e.instruction] for e in plan.episodes],
    }
    return arrays | {f"episodes/{name}": np.array(values, np.int64) for name, values in episodes.items()}
