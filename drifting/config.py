"""Settings of the loss, without torch: the command line's help is made from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval

from ..errors import UserError, unknown

TEMPERATURES = (0.02, 0.05, 0.2)
AFFINITY_FLOOR = 1e-6
ONE_STEP = ("mse", "pure_drift", "hybrid")
"""Kinds of head that act in one forward pass."""
DENOISING = ("flow", "diffusion")
"""Kinds that act in several, on the same trunk: what drifting is compared with (`heads.py`)."""
POLICY_TEMPERATURES = (*TEMPERATURES, 1.0)
"""The release's three drift temperatures, and one so wide that every sample counts: there the field pulls the mean of
an observation's samples to its expert. With one expert chunk and a few samples the narrow ones alone leave that mean
inexact (docs/results.md)."""
DIFFUSION_STEPS = 100
"""Noise levels of the diffusion head, as in Diffusion Policy."""


def require_range(what: str, config: object, most: Mapping[str, int]) -> None:
    """`UserError` naming the first field of a config that is below 1 or above the `most` given for it; None passes."""
    for name, limit in most.items():
        value = getattr(config, name)
        if value is not None and not 1 <= value <= limit:
            raise UserError(f"{what} {name} is {value}; it must be 1 to {limit}")


@dataclass(frozen=True)
class LossConfig:
    """What stages two and three minimize."""

    kind: Literal["mse", "pure_drift", "hybrid", "flow", "diffusion"] = "hybrid"  # hybrid = mse + drift_weight · drift
    sample_steps: Annotated[int, Interval(ge=0, le=10_000)] = (
        0  # passes per action; 0 = the kind's own: 1, flow 10, diffusion 100
    )
    drift_weight: Annotated[float, Ge(0)] = 1.0  # λ of the hybrid; well below 0.1 regression merges modes (docs/toy.md)
    # of the drift: kernel widths, in units of the mean distance
    temperatures: Annotated[tuple[float, ...], Gt(0)] = POLICY_TEMPERATURES
    floor: Annotated[float, Ge(0)] = AFFINITY_FLOOR  # floor under the product of the two softmaxes
    distance: Literal["chunk", "step"] = "chunk"  # compare whole [T·d] chunks, or each step on its own
    embodiments: Annotated[int, Interval(ge=1, le=2**16)] = 7  # E, groups with a distance scale of their own
    neighbours: Annotated[int, Ge(0)] = 0  # of older versions; must be 0
    queue: Literal["none", "task", "global"] = (
        "none"  # ablation: earlier chunks of the same task, or of any, compared too
    )
    queue_size: Annotated[int, Interval(ge=1, le=2**20)] = 64  # chunks kept per queue, expert and generated each

    def __post_init__(self) -> None:
        if self.kind not in ONE_STEP + DENOISING:
            raise unknown("loss kind", str(self.kind), ONE_STEP + DENOISING)
        most = {"flow": 1000, "diffusion": DIFFUSION_STEPS}.get(self.kind, 1)
        if not 0 <= self.sample_steps <= most:
            raise UserError(
                f"sample_steps is {self.sample_steps}; of a {self.kind} head it must be 0 (the kind's own) to {most}"
            )
        if self.queue not in ("none", "task", "global"):
            raise unknown("queue", str(self.queue), ("none", "task", "global"))
        if self.neighbours < 0 or self.queue_size < 1:
            raise UserError(
                f"neighbours is {self.neighbours} and queue_size {self.queue_size}; they must be at least 0 and 1"
            )
        if (self.neighbours or self.queue != "none") and self.kind not in ("pure_drift", "hybrid"):
            raise UserError(
                f"neighbours and queue are for losses with a drift (pure_drift, hybrid); a {self.kind} head has none"
            )
