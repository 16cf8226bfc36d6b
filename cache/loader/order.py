"""Which sample comes at which position: pure functions of (seed, position), integers only, no state, no I/O.

Positions count samples over the whole run and all ranks. They are cut into blocks of `BLOCK`; every block holds the
same number of samples of each dataset (its quota), in an order drawn from (seed, block). The k-th sample of a dataset
then is entry k mod N of a keyed permutation of its N samples, keyed anew each epoch. So any position is found without
walking to it, every sample comes once per epoch of its dataset, and ranks, threads and restarts change nothing.

That is the order "global". In "block" order, for slow disks, the permutation keeps neighbors near each other
(`Blocks`); the mixture is the same. "sequential" is no mixture: all samples of the first dataset in their order, then
of the next, and again from the beginning.

Letters: D datasets, N samples of one dataset, k how many samples of a dataset come before, in its epoch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np

from ...common.hashing import mix, permute, uniform
from ...errors import UserError, unknown

BLOCK = 4096  # positions in a block; mixture weights are rounded to multiples of 1/BLOCK
Order = Literal["global", "block", "sequential"]


def mixture(sizes: Sequence[int], exponent: float = 0.5, factors: Sequence[float] | None = None) -> np.ndarray:
    """`[D]` float64 shares ∝ factor · N^exponent (1: by size, 0: equal), summing to 1; an empty dataset gets 0.

    `factors` are the datasets' `sampling_weight`s, each positive (None: all 1)."""
    n = np.asarray(sizes, np.float64)
    shares = np.where(n > 0, np.maximum(n, 1) ** exponent, 0.0) * (
        1.0 if factors is None else np.asarray(factors, np.float64)
    )
    return shares / max(shares.sum(), 1e-300)


def override(shares: np.ndarray, names: Sequence[str], given: Mapping[str, float]) -> np.ndarray:
    """Fix the shares named in `given` (each in [0, 1]); the other datasets divide the rest as before.

    When every non-empty dataset is named, the given shares are scaled to sum to 1. `UserError` for an unknown name, an
    impossible share, or a share asked of a dataset without samples.
    """
    out, fixed = shares.copy(), np.zeros(len(names), bool)
    for name, share in given.items():
        if name not in names:
            raise unknown("dataset in weights", name, names)
        i = list(names).index(name)
        if not 0 <= share <= 1 or (share > 0 and shares[i] == 0):
            raise UserError(f"weight {share} of dataset '{name}' must lie in 0…1, and be 0 when it has no samples")
        out[i], fixed[i] = share, True
    taken, rest = out[fixed].sum(), out[~fixed].sum()
    if taken > 1 + 1e-9 or (rest == 0 and taken == 0):
        raise UserError(f"the weights given sum to {taken:g}; they must not exceed 1, nor all be 0")
    if rest == 0:
        return out / taken
    out[~fixed] *= (1 - taken) / rest
    return out


def quotas(shares: np.ndarray) -> np.ndarray:
    """`[D]` int64 samples per block, summing to BLOCK (largest remainders), at least 1 where the share is above 0."""
    if (shares > 0).sum() > BLOCK:
        raise UserError(f"{(shares > 0).sum()} datasets in one mixture; at most {BLOCK} are supported")
    exact = shares / shares.sum() * BLOCK
    out = np.where(shares > 0, np.maximum(np.floor(exact).astype(np.int64), 1), 0)
    while (gap := BLOCK - int(out.sum())) != 0:
        error = np.where(shares > 0, exact - out, -np.inf if gap > 0 else np.inf)
        if gap < 0:
            error[out <= 1] = np.inf
        out[int(error.argmax() if gap > 0 else error.argmin())] += 1 if gap > 0 else -1
    return out


