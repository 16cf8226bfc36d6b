"""The order of samples: mixtures and splits, as pure functions of seed and position."""

from __future__ import annotations

import numpy as np
import pytest

from dvla.cache.loader.order import BLOCK, SampleOrder, held_out, mixture, override, quotas
from dvla.errors import UserError

FROZEN = [(2, 2970), (1, 178), (2, 3980), (2, 4432), (2, 2548), (2, 2479), (2, 1368), (2, 142)]


@pytest.mark.parametrize("seed", [0, 7])
def test_every_sample_once_per_epoch_of_its_dataset(seed: int) -> None:
    sizes = [10, 333, 0, 5000]
    order = SampleOrder(sizes, mixture(sizes), seed)
    dataset, index = order.samples(np.arange(5 * BLOCK))
    shares = np.bincount(dataset, minlength=4) / len(dataset)
    np.testing.assert_allclose(shares, mixture(sizes), atol=1 / BLOCK)
    for d, size in enumerate(sizes):
        drawn = index[dataset == d]
        for epoch in np.split(drawn, range(size, len(drawn), size)) if size else []:
            assert len(np.unique(epoch)) == len(epoch) and epoch.max() < size
        if len(drawn) >= 2 * size > 0:
            np.testing.assert_array_equal(np.sort(drawn[:size]), np.arange(size))
            assert (drawn[:size] != drawn[size : 2 * size]).any()  # another epoch, another order
    for offset, count in ((0, 3), (17, 100), (BLOCK - 5, 10), (3 * BLOCK + 1, BLOCK)):
        part = order.samples(np.arange(offset, offset + count))
        np.testing.assert_array_equal(part[0], dataset[offset : offset + count])
        np.testing.assert_array_equal(part[1], index[offset : offset + count])


def test_order_is_frozen_across_versions() -> None:
    """A checkpoint's offset means the same samples for ever; change this order only with a new checkpoint format."""
    dataset, index = SampleOrder([10, 333, 5000], mixture([10, 333, 5000]), seed=42).samples(np.arange(10_000, 10_008))
    assert list(zip(dataset.tolist(), index.tolist())) == FROZEN


def test_order_is_mixed_and_depends_on_the_seed() -> None:
    a, b = (SampleOrder([500, 500], mixture([500, 500]), seed).samples(np.arange(400)) for seed in (1, 2))
    assert (a[0] != b[0]).any() and (a[1] != b[1]).any()
    for dataset, _ in (a, b):
        assert 150 < dataset.sum() < 250
        assert 150 < (np.diff(dataset) != 0).sum() < 250  # neither sorted nor alternating


def test_shares_and_overrides() -> None:
    np.testing.assert_allclose(mixture([100, 400]), [1 / 3, 2 / 3])
    np.testing.assert_allclose(mixture([100, 400], 1.0), [0.2, 0.8])
    np.testing.assert_allclose(mixture([100, 0, 400], 0.0), [0.5, 0, 0.5])
    names, shares = ["a", "b", "c"], np.array([0.2, 0.2, 0.6])
    np.testing.assert_allclose(override(shares, names, {"c": 0.5}), [0.25, 0.25, 0.5])
    np.testing.assert_allclose(override(shares, names, {"a": 0}), [0, 0.25, 0.75])
    np.testing.assert_allclose(override(shares, names, {"a": 0.1, "b": 0.1, "c": 0.2}), [0.25, 0.25, 0.5])
    for given in ({"a": 1.5}, {"a": 0.6, "b": 0.6}, {"a": -0.1}, {"a": 0, "b": 0, "c": 0}):
        with pytest.raises(UserError):
            override(shares, names, given)
    with pytest.raises(UserError, match="did you mean"):
        override(shares, ["alpha", "beta", "gamma"], {"alhpa": 0.5})
    many = np.random.default_rng(0).random(69)
    for shares in (np.array([1.0]), np.full(7, 1 / 7), np.array([1 - 1e-9, 1e-9, 0]), many):
        q = quotas(shares)
        assert q.sum() == BLOCK and ((q > 0) == (shares > 0)).all()
    np.testing.assert_array_equal(quotas(np.array([1 - 1e-9, 1e-9, 0])), [BLOCK - 1, 1, 0])


def test_held_out_episodes() -> None:
    ids = np.arange(2000)
    out = held_out("a", ids, 0.1, 0)
    assert 150 < out.sum() < 250
    np.testing.assert_array_equal(held_out("a", ids[::-1], 0.1, 0), out[::-1])  # by id, not by position
    np.testing.assert_array_equal(held_out("a", ids[:99], 0.1, 0), out[:99])  # more episodes change no choice
    assert (held_out("b", ids, 0.1, 0) != out).any() and (held_out("a", ids, 0.1, 1) != out).any()
    assert not held_out("a", ids, 0.0, 0).any() and not held_out("a", ids[:1], 0.9, 0).any()
    for fraction in (0.001, 0.999):
        assert 0 < held_out("a", ids[:2], fraction, 0).sum() < 2
    with pytest.raises(UserError):
        held_out("a", ids, 1.0, 0)
