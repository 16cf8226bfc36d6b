"""Many clients' requests in few forward passes: those that wait when the policy becomes free share the next one.

The policy runs in its own thread, so that connections are served meanwhile. Letters: N requests of a pass, T action
steps, d native action width.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from ...errors import UserError
from ..policy.observation import Observation
from ..policy.policy import Policy
from ..policy.stopwatch import Stopwatch
from .metrics import Metrics

SICK = 3  # failed passes in a row after which the server reports itself unhealthy


class PolicyFailed(Exception):
    """The policy could not answer; one line for the client."""


@dataclass(frozen=True)
class Answer:
    """The answer to one request."""

    actions: np.ndarray  # [T,d] native
    queue: float  # seconds before the pass began
    infer: float  # seconds of the pass
    size: int  # requests in it


@dataclass(frozen=True)
class Request:
    """A waiting request."""

    observation: Observation
    future: asyncio.Future[Answer]  # cancelled once nobody waits for it
    since: float = field(default_factory=time.perf_counter)


class Batcher:
    """Batches requests: call `submit` in the event loop where `work` runs."""

    def __init__(
        self, policy: Policy, max_batch: int, max_wait: float, metrics: Metrics, say: Callable[[str], None]
    ) -> None:
        self._policy, self._max_batch, self._max_wait = policy, max_batch, max_wait
        self._metrics, self._say = metrics, say
        self._waiting: asyncio.Queue[Request] = asyncio.Queue()
        self._pool = ThreadPoolExecutor(1, "policy")
        self._failures = 0  # in a row

    def warm_up(self, passes: Sequence[Sequence[Observation]]) -> float:
        """Make forward passes in the thread of later ones; seconds of the last one."""

        def each() -> float:
            for observations in passes:
                began = time.perf_counter()
                self._policy.act_batch(observations)
            return time.perf_counter() - began

        return self._pool.submit(each).result()

    @property
    def healthy(self) -> bool:
        return self._failures < SICK

    def submit(self, observation: Observation) -> asyncio.Future[Answer]:
        """A future of the answer; it may be cancelled, or raise `UserError` (bad observation) or `PolicyFailed`."""
        for _ in range(self._waiting.qsize()):  # drop the images of those whose client has given up
            if not (request := self._waiting.get_nowait()).future.done():
                self._waiting.put_nowait(request)
        future = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait(Request(observation, future))
        return future

    async def work(self) -> None:
        """Answer submitted requests until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                batch = await self._collect()
                if batch:
                    for request, result in zip(batch, await loop.run_in_executor(self._pool, self._pass, batch)):
                        if request.future.done():
                            continue
                        if isinstance(result, Exception):
                            request.future.set_exception(result)
                        else:
                            request.future.set_result(result)
        finally:
            self._pool.shutdown(wait=False, cancel_futures=True)

    async def _collect(self) -> list[Request]:
        """One or more requests within `max_wait` of the first, fewer seconds if all clients have asked."""
        batch = [await self._waiting.get()]
        end = time.perf_counter() + self._max_wait
        while len(batch) < min(self._max_batch, max(self._metrics.clients, 1)):
            if not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
                continue
            left = end - time.perf_counter()
            if left <= 0:
                break
            try:
                batch.append(await asyncio.wait_for(self._waiting.get(), left))
            except TimeoutError:
                break
        return [request for request in batch if not request.future.done()]

    def _pass(self, batch: list[Request]) -> list[Answer | Exception]:
        """One pass, in the policy's thread.

        If it fails, its requests are tried one by one, so that one cannot affect others.
        """
        began = time.perf_counter()
        watch = Stopwatch(self._policy.encoder.device)
        try:
            actions = self._policy.act_batch([request.observation for request in batch], watch.mark)  # [N,T,d]
        except Exception as error:  # whatever it is, the server keeps running
            return (
                [one for request in batch for one in self._pass([request])] if len(batch) > 1 else [self._reason(error)]
            )
        self._failures = 0
        infer, parts = time.perf_counter() - began, watch.seconds()
        self._metrics.counts["batches"] += 1
        self._metrics.took("encode", parts["pictures"] + parts["text"])
        self._metrics.took("dit", parts["dit"])
        out: list[Answer | Exception] = []
        for request, chunk in zip(batch, actions):
            self._metrics.took("queue", began - request.since)
            good = np.isfinite(chunk).all()
            out.append(
                Answer(chunk, began - request.since, infer, len(batch))
                if good
                else PolicyFailed("the policy returned actions that are not finite")
            )
        return out

    def _reason(self, error: Exception) -> Exception:
        """The client's message; the traceback goes to the server's log."""
        if isinstance(error, UserError):
            return error
        self._failures += 1
        self._say("".join(traceback.format_exception(error)).rstrip())
        return PolicyFailed(f"the policy failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
