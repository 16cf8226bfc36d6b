"""Several processes as one run: which of them this is, and the few things they exchange. Alone, all of it is free.

A launcher (`torchrun`, or `python -m torch.distributed.run`) starts the same command once per GPU and sets the ranks as
environment variables. What a run writes, rank 0 writes.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from ....common.device import pick_device
from ....common.text import first_line
from ....errors import UserError

T = TypeVar("T")
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # a launcher sets all of them


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    device: torch.device = torch.device("cpu")
    rank: int = 0
    size: int = 1
    launched: bool = False  # by a launcher: there is a process group, even when it is of one

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` over all processes, in the same shape: what `drifting` calls `reduce`."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def mean(self, *values: float) -> list[float]:
        """The mean of each number over all processes."""
        if self.size == 1:
            return list(values)
        return (self.total(torch.tensor(values, dtype=torch.float64)) / self.size).tolist()

    def largest(self, value: float) -> float:
        """The largest over all processes."""
        if self.size == 1:
            return value
        values = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values.item()

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process."""
        return flag if self.size == 1 else bool(self.total(torch.tensor(int(flag))))

    def slice(self, values: torch.Tensor) -> torch.Tensor:
        """This process's part [B, …] of what was drawn for all of them [size·B, …]."""
        return values if self.size == 1 else values.chunk(self.size)[self.rank]

    def join_batches(self, values: torch.Tensor) -> torch.Tensor:
        """[B, …] of every process → [size·B, …], by rank."""
        if self.size == 1:
            return values
        parts = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    def on_main(self, work: Callable[[], T]) -> T:
        """`work()` of rank 0, whose result all get. A `UserError` in it is raised in every process."""
        if self.size == 1:
            return work()
        answer: list[tuple[bool, object]] = [(True, None)]
        if self.main:
            try:
                answer = [(True, work())]
            except UserError as error:
                answer = [(False, str(error))]
        dist.broadcast_object_list(answer, src=0)
        good, value = answer[0]
        if not good:
            raise UserError(str(value))
        return value  # type: ignore[return-value]

    def gather(self, line: str | None) -> list[str]:
        """The lines of all processes that have one."""
        lines = [line]
        if self.size > 1:
            lines = [None] * self.size
            dist.all_gather_object(lines, line)
        return [x for x in lines if x is not None]


ALONE = World()


@contextlib.contextmanager
def join(device: str) -> Iterator[World]:
    """This process's rank in the run. `device`: as in the settings; of several processes on a machine each takes a GPU.

    Joins the processes of a launcher (NCCL between GPUs, gloo between CPUs), or uses an existing process group."""
    picked, begun = pick_device(device), dist.is_initialized()
    if not begun and not all(name in os.environ for name in ENVIRONMENT):
        yield World(picked)
        return
    if picked.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise UserError(
                f"process {local} of this machine has no GPU of its own: torch sees {torch.cuda.device_count()}; "
                "start at most as many processes (--nproc_per_node), or train with --device cpu"
            )
        picked = torch.device("cuda", local)
        torch.cuda.set_device(picked)
    if not begun:
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if picked.type == "cuda" else "gloo")
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise UserError(
                f"the processes of the run cannot meet at {where}: {first_line(error).split('. ')[0]}; launch with "
                "another port"
            ) from None
    try:
        yield World(picked, dist.get_rank(), dist.get_world_size(), launched=True)
    finally:
        if not begun:
            leave()


def leave() -> None:
    """End the process group.

    Without the pause about one process in fifteen is aborted (SIGABRT) when it exits right afterwards, with all its
    work done: gloo's threads release the last tensors a moment after a collective returned, which needs the
    interpreter, and a wrapped network keeps the group and its threads alive beyond its destruction."""
    dist.destroy_process_group()
    time.sleep(0.2)  # the interpreter is free meanwhile
