"""Checks of what is written to a cache: features and tables of the contract's shapes and dtypes, finite values.

Letters: N frames, n instructions, Lt text tokens, D width.
"""

from __future__ import annotations

import numpy as np

from ...errors import UserError
from .plan import BuildPlan, DatasetPlan, DatasetTables, ShardTask
from .zarr_format import require_layout, table_layouts


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
    row = {text: i for i, text in enumerate(plan.instructions)}
    arrays = {
        "action": t.action,
        "proprio": t.proprio,
        "action_mask": t.action_mask,
        "proprio_mask": t.proprio_mask,
        "timestamp": t.timestamp,
        "text/embedding": t.text,
        "text/length": t.text_length,
        "null_text": t.null_text,
        **{f"null/{view}": t.null_features[view] for view in plan.views},
        "episodes/start": plan.starts,
        "episodes/length": np.array([e.length for e in plan.episodes], np.int64),
        "episodes/id": np.array([e.episode_id for e in plan.episodes], np.int64),
        "episodes/instruction": np.array([row[e.instruction] for e in plan.episodes], np.int64),
    }
    sizes = plan.frames, len(plan.episodes), len(plan.instructions), build.tokens, build.width
    for name, layout in table_layouts(*sizes, plan.views).items():
        try:
            require_layout(arrays[name].shape, arrays[name].dtype.name, layout)
        except ValueError as error:
            raise ValueError(f"{plan.name}/{name}: {error}") from None
    if t.null_text.shape[-1] != t.text.shape[-1]:
        raise ValueError(f"{plan.name}/null_text: width {t.null_text.shape[-1]}, text has {t.text.shape[-1]}")
    used = np.arange(t.text.shape[1]) < t.text_length[:, None]
    return arrays | {"text/embedding": np.where(used[..., None], t.text, np.float16(0))}  # padding changes no byte
