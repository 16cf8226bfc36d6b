"""`dvla train --dry-run`: what a run would be, from its settings and a short pilot on the real cache. Writes nothing.

The pilot trains a network of the run's own shape with the run's own step for a few steps and throws it away.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import yaml

from ...cache.loader.sample import Sample
from ...common.console import say
from ...common.device import peak_memory
from ...common.progress import Count
from ...common.text import duration, size, wrapped
from .checks import open_cache, require_trainable
from .config import TrainConfig
from .context import Session, open_loader
from .loop import train_step
from .parallel.replicas import Replicas
from .parallel.world import World, join
from .setup import banner, kernel_threads, memory_errors, prepare, share_network
from .stage_three.memory import SavedTensors, nbytes
from .step import batch_loss, noise_generator
from .throughput import bottleneck, copy_seconds
from .train import policy_net

PILOT_STEPS = 20  # timed
WARM_UP = 3  # before: allocator, kernels, compilation, the first reads


@dataclass(frozen=True)
class DryRun:
    """What the pilot found. Bytes are those of one process; rates are of all processes together."""

    config: TrainConfig
    device: str
    processes: int
    banner: tuple[str, ...]  # batch and parameters, as a run reports them when it begins
    memory: dict[str, int]  # bytes: weights, gradients, moments (AdamW), EMA, activations
    peak: int  # bytes: CUDA's peak of the pilot, or the process's peak resident memory
    observations: int  # of the training split
    steps_per_second: float  # optimizer steps
    wait_share: float  # of the time, spent waiting for the loader
    bottleneck: str  # disk, host→device or compute

    @property
    def batch(self) -> int:
        """Observations per optimizer step."""
        return self.config.batch_size * self.config.accumulate * self.processes

    @property
    def hours(self) -> float:
        """Of `config.steps` training steps; evaluations and checkpoints come on top."""
        return self.config.steps / self.steps_per_second / 3600


def dry_run(config: TrainConfig, progress: Count = lambda *_: None) -> DryRun:
    """Measure a run of `config` for a few steps, in all processes of a launcher. `UserError` for what `train`
    refuses."""
    cache = open_cache(config, config.out)
    require_trainable(config, cache)
    with join(config.device) as world:
        torch.manual_seed(config.seed)
        session = Session(config, cache, policy_net(config, cache).to(world.device), {}, world=world)
        prepare(session)
        return _pilot(session, progress)


def _pilot(session: Session, progress: Count) -> DryRun:
    config, world, cuda = session.config, session.world, session.world.device.type == "cuda"
    lines = tuple(banner(session))  # before FSDP2 takes its part of the parameters
    shared = share_network(session)
    session.net.train()
    if cuda:
        torch.cuda.reset_peak_memory_stats(world.device)
    with open_loader(session, split="train") as loader, kernel_threads(config.cpu_threads), memory_errors(world.device):
        activations = None if cuda else _activations(session, shared, next(loader))
        began = waited = 0.0
        for step in range(WARM_UP + PILOT_STEPS):
            if step == WARM_UP:
                _wait(world)
                began, waited = time.perf_counter(), loader.wait_seconds
            done = train_step(session, shared, loader, step)
            progress(step + 1, WARM_UP + PILOT_STEPS)
        _wait(world)
        elapsed, waited = time.perf_counter() - began, loader.wait_seconds - waited
    copied = copy_seconds(done.nbytes, world.device) * PILOT_STEPS * config.accumulate
    peak = torch.cuda.max_memory_allocated(world.device) if cuda else peak_memory()
    return DryRun(
        config,
        str(world.device),
        world.size,
        lines,
        _memory(shared, peak, activations),
        peak,
        sum(loader.sizes),
        PILOT_STEPS / elapsed,
        waited / elapsed,
        bottleneck(waited, copied, elapsed),
    )


def _activations(session: Session, shared: Replicas, sample: Sample) -> int:
    """Bytes that one forward pass keeps for the backward pass, counted where no allocator knows its peak."""
    kept = SavedTensors(shared.named.values())
    with shared.batch(last=True), torch.autograd.graph.saved_tensors_hooks(kept.count, lambda x: x):
        generator = noise_generator(session.config.seed, 0, 0)
        batch = session.batch(sample)
        result = batch_loss(shared.module, batch, session.config, generator, session.world, session.queues)
        shared.backward(result.total)
    return kept.nbytes


def _memory(shared: Replicas, peak: int, activations: int | None) -> dict[str, int]:
    """Bytes by use; the activations, if not counted, are what is left of the `peak`."""
    named = shared.named.values()
    memory = {
        "weights": sum(map(nbytes, named)),
        "gradients": sum(nbytes(p.grad) for p in named if p.grad is not None),
        "moments": sum(nbytes(t) for s in shared.optimizer.state.values() for t in s.values()),
        "EMA": sum(map(nbytes, shared.ema.values())),
    }
    return memory | {"activations": max(0, peak - sum(memory.values())) if activations is None else activations}


def _wait(world: World) -> None:
    """Until the device has finished its work."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def resolved(config: TrainConfig, recipe: Mapping[str, Any], overrides: Mapping[str, Any]) -> list[str]:
    """The settings as lines of a YAML recipe, with the origin of every value: command line, recipe or default."""
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
    steps, cuda = run.config.steps, run.device.startswith("cuda")
    parts = ", ".join(f"{name} {size(nbytes)}" for name, nbytes in run.memory.items())
    peak = "peak on the device" if cuda else "peak resident memory of the process, with libraries,"
    yield from run.banner
    yield f"{steps} steps are {steps * run.batch / run.observations:.3g} epochs of {run.observations} observations"
    yield wrapped(f"Memory: {size(sum(run.memory.values()))} ({parts}); {peak} {size(run.peak)}").lstrip()
    yield wrapped(
        f"pilot of {PILOT_STEPS} steps on {run.device}: {run.steps_per_second:.3g} steps/s, "
        f"{run.steps_per_second * run.batch:.4g} samples/s, waiting for data {run.wait_share:.1%}; "
        f"bottleneck: {run.bottleneck}"
    ).lstrip()
    yield f"{steps} steps would take {duration(run.hours * 3600)}; evaluations and checkpoints come on top"


def show(run: DryRun, recipe: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    """Print settings and findings."""
    for line in (*resolved(run.config, recipe, overrides), "", *report(run)):
        say(line)
