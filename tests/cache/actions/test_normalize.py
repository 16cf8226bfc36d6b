"""Statistics of streams of tables, and normalisation: identities, properties and bounds."""

from __future__ import annotations

import json
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dvla.cache.actions.extremes import extremes
from dvla.cache.actions.normalizer import Normalizer
from dvla.cache.actions.schemes import SCHEMES, Scheme
from dvla.cache.actions.statistics import BLOCK, QUANTILES, RunningStatistics, Statistics
from dvla.errors import UserError

ROWS = 200_000


def running(*tables: np.ndarray) -> RunningStatistics:
    stats = RunningStatistics()
    for table in tables:
        stats.update(table)
    return stats


def numbers(low: float, high: float):
    return st.floats(float(np.float32(low)), float(np.float32(high)), allow_nan=False, width=32)


@given(hnp.arrays(np.float64, st.tuples(st.integers(2, 20), st.just(4)), elements=numbers(-100, 100)), st.data())
def test_streamed_and_merged_statistics_equal_those_of_the_whole(x, data):
    cut = data.draw(st.integers(1, len(x) - 1))
    both = running(x[:cut][:1], x[:cut][1:])
    both.merge(running(x[cut:]))
    moments = running(x[:cut]).result().merge(running(x[cut:]).result())
    for stats in (both.result(), moments):
        for name, value in (("mean", x.mean(0)), ("std", x.std(0)), ("min", x.min(0)), ("max", x.max(0))):
            np.testing.assert_allclose(getattr(stats, name), value, rtol=1e-9, atol=1e-6)
        assert stats.count == len(x)
    assert moments.quantiles is None  # those of a whole do not follow from those of its parts
    for q, value in both.result().quantiles.items():  # few rows: exact
        np.testing.assert_array_equal(value, np.quantile(x, q, axis=0, method="inverted_cdf"))


def test_json_round_trip_and_older_caches():
    stats = running(np.random.default_rng(0).normal(size=(50, 3))).result()
    again = Statistics.from_dict(json.loads(json.dumps(stats.to_dict())))
    assert again.to_dict() == stats.to_dict() and tuple(again.quantiles) == QUANTILES
    older = {k: v for k, v in stats.to_dict().items() if k != "quantiles"}
    assert Statistics.from_dict(older).quantiles is None and Statistics.from_dict(older).to_dict() == older


def test_statistics_refuse_nothing_and_nan():
    with pytest.raises(ValueError, match="no rows"):
        running(np.zeros((0, 2))).result()
    with pytest.raises(ValueError, match="non-finite"):
        running(np.array([[0.0, np.nan]]))
    with pytest.raises(ValueError, match="of 2 dimensions cannot take rows of 3"):
        running(np.zeros((1, 2)), np.zeros((1, 3)))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 3 * BLOCK), min_size=1, max_size=8), st.integers(0, 99))
def test_the_same_rows_give_the_same_bits_however_they_are_cut(lengths, seed):
    x = np.random.default_rng(seed).normal(size=(sum(lengths) + 1, 2)).astype(np.float32)
    pieces = np.split(x, np.cumsum(lengths))
    assert running(*pieces).result().to_dict() == running(x).result().to_dict()


# --- quantiles ---


