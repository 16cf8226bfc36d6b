"""The policy's loss: masks, grouping, kinds, per-step distance, guidance, and that descending it finds both modes."""

from __future__ import annotations

import math

import pytest
import torch

from dvla.batch import FeatureBatch
from dvla.common.config import from_mapping
from dvla.drifting.config import TEMPERATURES, LossConfig
from dvla.drifting.field import drifting_field
from dvla.drifting.guidance import batch_negatives, negative_weight, sample_alpha
from dvla.drifting.losses import drifting_loss, policy_loss
from dvla.errors import UserError
from support.policy_samples import one_thread

B, G, T = 5, 4, 6
SLOTS = {1: [0, 3, 10], 4: [39, 40, 41, 10, 42]}  # active slots of two embodiments
EMBODIMENT = torch.tensor([1, 1, 4, 4, 4])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_batch(cut: bool = True) -> FeatureBatch:
    """Five observations of two embodiments; with `cut`, the second ends after two steps."""
    action_mask = torch.zeros(B, 128, dtype=torch.bool)
    for row, embodiment in enumerate(EMBODIMENT.tolist()):
        action_mask[row, SLOTS[embodiment]] = True
    step_mask = torch.ones(B, T, dtype=torch.bool)
    if cut:
        step_mask[1, 2:] = False
    empty = torch.zeros(B, 0, dtype=torch.int64)
    return FeatureBatch(
        tokens=torch.zeros(B, 0, 8),
        token_mask=empty.bool(),
        view_id=empty,
        frame_id=empty,
        text=torch.zeros(B, 0, 8),
        text_mask=empty.bool(),
        proprio=torch.zeros(B, 128),
        action=random(B, T, 128, seed=1) * action_mask[:, None] * step_mask[:, :, None],
        action_mask=action_mask,
        step_mask=step_mask,
        embodiment=EMBODIMENT,
        control_hz=torch.full((B,), 10.0),
        dataset=EMBODIMENT // 4,
        frame_index=torch.arange(B),
    ).check()


def rows(batch: FeatureBatch, chosen: slice) -> FeatureBatch:
    return batch.map(lambda value: value[chosen])


def counting(batch: FeatureBatch) -> torch.Tensor:
    return batch.step_mask[:, :, None] & batch.action_mask[:, None, :]  # [B,T,128]


def test_mse_is_the_mean_over_counting_entries() -> None:
    batch, pred = make_batch(), random(B, G, T, 128)
    entries = [
        (pred[b, g, t, s] - batch.action[b, t, s]).square().item()
        for b in range(B)
        for t in range(T)
        if batch.step_mask[b, t]
        for s in SLOTS[EMBODIMENT[b].item()]
        for g in range(G)
    ]
    loss = policy_loss(pred, batch, LossConfig(kind="mse"))
    assert loss.total.item() == pytest.approx(sum(entries) / len(entries), rel=1e-5)


@pytest.mark.parametrize("kind", ["mse", "pure_drift", "hybrid"])
@pytest.mark.parametrize("distance", ["chunk", "step"])
def test_only_counting_entries_get_a_gradient_or_matter(kind: str, distance: str) -> None:
    batch, config = make_batch(), LossConfig(kind=kind, distance=distance)
    pred = random(B, G, T, 128).requires_grad_()
    loss = policy_loss(pred, batch, config)
    (gradient,) = torch.autograd.grad(loss.total, pred)
    counts = counting(batch)[:, None].expand_as(pred)
    assert not gradient[~counts].any() and (gradient[counts] != 0).all()
    junk = torch.where(counts, pred.detach(), 1e3 * random(B, G, T, 128, seed=9))
    assert torch.equal(policy_loss(junk, batch, config).total, loss.total)


def test_kinds_add_up() -> None:
    batch, pred = make_batch(), random(B, G, T, 128)
    mse, drift, hybrid = (
        policy_loss(pred, batch, LossConfig(kind=kind, drift_weight=0.3)) for kind in ("mse", "pure_drift", "hybrid")
    )
    assert torch.equal(mse.total, hybrid.mse) and torch.equal(drift.total, hybrid.drift)
    torch.testing.assert_close(hybrid.total, mse.total + 0.3 * drift.total)
    with pytest.raises(ValueError, match="kind"):
        policy_loss(pred, batch, LossConfig(kind="flow"))  # not a loss of generated chunks
    with pytest.raises(UserError, match="did you mean 'pure_drift'"):
        LossConfig(kind="drift")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="did you mean 'drift_weight'"):
        from_mapping(LossConfig, {"drift_wieght": 1.0})


