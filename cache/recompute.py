"""Gradient checkpointing of a stack of blocks: only what enters a block is kept for the backward pass, the inside is computed again.

Gradients are the same; a training step takes about a third longer and the activations of one block at a time. Letters: N images, S tokens,
C width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def through(blocks: Iterable[nn.Module], run: Callable[[nn.Module, torch.Tensor], torch.Tensor], hidden: torch.Tensor,
            recompute: bool) -> torch.Tensor:
    """`hidden` [N,S,C] through every block, by `run(block, hidden)`; `recompute`: with checkpointing, where there are gradients at all."""
    recompute = recompute and torch.is_grad_enabled()
    for block in blocks:
        hidden = checkpoint(run, block, hidden, use_reentrant=False) if recompute else run(block, hidden)      # [N,S,C]
    return hidden
