"""Every measure of predicted actions: those of evaluations, panels and toys.

1. `ActionMetrics`: prediction by prediction; masked, per dataset, embodiment and slot, from sums that ranks can add.
2. `mmd`, `mode_coverage`, `sliced_wasserstein`: a set of predictions against a set of expert actions, without pairs.
3. `mode_metrics`: samples of one observation against modes that are known.
4. `drift_of`: where drifting would move samples, and λ, how strongly, at each temperature.

All of the first are in normalized units and count an entry where its slot is active for the dataset and its step lies
before the episode's end. For a dataset k and an active slot d, over the entries (p prediction, a expert), N of them:

    mse_kd, mae_kd    mean of (p − a)², of |p − a|
    correlation_kd    Pearson's r of p and a; 0 for a prediction that never changes
    coverage_kd       100 · σ(p) / σ(a), percent: how much of the expert's range the predictions span; 100 is all, near
                      0 a collapse
    nl2_kd            sqrt(mse_kd) / (rms(a) + 1e-3): the error as a share of the size of the actions; a policy that
                      always predicts the dataset's mean has about 1 in normalized slots

`coverage` takes the standard deviation as the range: largest minus smallest value would grow with the number of
samples, hang on a single outlier and not add up over ranks. `nl2` is the l2 error of RDT-1B's evaluation with its ε;
its norm is that of the actions, since a dataset of velocities has no state in the same slots.

mse and mae of a group (a dataset, an embodiment, everything) pool all its entries. The other three are means over the
group's (dataset, slot) pairs, never pooled over datasets: their different means alone would correlate. A slot that the
expert does not move (σ(a) < 1e-4) has no range and no correlation: it counts in mse and mae only. A metric that no slot
of a group defines is left out.

Letters: B observations, T action steps, K datasets, E embodiments, D = 128 slots (entries of a sample in 2 to 4); n, m
samples of a set, G noise samples per observation, M modes, τ the drift temperatures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch import UNIFIED_DIM, FeatureBatch
from .config import LossConfig
from .field import grouped_drifting_field
from .losses import counting

METRICS = ("mse", "mae", "correlation", "coverage", "nl2")
EPSILON = 1e-3  # of nl2, normalized units
STILL = 1e-4  # standard deviation under which an expert's slot counts as constant, normalized units
_MOMENTS = 8  # N, Σp, Σa, Σp², Σa², Σpa, Σ(p−a)², Σ|p−a|


class ActionMetrics:
    """Metrics over any number of batches. `datasets`, `embodiments`: names by their numbers in `FeatureBatch`.

    >>> metrics.update(pred, batch); metrics.result()["mse"]
    """

    def __init__(self, datasets: Sequence[str], embodiments: Sequence[str]) -> None:
        self.datasets, self.embodiments = tuple(datasets), tuple(embodiments)
        self._moments = torch.zeros(len(self.datasets), _MOMENTS, UNIFIED_DIM, dtype=torch.float64)  # [K,8,D]
        self._seen = torch.zeros(len(self.datasets), len(self.embodiments), dtype=torch.float64)  # [K,E] observations

    @torch.no_grad()
    def update(self, pred: Tensor, batch: FeatureBatch) -> None:
        """Add the predictions `pred` [B,T,128], normalized, of any float dtype. Nothing waits for the device."""
        if pred.shape != batch.action.shape:
            raise ValueError(f"pred: expected {tuple(batch.action.shape)}, got {tuple(pred.shape)}")
        self.add(pred, batch.action, counting(batch), batch.dataset, batch.embodiment)

    @torch.no_grad()
    def add(self, pred: Tensor, action: Tensor, active: Tensor, dataset: Tensor, embodiment: Tensor) -> None:
        """As `update`: `pred`, `action` [B,T,128], `active` [B,T,128] bool, `dataset`, `embodiment` [B] int64."""
        p, a = (x.double().masked_fill(~active, 0) for x in (pred, action))  # [B,T,D]
        error = p - a  # [B,T,D]
        entries = torch.stack(
            [active.double(), p, a, p * p, a * a, p * a, error * error, error.abs()], dim=1
        )  # [B,8,T,D]
        self._moments, self._seen = self._moments.to(pred.device), self._seen.to(pred.device)
        self._moments.index_add_(0, dataset, entries.sum(2))
        self._seen.index_put_(
            (dataset, embodiment), torch.ones(len(dataset), dtype=torch.float64, device=pred.device), accumulate=True
        )

    def sums(self) -> Tensor:
        """[n] float64 on the device of the predictions: add those of all ranks and give the sum to `load_sums`."""
        return torch.cat([self._moments.flatten(), self._seen.flatten()])

    def load_sums(self, sums: Tensor) -> None:
        """Continue as if this object had seen the batches behind `sums`."""
        moments, seen = sums.split([self._moments.numel(), self._seen.numel()])
        self._moments, self._seen = moments.clone().view_as(self._moments), seen.clone().view_as(self._seen)

    def result(self) -> dict[str, float]:
        """ "<metric>" over everything, "<metric>/<dataset>", "<metric>/embodiment/<name>" of those with
        observations."""
        moments, seen = self._moments.cpu(), self._seen.cpu()
        groups = {"": torch.ones(len(self.datasets), dtype=torch.bool)}  # [K] bool each
        groups |= {f"/{name}": torch.arange(len(self.datasets)) == k for k, name in enumerate(self.datasets)}
        groups |= {f"/embodiment/{name}": seen[:, e] > 0 for e, name in enumerate(self.embodiments)}
        return {
            f"{metric}{suffix}": value
            for suffix, mine in groups.items()
            if seen[mine].any()
            for metric, value in _metrics(moments[mine]).items()
        }

    def slots(self) -> dict[str, Tensor]:
        """metric → [K,D] float64 of every dataset and slot; NaN where it is not defined."""
        n, values, moves = _by_slot(self._moments.cpu())
        return {
            name: torch.where(n > 0 if name in METRICS[:2] else moves, value, math.nan)
            for name, value in values.items()
        }


def _metrics(moments: Tensor) -> dict[str, float]:
    """The defined metrics of the datasets whose moments [k,8,D] are given."""
    n, square, absolute = moments[:, 0], moments[:, 6], moments[:, 7]  # [k,D] each
    if not n.any():
        return {}
    out = {"mse": (square.sum() / n.sum()).item(), "mae": (absolute.sum() / n.sum()).item()}
    _, values, moves = _by_slot(moments)
    if moves.any():
        out |= {name: values[name][moves].mean().item() for name in METRICS[2:]}
    return out


def _by_slot(moments: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """(N [k,D], metric → [k,D], which slots the expert moves [k,D] bool) of moments [k,8,D]."""
    n = moments[:, 0]  # [k,D]
    p, a, pp, aa, pa, square, absolute = (x / n.clamp(min=1) for x in moments[:, 1:].unbind(1))  # means, [k,D]
    spread_p, spread_a = ((x2 - x * x).clamp(min=0).sqrt() for x, x2 in ((p, pp), (a, aa)))  # σ, [k,D]
    moves = (n > 0) & (spread_a >= STILL)  # [k,D]
    r = torch.where(spread_p > STILL / 100, (pa - p * a) / (spread_p * spread_a), 0.0).clamp(-1, 1)  # [k,D]
    values = {
        "mse": square,
        "mae": absolute,
        "correlation": r,
        "coverage": 100 * spread_p / spread_a,
        "nl2": square.sqrt() / (aa.sqrt() + EPSILON),
    }
    return n, values, moves


# --- a set against a set ---------------------------------------------------------------------------------------------


def mmd(x: Tensor, y: Tensor) -> float:
    """Squared maximum mean discrepancy of two sets [n,D] whose rows i belong to the same observation.

    The unbiased estimate of Gretton et al. 2012 (JMLR 13, eq. 4), which leaves each pair (i, i) out: 0 on average for
    two samples of one distribution, exactly 0 for x = y, and it can be slightly negative. The kernel is the mean of
    three Gaussians whose widths are ½, 1 and 2 times the median distance within `y`, the expert. ValueError for n <
    2."""
    if x.shape != y.shape or x.ndim != 2 or len(x) < 2:
        raise ValueError(
            f"expected two sets [n,D] of one size, n at least 2, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    xx, yy, xy = (torch.cdist(a.double(), b.double()).square() for a, b in ((x, x), (y, y), (x, y)))  # [n,n]
    others = ~torch.eye(len(x), dtype=torch.bool, device=x.device)  # [n,n]
    width = yy[others].median().clamp(min=1e-12)  # []
    terms = [torch.exp(-d[others] / (2 * s * s * width)).mean() for s in (0.5, 1.0, 2.0) for d in (xx, yy, xy, xy.T)]
    return float(sum(sign * term for sign, term in zip((1, 1, -1, -1) * 3, terms)) / 3)


def mode_coverage(x: Tensor, y: Tensor, cells: int = 10) -> float:
    """Share of modes that a set reaches where the modes are not known: of the cells into which k-means cuts the
    expert's samples `y` [m,D], those that get at least a quarter of the share of `x` [n,D] that they have of `y`; 1 for
    x = y, 1/cells for a collapse.

    Cells as modes: Richardson and Weiss 2018 (arXiv:1805.12462). At most m/4 cells; deterministic. ValueError for m <
    8."""
    if len(y) < 8:
        raise ValueError(f"{len(y)} expert samples are too few for cells; give at least 8")
    x, y = x.double(), y.double()
    center = y[[(y - y.mean(0)).square().sum(1).argmin().item()]]  # [cells,D]: begun far from each other
    for _ in range(min(cells, len(y) // 4) - 1):
        center = torch.cat([center, y[[torch.cdist(y, center).min(1).values.argmax().item()]]])
    for _ in range(20):
        mine = torch.nn.functional.one_hot(torch.cdist(y, center).argmin(1), len(center)).to(y)  # [m,cells]
        count = mine.sum(0)[:, None]  # [cells,1]
        center = torch.where(count > 0, mine.T @ y / count.clamp(min=1), center)
    of_y, of_x = (torch.cdist(z, center).argmin(1).bincount(minlength=len(center)) / len(z) for z in (y, x))  # [cells]
    return ((of_x >= of_y / 4) & (of_x > 0)).double().mean().item()


def set_metrics(pred: Tensor, action: Tensor, active: Tensor, dataset: Tensor) -> dict[str, float]:
    """ "mmd" and "mode_coverage" (percent) of chunks `pred`, `action` [B,T,128] with `active` [B,T,128] and `dataset`
    [B]: means over the datasets by their number of complete chunks; those that the episode's end cuts are left out, as
    are datasets with fewer than 8."""
    found: list[tuple[int, float, float]] = []
    for k in dataset.unique().tolist():
        mine = dataset == k  # [B]
        slots = active[mine].flatten(0, 1).any(0)  # [128]
        whole = mine & (active | ~slots).flatten(1).all(1)  # [B]
        x, y = (chunks[whole][..., slots].flatten(1).cpu() for chunks in (pred, action))  # [n,D]
        if len(x) >= 8:
            found.append((len(x), mmd(x, y), 100 * mode_coverage(x, y)))
    total = sum(n for n, _, _ in found)
    return (
        {name: sum(row[0] * row[i] for row in found) / total for i, name in ((1, "mmd"), (2, "mode_coverage"))}
        if found
        else {}
    )


def sliced_wasserstein(x: Tensor, y: Tensor, directions: int = 32) -> float:
    """Sliced 2-Wasserstein distance of two equally large sets [n,2]: exact in each of so many evenly spaced directions,
    root mean square over them. ValueError for other shapes. (arXiv:1902.00434; in the plane even spacing needs no
    chance.)"""
    if x.shape != y.shape or x.ndim != 2 or x.shape[1] != 2:
        raise ValueError(f"expected two sets [n,2] of one size, got {tuple(x.shape)} and {tuple(y.shape)}")
    angle = math.pi * torch.arange(directions) / directions  # [directions]
    unit = torch.stack([angle.cos(), angle.sin()])  # [2,directions]
    return ((x @ unit).sort(0).values - (y @ unit).sort(0).values).square().mean().sqrt().item()


# --- draws against known modes ---------------------------------------------------------------------------------------

OFF = 0.25  # a sample further from all modes than this share of the distance between the nearest two is off them
COVERED = 0.1  # each mode must get this share of the samples


@dataclass(frozen=True)
class ModeMetrics:
    """Means over observations; the first two need a perfect expert's values beside them (finite samples)."""

    share_error: float  # |share of samples nearest to a mode − truth|, the largest over the modes
    coverage: float  # share of observations where each mode gets at least COVERED of the samples; off all: of none
    between: float  # share of samples off all modes
    distance: float  # root mean square per entry from a sample to its nearest mode, averaged


