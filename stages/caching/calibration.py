"""Features of a few frames, encoded before the build: channel scales of 8-bit caches, the error of pooling."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from ...cache.readers.episode import CorruptEpisode
from ...cache.store.plan import BuildPlan
from ...cache.vlm.encoder import VisionLanguageEncoder
from ...errors import UserError
from .sources import Corpus

PILOT_IMAGES = 64  # for the channel scales of an 8-bit cache, about
POOLING_IMAGES = 8  # for the error of pooling


def pilot_observations(
    corpora: Sequence[Corpus], plan: BuildPlan, count: int
) -> Iterator[tuple[list[np.ndarray], str]]:
    """Observations with about `count` images, spread evenly over datasets and episodes; the same for the same plan.

    Yields (uint8 [H,W,3] of each view, the instruction).
    """
    each = max(1, count // sum(len(c.plan.views) for c in corpora))
    for corpus in corpora:
        episodes = corpus.plan.episodes
        picked = sorted({round(i * (len(episodes) - 1) / max(1, each - 1)) for i in range(each)})
        for i, number in enumerate(picked):
            entry = episodes[number]
            frames = entry.observed(plan.frame_stride)
            at = int(np.searchsorted(frames, i * entry.length // len(picked), "right")) - 1
            frame = int(frames[max(at, 0)])
            try:
                views = [next(view.frames(frame, frame + 1)) for view in corpus.source.load(entry.episode_id).views]
            except CorruptEpisode:
                continue  # the build reports it
            yield views, entry.instruction


def encode_singly(
    encoder: VisionLanguageEncoder, observations: Iterable[tuple[Sequence[np.ndarray], str]]
) -> torch.Tensor | None:
    """float32 [n,K,D] on the CPU: features of `observations`, one at a time since sizes may differ; None of none.

    `observations`: (uint8 [H,W,3] of each view, the instruction).
    """
    with torch.inference_mode():
        features = [
            encoder.encode_observation([image[None] for image in views], instruction)[0].float().cpu()  # [V,K,D]
            for views, instruction in observations
        ]
    return torch.cat(features) if features else None


def pilot_features(
    corpora: Sequence[Corpus], plan: BuildPlan, encoder: VisionLanguageEncoder, count: int = PILOT_IMAGES
) -> torch.Tensor:
    """float32 [n,K,D]: features of about `count` images."""
    features = encode_singly(encoder, pilot_observations(corpora, plan, count))
    if features is None:
        raise UserError("no image could be decoded to measure the storage error; run `dvla data check` on the sources")
    return features
