"""What a run sets up: kernels, frozen parameters, compilation, threads, strategy; and its first lines."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import nn

from ...cache.loader.select import idle_share
from ...common.text import wrapped
from ...drifting.dit import parameter_counts, set_attention
from ...errors import UserError, unknown
from ..policy.compile import compile_blocks
from .checks import require_deepspeed
from .context import Session
from .parallel.replicas import Replicas, Shards

NOTABLE = 0.05  # share of idle frames from which it is mentioned


def banner(session: Session) -> list[str]:
    """The first lines of a run: the global batch and its factors, and the trained parameters by part."""
    config, world = session.config, session.world
    one, many = ("gpu", "GPU") if world.device.type == "cuda" else ("process", "process")
    plural = many + ("" if world.size == 1 else "s" if many == "GPU" else "es")
    counts = parameter_counts(session.net)
    total = counts.pop("total")
    large = sorted(((name, n) for name, n in counts.items() if n >= total / 50), key=lambda item: -item[1])
    parts = ", ".join(f"{name} {_short(n)}" for name, n in [*large, ("other", total - sum(n for _, n in large))])
    return [
        f"Batch: {config.batch_size}/{one} × {config.accumulate} accum × {world.size} {plural} = "
        f"{config.batch_size * config.accumulate * world.size} global",
        wrapped(f"Parameters: {total:,} ({parts})").lstrip(),
        *_data_lines(session),
    ]


def _data_lines(session: Session) -> list[str]:
    """What of the cache is trained on, where that is not all of it; and what of it is idle."""
    datasets, select = session.cache.datasets, session.config.select
    left, share = sum(d.attributes.get("left_out", 0) for d in datasets), idle_share(datasets)
    used = sum(int((~d.quarantined).sum()) for d in datasets)
    lines = [f"Data: {used} episodes, {left} left out by the selection"] if select else []
    failed = sum(int(np.isin(d.episode_id[~d.quarantined], d.attributes.get("failed", ())).sum()) for d in datasets)
    if failed:
        lines.append(f"Data: {failed} of {used} demonstrations are marked as failed; --success-only leaves them out")
    if select.drop_idle:
        return [*lines, f"Idle: {share:.0%} of frames, not trained on"]
    return [*lines, f"Idle: {share:.0%} of frames; --drop-idle leaves them out"] if share >= NOTABLE else lines


def _short(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count / 1e3:.1f} k"


def prepare(session: Session) -> None:
    """Kernels and compilation as the settings ask, and `UserError` for what the network or this machine cannot do."""
    config = session.config
    check_unfreeze(config.unfreeze, session.parameters())
    if config.loss.neighbours:
        raise UserError(f"loss.neighbours is {config.loss.neighbours}, but training does no search; leave it out")
    if config.strategy != "ddp" and not session.world.launched:
        raise UserError(
            f"strategy {config.strategy} splits the network over processes and this is a single one; start it with "
            "`torchrun --nproc_per_node=N -m dvla.cli train …`, or use --strategy ddp"
        )
    if config.strategy != "ddp" and session.adapter:
        raise UserError(
            f"strategy {config.strategy} splits the policy network only, while VLM weights train in full copies; "
            "fine-tune with --strategy ddp"
        )
    if config.strategy == "zero2":
        require_deepspeed()
    if config.attention == "flex" and session.world.device.type == "cpu":
        raise UserError(
            "attention flex has no gradient on a CPU in torch, so it cannot train there; use attention sdpa"
        )
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


@contextlib.contextmanager
def kernel_threads(count: int) -> Iterator[None]:
    """Torch's CPU kernels use `count` threads inside; 0 leaves the number unchanged."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def memory_errors(device: torch.device) -> Iterator[None]:
    """Turn a GPU's out-of-memory error into one line that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        needed = re.search(r"Tried to allocate ([0-9.]+ \w+)", str(error))
        more = f" (another {needed[1]} needed)" if needed else ""
        raise UserError(
            f"{device} is out of memory{more}: halve --batch-size and double --grad-accumulation, "
            "or use fewer --draws, --precision bf16 or a smaller --model-size"
        ) from None


def share_network(session: Session) -> Replicas:
    """The strategy of the settings; `prepare` has refused what is impossible."""
    if session.config.strategy == "zero2":
        from .parallel.zero2 import Zero2  # which builds on this file

        return Zero2(session)
    return {"ddp": Replicas, "fsdp2": Shards}[session.config.strategy](session)
