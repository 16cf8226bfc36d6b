"""Heads on one trunk, to be compared: drifting and regression act in one pass, flow matching and diffusion in many.

All share the DiT, its conditions, the masks and the weights of the entries; they differ in the target, in the noisy
input with its time (denoising heads) and in how many passes an action takes:

- `mse`: deterministic regression; in place of noise it reads the positions of the steps (equal tokens would stay equal:
  rotary positions alone cannot tell them apart). `pure_drift`, `hybrid`: see `losses.py`.
- `flow`: flow matching on the straight path (arXiv:2210.02747 with σ_min = 0; arXiv:2209.03003): x_t = (1−t)·noise +
  t·action, the network predicts the velocity action − noise, t uniform; actions by Euler's method from noise (t = 0) to
  action (t = 1).
- `diffusion`: x_k = √ᾱ_k·action + √(1−ᾱ_k)·noise on the squared-cosine schedule of arXiv:2102.09672 (eq. 17, β ≤ 0.999)
  with 100 levels, as in Diffusion Policy (arXiv:2303.04137). The network predicts the action itself, as in RDT-1B
  (arXiv:2410.07864): at the last level ᾱ is below 1e-6, where predicted noise would say nothing of the action and a
  5-step sampler takes a fifth of its steps. Actions by DDIM (arXiv:2010.02502 eq. 12, η = 0), deterministic given the
  noise; the levels of fewer steps are spaced from the last one (arXiv:2305.08891), where x is noise. Predicted actions
  are not clipped, as in RDT-1B.

Letters: B observations, G noise samples per observation, T action steps, n entries of the noise, K temperatures,
E embodiments.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..batch import FeatureBatch
from ..errors import UserError
from .config import DENOISING, DIFFUSION_STEPS, ONE_STEP, LossConfig
from .dit import Context, DiTConfig, rope
from .field import Reduce
from .losses import PolicyLoss, counting, masked_mean_square, policy_loss
from .policy_net import PolicyNet
from .queues import ChunkQueues


def flow_pair(action: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(x_t, velocity), both shaped like `noise`; `t` in [0, 1], shaped to broadcast."""
    return (1 - t) * noise + t * action, action - noise


def euler(velocity: Callable[[Tensor, float], Tensor], noise: Tensor, steps: int) -> Tensor:
    """Action at t = 1 from `noise` at t = 0 in `steps` equal steps of x += velocity(x, t)/steps."""
    x = noise
    for i in range(steps):
        x = x + velocity(x, i / steps) / steps
    return x


