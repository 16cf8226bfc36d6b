"""Losses of the generator: the drifting loss, and the policy's masked, per-embodiment mixture of it with regression.

Letters: B observations, G noise samples per observation, T action steps, P positives, M extra negatives, D entries,
K temperatures, E embodiments, C conditions of the drift (B complete chunks, or B·T steps).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import UNIFIED_DIM, FeatureBatch
from .config import AFFINITY_FLOOR, TEMPERATURES, LossConfig
from .field import MIN_SCALE, DriftField, GroupedField, Reduce, drifting_field, grouped_drifting_field


@dataclass(frozen=True)
class DriftLoss:
    """`per_condition` [B] carries the gradient; its value hovers around mean(force²); convergence is
    `field.mean_square`."""

    per_condition: Tensor
    field: DriftField


def drifting_loss(
    gen: Tensor,
    pos: Tensor,
    neg: Tensor | None = None,
    *,
    w_gen: Tensor | None = None,
    w_pos: Tensor | None = None,
    w_neg: Tensor | None = None,
    temperatures: Sequence[float] = TEMPERATURES,
    floor: float | None = AFFINITY_FLOOR,
    reduce: Reduce | None = None,
) -> DriftLoss:
    """mean over [G,D] of (gen/s − sg(gen/s + force))², s = max(scale/sqrt(D), 1e-3); arguments as in `drifting_field`.

    Minus its gradient at `gen` points along the force. Positives and negatives get no gradient.
    """
    field = drifting_field(
        gen, pos, neg, w_gen=w_gen, w_pos=w_pos, w_neg=w_neg, temperatures=temperatures, floor=floor, reduce=reduce
    )
    unit = (field.scale / math.sqrt(gen.shape[-1])).clamp(min=MIN_SCALE)  # []
    return DriftLoss(_towards(gen, field.force, unit).square().mean((1, 2)), field)


def _towards(gen: Tensor, force: Tensor, unit: Tensor) -> Tensor:
    """gen/unit − sg(gen/unit + force), in force's dtype, without the rounding of the large common part."""
    with torch.autocast(gen.device.type, enabled=False):
        gen = gen.to(force.dtype)
        return (gen - gen.detach()) / unit - force


@dataclass(frozen=True)
class PolicyLoss:
    """`total` [] has the gradient. `mse` [] and `drift` [] are its parts, both reported (detached) for every kind.

    `mean_square` [K] and `scale` [] pool the embodiments by number of conditions; `mean_square_of` [K,E] and
    `scale_of` [E] are per embodiment, 0 where the batch has none. log(mean_square) is the convergence metric.
    """

    total: Tensor
    mse: Tensor
    drift: Tensor
    mean_square: Tensor
    scale: Tensor
    mean_square_of: Tensor
    scale_of: Tensor


def counting(batch: FeatureBatch) -> Tensor:
    """[B,T,128] bool: the entries of the action that count: an active slot at a step before the episode's end."""
    return batch.step_mask[:, :, None] & batch.action_mask[:, None, :]


def per_rank(count: Tensor, reduce: Reduce | None) -> Tensor:
    """`count` [], or its mean over the ranks: sums divided by it average over the ranks to the mean over all."""
    if reduce is None:
        return count
    total, ranks = reduce(torch.stack([count.double(), torch.ones_like(count, dtype=torch.float64)]))
    return (total / ranks).float()


def masked_mean_square(error: Tensor, active: Tensor, reduce: Reduce | None = None) -> Tensor:
    """Mean [] of error² [B,G,T,128] over the entries `active` [B,T,128], 0 where there are none."""
    error = error.masked_fill(~active[:, None], 0.0)  # [B,G,T,128]
    return error.square().sum() / (error.shape[1] * per_rank(active.sum(), reduce)).clamp(min=1)


