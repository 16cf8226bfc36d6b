"""Held-out metrics of predicted action chunks: masked, per dataset and per embodiment, from sums that ranks can add.

All are in normalised units and count an entry where its slot is active for the dataset and its step lies before the episode's end.
For a dataset k and an active slot d, over the entries (p prediction, a expert), with N their number:

    mse_kd, mae_kd    mean of (p − a)², of |p − a|
    correlation_kd    Pearson's r of p and a; 0 for a prediction that never changes
    coverage_kd       100 · σ(p) / σ(a), percent: how much of the expert's range the predictions span; 100 is all, near 0 a collapse
    nl2_kd            sqrt(mse_kd) / (rms(a) + 1e-3): the error as a share of the size of the actions; a policy that always predicts
                      the data set's mean has about 1 in normalised slots

`coverage` takes the standard deviation as the range: largest minus smallest value would grow with the number of samples, hang on a
single outlier and not add up over ranks. `nl2` is the l2 error of RDT-1B's evaluation with its ε; its norm is that of the actions, since a
dataset of velocities has no state in the same slots.

mse and mae of a group (a dataset, an embodiment, everything) pool all its entries. The other three are means over the group's (dataset,
slot) pairs, never pooled over datasets: their different means alone would correlate. A slot that the expert does not move (σ(a) < 1e-4)
has no range and no correlation: it counts in mse and mae only. A metric that no slot of a group defines is left out.

Letters: B observations, T action steps, K datasets, E embodiments, D = 128 slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..batch import UNIFIED_DIM, FeatureBatch

METRICS = ("mse", "mae", "correlation", "coverage", "nl2")
EPSILON = 1e-3      # of nl2, normalised units
STILL = 1e-4        # standard deviation under which an expert's slot counts as constant, normalised units
_MOMENTS = 8        # N, Σp, Σa, Σp², Σa², Σpa, Σ(p−a)², Σ|p−a|


class ActionMetrics:
    """Metrics over any number of batches. `datasets`: names by `FeatureBatch.dataset`; `embodiments`: by `FeatureBatch.embodiment`.

    >>> metrics.update(pred, batch); metrics.result()["mse"]
    """

    def __init__(self, datasets: Sequence[str], embodiments: Sequence[str]) -> None:
        self.datasets, self.embodiments = tuple(datasets), tuple(embodiments)
        self._moments = torch.zeros(len(self.datasets), _MOMENTS, UNIFIED_DIM, dtype=torch.float64)         # [K,8,D]
        self._seen = torch.zeros(len(self.datasets), len(self.embodiments), dtype=torch.float64)            # [K,E] observations

    @torch.no_grad()
    def update(self, pred: Tensor, batch: FeatureBatch) -> None:
        """Add the predictions `pred` [B,T,128], normalised, of any float dtype, for the batch's observations. Nothing waits for the device."""
        if pred.shape != batch.action.shape:
            raise ValueError(f"pred: expected {tuple(batch.action.shape)}, got {tuple(pred.shape)}")
        active = batch.step_mask[..., None] & batch.action_mask[:, None]                # [B,T,D]
        p, a = (x.double().masked_fill(~active, 0) for x in (pred, batch.action))       # [B,T,D]
        error = p - a                                                                   # [B,T,D]
        entries = torch.stack([active.double(), p, a, p * p, a * a, p * a, error * error, error.abs()], dim=1)  # [B,8,T,D]
        self._moments, self._seen = self._moments.to(pred.device), self._seen.to(pred.device)
        self._moments.index_add_(0, batch.dataset, entries.sum(2))
        self._seen.index_put_((batch.dataset, batch.embodiment), torch.ones(len(batch), dtype=torch.float64, device=pred.device), accumulate=True)

    def sums(self) -> Tensor:
        """[n] float64 on the device of the predictions: add those of all ranks and give the sum to `load_sums`."""
        return torch.cat([self._moments.flatten(), self._seen.flatten()])

    def load_sums(self, sums: Tensor) -> None:
        """Go on as if this object had seen the batches behind `sums`."""
        moments, seen = sums.split([self._moments.numel(), self._seen.numel()])
        self._moments, self._seen = moments.clone().view_as(self._moments), seen.clone().view_as(self._seen)

    def result(self) -> dict[str, float]:
        """"<metric>" over everything, "<metric>/<dataset>", "<metric>/embodiment/<name>"; groups without an observation are left out."""
        moments, seen = self._moments.cpu(), self._seen.cpu()
        groups = {"": torch.ones(len(self.datasets), dtype=torch.bool)}                 # [K] bool each
        groups |= {f"/{name}": torch.arange(len(self.datasets)) == k for k, name in enumerate(self.datasets)}
        groups |= {f"/embodiment/{name}": seen[:, e] > 0 for e, name in enumerate(self.embodiments)}
        return {f"{metric}{suffix}": value for suffix, mine in groups.items() if seen[mine].any()
                for metric, value in _metrics(moments[mine]).items()}


def _metrics(moments: Tensor) -> dict[str, float]:
    """The defined metrics of the datasets whose moments [k,8,D] are given."""
    n, p, a, pp, aa, pa, square, absolute = moments.unbind(1)                           # [k,D] each
    if not n.any():
        return {}
    out = {"mse": (square.sum() / n.sum()).item(), "mae": (absolute.sum() / n.sum()).item()}
    count = n.clamp(min=1)
    p, a, pp, aa, pa, square = (x / count for x in (p, a, pp, aa, pa, square))          # means, [k,D]
    spread_p, spread_a = ((x2 - x * x).clamp(min=0).sqrt() for x, x2 in ((p, pp), (a, aa)))     # σ, [k,D]
    moves = (n > 0) & (spread_a >= STILL)                                               # [k,D]
    if moves.any():
        r = torch.where(spread_p > STILL / 100, (pa - p * a) / (spread_p * spread_a), 0.0).clamp(-1, 1)    # [k,D]
        values = {"correlation": r, "coverage": 100 * spread_p / spread_a, "nl2": square.sqrt() / (aa.sqrt() + EPSILON)}
        out |= {name: value[moves].mean().item() for name, value in values.items()}
    return out
