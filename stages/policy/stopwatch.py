"""How long the parts of an action take, on a GPU by its own clock."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch

# What `Policy.act_batch` marks, in this order: images → features, instructions → embeddings, the state and the batch,
# the network (with all passes of a denoising head), and back to the robot's units.
PARTS = ("pictures", "text", "state", "dit", "actions")


class Stopwatch:
    """Give `mark` to `Policy.act_batch`. On CUDA a mark is an event in the stream, and only `seconds` waits for it."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._marks: list[tuple[str, Any]] = [("", self._now())]

    def mark(self, part: str) -> None:
        """Attribute the time since the last mark to `part`."""
        self._marks.append((part, self._now()))

    def seconds(self) -> dict[str, float]:
        """Seconds by part, in the order of the first marks; those of a part marked several times are summed."""
        if self._device.type == "cuda":
            self._marks[-1][1].synchronize()
        out: dict[str, float] = {}
        for (_, begin), (part, end) in itertools.pairwise(self._marks):
            took = begin.elapsed_time(end) / 1e3 if self._device.type == "cuda" else end - begin
            out[part] = out.get(part, 0.0) + took
        return out

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
