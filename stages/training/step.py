"""The parts of a training step: noise, loss, learning rate, predictions, and the check that all is finite."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from dataclasses import dataclass
from typing import cast

import torch

from ...batch import FeatureBatch
from ...common.hashing import mix
from ...drifting.guidance import batch_negatives, sample_alpha
from ...drifting.heads import generate, head_loss
from ...drifting.losses import PolicyLoss
from ...drifting.policy_net import PolicyNet
from ...drifting.queues import ChunkQueues
from ...errors import UserError
from .config import TrainConfig
from .context import Session
from .parallel.world import ALONE, World


def autocast(config: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Around every forward pass: bfloat16 where the settings say so."""
    return torch.autocast(device.type, torch.bfloat16) if config.precision == "bf16" else contextlib.nullcontext()


def noise_generator(seed: int, step: int, stream: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The noise of a step is a pure function of (seed, step): a resumed run draws what an uninterrupted one would."""
    return torch.Generator(device).manual_seed(int(mix(seed, 6, stream, step)) >> 1)


def batch_loss(
    net: torch.nn.Module,
    batch: FeatureBatch,
    config: TrainConfig,
    generator: torch.Generator,
    world: World = ALONE,
    queues: ChunkQueues | None = None,
) -> PolicyLoss:
    """One forward pass and its loss; the same for both stages. `net`: a PolicyNet, or what wraps one.

    Noise and guidance scales of the global batch come from `generator`, on its device; this process takes its part. The
    loss is scaled so that its mean over the processes is that of the global batch; unconditional negatives are local.
    """
    inner = cast(PolicyNet, getattr(net, "module", net))
    dit, device, b = inner.config.dit, batch.tokens.device, len(batch)
    shape = (world.size * b, config.draws, dit.horizon, dit.noise_dim)
    noise = world.slice(torch.randn(shape, generator=generator, device=generator.device)).to(device)  # [B,G,T,n]
    alpha, negatives, weights = torch.ones(b, device=device), None, None  # [B]
    seed = int(mix(generator.initial_seed(), 8, world.rank)) >> 1  # of what no other process needs to know
    mine = torch.Generator().manual_seed(seed)
    if config.alpha_max > 1:
        drawn = sample_alpha(world.size * b, high=config.alpha_max, device=generator.device, generator=generator)
        alpha = world.slice(drawn).to(device)  # [B]
        local = mine if device.type == "cpu" else torch.Generator(device).manual_seed(seed)
        negatives, weights = batch_negatives(batch, alpha, config.draws, config.negatives, local)  # [B,M,T,128], [B,M]
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


def unqueued(config: TrainConfig) -> TrainConfig:
    """The settings without queues of earlier chunks, for a look at the loss outside the loop, where none are filled."""
    return dataclasses.replace(config, loss=dataclasses.replace(config.loss, queue="none"))


def predict(session: Session, batch: FeatureBatch, noise: torch.Tensor) -> torch.Tensor:
    """Chunks [B,G,T,128] that the network predicts from `noise` [B,G,T,n] at α = 1."""
    net, config, alpha = session.net, session.config, torch.ones(len(batch), device=noise.device)
    with autocast(config, noise.device), torch.compiler.set_stance("force_eager"):  # other shapes: not worth compiling
        return generate(net, net.encode(batch), noise, alpha, config.loss)


@dataclass(frozen=True)
class StepDone:
    """What an optimizer step was."""

    loss: float  # mean over its batches and the processes
    norm: float  # of the gradient, before clipping
    rate: float  # learning rate of the DiT
    parts: PolicyLoss  # of this process's last batch
    nbytes: int  # of the features of that batch
    next_offset: int  # where the next step's samples begin


def learning_rate(step: int, config: TrainConfig) -> float:
    """Peak rate × linear warm-up × decay of the schedule, at `step` (0-based) of `config.steps`.

    A cosine's warm-up is shorter in a short run. The rates of the other schedules, before a decay, are the same in
    runs of any number of steps.
    """
    chosen, steps = config.optimizer, config.steps
    warmup = max(1, min(chosen.warmup, steps // 2) if chosen.schedule == "cosine" else chosen.warmup)
    rate = chosen.lr * min(1.0, (step + 1) / warmup)
    if chosen.schedule == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * step / steps))
    return rate * min(1.0, (steps - step) / max(1, round(chosen.decay * steps))) if chosen.schedule == "wsd" else rate


def on_host(*values: torch.Tensor) -> list[float]:
    """Single numbers, read at once: a GPU is waited for at every reading."""
    return torch.stack([x.detach().to(values[0].device, torch.float64) for x in values]).tolist()


def require_finite(
    session: Session, step: int, loss: float, norm: float, suspect: FeatureBatch | None, mine: float
) -> None:
    """`UserError` where the loss of the step after `step` others or its gradient's norm is not finite, naming the rows
    of the `suspect` batch in those processes where the loss `mine` is not finite. Every process must call it."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    assert suspect is not None  # a step has at least one batch
    names = [d.name for d in session.cache.datasets]
    rows = [f"{names[d]}:{row}" for d, row in zip(suspect.dataset.tolist(), suspect.frame_index.tolist())]
    read = (suspect.tokens, suspect.text, suspect.proprio, suspect.action)
    intact = torch.stack([x.flatten(1).isfinite().all(1) for x in read]).all(0)  # [B]
    found = [row for row, good in zip(rows, intact.tolist()) if not good]
    shown = ", ".join((found or rows)[:8]) + "…" * (len(found or rows) > 8) + " hold non-finite values" * bool(found)
    guilty = session.world.gather(None if math.isfinite(mine) else shown) or [shown]
    raise UserError(
        f"training stopped before optimizer step {step + 1}: the loss is {loss}, its gradient's norm {norm:g}. "
        f"Lower the learning rate, or run `dvla cache verify {session.config.cache}`. Rows: {'; '.join(guilty)}"
    )