def mode_metrics(draws: Tensor, center: Tensor, share: Tensor) -> ModeMetrics:
    """Of chunks `draws` [B,G,D] against the expert's modes `center` [B,M,D], M ≥ 2, of probability `share` [B,M]."""
    itself = torch.eye(center.shape[1], dtype=torch.bool)  # [M,M]
    apart = torch.cdist(center, center).masked_fill(itself, math.inf).flatten(1).min(1).values  # [B]
    near, which = torch.cdist(draws, center).min(2)  # [B,G] each
    taken = which[..., None] == torch.arange(center.shape[1])  # [B,G,M]
    off = near > OFF * apart[:, None]  # [B,G]
    hits = (taken & ~off[..., None]).float().mean(1)  # [B,M]
    return ModeMetrics(
        share_error=(taken.float().mean(1) - share).abs().max(1).values.mean().item(),
        coverage=(hits.min(1).values >= COVERED).float().mean().item(),
        between=off.float().mean().item(),
        distance=(near / math.sqrt(draws.shape[2])).mean().item(),
    )


# --- drift -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drift:
    """`step` [τ,B,G,T,128]: where one pull at each temperature would move every entry, in the units of the actions, 0
    where an entry does not count. `mean_square` [τ]: mean of the pulls' squares in units of the mean distance, as
    training logs it."""

    step: Tensor
    mean_square: Tensor


