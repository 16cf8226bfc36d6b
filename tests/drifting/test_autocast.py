"""What autocast does to the network on a GPU, traced without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dvla.batch import random_batch
from dvla.drifting.dit import dit_config
from dvla.drifting.policy_net import PolicyNet, PolicyNetConfig


class Casts(TorchDispatchMode):
    """Shapes of the tensors that are copied into another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and out.dtype != args[0].dtype:
            self.shapes.append(tuple(out.shape))
        return out


@pytest.fixture
def mixed() -> Any:
    """CUDA's autocast, which `torch.autocast` leaves off where there is no GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield
    torch.set_autocast_enabled("cuda", False)


def test_the_context_is_cast_once_for_all_blocks(mixed: None) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        net = PolicyNet(PolicyNetConfig(feature_width=64, dit=dit_config("tiny")))
        noise, alpha = torch.randn(2, 4, 16, 64), torch.ones(2)
        with torch.device("cpu"):
            batch = random_batch(2, 2, 16, 64, 16).to("cuda")
        with Casts() as casts:
            out = net(batch, noise, alpha)
    assert out.dtype == torch.float32 and casts.shapes.count((2, 1 + 2 * 16 + 16, 192)) == 1
