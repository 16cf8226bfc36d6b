"""Samples with earlier frames and states: what today's batches hold, then those of the frames before, masked where the
episode has none."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dvla.batch import FeatureBatch
from dvla.cache.actions.history import MOST, NO_HISTORY, History, history_of, parse_offsets
from dvla.cache.loader.dropout import ConditionDropout
from dvla.cache.loader.loader import Loader, gather
from dvla.cache.store.cache import Cache
from dvla.cache.store.dataset import CacheDataset
from dvla.drifting.policy_net import PolicyNetConfig
from dvla.errors import UserError
from support import synthetic_cache as synthetic

FIELDS = [f.name for f in dataclasses.fields(FeatureBatch)]
DROPOUT = ConditionDropout(0.3, 0.4, 0.3)
STATES = (0, -1, -7)


@pytest.fixture(scope="module", params=synthetic.SETTINGS)
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    path = tmp_path_factory.mktemp("history") / "cache"
    synthetic.build(path, plan=synthetic.make_plan(**synthetic.SETTINGS[request.param]))
    return Cache.open(path)


def offsets(cache: Cache) -> tuple[int, ...]:
    stride = cache.datasets[0].frame_stride
    return (0, -stride, -4 * stride)


def copies(loader: Loader, count: int) -> list[dict[str, torch.Tensor]]:
    """Of its next batches, each dropped before the next one, so that their memory is used again."""
    with loader:
        taken = (s.batch for s in itertools.islice(loader, count))
        return [{n: v.clone() for n in FIELDS if (v := getattr(b, n)) is not None} for b in taken]


def load(cache: Cache, count: int = 12, **how: Any) -> list[dict[str, torch.Tensor]]:
    return copies(Loader(cache, **{"batch_size": 16, "seed": 4, **how}), count)


def augmented(cache: Cache) -> dict[str, Any]:
    return {"dropout": DROPOUT, "augment": cache.variants > 0}


def test_the_current_frame_is_todays_batch_bit_for_bit(cache: Cache) -> None:
    """In every field: with history or without, in the same order, with the same draws."""
    past = {"history": offsets(cache), "proprio_history": STATES}
    plain, seen = load(cache, **augmented(cache)), load(cache, **augmented(cache), **past)
    for a, b in zip(plain, seen, strict=True):
        for name, value in a.items():
            now = b[name][:, : value.shape[1]] if name in ("tokens", "token_mask", "view_id", "frame_id") else b[name]
            assert torch.equal(now, value), name
        assert b["tokens"].shape[1] == 3 * a["tokens"].shape[1] and b.keys() - a.keys() == {"past_proprio", "past_mask"}


def test_history_of_one_frame_is_no_history(cache: Cache) -> None:
    for a, b in zip(load(cache, 3), load(cache, 3, history=(0,), proprio_history=[0]), strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_earlier_frames_are_their_own_samples(cache: Cache) -> None:
    """Each block of tokens is the current frame's of the sample so many frames before; zeros, masked, where there is
    none."""
    past, views, p = History(offsets(cache), STATES), 2, cache.tokens
    found = {"there": 0, "before": 0}
    for batch in load(cache, history=past.frames, proprio_history=past.proprio):
        tokens, mask = (batch[n].unflatten(1, (3, views * p)) for n in ("tokens", "token_mask"))
        assert batch["frame_id"].unflatten(1, (3, -1)).eq(torch.arange(3)[:, None]).all()
        assert batch["view_id"][0].tolist() == [0] * p + [1] * p + [0] * p + [1] * p + [0] * p + [1] * p
        for i, (d, row) in enumerate(zip(batch["dataset"].tolist(), batch["frame_index"].tolist())):
            source = cache.datasets[d]
            start = int(source.episode_start[source.episode_of(np.array([row]))[0]])
            for h, offset in enumerate(past.frames):
                if row + offset < start:
                    found["before"] += 1
                    assert not mask[i, h].any() and not tokens[i, h].any()
                    continue
                found["there"] += 1
                own = gather(cache, np.array([d]), np.array([row + offset]))
                assert torch.equal(tokens[i, h], own.tokens[0]) and torch.equal(mask[i, h], own.token_mask[0])
            for h, offset in enumerate(past.states):
                exists = row + offset >= start
                assert bool(batch["past_mask"][i, h]) is exists
                own = source.proprio_normalizer.normalize(source.proprio[row + offset]) if exists else np.zeros(128)
                np.testing.assert_array_equal(batch["past_proprio"][i, h], own.astype(np.float32))
    assert min(found.values()) > 20


def test_what_is_dropped_is_dropped_of_all_frames(cache: Cache) -> None:
    """Null features stand in the place of frames that exist, one augmented variant in that of all others."""
    past = History(offsets(cache), STATES)
    with Loader(
        cache, batch_size=64, seed=2, **augmented(cache), history=past.frames, proprio_history=past.proprio
    ) as loader:
        sample = next(loader)
        flat, draws = sample.batch, sample.drawn
    tokens, mask = (x.unflatten(1, (3, 2, -1)) for x in (flat.tokens, flat.token_mask))
    assert draws.no_images.any() and draws.no_proprio.any() and (not cache.variants or draws.variant.any())
    assert flat.past_mask is not None and flat.past_proprio is not None
    assert not flat.past_mask[draws.no_proprio].any() and not flat.past_proprio[draws.no_proprio].any()
    for i, (d, row) in enumerate(zip(draws.dataset.tolist(), draws.row.tolist())):
        source = cache.datasets[d]
        rows, there = source.earlier(np.array([row]), past.frames)
        for h in np.flatnonzero(there[0]).tolist():
            for v, view in enumerate(source.views):
                own = source.features(view, rows[0, h : h + 1], int(draws.variant[i]))[0]
                if draws.no_images[i]:
                    own = source.null_features[v]
                assert mask[i, h, v].all()
                np.testing.assert_allclose(
                    tokens[i, h, v].float(), own.astype(np.float32), atol=0.3 if draws.no_images[i] else 0
                )
                assert torch.equal(tokens[i, h, v], tokens[i, 0, v]) or not draws.no_images[i]
        assert not mask[i, ~there[0]].any() and not tokens[i, ~there[0]].any()


@pytest.mark.parametrize("order", ["global", "block", "sequential"])
def test_ranks_threads_and_resume_change_nothing(cache: Cache, order: str) -> None:
    how = {**augmented(cache), "history": offsets(cache), "proprio_history": STATES, "order": order}
    whole = load(cache, 6, batch_size=8, threads=1, **how)
    halves = [load(cache, 6, batch_size=4, threads=3, rank=r, world_size=2, **how) for r in range(2)]
    later = load(cache, 3, batch_size=8, start=24, **how)
    for step, batch in enumerate(whole):
        for name, value in batch.items():
            if name != "channel_scale":
                assert torch.equal(torch.cat([h[step][name] for h in halves]), value), name
            assert step < 3 or torch.equal(later[step - 3][name], value), name


def test_windows_are_read_ahead_with_their_history(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    advised: set[tuple[str, int]] = set()
    real = CacheDataset.advise

    def advise(self: CacheDataset, view: str, rows: np.ndarray, *how: Any) -> None:
        advised.update((self.name, row) for row in rows.tolist())
        real(self, view, rows, *how)

    monkeypatch.setattr(CacheDataset, "advise", advise)
    for name in ("RUN_NBYTES", "WINDOW_NBYTES", "GROUP"):  # windows of eight frames
        monkeypatch.setattr(f"dvla.cache.loader.read_ahead.{name}", 1)
    for batch in load(cache, 1, batch_size=2, prefetch=1, threads=1, order="block", history=offsets(cache)):
        for d, row in zip(batch["dataset"].tolist(), batch["frame_index"].tolist()):
            rows, there = cache.datasets[d].earlier(np.array([row]), offsets(cache))
            assert {(cache.datasets[d].name, r) for r in rows[there].tolist()} <= advised


def test_the_map_style_dataset_holds_the_same(cache: Cache) -> None:
    frames = offsets(cache)
    data = cache.dataset(horizon=5, history=frames, proprio_history=STATES)
    for i in range(0, len(data), 7):
        sample = data[i]
        batch = gather(
            cache,
            sample["dataset"][None].numpy(),
            sample["frame_index"][None].numpy(),
            5,
            history=History(frames, STATES),
        )
        for name, value in sample.items():
            if not name.startswith("text"):  # padded to the longest of what is read
                assert torch.equal(value, getattr(batch, name)[0]), name


def test_frames_that_a_build_left_out_are_masked(tmp_path: Path) -> None:
    plan = synthetic.make_plan()
    beta = plan.datasets[1]
    episodes = tuple(dataclasses.replace(e, kept=((0, 3), (5, e.length))) for e in beta.episodes if e.length > 5)
    synthetic.build(
        tmp_path / "cache", plan=dataclasses.replace(plan, datasets=(dataclasses.replace(beta, episodes=episodes),))
    )
    cache, rows = Cache.open(tmp_path / "cache"), np.array([6, 7])
    batch = gather(cache, np.zeros(2, np.int64), rows, history=History((0, -1, -3)))
    there = batch.token_mask.unflatten(1, (3, -1)).all(-1)
    assert (
        there.tolist() == [[True, True, False], [True, True, False]] and batch.tokens.shape[1] == 3 * synthetic.TOKENS
    )
    with pytest.raises(ValueError, match="has no features"):
        gather(cache, np.zeros(1, np.int64), np.array([4]), history=History((0, -1)))


def test_offsets() -> None:
    assert PolicyNetConfig.max_frames == MOST
    assert not NO_HISTORY and History((0, -4), (0, -9)).depth == 9 and History((0,), (0, -1, -2)).states == (-1, -2)
    for history in (NO_HISTORY, History((0, -4)), History((0,), (0, -1))):
        assert history_of(history.to_document()) == history
    assert NO_HISTORY.to_document() == {} and parse_offsets("0,-4, -8", "history") == [0, -4, -8]
    assert parse_offsets(0, "history") == [0] and parse_offsets([0, -1], "history") == [0, -1]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ((), "begin with 0"),
        ((0, 4), "at most 0"),
        ((-4,), "begin with 0"),
        ((0, -4, -4), "begin with 0 and fall"),
        ((0, -8, -4), "begin with 0 and fall"),
        (tuple(range(0, -9, -1)), "at most 8 offsets"),
        ((0, -(10**9)), "at least -10000"),
    ],
)
def test_bad_offsets_are_refused_in_a_line(tmp_path: Path, wrong: tuple[int, ...], words: str) -> None:
    for given in ({"frames": wrong}, {"proprio": wrong}):
        with pytest.raises(UserError, match=words) as found:
            History(**given)
        name = "history" if "frames" in given else "proprio_history"
        assert str(found.value).startswith(name) and len(str(found.value)) < 200 and "\n" not in str(found.value)
    with pytest.raises(UserError, match="history is 'four'; give offsets in frames, as in 0,-4,-8"):
        parse_offsets("four", "history")


def test_frames_between_those_of_the_cache_are_refused(tmp_path: Path) -> None:
    synthetic.build(tmp_path / "cache", plan=synthetic.make_plan(frame_stride=3))
    cache = Cache.open(tmp_path / "cache")
    for make in (lambda: Loader(cache, batch_size=2, history=(0, -4)), lambda: cache.dataset(history=(0, -4))):
        with pytest.raises(
            UserError, match="history reaches 4 frames back, and cache .* holds every 3th frame .*multiples of 3"
        ):
            make()
    with Loader(cache, batch_size=2, proprio_history=(0, -4)) as loader:  # states are kept of every frame
        assert next(loader).batch.past_proprio is not None
