"""One contract for every form of a cache: as built, as imported from its export, and the exported tars."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dvla.cache.loader.dropout import ConditionDropout
from dvla.cache.loader.loader import Loader, gather
from dvla.cache.store.cache import Cache
from dvla.cache.store.dataset import CacheDataset
from dvla.cache.store.webdataset.cache import WebDatasetCache
from dvla.errors import UserError
from dvla.stages.caching.transfer.webdataset import export, import_cache
from support import synthetic_cache as synthetic

BACKENDS = ("zarr", "imported", "webdataset")


@pytest.fixture(autouse=True, scope="module")
def unsynced() -> Iterator[None]:
    """No waiting for the disk: what these tests show does not depend on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="module", params=synthetic.SETTINGS)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    base = tmp_path_factory.mktemp("contract")
    synthetic.build(base / "zarr", plan=synthetic.make_plan(**synthetic.SETTINGS[request.param]))
    export(base / "zarr", str(base / "webdataset"), shard_nbytes=150_000)
    import_cache(str(base / "webdataset"), base / "imported")
    return request.param, base


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest, stored: tuple[str, Path]) -> tuple[str, Cache]:
    setting, base = stored
    path = base / request.param
    return setting, WebDatasetCache.open(path) if request.param == "webdataset" else Cache.open(path)


def pictures(plan, dataset: CacheDataset, view: str, rows: np.ndarray, variant: int) -> np.ndarray:
    """What was encoded: zeros where decoding failed."""
    out = np.stack([synthetic.feature(dataset.name, view, row, variant) for row in rows.tolist()])
    episode = dataset.episode_of(rows)
    lost = (dataset.episode_id[episode] == synthetic.BROKEN[2]) & (rows - dataset.episode_start[episode] >= 2)
    out[lost & ((dataset.name, view) == synthetic.BROKEN[:2])] = 0
    return out


def test_datasets_tables_and_attributes(backend: tuple[str, Cache]) -> None:
    setting, cache = backend
    plan = synthetic.make_plan(**synthetic.SETTINGS[setting])
    assert [d.name for d in cache.datasets] == [d.name for d in plan.datasets]
    assert (cache.tokens, cache.width, cache.variants, cache.format) == (
        plan.tokens,
        plan.width,
        plan.variants,
        plan.format,
    )
    assert (
        cache.frames == sum(d.frames for d in plan.datasets)
        and cache.fingerprint["encoder"] == synthetic.FINGERPRINT["encoder"]
    )
    for d, expected in zip(cache.datasets, plan.datasets):
        tables = synthetic.make_tables(plan, d.name)
        assert d.views == expected.views and d.frames == expected.frames and d.frame_stride == plan.frame_stride
        for name in ("action", "proprio", "action_mask", "proprio_mask", "timestamp", "null_text", "text_length"):
            found, want = getattr(d, name), getattr(tables, name)
            assert found.dtype == want.dtype, name
            np.testing.assert_array_equal(found, want, err_msg=name)
        for i, length in enumerate(tables.text_length):
            np.testing.assert_array_equal(d.text[i, :length], tables.text[i, :length])
            assert not d.text[i, length:].any()
        np.testing.assert_array_equal(d.null_features, [tables.null_features[v] for v in expected.views])
        np.testing.assert_array_equal(d.episode_start, expected.starts)
        assert d.episode_id.tolist() == [e.episode_id for e in expected.episodes]
        assert d.episode_length.tolist() == [e.length for e in expected.episodes]
        assert [d.instructions[i] for i in d.episode_instruction] == [e.instruction for e in expected.episodes]
        assert d.attributes["action_map"] == synthetic.MAP.to_dict() and d.attributes["source_hashes"] == [
            e.source_hash for e in expected.episodes
        ]
        assert (d.embodiment_id, d.control_hz) == (tables.embodiment, tables.control_hz)
        np.testing.assert_array_equal(d.action_normalizer.center, cache.named(d.name).action_normalizer.center)
    with pytest.raises(UserError, match="alpha"):
        cache.named("alhpa")


