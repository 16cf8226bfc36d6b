"""Held-out metrics: known inputs, numpy's formulas, masks, and sums that ranks add."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dvla.batch import FeatureBatch
from dvla.drifting.config import LossConfig
from dvla.drifting.losses import counting, policy_loss
from dvla.drifting.metrics import (
    EPSILON,
    METRICS,
    ActionMetrics,
    drift_of,
    drift_strength,
    mmd,
    mode_coverage,
    set_metrics,
)

DATASETS, EMBODIMENTS = ("arm", "hand", "never"), ("gripper_joint", "dex_hand", "bimanual")
OWNER = (0, 1, 0)  # embodiment of each dataset
ACTIVE = (slice(0, 5), slice(3, 9), slice(0, 1))  # slots of each dataset
STEPS = 6


def make_batch(rng: np.random.Generator, dataset: np.ndarray, scale: float = 1.0) -> FeatureBatch:
    """Expert actions with a mean and a spread of their own per dataset and slot; some windows end early; the last
    active slot is constant."""
    b = len(dataset)
    mask, action = np.zeros((b, 128), bool), np.zeros((b, STEPS, 128), np.float32)
    for i, k in enumerate(dataset):
        mask[i, ACTIVE[k]] = True
    action[:] = scale * rng.standard_normal((b, STEPS, 128)) * np.linspace(0.1, 1, 128) + dataset[:, None, None]
    action[..., 4], action[..., 8] = 0.25, -0.5
    step_mask = np.arange(STEPS) < rng.integers(1, STEPS + 1, b)[:, None]
    empty = torch.zeros(b, 0, dtype=torch.int64)
    return FeatureBatch(
        tokens=torch.zeros(b, 0, 2),
        token_mask=empty.bool(),
        view_id=empty,
        frame_id=empty,
        text=torch.zeros(b, 1, 2),
        text_mask=torch.ones(b, 1).bool(),
        proprio=torch.zeros(b, 128),
        action=torch.from_numpy(action),
        action_mask=torch.from_numpy(mask),
        step_mask=torch.from_numpy(step_mask),
        embodiment=torch.tensor([OWNER[k] for k in dataset]),
        control_hz=torch.full((b,), 10.0),
        dataset=torch.from_numpy(dataset),
        frame_index=torch.zeros(b, dtype=torch.int64),
    ).check()


@pytest.fixture(scope="module")
def batches() -> list[tuple[torch.Tensor, FeatureBatch]]:
    """Four batches with noisy predictions; entries that do not count hold huge values and NaN."""
    rng, out = np.random.default_rng(0), []
    for _ in range(4):
        batch = make_batch(rng, rng.integers(0, 2, 12))
        pred = 0.5 * batch.action + 0.2 * torch.from_numpy(rng.standard_normal(batch.action.shape).astype(np.float32))
        active = batch.step_mask[..., None] & batch.action_mask[:, None]
        garbage = torch.where(torch.rand(pred.shape, generator=torch.Generator().manual_seed(0)) < 0.5, torch.nan, 1e30)
        out.append((torch.where(active, pred, garbage), batch))
    return out


def measured(batches: list[tuple[torch.Tensor, FeatureBatch]]) -> ActionMetrics:
    metrics = ActionMetrics(DATASETS, EMBODIMENTS)
    for pred, batch in batches:
        metrics.update(pred, batch)
    return metrics


def by_numpy(batches: list[tuple[torch.Tensor, FeatureBatch]], datasets: list[int]) -> dict[str, float]:
    """The docstring's formulas on the concatenated entries of some datasets."""
    errors, rows = [], []
    for k in datasets:
        for d in range(128):
            p, a = (
                np.concatenate([values[keep] for values, keep in column])
                for column in zip(
                    *(
                        [
                            (
                                x[:, :, d].double().numpy(),
                                (b.step_mask & b.action_mask[:, None, d] & (b.dataset == k)[:, None]).numpy(),
                            )
                            for x in (pred, b.action)
                        ]
                        for pred, b in batches
                    )
                )
            )
            errors.append(p - a)
            if len(a) and a.std() >= 1e-4:
                rows.append(
                    (
                        np.corrcoef(p, a)[0, 1],
                        100 * p.std() / a.std(),
                        np.sqrt(((p - a) ** 2).mean()) / (np.sqrt((a**2).mean()) + EPSILON),
                    )
                )
    error = np.concatenate(errors)
    return dict(zip(METRICS, ((error**2).mean(), np.abs(error).mean(), *np.mean(rows, axis=0))))


