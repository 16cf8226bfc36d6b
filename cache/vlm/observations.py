"""Turning observations (pictures of each view, and an instruction) into features: calls of the encoder, and a reader of single frames.

Letters: n observations of one call, V views, K tokens of one picture, D feature width, B samples, H, W picture size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...errors import UserError
from .augment import augment
from .encoder import VisionLanguageEncoder


def to_float16(features: torch.Tensor, what: str) -> np.ndarray:
    """Features [..., K, D] as float16 numpy, rounded once. `UserError` when a value does not fit, naming the largest."""
    largest = features.abs().max().item() if features.numel() else 0.0
    if not np.isfinite(largest) or largest > float(np.finfo(np.float16).max):
        raise UserError(
            f"{what}: the encoder gave {largest:g}, which float16 cannot hold; check the weights and their dtype"
        )
    return features.detach().to("cpu", torch.float16).numpy()


@dataclass(frozen=True)
class EncoderCall:
    """What goes through the encoder at once: the same views of n observations, with one instruction."""

    views: tuple[np.ndarray, ...]  # pictures uint8 [n,H,W,3] of each view
    instruction: str  # "" where features do not depend on it
    members: tuple[tuple[int, int], ...]  # n times (number of the observation, number of the first of its views)


def encoder_calls(
    encoder: VisionLanguageEncoder,
    pictures: Sequence[Sequence[np.ndarray]],
    instructions: Sequence[str],
    most: int | None = None,
) -> list[EncoderCall]:
    """Pictures uint8 [H,W,3] of each view of observations, and their instructions → as few calls as hold them all, of at most `most`
    pictures (None: any number). Pictures of one size share a call; where an observation is encoded as a whole, observations do whose
    pictures have the same sizes and whose instruction is the same."""
    groups: dict[tuple[str, tuple[tuple[int, ...], ...]], list[tuple[int, int]]] = {}
    for i, (views, instruction) in enumerate(zip(pictures, instructions)):
        if encoder.by_observation:
            groups.setdefault((instruction, tuple(p.shape for p in views)), []).append((i, 0))
            continue
        for v, picture in enumerate(views):
            groups.setdefault(("", (picture.shape,)), []).append((i, v))
    calls = []
    for (instruction, sizes), members in groups.items():
        step = len(members) if most is None else max(1, most // len(sizes))
        for at in range(0, len(members), step):
            part = members[at : at + step]
            views = tuple(np.stack([pictures[i][first + v] for i, first in part]) for v in range(len(sizes)))
            calls.append(EncoderCall(views, instruction, tuple(part)))
    return calls


def encode_observations(
    encoder: VisionLanguageEncoder,
    pictures: Sequence[Sequence[np.ndarray]],
    instructions: Sequence[str],
    keys: Sequence[Sequence[int]] | None = None,
) -> list[torch.Tensor]:
    """Pictures uint8 [H,W,3] of each view of each observation, and their instructions → features [V,K,D] of each, with a graph where the
    encoder learns. `keys`: of each picture's augmented variant, 0 = as it is."""
    found: list[list[torch.Tensor]] = [[torch.empty(0)] * len(views) for views in pictures]
    for call in encoder_calls(encoder, pictures, instructions):
        views = []
        for v, images in enumerate(call.views):
            chosen = [0 if keys is None else keys[i][first + v] for i, first in call.members]
            views.append(augmented(images, np.array(chosen, np.uint64), encoder.device))  # [n,H,W,3]
        for (i, first), features in zip(call.members, encoder.encode_observation(views, call.instruction)):
            found[i][first : first + len(views)] = features.unbind()  # [K,D] each
    return [torch.stack(views) for views in found]


def augmented(images: np.ndarray, keys: np.ndarray, device: torch.device) -> torch.Tensor:
    """uint8 [n,H,W,3] on the device; pictures with a key (uint64 [n], 0 = none) in the augmented variant that it stands for."""
    pictures = torch.from_numpy(images).to(device)
    if not keys.any():
        return pictures
    pictures = pictures.clone()  # on the CPU it shares memory with `images`
    pictures[keys > 0] = augment(pictures[keys > 0], keys[keys > 0])
    return pictures
