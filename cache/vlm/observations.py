"""Encoding observations (images of each view, and an instruction) with as few calls of the encoder as possible.

Letters: n observations of one call, V views, K tokens of one image, D feature width, H, W image size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...errors import UserError
from .augment import augment
from .encoder import VisionLanguageEncoder


def to_float16(features: torch.Tensor, what: str) -> np.ndarray:
    """Features [..., K, D] as float16 numpy. `UserError` naming the largest value when it does not fit."""
    return float16_later(features, what)()


def float16_later(features: torch.Tensor, what: str) -> Callable[[], np.ndarray]:
    """`to_float16` in two parts: from a GPU the copy is begun here, and only the call of what is returned waits for it,
    so that the GPU has more to do meanwhile."""
    found = [features.detach().half(), features.abs().max() if features.numel() else torch.zeros(())]
    copied = None
    if features.is_cuda:
        there = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in found]
        found = [host.copy_(x, non_blocking=True) for host, x in zip(there, found)]
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(features.device))

    def fetch() -> np.ndarray:
        if copied is not None:
            copied.synchronize()
        largest = found[1].item()
        if not np.isfinite(largest) or largest > float(np.finfo(np.float16).max):
            raise UserError(
                f"{what}: the encoder returned {largest:g}, which float16 cannot hold; check the weights and their "
                "dtype"
            )
        return found[0].numpy()

    return fetch


def require_finite(features: torch.Tensor, what: str) -> None:
    """`UserError` for features with a NaN or an infinity."""
    if not torch.isfinite(features).all():
        raise UserError(f"{what}: the encoder gave a value that is not finite; check the weights and their dtype")


@dataclass(frozen=True)
class EncoderCall:
    """What goes through the encoder at once: the same views of n observations, with one instruction."""

    views: tuple[np.ndarray, ...]  # images uint8 [n,H,W,3] of each view
    instruction: str  # "" where features do not depend on it
    members: tuple[tuple[int, int], ...]  # n times (number of the observation, number of the first of its views)


def encoder_calls(
    encoder: VisionLanguageEncoder,
    images: Sequence[Sequence[np.ndarray]],
    instructions: Sequence[str],
    most: int | None = None,
) -> list[EncoderCall]:
    """Group images uint8 [H,W,3] of each view of observations into calls of at most `most` images (None: no limit).

    Images of one size share a call, where features depend on the instruction those with the same. Where all views of an
    observation are encoded together, observations share one when their image sizes and their instruction are equal.
    """
    groups: dict[tuple[str, tuple[tuple[int, ...], ...]], list[tuple[int, int]]] = {}
    for i, (views, instruction) in enumerate(zip(images, instructions)):
        if encoder.by_observation:
            groups.setdefault((instruction, tuple(image.shape for image in views)), []).append((i, 0))
            continue
        read = "" if encoder.reads == "image" else instruction
        for v, image in enumerate(views):
            groups.setdefault((read, (image.shape,)), []).append((i, v))
    calls = []
    for (instruction, sizes), members in groups.items():
        step = len(members) if most is None else max(1, most // len(sizes))
        for at in range(0, len(members), step):
            part = members[at : at + step]
            stacked = tuple(np.stack([images[i][first + v] for i, first in part]) for v in range(len(sizes)))
            calls.append(EncoderCall(stacked, instruction, tuple(part)))
    return calls


def encode_observations(
    encoder: VisionLanguageEncoder,
    images: Sequence[Sequence[np.ndarray]],
    instructions: Sequence[str],
    keys: Sequence[Sequence[int]] | None = None,
) -> list[torch.Tensor]:
    """Images uint8 [H,W,3] of each view of each observation, and their instructions → features [V,K,D] of each.

    `keys`: the augmented variant of each image, 0 = the original. Builds a graph where the encoder learns.
    """
    found: list[list[torch.Tensor]] = [[torch.empty(0)] * len(views) for views in images]
    for call in encoder_calls(encoder, images, instructions):
        views = []
        for v, stacked in enumerate(call.views):
            chosen = [0 if keys is None else keys[i][first + v] for i, first in call.members]
            views.append(augmented(stacked, np.array(chosen, np.uint64), encoder.device))  # [n,H,W,3]
        for (i, first), features in zip(call.members, encoder.encode_observation(views, call.instruction)):
            found[i][first : first + len(views)] = features.unbind()  # [K,D] each
    return [torch.stack(views) for views in found]


def augmented(images: np.ndarray, keys: np.ndarray, device: torch.device) -> torch.Tensor:
    """uint8 [n,H,W,3] on the device, images with a key (uint64 [n], 0 = none) replaced by that augmented variant."""
    out = torch.from_numpy(images).to(device)
    if not keys.any():
        return out
    out = out.clone()  # on the CPU it shares memory with `images`
    out[keys > 0] = augment(out[keys > 0], keys[keys > 0])
    return out
