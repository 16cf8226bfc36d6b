"""The drifting field: where each generated sample should move so that the generated set becomes the expert set.

Source: "Generative Modeling via Drifting" (arXiv:2602.04770) and its released `drift_loss.py`
(lambertae/drifting @accd0cf).

Letters: B conditions (observations; samples of different conditions are never compared), G generated samples,
P positives, M extra negatives, N = G+M+P (M+P in Algorithm 2), D entries of a sample, K temperatures,
E groups that share one scale.
Memory is O(B·(K·G·N + N·D + K·G·D)); pairwise differences [G, N, D] are never built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import AFFINITY_FLOOR, TEMPERATURES

MIN_DISTANCE = 1e-4  # sqrt(1e-8), the release's floor under a squared distance
MIN_SCALE = 1e-3  # floor of the distance scale: a collapsed set must not be divided by zero
MIN_MEAN_SQUARE = 1e-8  # floor under mean(F²) before the RMS normalization
SELF_DISTANCE = 100.0  # added to the scaled distance of a sample to itself: it does not repel itself

Reduce = Callable[[Tensor], Tensor]
"""Given this rank's partial sums, returns their total over all ranks in the same shape (an all-reduce)."""


@dataclass(frozen=True)
class DriftField:
    """`force` [B,G,D]: sum over temperatures of the RMS-normalized fields, in units of max(scale/sqrt(D), 1e-3).

    `scale` [] is the weighted mean distance of the call; `mean_square` [K] is mean(F²) before normalization: it falls
    towards zero as the generated set approaches the expert set, which the loss does not. No gradient flows through any.
    """

    force: Tensor
    scale: Tensor
    mean_square: Tensor


@dataclass(frozen=True)
class GroupedField:
    """Like `DriftField` for conditions with different active entries, one scale per group.

    `force` [B,G,D] in coordinates divided by `unit` [B], zero on inactive entries; `scale` [E] weighted mean of
    distance/sqrt(active entries) and `mean_square` [K,E], both 0 for a group absent from the call; `entries` [B] number
    of active entries.
    """

    force: Tensor
    unit: Tensor
    scale: Tensor
    mean_square: Tensor
    entries: Tensor


def drifting_field(
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
) -> DriftField:
    """The field at `gen` [B,G,D] given positives `pos` [B,P,D] and optional extra negatives `neg` [B,M,D].

    The generated samples are always negatives of each other. Weights w_gen [B,G], w_pos [B,P], w_neg [B,M] are 1 if
    not given.
    Everything is computed in float32 (float64 for float64 inputs), also inside autocast, whatever the TF32 setting.

    `floor=None` is the paper's Algorithm 2, literally: raw coordinates and temperatures, no clamps, no normalization
    (`scale` is sqrt(D), so that the coordinate unit scale/sqrt(D) is 1), and the negatives are `neg` alone, or, where
    `neg` is None or empty, the generated samples without themselves.

    `reduce` makes `scale` and `mean_square` those of all ranks (two calls per field). ValueError for unfitting shapes.
    """
    if floor is None:
        return _algorithm_2(gen, pos, neg, w_gen, w_pos, w_neg, temperatures, reduce)
    field = grouped_drifting_field(
        gen, pos, neg, w_gen=w_gen, w_pos=w_pos, w_neg=w_neg, temperatures=temperatures, floor=floor, reduce=reduce
    )
    return DriftField(field.force, field.scale[0] * math.sqrt(gen.shape[-1]), field.mean_square[:, 0])


