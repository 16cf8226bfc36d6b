"""The loader: one global order for all ranks and threads, exact resume, and batches that are what they claim."""

from __future__ import annotations

import dataclasses
import gc
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from dvla.batch import FeatureBatch
from dvla.cache.loader.dropout import ConditionDropout
from dvla.cache.loader.loader import Loader, gather
from dvla.cache.store.cache import Cache
from dvla.errors import UserError
from support import synthetic_cache as synthetic

FIELDS = [f.name for f in dataclasses.fields(FeatureBatch) if f.default is dataclasses.MISSING]  # of fp16 caches


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    path = tmp_path_factory.mktemp("loader") / "cache"
    synthetic.build(path)
    return Cache.open(path)


def take(loader: Loader, count: int) -> list[dict[str, torch.Tensor]]:
    """Copies of the next batches."""
    return [{n: getattr(s.batch, n).clone() for n in FIELDS} for s in itertools.islice(loader, count)]


def joined(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {n: torch.cat([b[n] for b in batches]) for n in FIELDS}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    for name in FIELDS:
        assert torch.equal(a[name], b[name]), name


# --- order ---


@pytest.mark.parametrize(("world", "threads"), [(1, 1), (2, 1), (3, 2), (1, 4)])
def test_same_global_batches_for_any_ranks_and_threads(cache: Cache, world: int, threads: int) -> None:
    dropout = ConditionDropout(0.3, 0.3, 0.3)
    with Loader(cache, batch_size=12, seed=3, threads=2, dropout=dropout) as single:
        expected = take(single, 6)
    ranks = []
    for rank in range(world):
        with Loader(
            cache, batch_size=12 // world, seed=3, threads=threads, rank=rank, world_size=world, dropout=dropout
        ) as loader:
            ranks.append(take(loader, 6))
    for step, batch in enumerate(expected):
        assert_same(joined([r[step] for r in ranks]), batch)


def test_resume_is_exact_also_on_other_ranks(cache: Cache) -> None:
    with Loader(cache, batch_size=6, seed=1, dropout=ConditionDropout()) as loader:
        straight = joined(take(loader, 8))
    with Loader(cache, batch_size=6, seed=1, dropout=ConditionDropout()) as loader:
        first, third = take(loader, 2), next(loader)
        first.append(take_one(third.batch))
    assert (third.offset, third.next_offset) == (12, 18)
    second = []
    loaders = [
        Loader(cache, batch_size=5, seed=1, rank=r, world_size=2, start=third.next_offset, dropout=ConditionDropout())
        for r in range(2)
    ]
    for _ in range(3):
        second += [take(loader, 1)[0] for loader in loaders]
    for loader in loaders:
        assert next(loader).offset == 48
        loader.close()
    assert_same(joined(first + second), straight)


def test_every_usable_frame_exactly_once_per_epoch(cache: Cache) -> None:
    usable = []
    for d in cache.datasets:
        bad = np.repeat(d.quarantined, d.episode_length)
        usable.append(np.flatnonzero(~bad))
    with Loader(cache, batch_size=32, features=False) as loader:
        assert loader.sizes == [len(u) for u in usable]
        seen = joined(take(loader, 12))
    for d, rows in enumerate(usable):
        drawn = seen["frame_index"][seen["dataset"] == d].numpy()
        assert len(drawn) > 2 * len(rows)
        for epoch in range(2):
            np.testing.assert_array_equal(np.sort(drawn[epoch * len(rows) : (epoch + 1) * len(rows)]), rows)


def test_splits_are_disjoint_and_whole(cache: Cache) -> None:
    rows = {}
    for split in ("train", "eval", "all"):
        for seed in (0, 5):  # the sampling seed must not move episodes between the splits
            with Loader(cache, batch_size=64, seed=seed, split=split, holdout=0.4, features=False) as loader:
                seen = joined(take(loader, 10))
            rows[split, seed] = set(zip(seen["dataset"].tolist(), seen["frame_index"].tolist()))
        assert rows[split, 0] == rows[split, 5]
    assert not rows["train", 0] & rows["eval", 0] and rows["train", 0] | rows["eval", 0] == rows["all", 0]
    for split in ("train", "eval"):  # whole episodes
        for d, row in rows[split, 0]:
            e = cache.datasets[d].episode_of(np.array([row]))[0]
            start = cache.datasets[d].episode_start[e]
            assert all((d, r) in rows[split, 0] for r in range(start, start + cache.datasets[d].episode_length[e]))


def test_quarantined_frames_are_refused(cache: Cache) -> None:
    alpha = cache.datasets[0]
    row = alpha.episode_start[alpha.quarantined][0]
    with pytest.raises(ValueError, match="quarantined"):
        gather(cache, np.array([0]), np.array([row]))
    with pytest.raises(ValueError, match="rows"):
        gather(cache, np.array([0]), np.array([alpha.frames]))


# --- contents ---


def test_batch_is_what_the_tables_and_shards_hold(cache: Cache) -> None:
    """Against a slow reference, sample by sample; mixed view counts, windows at the ends of episodes, text lengths."""
    horizon, plan = 10, synthetic.make_plan()
    with Loader(cache, batch_size=64, horizon=horizon, seed=9) as loader:
        batches = take(loader, 5)
    batch = joined(batches)
    assert set(batch["dataset"].tolist()) == {0, 1} and not batch["step_mask"].all()
    for i in range(len(batch["dataset"])):
        d, row = int(batch["dataset"][i]), int(batch["frame_index"][i])
        source, dataset = cache.datasets[d], plan.datasets[d]
        tables = synthetic.make_tables(plan, dataset.name)
        episode = max(e for e in range(len(dataset.episodes)) if dataset.starts[e] <= row)
        end = dataset.starts[episode] + dataset.episodes[episode].length
        inside = min(horizon, end - row)
        action = np.zeros((horizon, 128), np.float32)
        action[:inside] = source.action_normalizer.normalize(tables.action[row : row + inside])
        np.testing.assert_array_equal(batch["action"][i], action)
        np.testing.assert_array_equal(batch["step_mask"][i], np.arange(horizon) < inside)
        np.testing.assert_array_equal(batch["proprio"][i], source.proprio_normalizer.normalize(tables.proprio[row]))
        np.testing.assert_array_equal(batch["action_mask"][i], tables.action_mask)
        assert batch["embodiment"][i] == tables.embodiment and batch["control_hz"][i] == tables.control_hz
        tokens = np.zeros((2, synthetic.TOKENS, synthetic.WIDTH), np.float16)
        for v, view in enumerate(dataset.views):
            tokens[v] = synthetic.feature(dataset.name, view, row)
        np.testing.assert_array_equal(batch["tokens"][i], tokens.reshape(-1, synthetic.WIDTH))
        np.testing.assert_array_equal(batch["token_mask"][i], np.arange(6) < 3 * len(dataset.views))
        np.testing.assert_array_equal(batch["view_id"][i], [0, 0, 0, 1, 1, 1])
        t = dataset.instructions.index(dataset.episodes[episode].instruction)
        n = int(tables.text_length[t])
        np.testing.assert_array_equal(batch["text_mask"][i], np.arange(6) < n)
        np.testing.assert_array_equal(batch["text"][i, :n], tables.text[t, :n])
        assert (batch["text"][i, n:] == 0).all()
    assert (batch["frame_id"] == 0).all()
    assert batch["action"][..., 30:33].abs().max() <= 1 < batch["action"][..., 33:39].abs().max()  # 6D is left alone
    some = slice(0, 9)
    assert_same(
        {n: v[some] for n, v in batch.items()},
        take_one(gather(cache, batch["dataset"][some].numpy(), batch["frame_index"][some].numpy(), horizon)),
    )


def take_one(batch: FeatureBatch) -> dict[str, torch.Tensor]:
    return {n: getattr(batch, n) for n in FIELDS}


def test_condition_dropout_uses_the_null_features(cache: Cache) -> None:
    arguments = {"batch_size": 48, "seed": 2}
    with Loader(cache, **arguments) as loader:
        plain = joined(take(loader, 4))
    for kind in ("text", "images", "proprio"):
        probabilities = {"text": 0.0, "images": 0.0, "proprio": 0.0}
        with Loader(cache, **arguments, dropout=ConditionDropout(**{**probabilities, kind: 1.0})) as loader:
            dropped = joined(take(loader, 4))
        changed = {n for n in FIELDS if not torch.equal(dropped[n], plain[n])}
        assert changed <= {"text": {"text", "text_mask"}, "images": {"tokens"}, "proprio": {"proprio"}}[kind]
        for i, d in enumerate(plain["dataset"].tolist()):
            source = cache.datasets[d]
            if kind == "text":
                n = len(source.null_text)
                np.testing.assert_array_equal(dropped["text"][i, :n], source.null_text)
                assert dropped["text_mask"][i].sum() == n and (dropped["text"][i, n:] == 0).all()
            if kind == "images":
                np.testing.assert_array_equal(
                    dropped["tokens"][i][dropped["token_mask"][i]], source.null_features.reshape(-1, synthetic.WIDTH)
                )
            if kind == "proprio":
                assert (dropped["proprio"][i] == 0).all()


def test_dropout_is_drawn_by_position_alone() -> None:
    dropout, position = ConditionDropout(0.1, 0.2, 0.3), np.arange(20_000)
    draws = dropout.draw(5, position)
    for drawn, p in zip(draws, (0.1, 0.2, 0.3)):
        assert abs(drawn.mean() - p) < 0.015
    assert abs((draws[0] & draws[1]).mean() - 0.02) < 0.006  # independent of each other
    for whole, part in zip(draws, dropout.draw(5, position[123:456])):
        np.testing.assert_array_equal(whole[123:456], part)
    assert (dropout.draw(6, position)[0] != draws[0]).any()
    with pytest.raises(UserError, match="images"):
        ConditionDropout(images=1.1)


def test_weights_choose_datasets(cache: Cache) -> None:
    with Loader(cache, batch_size=64, weights={"beta": 0.0}, features=False) as loader:
        assert (next(loader).batch.dataset == 0).all()
    with Loader(cache, batch_size=1024, weights={"beta": 0.75}, features=False) as loader:
        assert abs(joined(take(loader, 4))["dataset"].float().mean() - 0.75) < 1e-3


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_datasets_come_as_their_size_to_the_exponent(cache: Cache, exponent: float) -> None:
    with Loader(cache, batch_size=1024, mixture_exponent=exponent, features=False) as loader:
        drawn, sizes = joined(take(loader, 4))["dataset"].float().mean(), np.array(loader.sizes, float) ** exponent
        assert abs(drawn - sizes[1] / sizes.sum()) < 1e-3 and len(set(loader.sizes)) == 2


def test_without_features(cache: Cache) -> None:
    with Loader(cache, batch_size=8, seed=4, features=False) as bare, Loader(cache, batch_size=8, seed=4) as full:
        a, b = take(bare, 1)[0], take(full, 1)[0]
    assert a["tokens"].shape == (8, 0, synthetic.WIDTH) and a["view_id"].shape == (8, 0)
    for name in set(FIELDS) - {"tokens", "token_mask", "view_id", "frame_id"}:
        assert torch.equal(a[name], b[name]), name


# --- buffers, damage ---


def test_kept_batches_are_never_overwritten_and_dropped_ones_are_reused(cache: Cache) -> None:
    with Loader(cache, batch_size=4, seed=8, prefetch=3) as loader:
        expected = take(loader, 60)
        pointers = {next(loader).batch.tokens.untyped_storage().data_ptr() for _ in range(60)}
        assert len(pointers) <= 3 + 2 + 2  # plus what the islice above may still have held
    with Loader(cache, batch_size=4, seed=8, prefetch=3) as loader:
        kept = [next(loader).batch for _ in range(30)]
        rows = [next(loader).batch.proprio[1:3] for _ in range(30)]  # a view of one field holds its whole batch
        gc.collect()
        for _ in range(20):
            next(loader)
        for batch, copy in zip(kept, expected):
            assert_same(take_one(batch), copy)
        for row, copy in zip(rows, expected[30:]):
            assert torch.equal(row, copy["proprio"][1:3])
    for batch, copy in zip(kept, expected):  # also after close
        assert_same(take_one(batch), copy)


def test_a_damaged_shard_stops_the_loader_by_name(tmp_path: Path) -> None:
    synthetic.build(tmp_path / "c")
    cache = Cache.open(tmp_path / "c")
    shard = cache.named("beta").shard_path("top", 1)
    shard.write_bytes(shard.read_bytes()[:-9])
    with Loader(cache, batch_size=16) as loader:
        for _ in range(2):  # and it does not go on past the batch it could not make
            with pytest.raises(UserError, match=str(shard)):
                for _ in range(50):
                    next(loader)


def test_loader_writes_nothing_and_closes_its_files(cache: Cache) -> None:
    import os

    before = {p: p.stat().st_mtime_ns for p in cache.path.rglob("*")}
    gc.collect()  # what earlier tests left
    handles = len(os.listdir("/proc/self/fd"))
    with Loader(cache, batch_size=16) as loader:
        take(loader, 5)
        assert loader.wait_seconds > 0
    with pytest.raises(ValueError, match="closed"):
        next(loader)
    assert len(os.listdir("/proc/self/fd")) == handles
    assert {p: p.stat().st_mtime_ns for p in cache.path.rglob("*")} == before


@pytest.mark.parametrize(
    "bad",
    [
        {"batch_size": 0},
        {"rank": 1},
        {"threads": 0},
        {"start": -1},
        {"horizon": 0},
        {"split": "test"},
        {"split": "eval"},
        {"holdout": 1.0},
        {"weights": {"gamma": 0.5}},
    ],
)
def test_bad_settings_are_refused(cache: Cache, bad: dict) -> None:
    with pytest.raises(UserError):
        Loader(cache, **{"batch_size": 4, **bad})
