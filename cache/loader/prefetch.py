"""Batches made ahead by threads and delivered in order; on a CUDA device the next is copied while one is in use."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from ...batch import FeatureBatch
from .assembler import Fields, decoded


class SideStream:
    """Copies pinned host buffers to `device`: `start` the next one, then `take` them in that order.

    A buffer is kept until its copy is over, so the storage behind it is not filled again before. What `take` returns
    is ready for the stream that is current then, and its memory is not reused before that stream reaches the point
    where it is dropped."""

    def __init__(self, fields: Fields, device: torch.device) -> None:
        self._fields, self._stream = fields, torch.cuda.Stream(device)
        self._device = self._stream.device  # with its number, whichever device is current later
        self._started: deque[tuple[FeatureBatch, torch.cuda.Event]] = deque()
        self._copying: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()

    def __len__(self) -> int:
        return len(self._started)

    def start(self, flat: torch.Tensor) -> None:
        """Begin to copy `flat` uint8 [nbytes] (pinned) and to decode its 8-bit tokens."""
        while self._copying and self._copying[0][1].query():
            self._copying.popleft()
        with torch.cuda.stream(self._stream):
            copied, ready = torch.cuda.Event(), torch.cuda.Event()
            there = flat.to(self._device, non_blocking=True, copy=True)  # one for all fields
            copied.record(self._stream)
            self._copying.append((flat, copied))  # before anything else can fail
            batch = decoded(self._fields.batch(there))
            ready.record(self._stream)
        self._started.append((batch, ready))

    def take(self) -> FeatureBatch:
        """The batch that was started first."""
        batch, ready = self._started.popleft()
        current = torch.cuda.current_stream(self._device)
        current.wait_event(ready)
        for tensor in (batch.tokens, batch.text):  # decoded tokens have memory of their own, all other fields share one
            tensor.record_stream(current)
        return batch

    def close(self) -> None:
        """Wait for the copies under way, and drop them."""
        self._stream.synchronize()
        self._started.clear()
        self._copying.clear()


class Prefetch:
    """An endless iterator of the batches at `offsets`.

    `make(offset)` gives the flat buffer (see `Fields.batch`) of one; threads call it, in the order of the offsets, for
    `ahead` batches (at least one per thread). `wait_seconds` is the time spent waiting for them so far.
    """

    def __init__(
        self,
        make: Callable[[int], torch.Tensor],
        fields: Fields,
        offsets: Iterator[int],
        *,
        threads: int,
        ahead: int,
        device: torch.device,
    ) -> None:
        self.wait_seconds = 0.0
        self._flat, self._fields, self._offsets, self._device = make, fields, offsets, device
        self._side = SideStream(fields, device) if device.type == "cuda" else None
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="dvla-loader")
        self._coming: deque[Future[Any]] = deque()
        for _ in range(max(ahead, threads)):
            self._submit()

    def __next__(self) -> FeatureBatch:
        if not self._coming:
            raise ValueError("this loader was closed")
        began = time.perf_counter()
        if self._side is None:
            batch = self._pop()
        else:
            if not self._side:
                self._pop(self._side.start)
            if len(self._side) < 2 and self._coming[0].done() and not self._coming[0].exception():
                self._pop(self._side.start)  # the next one, while this one is in use
            batch = self._side.take()
        self.wait_seconds += time.perf_counter() - began
        return batch

    def close(self) -> None:
        """Stop the threads. Batches already delivered stay valid."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        if self._side is not None:
            self._side.close()
        self._coming.clear()

    def _submit(self) -> None:
        self._coming.append(self._threads.submit(self._make, next(self._offsets)))

    def _pop(self, use: Callable[[Any], Any] = lambda made: made) -> Any:
        """`use` of what `_make` gave for the next batch, which after an error is still the next: none is skipped."""
        used = use(self._coming[0].result())
        self._coming.popleft()
        self._submit()
        return used

    def _make(self, offset: int) -> Any:
        """The batch, or for a CUDA device the flat buffer that holds it."""
        flat = self._flat(offset)
        return flat if self._side is not None else decoded(self._fields.batch(flat.to(self._device)))
