"""Orders of the loader: every sample once per pass, the same for any ranks, resumed anywhere; and reading ahead."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dvla.cache.loader import read_ahead as ahead
from dvla.cache.loader.loader import ConditionDropout, Loader
from dvla.cache.loader.order import BLOCK, Blocks, SampleOrder, mixture
from dvla.cache.loader.prefetch import Prefetch
from dvla.cache.loader.sample import Draws
from dvla.cache.store.cache import Cache
from dvla.cache.store.dataset import CacheDataset
from dvla.errors import UserError
from support import synthetic_cache as synthetic

ORDERS = ("global", "block", "sequential")
RECORD = 2 * synthetic.TOKENS * synthetic.WIDTH
FROZEN = [(2, 3145), (1, 249), (2, 685), (2, 413), (2, 282), (2, 4083), (2, 4828), (2, 4713)]


@pytest.fixture(scope="module", autouse=True)
def small_windows() -> None:
    """Blocks as of a large cache: runs of 4 samples, windows of 32 and more, groups of 2 shards and more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead, "RUN_NBYTES", 4 * RECORD)
        patch.setattr(ahead, "WINDOW_NBYTES", 40 * RECORD)
        patch.setattr(ahead, "GROUP", 2)
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    path = tmp_path_factory.mktemp("orders") / "cache"
    synthetic.build(path)
    return Cache.open(path)


# --- pure ---

SIZES = [10, 333, 0, 5000]
BLOCKS = [Blocks(40, 4, 32, 3)] * 4


def most_pieces(blocks: Blocks, first: int, count: int, size: int) -> int:
    """The most stretches of neighboring samples that the window of `count` draws from `first` on can be made of.

    Proof, from `Blocks.permute`, with positions counted from the beginning of the window's group, which is a shard's
    beginning:

    1. Shuffling within the window keeps its set of positions, and windows begin at multiples of `run`. So the window is
    n = ceil(count / run)
       whole runs, where the group's last run counts as whole even when it is short.
    2. Permuting runs puts these n in the places of any n runs of the group, but a short last run stays the last, so it
    is in the last window
       and in no other. A run stays one stretch of positions.
    3. Permuting shards moves each shard as a whole, so it cuts a stretch only where a shard ends: a run is at most 1 +
    c pieces, where c counts
       the shards' ends strictly inside its place (at its edges nothing is cut). Neighbouring pieces may meet again,
       which only lowers the number.

    So there are at most n + (the sum of the n largest c) pieces, the short last run's own c being one of the n in the
    last window. No smaller number will do for all permutations: one that puts the n most often cut runs into the window
    attains it when no two pieces meet."""
    begin = first - first % (blocks.group * blocks.shard)
    length = min(blocks.group * blocks.shard, size - begin)  # of the group
    whole, rest = divmod(length, blocks.run)
    ends = np.arange(blocks.shard, length, blocks.shard)  # of the group's shards but the last
    inside = ends[ends % blocks.run != 0]  # strictly inside a run
    cuts = np.bincount(inside // blocks.run, minlength=whole + 1)  # [runs] c of each run's place
    runs = count // blocks.run  # whole ones in the window
    assert runs * blocks.run == count or first + count == begin + length  # the window with the short run is the last
    most = runs + int(np.sort(cuts[:whole])[whole - runs :].sum())
    return most + (1 + int(cuts[whole]) if count % blocks.run else 0)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 3000),
    st.integers(1, 300),
    st.integers(1, 50),
    st.integers(1, 20),
    st.integers(1, 9),
    st.integers(0, 2**40),
)
@example(
    size=1157, shard=89, run=9, runs=5, group=6, key=6127072
)  # the ends of three shards fall into one window: 8 pieces
@example(size=1157, shard=3, run=50, runs=2, group=9, key=0)  # runs longer than a shard
def test_blocks_are_a_permutation_of_nearby_samples(
    size: int, shard: int, run: int, runs: int, group: int, key: int
) -> None:
    blocks, k = Blocks(shard, run, run * runs, group), np.arange(size)
    image = blocks.permute(k, size, np.full(size, key, np.uint64))
    np.testing.assert_array_equal(np.sort(image), k)
    begin, count = blocks.window_of(k, size)
    assert (begin <= k).all() and (k < begin + count).all() and (count <= run * runs).all()
    for first in np.unique(begin).tolist():
        inside = np.sort(image[begin == first])
        assert len(inside) == count[first]
        pieces = 1 + int((np.diff(inside) != 1).sum())
        assert pieces <= most_pieces(blocks, first, len(inside), size)
    some = np.random.default_rng(key).integers(0, size, 20)
    np.testing.assert_array_equal(blocks.permute(some, size, np.full(20, key, np.uint64)), image[some])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seed", [0, 7])
