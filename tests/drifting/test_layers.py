"""What the network makes of several layers of the VLM: a learned mix, or an embedding for each."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dvla.batch import FeatureBatch
from dvla.drifting.policy_net import PolicyNet, PolicyNetConfig
from dvla.errors import UserError
from support.policy_samples import ALPHA, NOISE, D, make_batch, make_net

N = 3  # layers; side by side they fill D


def net_of(layers_as: str) -> PolicyNet:
    config = make_net().config
    more = {"text_width": D} if layers_as == "width" else {}
    torch.manual_seed(0)
    net = PolicyNet(dataclasses.replace(config, layers=N, layers_as=layers_as, **more))
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "layer_" not in name:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return net.eval()


def in_float32() -> FeatureBatch:
    batch = make_batch()
    return batch.replace(tokens=batch.tokens.float(), text=batch.text.float())


@torch.no_grad()
def test_a_mix_begins_as_the_mean_of_layers_of_one_size() -> None:
    net, batch = net_of("width"), in_float32()
    plain = PolicyNet(dataclasses.replace(net.config, feature_width=D // N, layers=1)).eval()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("layer_")})
    layers = batch.tokens.unflatten(-1, (N, -1))
    mean = (layers / layers.square().mean(-1, keepdim=True).sqrt()).mean(-2)
    expected = plain(batch.replace(tokens=mean), NOISE, ALPHA)
    torch.testing.assert_close(net(batch, NOISE, ALPHA), expected, atol=1e-4, rtol=1e-3)
    assert net.layer_weights == pytest.approx([1 / N] * N) and plain.layer_weights == []


@torch.no_grad()
def test_a_layers_size_does_not_count_and_its_weight_does() -> None:
    net, batch = net_of("width"), in_float32()
    expected = net(batch, NOISE, ALPHA)
    larger = batch.tokens.clone()
    larger[..., : D // N] *= 50
    torch.testing.assert_close(net(batch.replace(tokens=larger), NOISE, ALPHA), expected, atol=1e-4, rtol=1e-3)
    net.layer_mix.copy_(torch.tensor([-1e3, 0.0, 0.0]))
    assert net.layer_weights == pytest.approx([0, 0.5, 0.5])
    without, other = net(batch, NOISE, ALPHA), batch.tokens.clone()
    other[..., : D // N] = torch.randn(other[..., : D // N].shape)
    assert (without - expected).abs().max() > 1e-3
    torch.testing.assert_close(net(batch.replace(tokens=other), NOISE, ALPHA), without)


def test_the_mix_learns_and_ignores_what_is_masked() -> None:
    net, batch = net_of("width"), in_float32()
    out = net(batch, NOISE, ALPHA)
    out.square().mean().backward()
    assert net.layer_mix.grad is not None and net.layer_mix.grad.abs().min() > 0
    assert net.layer_scale.grad is not None and net.layer_scale.grad.abs() > 0
    broken = batch.tokens.clone()
    broken[1, 3:] = torch.nan
    assert torch.equal(net(batch.replace(tokens=broken), NOISE, ALPHA), out)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(net(batch, NOISE, ALPHA)).all()


@torch.no_grad()
def test_layers_as_tokens_are_told_apart() -> None:
    net, batch = net_of("tokens"), make_batch()
    expected = net(batch, NOISE, ALPHA)
    assert net.layer_embed.weight.shape == (N, net.config.dit.width) and net.layer_weights == []
    every = torch.ones_like(batch.token_mask)  # the layers of one token in another order
    batch, turned = batch.replace(token_mask=every), batch.tokens.unflatten(1, (-1, N)).roll(1, 2).flatten(1, 2)
    views = batch.view_id.clone().zero_()
    first, second = (net(batch.replace(tokens=t, view_id=views), NOISE, ALPHA) for t in (batch.tokens, turned))
    assert (first - second).abs().max() > 1e-4
    net.layer_embed.weight.zero_()
    same = make_net().config
    plain = PolicyNet(same).eval()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("layer_")})
    torch.testing.assert_close(net(make_batch(), NOISE, ALPHA), plain(make_batch(), NOISE, ALPHA))
    assert (plain(make_batch(), NOISE, ALPHA) - expected).abs().max() > 1e-5


def test_all_other_weights_begin_as_they_do_with_one_layer() -> None:
    config = make_net().config
    torch.manual_seed(0)
    plain = PolicyNet(config).state_dict()
    torch.manual_seed(0)
    more = PolicyNet(dataclasses.replace(config, layers=N, layers_as="tokens")).state_dict()
    assert all(torch.equal(more[name], tensor) for name, tensor in plain.items())
    assert more.keys() - plain.keys() == {"layer_embed.weight"}


def test_refused() -> None:
    for settings, message in (
        ({"layers": 0}, "network layers is 0"),
        ({"layers": 2, "layers_as": "rows"}, "layers is 2 as 'rows'; it must be 1 to 64, as width or tokens"),
        ({"layers": 3, "text_width": 8, "feature_width": 32}, "feature_width 32 must be a multiple"),
        ({"layers": 2, "feature_width": 32}, "text_width be given"),
    ):
        with pytest.raises(UserError, match=message):
            PolicyNetConfig(**settings)  # type: ignore[arg-type]
