"""One chunk of actions into the next, where `lerobot-rollout --inference.type=rtc` plans in the background."""

from __future__ import annotations

from typing import Any

import torch

from ....cache.actions.action_map import ActionMap

HORIZON = 10  # steps over which LeRobot's default hands over


def blend(actions: ActionMap, previous: torch.Tensor, chunk: torch.Tensor, delay: int, rtc: Any = None) -> torch.Tensor:
    """The new chunk [1,T,d] with its first `delay` steps those of `previous` [n,d], and a linear hand-over after them.

    Real-time chunking guides a denoising by the previous chunk; a policy of one forward pass has none to guide, so
    chunks are mixed where they overlap, rotations as unified ones (6D). Rows of zeros at the end of `previous`
    are LeRobot's padding.
    """
    rows = previous.reshape(-1, previous.shape[-1]).to(chunk)
    real = int((rows != 0).any(dim=1).nonzero().max()) + 1 if rows.any() else 0
    end = min(real, chunk.shape[1], rtc.execution_horizon if rtc is not None else HORIZON)
    start = min(delay, end)
    if end == 0:
        return chunk
    weights = torch.cat([torch.ones(start), torch.linspace(1, 0, end - start + 2)[1:-1]]).numpy()[:, None]  # [end,1]
    old, new = (actions.to_unified(part[:end].cpu().numpy()) for part in (rows, chunk[0]))
    mixed = torch.from_numpy(actions.to_native(weights * old + (1 - weights) * new)).to(chunk)  # [end,d]
    mixed[:start] = rows[:start]
    return torch.cat([mixed[None], chunk[:, end:]], dim=1)
