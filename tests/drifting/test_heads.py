"""The baseline heads: their mathematics against exact answers, masks, what they share with the drifting head,
sampling."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dvla.drifting.config import DENOISING, ONE_STEP, LossConfig
from dvla.drifting.dit import build_dit, dit_config, parameter_counts
from dvla.drifting.heads import (
    ddim,
    diffusion_pair,
    euler,
    flow_pair,
    generate,
    head_dit,
    head_loss,
    sample_steps,
    signal_levels,
)
from dvla.drifting.losses import policy_loss
from dvla.drifting.policy_net import PolicyNet
from dvla.errors import UserError
from support.policy_samples import ALPHA, NOISE, B, G, T, make_batch, make_net, one_thread, random

NOISY = random(B, G, T, 128, seed=6)
denoising = pytest.mark.parametrize("kind", DENOISING)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cut_batch():
    """`make_batch` with inactive slots and a chunk that ends early."""
    batch = make_batch()
    action_mask, step_mask = batch.action_mask.clone(), batch.step_mask.clone()
    action_mask[:, 20:] = False
    action_mask[2, 5:] = False
    step_mask[1, 2:] = False
    batch = batch.replace(action_mask=action_mask, step_mask=step_mask)
    return batch.replace(action=batch.action * (action_mask[:, None] & step_mask[..., None]))


def loss_of(net: PolicyNet, batch, kind: str, noise: torch.Tensor, seed: int = 3):
    return head_loss(net, batch, LossConfig(kind=kind), noise=noise, alpha=ALPHA, generator=seeded(seed))


@pytest.mark.parametrize("steps", [1, 5, 10, 100])
def test_a_known_action_is_reached_exactly(steps: int) -> None:
    """The exact velocity towards, or prediction of, one point leads there in any number of steps."""
    point, noise = random(7, 3, seed=1).double(), random(7, 3).double()
    torch.testing.assert_close(euler(lambda x, t: (point - x) / (1 - t), noise, steps), point)
    torch.testing.assert_close(ddim(lambda x, level: point, noise, steps), point)


def fitted(pairs, draws: int = 40_000):
    """The best linear prediction of the target from x at one time, from `pairs(action, noise)`, for actions N(0.3,
    0.2²): what a perfectly trained network computes, since a Gaussian's conditional expectations are linear."""
    action, noise = 0.3 + 0.2 * random(draws, seed=1).double(), random(draws, seed=2).double()
    x, target = pairs(action, noise)
    slope = ((x - x.mean()) * target).mean() / x.var()
    return lambda at: target.mean() + slope * (at - x.mean())


@denoising
def test_pairs_and_sampler_fit_each_other(kind: str) -> None:
    """Predictions fitted to the training pairs, sampled, give the actions' distribution back; one Euler step gives its
    mean."""
    if kind == "flow":

        def sample(noise, steps):
            return euler(lambda x, t: fitted(lambda a, n: flow_pair(a, n, torch.tensor(t)))(x), noise, steps)

        mean = sample(random(500, seed=4).double(), 1)
        torch.testing.assert_close(mean, torch.full_like(mean, 0.3), rtol=0, atol=0.01)
    else:

        def sample(noise, steps):
            return ddim(
                lambda x, level: fitted(lambda a, n: diffusion_pair(a, n, torch.tensor(level)))(x), noise, steps
            )

    drawn = sample(random(20_000, seed=3).double(), 100)
    assert drawn.mean().item() == pytest.approx(0.3, abs=0.01)
    assert drawn.std().item() == pytest.approx(0.2, rel=0.06)  # 100 steps of a first-order method
    few = sample(random(20_000, seed=3).double(), 5).std().item()
    assert 0.05 < few < 0.95 * drawn.std().item()  # few steps lose spread: the price to compare


def test_the_schedule_is_the_squared_cosine() -> None:
    share = signal_levels()
    betas = 1 - share / torch.cat([torch.ones(1).double(), share[:-1]])
    assert share.shape == (100,) and (share.diff() < 0).all() and share[-1] < 1e-6
    assert betas.max().item() == pytest.approx(0.999) and betas[0].item() == pytest.approx(
        6.314e-4, rel=1e-3
    )  # diffusers 0.35
    angle = (torch.arange(1, 100).double() / 100 + 0.008) / 1.008 * torch.pi / 2
    torch.testing.assert_close(
        share[:99], (angle.cos() / torch.tensor(0.008 / 1.008 * torch.pi / 2).double().cos()) ** 2
    )


def test_ddim_visits_levels_spaced_from_the_last() -> None:
    seen: list[int] = []
    ddim(lambda x, level: seen.append(level) or x, random(2), 5)
    assert seen == [99, 79, 59, 39, 19]
    seen.clear()
    ddim(lambda x, level: seen.append(level) or x, random(2), 100)
    assert seen == list(range(99, -1, -1))


