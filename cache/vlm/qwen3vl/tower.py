"""The forward pass of a Qwen3-VL vision tower, on transformers' own module, for a batch of equal-sized images.

transformers packs all images into one sequence and attends image by image; here images are a batch dimension, so that
every block makes one attention call, and positions are computed once per resolution. A test compares the results with
transformers' forward. `vision` is a Qwen3VLVisionModel; a `block` and an `attn` are parts of it.

Letters: N images, S patches of one image in merge order (the M x M patches of one merged token adjacent, tokens row
by row), F values of one patch, C vision width, A attention heads, E = C/A head width, D width of the language model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..blocks import attention, through

ROTARY_BASE = 10000.0


@dataclass(frozen=True)
class PositionTables:
    """Positions of the S patches of one image, in merge order."""

    index: torch.Tensor  # [4,S] int64, corners in the learned position grid
    weight: torch.Tensor  # [4,S,1] float32, bilinear weights of the corners
    cos: torch.Tensor  # [S,E] float32, rotary
    sin: torch.Tensor  # [S,E] float32
    row_major: torch.Tensor  # [S] int64, where in merge order the patches of the image lie, row by row
    merge_order: torch.Tensor  # [S] int64, its inverse


def rotary_base(config: Any) -> float:
    """The base of the rotary angles; only transformers 5 has it in the config."""
    return float((getattr(config, "rope_parameters", None) or {}).get("rope_theta", ROTARY_BASE))


def rotary_frequencies(config: Any) -> torch.Tensor:
    """[E/4] float32: base^(-2i/(E/2)), for rows and columns."""
    base = rotary_base(config)
    half = config.hidden_size // config.num_heads // 2
    return 1.0 / base ** (torch.arange(0, half, 2, dtype=torch.float32) / half)


def position_tables(vision: Any, grid: int, device: torch.device) -> PositionTables:
    """Tables for a `grid` x `grid` image: corners in the learned position grid, 2D rotary angles (row, column)."""
    config = vision.config
    side, merge = int(config.num_position_embeddings**0.5), config.spatial_merge_size
    at = torch.linspace(0, side - 1, grid)  # [grid], in cells of the learned grid
    low = at.long()
    high = (low + 1).clamp(max=side - 1)
    part = at - low
    axis_index, axis_weight = torch.stack([low, high]), torch.stack([1 - part, part])  # [2,grid]
    index = axis_index[:, None, :, None] * side + axis_index[None, :, None, :]  # [2,2,grid,grid]
    weight = axis_weight[:, None, :, None] * axis_weight[None, :, None, :]  # [2,2,grid,grid]

    frequency = rotary_frequencies(config)  # [E/4]
    angle = torch.outer(torch.arange(grid, dtype=torch.float32), frequency)  # [grid,E/4]
    angle = torch.cat([angle[:, None].expand(-1, grid, -1), angle[None].expand(grid, -1, -1)], -1)  # [grid,grid,E/2]
    angle = torch.cat([angle, angle], -1).flatten(0, 1)  # [S,E], row-major

    blocks = torch.arange(grid * grid).reshape(grid // merge, merge, grid // merge, merge)
    order = blocks.permute(0, 2, 1, 3).flatten()  # [S], row-major index of the s-th patch in merge order
    return PositionTables(
        index.reshape(4, -1)[:, order].to(device),
        weight.reshape(4, -1, 1)[:, order].to(device),
        angle.cos()[order].to(device),
        angle.sin()[order].to(device),
        order.argsort().to(device),
        order.to(device),
    )


def embed_patches(vision: Any, patches: torch.Tensor, tables: PositionTables) -> torch.Tensor:
    """[N,S,F] -> [N,S,C]: the patch convolution (stride = kernel) as one matrix product, plus learned positions."""
    proj = vision.patch_embed.proj
    hidden = F.linear(patches.to(proj.weight.dtype), proj.weight.flatten(1), proj.bias)  # [N,S,C]
    corners = vision.pos_embed(tables.index)  # [4,S,C]
    return hidden + (corners * tables.weight.to(corners.dtype)).sum(0)  # [N,S,C]


def run_blocks(vision: Any, hidden: torch.Tensor, tables: PositionTables, begin: int, end: int) -> torch.Tensor:
    """Transformer blocks `begin` … `end`-1 on [N,S,C], one attention call each."""

    def run(block: Any, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + _attention(block.attn, block.norm1(hidden), tables)  # [N,S,C]
        return hidden + block.mlp(block.norm2(hidden))  # [N,S,C]

    return through(vision.blocks[begin:end], run, hidden, vision.recompute)


def _attention(attn: Any, x: torch.Tensor, tables: PositionTables) -> torch.Tensor:
    n, s, c = x.shape
    q, k, v = attn.qkv(x).view(n, s, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)  # each [N,A,S,E]
    mixed = attention(_rotate(q, tables), _rotate(k, tables), v)  # [N,A,S,E]
    return attn.proj(mixed.transpose(1, 2).reshape(n, s, c))  # [N,S,C]


def _rotate(x: torch.Tensor, tables: PositionTables) -> torch.Tensor:
    real = x.float()  # [N,A,S,E]
    first, second = real.chunk(2, -1)
    return (real * tables.cos + torch.cat([-second, first], -1) * tables.sin).to(x.dtype)  # [N,A,S,E]
