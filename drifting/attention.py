"""Attention kernels of the DiT behind one switch: torch's SDPA (default), FlexAttention, flash-attn.

A kernel is prepared once per forward pass, `kernel(mask, queries)`, for all layers that share the mask; what it returns
is called with q [B,H,Q,h], k and v [B,H,L,h] and gives [B,H,Q,h].

Letters: B observations (or chunks), H heads, Q queries, L keys, h head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ..errors import UserError, unknown

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Kernel = Callable[[Tensor | None, int], Attend]
"""`mask` [B,L] bool, False: invisible, at least one True in every row; None: everything is visible."""

FLEX_BLOCK = 128  # FlexAttention skips blocks of so many keys where none is visible
MAX_HEAD_WIDTH = 256  # of flash-attn


def sdpa(mask: Tensor | None, queries: int) -> Attend:
    """`F.scaled_dot_product_attention`: torch chooses the kernel; any device and dtype."""
    visible = None if mask is None else mask[:, None, None, :]  # [B,1,1,L]
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


def flex(mask: Tensor | None, queries: int) -> Attend:
    """`flex_attention`, compiled on CUDA: keys are skipped in blocks where padding hides all of them.

    On the CPU it is torch's unfused reference: right, but slow, and not to be compiled where gradients are wanted.
    """
    blocks = None if mask is None else _key_blocks(mask, queries)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        fused = q.is_cuda and not torch.compiler.is_compiling()  # inside torch.compile it is compiled already
        call: Callable[..., Any] = _compiled_flex() if fused else flex_attention  # its type has all it gives on request
        return call(q, k, v, block_mask=blocks)

    return attend


def flash(mask: Tensor | None, queries: int) -> Attend:
    """flash-attn: 16-bit CUDA tensors, keys unpadded where there is a mask. 32-bit ones (no autocast) take SDPA."""
    plain, packing = sdpa(mask, queries), None if mask is None else _packing(mask)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.dtype not in (torch.float16, torch.bfloat16):
            return plain(q, k, v)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B,Q,H,h], [B,L,H,h] twice
        dense, packed = _flash_kernels()
        if mask is None or packing is None:
            return dense(q, k, v).transpose(1, 2)  # [B,H,Q,h]
        order, used, ends = packing
        # [B·L,H,h], visible ones first
        k, v = (torch.where(used[:, None, None], x.flatten(0, 1)[order], 0.0) for x in (k, v))
        starts = torch.arange(0, (q.shape[0] + 1) * queries, queries, dtype=torch.int32, device=q.device)  # [B+1]
        y = packed(q.flatten(0, 1), k, v, starts, ends, queries, mask.shape[1])  # [B·Q,H,h]
        return y.unflatten(0, q.shape[:2]).transpose(1, 2)  # [B,H,Q,h]

    return attend


KERNELS: dict[str, Kernel] = {"auto": sdpa, "sdpa": sdpa, "flex": flex, "flash": flash}


def kernel(kind: str, device: torch.device, head_width: int) -> Kernel:
    """The kernel of a name; `UserError` where its library or device is missing or the heads are too wide for it."""
    if kind not in KERNELS:
        raise unknown("attention", kind, KERNELS)
    if kind == "flash":
        if device.type != "cuda":
            raise UserError(f"attention is flash and the device {device.type}; flash-attn needs CUDA: use sdpa")
        if head_width > MAX_HEAD_WIDTH:
            raise UserError(
                f"attention is flash and a head {head_width} wide; flash-attn takes at most {MAX_HEAD_WIDTH}: "
                "use sdpa or flex"
            )
        _flash_kernels()
    if kind == "flex" and head_width < 16:
        raise UserError(f"attention is flex and a head {head_width} wide; FlexAttention needs at least 16: use sdpa")
    return KERNELS[kind]


def _key_blocks(mask: Tensor, queries: int) -> BlockMask:
    """FlexAttention's block mask of a mask over keys [B,L] alone, without evaluating it for every query."""
    b, l = mask.shape
    rows, columns = -(-queries // FLEX_BLOCK), -(-l // FLEX_BLOCK)
    seen = F.pad(mask, (0, columns * FLEX_BLOCK - l)).reshape(b, columns, FLEX_BLOCK).any(-1)  # [B,columns]
    count = seen.sum(1, dtype=torch.int32)[:, None, None].expand(b, 1, rows)  # [B,1,rows] blocks to visit
    index = seen.int().argsort(dim=1, descending=True, stable=True).int()  # [B,columns] those first
    index = index[:, None, None].expand(b, 1, rows, columns)  # [B,1,rows,columns]
    return BlockMask.from_kv_blocks(
        count.contiguous(),
        index.contiguous(),
        BLOCK_SIZE=FLEX_BLOCK,
        seq_lengths=(queries, l),
        mask_mod=lambda batch, head, query, key: mask[batch, key],
    )


def _packing(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How flash-attn's keys are unpadded, with shapes that do not depend on the data: for keys flattened to [B·L] their
    `order` with the visible ones first, which of the positions are `used`, and where each observation's keys end,
    `ends` [B+1].

    Positions beyond the last end are never read; their gradient is not written either, so `used` must mask it.
    """
    count = mask.sum(1)  # [B]
    order = (~mask).flatten().int().argsort(stable=True)  # [B·L]
    used = torch.arange(mask.numel(), device=mask.device) < count.sum()  # [B·L]
    return order, used, F.pad(count.cumsum(0), (1, 0)).int()


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention)


@functools.cache
def _flash_kernels() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """flash-attn's functions for padded and for packed sequences; `UserError` where they are missing."""
    try:
        from flash_attn import flash_attn_func, flash_attn_varlen_func
    except ImportError:
        raise UserError(
            "attention is flash and flash-attn is not installed, or not for this torch: pip install 'dvla[gpu]', "
            "or use sdpa"
        ) from None
    return flash_attn_func, flash_attn_varlen_func
