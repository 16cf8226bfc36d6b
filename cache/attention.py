"""Attention over all tokens of each picture: flash-attn's kernel where it is installed and fits, else torch's own.

Letters: N images, A heads, S tokens of one image, E head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

MAX_HEAD_WIDTH = 256    # of flash-attn


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(E)) v for q, k, v [N,A,S,E], without mask or dropout -> [N,A,S,E].

    flash-attn takes 16-bit CUDA tensors only; it and torch's kernels differ by rounding.
    """
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= MAX_HEAD_WIDTH and (kernel := flash_kernel()):
        return kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v)


@functools.cache
def flash_kernel() -> Callable[..., torch.Tensor] | None:
    """flash-attn's function of q, k, v [N,S,A,E], looked for once; None where it is not installed or not built for this torch."""
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return None
    return flash_attn_func
