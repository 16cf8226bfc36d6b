"""From cache to `Sample`s: threads `preadv` features into reused batch buffers (assembler.py), in a fixed order
(order.py).

Letters: B batch, D datasets.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from ...batch import FeatureBatch
from ...errors import UserError
from ..actions.history import ALONE, NO_HISTORY, History
from ..store.cache import Cache
from ..store.dataset import CacheDataset
from ..store.samples import require_history
from ..vlm.augment import draw_variants
from .assembler import Assembler, decoded
from .dropout import NO_DROPOUT, ConditionDropout
from .order import Order, SampleOrder, held_out, mixture, override, quotas
from .prefetch import Prefetch
from .read_ahead import ReadAhead, blocks_of
from .sample import Draws, Sample

LIVE_VARIANTS = 1 << 16  # a live encoder makes any variant; so many differ
DRAWN_AHEAD = 4096  # observations of this rank that are drawn in one go
Split = Literal["train", "eval", "all"]


def gather(
    cache: Cache,
    dataset_ids: np.ndarray,
    frame_rows: np.ndarray,
    horizon: int = 16,
    *,
    dropped: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
    features: bool = True,
    history: History = NO_HISTORY,
) -> FeatureBatch:
    """The batch of chosen frames, made by the loader's own code: `dataset_ids`, `frame_rows` int64 [B].

    `dropped`: (text, images, proprio) bool [B], to be replaced by their null embeddings. `ValueError` for rows out of
    range or of quarantined episodes; `UserError` naming the shard for a damaged cache.
    """
    dataset, row = np.asarray(dataset_ids, np.int64), np.asarray(frame_rows, np.int64)
    none = np.zeros(len(row), bool)
    no_text, no_images, no_proprio = dropped or (none, none, none)
    assembler = Assembler(cache, len(row), horizon, features, pinned=False, history=history)
    try:
        flat = assembler(Draws(dataset, row, no_text, no_images, no_proprio, np.zeros(len(row), np.int64)))
        return decoded(assembler.fields.batch(flat))
    finally:
        assembler.files.close()


class _Observations:
    """The observations of a split: those to train on of its usable episodes, numbered within each dataset.

    `sizes` [D] is their number, `episodes` that of all their episodes. Quarantined episodes are never among them."""

    def __init__(self, cache: Cache, split: Split, holdout: float) -> None:
        self._datasets = cache.datasets
        self._episodes = [_episodes(d, split, holdout) for d in cache.datasets]
        self._ends = [np.cumsum(d.episode_observations[e]) for d, e in zip(cache.datasets, self._episodes)]
        # frames by number, where some are idle; without, they are found from the episode: no memory per observation
        self._frames = [None if d.idle is None else d.samples(e) for d, e in zip(cache.datasets, self._episodes)]
        self.sizes = [
            len(frames) if frames is not None else int(ends[-1]) if len(ends) else 0
            for frames, ends in zip(self._frames, self._ends)
        ]
        self.episodes = sum(map(len, self._episodes))
        if not any(self.sizes):
            raise UserError(f"no episode of {cache.path} is in split {split} with holdout {holdout}; change it")

    def rows(self, dataset: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Frame rows [n] of the observations `index` [n] of the datasets `dataset` [n], int64 each."""
        row = np.empty_like(index)
        for d in np.unique(dataset):
            here, source, frames = dataset == d, self._datasets[d], self._frames[d]
            if frames is not None:
                row[here] = frames[index[here]]
                continue
            k = np.searchsorted(self._ends[d], index[here], side="right")  # which of the split's episodes
            episode = self._episodes[d][k]
            row[here] = source.frame_of(index[here] - self._ends[d][k] + source.observation_ends[episode])
        return row


