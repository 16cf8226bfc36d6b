"""Augmented variants of images, as pure functions of a key; a cache's and those of stage three come from this code.

A crop of 90 to 100 % of each side, resized back, then brightness, contrast, saturation and hue as in RDT-1B
(ColorJitter 0.3, 0.4, 0.5, 0.03). Training uses augmented images for half of the samples, from the cache and live.
Letters: N images, H × W size.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
import torch.nn.functional as F

from ...common.hashing import mix, uniform

AUGMENTATION_VERSION = 1  # raise when the same key gives another image; part of the fingerprint
PROBABILITY = 0.5  # that a training sample is augmented
CROP = 0.9  # smallest share of each side that is kept
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.3, 0.4, 0.5, 0.03
_GRAY = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma


def frame_keys(dataset: str, view: str, episode_id: int, frames: np.ndarray, variant: int) -> np.ndarray:
    """uint64 [n]: the keys of frames [n] of one view of an episode."""
    names = zlib.crc32(dataset.encode()), zlib.crc32(view.encode())
    return mix(*names, episode_id, np.asarray(frames, np.int64), variant)


def draw_variants(seed: int, position: np.ndarray, variants: int) -> np.ndarray:
    """int64 [n]: the variant of the samples at these positions of a run, a pure function of (seed, position).

    With `PROBABILITY` uniformly one of 1 … `variants`, else 0, the original image.
    """
    u = uniform(seed, 7, position)
    return np.where(u < PROBABILITY, 1 + np.floor(u / PROBABILITY * variants), 0).astype(np.int64) * (variants > 0)


def augment(images: torch.Tensor, keys: np.ndarray) -> torch.Tensor:
    """uint8 RGB [N,H,W,3], keys uint64 [N] → uint8 [N,H,W,3] on the same device."""
    n, h, w, _ = images.shape
    draw = np.stack([uniform(keys, i) for i in range(7)])  # [7,N] in [0,1)
    size = CROP + (1 - CROP) * draw[0]  # [N] share of a side
    shift = (draw[1:3] * 2 - 1) * (1 - size)  # [2,N] of the center, in half sides
    theta = np.zeros((n, 2, 3), np.float32)
    theta[:, 0, 0] = theta[:, 1, 1] = size
    theta[:, 0, 2], theta[:, 1, 2] = shift
    x = images.permute(0, 3, 1, 2).float() / 255  # [N,3,H,W]
    grid = F.affine_grid(torch.from_numpy(theta).to(x.device), [n, 3, h, w], align_corners=False)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)

    def factor(row: int, spread: float) -> torch.Tensor:
        values = torch.from_numpy((1 + spread * (2 * draw[row] - 1)).astype(np.float32))
        return values.to(x.device)[:, None, None, None]  # [N,1,1,1]

    x = (x * factor(3, BRIGHTNESS)).clamp(0, 1)
    mean = _gray(x).mean((2, 3), keepdim=True)  # [N,1,1,1]
    x = (mean + (x - mean) * factor(4, CONTRAST)).clamp(0, 1)
    gray = _gray(x)  # [N,1,H,W]
    x = (gray + (x - gray) * factor(5, SATURATION)).clamp(0, 1)
    x = _turn_hue(x, torch.from_numpy((HUE * (2 * draw[6] - 1)).astype(np.float32)).to(x.device))
    return (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()  # [N,H,W,3]


def _gray(x: torch.Tensor) -> torch.Tensor:
    weight = torch.tensor(_GRAY, device=x.device)[:, None, None]  # [3,1,1]
    return (x * weight).sum(1, keepdim=True)  # [N,1,H,W]


def _turn_hue(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Rotate the hue of x [N,3,H,W] by `turns` [N] of a circle, keeping the largest and smallest channel."""
    high, _ = x.max(1)  # [N,H,W]
    low, _ = x.min(1)
    span = high - low
    safe = span.clamp(min=1e-8)
    r, g, b = x.unbind(1)
    sector = torch.where(high == r, (g - b) / safe % 6, torch.where(high == g, (b - r) / safe + 2, (r - g) / safe + 4))
    sector = sector + 6 * turns[:, None, None]  # [N,H,W]
    offsets = torch.tensor([5.0, 3.0, 1.0], device=x.device)[:, None, None]  # [3,1,1]
    k = (offsets + sector[:, None]) % 6  # [N,3,H,W]
    return high[:, None] - span[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)