@pytest.mark.parametrize("distance", ["chunk", "step"])
def test_embodiments_are_grouped_never_compared(distance: str) -> None:
    """Each embodiment's part is the plain drifting loss of its observations on its active dims, gradient included."""
    batch = make_batch(cut=False)
    pred = random(B, G, T, 128).double().requires_grad_()
    loss = policy_loss(pred, batch, LossConfig(kind="pure_drift", distance=distance))
    (gradient,) = torch.autograd.grad(loss.total, pred)
    parts, reference = [], pred.detach().clone().requires_grad_()
    for embodiment, slots in SLOTS.items():
        rows = embodiment == EMBODIMENT
        gen, pos = reference[rows][..., slots], batch.action[rows][:, None][..., slots].double()
        shape = (lambda x: x.transpose(1, 2).flatten(0, 1)) if distance == "step" else (lambda x: x.flatten(2))
        alone = drifting_loss(shape(gen), shape(pos), temperatures=LossConfig().temperatures)
        parts.append(alone.per_condition)
        dims = math.prod(shape(gen).shape[2:])
        torch.testing.assert_close(loss.scale_of[embodiment] * dims**0.5, alone.field.scale)
        torch.testing.assert_close(loss.mean_square_of[:, embodiment], alone.field.mean_square)
    expected = torch.cat(parts).mean()
    torch.testing.assert_close(loss.total, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, reference)[0])
    assert not loss.scale_of[[0, 2, 3, 5, 6]].any()
    pooled = (2 * loss.mean_square_of[:, 1] + 3 * loss.mean_square_of[:, 4]) / 5
    torch.testing.assert_close(loss.mean_square, pooled)


def test_a_cut_chunk_counts_as_its_real_steps() -> None:
    """An observation with 2 real steps drifts as the 2-step chunk does in the same group."""
    batch, config = make_batch(), LossConfig(kind="pure_drift")
    pred, cut = random(1, G, T, 128), rows(batch, slice(1, 2))
    two = cut.replace(action=cut.action[:, :2], step_mask=cut.step_mask[:, :2])
    long, short = policy_loss(pred, cut, config), policy_loss(pred[:, :, :2], two, config)
    torch.testing.assert_close(long.total, short.total)
    torch.testing.assert_close(long.scale, short.scale)


