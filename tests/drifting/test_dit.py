"""The DiT and PolicyNet: size, masking, shared observations, initial spread, autocast."""

from __future__ import annotations

import pytest
import torch

from dvla.drifting.dit import SIZES, Context, DiTConfig, build_dit, dit_config, parameter_counts
from dvla.drifting.policy_net import PolicyNet, PolicyNetConfig
from dvla.errors import UserError
from support.policy_samples import ALPHA, LT, NOISE, SMALL, B, D, G, L, T, make_batch, make_net, random

both = pytest.mark.parametrize("cross_attention", ["all", "front"])


def test_base_is_147_million_parameters() -> None:
    with torch.device("meta"):
        counts = {size: parameter_counts(build_dit(size)) for size in SIZES}
        front = parameter_counts(build_dit("base", cross_attention="front"))
    assert abs(counts["base"]["total"] - 147e6) < 0.01 * 147e6
    assert sum(n for part, n in counts["base"].items() if part != "total") == counts["base"]["total"]
    assert counts["tiny"]["total"] < counts["small"]["total"] < counts["base"]["total"] < counts["large"]["total"]
    assert counts["base"]["cross_attention"] == 6 * front["cross_attention"] == 12 * (4 * 768**2 + 2 * 64)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'base'"):
        build_dit("bsae")
    with pytest.raises(UserError, match="did you mean 'horizon'"):
        build_dit("tiny", horizn=8)
    with pytest.raises(UserError, match="did you mean 'front'"):
        build_dit("tiny", cross_attention="fromt")
    with pytest.raises(UserError, match="heads"):
        DiTConfig(width=100, heads=12)
    with pytest.raises(ValueError, match="noise"):
        make_net()(make_batch(), NOISE[:, :, :-1], ALPHA)


@both
def test_sharing_an_observation_equals_repeating_it(cross_attention: str) -> None:
    net, batch = make_net(cross_attention), make_batch()
    shared = net(batch, NOISE, ALPHA)  # [B,G,T,128]
    assert shared.shape == (B, G, T, 128) and shared.dtype == torch.float32
    repeated = batch.map(lambda value: value.repeat_interleave(G, 0))
    single = net(repeated, NOISE.flatten(0, 1).unsqueeze(1), ALPHA.repeat_interleave(G))  # [B·G,1,T,128]
    torch.testing.assert_close(shared, single.reshape(shared.shape), rtol=1e-4, atol=1e-5)


def test_keys_and_values_are_computed_once_per_observation() -> None:
    net, rows = make_net(), []
    for block in net.dit.blocks:
        block.cross_attention.kv.register_forward_hook(lambda module, args, out: rows.append(out.shape[:2].numel()))
    net(make_batch(), NOISE, ALPHA)
    assert rows == [B * (L + LT + 1)] * 3


@both
def test_masked_tokens_have_no_influence(cross_attention: str) -> None:
    net, batch = make_net(cross_attention), make_batch()
    plain = net(batch, NOISE, ALPHA)
    for junk in (100.0, float("nan")):
        changed = batch.replace(
            tokens=batch.tokens.masked_fill(~batch.token_mask[..., None], junk),
            text=batch.text.masked_fill(~batch.text_mask[..., None], junk),
            view_id=batch.view_id.masked_fill(~batch.token_mask, 7),
        )
        net.zero_grad()
        out = net(changed, NOISE, ALPHA)
        assert torch.equal(out, plain)
        out.square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)
    seen = net(batch.replace(tokens=batch.tokens + batch.token_mask[..., None].half()), NOISE, ALPHA)
    assert (seen - plain).abs().amax((1, 2, 3)).min() > 1e-3  # and the visible ones have some


