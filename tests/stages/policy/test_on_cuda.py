"""What a policy does otherwise on a GPU, as far as a CPU can show it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dvla.batch import random_batch
from dvla.drifting.dit import dit_config
from dvla.drifting.policy_net import PolicyNet, PolicyNetConfig
from dvla.stages.policy.policy import Policy


@pytest.mark.parametrize("device, length", [("cpu", 5), ("cuda", 16)])
def test_texts_have_few_lengths_on_a_gpu(device: str, length: int) -> None:
    words = {"go": 2, "pick it up": 5}
    policy: Any = SimpleNamespace(
        encoder=SimpleNamespace(device=torch.device(device)),
        without=(),
        _embed=lambda text: (torch.ones(8, 3), words[text]),
    )
    text, mask = Policy._texts(policy, list(words))
    assert text.shape == (2, length, 3) and mask.sum(1).tolist() == [2, 5] and mask[:, :2].all()


def test_padding_changes_no_action() -> None:
    torch.manual_seed(0)
    net = PolicyNet(PolicyNetConfig(feature_width=8, dit=dit_config("tiny", width=32, blocks=2, heads=2, horizon=4)))
    for p in net.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    batch, noise, alpha = random_batch(2, 1, 4, 8, 4, words=5), torch.randn(2, 1, 4, 64), torch.ones(2)
    text = torch.nn.functional.pad(batch.text, (0, 0, 0, 11), value=3.0)
    padded = batch.replace(text=text, text_mask=torch.nn.functional.pad(batch.text_mask, (0, 11)))
    torch.testing.assert_close(net(padded, noise, alpha), net(batch, noise, alpha), rtol=1e-4, atol=1e-5)