@denoising
def test_masked_entries_have_no_influence(kind: str) -> None:
    net, batch = make_net(kind=kind), cut_batch()
    active = batch.step_mask[..., None] & batch.action_mask[:, None]  # [B,T,128]
    plain = loss_of(net, batch, kind, NOISY)
    expected = torch.autograd.grad(plain.total, list(net.parameters()))
    for junk in (7.0, float("nan")):
        other = loss_of(net, batch, kind, NOISY.masked_fill(~active[:, None], junk))
        assert torch.equal(other.total, plain.total)
        for got, want in zip(torch.autograd.grad(other.total, list(net.parameters())), expected):
            assert torch.equal(got, want)


@denoising
def test_the_loss_is_the_mean_over_counting_entries(kind: str) -> None:
    net, batch = make_net(kind=kind), cut_batch()
    loss = loss_of(net, batch, kind, NOISY)
    draw = seeded()
    if kind == "flow":
        time = torch.rand(B, G, generator=draw)
        x, target = flow_pair(batch.action[:, None], NOISY, time[..., None, None])
    else:
        level = torch.randint(100, (B, G), generator=draw)
        time = (level + 1) / 100
        x, target = diffusion_pair(batch.action[:, None], NOISY, level[..., None, None])
    active = (batch.step_mask[..., None] & batch.action_mask[:, None])[:, None].expand_as(x)
    error = net(batch, x * active, ALPHA, time) - target
    torch.testing.assert_close(loss.total, error[active].square().mean())
    assert torch.equal(loss.mse, loss.total.detach()) and not loss.mse.requires_grad
    like = policy_loss(make_net()(batch, NOISE, ALPHA), batch)
    for name in ("drift", "mean_square", "scale", "mean_square_of", "scale_of"):
        assert getattr(loss, name).shape == getattr(like, name).shape and not getattr(loss, name).any()


@denoising
def test_the_loss_depends_on_the_generator_alone(kind: str) -> None:
    net, batch = make_net(kind=kind), make_batch()
    state = torch.get_rng_state()
    first, second, other = (loss_of(net, batch, kind, NOISY, seed).total for seed in (3, 3, 4))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="neither"):
        head_loss(net, batch, LossConfig(kind=kind), noise=NOISY, alpha=ALPHA, negatives=batch.action[:, None])


@pytest.mark.parametrize("kind", ["pure_drift", "hybrid"])
def test_one_pass_kinds_are_the_policy_loss(kind: str) -> None:
    net, batch, config = make_net(), cut_batch(), LossConfig(kind=kind)
    extra = {"negatives": random(B, 3, T, 128, seed=9), "w_neg": random(B, 3).exp()}
    loss = head_loss(net, batch, config, noise=NOISE, alpha=ALPHA, **extra)
    assert torch.equal(loss.total, policy_loss(net(batch, NOISE, ALPHA), batch, config, **extra).total)
    assert torch.equal(generate(net, net.encode(batch), NOISE, ALPHA, config), net(batch, NOISE, ALPHA))


def test_regression_does_not_see_the_noise() -> None:
    net, batch, config = make_net(), make_batch(), LossConfig(kind="mse")
    assert torch.equal(loss_of(net, batch, "mse", NOISE).total, loss_of(net, batch, "mse", NOISE + 1).total)
    out = generate(net, net.encode(batch), NOISE, ALPHA, config)
    assert out.shape == (B, G, T, 128) and torch.equal(out, generate(net, net.encode(batch), NOISE + 1, ALPHA, config))
    assert (
        torch.equal(out[:, 0], out[:, 1]) and (out.diff(dim=2).abs().amax((1, 2, 3)) > 1e-3).all()
    )  # equal draws, unequal steps


@denoising
@pytest.mark.parametrize("steps", [1, 4])
def test_sampling_shares_keys_and_values_and_ignores_inactive_slots(kind: str, steps: int) -> None:
    net, batch, config, calls = make_net(kind=kind), cut_batch(), LossConfig(kind=kind), []
    context, mask = net.encode(batch), batch.action_mask[:, None, None]
    for block in net.dit.blocks:
        block.cross_attention.kv.register_forward_hook(lambda module, args, out: calls.append(1))
    drawn = generate(net, context, NOISY, ALPHA, config, steps=steps)
    assert drawn.shape == (B, G, T, 128) and len(calls) == len(net.dit.blocks)
    assert torch.equal(drawn, generate(net, context, NOISY, ALPHA, dataclasses.replace(config, sample_steps=steps)))

    def plain(x: torch.Tensor, time: float) -> torch.Tensor:
        return net.decode(context, x * mask, ALPHA, torch.full((B, G), time))

    naive = euler(plain, NOISY, steps) if kind == "flow" else ddim(lambda x, k: plain(x, (k + 1) / 100), NOISY, steps)
    torch.testing.assert_close(drawn, naive)
    junk = generate(net, context, NOISY.masked_fill(~mask, 9.0), ALPHA, config, steps=steps)
    kept = mask.expand_as(drawn)
    assert torch.equal(junk[kept], drawn[kept])


