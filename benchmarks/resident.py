"""The product's own training step (stages/training) on one batch that stays on its device: nothing is read."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
from torch import nn

from dvla.batch import FeatureBatch
from dvla.cache.loader.sample import Draws, Sample
from dvla.stages.training.config import TrainConfig
from dvla.stages.training.context import Session
from dvla.stages.training.loop import train_step
from dvla.stages.training.parallel.world import World
from dvla.stages.training.setup import prepare, share_network
from dvla.stages.training.step import StepDone


class Resident:
    """Every call is one step: noise, forward, loss, backward, clip, AdamW, averaged weights.

    `settings`: of `TrainConfig`. Kernels and compilation of `net` are set as a run sets them. `UserError` for settings
    that a run refuses."""

    def __init__(self, net: nn.Module, batch: FeatureBatch, **settings: Any) -> None:
        device = batch.tokens.device
        config = TrainConfig("", "", device=str(device), **settings)
        self.session = Session(config, None, net, {}, world=World(device))
        prepare(self.session)
        self.shared = share_network(self.session)
        net.train()
        self.steps = 0
        self.give(batch)

    def give(self, batch: FeatureBatch, **settings: Any) -> None:
        """Train on another batch from now on, with other settings of the loss or of the number of noise samples."""
        self.session.config = dataclasses.replace(self.session.config, batch_size=len(batch), **settings)
        none = np.zeros(len(batch), np.int64)
        self._samples = itertools.repeat(Sample(batch, Draws(none, none, none, none, none, none), 0, 0))

    def __call__(self) -> StepDone:
        self.steps += 1
        return train_step(self.session, self.shared, self._samples, self.steps - 1)
