"""How fast a disk writes and reads records, and how fast the policy trains, measured with the code that does it.

Letters: n records, K tokens, D width, B observations, V views.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ....batch import random_batch
from ....cache.store.plan import BuildPlan
from ....cache.store.shard_reader import ShardFiles, read_records
from ....cache.store.shard_writer import ShardWriter, index_nbytes
from ....cache.store.zarr_format import record_compression
from ....drifting.dit import dit_config
from ....drifting.policy_net import PolicyNet, PolicyNetConfig
from ....errors import UserError
from ...training.config import ON_CUDA, TrainConfig
from ...training.step import batch_loss, noise_generator
from ..sizes import existing_folder, free_nbytes

FILE_NBYTES = 128 << 20  # of the temporary shard, before compression
MOST_RECORDS = 8192  # in it, however small they are
READ_THREADS = 2  # as a training run has them
BATCH_ROWS = 16  # records read at a time, as for a batch of one view
STEP_SECONDS = 2.0  # a training step is repeated for about so long


@dataclass(frozen=True)
class DiskRates:
    """Stored bytes per second: codes with their scales, after compression."""

    compression: float  # uncompressed over stored bytes of the pilot's features
    write: float  # one writer, checksum and sync included
    read: float  # random records, not in memory before
    read_warm: float  # random records, from memory


def disk_rates(out: Path, plan: BuildPlan, codes: np.ndarray, scales: np.ndarray | None) -> DiskRates:
    """Write and read a temporary shard beside `out` that repeats the pilot's records, then remove it.

    Args:
        codes: [n,K,D] of the stored dtype; scales: token scales [n,K] of an 8-bit cache.

    Raises:
        UserError: it cannot be written.
    """
    folder = existing_folder(out.parent)
    record = plan.format.record_nbytes(plan.tokens, plan.width)
    room = min(FILE_NBYTES, free_nbytes(folder) // 4)
    count = max(1, min(MOST_RECORDS, room // record))
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.pilot-", dir=folder))
        try:
            return _measure(work, plan, codes, scales, count)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {folder} to measure its speed: {error.strerror}; choose another --out"
        ) from None


def _measure(work: Path, plan: BuildPlan, codes: np.ndarray, scales: np.ndarray | None, count: int) -> DiskRates:
    arrays = {work / "features": (codes, "0/0", record_compression(plan.format))}
    if scales is not None:
        arrays[work / "scales"] = (scales, "0", None)
    began, stored = time.perf_counter(), 0
    for folder, (values, tail, compression) in arrays.items():
        with ShardWriter(folder / "0" / tail, (1, *values.shape[1:]), values.dtype, count, compression) as writer:
            for at in range(0, count, len(values)):
                writer.append(values[: count - at])
            stored += writer.commit()[0] - index_nbytes(count)
    write = stored / (time.perf_counter() - began)
    for folder, (_, tail, _) in arrays.items():
        with open(folder / "0" / tail, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # synced before, so every page can go
    rows = np.random.default_rng(0).permutation(count)
    batches = [rows[at : at + BATCH_ROWS] for at in range(0, count, BATCH_ROWS)]
    files = ShardFiles()

    def read(part: np.ndarray) -> None:
        for folder, (values, tail, compression) in arrays.items():
            targets = [x.data.cast("B") for x in np.empty((len(part), *values.shape[1:]), values.dtype)]
            read_records(files, folder, part, targets, count, tail=tail, compression=compression)

    rates = []
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for _ in ("dropped", "in memory"):
            began = time.perf_counter()
            list(pool.map(read, batches))
            rates.append(stored / (time.perf_counter() - began))
    files.close()
    return DiskRates(count * plan.format.record_nbytes(plan.tokens, plan.width) / stored, write, rates[0], max(rates))


def model_rate(size: str, draws: int, views: int, plan: BuildPlan, device: torch.device) -> float:
    """Observations/s of training steps (forward, loss, backward, AdamW) of a policy on random features in memory: on a
    GPU of its batch size and in bfloat16, as one trains there."""
    config = TrainConfig("", "", model_size=size, batch_size=2, draws=draws)
    if device.type == "cuda":
        config = dataclasses.replace(config, batch_size=ON_CUDA["batch_size"], precision=ON_CUDA["precision"])
    net = PolicyNet(PolicyNetConfig(feature_width=plan.width, dit=dit_config(size))).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.optimizer.lr)
    batch = random_batch(config.batch_size, views, plan.tokens, plan.width, net.config.dit.horizon).to(device)
    done, began = 0, 0.0
    while not began or time.perf_counter() - began < STEP_SECONDS:
        optimizer.zero_grad(set_to_none=True)
        batch_loss(net, batch, config, noise_generator(0, done, 0)).total.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if not began:  # the first step warms up
            began = time.perf_counter()
        else:
            done += 1
    return done * config.batch_size / (time.perf_counter() - began)