@denoising
def test_each_draw_has_a_time_of_its_own(kind: str) -> None:
    net, batch, time = make_net(kind=kind), make_batch(), torch.rand(B, G, generator=seeded())
    before, later = net(batch, NOISY, ALPHA, time), time.clone()
    later[:, 0] += 0.1
    after = net(batch, NOISY, ALPHA, later)
    torch.testing.assert_close(before[:, 1:], after[:, 1:], rtol=1e-5, atol=1e-6)
    assert (before[:, 0] - after[:, 0]).abs().amax((1, 2)).min() > 1e-4


def test_heads_share_the_trunk() -> None:
    config = dit_config("base")
    assert all(head_dit(config, kind) == config for kind in ONE_STEP)
    with torch.device("meta"):
        drift, flow = (
            parameter_counts(build_dit("base", **dataclasses.asdict(head_dit(config, kind))))
            for kind in ("hybrid", "flow")
        )
    differing = {part: flow[part] - n for part, n in drift.items() if flow[part] != n}
    assert differing.pop("total") == sum(differing.values()) < 0.001 * drift["total"]
    assert differing == {
        "noise_in": 64 * 768,
        "skip": 64 * 128,
        "conditioning": 64 * 768 + 768,
    }  # 128 entries in; the time
    trunk = set(dict(make_net().named_parameters())), set(dict(make_net(kind="flow").named_parameters()))
    assert trunk[0] < trunk[1] and {n.split(".")[2] for n in trunk[1] - trunk[0]} == {"time"}


def test_times_and_steps_are_checked() -> None:
    batch = make_batch()
    with pytest.raises(ValueError, match="time"):
        make_net(kind="flow")(batch, NOISY, ALPHA)
    with pytest.raises(ValueError, match="time"):
        make_net()(batch, NOISE, ALPHA, torch.rand(B, G))
    with pytest.raises(UserError, match="noise_dim"):
        dit_config("tiny", denoising=True)
    for kind, steps in (("hybrid", 5), ("diffusion", 101), ("flow", -1)):
        with pytest.raises(UserError, match=f"sample_steps is {steps}"):
            LossConfig(kind=kind, sample_steps=steps)
    assert [sample_steps(LossConfig(kind=kind)) for kind in ("mse", "hybrid", "flow", "diffusion")] == [1, 1, 10, 100]
    assert sample_steps(LossConfig(kind="diffusion", sample_steps=5)) == 5


@denoising
def test_bfloat16_autocast(kind: str) -> None:
    net, batch = make_net(kind=kind), cut_batch()
    exact = loss_of(net, batch, kind, NOISY)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(net, batch, kind, NOISY)
        drawn = generate(net, net.encode(batch), NOISY, ALPHA, LossConfig(kind=kind), steps=3)
    assert loss.total.dtype == drawn.dtype == torch.float32
    assert loss.total.item() == pytest.approx(exact.total.item(), rel=0.02) and torch.isfinite(drawn).all()
    loss.total.backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


@one_thread()
@pytest.mark.parametrize(("kind", "steps", "error"), [("mse", 100, 0.2), ("flow", 250, 0.5), ("diffusion", 150, 0.3)])
def test_each_head_learns_a_chunk_per_observation(kind: str, steps: int, error: float) -> None:
    """Actions drawn after a short training on three observations with one chunk each: mean squared error / mean
    square."""
    net, batch = make_net(trained=False, kind=kind, blocks=2), make_batch()
    few = torch.arange(128).expand(B, 128) < 3
    batch = batch.replace(action_mask=few, action=0.5 * batch.action.clamp(-1, 1) * few[:, None])
    config, draw, rate = LossConfig(kind=kind), seeded(1), 0.01
    shape = (B, 8, T, net.config.dit.noise_dim)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        loss = head_loss(
            net, batch, config, noise=torch.randn(shape, generator=draw), alpha=torch.ones(B), generator=draw
        )
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    with torch.no_grad():
        drawn = generate(
            net,
            net.encode(batch),
            torch.randn(shape, generator=draw),
            torch.ones(B),
            config,
            steps=1 if kind == "mse" else 5,
        )
    wanted = batch.action[..., :3]
    assert (drawn[..., :3] - wanted[:, None]).square().mean() < error * wanted.square().mean()
