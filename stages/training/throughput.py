"""Where the time of training goes: waiting, copying, computing."""

from __future__ import annotations

import time
from typing import Any

import torch

from ...batch import FeatureBatch
from .parallel.world import World

BINDING_WAIT = 0.05  # share of the time spent waiting for data from which on reading is what limits
BINDING_COPY = 0.9  # share of the time in which something is being copied from which on copying is


def copy_seconds(batch: FeatureBatch) -> float:
    """How long it takes to copy a batch's features to the device it is on, measured once; 0 on a CPU."""
    device = batch.tokens.device
    if device.type == "cpu":
        return 0.0
    host = torch.empty(batch.tokens.nbytes + batch.text.nbytes, dtype=torch.uint8, pin_memory=True)
    host.to(device)  # the first one allocates
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    host.to(device, non_blocking=True)
    torch.cuda.synchronize(device)
    return time.perf_counter() - began


def which_binds(waiting: float, copying: float, elapsed: float) -> str:
    """What a run's speed hangs on: "disk" when the loop waits for the loader, "host→device" when copies, which run beside the
    computation, take nearly all of the time, else "compute". All in seconds."""
    if waiting >= BINDING_WAIT * elapsed:
        return "disk"
    return "host→device" if copying >= BINDING_COPY * elapsed else "compute"


class Meter:
    """Speed of the training steps since the last line of the log, and what they wait for. Evaluations and checkpoints do not count."""

    def __init__(self, world: World, samples: int) -> None:
        self.world, self.samples = world, samples  # of one batch, all processes together
        self._copying: float | None = None  # seconds that one takes to the device
        self._batches, self._elapsed, self._waited = 0, 0.0, 0.0

    def begin(self, waited: float) -> None:
        """A step begins; `waited`: seconds spent waiting for the loader so far."""
        self._began, self._before = time.perf_counter(), waited

    def end(self, batches: int, waited: float) -> None:
        """The step is done."""
        self._batches, self._elapsed = self._batches + batches, self._elapsed + time.perf_counter() - self._began
        self._waited += waited - self._before

    def line(self, batch: FeatureBatch) -> dict[str, Any]:
        """What the log says of them; then it counts anew. Every process must ask: the one that waits longest holds up all."""
        self._copying = copy_seconds(batch) if self._copying is None else self._copying
        elapsed = max(self._elapsed, 1e-9)
        share = self.world.largest(self._waited / elapsed)
        line = {
            "samples_per_second": self._batches * self.samples / elapsed,
            "wait_share": share,
            "binds": which_binds(share * elapsed, self._copying * self._batches, elapsed),
        }
        self._batches, self._elapsed, self._waited = 0, 0.0, 0.0
        return line
