"""`dvla train --dry-run`: what a run would be, from its settings and a short pilot on the real cache. Writes nothing.

The pilot trains a network of the run's own shape with the run's own step for a few steps and throws it away.
"""

from __future__ import annotations

import dataclasses
import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import yaml

from ...batch import FeatureBatch
from ...common.console import console
from ...common.text import duration, size
from ...errors import UserError
from .checks import open_cache, require_trainable
from .config import TrainConfig
from .context import Session, open_loader
from .parallel.replicas import Replicas
from .parallel.world import World, join
from .setup import banner, kernel_threads, memory_errors, prepare, share_network
from .stage_three.memory import SavedTensors, nbytes
from .step import learning_rate, noise_generator, training_step
from .throughput import copy_seconds, which_binds
from .train import policy_net

PILOT_STEPS = 20  # timed
WARM_UP = 3  # before: allocator, kernels, compilation, the first reads


@dataclass(frozen=True)
class DryRun:
    """What the pilot found. Bytes are those of one process; rates are of all processes together."""

    config: TrainConfig
    device: str
    processes: int
    banner: tuple[str, ...]  # batch and parameters, as a run says them when it begins
    memory: dict[str, int]  # bytes: weights, gradients, moments (AdamW), EMA, activations
    peak: int  # bytes: CUDA's peak of the pilot, or the process's peak resident memory
    observations: int  # of the training split
    steps_per_second: float  # optimiser steps
    wait_share: float  # of the time, spent waiting for the loader
    binds: str  # disk, host→device or compute

    @property
    def batch(self) -> int:
        """Observations per optimiser step."""
        return self.config.batch_size * self.config.accumulate * self.processes

    @property
    def hours(self) -> float:
        """Of `config.steps` training steps; evaluations and checkpoints come on top."""
        return self.config.steps / self.steps_per_second / 3600


def dry_run(config: TrainConfig, progress: Callable[[int, int], None] = lambda *_: None) -> DryRun:
    """Measure a run of `config` for a few steps. `UserError` for what `train` refuses; started by a launcher it takes all processes."""
    cache = open_cache(config)
    require_trainable(config, cache)
    with join(config.device) as world:
        torch.manual_seed(config.seed)
        session = Session(config, cache, policy_net(config, cache).to(world.device), {}, world=world)
        prepare(session)
        return _pilot(session, progress)