def distributions(n: int) -> dict[str, np.ndarray]:
    rng, t = np.random.default_rng(3), np.arange(n)
    return {
        "normal": rng.normal(size=n),
        "log-normal": rng.lognormal(0, 4, n),
        "constant": np.full(n, 0.3),
        "gripper": (rng.random(n) < 0.3).astype(float),
        "rare": (rng.random(n) < 0.005).astype(float),
        "bimodal": rng.normal(size=n) * 1e-3 + np.where(rng.random(n) < 0.5, -1e6, 1e6),
        "rising": t.astype(float),
        "falling": -t.astype(float),
        "periodic": np.sin(t * (2 * np.pi / 8)),
        "blocks": (t // 5000 % 7).astype(float),
        "alternating": t % 2 * 1.0,
        "steps": np.round(rng.normal(size=n), 1),
    }


def rank_error(x: np.ndarray, q: float, value: float) -> float:
    """How far the share q lies outside the shares that `value` covers in `x`."""
    return max(0.0, (x < value).mean() - q, q - (x <= value).mean())


def assert_good(stats: Statistics, columns: dict[str, np.ndarray], bound: float) -> None:
    for i, (name, x) in enumerate(columns.items()):
        for q, values in stats.quantiles.items():
            assert rank_error(x, q, values[i]) <= bound, (name, q)
            assert values[i] in x[np.argsort(np.abs(x - values[i]))[:1]], name  # a value that occurs


def test_ranks_of_quantiles_keep_their_bound():
    columns = distributions(ROWS)
    stats = running(np.stack(list(columns.values()), axis=1)).result()
    assert_good(stats, columns, math.log2(ROWS / BLOCK) / (2 * BLOCK))  # 0.16 %
    assert stats.quantiles[0.5][list(columns).index("constant")] == 0.3
    assert stats.quantiles[0.5][list(columns).index("gripper")] == 0.0  # never in between


@pytest.mark.parametrize("seed", range(3))
def test_ranks_keep_their_bound_through_merges_of_any_shape(seed):
    columns, rng = distributions(ROWS), np.random.default_rng(seed)
    x = np.stack(list(columns.values()), axis=1)
    parts = [running(p) for p in np.split(x, np.sort(rng.integers(0, ROWS, 40)))]
    while len(parts) > 1:  # in a random tree
        a, b = rng.choice(len(parts), 2, replace=False)
        before = parts[b].result().to_dict() if parts[b]._filled else None
        parts[a].merge(parts[b])
        assert before is None or parts[b].result().to_dict() == before  # what is merged stays as it is
        parts.pop(b)
    stats = parts[0].result()
    assert_good(stats, columns, math.log2(ROWS / BLOCK) / (2 * BLOCK))
    np.testing.assert_allclose(stats.mean, x.mean(0), rtol=1e-9, atol=1e-6)
    assert stats.count == ROWS


def test_memory_stays_flat():
    stats, x = RunningStatistics(), np.random.default_rng(0).normal(size=(8 * BLOCK, 4))
    stats.update(x)
    tracemalloc.start()
    for _ in range(20):
        stats.update(x)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    block = BLOCK * 4 * 8
    assert held < 12 * block and peak < 20 * block  # 168 blocks went through; log2 of it are kept


# --- normalisation ---


def sample_normalizer() -> tuple[Normalizer, np.ndarray, np.ndarray]:
    mask, rotation = np.zeros(128, dtype=bool), np.zeros(128, dtype=bool)
    mask[[0, 1, 10, *range(33, 39)]] = True
    rotation[33:39] = True
    rng = np.random.default_rng(1)
    table = np.zeros((500, 128))
    table[:, 0], table[:, 1], table[:, 10] = rng.normal(3, 2, 500), 0.5, rng.normal(0, 0.001, 500)  # slot 1 is constant
    table[:, 33:39] = rng.normal(0, 0.4, (500, 6))
    return Normalizer(running(table).result(), mask, rotation), table, mask


def test_normalisation_formula_mask_and_rotations():
    normalizer, table, mask = sample_normalizer()
    unclipped = np.abs((table[:, 0] - table[:, 0].mean()) / (5 * table[:, 0].std()))
    y = normalizer.normalize(table)
    assert y.dtype == np.float32 and np.abs(y[:, :33]).max() <= 1 and (y[:, ~mask] == 0).all() and unclipped.max() < 1
    np.testing.assert_allclose(np.abs(y[:, 0]), unclipped, atol=1e-5)
    np.testing.assert_allclose(y[:, 10], (table[:, 10] - table[:, 10].mean()) / 0.05, atol=1e-5)  # the floor: 5 · 0.01
    np.testing.assert_array_equal(y[:, 33:39], table[:, 33:39].astype(np.float32))
    np.testing.assert_allclose(normalizer.denormalize(y), table * mask, atol=1e-5)
    far = table[:1] + 1e3
    assert normalizer.normalize(far)[0, 0] == 1.0 and normalizer.normalize(far)[0, 33] > 100  # clipped; rotations never
    assert (normalizer.center[33:39] == 0).all() and (normalizer.half_range[33:39] == 1).all()


INVERTING = [scheme for scheme in SCHEMES if scheme != "std5-clipped"]


def normalizer_of(column: np.ndarray, scheme: Scheme) -> Normalizer:
    """Of data with this one column, in slot 0."""
    mask = np.arange(128) == 0
    return Normalizer(running(column[:, None]).result().on(mask), mask, np.zeros(128, bool), scheme)


def there_and_back(column: np.ndarray, scheme: Scheme) -> np.ndarray:
    normalizer, wide = normalizer_of(column, scheme), np.zeros((len(column), 128), np.float32)
    wide[:, 0] = column
    normalized = normalizer.normalize(wide)
    assert np.isfinite(normalized).all() and (scheme in ("meanstd", "quantile") or np.abs(normalized).max() <= 1)
    return normalizer.denormalize(normalized)[:, 0]


@pytest.mark.parametrize("scheme", INVERTING)
@given(hnp.arrays(np.float32, st.integers(1, 300), elements=numbers(-100, 100)))
def test_every_value_of_the_data_comes_back(scheme: Scheme, column: np.ndarray) -> None:
    np.testing.assert_allclose(there_and_back(column, scheme), column, rtol=0, atol=1e-3)


@pytest.mark.parametrize("scheme", INVERTING)
@pytest.mark.parametrize("share", [0.0001, 0.005, 0.02, 0.5])
@pytest.mark.parametrize("values", [(1.0, 0.0), (0.0, 0.02), (-1.0, 1.0), (7.0, 7.0)])
def test_two_valued_slots_come_back(scheme: Scheme, share: float, values: tuple[float, float]) -> None:
    column = np.full(20_000, values[0], np.float32)
    column[: round(share * len(column))] = values[1]
    np.testing.assert_allclose(there_and_back(column, scheme), column, rtol=0, atol=1e-4)
    if values[0] == values[1]:
        np.testing.assert_array_equal(there_and_back(column, scheme), column)


def test_what_earlier_releases_cut_off() -> None:
    column = np.ones(1000, np.float32)
    column[:5] = 0  # a gripper that is closed in 0.5 % of the rows
    assert there_and_back(column, "std5-clipped")[0] == pytest.approx(0.6423, abs=1e-4)
    assert there_and_back(column, "std5")[0] == pytest.approx(0, abs=1e-6)


def test_std5_is_as_before_where_no_value_is_beyond() -> None:
    column = np.random.default_rng(0).uniform(-3, 4, 500).astype(np.float32)
    now, before = (normalizer_of(column, scheme) for scheme in ("std5", "std5-clipped"))
    for name in ("center", "half_range", "limit"):
        np.testing.assert_array_equal(getattr(now, name), getattr(before, name))


@pytest.mark.parametrize(
    ("scheme", "center", "half_range"),
    [("std5", 0.0, 5.0), ("minmax", 0.5, 3.5), ("meanstd", 0.0, 1.0), ("quantile", 0.25, 2.25)],
)
def test_schemes(scheme: Scheme, center: float, half_range: float) -> None:
    stats = Statistics(
        *(np.full(128, x) for x in (0.0, 1.0, -3.0, 4.0)), 9, {0.01: np.full(128, -2.0), 0.99: np.full(128, 2.5)}
    )
    normalizer = Normalizer(stats, np.ones(128, bool), np.zeros(128, bool), scheme)
    assert normalizer.center[0] == center and normalizer.half_range[0] == half_range
    far = normalizer.normalize(np.full(128, 20.0))[0]
    assert far == (1.0 if scheme in ("std5", "minmax") else pytest.approx((20 - center) / half_range))


def test_unknown_schemes_and_missing_quantiles() -> None:
    stats = Statistics(*(np.zeros(128) for _ in range(4)), 1)
    with pytest.raises(UserError, match="'minmaxx'; did you mean 'minmax'"):
        Normalizer(stats, np.ones(128, bool), np.zeros(128, bool), "minmaxx")
    with pytest.raises(ValueError, match="needs statistics with quantiles"):
        Normalizer(stats, np.ones(128, bool), np.zeros(128, bool), "quantile")


# --- extremes ---


def extremes_of(tables: list[np.ndarray], scheme: Scheme = "std5"):
    """Of episodes 10, 11, … with these columns in slot 0."""
    normalizer, stats = normalizer_of(np.concatenate(tables), scheme), running(np.concatenate(tables)[:, None]).result()
    wide = ((10 + i, np.pad(column[:, None], ((0, 0), (0, 127)))) for i, column in enumerate(tables))
    return extremes("action", stats.on(normalizer.mask), normalizer, wide)


def test_glitches_are_named_with_their_place() -> None:
    tables = [np.random.default_rng(i).normal(size=100) for i in range(3)]
    assert not extremes_of(tables).lines("push")
    tables[1][[20, 30]] = 1e3, -1e5
    tables[2][7] = 1e5
    found = extremes_of(tables)
    assert [(g.episode, g.row, g.value, g.values) for g in found.glitches] == [(11, 30, -1e5, 2), (12, 7, 1e5, 1)]
    assert found.lines("push")[0].startswith("action arm_joint_0_pos is -1e+05 at episode 11 row 30 (1 more like it)")
    assert found.lines("push")[1].endswith("; std5 reaches up to it; leave it out with --exclude-episodes push=12")
    assert all(len(line) < 200 for line in found.lines("push"))
    for table in tables:
        table[:20] = 1e5  # a fifth of the rows: not rare
    assert not extremes_of(tables).lines("push")


def test_rare_values_within_their_unit_are_no_glitch() -> None:
    tables = [np.ones(1000) for _ in range(3)]
    tables[1][:15] = 0  # a gripper
    assert not extremes_of(tables).lines("push")
    (line,) = extremes_of(tables, "std5-clipped").lines("push")
    assert line.startswith("0.5 % of action arm_joint_0_pos is beyond the range of std5-clipped and cut off")
    tables[1][3:] = 1  # 0.1 % is not more than 0.1 %
    assert not extremes_of(tables, "std5-clipped").lines("push")
