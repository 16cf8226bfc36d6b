"""Held-out metrics: known inputs, numpy's formulas, masks, and sums that ranks add."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dvla.batch import FeatureBatch
from dvla.stages.metrics import EPSILON, METRICS, ActionMetrics

DATASETS, EMBODIMENTS = ("arm", "hand", "never"), ("gripper_joint", "dex_hand", "bimanual")
OWNER = (0, 1, 0)                                           # embodiment of each dataset
ACTIVE = (slice(0, 5), slice(3, 9), slice(0, 1))            # slots of each dataset
STEPS = 6


def make_batch(rng: np.random.Generator, dataset: np.ndarray, scale: float = 1.0) -> FeatureBatch:
    """Expert actions with a mean and a spread of their own per dataset and slot; some windows end early; the last active slot is constant."""
    b = len(dataset)
    mask, action = np.zeros((b, 128), bool), np.zeros((b, STEPS, 128), np.float32)
    for i, k in enumerate(dataset):
        mask[i, ACTIVE[k]] = True
    action[:] = scale * rng.standard_normal((b, STEPS, 128)) * np.linspace(0.1, 1, 128) + dataset[:, None, None]
    action[..., 4], action[..., 8] = 0.25, -0.5
    step_mask = np.arange(STEPS) < rng.integers(1, STEPS + 1, b)[:, None]
    empty = torch.zeros(b, 0, dtype=torch.int64)
    return FeatureBatch(
        tokens=torch.zeros(b, 0, 2), token_mask=empty.bool(), view_id=empty, frame_id=empty, text=torch.zeros(b, 1, 2), text_mask=torch.ones(b, 1).bool(),
        proprio=torch.zeros(b, 128), action=torch.from_numpy(action), action_mask=torch.from_numpy(mask), step_mask=torch.from_numpy(step_mask),
        embodiment=torch.tensor([OWNER[k] for k in dataset]), control_hz=torch.full((b,), 10.0), dataset=torch.from_numpy(dataset),
        frame_index=torch.zeros(b, dtype=torch.int64)).check()


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
            p, a = (np.concatenate([values[keep] for values, keep in column]) for column in zip(*(
                [(x[:, :, d].double().numpy(), (b.step_mask & b.action_mask[:, None, d] & (b.dataset == k)[:, None]).numpy())
                 for x in (pred, b.action)] for pred, b in batches)))
            errors.append(p - a)
            if len(a) and a.std() >= 1e-4:
                rows.append((np.corrcoef(p, a)[0, 1], 100 * p.std() / a.std(), np.sqrt(((p - a) ** 2).mean()) / (np.sqrt((a**2).mean()) + EPSILON)))
    error = np.concatenate(errors)
    return dict(zip(METRICS, ((error**2).mean(), np.abs(error).mean(), *np.mean(rows, axis=0))))


def test_numpy_agrees(batches) -> None:
    result = measured(batches).result()
    groups = {"": [0, 1], "/arm": [0], "/hand": [1], "/embodiment/gripper_joint": [0], "/embodiment/dex_hand": [1]}
    assert result.keys() == {f"{metric}{suffix}" for metric in METRICS for suffix in groups}    # none for what was never seen
    for suffix, datasets in groups.items():
        for metric, value in by_numpy(batches, datasets).items():
            assert result[metric + suffix] == pytest.approx(value, rel=1e-6), metric + suffix


def test_ranks_add_up(batches) -> None:
    whole, parts = measured(batches), [measured(batches[:1]), measured(batches[1:])]
    merged = ActionMetrics(DATASETS, EMBODIMENTS)
    merged.load_sums(sum(part.sums() for part in parts))
    assert whole.sums().dtype == torch.float64 and whole.sums().ndim == 1
    assert merged.result() == pytest.approx(whole.result(), rel=1e-12)
    merged.update(*batches[0])      # and it goes on from there
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
    assert nothing["nl2"] == pytest.approx(1, abs=0.02)     # ε apart


def test_an_expert_that_stands_still_has_errors_only() -> None:
    batch = make_batch(np.random.default_rng(1), np.array([2, 2]))
    batch = batch.replace(action=torch.full_like(batch.action, 0.7))
    assert measured([(batch.action + 0.5, batch)]).result() == pytest.approx(
        {f"{m}{s}": v for s in ("", "/never", "/embodiment/gripper_joint") for m, v in (("mse", 0.25), ("mae", 0.5))}, rel=1e-5)


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
