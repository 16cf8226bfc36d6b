"""What the panels are drawn from: held-out observations, several chunks drawn for each, their drift, and the run's log.

Letters: N observations, G draws for each, T action steps, K datasets, τ temperatures. Everything is numpy; actions are
normalised.
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

MOST_SHOWN = 12  # dimensions in a panel that has a small picture for each


@dataclass
class PanelData:
    """One look at a run. `draws` [N,G,T,128], `target` [N,T,128] float32; `active` [N,T,128] bool: entries that count;
    `dataset` [N] int.

    `drift` [τ,N,G,T,128]: where one pull at each temperature would move the draws; `mean_square` [τ]. `center`,
    `half_range` [K,128] and `hz` [K] lead back to native units: value · half_range + center. `configured` and `drawn`
    [K]: shares of the training samples as the settings want them, and of those lately trained on; `log`: the lines of
    log.jsonl so far: these three are put in later.
    """

    step: int
    datasets: tuple[str, ...]
    embodiments: tuple[int, ...]  # of each dataset, an index into EMBODIMENTS
    dataset: np.ndarray
    target: np.ndarray
    draws: np.ndarray
    active: np.ndarray
    drift: np.ndarray
    mean_square: np.ndarray
    temperatures: tuple[float, ...]
    center: np.ndarray
    half_range: np.ndarray
    hz: np.ndarray
    held_out: bool = True  # else observations that are trained on, for lack of others
    configured: np.ndarray | None = None
    drawn: np.ndarray | None = None
    log: Sequence[dict[str, Any]] = field(default=(), repr=False)

    @property
    def pred(self) -> np.ndarray:
        """[N,T,128]: the first draw of each observation, as the policy would act."""
        return self.draws[:, 0]

    @functools.cached_property
    def used(self) -> list[int]:
        """Places that count somewhere, ascending."""
        return np.flatnonzero(self.active.any((0, 1))).tolist()

    @functools.cached_property
    def error(self) -> np.ndarray:
        """[N,T,128]: pred − target, NaN where an entry does not count."""
        return np.where(self.active, self.pred - self.target, np.nan)

    @functools.cached_property
    def apart(self) -> float:
        """RMS distance of the draws from their expert, in units of the expert's own spread: 1 for draws at the mean,
        1.4 for random ones."""
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
        """Of `pred`, by dataset, embodiment and place."""
        metrics = ActionMetrics(self.datasets, EMBODIMENTS)
        metrics.add(
            *(
                torch.from_numpy(np.ascontiguousarray(x))
                for x in (
                    self.pred,
                    self.target,
                    self.active,
                    self.dataset.astype(np.int64),
                    np.asarray(self.embodiments, np.int64)[self.dataset],
                )
            )
        )
        return metrics

    @functools.cached_property
    def result(self) -> dict[str, float]:
        """`metrics` over everything, with those of the set of chunks: "mmd", "mode_coverage"."""
        tensors = (
            torch.from_numpy(np.ascontiguousarray(x))
            for x in (self.pred, self.target, self.active, self.dataset.astype(np.int64))
        )
        return {**self.metrics.result(), **set_metrics(*tensors)}

    def of_slot(self, metric: str) -> np.ndarray:
        """[128] of a metric: mean over the datasets that define it, NaN where none does."""
        values = self.metrics.slots()[metric].numpy()  # [K,128]
        count = np.isfinite(values).sum(0)  # [128]
        return np.where(count > 0, np.nansum(values, 0) / np.maximum(count, 1), np.nan)

    def shown(self) -> list[int]:
        """At most `MOST_SHOWN` used places: those that the expert moves most, in their own order."""
        spread = [np.std(self.target[..., i][self.active[..., i]]) for i in self.used]
        return sorted(self.used[j] for j in np.argsort(spread)[::-1][:MOST_SHOWN])

    @functools.cached_property
    def groups(self) -> list[tuple[int, np.ndarray]]:
        """(dataset, its observations with a whole chunk), most observations first, none with fewer than 3: sets that
        can be compared."""
        found = []
        for k in np.unique(self.dataset):
            mine = self.dataset == k
            places = self.active[mine].any((0, 1))
            whole = np.flatnonzero(mine & self.active[:, :, places].all((1, 2)))
            if len(whole) >= 3:
                found.append((int(k), whole))
        return sorted(found, key=lambda group: -len(group[1]))

    def flat(self, chunks: np.ndarray, k: int, rows: np.ndarray) -> np.ndarray:
        """[len(rows),…,D] of chunks [N,…,T,128]: the entries of dataset k's places, T · places of them."""
        return chunks[rows][..., self.active[rows].any((0, 1))].reshape(*chunks[rows].shape[:-2], -1)

    @property
    def what(self) -> str:
        """What the observations are, for an axis or a note."""
        return "held-out observations" if self.held_out else "training observations"


def principal(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean [D], axes [2,D], shares [2] of the variance) of the two first principal components of values [n,D]; the
    sign of an axis is such that its largest entry is positive, so that pictures of one run can be compared."""
    mean = values.mean(0)
    _, spread, axes = np.linalg.svd(values - mean, full_matrices=False)
    axes = np.vstack([axes, np.zeros((2, axes.shape[1]))])[:2]
    shares = np.append(spread**2, (0, 0))[:2] / max((spread**2).sum(), 1e-30)
    signs = np.sign(axes[[0, 1], np.abs(axes).argmax(1)])
    return mean, axes * np.where(signs == 0, 1, signs)[:, None], shares