def test_numpy_agrees(batches) -> None:
    result = measured(batches).result()
    groups = {"": [0, 1], "/arm": [0], "/hand": [1], "/embodiment/gripper_joint": [0], "/embodiment/dex_hand": [1]}
    assert result.keys() == {
        f"{metric}{suffix}" for metric in METRICS for suffix in groups
    }  # none for what was never seen
    for suffix, datasets in groups.items():
        for metric, value in by_numpy(batches, datasets).items():
            assert result[metric + suffix] == pytest.approx(value, rel=1e-6), metric + suffix


def test_ranks_add_up(batches) -> None:
    whole, parts = measured(batches), [measured(batches[:1]), measured(batches[1:])]
    merged = ActionMetrics(DATASETS, EMBODIMENTS)
    merged.load_sums(sum(part.sums() for part in parts))
    assert whole.sums().dtype == torch.float64 and whole.sums().ndim == 1
    assert merged.result() == pytest.approx(whole.result(), rel=1e-12)
    merged.update(*batches[0])  # and it goes on from there
    assert merged.result() == pytest.approx(measured([*batches, batches[0]]).result(), rel=1e-12)


def test_a_perfect_and_a_collapsed_prediction(batches) -> None:
    perfect = measured([(batch.action, batch) for _, batch in batches]).result()
    assert perfect["mse"] == perfect["mae"] == perfect["nl2"] == 0
    assert perfect["correlation"] == pytest.approx(1) and perfect["coverage"] == pytest.approx(100)
    collapsed = measured([(torch.full_like(batch.action, 0.3), batch) for _, batch in batches]).result()
    assert collapsed["correlation"] == 0 and collapsed["coverage"] == pytest.approx(0, abs=1e-4)
    opposite = measured([(-2 * batch.action, batch) for _, batch in batches]).result()
    assert opposite["correlation"] == pytest.approx(-1) and opposite["coverage"] == pytest.approx(200)
    nothing = measured([(torch.zeros_like(batch.action), batch) for _, batch in batches]).result()
    assert nothing["nl2"] == pytest.approx(1, abs=0.02)  # ε apart


def test_an_expert_that_stands_still_has_errors_only() -> None:
    batch = make_batch(np.random.default_rng(1), np.array([2, 2]))
    batch = batch.replace(action=torch.full_like(batch.action, 0.7))
    assert measured([(batch.action + 0.5, batch)]).result() == pytest.approx(
        {f"{m}{s}": v for s in ("", "/never", "/embodiment/gripper_joint") for m, v in (("mse", 0.25), ("mae", 0.5))},
        rel=1e-5,
    )


def test_nothing_seen_and_wrong_shapes(batches) -> None:
    assert ActionMetrics(DATASETS, EMBODIMENTS).result() == {}
    with pytest.raises(ValueError, match=r"pred: expected \(12, 6, 128\), got \(12, 1, 6, 128\)"):
        ActionMetrics(DATASETS, EMBODIMENTS).update(batches[0][0][:, None], batches[0][1])


def test_half_precision_predictions_are_summed_exactly() -> None:
    """Sums are float64: many entries far from zero keep their spread."""
    batch = make_batch(np.random.default_rng(2), np.zeros(64, np.int64), scale=0.01)
    batch = batch.replace(action=batch.action + 100)
    result = measured([(batch.action, batch)] * 20).result()
    assert result["coverage"] == pytest.approx(100) and result["correlation"] == pytest.approx(1)


# --- a set against a set, and drift ---------------------------------------------------------------------------------


def cloud(seed: int, n: int = 300, d: int = 6) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_slots_hold_what_the_means_are_made_of(batches) -> None:
    metrics = measured(batches)
    slots, result = metrics.slots(), metrics.result()
    for name in METRICS[2:]:
        assert slots[name].nanmean().item() == pytest.approx(result[name])
        assert slots[name][:, 4].isnan().all() and slots[name][2].isnan().all()  # a constant slot, a dataset never seen
    assert slots["mse"][0, 4] > 0 and slots["mse"][2].isnan().all()
    assert slots["mae"].isfinite().sum() == 5 + 6


