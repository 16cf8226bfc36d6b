"""Stage three starts at the loss where stage two ended: cached against live features on the same samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ....batch import FeatureBatch
from ....cache.loader.live import LiveFeatures
from ....cache.loader.loader import gather
from ....cache.store.cache import Cache
from ....common.text import wrapped
from ....drifting.policy_net import PolicyNet
from ....errors import UserError
from ..config import FinetuneConfig
from ..step import batch_loss, noise_generator, unqueued
from .split import SplitFeatures, same_samples

MAX_JUMP = 0.02  # relative difference of the first cached and live loss beyond which the features are not the same
MAX_DIFFERENCE = 0.1  # of the features' RMS, on which a young policy's loss hardly depends; bfloat16 stays well below


@dataclass(frozen=True)
class Continuity:
    """The same batch, noise and weights with cached and with live features, before the first step."""

    cached_loss: float
    live_loss: float
    feature_error: float  # largest absolute difference of a feature
    feature_scale: float  # root mean square of the cached features
    difference: float  # root mean square of the features' difference / feature_scale

    @property
    def jump(self) -> float:
        """Relative difference of the losses."""
        return abs(self.live_loss - self.cached_loss) / max(abs(self.cached_loss), 1e-12)


def require_no_jump(continuity: Continuity | None, cache: Cache, say: Callable[[str], None]) -> dict[str, float]:
    """What the log's first line says of the switch. `UserError` where live features are not the cached ones."""
    if continuity is None:
        say(
            "the loss before the first step was not compared: the run's own cache is gone or holds other samples, "
            "and no --source was given"
        )
        return {}
    cached, live = continuity.cached_loss, continuity.live_loss
    line = (
        f"loss on one batch before the first step: {cached:.6f} from the cache, {live:.6f} live (features differ "
        f"by at most {continuity.feature_error:.2g}, their RMS is {continuity.feature_scale:.2g})"
    )
    say(wrapped(line).lstrip())
    if continuity.jump > MAX_JUMP or continuity.difference > MAX_DIFFERENCE:
        raise UserError(
            f"run `dvla cache verify {cache.path} --live 32`: the loss would jump from {cached:.6f} to {live:.6f}, "
            f"and live features differ by {continuity.difference:.2g} of their RMS from the cached ones"
        )
    return {
        "switch/cached_loss": cached,
        "switch/live_loss": live,
        "switch/feature_difference": continuity.difference,
    }


@torch.no_grad()
def compare(
    net: PolicyNet, cache: Cache, live: LiveFeatures | SplitFeatures, config: FinetuneConfig, count: int = 32
) -> Continuity | None:
    """Loss of `count` samples spread evenly over the datasets, from the cache and live; same weights, same noise.

    On a split cache against the run's own cache, or the sources; None without these."""
    ids, rows = spread(cache, count)
    horizon, device = net.config.dit.horizon, next(net.parameters()).device
    if isinstance(live, SplitFeatures):
        found = same_samples(config, cache, live, ids, rows, horizon)
        if found is None:
            return None
        cached, again = found
    else:
        history = config.train.past
        cached = gather(cache, ids, rows, horizon, history=history).to(device)
        again = live(gather(cache, ids, rows, horizon, features=False, history=history).to(device))

    plain = unqueued(config.train)

    def loss(batch: FeatureBatch) -> float:
        return batch_loss(net, batch, plain, noise_generator(config.train.seed, 0, 2)).total.item()

    seen = cached.token_mask[..., None]
    error = (cached.tokens.float() - again.tokens.float()).masked_fill(~seen, 0)  # [B,L,D]
    scale, rms = (x.masked_fill(~seen, 0).float().square().mean().sqrt().item() for x in (cached.tokens, error))
    return Continuity(loss(cached), loss(again), error.abs().max().item(), scale, rms / max(scale, 1e-12))


def spread(cache: Cache, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(dataset, frame row) int64 of about `count` samples, at least two, spread evenly; none in quarantine."""
    each, pairs = max(1, count // len(cache.datasets)), []
    for d, table in enumerate(cache.datasets):
        if table.quarantined.any():
            frames = table.samples(np.flatnonzero(~table.quarantined))
            rows = frames[np.linspace(0, len(frames) - 1, each).astype(int)] if len(frames) else frames
        else:
            rows = table.frame_of(np.linspace(0, table.observations - 1, each).astype(int))
        pairs += [(d, row) for row in rows.tolist()]
    ids, rows = np.array(pairs if len(pairs) > 1 else pairs * 2, np.int64).T
    return ids, rows
