"""Classifier-free guidance at training time: the guidance scale α is drawn per observation, is an input of the network,
and weighs unconditional negatives; inference stays one forward pass at the α asked for (arXiv:2602.04770).

Letters: B observations, G noise samples per observation, M unconditional negatives, T action steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import FeatureBatch


def sample_alpha(
    count: int,
    *,
    low: float = 1.0,
    high: float = 4.0,
    power: float = 3.0,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Guidance scales [count] float32 with density ∝ α^−power on [low, high] (inverse distribution function)."""
    if not 0 < low <= high:
        raise ValueError(f"alpha range: expected 0 < low <= high, got {low}, {high}")
    u = torch.rand(count, device=device, generator=generator)  # [count]
    if power == 1.0:
        return low * (high / low) ** u
    e = 1.0 - power
    return (low**e + u * (high**e - low**e)) ** (1.0 / e)


def negative_weight(alpha: Tensor, draws: int, negatives: int | Tensor) -> Tensor:
    """Weight (α−1)(G−1)/M of each unconditional negative, shape of `alpha`; 0 where M = 0. α = 1 is no guidance."""
    count = torch.as_tensor(negatives, device=alpha.device, dtype=alpha.dtype)
    return torch.where(count > 0, (alpha - 1.0) * (draws - 1) / count.clamp(min=1), 0.0)


def batch_negatives(
    batch: FeatureBatch, alpha: Tensor, draws: int, count: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Unconditional negatives from the batch itself: chunks [B,M,T,128] of other observations and their weights [B,M].

    M = min(count, B−1) observations of the same dataset, drawn without replacement, whose chunk does not run past its
    episode's end. Where fewer exist the surplus has weight 0 and the rest share (α−1)(G−1). Pass both to `policy_loss`.
    """
    b = len(batch)
    m = min(count, b - 1)
    fits = (batch.dataset[:, None] == batch.dataset[None, :]) & batch.step_mask.all(1)[None, :]  # [B,B]
    fits = fits & ~torch.eye(b, dtype=torch.bool, device=fits.device)  # [B,B]
    order = torch.rand(b, b, device=fits.device, generator=generator).masked_fill(~fits, -1.0)  # [B,B]
    chosen = order.topk(m, dim=1).indices  # [B,M]
    valid = fits.gather(1, chosen)  # [B,M]
    weight = negative_weight(alpha, draws, valid.sum(1))  # [B]
    return batch.action[chosen], weight[:, None] * valid  # [B,M,T,128], [B,M]