@torch.no_grad()
def drift_of(draws: Tensor, action: Tensor, active: Tensor, embodiment: Tensor, config: LossConfig) -> Drift:
    """The drift of complete chunks `draws` [B,G,T,128] towards their own expert chunk `action` [B,T,128] and away from
    each other, by `config`'s temperatures and floor; `active` [B,T,128] bool, `embodiment` [B]."""
    steps, means = [], []
    for tau in config.temperatures:
        field = grouped_drifting_field(
            draws.flatten(2),
            action[:, None].flatten(2),
            active=active.flatten(1),
            group=embodiment,
            groups=config.embodiments,
            temperatures=(tau,),
            floor=config.floor,
        )
        square = field.mean_square[0, embodiment]  # [B]
        steps.append((field.force * (square.sqrt() * field.unit)[:, None, None]).view_as(draws))  # [B,G,T,128]
        means.append(square[field.entries > 0].mean())  # []
    return Drift(torch.stack(steps), torch.stack(means))


def drift_strength(mean_square: Sequence[float], temperatures: Sequence[float]) -> dict[str, float]:
    """ "lambda/<τ>" → λ, ln of mean(F²): it falls while the samples approach the expert; the drifting loss does not."""
    return {f"lambda/{tau:g}": math.log(max(value, 1e-30)) for tau, value in zip(temperatures, mean_square)}
