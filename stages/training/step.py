"""One optimizer step's loss: pure functions of batch, network and seed."""

from __future__ import annotations

import contextlib
import math
from typing import cast

import torch

from ...batch import FeatureBatch
from ...common.hashing import mix
from ...drifting.guidance import batch_negatives, sample_alpha
from ...drifting.heads import head_loss
from ...drifting.losses import PolicyLoss
from ...drifting.policy_net import PolicyNet
from ...drifting.queues import ChunkQueues
from .config import TrainConfig
from .parallel.world import ALONE, World


def autocast(config: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Around every forward pass: bfloat16 where the settings say so."""
    return torch.autocast(device.type, torch.bfloat16) if config.precision == "bf16" else contextlib.nullcontext()


def noise_generator(seed: int, step: int, stream: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The noise of a step is a pure function of (seed, step), so a resumed run draws what an uninterrupted one would."""
    return torch.Generator(device).manual_seed(int(mix(seed, 6, stream, step)) >> 1)


def training_step(
    net: torch.nn.Module,
    batch: FeatureBatch,
    config: TrainConfig,
    generator: torch.Generator,
    world: World = ALONE,
    queues: ChunkQueues | None = None,
) -> PolicyLoss:
    """One forward pass and its loss; the same for both stages. `net`: a PolicyNet, or what wraps one.

    Noise and guidance scales of the global batch come from `generator`, on its device, and this process takes its part. The loss is
    scaled so that its mean over the processes is that of the global batch; unconditional negatives are this process's own.
    """
    inner = cast(PolicyNet, getattr(net, "module", net))
    dit, device, b = inner.config.dit, batch.tokens.device, len(batch)
    shape = (world.size * b, config.draws, dit.horizon, dit.noise_dim)
    noise = world.slice(torch.randn(shape, generator=generator, device=generator.device)).to(device)  # [B,G,T,n]
    alpha, negatives, weights = torch.ones(b, device=device), None, None  # [B]
    mine = torch.Generator().manual_seed(
        int(mix(generator.initial_seed(), 8, world.rank)) >> 1
    )  # the rest needs no other's
    if config.alpha_max > 1:
        drawn = sample_alpha(world.size * b, high=config.alpha_max, device=generator.device, generator=generator)
        alpha = world.slice(drawn).to(device)  # [B]
        on_device = mine if device.type == "cpu" else torch.Generator(device).manual_seed(mine.initial_seed())
        negatives, weights = batch_negatives(
            batch, alpha, config.draws, config.negatives, on_device
        )  # [B,M,T,128], [B,M]
    with autocast(config, device):
        return head_loss(
            net,
            batch,
            config.loss,
            noise=noise,
            alpha=alpha,
            generator=mine,
            negatives=negatives,
            w_neg=weights,
            queues=queues,
            reduce=world.total if world.size > 1 else None,
        )


def learning_rate(step: int, config: TrainConfig) -> float:
    """Peak rate × linear warm-up × cosine decay, at `step` (0-based) of `config.steps`."""
    warmup = max(1, min(config.optimizer.warmup, config.steps // 2))
    return config.optimizer.lr * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / config.steps))
