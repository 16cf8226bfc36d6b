"""Counting what autograd keeps must not keep it."""

from __future__ import annotations

import gc

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from dvla.stages.training.stage_three.memory import SavedTensors


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