@torch.no_grad()
def grouped_drifting_field(
    gen: Tensor,
    pos: Tensor,
    neg: Tensor | None = None,
    *,
    active: Tensor | None = None,
    group: Tensor | None = None,
    groups: int = 1,
    w_gen: Tensor | None = None,
    w_pos: Tensor | None = None,
    w_neg: Tensor | None = None,
    temperatures: Sequence[float] = TEMPERATURES,
    floor: float = AFFINITY_FLOOR,
    zero_is_absent: bool = False,
    reduce: Reduce | None = None,
) -> GroupedField:
    """The released field over the entries `active` [B,D] bool of each condition, one scale and one mean(F²) per group.

    `group` [B] int64 in [0, groups). Distances are measured per sqrt(active entries), so a group may hold conditions of
    different entry counts (chunks cut by the episode's end); with equal counts this is the released algorithm, exactly.
    A condition without an active entry gets no force and counts nowhere. In the release a sample of weight 0 still
    takes its share of the softmaxes; with `zero_is_absent` the field is that of the other samples alone, so sets of
    different sizes fit into one tensor. Shapes and collectives do not depend on the data."""
    with torch.autocast(gen.device.type, enabled=False):
        x, others, weight = _prepare(gen, pos, neg, w_gen, w_pos, w_neg)  # [B,G,D], [B,M+P,D], [B,N]
        b, g, d = x.shape
        y = torch.cat([x, others], dim=1)  # [B,N,D]
        if active is None:
            entries = torch.full((b,), d, dtype=x.dtype, device=x.device)  # [B]
        else:
            entries = active.sum(-1).to(x.dtype)  # [B]
            y = y.masked_fill(~active[:, None, :], 0.0)  # [B,N,D]
        y = y - y.mean(1, keepdim=True)  # [B,N,D] centered: no cancellation below
        x = y[:, :g]  # [B,G,D]
        live = (entries > 0).to(x.dtype)  # [B]
        member = _members(group, groups, live)  # [B,E]
        root = entries.clamp(min=1).sqrt()  # [B]

        distance = _distance(x, y).clamp(min=MIN_DISTANCE) / root[:, None, None]  # [B,G,N]
        sums = torch.stack([(distance * weight[:, None, :]).sum((1, 2)), g * weight.sum(1)])  # [2,B]
        scale = _ratio(sums, member, reduce)  # [E]
        scale_of = (member * scale).sum(1)  # [B]
        unit = scale_of.clamp(min=MIN_SCALE)  # [B]
        scaled = distance / torch.maximum(scale_of, MIN_SCALE / root)[:, None, None]  # [B,G,N]
        scaled[:, :, :g].diagonal(dim1=1, dim2=2).add_(SELF_DISTANCE)  # a sample is not its own negative

        negatives = y.shape[1] - pos.shape[1]
        absent = weight == 0 if zero_is_absent else None  # [B,N]
        forces = (
            _pull(x, y, _logits(scaled, temperatures), weight, negatives, floor, absent) / unit[:, None, None, None]
        )  # [B,K,G,D]
        counts = (g * entries).expand(len(temperatures), b)  # [K,B]
        mean_square = _ratio(torch.stack([forces.square().sum((2, 3)).T, counts]), member, reduce)  # [K,E]
        rms = (member[:, None] * mean_square).sum(2).clamp(min=MIN_MEAN_SQUARE).sqrt()  # [B,K]
        force = (forces / rms[:, :, None, None]).sum(1) * live[:, None, None]  # [B,G,D]
    return GroupedField(force, unit, scale, mean_square, entries)


@torch.no_grad()
def _algorithm_2(
    gen: Tensor,
    pos: Tensor,
    neg: Tensor | None,
    w_gen: Tensor | None,
    w_pos: Tensor | None,
    w_neg: Tensor | None,
    temperatures: Sequence[float],
    reduce: Reduce | None,
) -> DriftField:
    """Paper, Algorithm 2: no floor, no scale, no normalization; see `drifting_field`."""
    with torch.autocast(gen.device.type, enabled=False):
        x, others, weight = _prepare(gen, pos, neg, w_gen, w_pos, w_neg)  # [B,G,D], [B,M+P,D], [B,G+M+P]
        b, g, d = x.shape
        own = others.shape[1] == pos.shape[1]  # no `neg`: the negatives are gen itself
        y = torch.cat([x, others], dim=1) if own else others  # [B,N,D]
        weight = weight if own else weight[:, g:]  # [B,N]
        center = y.mean(1, keepdim=True)  # [B,1,D]
        x, y = x - center, y - center  # [B,G,D], [B,N,D]
        distance = _distance(x, y)  # [B,G,N]
        if own:
            distance[:, :, :g].diagonal(dim1=1, dim2=2).add_(1e6)
        negatives = y.shape[1] - pos.shape[1]
        forces = _pull(x, y, _logits(distance, temperatures), weight, negatives, None)  # [B,K,G,D]
        counts = torch.full((len(temperatures), b), float(g * d), dtype=x.dtype, device=x.device)  # [K,B]
        every = _members(None, 1, counts[0])  # [B,1]
        mean_square = _ratio(torch.stack([forces.square().sum((2, 3)).T, counts]), every, reduce)[:, 0]  # [K]
    return DriftField(forces.sum(1), x.new_tensor(math.sqrt(d)), mean_square)


