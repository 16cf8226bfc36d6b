"""Held-out error during training: how well the averaged weights predict expert actions of episodes that are not trained on.

Letters: B observations, T action steps.
"""

from __future__ import annotations

import math

import torch

from ...cache.actions.slots import EMBODIMENTS
from ...drifting.heads import generate
from ...drifting.metrics import ActionMetrics, drift_strength
from .context import Session, open_loader
from .panels.data import PanelData
from .step import autocast, noise_generator


@torch.no_grad()
def evaluate(session: Session, seen: PanelData | None = None) -> dict[str, float]:
    """Metrics of `ActionMetrics` over the first `eval_batches` of the held-out episodes, with the network's present weights; and of the look `seen`
    at some of them, whose observations have several draws, "mmd", "mode_coverage" and "lambda/<τ>" (see metrics.py).

    Each sample as often as any other, one noise draw, nothing masked or augmented, α = 1. Every process takes a part; result and
    samples do not depend on how many there are.
    """
    config, net, world = session.config, session.net, session.world
    dit, device, b = net.config.dit, world.device, config.batch_size
    metrics = ActionMetrics([d.name for d in session.cache.datasets], EMBODIMENTS)
    net.eval()
    with open_loader(session, split="eval") as loader:
        batches = min(config.eval_batches, math.ceil(sum(loader.sizes) / b))
        for i in range(math.ceil(batches / world.size)):
            at, block = loader.state_dict()["offset"], i * world.size + world.rank
            batch = session.features(next(loader), loader.masked(at)[1], loader.variants(at))
            noise = torch.randn(b, 1, dit.horizon, dit.noise_dim, generator=noise_generator(config.seed, block, 1)).to(
                device
            )
            with (
                autocast(config, device),
                torch.compiler.set_stance("force_eager"),
            ):  # other shapes: not worth compiling for
                pred = generate(net, net.encode(batch), noise, torch.ones(b, device=device), config.loss)[
                    :, 0
                ]  # [B,T,128]
            if block < batches:  # the last round may be one too many for some
                metrics.update(pred, batch)
    net.train()
    metrics.load_sums(world.total(metrics.sums().to(device)))
    more = {} if seen is None else {name: v for name, v in seen.result.items() if name in ("mmd", "mode_coverage")}
    return (
        metrics.result() | more | ({} if seen is None else drift_strength(seen.mean_square.tolist(), seen.temperatures))
    )
