"""Held-out error during training: how well the averaged weights predict expert actions of held-out episodes.

Letters: B observations, T action steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from ...cache.actions.slots import EMBODIMENTS, slots
from ...cache.store.dataset import CacheDataset
from ...drifting.metrics import ActionMetrics, drift_strength
from .context import Session, open_loader
from .panels.data import PanelData
from .step import noise_generator, predict


@torch.no_grad()
def held_out_metrics(session: Session, seen: PanelData | None = None) -> dict[str, float]:
    """Metrics of `ActionMetrics` over `eval_batches` of the held-out episodes, with the present weights.

    Of the look `seen` at some of them, whose observations have several noise samples, also "mmd", "mode_coverage" and
    "lambda/<τ>" (see metrics.py). Each observation as often as any other, one noise sample, no condition dropout, no
    augmentation, α = 1. Every process takes a part; result and samples do not depend on how many there are.
    """
    config, net, world = session.config, session.net, session.world
    dit, device, b = net.config.dit, world.device, config.batch_size
    metrics = ActionMetrics([d.name for d in session.cache.datasets], EMBODIMENTS)
    net.eval()
    with open_loader(session, split="eval") as loader:
        batches = min(config.eval_batches, math.ceil(sum(loader.sizes) / b))
        for i in range(math.ceil(batches / world.size)):
            batch, block = session.batch(next(loader)), i * world.size + world.rank
            generator = noise_generator(config.seed, block, 1)
            noise = torch.randn(b, 1, dit.horizon, dit.noise_dim, generator=generator).to(device)
            pred = predict(session, batch, noise)[:, 0]  # [B,T,128]
            if block < batches:  # the last round may be one too many for some
                metrics.update(pred, batch)
    net.train()
    metrics.load_sums(world.total(metrics.sums().to(device)))
    result = metrics.result() | native_errors(metrics, session.cache.datasets)
    if seen is None:
        return result
    more = {name: v for name, v in seen.result.items() if name in ("mmd", "mode_coverage")}
    return result | more | drift_strength(seen.mean_square.tolist(), seen.temperatures)


def native_errors(metrics: ActionMetrics, datasets: Sequence[CacheDataset]) -> dict[str, float]:
    """Root mean square errors "native/rad", "native/m", …: over all slots of a unit, each of each dataset once.

    Unlike errors in normalized units it compares runs of other normalizations and frames, which it does not depend on.
    """
    half_range = np.stack([d.action_normalizer.half_range for d in datasets])  # [K,128]
    squares = metrics.slots()["mse"].numpy() * np.square(half_range, dtype=np.float64)  # [K,128], NaN where undefined
    found: dict[str, list[float]] = {}
    for slot, column in zip(slots(), squares.T):
        found.setdefault(f"native/{slot.unit.split(',')[0] or 'other'}", []).extend(
            column[np.isfinite(column)].tolist()
        )
    return {name: math.sqrt(np.mean(values)) for name, values in found.items() if values}
