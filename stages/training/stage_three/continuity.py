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
from ....drifting.policy_net import PolicyNet
from ....errors import UserError
from ..config import FinetuneConfig
from ..step import noise_generator, training_step
from .split import SplitFeatures, same_samples

MAX_JUMP = 0.02  # relative difference of the first cached and live loss beyond which the features are not the same
MAX_DIFFERENCE = (
    0.1  # of the features' RMS; bfloat16 against float32 stays well below. A young policy's loss hardly depends on them
)


@dataclass(frozen=True)
class Continuity:
    """The same batch, noise and weights through cached and through live features, before the first step."""

    cached_loss: float
    live_loss: float
    feature_error: float  # largest absolute difference of a feature
    feature_scale: float  # root mean square of the cached features
    difference: float  # root mean square of the features' difference / feature_scale

    @property
    def jump(self) -> float:
        """Relative difference of the losses."""
        return abs(self.live_loss - self.cached_loss) / max(abs(self.cached_loss), 1e-12)


def _require_no_jump(continuity: Continuity, cache: Cache, say: Callable[[str], None]) -> None:
    say(
        f"loss on one batch before the first step: {continuity.cached_loss:.6f} from the cache, {continuity.live_loss:.6f} live "
        f"(features differ by at most {continuity.feature_error:.2g}, their RMS is {continuity.feature_scale:.2g})"
    )
    if continuity.jump > MAX_JUMP or continuity.difference > MAX_DIFFERENCE:
        raise UserError(
            f"the loss would jump from {continuity.cached_loss:.6f} to {continuity.live_loss:.6f}, and live features differ "
            f"by {continuity.difference:.2g} of their RMS: they are not those of cache {cache.path}; run "
            f"`dvla cache verify {cache.path} --live 32`"
        )


@torch.no_grad()
def compare(
    net: PolicyNet, cache: Cache, live: LiveFeatures | SplitFeatures, config: FinetuneConfig, count: int = 32
) -> Continuity | None:
    """Loss of `count` samples spread evenly over the datasets, from the cache and live; same weights, same noise. On a split cache against
    the run's own cache, or the sources; None without these."""
    ids, rows = spread(cache, count)
    horizon, device = net.config.dit.horizon, next(net.parameters()).device
    if isinstance(live, SplitFeatures):
        found = same_samples(config, cache, live, ids, rows, horizon)
        if found is None:
            return None
        cached, again = found
    else:
        cached = gather(cache, ids, rows, horizon).to(device)
        again = live(gather(cache, ids, rows, horizon, features=False).to(device), np.zeros(len(rows), bool))

    def loss(batch: FeatureBatch) -> float:
        return training_step(net, batch, config.train, noise_generator(config.train.seed, 0, 2)).total.item()

    seen = cached.token_mask[..., None]
    error = (cached.tokens.float() - again.tokens.float()).masked_fill(~seen, 0)  # [B,L,D]
    scale, rms = (x.masked_fill(~seen, 0).float().square().mean().sqrt().item() for x in (cached.tokens, error))
    return Continuity(loss(cached), loss(again), error.abs().max().item(), scale, rms / max(scale, 1e-12))


def spread(cache: Cache, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(dataset, frame row) int64 of about `count` samples, two at least, spread evenly over the datasets; none in quarantine."""
    pairs = [
        (d, row)
        for d, table in enumerate(cache.datasets)
        for row in table.frame_of(
            np.linspace(0, table.observations - 1, max(1, count // len(cache.datasets))).astype(int)
        ).tolist()
        if not table.quarantined[table.episode_of(np.array([row]))[0]]
    ]
    ids, rows = np.array(pairs if len(pairs) > 1 else pairs * 2, np.int64).T
    return ids, rows
