"""`sampling_weight`: a dataset's factor on its share of the mixture, from its YAML to the loader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dvla.cache.loader.loader import Loader
from dvla.cache.loader.order import BLOCK, mixture
from dvla.cache.store.cache import Cache
from support import synthetic_cache as synthetic


def test_shares_go_as_factor_times_size_to_the_exponent():
    np.testing.assert_allclose(mixture([100, 400], 0.5, [1, 1]), mixture([100, 400]))
    np.testing.assert_allclose(mixture([100, 400], 0.5, [6, 1]), [60 / 80, 20 / 80])
    np.testing.assert_allclose(mixture([100, 400], 0.0, [1, 3]), [0.25, 0.75])
    np.testing.assert_allclose(mixture([100, 0, 400], 1.0, [4, 9, 1]), [0.5, 0, 0.5])  # an empty dataset has no share


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "cache"
    synthetic.build(path)
    return path


def shares(path: Path, recorded: dict[str, float], **options: object) -> np.ndarray:
    """[2] share of each dataset in one block of the order, with `sampling_weight`s as a cache records them."""
    cache = Cache.open(path)
    for dataset in cache.datasets:
        dataset.attributes.pop("sampling_weight", None)  # as in caches of earlier releases
        if dataset.name in recorded:
            dataset.attributes["sampling_weight"] = recorded[dataset.name]
    with Loader(cache, batch_size=BLOCK, prefetch=1, threads=1, split="all", features=False, **options) as loader:
        return np.bincount(loader.draws(0).dataset, minlength=2) / BLOCK


def test_the_loader_draws_by_the_recorded_weights(path: Path) -> None:
    cache = Cache.open(path)
    sizes = [int(d.episode_length[~d.quarantined].sum()) for d in cache.datasets]
    plain = shares(path, {})
    np.testing.assert_allclose(plain, mixture(sizes), atol=1 / BLOCK)
    np.testing.assert_allclose(shares(path, {"alpha": 1.0, "beta": 1.0}), plain)
    np.testing.assert_allclose(shares(path, {"beta": 5.0}), mixture(sizes, 0.5, [1, 5]), atol=1 / BLOCK)
    np.testing.assert_allclose(
        shares(path, {"beta": 5.0}, weights={"beta": 0.25}), [0.75, 0.25], atol=1 / BLOCK
    )  # given: fixed
