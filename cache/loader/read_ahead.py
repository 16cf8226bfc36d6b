"""Reading ahead in "block" order: whole windows, front to back, before their samples are read at random.

A window is some GiB over all datasets, so it stays in the machine's page cache until it is used up. While one is in
use the next is read.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from ...errors import UserError
from ..actions.history import ALONE
from ..store.cache import Cache
from ..store.shard_reader import ShardFiles
from .order import BLOCK, Blocks, SampleOrder
from .sample import Draws

RUN_NBYTES = 8 << 20  # of one view, read in one go
WINDOW_NBYTES = 2 << 30  # of all datasets and views, shuffled among themselves
GROUP = 16  # shards of a view from which windows are drawn, at least
THREADS = 4  # shards that are read, or fetched, at the same time
KEPT = 8  # windows of a dataset that are remembered


def blocks_of(cache: Cache, quotas: np.ndarray) -> list[Blocks]:
    """How "block" order cuts each dataset, from the size of its records, its shards and its share (`quotas` [D] of
    `SampleOrder`); nothing depends on the machine."""
    out, record = [], cache.format.record_nbytes(cache.tokens, cache.width)
    for d, quota in zip(cache.datasets, quotas.tolist()):
        run = max(1, RUN_NBYTES // record)
        runs = max(8, WINDOW_NBYTES * quota // (BLOCK * record * len(d.views) * run))
        out.append(Blocks(d.shard_frames, run, run * runs, max(GROUP, -(-run * runs // d.shard_frames))))
    return out


class ReadAhead:
    """Brings the windows of an order's samples into memory, and shards of a remote cache onto this machine.

    `draws_at(position [n])` says what is read there, with the frames at `offsets` from each; `mine(position [n])` bool,
    which positions this process reads."""

    def __init__(
        self,
        cache: Cache,
        order: SampleOrder,
        files: ShardFiles,
        draws_at: Callable[[np.ndarray], Draws],
        mine: Callable[[np.ndarray], np.ndarray],
        offsets: tuple[int, ...] = ALONE,
    ) -> None:
        self._cache, self._order, self._files, self._draws_at, self._mine = cache, order, files, draws_at, mine
        self._offsets = offsets
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="dvla-ahead")
        self._windows: list[OrderedDict[int, list[Future[None]]]] = [OrderedDict() for _ in cache.datasets]
        self._lock = threading.Lock()

    def need(self, position: np.ndarray) -> None:
        """Wait until the windows of the samples at `position` [n] are read, and begin with the next ones."""
        dataset, rank = self._order.draws(position)
        with self._lock:
            waiting = []
            for d in np.unique(dataset).tolist():
                windows = self._order.windows(d, rank[dataset == d])
                for first, end in windows:
                    waiting += self._start(d, first, end)
                self._start(d, *self._order.windows(d, np.array([windows[-1][1]]))[0])
        for future in waiting:
            future.result()

    def close(self) -> None:
        """Stop, after what has begun."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _start(self, d: int, first: int, end: int) -> list[Future[None]]:
        known = self._windows[d]
        if first not in known:
            position = self._order.positions(d, first, end)
            position = position[self._mine(position)]
            draws = self._draws_at(position)
            draws = draws[~draws.no_images]
            known[first] = [
                self._threads.submit(self._advise, d, view, rows, k)
                for k in np.unique(draws.variant).tolist()
                for rows in self._by_shard(d, self._frames(d, draws.row[draws.variant == k]))
                for view in self._cache.datasets[d].views
            ]
            while len(known) > KEPT:
                known.popitem(last=False)
        return known[first]

    def _frames(self, d: int, rows: np.ndarray) -> np.ndarray:
        """The frames that samples at `rows` read, ascending."""
        rows, there = self._cache.datasets[d].earlier(rows, self._offsets)
        return np.unique(rows[there])

    def _by_shard(self, d: int, rows: np.ndarray) -> list[np.ndarray]:
        """Frames `rows`, ascending, split where another shard begins."""
        source = self._cache.datasets[d]
        shard = source.observation_of(rows) // source.shard_frames
        return np.split(rows, np.flatnonzero(np.diff(shard)) + 1) if len(rows) else []

    def _advise(self, d: int, view: str, rows: np.ndarray, variant: int) -> None:
        with contextlib.suppress(UserError):  # whoever reads it reports it
            self._cache.datasets[d].advise(view, rows, self._files, variant)