@dataclass(frozen=True)
class Blocks:
    """How "block" order cuts the samples of one dataset, and a permutation of them that reads mostly side by side.

    Shards in permuted order are dealt into groups; the runs of a group are permuted and dealt into windows; the samples
    of a window are permuted. The last, shorter one of each kind stays the last. So at any time a window has to be in
    memory and a group on the machine, and a window holds pieces of many episodes.
    """

    shard: int  # samples of one shard
    run: int  # neighbors that stay in one window
    window: int  # samples shuffled among themselves: a multiple of `run`
    group: int  # shards of a group

    def permute(self, k: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
        """Image int64 [n] of `k` [n] (0 ≤ k < size) under a permutation of `size` samples keyed by `key` [n] uint64."""
        begin, length, within, count = self._window(k, size)
        within = permute(within, count, mix(key, 1, begin))  # samples of a window
        first = begin // self._group * self._group  # where its group begins
        run, step = np.divmod(begin - first + within, self.run)
        run = _permute_whole(run, length // self.run, mix(key, 2, first))  # runs of a group
        shard, step = np.divmod(first + run * self.run + step, self.shard)
        return _permute_whole(shard, np.asarray(size // self.shard), mix(key, 3)) * self.shard + step

    def window_of(self, k: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """(first, count) int64 [n] of the window that holds k."""
        begin, _, _, count = self._window(np.asarray(k), size)
        return begin, count

    @property
    def _group(self) -> int:
        return self.group * self.shard

    def _window(self, k: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """int64 [n] each: where the window of k begins, samples of its group, k within the window, its samples."""
        group, inside = np.divmod(k, self._group)
        length = np.minimum(self._group, size - group * self._group)
        window, within = np.divmod(inside, self.window)
        return k - within, length, within, np.minimum(self.window, length - window * self.window)


def _permute_whole(index: np.ndarray, whole: np.ndarray, key: np.ndarray) -> np.ndarray:
    """`permute` of the first `whole` items; a last item that is not whole stays where it is."""
    return np.where(
        index < whole, permute(np.minimum(index, np.maximum(whole - 1, 0)), np.maximum(whole, 1), key), index
    )


class SampleOrder:
    """The order of samples of D datasets of the given sizes, drawn with the given shares (any scale), for one seed.

    `blocks` [D]: for "block" order. In "sequential" order the shares say only which datasets are left out.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        shares: np.ndarray,
        seed: int,
        order: Order = "global",
        blocks: Sequence[Blocks] = (),
    ) -> None:
        if order not in get_args(Order):
            raise unknown("order", order, get_args(Order))
        self.sizes, self.seed, self.order, self.blocks = np.asarray(sizes, np.int64), seed, order, tuple(blocks)
        shares = np.asarray(shares, np.float64)
        if len(self.sizes) != len(shares) or ((shares > 0) & (self.sizes < 1)).any() or not shares.sum() > 0:
            raise ValueError(f"sizes {sizes} and shares {shares} do not match, or ask an empty dataset for samples")
        self.quotas = quotas(shares)
        self._pattern = np.repeat(np.arange(len(sizes)), self.quotas)  # [BLOCK] dataset of each draw, unshuffled
        self._draw = np.concatenate([np.arange(q) for q in self.quotas])  # [BLOCK] which draw of its dataset it is
        self._ends = np.cumsum(np.where(shares > 0, self.sizes, 0))  # [D] of "sequential" order
        self._block = lru_cache(maxsize=8)(self._make_block)

    def samples(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(dataset, index of the sample in it) at `position` int64 [n], in any order; int64 [n] each."""
        dataset, rank = self.draws(position)
        return dataset, self.index(dataset, rank)

    def draws(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(dataset, which draw of that dataset it is in the run) at `position` int64 [n], int64 [n] each."""
        if self.order == "sequential":
            epoch, at = np.divmod(position, self._ends[-1])
            dataset = np.searchsorted(self._ends, at, side="right")
            return dataset, at - self._ends[dataset] + (epoch + 1) * self.sizes[dataset]
        block, inside = np.divmod(position, BLOCK)
        dataset, rank = np.empty_like(position), np.empty_like(position)
        for b in np.unique(block):
            here = block == b
            datasets, draws = self._block(int(b))
            dataset[here], rank[here] = datasets[inside[here]], draws[inside[here]]
        return dataset, rank + block * self.quotas[dataset]

    def index(self, dataset: np.ndarray, rank: np.ndarray) -> np.ndarray:
        """Which sample of its dataset each draw is, int64 [n]."""
        epoch, k = np.divmod(rank, self.sizes[dataset])
        if self.order == "sequential":
            return k
        key = mix(self.seed, 1, dataset, epoch)
        if self.order == "global":
            return permute(k, self.sizes[dataset], key)
        out = np.empty_like(k)
        for d in np.unique(dataset):
            here = dataset == d
            out[here] = self.blocks[d].permute(k[here], int(self.sizes[d]), key[here])
        return out

    def windows(self, dataset: int, rank: np.ndarray) -> list[tuple[int, int]]:
        """The windows of "block" order with the draws `rank` [n] of a dataset, as ranges (first, end) of its draws."""
        size = int(self.sizes[dataset])
        epoch, k = np.divmod(rank, size)
        begin, count = self.blocks[dataset].window_of(k, size)
        begin += epoch * size
        return sorted(set(zip(begin.tolist(), (begin + count).tolist())))

    def positions(self, dataset: int, first: int, end: int) -> np.ndarray:
        """Inverse of `draws`: the positions int64 [end-first] of draws `first … end-1` of a dataset.

        Not in "sequential" order."""
        block, draw = np.divmod(np.arange(first, end, dtype=np.int64), self.quotas[dataset])
        out = np.empty_like(draw)
        for b in np.unique(block).tolist():
            here = block == b
            out[here] = b * BLOCK + np.flatnonzero(self._block(b)[0] == dataset)[draw[here]]
        return out

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """([BLOCK] dataset, [BLOCK] how many draws of that dataset come before it in the block)."""
        datasets = self._pattern[np.argsort(mix(self.seed, 2, block, np.arange(BLOCK)), kind="stable")]
        draws = np.empty(BLOCK, np.int64)
        draws[np.argsort(datasets, kind="stable")] = self._draw
        return datasets, draws


def held_out(dataset: str, episode_ids: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """`[E]` bool: the episodes kept for evaluation, by a hash of (seed, dataset, episode id).

    About `fraction` of them; at least one and never all when 0 < fraction < 1 and E ≥ 2, so that a small dataset has
    both parts; an only episode is never held out. `UserError` for a fraction outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise UserError(f"the held-out fraction is {fraction}; it must be at least 0 and below 1")
    name = int.from_bytes(hashlib.sha256(dataset.encode()).digest()[:8], "little")
    draw = uniform(seed, 3, name, np.asarray(episode_ids, np.int64))
    out = draw < fraction
    if fraction > 0 and len(draw):
        out[draw.argmin()], out[draw.argmax()] = True, False  # in this order: one episode stays in training
    return out