def test_every_sample_once_per_pass(order: str, seed: int) -> None:
    samples = SampleOrder(SIZES, mixture(SIZES), seed, order, BLOCKS)
    position = np.arange(5 * BLOCK)
    dataset, rank = samples.draws(position)
    index = samples.index(dataset, rank)
    for d, size in enumerate(SIZES):
        drawn = index[dataset == d]
        for epoch in range(len(drawn) // max(size, 1)):
            np.testing.assert_array_equal(np.sort(drawn[epoch * size : (epoch + 1) * size]), np.arange(size))
        if order == "sequential" or not size:
            continue
        np.testing.assert_array_equal(
            samples.positions(d, 3, 60), position[dataset == d][3:60]
        )  # the inverse of `draws`
        assert (drawn[:size] != drawn[size : 2 * size]).any()  # another epoch, another order
    if order == "sequential":
        whole = [(d, i) for d, size in enumerate(SIZES) for i in range(size)]
        assert list(zip(dataset.tolist(), index.tolist()))[: 2 * len(whole)] == 2 * whole
    else:
        np.testing.assert_array_equal(
            dataset, SampleOrder(SIZES, mixture(SIZES), seed).samples(np.arange(5 * BLOCK))[0]
        )  # the same mixture
    some = np.random.default_rng(0).integers(0, 5 * BLOCK, 99)  # positions alone decide
    np.testing.assert_array_equal(samples.index(*samples.draws(some)), index[some])


def test_windows_hold_their_draws() -> None:
    samples = SampleOrder(SIZES, mixture(SIZES), 3, "block", BLOCKS)
    rank = np.arange(12_000)
    windows = samples.windows(3, rank)
    assert [first for first, _ in windows] == [0, *(end for _, end in windows[:-1])] and windows[-1][
        1
    ] >= 12_000  # no gap, no overlap
    assert all(5000 in (first, end) or not first < 5000 < end for first, end in windows)  # an epoch is whole windows
    assert samples.windows(3, np.array([100, 101, 5003])) == [(96, 120), (5000, 5032)]  # a group ends at 120


def test_block_order_is_frozen_across_versions() -> None:
    """A checkpoint's offset means the same samples for ever; change this order only with a new checkpoint format."""
    dataset, index = SampleOrder(
        [10, 333, 5000], mixture([10, 333, 5000]), 42, "block", [Blocks(160, 5, 1280, 16)] * 3
    ).samples(np.arange(10_000, 10_008))
    assert list(zip(dataset.tolist(), index.tolist())) == FROZEN


def test_an_unknown_order_is_refused(cache: Cache) -> None:
    with pytest.raises(UserError, match="did you mean 'block'"):
        Loader(cache, batch_size=4, order="blocks")


# --- ranks and resumption ---

LEG = st.tuples(
    st.sampled_from([1, 2, 3, 8]), st.integers(1, 9), st.integers(1, 12)
)  # ranks, batch size, steps until it is interrupted


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(ORDERS), st.integers(0, 2**40), st.lists(LEG, min_size=1, max_size=3))
def test_any_ranks_interrupted_anywhere_draw_one_sequence(
    cache: Cache, order: str, seed: int, legs: list[tuple[int, int, int]]
) -> None:
    offset, parts = 0, []
    for world, batch_size, steps in legs:
        for step in range(steps):
            at = offset + step * world * batch_size
            for rank in range(world):
                if step == 0 and rank == 0:
                    loaders = [bare(cache, order, seed, batch_size, r, world, offset) for r in range(world)]
                parts.append(columns(loaders[rank].draws(at)))
        offset += steps * world * batch_size
    drawn = [np.concatenate(column) for column in zip(*parts)]
    whole = bare(cache, order, seed, offset, 0, 1, 0)
    for found, expected in zip(drawn, columns(whole.draws(0))):
        np.testing.assert_array_equal(found, expected)
    for d, source in enumerate(cache.datasets):
        rows, usable = drawn[1][drawn[0] == d], np.flatnonzero(~np.repeat(source.quarantined, source.episode_length))
        for epoch in range(0, len(rows), len(usable)):
            part = rows[epoch : epoch + len(usable)]
            assert len(set(part.tolist())) == len(part) and set(part.tolist()) <= set(usable.tolist())
            assert len(part) < len(usable) or set(part.tolist()) == set(usable.tolist())


