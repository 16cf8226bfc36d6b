"""What the training loop uses besides mathematics: threads, freezing, compiling, what it says."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..batch import FeatureBatch
from ..drifting.dit import parameter_counts, set_attention
from ..drifting.policy_net import PolicyNet
from ..errors import UserError, unknown
from .distributed import World
from .session import Session
from .zero2 import require_deepspeed

BINDING_WAIT = 0.05     # share of the time spent waiting for data from which on reading is what limits
BINDING_COPY = 0.9      # share of the time in which something is being copied from which on copying is


def banner(session: Session) -> list[str]:
    """What a run says when it begins: how the global batch comes about, and what is trained."""
    config, world = session.config, session.world
    one, many = ("gpu", "GPU") if world.device.type == "cuda" else ("process", "process")
    plural = many + ("" if world.size == 1 else "s" if many == "GPU" else "es")
    counts = parameter_counts(session.net)
    total = counts.pop("total")
    large = sorted(((name, n) for name, n in counts.items() if n >= total / 50), key=lambda item: -item[1])
    parts = ", ".join(f"{name} {_short(n)}" for name, n in [*large, ("other", total - sum(n for _, n in large))])
    return [f"Batch: {config.batch_size}/{one} × {config.accumulate} accum × {world.size} {plural} = "
            f"{config.batch_size * config.accumulate * world.size} global",
            f"Parameters: {total:,} ({parts})"]


def _short(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count / 1e3:.1f} k"


def prepare(session: Session) -> None:
    """Kernels and compilation as the settings ask, and `UserError` for what the network or this machine cannot do."""
    config = session.config
    check_unfreeze(config.unfreeze, session.parameters())
    if config.loss.neighbours:
        raise UserError(f"loss.neighbours is {config.loss.neighbours}, but training searches for none; leave it out")
    if config.strategy != "ddp" and not session.world.launched:
        raise UserError(f"strategy {config.strategy} splits the network over processes and this is one alone; start it with "
                        "`torchrun --nproc_per_node=N -m dvla.cli train …`, or use --strategy ddp")
    if config.strategy != "ddp" and session.adapter:
        raise UserError(f"strategy {config.strategy} splits the policy network only, LoRA trains in whole copies; fine-tune with --strategy ddp")
    if config.strategy == "zero2":
        require_deepspeed()
    if config.attention == "flex" and session.world.device.type == "cpu":   # never compiled there; newer versions of torch have no gradient at all
        raise UserError("attention flex does not train on a CPU, for torch has no gradient of it there; use attention sdpa")
    set_attention(session.net, config.attention)
    if config.compile:
        compile_blocks(session.net)


def check_unfreeze(unfreeze: Mapping[str, int], named: Mapping[str, nn.Parameter]) -> None:
    """`UserError` for a prefix that no parameter's name has, or when nothing would be trained at first."""
    for prefix in unfreeze:
        if not any(name.startswith(prefix) for name in named):
            parts = {".".join(name.split(".")[:n]) for name in named for n in (1, 2, 3)}
            raise unknown("beginning of a parameter's name in unfreeze", prefix, parts)
    if all(any(name.startswith(prefix) for prefix in unfreeze) for name in named):
        raise UserError(f"unfreeze leaves nothing to train before step {min(unfreeze.values())}; name fewer parameters")


def thaw(named: Mapping[str, nn.Parameter], unfreeze: Mapping[str, int], step: int) -> bool:
    """Let gradients reach exactly the parameters trained at `step`; returns whether that changed."""
    changed = False
    for name, parameter in named.items() if unfreeze else ():
        trained = all(step >= begins for prefix, begins in unfreeze.items() if name.startswith(prefix))
        changed |= parameter.requires_grad != trained
        parameter.requires_grad_(trained)
    return changed


def compile_blocks(net: PolicyNet) -> None:
    """`torch.compile` every transformer block, in place: one compilation serves all, and no parameter changes its name."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "c++", "clang++")):
        raise UserError("compile needs a C++ compiler and there is none (g++ or clang++; on Debian: apt install g++); install one, or train without it")
    for block in net.dit.blocks:
        block.compile()


def copy_seconds(batch: FeatureBatch) -> float:
    """How long it takes to copy a batch's features to the device it is on, measured once; 0 on a CPU."""
    device = batch.tokens.device
    if device.type == "cpu":
        return 0.0
    host = torch.empty(batch.tokens.nbytes + batch.text.nbytes, dtype=torch.uint8, pin_memory=True)
    host.to(device)     # the first one allocates
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
        self.world, self.samples = world, samples       # of one batch, all processes together
        self._copying: float | None = None              # seconds that one takes to the device
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
        line = {"samples_per_second": self._batches * self.samples / elapsed, "wait_share": share,
                "binds": which_binds(share * elapsed, self._copying * self._batches, elapsed)}
        self._batches, self._elapsed, self._waited = 0, 0.0, 0.0
        return line


@contextlib.contextmanager
def kernel_threads(count: int) -> Iterator[None]:
    """Torch's CPU kernels use `count` threads inside; 0 leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def memory_errors(device: torch.device) -> Iterator[None]:
    """What a GPU cannot hold is one line that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        needed = re.search(r"Tried to allocate ([0-9.]+ \w+)", str(error))
        raise UserError(f"{device} has too little memory{f' (a further {needed[1]} were asked for)' if needed else ''}: halve --batch-size and double "
                        "--grad-accumulation, or take fewer --draws, --precision bf16 or a smaller --model-size") from None