def policy_loss(
    pred: Tensor,
    batch: FeatureBatch,
    config: LossConfig = LossConfig(),  # noqa: B008  # frozen
    *,
    positives: Tensor | None = None,
    w_pos: Tensor | None = None,
    negatives: Tensor | None = None,
    w_neg: Tensor | None = None,
    reduce: Reduce | None = None,
) -> PolicyLoss:
    """Loss of the G chunks `pred` [B,G,T,128] of each observation of `batch`; never compares two observations.

    An entry counts where its slot is active and its step lies before the episode's end. Other entries get no gradient
    and are zeroed in generated and expert chunks, so they add nothing to a distance; D is the number that do count.

    MSE: mean of (pred − action)² over the counting entries of all samples. Drift: the chunks of an observation against
    its own expert chunk (weight 1), and against further chunks of the same action space: `positives` [B,P,T,128] with
    weights `w_pos` [B,P], `negatives` [B,M,T,128] with `w_neg` [B,M], normalized, and complete wherever the
    observation's own chunk is. Weights not given are 1; a chunk of weight 0 is ignored. Distance scale and mean(F²) are
    per embodiment; `distance="step"` makes each (observation, step) a condition of its own.

    `reduce`: see `drifting_field`; it makes scale and mean(F²) those of all ranks, and mse, drift and total such that
    their means over the ranks are those over all."""
    (b, _, t, d), action = pred.shape, tuple(batch.action.shape)
    if d != UNIFIED_DIM or action != (b, t, d):
        raise ValueError(f"pred: expected [B,G,T,{UNIFIED_DIM}] for action {action}, got {tuple(pred.shape)}")
    pred = pred if pred.dtype == torch.float64 else pred.float()  # [B,G,T,128]
    active, per_step = counting(batch), config.distance == "step"  # [B,T,128]
    with torch.autocast(pred.device.type, enabled=False):
        mse = masked_mean_square(pred - batch.action[:, None], active, reduce)  # []

    def conditions(chunks: Tensor) -> Tensor:  # [B,n,T,128] → [C,n,D], D = T·128 or 128
        return chunks.transpose(1, 2).flatten(0, 1) if per_step else chunks.flatten(2)

    def each(values: Tensor) -> Tensor:  # per observation → per condition
        return values.repeat_interleave(t, 0) if per_step else values

    pos = batch.action[:, None] if positives is None else torch.cat([batch.action[:, None], positives], dim=1)
    w_pos = None if positives is None or w_pos is None else F.pad(w_pos, (1, 0), value=1.0)  # [B,1+P]
    gen = conditions(pred)  # [C,G,D]
    mask, group = conditions(active[:, None])[:, 0], each(batch.embodiment)  # [C,D], [C]
    field = grouped_drifting_field(
        gen,
        conditions(pos),
        None if negatives is None else conditions(negatives),
        active=mask,
        group=group,
        groups=config.embodiments,
        w_pos=None if w_pos is None else each(w_pos),
        w_neg=None if w_neg is None else each(w_neg),
        temperatures=config.temperatures,
        floor=config.floor,
        zero_is_absent=True,
        reduce=reduce,
    )
    return _combined(mse, gen, mask, group, field, config, reduce)


def _combined(
    mse: Tensor,
    gen: Tensor,
    mask: Tensor,
    group: Tensor,
    field: GroupedField,
    config: LossConfig,
    reduce: Reduce | None,
) -> PolicyLoss:
    """The loss of chunks `gen` [C,G,D] with counting entries `mask` [C,D], embodiments `group` [C] and their field."""
    live = (field.entries > 0).to(gen.dtype)  # [C]
    diff = _towards(gen.masked_fill(~mask[:, None], 0.0), field.force, field.unit[:, None, None])  # [C,G,D]
    per_condition = diff.square().sum((1, 2)) / (gen.shape[1] * field.entries).clamp(min=1)  # [C]
    drift = (per_condition * live).sum() / per_rank(live.sum(), reduce).clamp(min=1)  # []
    kinds = {"mse": mse, "pure_drift": drift, "hybrid": mse + config.drift_weight * drift}
    if config.kind not in kinds:
        raise ValueError(f"LossConfig.kind: expected one of {', '.join(kinds)}, got {config.kind!r}")
    share = live / live.sum().clamp(min=1)  # [C]
    return PolicyLoss(
        kinds[config.kind],
        mse.detach(),
        drift.detach(),
        (field.mean_square[:, group] * share).sum(1),
        (field.scale[group] * share).sum(),
        field.mean_square,
        field.scale,
    )
