"""The toys' data: two distributions in the plane, and a robot that may pass an obstacle on either side.

Letters: n samples, T steps of a chunk, D = 2T its entries. All float32 on the CPU;
every function is pure given its `torch.Generator`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# --- in the plane -----------------------------------------------------------------------------------------------------


def swiss_roll(n: int, generator: torch.Generator) -> Tensor:
    """[n,2] within about [−1, 1]: two turns of a spiral with noise of std 0.03."""
    angle = 0.5 * math.pi + 4 * math.pi * torch.rand(n, generator=generator)  # [n]
    points = angle[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1) / (4.5 * math.pi)  # [n,2]
    return points + 0.03 * torch.randn(n, 2, generator=generator)


def checkerboard(n: int, generator: torch.Generator) -> Tensor:
    """[n,2] in [−1, 1]: the dark half of 4 × 4 squares."""
    odd = torch.randint(0, 2, (n, 1), generator=generator)  # [n,1]
    square = 2 * torch.randint(0, 2, (n, 2), generator=generator) + odd  # [n,2]
    return (square + torch.rand(n, 2, generator=generator)) / 2 - 1


TARGETS = {"swiss roll": swiss_roll, "checkerboard": checkerboard}


# --- two ways around an obstacle --------------------------------------------------------------------------------------

OBSERVED = 2  # entries of an observation, each uniform in [−1, 1]
STEPS = 4  # of an expert chunk by default, two coordinates each
NOISE = 0.03  # std of an expert within its mode, per entry; all normalized actions together have std 0.2
BULGE = 0.3  # greatest sideways distance from the straight path


def right_share(observation: Tensor) -> Tensor:
    """Probability [n] of the right side for `observation` [n,OBSERVED]: 0.7 if its first entry is < 0, else 0.5."""
    return torch.where(observation[:, 0] < 0, 0.7, 0.5)


def shares(observation: Tensor) -> Tensor:
    """Probabilities [n,2] of the modes, in the order of `modes`."""
    right = right_share(observation)  # [n]
    return torch.stack([1 - right, right], dim=1)


def modes(observation: Tensor, steps: int = STEPS) -> Tensor:
    """The noiseless chunks [n,2,D] for observations [n,OBSERVED]: first to the left of the obstacle, then to the right.

    The observation decides the direction and distance of the path's end, so that the mean of the modes is not a chunk
    of another observation.
    """
    time = torch.arange(1, steps + 1) / steps  # [T]
    heading = 0.25 * math.pi * observation[:, 1]  # [n] rad
    reach = 0.3 + 0.1 * observation[:, 0]  # [n]
    forward = torch.stack([heading.cos(), heading.sin()], dim=1)  # [n,2]
    left = torch.stack([-heading.sin(), heading.cos()], dim=1)  # [n,2]
    straight = (reach[:, None] * time)[..., None] * forward[:, None]  # [n,T,2]
    aside = (BULGE * (math.pi * time).sin())[:, None] * left[:, None]  # [n,T,2]
    return torch.stack([straight + aside, straight - aside], dim=1).flatten(2)  # [n,2,D]


def expert(observation: Tensor, generator: torch.Generator, steps: int = STEPS) -> Tensor:
    """One chunk [n,D] for each observation: a mode sampled by `right_share`, plus noise."""
    right = torch.rand(len(observation), generator=generator) < right_share(observation)  # [n]
    chunk = modes(observation, steps)[torch.arange(len(observation)), right.long()]  # [n,D]
    return chunk + NOISE * torch.randn(chunk.shape, generator=generator)


def observations(n: int, generator: torch.Generator) -> Tensor:
    """[n,OBSERVED] uniform in [−1, 1]."""
    return 2 * torch.rand(n, OBSERVED, generator=generator) - 1


def held_out(n: int, generator: torch.Generator) -> Tensor:
    """Held-out observations [n,OBSERVED]; the first, which the figure shows, is always the same, 70 % right."""
    observation = observations(n, generator)
    observation[0] = torch.tensor([-0.5, *[0.0] * (OBSERVED - 1)])
    return observation


def neighbors(observation: Tensor, count: int) -> Tensor:
    """[n,count] int64: the nearest observations to each of `observation` [n,OBSERVED], itself first."""
    if count == 1:
        return torch.arange(len(observation))[:, None]
    return torch.cdist(observation, observation).fill_diagonal_(-1.0).topk(count, largest=False).indices