def _pilot(session: Session, progress: Callable[[int, int], None]) -> DryRun:
    config, world, cuda = session.config, session.world, session.world.device.type == "cuda"
    said = tuple(banner(session))  # before FSDP2 takes its part of the parameters
    shared = share_network(session)
    ema = [p.detach().clone() for p in shared.named.values()]
    for group in shared.optimizer.param_groups:  # the first step's rate: the warm-up's smallest
        group["lr"] = learning_rate(0, config) * group["lr_scale"]
    session.net.train()
    if cuda:
        torch.cuda.reset_peak_memory_stats(world.device)
    kept = SavedTensors(shared.named.values())
    batch: FeatureBatch
    with open_loader(session, split="train") as loader, kernel_threads(config.cpu_threads), memory_errors(world.device):

        def following() -> FeatureBatch:
            nonlocal batch
            at = loader.state_dict()["offset"]
            batch = session.features(next(loader), loader.masked(at)[1], loader.variants(at))
            return batch

        if not cuda:  # no allocator that tells its peak: count what one forward pass leaves behind
            with shared.batch(last=True), torch.autograd.graph.saved_tensors_hooks(kept.count, lambda x: x):
                result = training_step(
                    shared.module, following(), config, noise_generator(config.seed, 0, 0), world, session.queues
                )
                shared.backward(result.total)
        began = waited = 0.0
        for step in range(WARM_UP + PILOT_STEPS):
            if step == WARM_UP:
                _wait(world)
                began, waited = time.perf_counter(), loader.wait_seconds
            total = optimiser_step(session, shared, ema, following, step)
            if not math.isfinite(total):
                raise UserError(
                    f"the loss of step {step} of the pilot is {total}; run `dvla cache verify {config.cache}`, or lower the learning rate"
                )
            progress(step + 1, WARM_UP + PILOT_STEPS)
        _wait(world)
        elapsed = time.perf_counter() - began
        waited, observations = loader.wait_seconds - waited, sum(loader.sizes)
    copied = copy_seconds(batch) * PILOT_STEPS * config.accumulate
    weights = sum(nbytes(p) for p in shared.named.values())
    memory = {
        "weights": weights,
        "gradients": sum(nbytes(p.grad) for p in shared.named.values() if p.grad is not None),
        "moments": sum(nbytes(t) for s in shared.optimizer.state.values() for t in s.values()),
        "EMA": sum(map(nbytes, ema)),
    }
    peak = (
        torch.cuda.max_memory_allocated(world.device)
        if cuda
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    memory["activations"] = max(0, peak - sum(memory.values())) if cuda else kept.nbytes
    return DryRun(
        config,
        str(world.device),
        world.size,
        said,
        memory,
        peak,
        observations,
        PILOT_STEPS / elapsed,
        waited / elapsed,
        which_binds(waited, copied, elapsed),
    )


def optimiser_step(
    session: Session, shared: Replicas, ema: list[torch.Tensor], following: Callable[[], FeatureBatch], step: int
) -> float:
    """What the training loop does in a step, at a constant rate and without its checks: the mean loss of the batches that `following` gives."""
    config, total = session.config, 0.0
    shared.optimizer.zero_grad(set_to_none=True)
    for k in range(config.accumulate):
        batch, generator = (
            following(),
            noise_generator(config.seed, step * config.accumulate + k, 0, session.world.device),
        )
        with shared.batch(last=k == config.accumulate - 1):
            result = training_step(shared.module, batch, config, generator, session.world, session.queues)
            shared.backward(result.total / config.accumulate)
        total += result.total.item() / config.accumulate
    shared.clip(config.optimizer.clip)
    shared.step()
    torch._foreach_lerp_(ema, [p.detach() for p in shared.named.values()], 1e-4)
    return total


def _wait(world: World) -> None:
    """Until the device has done what it was told."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def resolved(config: TrainConfig, recipe: Mapping[str, Any], overrides: Mapping[str, Any]) -> list[str]:
    """The settings as the lines of a YAML recipe: every value, and in a comment whether the command line, the recipe or the default gave it."""
    given, lines = set(overrides), []

    def walk(values: Mapping[str, Any], recipe: Any, path: str, indent: str) -> None:
        for name, value in values.items():
            dotted, in_recipe = f"{path}{name}", isinstance(recipe, Mapping) and name in recipe
            if isinstance(value, dict) and value:
                lines.append(f"{indent}{name}:")
                walk(value, recipe[name] if in_recipe else None, f"{dotted}.", indent + "  ")
                continue
            text = yaml.safe_dump(
                list(value) if isinstance(value, tuple) else value,
                default_flow_style=True,
                width=1 << 20,
                allow_unicode=True,
            )
            parents = [dotted.rsplit(".", n)[0] for n in range(dotted.count(".") + 1)]  # "dit={…}" gives dit.horizon
            origin = "command line" if given & set(parents) else "recipe" if in_recipe else "default"
            lines.append(
                f"{indent}{name}: {text.removesuffix(chr(10)).removesuffix('...').strip()}".ljust(42) + f"  # {origin}"
            )

    walk(dataclasses.asdict(config), recipe, "", "")
    return lines


def report(run: DryRun) -> Iterator[str]:
    """What the pilot found, in lines."""
    steps = run.config.steps
    yield from run.banner
    yield f"{steps} steps are {steps * run.batch / run.observations:.3g} epochs of {run.observations} observations"
    yield f"memory: {size(sum(run.memory.values()))} ({', '.join(f'{k} {size(v)}' for k, v in run.memory.items())}); {_peak(run)}"
    yield (
        f"pilot of {PILOT_STEPS} steps on {run.device}: {run.steps_per_second:.3g} steps/s, {run.steps_per_second * run.batch:.4g} samples/s, "
        f"waiting for data {run.wait_share:.1%}; {run.binds} binds"
    )
    yield f"{steps} steps would take {duration(run.hours * 3600)}; evaluations and checkpoints come on top"


def _peak(run: DryRun) -> str:
    what = (
        "peak of the device"
        if run.device.startswith("cuda")
        else "the process's peak resident memory, libraries included,"
    )
    return f"{what} {size(run.peak)}"


def show(run: DryRun, recipe: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    """Print settings and findings."""
    for line in (*resolved(run.config, recipe, overrides), "", *report(run)):
        console.print(line, markup=False)
