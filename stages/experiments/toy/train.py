"""The toys' training runs: small generators on one CPU core, each a pure function of its settings and seed.

Letters: n samples, N observations with an expert chunk, B of them in a batch, G noise samples per observation, P
positives, S noise samples of a held-out observation, D entries of a sample, K temperatures.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ....drifting.config import AFFINITY_FLOOR, DIFFUSION_STEPS, TEMPERATURES
from ....drifting.heads import ddim, diffusion_pair, euler, flow_pair
from ....drifting.losses import DriftLoss, drifting_loss
from ....drifting.metrics import mode_metrics, sliced_wasserstein
from . import data

Tick = Callable[[int], None]
"""Called with the number of finished steps."""
SHOWN = 64  # samples of one held-out observation that are kept for the figure


@dataclass(frozen=True)
class PlaneRun:
    """Pure drifting of a generator from noise [2] to samples [2].

    The paper's notebook trains the same network from 32 noise entries with batches of 2048 at learning rate 1e-3; an
    eighth of the batch, two noise entries and a higher rate reach the same result in under a minute.
    """

    picture: str  # target distribution: one of data.TARGETS
    temperatures: tuple[float, ...] = TEMPERATURES  # kernel widths
    floor: float | None = AFFINITY_FLOOR  # None: Algorithm 2, as in the notebook
    skip_std: float = 0.0  # spread of a linear skip from noise to sample; 0: no skip, as in the notebook
    batch: int = 256  # generated and expert samples of a step, each


@dataclass(frozen=True)
class ActionRun:
    """One method on the two-way toy; all share network, data, optimizer and steps."""

    kind: str  # mse, flow, diffusion, pure_drift, hybrid
    draws: int = 8  # G, noise samples per observation
    positives: int = 1  # P: the observation's own chunk and those of its P - 1 nearest neighbors
    temperatures: tuple[float, ...] = TEMPERATURES  # kernel widths
    floor: float | None = AFFINITY_FLOOR  # of the field; None: Algorithm 2 (raw coordinates)
    skip_std: float = 0.2  # std of the initial samples; the actions' own std is 0.2
    drift_weight: float = 1.0  # λ of hybrid
    observations: int = 4096  # N trained on, each with one expert chunk
    horizon: int = data.STEPS  # steps of a chunk; D = 2 · this
    longer: int = 1  # factor on the number of training steps

    @property
    def passes(self) -> tuple[int, ...]:
        """Numbers of forward passes per action to measure."""
        return {"flow": (1, 10), "diffusion": (5, DIFFUSION_STEPS)}.get(self.kind, (1,))


class Generator(nn.Module):
    """Three hidden SiLU layers.

    With `skip_std` also a linear skip of the noise and a zero last layer, so that the first samples are the skip.
    """

    def __init__(self, context: int, noise: int, out: int, width: int, skip_std: float | None, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sizes = (context + noise, width, width, width)
            layers = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.SiLU())]
            last = nn.Linear(width, out)
            self.body = nn.Sequential(*layers, last)
            self.skip: nn.Linear | None = None
            if skip_std is not None:
                self.skip = nn.Linear(noise, out, bias=False)
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
                nn.init.normal_(self.skip.weight, std=skip_std / math.sqrt(noise))

    def forward(self, noise: Tensor, context: Tensor | None = None) -> Tensor:
        """noise […,noise], context […,context] or None → […,out]."""
        body = self.body(noise if context is None else torch.cat([context, noise], dim=-1))  # […,out]
        return body if self.skip is None else body + self.skip(noise)  # […,out]


def _descend(net: Generator, steps: int, lr: float, loss_of: Callable[[int], Tensor], tick: Tick) -> None:
    """Train with Adam and a cosine learning-rate schedule to zero."""
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss_of(step).backward()
        optimizer.step()
        tick(step + 1)


def curve_steps(steps: int, count: int = 24) -> list[int]:
    """Steps at which a run in the plane is measured, dense at the beginning."""
    return sorted({round(steps * (i / count) ** 2) for i in range(count + 1)})


def train_plane(run: PlaneRun, steps: int, seed: int, tick: Tick, measured: int = 2048) -> dict[str, Any]:
    """Train and measure.

    Returns:
        curve: per measured step the sliced-Wasserstein distance to fresh data (mean over 4 fresh sets of `measured`
            samples) and log mean_square per temperature.
        data_to_data: the same distance between two fresh sets (mean over 16 pairs).
        nearest: mean distance of a generated sample to the nearest fresh data point; `nearest_data`: that of fresh
            data. A blur has a small sliced distance, but not this.
        samples: [measured steps, 1000, 2] from the same noise.
    """
    sample = data.TARGETS[run.picture]
    random = torch.Generator().manual_seed(seed)
    # Measuring has its own generator, so that it does not change the training.
    measure = torch.Generator().manual_seed(seed + 1_000_003)
    net = Generator(0, 2, 2, 256, run.skip_std or None, seed)
    shown = torch.randn(1000, 2, generator=measure)  # [1000,2]
    between = [sliced_wasserstein(sample(measured, measure), sample(measured, measure)) for _ in range(16)]
    curve: list[dict[str, Any]] = []
    samples: list[Tensor] = []
    at = set(curve_steps(steps))

    def note(step: int, loss: DriftLoss) -> None:
        with torch.no_grad():
            made = net(torch.randn(measured, 2, generator=measure))  # [measured,2]
            samples.append(net(shown))
        distance = [sliced_wasserstein(made, sample(measured, measure)) for _ in range(4)]
        log_mean_square = loss.field.mean_square.clamp(min=1e-30).log().tolist()
        curve.append({"step": step, "distance": sum(distance) / len(distance), "log_mean_square": log_mean_square})

    def loss_of(step: int) -> Tensor:
        made = net(torch.randn(run.batch, 2, generator=random))  # [batch,2]
        loss = drifting_loss(
            made[None], sample(run.batch, random)[None], temperatures=run.temperatures, floor=run.floor
        )
        if step in at:
            note(step, loss)
        return loss.per_condition.mean()

    _descend(net, steps, 1e-2, loss_of, tick)
    loss_of(steps)
    with torch.no_grad():
        made, fresh = net(torch.randn(measured, 2, generator=measure)), sample(measured, measure)  # [measured,2] each
    nearest = [torch.cdist(x, fresh).min(1).values.mean().item() for x in (made, sample(measured, measure))]
    reference = sum(between) / len(between)
    return {
        **dataclasses.asdict(run),
        "steps": steps,
        "seed": seed,
        "curve": curve,
        "start": curve[0]["distance"],
        "distance": curve[-1]["distance"],
        "data_to_data": reference,
        "ratio": curve[-1]["distance"] / reference,
        "nearest": nearest[0],
        "nearest_data": nearest[1],
        "samples": torch.stack(samples),
    }


def train_actions(
    run: ActionRun, steps: int, seed: int, tick: Tick, *, batch: int = 64, tested: int = 64, draws: int = 256
) -> dict[str, Any]:
    """Train `steps` · `run.longer` steps on one expert chunk per observation; measure on `tested` held-out ones.

    Returns:
        metrics: forward passes → `ModeMetrics`.
        shown: [SHOWN,D], samples of one held-out observation with the most passes.
    """
    random = torch.Generator().manual_seed(seed)
    observed = data.observations(run.observations, random)  # [N,o]
    expert = data.expert(observed, random, run.horizon)  # [N,D]
    near = data.neighbors(observed, run.positives)  # [N,P] each observation first
    d, g = expert.shape[1], 1 if run.kind == "mse" else run.draws
    net = Generator(data.OBSERVED + 1, d, d, 128, run.skip_std, seed)

    def predict(observation: Tensor, x: Tensor, time: Tensor | float) -> Tensor:
        """observation [B,o], x [B,G,D], time [B,G,1] or one number → [B,G,D]."""
        time = time if isinstance(time, Tensor) else x.new_full((*x.shape[:2], 1), time)
        return net(x, torch.cat([observation[:, None].expand(-1, x.shape[1], -1), time], dim=-1))

    def loss_of(step: int) -> Tensor:
        rows = torch.randint(run.observations, (batch,), generator=random)  # [B]
        noise = torch.randn(batch, g, d, generator=random)  # [B,G,D]
        observation, own = observed[rows], expert[rows][:, None]  # [B,o], [B,1,D]
        if run.kind == "mse":
            return (predict(observation, torch.zeros_like(noise), 0.0) - own).square().mean()
        if run.kind == "flow":
            time = torch.rand(batch, g, 1, generator=random)  # [B,G,1]
            x, target = flow_pair(own, noise, time)  # [B,G,D] each
            return (predict(observation, x, time) - target).square().mean()
        if run.kind == "diffusion":
            level = torch.randint(DIFFUSION_STEPS, (batch, g, 1), generator=random)  # [B,G,1]
            x, target = diffusion_pair(own, noise, level)  # [B,G,D] each
            return (predict(observation, x, (level + 1) / DIFFUSION_STEPS) - target).square().mean()
        made = predict(observation, noise, 0.0)  # [B,G,D]
        drift = drifting_loss(
            made, expert[near[rows]], temperatures=run.temperatures, floor=run.floor
        ).per_condition.mean()
        return drift if run.kind == "pure_drift" else (made - own).square().mean() + run.drift_weight * drift

    steps = steps * run.longer
    _descend(net, steps, 3e-3, loss_of, tick)

    test = torch.Generator().manual_seed(seed + 1_000_003)
    observation = data.held_out(tested, test)  # [tested,o]
    noise = torch.randn(tested, draws, d, generator=test)  # [tested,S,D]
    metrics = {}
    with torch.no_grad():
        for passes in run.passes:
            if run.kind == "flow":
                made = euler(lambda x, t: predict(observation, x, t), noise, passes)
            elif run.kind == "diffusion":
                made = ddim(lambda x, level: predict(observation, x, (level + 1) / DIFFUSION_STEPS), noise, passes)
            else:
                made = predict(observation, torch.zeros_like(noise) if run.kind == "mse" else noise, 0.0)
            metrics[passes] = dataclasses.asdict(
                mode_metrics(made, data.modes(observation, run.horizon), data.shares(observation))
            )
    return {**dataclasses.asdict(run), "steps": steps, "seed": seed, "metrics": metrics, "shown": made[0, :SHOWN]}


def expert_metrics(seed: int, tested: int = 64, draws: int = 256) -> dict[str, Any]:
    """What the expert itself scores with as many samples, in the form of `train_actions`'s result."""
    test = torch.Generator().manual_seed(seed + 2_000_003)
    observation = data.held_out(tested, test)  # [tested,o]
    made = data.expert(observation.repeat_interleave(draws, 0), test).unflatten(0, (tested, draws))  # [tested,S,D]
    return {
        "kind": "expert",
        "seed": seed,
        "metrics": {1: dataclasses.asdict(mode_metrics(made, data.modes(observation), data.shares(observation)))},
        "shown": made[0, :SHOWN],
    }
