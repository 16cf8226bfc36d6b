"""Pieces that both vision towers share: attention kernels, and gradient checkpointing of blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

MAX_HEAD_WIDTH = 256  # of flash-attn


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(E)) v for q, k, v [N,A,S,E], without mask or dropout -> [N,A,S,E].

    flash-attn takes 16-bit CUDA tensors only; it and torch's kernels differ by rounding.
    """
    fits = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= MAX_HEAD_WIDTH
    if fits and (kernel := flash_kernel()):
        return kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v)


@functools.cache
def flash_kernel() -> Callable[..., torch.Tensor] | None:
    """flash-attn's function of q, k, v [N,S,A,E]; None where it is not installed or not built for this torch."""
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return None
    return flash_attn_func


def through(
    blocks: Iterable[nn.Module],
    run: Callable[[nn.Module, torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    recompute: bool,
) -> torch.Tensor:
    """Pass `hidden` [N,S,C] through every block by `run(block, hidden)`; `recompute`: gradient checkpointing."""
    recompute = recompute and torch.is_grad_enabled()
    for block in blocks:
        hidden = checkpoint(run, block, hidden, use_reentrant=False) if recompute else run(block, hidden)  # [N,S,C]
    return hidden