class Loader:
    """An endless iterator of this rank's `Sample`s, batches of `batch_size` observations.

        with Loader(Cache.open(folder), batch_size=64) as loader:
            for sample in loader:
                loss(sample.batch)

    Position s of the run is the same observation for every `world_size`, `batch_size` and `threads`; the global batch
    is `world_size · batch_size` consecutive positions, of which rank r takes the r-th part. To resume after a sample,
    pass `start=sample.next_offset`, on any number of ranks.

    Args:
        horizon: T, action steps of a chunk.
        threads, prefetch: how many threads read, and how many batches ahead.
        dropout: probabilities of dropped conditions (None: nothing is dropped).
        split, holdout: "train" or "eval" leaves out or keeps the `holdout` fraction of each dataset's episodes, chosen
            by episode id; "all" takes every one. Quarantined episodes are never sampled.
        mixture_exponent, weights: the share of a dataset is ∝ sampling_weight · size^exponent, or what `weights`
            (dataset → share) says; see order.py.
        history: offsets in frames of the images of a sample, 0 (the current one) first, as (0, -4, -8). Those before
            its episode's start, or without features, are zeros and masked.
        proprio_history: the same of the state; earlier ones are `past_proprio`.
        features: False gives tokens [B, 0, D], for a live encoder.
        augment: half of the observations show one of the cache's augmented variants (`UserError` when it has none;
            without `features` any variant goes).
        order: "global" shuffles all observations; "block", for disks and networks that are slow at random access,
            shuffles runs of neighbors and the observations in a window of many runs, and reads each window ahead,
            front to back; "sequential" is the datasets' own order, one after the other, over and over, without a
            mixture. Each gives every observation of a dataset once per epoch of it.
        ahead: called by the reading threads with what is drawn for a batch to come; a sample carries what it returns.
        device: where batches come (None: the CPU, in pinned memory where there is a CUDA device: copy with
            `non_blocking=True` on the stream that is current when the batch is dropped), 8-bit tokens decoded there. To
            a CUDA device the next batch is copied on a stream of its own while one is in use.
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
        dropout: ConditionDropout | None = None,
        split: Split = "train",
        holdout: float = 0.0,
        mixture_exponent: float = 0.5,
        weights: Mapping[str, float] | None = None,
        features: bool = True,
        augment: bool = False,
        order: Order = "global",
        device: torch.device | str | None = None,
        history: Sequence[int] = ALONE,
        proprio_history: Sequence[int] = ALONE,
        ahead: Callable[[Draws], Any] | None = None,
    ) -> None:
        if min(batch_size, horizon, threads, prefetch, world_size) < 1 or not 0 <= rank < world_size or start < 0:
            raise UserError(
                f"batch size {batch_size}, horizon {horizon}, threads {threads}, prefetch {prefetch} must "
                f"be at least 1, rank {rank} below world size {world_size}, start {start} at least 0"
            )
        past = History(tuple(history), tuple(proprio_history))
        require_history(cache, past)
        if augment and features:
            require_variants(cache)
        self._variants = 0 if not augment else cache.variants if features else LIVE_VARIANTS
        self.cache, self._seed, self._dropout = cache, seed, dropout or NO_DROPOUT
        self._rank, self._batch_size, self._global_batch = rank, batch_size, batch_size * world_size
        self._observations = _Observations(cache, split, holdout)
        self.sizes = self._observations.sizes  # [D] observations of each dataset
        factors = [float(d.attributes.get("sampling_weight", 1.0)) for d in cache.datasets]  # absent in older caches
        names = [d.name for d in cache.datasets]
        shares = override(mixture(self.sizes, mixture_exponent, factors), names, weights or {})
        self.order = SampleOrder(self.sizes, shares, seed, order, blocks_of(cache, quotas(shares)))
        self._drawn: OrderedDict[int, Draws] = OrderedDict()
        self._draw_lock = threading.Lock()
        self._make_ahead, self._made_ahead = ahead, dict[int, Any]()  # by offset
        self._start = self._offset = start

        target = torch.device(device or "cpu")
        copied = target.type == "cuda"
        self._assemble = Assembler(
            cache, batch_size, horizon, features, copied or torch.cuda.is_available(), awaited=copied, history=past
        )
        self._ahead = None
        if order == "block" and features:
            self._ahead = ReadAhead(cache, self.order, self._assemble.files, self._draws_at, self._mine, past.frames)
        offsets = itertools.count(start, self._global_batch)
        self._batches = Prefetch(
            self._flat, self._assemble.fields, offsets, threads=threads, ahead=prefetch, device=target
        )

    def __repr__(self) -> str:
        return (
            f"Loader(samples {sum(self.sizes)}, episodes {self._observations.episodes}, batch size {self._batch_size}, "
            f"horizon {self._assemble.horizon}, order {self.order.order}, offset {self._offset}, {self.cache!r})"
        )

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Sample:
        batch, offset = next(self._batches), self._offset
        self._offset += self._global_batch
        return Sample(batch, self.draws(offset), offset, self._offset, self._made_ahead.pop(offset, None))

    @property
    def wait_seconds(self) -> float:
        """Seconds that `next` has waited for data so far."""
        return self._batches.wait_seconds

    def draws(self, offset: int) -> Draws:
        """What is drawn for this rank's part of the global batch at `offset`: a pure function of it and the seed."""
        step, odd = divmod(offset - self._start, self._global_batch)
        if odd or step < 0:
            return self._draws_at(self._positions(offset))
        steps = max(1, DRAWN_AHEAD // self._batch_size)  # many batches at a time: the work is many small operations
        part, at = divmod(step, steps)
        with self._draw_lock:
            if part not in self._drawn:
                begins = self._start + (part * steps + np.arange(steps)) * self._global_batch
                self._drawn[part] = self._draws_at((begins[:, None] + self._positions(0)).reshape(-1))
                while len(self._drawn) > 4:
                    self._drawn.popitem(last=False)
            return self._drawn[part][at * self._batch_size : (at + 1) * self._batch_size]

    def close(self) -> None:
        """Stop the threads and close the files. Batches already handed out stay valid."""
        if self._ahead is not None:
            self._ahead.close()
        self._batches.close()
        self._assemble.files.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _flat(self, offset: int) -> torch.Tensor:
        """The flat buffer of this rank's batch at `offset`."""
        if self._ahead is not None:
            self._ahead.need(self._positions(offset))
        drawn = self.draws(offset)
        if self._make_ahead is not None:
            self._made_ahead[offset] = self._make_ahead(drawn)
        return self._assemble(drawn)

    def _positions(self, offset: int) -> np.ndarray:
        """Positions [B] of this rank's part of the global batch at `offset`."""
        return offset + self._rank * self._batch_size + np.arange(self._batch_size)

    def _mine(self, position: np.ndarray) -> np.ndarray:
        """Which positions [n] this rank reads."""
        since = position - self._start
        return (since >= 0) & (since % self._global_batch // self._batch_size == self._rank)

    def _draws_at(self, position: np.ndarray) -> Draws:
        """What is drawn at `position` [n]."""
        dataset, index = self.order.samples(position)
        row = self._observations.rows(dataset, index)
        variant = draw_variants(self._seed, position, self._variants)
        return Draws(dataset, row, *self._dropout.draw(self._seed, position), variant)


def require_variants(cache: Cache) -> None:
    """`UserError` for a cache that cannot honor training on augmented images."""
    if not cache.variants:
        raise UserError(
            f"cache {cache.path} holds no augmented images; build it with --augment 4, or train without augmentation"
        )


def _episodes(source: CacheDataset, split: Split, holdout: float) -> np.ndarray:
    """Positions int64 of the dataset's usable episodes in a split."""
    usable = np.flatnonzero(~source.quarantined)
    out = held_out(source.name, source.episode_id[usable], holdout, 0)
    chosen = {"train": ~out, "eval": out, "all": np.ones_like(out)}
    if split not in chosen:
        raise UserError(f"split '{split}' is not one of {', '.join(chosen)}")
    return usable[chosen[split]]
