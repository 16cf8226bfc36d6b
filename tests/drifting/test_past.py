"""What the network makes of earlier frames and states: nothing where they are masked, and today's network without."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dvla.batch import FeatureBatch, places
from dvla.drifting.policy_net import PolicyNet, PolicyNetConfig
from dvla.errors import UserError
from support.policy_samples import ALPHA, NOISE, B, D, L, make_batch, make_net, random

H, STATES = 3, 2


def with_past(seen: bool, states: bool = True) -> FeatureBatch:
    """`make_batch` with two earlier frames and states behind it."""
    batch, mask = make_batch(), torch.full((B, 2 * L), seen)
    more = {name: torch.cat([getattr(batch, name)] * H, dim=1) for name in ("view_id", "tokens")}
    more["tokens"][:, L:] = random(B, 2 * L, D, seed=9)
    batch = dataclasses.replace(
        batch,
        **more,
        token_mask=torch.cat([batch.token_mask, mask], dim=1),
        frame_id=torch.arange(H).repeat_interleave(L).expand(B, -1).contiguous(),
    )
    past = {"past_proprio": random(B, STATES, 128, seed=8), "past_mask": torch.full((B, STATES), seen)}
    return dataclasses.replace(batch, **(past if states else {})).check()


def net_with_states(slots: tuple[int, ...] = ()) -> PolicyNet:
    config = make_net().config
    torch.manual_seed(0)
    if slots:
        dit = dataclasses.replace(config.dit, action_dim=len(slots), proprio_dim=len(slots))
        config = dataclasses.replace(config, dit=dit, slots=slots)
    return PolicyNet(dataclasses.replace(config, past_states=STATES))


def trained(net: PolicyNet) -> PolicyNet:
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return net.eval()


@torch.no_grad()
def test_masked_frames_and_states_change_nothing() -> None:
    net = trained(net_with_states())
    alone, masked = net(make_batch(), NOISE, ALPHA), with_past(seen=False)
    torch.testing.assert_close(net(masked, NOISE, ALPHA), alone, atol=1e-5, rtol=1e-4)
    other = masked.replace(
        tokens=masked.tokens + masked.frame_id[..., None].half(), past_proprio=random(B, STATES, 128)
    )
    assert torch.equal(net(other, NOISE, ALPHA), net(masked, NOISE, ALPHA))


@torch.no_grad()
def test_what_is_seen_counts_and_where_it_stands() -> None:
    net, seen = trained(net_with_states()), with_past(seen=True)
    expected, states = net(seen, NOISE, ALPHA), seen.past_proprio
    assert states is not None
    for change in (
        {"tokens": seen.tokens + (seen.frame_id == 2)[..., None].half()},
        {"frame_id": torch.where(seen.frame_id == 0, 0, 3 - seen.frame_id)},
        {"past_proprio": states + 1},
        {"past_proprio": states.flip(1)},
    ):
        assert (net(seen.replace(**change), NOISE, ALPHA) - expected).abs().max() > 1e-4, change.keys()


@torch.no_grad()
def test_a_network_without_past_states_begins_as_it_did() -> None:
    """The same weights from the same seed, those of past states beside them."""
    config = make_net().config
    torch.manual_seed(0)
    plain = PolicyNet(config).state_dict()
    more = net_with_states().state_dict()
    assert all(torch.equal(more[name], tensor) for name, tensor in plain.items())
    assert {name.split(".")[0] for name in more.keys() - plain.keys()} == {"proj_past", "past_embed"}


@torch.no_grad()
def test_slots_in_use_narrow_past_states_too() -> None:
    net, seen = trained(net_with_states((3, 5, 8))), with_past(seen=True)
    states = seen.past_proprio
    assert states is not None
    elsewhere = states.clone()
    elsewhere[..., 4] += 1
    assert torch.equal(net(seen.replace(past_proprio=elsewhere), NOISE, ALPHA), net(seen, NOISE, ALPHA))


def test_states_that_it_was_not_made_for_are_refused() -> None:
    with pytest.raises(ValueError, match="past_proprio: expected 0 states, got 2"):
        make_net()(with_past(seen=True), NOISE, ALPHA)
    with pytest.raises(ValueError, match=r"past_mask: expected \(3, 2\)"):
        with_past(seen=True).replace(past_mask=None)
    with pytest.raises(UserError, match="network past_states is 8; it must be 0 to 7"):
        PolicyNetConfig(past_states=8)


def test_places_of_tokens() -> None:
    frame, view = places(2, 2, 3)
    assert frame.tolist() == [0] * 6 + [1] * 6 and view.tolist() == [0, 0, 0, 1, 1, 1] * 2
    assert len(places(3, 0, 4)[0]) == 0