def columns(drawn: Draws) -> list[np.ndarray]:
    return [getattr(drawn, field.name) for field in dataclasses.fields(drawn)]


def bare(cache: Cache, order: str, seed: int, batch_size: int, rank: int, world: int, start: int) -> Loader:
    """A loader that has read nothing; its draws can be asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prefetch, "_submit", lambda self: None)
        loader = Loader(
            cache,
            batch_size=batch_size,
            seed=seed,
            rank=rank,
            world_size=world,
            start=start,
            order=order,
            features=False,
            dropout=ConditionDropout(0.3, 0.2, 0.1),
        )
    loader.close()
    return loader


@pytest.mark.parametrize("order", ["block", "sequential"])
def test_what_is_delivered_is_what_is_drawn(cache: Cache, order: str) -> None:
    """Through threads and reading ahead, on two ranks that then become one."""
    with Loader(cache, batch_size=12, seed=5, threads=1, order=order) as loader:
        samples = [next(loader) for _ in range(20)]
    straight = [sample.batch for sample in samples]
    for batch, drawn in zip(straight, (sample.drawn for sample in samples)):
        np.testing.assert_array_equal(batch.dataset, drawn.dataset)
        np.testing.assert_array_equal(batch.frame_index, drawn.row)
        for i, (d, r) in enumerate(zip(drawn.dataset.tolist(), drawn.row.tolist())):
            source = cache.datasets[d]
            expected = np.concatenate([synthetic.feature(source.name, view, r) for view in source.views])
            np.testing.assert_array_equal(batch.tokens[i, : len(expected)], expected)
    both = [Loader(cache, batch_size=6, seed=5, threads=2, order=order, rank=rank, world_size=2) for rank in range(2)]
    for step in range(8):
        parts = [next(loader) for loader in both]
        assert torch.equal(torch.cat([part.batch.tokens for part in parts]), straight[step].tokens)
    offset = parts[1].next_offset
    for loader in both:
        loader.close()
    with Loader(cache, batch_size=12, seed=5, threads=3, order=order, start=offset) as loader:
        for step in range(8, 20):
            assert torch.equal(next(loader).batch.tokens, straight[step].tokens)


# --- reading ahead ---


@pytest.mark.parametrize("world", [1, 2])
def test_windows_are_read_ahead_in_order_and_no_more(cache: Cache, monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    advised: list[tuple[str, str, list[int]]] = []
    real = CacheDataset.advise
    monkeypatch.setattr(
        CacheDataset,
        "advise",
        lambda self, view, rows, files, variant=0: (
            advised.append((self.name, view, rows.tolist())),
            real(self, view, rows, files, variant),
        ),
    )
    delivered = set()
    with Loader(cache, batch_size=4, seed=2, order="block", rank=world - 1, world_size=world) as loader:
        for _ in range(12):
            batch = next(loader).batch
            known = {(name, row) for name, _, rows in list(advised) for row in rows}
            mine = {(cache.datasets[d].name, row) for d, row in zip(batch.dataset.tolist(), batch.frame_index.tolist())}
            assert mine <= known  # before it was read
            delivered |= mine
        ends = 4 * world * 12 + 4 * world * 6  # what may have been submitted by now
        dataset, rank = loader.order.draws(np.arange(ends))
        allowed = set()
        for d, source in enumerate(cache.datasets):
            windows = loader.order.windows(d, rank[dataset == d])
            windows += loader.order.windows(d, np.array([windows[-1][1]]))
            for first, end in windows:
                position = loader.order.positions(d, first, end)
                position = position[position // 4 % world == world - 1]
                allowed |= {(source.name, row) for row in loader._draws_at(position).row.tolist()}
    assert {(name, row) for name, _, rows in advised for row in rows} <= allowed
    for _, _, rows in advised:
        assert rows == sorted(rows) and len({row // synthetic.SHARD for row in rows}) == 1  # one shard, front to back


def test_a_damaged_shard_is_named_by_who_reads_it(tmp_path: Path) -> None:
    synthetic.build(tmp_path / "c")
    cache = Cache.open(tmp_path / "c")
    shard = cache.named("beta").shard_path("top", 2)
    shard.write_bytes(shard.read_bytes()[:-9])
    with Loader(cache, batch_size=16, order="block") as loader, pytest.raises(UserError, match=str(shard)):
        for _ in range(50):
            next(loader)
