"""Where the time of training goes: waiting for data, copying, computing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

from ...cache.loader.loader import Loader
from .parallel.world import World

WAIT_BOUND = 0.05  # share of the time spent waiting for data from which on a run is I/O-bound
COPY_BOUND = 0.9  # share of the time in which something is being copied from which on copying is the bottleneck


def copy_seconds(nbytes: int, device: torch.device) -> float:
    """How long it takes to copy so many bytes to the device, measured once; 0 on a CPU."""
    if device.type == "cpu":
        return 0.0
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    host.to(device)  # the first one allocates
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    host.to(device, non_blocking=True)
    torch.cuda.synchronize(device)
    return time.perf_counter() - began


def bottleneck(waiting: float, copying: float, elapsed: float) -> str:
    """What limits a run's speed: "disk" when the loop waits for the loader, "host→device" when copies, which run beside
    the computation, take nearly all of the time, else "compute". All in seconds."""
    if waiting >= WAIT_BOUND * elapsed:
        return "disk"
    return "host→device" if copying >= COPY_BOUND * elapsed else "compute"


class Meter:
    """Speed of the training steps since the last line of the log, and their bottleneck; evaluations and checkpoints do
    not count. `samples`: of one batch, all processes together."""

    def __init__(self, world: World, loader: Loader, samples: int) -> None:
        self.world, self.loader, self.samples = world, loader, samples
        self._copying: float | None = None  # seconds that one batch takes to the device
        self._batches, self._elapsed, self._waited = 0, 0.0, 0.0

    @contextlib.contextmanager
    def step(self, batches: int) -> Iterator[None]:
        """Around a step of so many batches."""
        began, before = time.perf_counter(), self.loader.wait_seconds
        yield
        self._batches, self._elapsed = self._batches + batches, self._elapsed + time.perf_counter() - began
        self._waited += self.loader.wait_seconds - before

    def line(self, nbytes: int) -> dict[str, Any]:
        """What the log says of them, for batches of so many bytes; then the count restarts. Every process must call it:
        the one that waits longest holds up all."""
        if self._copying is None:
            self._copying = copy_seconds(nbytes, self.world.device)
        elapsed = max(self._elapsed, 1e-9)
        share = self.world.largest(self._waited / elapsed)
        line = {
            "samples_per_second": self._batches * self.samples / elapsed,
            "wait_share": share,
            "binds": bottleneck(share * elapsed, self._copying * self._batches, elapsed),
        }
        self._batches, self._elapsed, self._waited = 0, 0.0, 0.0
        return line
