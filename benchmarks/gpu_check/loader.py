"""Section loader: what arrives on the device, how fast, and a step from the cache against a resident one.

Letters: B observations.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from resident import Resident

from dvla.cache.loader.loader import Loader
from dvla.cache.loader.sample import Sample
from dvla.cache.store.cache import Cache
from dvla.cache.store.writer import CacheWriter
from dvla.stages.training.loop import train_step

from .items import Number, Place, item, passed, tests_of
from .policies import steps_of, tokens, width


@item("a cache of two views")
def cache(place: Place) -> str:
    tests_of(place)
    from support import sparse_cache as sparse

    shards, each = place.size((8, 256), (2, 16))
    plan = sparse.make_plan(shards, each, tokens(place), width(place), views=("front", "wrist"))
    some = np.random.default_rng(0).standard_normal((64, tokens(place), width(place)), np.float32).astype(np.float16)
    path, began = place.work / "loader-cache", time.perf_counter()
    with CacheWriter.create_or_resume(path, {"encoder": {}}, plan) as writer:
        for i, task in enumerate(writer.missing()):
            rows = task.stop - task.start
            writer.write_shard(task, (np.roll(some, i + at, 0)[: min(64, rows - at)] for at in range(0, rows, 64)))
        writer.write_tables("sparse", sparse.tables(plan))
        writer.finish()
    made = place.made["cache"] = Cache.open(path)
    taken = time.perf_counter() - began
    return Number(f"{made.frames} frames, {made.manifest['bytes'] / 2**30:.2f} GiB, written in {taken:.1f} s")


@item("values under load against the host's")
def values(place: Place) -> str:
    """Some batches are kept, so that reused buffers would show; the device is busy meanwhile."""
    wide, names = place.size(2048, 64), ("tokens", "text", "action", "proprio", "token_mask", "view_id", "step_mask")
    busy, wrong, kept = torch.randn(wide, wide, device=place.device), 0, []
    given = {"cache": place.of("cache"), "batch_size": 8, "seed": 4}
    with Loader(**given) as host, Loader(**given, threads=6, device=place.device) as there:
        for step in range(24):
            batch = next(there).batch
            for _ in range(20):
                busy = busy @ busy / busy.norm()
            kept.append((batch.tokens.double().sum(), batch if step % 5 == 0 else None, next(host).batch))
    for total, whole, expected in kept:
        exact = expected.tokens.double().sum().item()
        wrong += abs(total.item() - exact) > 1e-6 * abs(exact) + 1e-3
        if whole is not None:
            wrong += not all(torch.equal(getattr(whole, n).cpu(), getattr(expected, n)) for n in names)
    return passed(not wrong, f"{wrong} of 24 batches differ, five compared as a whole")


def _threads(place: Place) -> tuple[int, ...]:
    return tuple(place.size((2, 4, 8, 12), (2,)))


@item("reading to the device, {} threads", each=_threads)
def reading(place: Place, threads: int) -> str:
    b = place.size(256, 8)
    with Loader(place.of("cache"), batch_size=b, threads=threads, device=place.device) as loader:
        rate = place.rate(lambda: next(loader), 24, warm=6 + threads)
        nbytes = next(loader).batch.tokens.nbytes
    return Number(f"{rate * b:.0f} samples/s of two views, {rate * nbytes / 1e9:.1f} GB/s")


def _points(place: Place) -> tuple[Any, ...]:
    return tuple(place.size(((False, 64), (True, 256)), ((False, 8),)))


@item("step from the cache against a resident one, compiled and B = {}", each=_points)
def cached(place: Place, point: tuple[bool, int]) -> str:
    compiled, b = point
    step, rows, resident = steps_of(place, b, 4, compile=compiled), [], []
    for threads in (0, *place.size((2, 4, 8), (2,)), 0):
        rate, waited = _turn(place, step, threads, b)
        if threads:
            rows.append(f"{threads} threads {rate * b:.0f} (× {rate / resident[0]:.3f}, waits {waited:.1%})")
        else:
            resident.append(rate)
    both = " and ".join(f"{rate * b:.0f}" for rate in resident)
    return Number(f"samples/s: resident {both}; from the cache {', '.join(rows)}")


def _turn(place: Place, step: Resident, threads: int, b: int) -> tuple[float, float]:
    """(steps/s, share of the time spent waiting for the loader); `threads` 0: a batch that is there already."""
    with Loader(place.of("cache"), batch_size=b, threads=threads or 2, device=place.device) as loader:
        samples: Iterator[Sample] = loader if threads else itertools.repeat(next(loader))
        count, done = place.size(max(8, 4096 // b), 2), itertools.count()
        place.rate(lambda: train_step(step.session, step.shared, samples, next(done)), 1)
        before, began = loader.wait_seconds, time.perf_counter()
        rate = place.rate(lambda: train_step(step.session, step.shared, samples, next(done)), count, warm=0)
        return rate, (loader.wait_seconds - before) / (time.perf_counter() - began)
