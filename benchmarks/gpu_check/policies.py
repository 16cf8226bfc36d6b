"""Random observations, networks and losses of the policy for the sections.

Letters: B observations, G noise samples.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from drift import observations
from resident import Resident

from dvla.batch import FeatureBatch, random_batch
from dvla.drifting.config import LossConfig
from dvla.drifting.dit import dit_config
from dvla.drifting.heads import head_loss
from dvla.drifting.losses import PolicyLoss
from dvla.drifting.policy_net import PolicyNet, PolicyNetConfig

from .items import Place

HORIZON, NOISE = 16, 64
KERNELS = {  # of attention, by what their names contain
    "cudnn": r"cudnn.*sdpa|sdpa.*cudnn|cudnn_generated",
    "flash": r"flash_fwd|flash_bwd|flash::|pytorch_flash|flash_attention",
    "efficient": r"fmha_cutlass|AttentionKernel|AttentionBackward|efficient",
    "math": r"softmax_warp_forward|softmax_forward|_safe_softmax|cunn_SoftMax",
}


def batch_of(place: Place, b: int, device: torch.device | str | None = None, words: int = 0) -> FeatureBatch:
    """Random observations as the loader delivers them: two views, words of which the last four are masked; chunks that
    end early; `words`: all visible, to act on."""
    device = torch.device(device or place.device)
    if words:
        return random_batch(b, 2, tokens(place), width(place), HORIZON, words, torch.float32).to(device)
    if not place.toy:
        batch = observations(b, HORIZON, torch.device("cpu"))
    else:
        batch = random_batch(b, 2, tokens(place), width(place), HORIZON)
        batch = batch.replace(action=0.2 * batch.action * batch.action_mask[:, None])
    steps = torch.ones(b, HORIZON, dtype=torch.bool)
    steps[: b // 4, HORIZON // 2 :] = False
    action = batch.action.masked_fill(~steps[..., None], 0)
    return batch.replace(step_mask=steps, action=action, embodiment=torch.arange(b) % 3).to(device)


def width(place: Place) -> int:
    """Of the features."""
    return int(place.size(2048, 64))


def tokens(place: Place) -> int:
    """Of a view."""
    return int(place.size(196, 16))


def size(place: Place) -> str:
    """Of the policy."""
    return str(place.size("base", "tiny"))


def network(place: Place, device: torch.device | str | None = None) -> PolicyNet:
    """With gates that are open: an untrained network's are shut, so that its blocks do nothing."""
    torch.manual_seed(0)
    shape = dit_config(size(place), **place.size({}, {"width": 64, "blocks": 2, "heads": 2}))
    net = PolicyNet(PolicyNetConfig(feature_width=width(place), dit=shape))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return net.to(device or place.device)


def noise(b: int, g: int, device: torch.device) -> torch.Tensor:
    return torch.randn(b, g, HORIZON, NOISE, generator=torch.Generator().manual_seed(1)).to(device)


def bfloat16(place: Place, on: bool = True) -> torch.autocast:
    return torch.autocast(place.device.type, torch.bfloat16, enabled=on)


def loss_of(place: Place, net: PolicyNet, batch: FeatureBatch, g: int, mixed: bool = True) -> PolicyLoss:
    """The loss of G noise samples an observation, on the batch's device."""
    b, device = len(batch), batch.tokens.device
    with bfloat16(place, mixed):
        return head_loss(net, batch, LossConfig(), noise=noise(b, g, device), alpha=torch.ones(b, device=device))


def steps_of(place: Place, b: int, g: int, **settings: Any) -> Resident:
    """The product's training step in bfloat16 on a batch that stays on the device."""
    given = {"precision": "bf16", "model_size": size(place), "draws": g, **settings}
    return Resident(network(place), batch_of(place, b), **given)


def kernels_of(place: Place, call: Callable[[], Any]) -> list[str]:
    """Names of the kernels that a call runs (of operators on a CPU)."""
    from torch.profiler import ProfilerActivity, profile

    call()
    place.wait()
    with profile(activities=[ProfilerActivity.CUDA if place.cuda else ProfilerActivity.CPU]) as prof:
        call()
        place.wait()
    return [event.key for event in prof.key_averages()]


def attention_of(names: list[str]) -> str:
    """Which kernels of attention are among them."""
    found = [kind for kind, pattern in KERNELS.items() if any(re.search(pattern, name) for name in names)]
    return "+".join(found) or f"unknown ({', '.join(name[:60] for name in names[:6])})"
