"""The endless iterator of batches: made ahead by threads, delivered in order, on a CUDA device copied while the batch before is in use."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from ...batch import FeatureBatch
from ..store.cache import Cache
from .assembler import Assembler, Fields, decoded


class SideStream:
    """Copies pinned host buffers to `device`: `start` the next one, then `take` them in that order.

    A buffer is kept until its copy is over, so the storage behind it is not filled again before. What `take` returns is ready for the
    stream that is current then, and its memory is not given to others before that stream has come to where it is dropped."""

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
        for tensor in (
            batch.tokens,
            batch.text,
        ):  # of the decoded tokens' memory, and of the one all other fields share
            tensor.record_stream(current)
        return batch

    def close(self) -> None:
        """Wait for what is being copied, and let go of it."""
        self._stream.synchronize()
        self._started.clear()
        self._copying.clear()


class BatchIterator:
    """What `Loader` and `TarStream` have in common: they say how the batch at an offset is made (`_flat`).

    `offset` counts samples over all ranks; the batch after the one at `offset` is that at `offset + global_batch`."""

    def __init__(
        self,
        cache: Cache,
        batch_size: int,
        horizon: int,
        features: bool,
        *,
        rank: int,
        threads: int,
        prefetch: int,
        start: int,
        global_batch: int,
        device: torch.device | str | None,
        pinned: bool | None,
    ) -> None:
        self.wait_seconds, self._device = 0.0, torch.device(device or "cpu")
        self._batch_size, self._rank = batch_size, rank
        on_cuda = self._device.type == "cuda"
        pinned = torch.cuda.is_available() if pinned is None else pinned
        self._assemble = Assembler(cache, batch_size, horizon, features, pinned or on_cuda, awaited=on_cuda)
        self._side = SideStream(self._assemble.fields, self._device) if on_cuda else None
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="dvla-loader")
        self._delivered = self._submitted = start
        self._global_batch = global_batch
        self._coming: deque[Future[Any]] = deque()
        self._prefetch = max(prefetch, threads)

    def _begin(self) -> None:
        """Start to make batches; when all that `_flat` needs is there."""
        for _ in range(self._prefetch):
            self._submit()

    def _flat(self, offset: int) -> torch.Tensor:
        """The flat buffer with this rank's batch whose global batch begins at `offset`; called in threads, in order of offsets."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[FeatureBatch]:
        return self

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
        self._delivered += self._global_batch
        return batch

    def state_dict(self) -> dict[str, int]:
        """{"offset": global position of the first sample not yet delivered}."""
        return {"offset": self._delivered}

    def close(self) -> None:
        """Stop the threads and close the files. Batches already handed out stay valid."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        if self._side is not None:
            self._side.close()
        self._coming.clear()
        self._assemble.files.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _positions(self, offset: int) -> np.ndarray:
        """Positions [B] of this rank's batch whose global batch begins at `offset`."""
        return offset + self._rank * self._batch_size + np.arange(self._batch_size)

    def _submit(self) -> None:
        self._coming.append(self._threads.submit(self._make, self._submitted))
        self._submitted += self._global_batch

    def _pop(self, use: Callable[[Any], Any] = lambda made: made) -> Any:
        """`use` of what `_make` gave for the next batch. After an error that batch is still the next: none is ever left out."""
        used = use(self._coming[0].result())
        self._coming.popleft()
        self._submit()
        return used

    def _make(self, offset: int) -> Any:
        """The batch, or for a CUDA device the flat buffer that holds it."""
        flat = self._flat(offset)
        return flat if self._side is not None else decoded(self._assemble.fields.batch(flat.to(self._device)))