def test_mmd_of_known_sets() -> None:
    same = [mmd(cloud(2 * i), cloud(2 * i + 1)) for i in range(8)]
    assert abs(np.mean(same)) < 2e-3 and min(same) < 0 < max(same)  # unbiased
    assert mmd(cloud(0), cloud(0)) == pytest.approx(0, abs=1e-12)
    shifted = [mmd(cloud(0) + shift, cloud(1)) for shift in (0.5, 1.0, 2.0)]
    assert 0.01 < shifted[0] < shifted[1] < shifted[2] < 1
    assert mmd(torch.zeros(300, 6), cloud(1)) > 0.1  # collapsed to the middle
    assert mmd(10 * cloud(0) + 3, 10 * cloud(1) + 3) == pytest.approx(mmd(cloud(0), cloud(1)), rel=1e-4)  # has no unit
    with pytest.raises(ValueError, match="two sets"):
        mmd(cloud(0, 5), cloud(0, 6))


def test_mode_coverage_of_known_sets() -> None:
    assert mode_coverage(cloud(0), cloud(0)) == 1 and mode_coverage(cloud(1), cloud(0)) == 1
    far = 20 * torch.eye(6)[:4]  # four modes
    expert = torch.cat([cloud(i, 50) + center for i, center in enumerate(far)])
    for reached in range(1, 5):
        predicted = torch.cat([cloud(9 + i, 50) + center for i, center in enumerate(far[:reached])])
        assert mode_coverage(predicted, expert, cells=4) == reached / 4
    assert mode_coverage(expert.mean(0).expand(200, -1), cloud(0)) == pytest.approx(0.1)  # collapsed
    rare = torch.cat([cloud(9, 196) + far[0], *(cloud(9, 1) + center for center in far[1:])])
    assert mode_coverage(rare, expert, cells=4) == 0.25  # one in 200 is not enough
    with pytest.raises(ValueError, match="at least 8"):
        mode_coverage(cloud(0), cloud(0, 7))


def test_set_metrics_take_whole_chunks_of_each_dataset() -> None:
    batch = make_batch(np.random.default_rng(3), np.array([0, 1] * 60))
    active = batch.step_mask[..., None] & batch.action_mask[:, None]
    pred = torch.where(active, batch.action, torch.nan)  # what does not count is not read
    assert set_metrics(pred, batch.action, active, batch.dataset) == pytest.approx(
        {"mmd": 0, "mode_coverage": 100}, abs=1e-9
    )
    found = set_metrics(torch.where(active, 0.0, torch.nan), batch.action, active, batch.dataset)
    assert found["mmd"] > 0.1 and found["mode_coverage"] < 50
    assert set_metrics(pred[:6], batch.action[:6], active[:6], batch.dataset[:6]) == {}


def test_drift_is_what_training_measures() -> None:
    """mean(F²) of `drift_of` is the training loss's, temperature by temperature, and its steps lead draws to the
    expert."""
    batch = make_batch(np.random.default_rng(4), np.array([0, 1, 0, 1, 0]))
    random = torch.Generator().manual_seed(0)
    draws = (
        batch.action[:, None]
        + 0.3 * torch.randn(5, 1, STEPS, 128, generator=random)
        + 0.2 * torch.randn(5, 4, STEPS, 128, generator=random)
    )
    config = LossConfig(kind="hybrid")
    active = counting(batch)
    drift, loss = drift_of(draws, batch.action, active, batch.embodiment, config), policy_loss(draws, batch, config)
    assert torch.allclose(drift.mean_square, loss.mean_square, rtol=1e-4)
    assert (
        drift.step.shape == (4, *draws.shape)
        and not drift.step.masked_select(~active[None, :, None].expand_as(drift.step)).any()
    )
    back = (
        ((batch.action[:, None] - draws) * active[:, None] * drift.step.sum(0)).flatten(1).sum(1)
    )  # [B] along the way to the expert
    assert (back > 0).all() and back.sum() > 1
    at_rest = drift_of(batch.action[:, None].expand(-1, 4, -1, -1), batch.action, active, batch.embodiment, config)
    assert at_rest.step.abs().max() < 1e-4
    strength = drift_strength(drift.mean_square.tolist(), config.temperatures)
    assert strength["lambda/0.02"] == pytest.approx(loss.mean_square[0].log().item(), rel=1e-3) and list(strength) == [
        "lambda/0.02",
        "lambda/0.05",
        "lambda/0.2",
        "lambda/1",
    ]
