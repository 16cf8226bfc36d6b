"""What panels show: predictions for held-out observations, several noise samples each, their drift, the run's log.

Letters: N observations, G noise samples of each, T action steps, K datasets, τ temperatures. Everything is NumPy;
actions are normalized.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ....cache.actions.slots import EMBODIMENTS
from ....drifting.metrics import ActionMetrics, set_metrics

MOST_SHOWN = 12  # dimensions in a panel with an axes for each


@dataclass
class PanelData:
    """Predictions of one step of a run. The last three fields are filled in later."""

    step: int
    datasets: tuple[str, ...]
    embodiments: tuple[int, ...]  # of each dataset, an index into EMBODIMENTS
    dataset: np.ndarray  # [N] int
    target: np.ndarray  # [N,T,128] float32, the expert's chunks
    draws: np.ndarray  # [N,G,T,128] float32, predicted chunks
    active: np.ndarray  # [N,T,128] bool, entries that count
    drift: np.ndarray  # [τ,N,G,T,128], by which one step at each temperature would move the predictions
    mean_square: np.ndarray  # [τ]
    temperatures: tuple[float, ...]
    center: np.ndarray  # [K,128]; native units are value · half_range + center
    half_range: np.ndarray  # [K,128]
    hz: np.ndarray  # [K]
    held_out: bool = True  # else training observations, where none are held out
    configured: np.ndarray | None = None  # [K] shares of the training samples in the settings
    drawn: np.ndarray | None = None  # [K] counts of the latest training samples
    log: Sequence[dict[str, Any]] = field(default=(), repr=False)  # lines of log.jsonl so far

    @property
    def pred(self) -> np.ndarray:
        """[N,T,128]: the prediction with the first noise sample, as the policy would act."""
        return self.draws[:, 0]

    @functools.cached_property
    def used(self) -> list[int]:
        """Slots that count somewhere, ascending."""
        return np.flatnonzero(self.active.any((0, 1))).tolist()

    @functools.cached_property
    def error(self) -> np.ndarray:
        """[N,T,128]: pred − target, NaN where an entry does not count."""
        return np.where(self.active, self.pred - self.target, np.nan)

    @functools.cached_property
    def apart(self) -> float:
        """RMS distance of predictions from their expert over the expert's spread: 1 at the mean, 1.4 at random."""
        active = np.broadcast_to(self.active[:, None], self.draws.shape)
        error = np.square((self.draws - self.target[:, None])[active]).mean()
        spread = []
        for k in np.unique(self.dataset):
            on, values = self.active[self.dataset == k], self.target[self.dataset == k]  # [n,T,128]
            mean = np.where(on, values, 0).sum((0, 1)) / np.maximum(on.sum((0, 1)), 1)  # [128]
            spread.append((values - mean)[on])
        return float(np.sqrt(error / max(np.square(np.concatenate(spread)).mean(), 1e-12)))

    @functools.cached_property
    def metrics(self) -> ActionMetrics:
        """Of `pred`, by dataset, embodiment and slot."""
        metrics = ActionMetrics(self.datasets, EMBODIMENTS)
        metrics.add(*self._tensors(), torch.from_numpy(np.asarray(self.embodiments, np.int64)[self.dataset]))
        return metrics

    @functools.cached_property
    def result(self) -> dict[str, float]:
        """`metrics` over everything, with those of the set of chunks: "mmd", "mode_coverage"."""
        return {**self.metrics.result(), **set_metrics(*self._tensors())}

    def _tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """`pred`, `target`, `active` and `dataset` for torch."""
        values = (self.pred, self.target, self.active, self.dataset.astype(np.int64))
        pred, target, active, dataset = (torch.from_numpy(np.ascontiguousarray(x)) for x in values)
        return pred, target, active, dataset

    def of_slot(self, metric: str) -> np.ndarray:
        """[128] of a metric: mean over the datasets that define it, NaN where none does."""
        values = self.metrics.slots()[metric].numpy()  # [K,128]
        count = np.isfinite(values).sum(0)  # [128]
        return np.where(count > 0, np.nansum(values, 0) / np.maximum(count, 1), np.nan)

    def shown(self) -> list[int]:
        """At most `MOST_SHOWN` used slots: those that the expert moves most, in their own order."""
        spread = [np.std(self.target[..., i][self.active[..., i]]) for i in self.used]
        return sorted(self.used[j] for j in np.argsort(spread)[::-1][:MOST_SHOWN])

    @functools.cached_property
    def groups(self) -> list[tuple[int, np.ndarray]]:
        """(dataset, its observations with a complete chunk), largest first: those with at least 3, to compare sets."""
        found = []
        for k in np.unique(self.dataset):
            mine = self.dataset == k
            used = self.active[mine].any((0, 1))
            complete = np.flatnonzero(mine & self.active[:, :, used].all((1, 2)))
            if len(complete) >= 3:
                found.append((int(k), complete))
        return sorted(found, key=lambda group: -len(group[1]))

    def flat(self, chunks: np.ndarray, k: int, rows: np.ndarray) -> np.ndarray:
        """[len(rows),…,D] of chunks [N,…,T,128]: the D = T · slots entries that dataset k uses."""
        return chunks[rows][..., self.active[rows].any((0, 1))].reshape(*chunks[rows].shape[:-2], -1)

    @property
    def what(self) -> str:
        """What the observations are, for a label."""
        return "held-out observations" if self.held_out else "training observations"


def grade(value: float, *steps: tuple[float, str], beyond: str) -> str:
    """The text of the first of the ascending `steps` whose limit exceeds `value`, else `beyond`."""
    return next((text for limit, text in steps if value < limit), beyond)


def principal(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean [D], axes [2,D], shares [2] of the variance) of the two first principal components of values [n,D].

    The largest entry of an axis is positive, so that figures of one run can be compared."""
    mean = values.mean(0)
    _, spread, axes = np.linalg.svd(values - mean, full_matrices=False)
    axes = np.vstack([axes, np.zeros((2, axes.shape[1]))])[:2]
    shares = np.append(spread**2, (0, 0))[:2] / max((spread**2).sum(), 1e-30)
    signs = np.sign(axes[[0, 1], np.abs(axes).argmax(1)])
    return mean, axes * np.where(signs == 0, 1, signs)[:, None], shares
