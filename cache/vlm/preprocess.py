"""Frames to the patch rows of a Qwen-VL vision tower, in plain torch on the encoder's device without a per-image loop.

Letters: N images, H and W their native size, R the square input resolution, P patch side, T temporal patch size (a
still image is repeated T times), M merge side, S = (R/P)^2 patches of one image, F = 3*T*P*P values of one patch.

The image is centered on a black square (an odd row or column goes to the bottom or right), resized to R by antialiased
bicubic interpolation back to uint8, cut into patches and then normalized (cutting bytes moves a quarter of the data).
For a square image this is what transformers' `Qwen2VLImageProcessorFast` computes, bit by bit on the CPU: the same
uint8 interpolation kernel and the same fused (x - 255 mean) / (255 std). On CUDA, which has no uint8 kernel, float32
interpolation is rounded to uint8 as torchvision does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ...errors import UserError

PADDING_RULE = "square-black-centred"


@dataclass(frozen=True)
class ImageSpec:
    """What the vision tower expects of one image. `UserError` when the resolution does not fit the patch grid."""

    resolution: int  # R, pixels
    patch_size: int  # P, pixels
    merge_size: int  # M, patches per merged token and side
    temporal_patch_size: int  # T, frames per patch
    mean: tuple[float, ...]  # of the three channels, of values in [0, 1]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        unit = self.patch_size * self.merge_size
        if self.resolution < unit or self.resolution % unit:
            near = max(round(self.resolution / unit), 1) * unit
            raise UserError(
                f"resolution {self.resolution} does not fit this model: it must be a multiple of {unit} "
                f"(patch {self.patch_size} x merge {self.merge_size}); use {near}"
            )

    @property
    def grid(self) -> int:
        """Patches per side, R/P."""
        return self.resolution // self.patch_size

    @property
    def tokens(self) -> int:
        """Merged tokens of one image, (R/P/M)^2."""
        return (self.grid // self.merge_size) ** 2


def pad_to_square(images: torch.Tensor) -> torch.Tensor:
    """[N,H,W,3] -> [N,Q,Q,3] with Q = max(H, W); black around the centered image; the input itself when square."""
    _, h, w, _ = images.shape
    side = max(h, w)
    top, left = (side - h) // 2, (side - w) // 2
    if h == w:
        return images
    return F.pad(images, (0, 0, left, side - w - left, top, side - h - top))


def resize(images: torch.Tensor, resolution: int) -> torch.Tensor:
    """uint8 [N,3,Q,Q] -> uint8 [N,3,R,R], bicubic with antialiasing."""
    if images.shape[-1] == resolution:
        return images
    size = (resolution, resolution)
    if images.device.type == "cpu":
        return F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)
    real = F.interpolate(images.float(), size=size, mode="bicubic", antialias=True, align_corners=False)
    return real.clamp_(0, 255).round_().to(torch.uint8)


def patchify(images: torch.Tensor, spec: ImageSpec) -> torch.Tensor:
    """uint8 [N,3,R,R] -> uint8 [N,S,F]: patches in merge order (M x M neighbors adjacent).

    The values of one patch are in (channel, time, row, column) order.
    """
    n, p, m, t, g = images.shape[0], spec.patch_size, spec.merge_size, spec.temporal_patch_size, spec.grid
    x = images.reshape(n, 3, g // m, m, p, g // m, m, p)  # [N,3, rows,M,P, columns,M,P]
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)  # [N, rows,columns, M,M, 3, P,P]
    x = x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, t, -1, -1)  # [N, rows,columns, M,M, 3,T,P,P]
    return x.reshape(n, g * g, 3 * t * p * p)  # [N,S,F]


def preprocess(images: torch.Tensor | np.ndarray, spec: ImageSpec, device: torch.device | str = "cpu") -> torch.Tensor:
    """uint8 RGB [N,H,W,3] -> float32 patch rows [N,S,F] on `device`. `ValueError` for another shape or dtype."""
    x = torch.from_numpy(np.require(images, requirements=("C", "W"))) if isinstance(images, np.ndarray) else images
    if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[-1] != 3:
        raise ValueError(f"expected uint8 images [N,H,W,3], got {x.dtype} {tuple(x.shape)}")
    x = pad_to_square(x.to(device))  # [N,Q,Q,3] uint8
    x = resize(x.permute(0, 3, 1, 2), spec.resolution)  # [N,3,R,R] uint8
    x = patchify(x, spec)  # [N,S,F] uint8
    mean = torch.tensor(spec.mean, device=x.device)[:, None] * 255.0  # [3,1]
    std = torch.tensor(spec.std, device=x.device)[:, None] * 255.0  # [3,1]
    rows = x.float().unflatten(-1, (3, -1))  # [N,S,3,T*P*P]
    return rows.sub_(mean).div_(std).flatten(-2)  # [N,S,F]
