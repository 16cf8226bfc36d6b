"""Small observations and networks that the tests of the DiT, its heads and its attention share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from dvla.batch import FeatureBatch
from dvla.drifting.dit import dit_config
from dvla.drifting.heads import head_dit
from dvla.drifting.policy_net import PolicyNet, PolicyNetConfig

SMALL = {"width": 32, "blocks": 3, "heads": 2, "horizon": 5}
B, G, T, L, LT, D = 3, 4, 5, 6, 4, 24


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_batch() -> FeatureBatch:
    token_mask = torch.ones(B, L, dtype=torch.bool)
    token_mask[1, 3:] = False
    text_mask = torch.ones(B, LT, dtype=torch.bool)
    text_mask[2, 1:] = False
    return FeatureBatch(
        tokens=random(B, L, D).half(),
        token_mask=token_mask,
        view_id=torch.arange(L).expand(B, L) % 2,
        frame_id=torch.zeros(B, L, dtype=torch.int64),
        text=random(B, LT, D, seed=1).half(),
        text_mask=text_mask,
        proprio=random(B, 128, seed=2),
        action=random(B, T, 128, seed=3),
        action_mask=torch.ones(B, 128, dtype=torch.bool),
        step_mask=torch.ones(B, T, dtype=torch.bool),
        embodiment=torch.tensor([0, 4, 6]),
        control_hz=torch.tensor([5.0, 30.0, 80.0]),
        dataset=torch.zeros(B, dtype=torch.int64),
        frame_index=torch.arange(B),
    ).check()


def make_net(cross_attention: str = "all", trained: bool = True, kind: str = "hybrid", **overrides: int) -> PolicyNet:
    """A small network with a head of `kind`; `trained` replaces the initial zeros, so that every path is in use."""
    torch.manual_seed(0)
    dit = head_dit(dit_config("tiny", **{**SMALL, "cross_attention": cross_attention, **overrides}), kind)
    net = PolicyNet(PolicyNetConfig(feature_width=D, dit=dit))
    if trained:
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return net


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch's kernels on one thread, also as a decorator: fastest for descents of small tensors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


NOISE, ALPHA = random(B, G, T, 64, seed=5), torch.tensor([1.0, 2.0, 4.0])
