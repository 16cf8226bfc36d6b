"""Average pooling of feature tokens on their grid, and the error it makes."""

from __future__ import annotations

import torch

from ...errors import UserError


def average_pool(features: torch.Tensor, tokens: int) -> torch.Tensor:
    """Merged tokens [n,K,D] on a square grid → [n,tokens,D], averaged over the cells of a coarser grid."""
    n, k, d = features.shape
    side, target = int(k**0.5), int(tokens**0.5)
    if tokens == k:
        return features
    grid = features.transpose(1, 2).reshape(n, d, side, side)  # [n,D,side,side]
    pooled = torch.nn.functional.adaptive_avg_pool2d(grid, target)  # [n,D,target,target]
    return pooled.flatten(2).transpose(1, 2)  # [n,tokens,D]


def pooling_error(features: torch.Tensor, tokens: int) -> float:
    """Relative RMS error of the best reconstruction of `features` [n,P,D] from their pooling to `tokens`."""
    pool = average_pool(torch.eye(features.shape[1])[None], tokens)[0]  # [K,P]: pooled = pool @ features
    kept = torch.linalg.pinv(pool) @ (pool @ features)  # [n,P,D]
    return float((features - kept).square().mean().sqrt() / features.square().mean().sqrt().clamp(min=1e-30))


def check_pooling(tokens: int, available: int) -> None:
    """`UserError` unless `available` tokens (a square grid) can be pooled to `tokens` (a smaller square grid)."""
    squares = [i * i for i in range(1, int(available**0.5) + 1)]
    if tokens not in squares:
        raise UserError(
            f"--tokens {tokens}: this model gives {available} tokens on a square grid; choose one of "
            f"{', '.join(map(str, squares))}"
        )
