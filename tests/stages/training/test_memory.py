"""Counting what autograd keeps must not keep it; a step waits for a GPU once."""

from __future__ import annotations

import gc
import itertools
import math

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from dvla.batch import random_batch
from dvla.cache.loader.sample import Draws, Sample
from dvla.drifting.dit import dit_config
from dvla.drifting.policy_net import PolicyNet, PolicyNetConfig
from dvla.stages.training import loop
from dvla.stages.training.config import TrainConfig
from dvla.stages.training.context import Session
from dvla.stages.training.parallel.replicas import Replicas
from dvla.stages.training.stage_three.memory import SavedTensors
from dvla.stages.training.step import on_host


def test_what_was_counted_is_released() -> None:
    x = torch.randn(1000, requires_grad=True)
    kept = SavedTensors([x])
    gc.disable()  # a cycle would only go with the collector
    try:
        with torch.autograd.graph.saved_tensors_hooks(kept.count, lambda saved: saved):
            y = x.exp()  # which saves its output
        memory = StorageWeakRef(y.untyped_storage())
        (gradient,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        assert torch.equal(gradient, x.exp()) and kept.nbytes == 4000
        del y, gradient
        assert memory.expired()
    finally:
        gc.enable()


def test_numbers_are_read_at_once() -> None:
    given = [
        torch.tensor(0.1, requires_grad=True),
        torch.tensor(float("nan")),
        torch.tensor(1e-30, dtype=torch.float64),
    ]
    found = on_host(*given)
    assert found[0] == given[0].item() and math.isnan(found[1]) and found[2] == 1e-30


def test_a_step_reads_the_loss_and_the_norm_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a step waits for its work once; of the batches before the last one, for their loss."""
    torch.manual_seed(0)
    dit = dit_config("tiny", width=32, blocks=1, heads=2, horizon=4)
    net, batch = PolicyNet(PolicyNetConfig(feature_width=8, dit=dit)), random_batch(2, 1, 2, 8, 4, words=2)
    config, none = TrainConfig("", "", batch_size=2, draws=2, accumulate=3), np.zeros(2, np.int64)
    session = Session(config, None, net, {})  # type: ignore[arg-type]  # nothing is read
    read: list[int] = []
    monkeypatch.setattr(loop, "on_host", lambda *values: read.append(len(values)) or on_host(*values))
    samples = itertools.repeat(Sample(batch, Draws(none, none, none, none, none, none), 0, 0))
    done = loop.train_step(session, Replicas(session), samples, 0)
    assert read == [1, 1, 2] and math.isfinite(done.loss) and done.norm > 0