def test_float32_in_autocast() -> None:
    batch, pred = make_batch(), random(B, G, T, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = policy_loss(pred, batch).total
    assert inside.dtype == torch.float32 and torch.equal(inside, policy_loss(pred, batch).total)
    assert policy_loss(pred.bfloat16(), batch).total.dtype == torch.float32


@pytest.mark.parametrize("distance", ["chunk", "step"])
def test_ranks_with_different_embodiments_agree(distance: str) -> None:
    """The shapes given to `reduce` do not depend on which embodiments a rank holds, and the result is the joint one."""
    batch, pred, config = make_batch(), random(B, G, T, 128), LossConfig(kind="hybrid", distance=distance)
    sides = [slice(0, 2), slice(2, 5)]  # unequal numbers of counting entries
    calls: list[list[torch.Tensor]] = [[], []]
    totals: list[torch.Tensor] = []
    losses = {}
    for _ in range(3):  # both ranks in turn; each pass learns one more collective's total
        for side, log in zip(sides, calls):
            log.clear()

            def reduce(sums: torch.Tensor) -> torch.Tensor:
                log.append(sums)
                return totals[len(log) - 1] if len(log) <= len(totals) else sums

            losses[side.start] = policy_loss(pred[side], rows(batch, side), config, reduce=reduce)
        totals = [a + b for a, b in zip(*calls)]
    joint, last = policy_loss(pred, batch, config), list(losses.values())
    for name in ("total", "mse", "drift"):  # what averaging gradients over ranks needs
        torch.testing.assert_close((getattr(last[0], name) + getattr(last[1], name)) / 2, getattr(joint, name))
    for loss in last:
        torch.testing.assert_close(loss.scale_of, joint.scale_of)
        torch.testing.assert_close(loss.mean_square_of, joint.mean_square_of)


def test_a_wide_temperature_leads_the_mean_of_the_draws_to_the_expert() -> None:
    """Of the force on 4 draws around a point off their one expert chunk, the part that moves their mean there: more
    with the wide temperature than with the release's alone, and, as there, all of it where the draws are far off."""
    expert = torch.zeros(256, 1, 32)
    away = torch.nn.functional.normalize(random(256, 1, 32), dim=2)
    spread = random(256, 4, 32, seed=1) / 32**0.5
    share = {}
    for off in (0.3, 1.0, 10.0):
        for temperatures in (TEMPERATURES, LossConfig().temperatures):
            force = drifting_field(off * away + spread, expert, temperatures=temperatures).force
            share[off, len(temperatures)] = -(
                (force.mean(1, keepdim=True) * away).sum(2).mean() / (32 * force.square().mean()).sqrt()
            ).item()
    assert share[0.3, 4] > 1.2 * share[0.3, 3] > 0 and share[1.0, 4] > 1.2 * share[1.0, 3]
    assert min(share[10.0, 3], share[10.0, 4]) > 0.95


def test_extra_positives_and_negatives() -> None:
    batch, pred, config = make_batch(cut=False), random(B, G, T, 128), LossConfig(kind="pure_drift")
    near = batch.action[:, None] + 0.1 * random(B, 2, T, 128, seed=4)
    w_neg = random(3, 2, seed=5).exp()
    third = rows(batch, slice(2, 5))  # one embodiment
    loss = policy_loss(pred[2:], third, config, positives=near[2:], negatives=near[2:].flip(1) + 1, w_neg=w_neg)

    def flat(chunks: torch.Tensor) -> torch.Tensor:
        return chunks[..., SLOTS[4]].flatten(2)

    plain = drifting_loss(
        flat(pred[2:]),
        flat(torch.cat([third.action[:, None], near[2:]], 1)),
        flat(near[2:].flip(1) + 1),
        w_neg=w_neg,
        temperatures=config.temperatures,
    )
    torch.testing.assert_close(loss.total, plain.per_condition.mean())


def test_batch_negatives_are_other_complete_chunks_of_the_same_dataset() -> None:
    batch, alpha = make_batch(), torch.full((B,), 3.0)
    neg, weight = batch_negatives(batch, alpha, G, 2, torch.Generator().manual_seed(0))
    assert neg.shape == (B, 2, T, 128) and weight.shape == (B, 2)
    for b in range(B):
        allowed = [j for j in range(B) if j != b and batch.dataset[j] == batch.dataset[b] and batch.step_mask[j].all()]
        used = [m for m in range(2) if weight[b, m] > 0]
        assert len(used) == min(2, len(allowed))
        sources = [next(j for j in range(B) if torch.equal(neg[b, m], batch.action[j])) for m in used]
        assert len(set(sources)) == len(sources) and set(sources) <= set(allowed)
        assert weight[b].sum().item() == pytest.approx(2.0 * (G - 1) if used else 0.0)
    assert not batch_negatives(batch, torch.ones(B), G, 2)[1].any()  # α = 1: no guidance


def test_alpha_follows_the_power_law() -> None:
    alpha = sample_alpha(100_000, generator=torch.Generator().manual_seed(0))
    assert alpha.dtype == torch.float32 and alpha.min() >= 1 and alpha.max() <= 4
    for value in (1.2, 2.0, 3.0):  # distribution function of α^-3 on [1,4]
        assert (alpha <= value).float().mean().item() == pytest.approx((1 - value**-2) / (1 - 4**-2), abs=0.005)
    flat = sample_alpha(100_000, power=1.0, generator=torch.Generator().manual_seed(0))
    assert (flat <= 2).float().mean().item() == pytest.approx(0.5, abs=0.005)
    assert negative_weight(torch.tensor([1.0, 3.0]), 8, 4).tolist() == [0.0, 3.5]


def spread_to_modes(kind: str) -> torch.Tensor:
    """16 free samples of one observation against expert chunks in two modes (±0.5): the samples after descent [16]."""
    batch = make_batch(cut=False)
    row, expert = rows(batch, slice(0, 1)), torch.zeros(1, 16, T, 128)
    modes = torch.tensor([0.5, -0.5]).repeat(8)[None, :, None, None]  # [1,16,1,1]
    expert[..., SLOTS[1]] = modes + 0.02 * random(1, 16, T, 3, seed=7)
    pred = (0.1 * random(1, 16, T, 128)).requires_grad_()
    optimizer = torch.optim.Adam([pred], lr=0.02)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 200)  # the normalized force never fades
        current = row.replace(action=expert[:, step % 16])
        loss = policy_loss(pred, current, LossConfig(kind=kind), positives=None if kind == "mse" else expert[:, :15])
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    return pred.detach()[0][..., SLOTS[1]].mean((1, 2))


@one_thread()
def test_drift_keeps_both_modes_where_regression_averages_them() -> None:
    drifted, averaged = spread_to_modes("pure_drift"), spread_to_modes("mse")
    assert averaged.abs().max() < 0.3
    assert ((drifted - 0.5).abs() < 0.25).sum() >= 4 and ((drifted + 0.5).abs() < 0.25).sum() >= 4
    assert ((drifted.abs() - 0.5).abs() < 0.25).float().mean() > 0.8
