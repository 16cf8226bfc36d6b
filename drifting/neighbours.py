"""Further positives for the drift: expert chunks of the observations nearest in feature space.

An observation has one expert chunk, but where demonstrations of one task pass through the same situation, the chunks of
the nearest observations of other demonstrations say what else an expert does there. Near is not equal: every neighbor
trades p(a | o) for p(a | about o).

Letters: B observations, N observations of a bank, S features of an observation, D, Dt token and text widths, P
neighbors, T action steps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import FeatureBatch


class Positives(NamedTuple):
    """Arguments of `policy_loss`: `positives` [B,P,T,128] normalized, `w_pos` [B,P] 1 where there is one, else 0."""

    positives: Tensor
    w_pos: Tensor


class Neighbours(Protocol):
    """What a trainer asks: P positives for each observation of the batch, on the batch's device. `FeatureBank` is
    one."""

    def __call__(self, batch: FeatureBatch, count: int) -> Positives: ...


def pooled(batch: FeatureBatch) -> Tensor:
    """What makes observations near [B,D+Dt] float32: the means of the visible image and text tokens, each of length
    1.

    These are the frozen features, not the trained projections of them: a bank stays valid while the policy learns.
    """
    parts = []
    for tokens, mask in ((batch.tokens, batch.token_mask), (batch.text, batch.text_mask)):
        total = tokens.masked_fill(~mask[..., None], 0).sum(1, dtype=torch.float32)  # [B,D] or [B,Dt]
        parts.append(F.normalize(total, dim=-1))  # the count does not change the direction
    return torch.cat(parts, dim=-1)


@dataclass(frozen=True)
class FeatureBank:
    """Observations to search exactly, all on one device. Only of the same dataset: other action spaces are never
    compared."""

    features: Tensor  # [N,S] float, by default `pooled`
    chunks: Tensor  # [N,T,128] float32 normalized, none running past its episode's end
    dataset: Tensor  # [N] int64, as in FeatureBatch
    frame_index: Tensor  # [N] int64, as in FeatureBatch
    gap: int = 0  # observations so many frames away, or less, are no neighbors: the same moment again

    @classmethod
    def of(cls, batches: Iterable[FeatureBatch], gap: int = 0) -> FeatureBank:
        """The bank of all complete chunks in `batches` (decoded ones); ValueError where there are none."""
        rows: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for batch in batches:
            whole = batch.step_mask.all(1)  # [B]
            rows.append((pooled(batch)[whole], batch.action[whole], batch.dataset[whole], batch.frame_index[whole]))
        if not rows:
            raise ValueError("a bank needs at least one batch")
        features, chunks, dataset, frame_index = (torch.cat(column) for column in zip(*rows))
        return cls(features, chunks, dataset, frame_index, gap)

    def __call__(self, batch: FeatureBatch, count: int) -> Positives:
        """The `count` nearest of the same dataset, nearest first, never the observation itself; memory O(B·N)."""
        b, p = len(batch), min(count, len(self.features))
        with torch.autocast(batch.tokens.device.type, enabled=False):
            distance = torch.cdist(pooled(batch).to(self.features.dtype), self.features)  # [B,N]
        fits = (batch.dataset[:, None] == self.dataset) & (
            (batch.frame_index[:, None] - self.frame_index).abs() > self.gap
        )  # [B,N]
        nearest = distance.masked_fill(~fits, torch.inf).topk(p, dim=1, largest=False).indices  # [B,P]
        valid = fits.gather(1, nearest)  # [B,P]
        chunks = F.pad(self.chunks[nearest], (0, 0, 0, 0, 0, count - p))  # [B,count,T,128]
        return Positives(chunks, F.pad(valid.to(chunks.dtype), (0, count - p)).reshape(b, count))