@functools.cache
def _signal_levels(count: int) -> tuple[float, ...]:
    def f(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    left, levels = 1.0, []
    for k in range(count):
        left *= 1 - min(1 - f((k + 1) / count) / f(k / count), 0.999)
        levels.append(left)
    return tuple(levels)


def signal_levels(count: int = DIFFUSION_STEPS) -> Tensor:
    """ᾱ [count] float64 of the squared-cosine schedule: the share of the signal's variance at each level, falling."""
    return torch.tensor(_signal_levels(count), dtype=torch.float64)


def diffusion_pair(action: Tensor, noise: Tensor, level: Tensor, count: int = DIFFUSION_STEPS) -> tuple[Tensor, Tensor]:
    """(x_k, the action), both shaped like `noise`; `level` k int64 in [0, count), shaped to broadcast."""
    share = signal_levels(count).to(noise.device)[level]  # float64: 1−ᾱ is small at low levels
    x = share.sqrt().to(noise.dtype) * action + (1 - share).sqrt().to(noise.dtype) * noise
    return x, action.expand_as(noise)


def ddim(predict: Callable[[Tensor, int], Tensor], noise: Tensor, steps: int, count: int = DIFFUSION_STEPS) -> Tensor:
    """Action from `noise`: predict(x, level) gives the expected action; `steps` of `count` levels, the last first."""
    levels = [round(count * (steps - i) / steps) - 1 for i in range(steps)]
    share, x = _signal_levels(count), noise
    for level, following in zip(levels, [*levels[1:], None]):
        action = predict(x, level)
        now, then = share[level], 1.0 if following is None else share[following]
        # √ᾱ'·action + √(1−ᾱ')·predicted noise, the latter being (x − √ᾱ·action)/√(1−ᾱ)
        ratio = math.sqrt((1 - then) / (1 - now))
        x = ratio * x + (math.sqrt(then) - ratio * math.sqrt(now)) * action
    return x


def head_dit(config: DiTConfig, kind: str) -> DiTConfig:
    """The trunk's config for a head: a denoising one reads actions in the place of noise, and their time."""
    if kind not in DENOISING:
        return config
    return dataclasses.replace(config, noise_dim=config.action_dim, denoising=True)


def sample_steps(config: LossConfig) -> int:
    """Forward passes of one action."""
    return config.sample_steps or {"flow": 10, "diffusion": DIFFUSION_STEPS}.get(config.kind, 1)


def head_loss(
    net: Callable[..., Tensor],
    batch: FeatureBatch,
    config: LossConfig,
    *,
    noise: Tensor,
    alpha: Tensor,
    generator: torch.Generator | None = None,
    negatives: Tensor | None = None,
    w_neg: Tensor | None = None,
    queues: ChunkQueues | None = None,
    reduce: Reduce | None = None,
) -> PolicyLoss:
    """The forward pass of a `PolicyNet`, or of what wraps one, and the loss of any kind.

    `noise` [B,G,T,n] standard normal, guidance scales `alpha` [B].

    One-step kinds: `policy_loss` of the chunks generated; arguments as there. `queues` add positives and negatives, and
    then take this batch's chunks. `mse` makes one sample and reads no noise.

    Denoising kinds: masked mean square of the prediction's error, at a time of its own for each sample, drawn from
    `generator` (CPU; None: the global one); entries that do not count are zero in the input and absent from the loss.
    Drift and scales are 0, so that a log line keeps its shape. Samples are not compared, so negatives and queues are
    refused (ValueError).

    `UserError` where `config` asks for queues or neighbors and none are given: a setting never goes without effect.
    """
    for name, missing in (("queue", config.queue != "none" and queues is None), ("neighbours", config.neighbours > 0)):
        if missing:
            raise UserError(f"loss.{name} is {getattr(config, name)}, but this training fills none; leave it out")
    if config.kind in DENOISING:
        if negatives is not None or queues is not None:
            raise ValueError(f"a {config.kind} head takes neither negatives nor queues")
        return _denoising_loss(net, batch, config, noise, alpha, generator, reduce)
    positives, w_pos = None, None
    noise = _positions(noise) if config.kind == "mse" else noise  # [B,G,T,n]
    if queues is not None:
        positives, more, w_pos = queues.draw(batch)
        negatives, w_neg = (more, w_pos) if negatives is None else _joined(negatives, w_neg, more, w_pos)
    pred = net(batch, noise, alpha)  # [B,G,T,128]
    if queues is not None:
        queues.push(batch, pred)
    return policy_loss(
        pred, batch, config, positives=positives, w_pos=w_pos, negatives=negatives, w_neg=w_neg, reduce=reduce
    )


def _denoising_loss(
    net: Callable[..., Tensor],
    batch: FeatureBatch,
    config: LossConfig,
    noise: Tensor,
    alpha: Tensor,
    generator: torch.Generator | None,
    reduce: Reduce | None,
) -> PolicyLoss:
    b, g = noise.shape[:2]
    action, active = batch.action[:, None], counting(batch)  # [B,1,T,128], [B,T,128]
    if config.kind == "flow":
        time = torch.rand(b, g, generator=generator).to(noise.device)  # [B,G]
        x, target = flow_pair(action, noise, time[..., None, None])  # [B,G,T,128] each
    else:
        level = torch.randint(DIFFUSION_STEPS, (b, g), generator=generator).to(noise.device)  # [B,G]
        x, target = diffusion_pair(action, noise, level[..., None, None])  # [B,G,T,128] each
        time = (level + 1) / DIFFUSION_STEPS  # [B,G]
    pred = net(batch, x.masked_fill(~active[:, None], 0.0), alpha, time)  # [B,G,T,128]
    with torch.autocast(noise.device.type, enabled=False):
        mse = masked_mean_square(pred.float() - target.float(), active, reduce)  # []
    none, of = mse.new_zeros(()), (len(config.temperatures), config.embodiments)
    return PolicyLoss(mse, mse.detach(), none, mse.new_zeros(of[0]), none, mse.new_zeros(of), mse.new_zeros(of[1]))


def generate(
    net: PolicyNet, context: Context, noise: Tensor, alpha: Tensor, config: LossConfig, *, steps: int | None = None
) -> Tensor:
    """Normalized chunks [B,G,T,128] from `noise` [B,G,T,n], deterministic; inactive slots are arbitrary.

    `steps` replaces the kind's number of passes (denoising kinds), which share the context's keys and values."""
    steps = sample_steps(dataclasses.replace(config, sample_steps=steps or config.sample_steps))
    if config.kind == "mse":
        return net.decode(context, _positions(noise), alpha).expand(-1, noise.shape[1], -1, -1)
    if config.kind in ONE_STEP:
        return net.decode(context, noise, alpha)
    hidden = ~context.action_mask[:, None, None]  # [B,1,1,128]
    kept: list[list[Tensor]] = [[] for _ in net.dit.blocks]

    def predict(x: Tensor, time: float) -> Tensor:  # [B,G,T,128] → [B,G,T,128]
        each = torch.full(x.shape[:2], time, dtype=torch.float32, device=x.device)  # [B,G]
        return net.decode(context, x.masked_fill(hidden, 0.0), alpha, each, kept)

    if config.kind == "flow":
        return euler(predict, noise, steps)
    return ddim(lambda x, level: predict(x, (level + 1) / DIFFUSION_STEPS), noise, steps)


def _joined(chunks: Tensor, weight: Tensor | None, more: Tensor, more_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Chunks [B,n,T,128] and their weights [B,n] (None: 1), and then some more."""
    weight = more_weight.new_ones(chunks.shape[:2]) if weight is None else weight
    return torch.cat([chunks, more.to(chunks)], dim=1), torch.cat([weight, more_weight], dim=1)


def _positions(noise: Tensor) -> Tensor:
    """Sinusoidal positions of the steps [B,1,T,n], of mean square 1 like the `noise` [B,G,T,n] they replace."""
    b, _, t, n = noise.shape
    features = torch.cat(rope(t, n, noise.device), dim=-1) * math.sqrt(2)  # [T,n]
    return features.to(noise.dtype).expand(b, 1, t, n)