def test_features_of_every_observation(backend: tuple[str, Cache]) -> None:
    setting, cache = backend
    plan = synthetic.make_plan(**synthetic.SETTINGS[setting])
    for d in cache.datasets:
        rows = d.frame_of(np.arange(d.observations))
        assert rows.tolist() == [
            s + t for s, n in zip(d.episode_start, d.episode_length) for t in range(0, n, plan.frame_stride)
        ]
        for view, variant in itertools.product(d.views, range(plan.variants + 1)):
            expected = synthetic.stored(plan, pictures(plan, d, view, rows, variant))
            codes, scale = d.records(view, rows, variant)
            if plan.format.quantized:
                np.testing.assert_array_equal(codes, expected[0])
                np.testing.assert_array_equal(scale, expected[1])
            else:
                np.testing.assert_array_equal(codes, expected)
            some = np.random.default_rng(0).choice(rows, 7)  # any order, repeats allowed
            features = d.features(view, some, variant)
            exact = pictures(plan, d, view, some, variant).astype(np.float32)
            bound = {"float16": 0, "int8": 0.02, "float8_e4m3fn": 0.07}[plan.format.dtype]
            assert features.dtype == np.float16 and np.abs(features - exact).max() <= bound * np.abs(exact).max()


def test_whatever_a_cache_has_its_tars_have(stored: tuple[str, Path], backend: tuple[str, Cache]) -> None:
    built = Cache.open(stored[1] / "zarr")
    for one, other in ((built, backend[1]), (built.datasets[0], backend[1].datasets[0])):
        assert {n for n in vars(one) if not n.startswith("_")} <= set(vars(other)) | set(dir(type(other)))


def test_quarantine(backend: tuple[str, Cache]) -> None:
    _, cache = backend
    alpha = cache.named("alpha")
    assert alpha.episode_id[alpha.quarantined].tolist() == [13] and alpha.attributes["quarantined"] == [13, 99]
    assert not cache.named("beta").quarantined.any() and cache.manifest["quarantine_count"] == 2
    with pytest.raises(ValueError, match="quarantined"):
        gather(cache, np.array([0]), alpha.episode_start[alpha.quarantined])


def test_refusals(backend: tuple[str, Cache]) -> None:
    setting, cache = backend
    alpha, settings = cache.named("alpha"), synthetic.SETTINGS[setting]
    with pytest.raises(UserError, match="front"):
        alpha.features("frnot", np.array([0]))
    with pytest.raises(UserError, match="augmented variants"):
        alpha.features("front", np.array([0]), settings.get("variants", 0) + 1)
    with pytest.raises((ValueError, UserError)):
        alpha.records("front", np.array([alpha.frames * 2]))
    if settings.get("frame_stride", 1) > 1:
        with pytest.raises(ValueError, match="has no features"):
            alpha.features("front", np.array([1]))


def test_training_reads_the_same_batches(stored: tuple[str, Path], backend: tuple[str, Cache]) -> None:
    """The loader, whatever it reads from, gives the batches of the cache as it was built."""
    settings = synthetic.SETTINGS[stored[0]]
    arguments = {
        "batch_size": 6,
        "seed": 2,
        "threads": 2,
        "horizon": 4,
        "dropout": ConditionDropout(0.2, 0.2, 0.2),
        "augment": bool(settings.get("variants")),
    }
    with Loader(Cache.open(stored[1] / "zarr"), **arguments) as first, Loader(backend[1], **arguments) as second:
        for a, b in itertools.islice(zip(first, second), 6):
            for name, value in vars(a.batch).items():
                assert (value is None) == (getattr(b.batch, name) is None) and (
                    value is None or torch.equal(value, getattr(b.batch, name))
                ), name
