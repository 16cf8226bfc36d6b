"""Self-supervised training of the toy checkpoint's vision tower on recorded frames, so that its features carry something.

A real checkpoint needs none of this; a toy one made offline starts from random weights. Method: masked reconstruction in
the manner of SimMIM (Xie et al. 2022, arXiv:2111.09886): a share of the patches is replaced by a learned token, and each
merged token must tell the pixels of the patches behind it. What never changes between pictures (table, wall) would drown
the small things a policy needs (puck, button), so the target is the difference from the camera's mean picture and the
error is weighted by its size. No label, no action and no state is used.

Letters: N pictures, S patches, F values of one patch, C vision width, K merged tokens, D feature width, m merge side.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..cache.encoder import EncoderSpec, VisionLanguageEncoder, load_encoder
from ..cache.preprocess import preprocess
from ..cache.tiny_vlm import TinySpec, make_tiny_qwen3vl, write_vision_weights
from ..cache.vision_tower import embed_patches, run_blocks
from ..errors import UserError
from .build import open_sources

METHOD = "masked reconstruction"
FLOOR = 0.02        # weight of a patch that equals the mean picture; the others weigh their mean absolute difference


@dataclass(frozen=True)
class PretrainConfig:
    """How long, on what."""

    sources: tuple[str, ...]        # dataset folders
    steps: int = 300                # optimiser steps
    batch_size: int = 48            # pictures per step
    resolution: int = 128           # side of the pictures, pixels
    masked: float = 0.4             # share of masked patches
    lr: float = 1e-3                # peak learning rate, cosine to zero
    pictures: int = 4000            # at most so many frames, spread evenly over the episodes
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or not 0 <= self.masked < 1:
            raise UserError(f"pretraining steps {self.steps}, batch size {self.batch_size} must be at least 1, masked {self.masked} in [0, 1)")


@dataclass(frozen=True)
class PretrainReport:
    """What was done."""

    steps: int
    pictures: int
    seconds: float
    first_loss: float       # mean of the first 20 steps
    last_loss: float        # mean of the last 20 steps
    method: str = METHOD


def make_pretrained(out: Path, spec: TinySpec, config: PretrainConfig,
                    progress: Callable[[str, int, int], None] = lambda *_: None) -> PretrainReport:
    """Make a toy checkpoint at `out` and train its vision tower; `out` appears only when both are done."""
    partial = out.with_name(f".{out.name}.untrained")
    shutil.rmtree(partial, ignore_errors=True)
    pictures = load_pictures(config, progress)
    make_tiny_qwen3vl(partial, spec)
    try:
        encoder = load_encoder(EncoderSpec(str(partial), resolution=config.resolution), dtype=torch.float32)
        report = pretrain_vision(encoder, pictures, config, progress)
        write_vision_weights(partial, encoder.vision)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def load_pictures(config: PretrainConfig, progress: Callable[[str, int, int], None]) -> dict[str, np.ndarray]:
    """uint8 [N,H,W,3] per camera ("source/view"), every k-th frame of the episodes."""
    streams = [(source, number, view) for source in open_sources(config.sources) for number in source.episode_ids
               for view in range(len(source.view_names))]
    total = sum(source.length_of(number) for source, number, _ in streams)
    stride = max(1, -(-total // config.pictures))
    out: dict[str, list[np.ndarray]] = {}
    for i, (source, number, view) in enumerate(streams):
        stream = source.load(number).views[view]
        kept = out.setdefault(f"{source.name}/{stream.name}", [])
        kept += [frame for t, frame in enumerate(stream.frames()) if (t + number) % stride == 0]
        progress("reading frames", i + 1, len(streams))
    return {name: np.stack(frames) for name, frames in out.items()}


def pretrain_vision(encoder: VisionLanguageEncoder, pictures: dict[str, np.ndarray], config: PretrainConfig,
                    progress: Callable[[str, int, int], None] = lambda *_: None) -> PretrainReport:
    """Train `encoder.vision` in place; frozen again afterwards."""
    began, generator = time.perf_counter(), torch.Generator().manual_seed(config.seed)
    patches = torch.cat([preprocess(p, encoder.image) for p in pictures.values()]).half()           # [N,S,F]
    camera = torch.cat([torch.full((len(p),), i) for i, p in enumerate(pictures.values())])         # [N]
    mean = torch.stack([patches[camera == i].float().mean(0) for i in range(len(pictures))])        # [cameras,S,F]
    vision, side = encoder.vision, encoder.image.merge_size ** 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        decoder = nn.Linear(encoder.width, side * patches.shape[-1])
        token = nn.Parameter(torch.zeros(vision.config.hidden_size))
    vision.requires_grad_(True)
    trained = [*vision.parameters(), *decoder.parameters(), token]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, config.steps, pct_start=0.1)
    losses = []
    for step in range(config.steps):
        index = torch.randint(len(patches), (config.batch_size,), generator=generator)              # [B]
        x = patches[index].float()                                                                  # [B,S,F]
        hidden = embed_patches(vision, x, encoder.tables)                                           # [B,S,C]
        hide = torch.rand(hidden.shape[:2], generator=generator) < config.masked                    # [B,S]
        hidden = torch.where(hide[..., None], token, hidden)                                        # [B,S,C]
        hidden = run_blocks(vision, hidden, encoder.tables)                                         # [B,S,C]
        features = vision.merger(hidden.flatten(0, 1))                                              # [B·K,D]
        guess = decoder(F.layer_norm(features, features.shape[-1:])).reshape(x.shape)               # [B,S,F]: patches of a token are neighbours
        target = x - mean[camera[index]]                                                            # [B,S,F]
        weight = target.abs().mean(-1, keepdim=True) + FLOOR                                        # [B,S,1]
        loss = (weight * (guess - target).square()).mean() / weight.mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        progress("training the vision tower", step + 1, config.steps)
    vision.requires_grad_(False)
    return PretrainReport(config.steps, len(patches), time.perf_counter() - began, float(np.mean(losses[:20])), float(np.mean(losses[-20:])))
