"""Panel data whose findings are known: a perfect policy, a collapsed one, one that guesses."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from dvla.cache.actions.slots import SLOTS
from dvla.drifting.config import LossConfig
from dvla.drifting.metrics import drift_of
from dvla.stages.training.panels.data import PanelData

N, G, T = 48, 6, 8
DATASETS, EMBODIMENTS = ("cup/arm", "dex<hand>"), (4, 3)
PLACES = (
    [SLOTS[f"eef_vel_{a}"] for a in "xyz"] + [SLOTS["gripper_open"]],
    [SLOTS[f"eef_pos_{a}"] for a in "xyz"] + [SLOTS["dex_finger_joint_3_pos"]],
)


def expert(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(target [N,T,128], active [N,T,128], dataset [N]): smooth waves of two datasets; the first chunk ends early."""
    rng = np.random.default_rng(seed)
    dataset = np.arange(N) % 2
    phase, size = rng.uniform(0, 6, (N, 1, 128)), rng.uniform(0.05, 0.3, (N, 1, 128))
    target = (size * np.sin(phase + 0.4 * np.arange(T)[None, :, None])).astype(np.float32)
    active = np.zeros((N, T, 128), bool)
    for k, places in enumerate(PLACES):
        active[np.ix_(dataset == k, range(T), places)] = True
    active[0, 5:] = False
    return np.where(active, target, 0), active, dataset


def panel_data(
    draws: np.ndarray, target: np.ndarray, active: np.ndarray, dataset: np.ndarray, **changes: Any
) -> PanelData:
    """Of chunks `draws` [N,G,T,128]; the drift is what it is."""
    found = drift_of(
        *(
            torch.from_numpy(np.ascontiguousarray(x))
            for x in (draws.astype(np.float32), target, active, np.asarray(EMBODIMENTS)[dataset])
        ),
        LossConfig(),
    )
    data = PanelData(
        step=500,
        datasets=DATASETS,
        embodiments=EMBODIMENTS,
        dataset=dataset,
        target=target,
        draws=draws.astype(np.float32),
        active=active,
        drift=found.step.numpy(),
        mean_square=found.mean_square.numpy(),
        temperatures=LossConfig().temperatures,
        center=np.zeros((2, 128), np.float32),
        half_range=np.ones((2, 128), np.float32),
        hz=np.array([10.0, 10.0]),
        configured=np.array([0.75, 0.25]),
        drawn=np.array([300, 100]),
        log=log(),
    )
    return dataclasses.replace(data, **changes)


def log(worse: bool = False) -> list[dict[str, Any]]:
    """Lines of a run that learns; `worse`: of one whose second dataset stands still."""
    lines = []
    for i in range(1, 13):
        fall = 0.7**i
        line = {"step": 100 * i, "loss": 5 + fall, "mse": fall, "mean_square": [0.5 * fall, 0.7 * fall, fall]}
        if i % 3 == 0:
            line |= {
                "eval/mse": fall,
                **{
                    f"eval/{m}/{name}": v
                    for name, e in zip(DATASETS, (fall, 0.4 if worse else fall))
                    for m, v in (("mse", e), ("mae", e**0.5), ("correlation", 1 - e), ("coverage", 100 - e))
                },
            }
        lines.append(line)
    return lines


def perfect(noise: float = 1e-3, **changes: Any) -> PanelData:
    """Every draw is its expert chunk, but for `noise`."""
    target, active, dataset = expert()
    draws = target[:, None] + noise * np.random.default_rng(1).standard_normal((N, G, T, 128))
    return panel_data(np.where(active[:, None], draws, 0), target, active, dataset, **changes)


def collapsed(**changes: Any) -> PanelData:
    """Every draw is the mean, but for a hair."""
    target, active, dataset = expert()
    draws = 1e-3 * np.random.default_rng(1).standard_normal((N, G, T, 128))
    return panel_data(np.where(active[:, None], draws, 0), target, active, dataset, **changes)


def guessing(**changes: Any) -> PanelData:
    """Draws with the expert's own spread that know nothing of the observation or of time."""
    target, active, dataset = expert()
    draws = target[active].std() * np.random.default_rng(1).standard_normal((N, G, T, 128))
    return panel_data(np.where(active[:, None], draws, 0), target, active, dataset, **changes)
