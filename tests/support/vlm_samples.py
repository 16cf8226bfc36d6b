"""A tiny vision-language model, images for it, and which files of a checkpoint they need."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from dvla.cache.vlm.tiny_qwen3vl import TinySpec

TINY = TinySpec(
    vision_depth=1,
    vision_width=32,
    vision_heads=2,
    vision_mlp=2,
    out_width=32,
    text_layers=1,
    vocabulary=512,
    init_std=0.1,
)


def smooth_images(n: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Smooth random images, uint8 [n,H,W,3]."""
    coarse = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return (
        (F.interpolate(coarse, (height, width), mode="bilinear").permute(0, 2, 3, 1) * 255).to(torch.uint8).contiguous()
    )


def weight_files(checkpoint: Path, needed: Callable[[str], object]) -> tuple[list[str], list[str]]:
    """(files without a tensor whose name is `needed`, all files) of a checkpoint in several files."""
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    return sorted(set(index.values()) - {file for name, file in index.items() if needed(name)}), sorted(
        set(index.values())
    )