def _logits(distance: Tensor, temperatures: Sequence[float]) -> Tensor:
    """−distance/τ [B,K,G,N] of distances [B,G,N]."""
    return torch.stack([distance / -tau for tau in temperatures], dim=1)


def _pull(
    x: Tensor,
    y: Tensor,
    logits: Tensor,
    weight: Tensor,
    negatives: int,
    floor: float | None,
    absent: Tensor | None = None,
) -> Tensor:
    """Attraction to the positives minus repulsion from the negatives (the first `negatives` of y) for logits [B,K,G,N]:
    [B,K,G,D], for x [B,G,D] and y [B,N,D].

    Doubly normalized affinities A [B,K,G,N]; the coefficients A_pos·ΣA_neg and −A_neg·ΣA_pos sum to zero over y."""
    present = logits if absent is None else logits.masked_fill(absent[:, None, None, :], -math.inf)  # [B,K,G,N]
    affinity = ((present.log_softmax(3) + logits.log_softmax(2)) / 2).exp()  # [B,K,G,N] sqrt(product of softmaxes)
    if floor is not None:
        affinity = affinity.clamp(min=math.sqrt(floor))
    affinity = affinity * weight[:, None, None, :]  # [B,K,G,N]
    near, far = affinity[..., negatives:], affinity[..., :negatives]  # [B,K,G,P], [B,K,G,N-P]
    coefficient = torch.cat([-far * near.sum(3, keepdim=True), near * far.sum(3, keepdim=True)], dim=3)  # [B,K,G,N]
    pulled = coefficient.double().flatten(1, 2) @ y.double()  # [B,K·G,D] float64: TF32 cannot touch it
    pulled = pulled.to(x.dtype).unflatten(1, logits.shape[1:3])  # [B,K,G,D]
    return pulled - coefficient.sum(3, keepdim=True) * x[:, None]  # [B,K,G,D]


def _distance(x: Tensor, y: Tensor) -> Tensor:
    """L2 distance [B,G,N], summed entry by entry: the matrix-product form cancels for close pairs in float32."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _members(group: Tensor | None, groups: int, live: Tensor) -> Tensor:
    """One-hot group membership [B,E] in live's dtype, zero rows where `live` [B] is zero."""
    if group is None:
        group = torch.zeros_like(live, dtype=torch.int64)
    return (group[:, None] == torch.arange(groups, device=live.device)).to(live.dtype) * (live > 0)[:, None]


def _ratio(sums: Tensor, member: Tensor, reduce: Reduce | None) -> Tensor:
    """numerator/denominator per group from `sums` [2,…,B], totalled over conditions and ranks: […,E]; 0 where empty."""
    totals = (sums[..., None] * member).sum(-2)  # [2,…,E]
    if reduce is not None:
        totals = reduce(totals)
    return totals[0] / totals[1].clamp(min=torch.finfo(totals.dtype).tiny)


def _prepare(
    gen: Tensor, pos: Tensor, neg: Tensor | None, w_gen: Tensor | None, w_pos: Tensor | None, w_neg: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """gen, [neg, pos] and weights [B,G+M+P] in the working dtype, shapes checked."""
    if gen.ndim != 3:
        raise ValueError(f"gen: expected [B,G,D], got {tuple(gen.shape)}")
    b, _, d = gen.shape
    dtype = torch.float64 if gen.dtype == torch.float64 else torch.float32
    neg = gen.new_zeros(b, 0, d) if neg is None else neg
    weights = []
    for name, samples, given in (("gen", gen, w_gen), ("neg", neg, w_neg), ("pos", pos, w_pos)):
        if samples.ndim != 3 or samples.shape[0] != b or samples.shape[2] != d:
            raise ValueError(f"{name}: expected [{b},n,{d}] like gen, got {tuple(samples.shape)}")
        if given is None:
            given = torch.ones(samples.shape[:2], dtype=dtype, device=gen.device)
        elif given.shape != samples.shape[:2]:
            raise ValueError(f"w_{name}: expected {tuple(samples.shape[:2])}, got {tuple(given.shape)}")
        weights.append(given.to(dtype))
    if gen.shape[1] == 0 or pos.shape[1] == 0:
        raise ValueError("gen and pos need at least one sample per condition")
    return gen.to(dtype), torch.cat([neg.to(dtype), pos.to(dtype)], dim=1), torch.cat(weights, dim=1)