def test_padding_changes_nothing() -> None:
    net, batch = make_net(), make_batch()
    pad = batch.replace(
        tokens=torch.cat([batch.tokens, torch.ones(B, 3, D).half()], 1),
        view_id=torch.cat([batch.view_id, batch.view_id[:, :3]], 1),
        token_mask=torch.cat([batch.token_mask, torch.zeros(B, 3, dtype=torch.bool)], 1),
        frame_id=torch.cat([batch.frame_id, batch.frame_id[:, :3]], 1),
    )
    torch.testing.assert_close(net(pad, NOISE, ALPHA), net(batch, NOISE, ALPHA), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fields", [("text_mask",), ("token_mask",), ("text_mask", "token_mask")])
def test_fully_masked_conditions_stay_finite(fields: tuple[str, ...]) -> None:
    net, batch = make_net(), make_batch()
    blind = batch.replace(**{name: torch.zeros_like(getattr(batch, name)) for name in fields})
    out = net(blind, NOISE, ALPHA)
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


def test_an_observation_without_tokens_is_defined() -> None:
    """The loader may deliver [B,0,D] where the encoder is live and has not run."""
    batch = make_batch()
    none = batch.replace(
        tokens=batch.tokens[:, :0],
        token_mask=batch.token_mask[:, :0],
        view_id=batch.view_id[:, :0],
        frame_id=batch.frame_id[:, :0],
    )
    assert torch.isfinite(make_net()(none, NOISE, ALPHA)).all()


def test_initial_samples_are_the_skip_and_spread() -> None:
    net, noise = make_net(trained=False), random(B, 64, T, 64)
    out = net(make_batch(), noise, ALPHA)  # [B,64,T,128]
    torch.testing.assert_close(out, net.dit.skip(noise))  # adaLN-Zero: every block is the identity
    assert out.std(1).mean().item() == pytest.approx(net.config.dit.skip_std, rel=0.1)
    assert out.std(1).min() > 0.02


@pytest.mark.parametrize("name", ["embodiment", "control_hz", "proprio", "text", "tokens", "view_id", "frame_id"])
def test_every_condition_has_influence(name: str) -> None:
    net, batch = make_net(), make_batch()
    changed = {
        "embodiment": (batch.embodiment + 1) % 7,
        "control_hz": batch.control_hz * 2,
        "view_id": 1 - batch.view_id,
        "frame_id": batch.frame_id + 1,
    }.get(name, getattr(batch, name).flip(-1))
    difference = net(batch.replace(**{name: changed}), NOISE, ALPHA) - net(batch, NOISE, ALPHA)
    assert difference.abs().amax((1, 2, 3)).min() > 1e-5


def test_alpha_word_order_and_time_order_have_influence() -> None:
    net, batch = make_net(), make_batch()
    plain = net(batch, NOISE, ALPHA)
    assert (net(batch, NOISE, ALPHA + 0.5) - plain).abs().amax((1, 2, 3)).min() > 1e-5
    words = net(batch.replace(text=batch.text.flip(1), text_mask=batch.text_mask.flip(1)), NOISE, ALPHA)
    assert (words - plain).abs().amax((1, 2, 3)).min() > 1e-5
    reverse = net(batch, NOISE.flip(2), ALPHA).flip(2)  # RoPE: the steps are not a set
    assert (reverse - plain).abs().max() > 1e-5


def test_draws_do_not_see_each_other() -> None:
    net, batch, other = make_net(), make_batch(), NOISE.clone()
    other[:, 0] += 1
    before, after = net(batch, NOISE, ALPHA), net(batch, other, ALPHA)
    torch.testing.assert_close(before[:, 1:], after[:, 1:], rtol=1e-5, atol=1e-6)
    assert (before[:, 0] - after[:, 0]).abs().max() > 0.01


@both
def test_every_parameter_learns(cross_attention: str) -> None:
    net = make_net(cross_attention)
    net(make_batch(), NOISE, ALPHA).square().mean().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@both
def test_encode_and_decode_compose_to_forward(cross_attention: str) -> None:
    net, batch = make_net(cross_attention), make_batch()
    context = net.encode(batch)
    assert isinstance(context, Context) and context.sequence.shape == (B, L + LT, SMALL["width"])
    assert torch.equal(net.decode(context, NOISE, ALPHA), net(batch, NOISE, ALPHA))


@both
def test_bfloat16_autocast(cross_attention: str) -> None:
    net, batch = make_net(cross_attention), make_batch()
    exact = net(batch, NOISE, ALPHA)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(batch, NOISE, ALPHA)
    assert out.dtype == torch.float32 and not torch.equal(out, out.bfloat16().float())  # the last layers are in float32
    out.square().mean().backward()
    assert 0 < (out - exact).abs().max() < 0.05 * exact.abs().max()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


def test_text_of_a_width_of_its_own_is_the_same_function_of_the_same_weights() -> None:
    """Features before the VLM's projection are narrower than its text: then text has its own projection."""
    shared, batch = make_net(), make_batch()
    own = PolicyNet(PolicyNetConfig(feature_width=D, text_width=D, dit=shared.config.dit))
    weights = shared.state_dict()
    weights |= {f"proj_text.{name}": tensor for name, tensor in shared.proj_seq.state_dict().items()}
    weights["proj_pool.0.weight"] = shared.proj_pool[0].weight.repeat(1, 2)  # on [sum of tokens, sum of text] / count
    own.load_state_dict(weights)
    torch.testing.assert_close(own(batch, NOISE, ALPHA), shared(batch, NOISE, ALPHA), rtol=1e-4, atol=1e-5)


def test_narrow_tokens_beside_wide_text() -> None:
    torch.manual_seed(0)
    net = PolicyNet(PolicyNetConfig(feature_width=10, text_width=D, dit=dit_config("tiny", **SMALL)))
    batch = make_batch()
    batch = batch.replace(tokens=batch.tokens[..., :10].contiguous())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    out = net(batch, NOISE, ALPHA)
    out.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for name, p in net.named_parameters() if name.startswith("proj_"))
    hidden = batch.replace(
        tokens=batch.tokens.masked_fill(~batch.token_mask[..., None], 7.0),
        text=batch.text.masked_fill(~batch.text_mask[..., None], torch.inf),
    )
    assert torch.equal(net(hidden, NOISE, ALPHA), out)
    other = batch.text.clone()
    other[:, 0] += 1
    assert not torch.allclose(net(batch.replace(text=other), NOISE, ALPHA), out, atol=1e-4)
