"""From cache to FeatureBatch: threads `preadv` features straight into reused batch buffers (batches.py), in a fixed global order
(sampling.py).

Letters: B batch, D datasets.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch

from ...batch import FeatureBatch
from ...errors import UserError
from ..store.cache import Cache, CacheDataset
from ..vlm.augment import draw_variants
from .assembler import Assembler, Draws, decoded
from .masking import ConditionMasking
from .order import Order, SampleOrder, held_out, mixture, override, quotas
from .prefetch import BatchIterator
from .read_ahead import ReadAhead, blocks_of

LIVE_VARIANTS = 1 << 16  # a live encoder makes any variant; so many differ
DRAWN_AHEAD = 4096  # samples of this rank whose draws are made in one go


def gather(
    cache: Cache,
    dataset_ids: np.ndarray,
    frame_rows: np.ndarray,
    horizon: int = 16,
    *,
    masked: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
    features: bool = True,
) -> FeatureBatch:
    """The batch of chosen frames, made by the loader's own code: `dataset_ids`, `frame_rows` int64 [B].

    `masked`: (text, images, proprio) bool [B] to replace by their nulls. `ValueError` for rows out of range or of
    quarantined episodes; `UserError` naming the shard for a damaged cache.
    """
    dataset, row = np.asarray(dataset_ids, np.int64), np.asarray(frame_rows, np.int64)
    none = np.zeros(len(row), bool)
    assembler = Assembler(cache, len(row), horizon, features, pinned=False)
    try:
        return decoded(
            assembler.fields.batch(
                assembler(Draws(dataset, row, *(masked or (none,) * 3), np.zeros(len(row), np.int64)))
            )
        )
    finally:
        assembler.files.close()


class Loader(BatchIterator):
    """An endless iterator of this rank's batches, [batch_size] samples each. Close it, or use it as a context manager.

    Sample position s of the run is the same sample for every `world_size`, `batch_size` and `threads`; the global batch
    is `world_size · batch_size` consecutive positions, of which rank r takes the r-th part. To resume, pass
    `start=state_dict()["offset"]`, on any number of ranks.

    `order`: "global" draws from all samples alike; "block", for disks and networks that are slow at random, shuffles runs of neighbours
    and the samples in a window of many runs, and reads each window ahead, front to back; "sequential" is the datasets' own order, one
    after the other, over and over, without a mixture. Each gives every sample of a dataset once per epoch of it.

    Batches come on `device` (None: the CPU), 8-bit tokens decoded there; on a CUDA device the next one is copied on a stream of
    its own while one is in use. Without a device on the CPU, `pinned` says whether the memory is (default: when there is a CUDA device):
    copy with `non_blocking=True` on the stream that is current when the batch is dropped.

    Only observations are sampled: every `frame_stride`-th frame of an episode. `augment` shows half of the samples in one of
    the cache's augmented variants (`UserError` when it has none; without `features` any variant goes).

    `split` "train" or "eval" leaves out or keeps the `holdout` fraction of each dataset's episodes, chosen by
    (`holdout_seed`, episode id); "all" takes every one. Quarantined episodes are never sampled. `temperature` and
    `weights` (dataset → share, in place of what its `sampling_weight` gives): see sampling.py. `features=False` gives
    tokens [B, 0, D], for a live encoder.
    """

    def __init__(
        self,
        cache: Cache,
        *,
        batch_size: int,
        horizon: int = 16,
        seed: int = 0,
        threads: int = 2,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        prefetch: int = 3,
        masking: ConditionMasking | None = None,
        split: Literal["train", "eval", "all"] = "train",
        holdout: float = 0.0,
        holdout_seed: int = 0,
        temperature: float = 0.5,
        weights: Mapping[str, float] | None = None,
        features: bool = True,
        pinned: bool | None = None,
        augment: bool = False,
        order: Order = "global",
        device: torch.device | str | None = None,
    ) -> None:
        if min(batch_size, horizon, threads, prefetch, world_size) < 1 or not 0 <= rank < world_size or start < 0:
            raise UserError(
                f"batch size {batch_size}, horizon {horizon}, threads {threads}, prefetch {prefetch} must "
                f"be at least 1, rank {rank} below world size {world_size}, start {start} at least 0"
            )
        if augment and features:
            require_variants(cache)
        self.cache, self.masking, self.seed = cache, masking or ConditionMasking(0.0, 0.0, 0.0), seed
        self._variants = 0 if not augment else cache.variants if features else LIVE_VARIANTS
        self._start = start
        self._episodes = [_episodes(d, split, holdout, holdout_seed) for d in cache.datasets]
        self._ends = [np.cumsum(d.episode_observations[e]) for d, e in zip(cache.datasets, self._episodes)]
        self.sizes = [int(ends[-1]) if len(ends) else 0 for ends in self._ends]  # samples of each dataset
        if not any(self.sizes):
            raise UserError(f"no episode of {cache.path} is in split {split} with holdout {holdout}; change it")
        factors = [float(d.attributes.get("sampling_weight", 1.0)) for d in cache.datasets]  # absent in older caches
        shares = override(mixture(self.sizes, temperature, factors), [d.name for d in cache.datasets], weights or {})
        self.order = SampleOrder(self.sizes, shares, seed, order, blocks_of(cache, quotas(shares)))
        self._drawn: OrderedDict[int, Draws] = OrderedDict()
        self._draw_lock = threading.Lock()

        super().__init__(
            cache,
            batch_size,
            horizon,
            features,
            rank=rank,
            threads=threads,
            prefetch=prefetch,
            start=start,
            global_batch=batch_size * world_size,
            device=device,
            pinned=pinned,
        )
        self._ahead = (
            ReadAhead(cache, self.order, self._assemble.files, self._draws_at, self._mine)
            if order == "block" and features
            else None
        )
        self._begin()

    def __repr__(self) -> str:
        episodes = sum(len(e) for e in self._episodes)
        return (
            f"Loader(samples {sum(self.sizes)}, episodes {episodes}, batch size {self._batch_size}, "
            f"horizon {self._assemble.horizon}, order {self.order.order}, offset {self._delivered}, {self.cache!r})"
        )

    def samples(self, offset: int) -> tuple[np.ndarray, np.ndarray]:
        """(dataset, frame row) int64 [batch_size] of this rank's batch whose global batch begins at `offset`."""
        draws = self._draws(offset)
        return draws.dataset, draws.row

    def masked(self, offset: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(text, images, proprio) bool [batch_size]: the conditions replaced by nulls in this rank's batch at `offset`."""
        draws = self._draws(offset)
        return draws.no_text, draws.no_images, draws.no_proprio

    def variants(self, offset: int) -> np.ndarray:
        """int64 [batch_size]: the augmented variant of each sample of this rank's batch at `offset`; 0 is the picture itself."""
        return self._draws(offset).variant

    def close(self) -> None:
        """Stop the threads and close the files. Batches already handed out stay valid."""
        if self._ahead is not None:
            self._ahead.close()
        super().close()

    def _flat(self, offset: int) -> torch.Tensor:
        if self._ahead is not None:
            self._ahead.need(self._positions(offset))
        return self._assemble(self._draws(offset))

    def _mine(self, position: np.ndarray) -> np.ndarray:
        """Which positions [n] this rank reads."""
        return (position >= self._start) & (
            (position - self._start) % self._global_batch // self._batch_size == self._rank
        )

    def _draws(self, offset: int) -> Draws:
        """What is drawn for this rank's batch at `offset`; of many batches at a time, since the work is one of many small operations."""
        step, odd = divmod(offset - self._start, self._global_batch)
        if odd or step < 0:
            return self._draws_at(self._positions(offset))
        steps = max(1, DRAWN_AHEAD // self._batch_size)
        part, at = divmod(step, steps)
        with self._draw_lock:
            if part not in self._drawn:
                begins = self._start + (part * steps + np.arange(steps)) * self._global_batch
                self._drawn[part] = self._draws_at((begins[:, None] + self._positions(0)).reshape(-1))
                while len(self._drawn) > 4:
                    self._drawn.popitem(last=False)
            return self._drawn[part][at * self._batch_size : (at + 1) * self._batch_size]

    def _draws_at(self, position: np.ndarray) -> Draws:
        """What is drawn at `position` [n]: a pure function of it and the seed."""
        dataset, rank = self.order.draws(position)
        index = self.order.index(dataset, rank)
        row = np.empty_like(index)
        for d in np.unique(dataset):
            here, source = dataset == d, self.cache.datasets[d]
            k = np.searchsorted(self._ends[d], index[here], side="right")  # which of the split's episodes
            episode = self._episodes[d][k]
            step = index[here] - (self._ends[d][k] - source.episode_observations[episode])
            row[here] = source.episode_start[episode] + step * source.frame_stride
        return Draws(
            dataset, row, *self.masking.draw(self.seed, position), draw_variants(self.seed, position, self._variants)
        )


def require_variants(cache: Cache) -> None:
    """`UserError` for a cache that cannot honour training on augmented pictures."""
    if not cache.variants:
        raise UserError(
            f"cache {cache.path} holds no augmented pictures; build it with --augment 4, or train without augmentation"
        )


def _episodes(source: CacheDataset, split: str, holdout: float, seed: int) -> np.ndarray:
    """Positions int64 of the dataset's usable episodes in a split."""
    usable = np.flatnonzero(~source.quarantined)
    out = held_out(source.name, source.episode_id[usable], holdout, seed)
    chosen = {"train": ~out, "eval": out, "all": np.ones_like(out)}
    if split not in chosen:
        raise UserError(f"split '{split}' is not one of {', '.join(chosen)}")
    return usable[chosen[split]]
