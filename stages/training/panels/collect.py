"""Predictions of the current weights for held-out observations, the same ones after every step with panels.

Letters: B observations of a batch, N of all, G noise samples, T action steps, n noise entries.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from ....batch import FeatureBatch
from ....cache.loader.loader import Loader
from ....drifting.config import DENOISING
from ....drifting.losses import counting
from ....drifting.metrics import drift_of
from ....errors import UserError
from ..context import Session, open_loader
from ..step import noise_generator, predict
from .data import PanelData

FEW = 2  # noise samples at most of a head that takes many passes


@torch.no_grad()
def collect(session: Session, step: int = 0) -> PanelData:
    """Predict `panels.draws` chunks at α = 1 for each of `panels.observations` held-out observations, and their drift.

    Nothing is dropped or augmented, the noise is always the same, and training is unaffected. Where no episodes are
    held out, training episodes stand in. Every process gets the same; where the network is split, all must call.
    """
    config, net, device = session.config, session.net, session.world.device
    dit, b, generator = net.config.dit, config.batch_size, noise_generator(config.seed, 0, 3)
    g = min(config.panels.draws, FEW) if config.loss.kind in DENOISING else config.panels.draws
    training = net.training
    net.eval()
    try:
        loader, held_out = _loader(session)
        with loader:
            count = min(config.panels.observations, sum(loader.sizes))
            rounded = -(-count // b) * b
            noise = torch.randn(rounded, g, dit.horizon, dit.noise_dim, generator=generator)  # [N,G,T,n]
            found: list[tuple[FeatureBatch, torch.Tensor]] = []
            for start in range(0, count, b):
                batch = session.batch(next(loader))
                pred = predict(session, batch, noise[start : start + b].to(device))  # [B,G,T,128]
                found.append((_light(batch), pred.float().cpu()))
    finally:
        net.train(training)
    draws = torch.cat([pred for _, pred in found])[:count]  # [N,G,T,128]
    target, active, body, dataset = (
        torch.cat([get(batch) for batch, _ in found])[:count].cpu()
        for get in (lambda x: x.action, counting, lambda x: x.embodiment, lambda x: x.dataset)
    )
    draws = draws.masked_fill(~active[:, None], 0.0)
    drift = drift_of(draws, target, active, body, config.loss)
    tables = session.cache.datasets
    return PanelData(
        step=step,
        datasets=tuple(d.name for d in tables),
        embodiments=tuple(d.embodiment_id for d in tables),
        dataset=dataset.numpy(),
        target=target.numpy(),
        draws=draws.numpy(),
        active=active.numpy(),
        drift=drift.step.numpy(),
        mean_square=drift.mean_square.numpy(),
        temperatures=config.loss.temperatures,
        center=np.stack([d.action_normalizer.center for d in tables]),
        half_range=np.stack([d.action_normalizer.half_range for d in tables]),
        hz=np.array([d.control_hz for d in tables]),
        held_out=held_out,
    )


def _loader(session: Session) -> tuple[Loader, bool]:
    """The observations that a single process would read, and whether they are held out."""
    try:
        return open_loader(session, split="eval", alone=True), True
    except UserError:  # none are held out
        return open_loader(session, split="all", alone=True), False


def _light(batch: FeatureBatch) -> FeatureBatch:
    """The batch without its features, since all batches are kept."""
    return dataclasses.replace(batch, tokens=batch.tokens[:, :0], text=batch.text[:, :0])
