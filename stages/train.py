"""Training of the policy from cached features (stage two) and with the live VLM (stage three): one loop for both.

In one process or, started by `torchrun`, in several: each reads its part of every global batch, and what is learnt is what one process
with the whole batch would learn, up to rounding.

Letters: B observations, G noise draws per observation, T action steps, n noise entries.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from ..batch import FeatureBatch
from ..cache.sampling import mix
from ..cache.store import Cache
from ..drifting.dit import dit_config
from ..drifting.guidance import batch_negatives, sample_alpha
from ..drifting.heads import head_dit, head_loss
from ..drifting.losses import PolicyLoss
from ..drifting.policy_net import PolicyNet, PolicyNetConfig
from ..drifting.queues import ChunkQueues
from ..errors import UserError
from . import checkpoint as ck
from .adapted import start_from
from .distributed import ALONE, World, join
from .held_out import evaluate
from .interrupts import signals
from .loop_tools import Meter, banner, kernel_threads, memory_errors, prepare, thaw
from .panels.during import Panels
from .policy import describe_dataset
from .requirements import open_cache, require_trainable
from .run_folder import begin, restore, save, settings_of, swapped
from .session import Session, TrainReport, autocast, noise_generator, open_loader
from .strategies import share_network
from .tracking import Tracker
from .train_config import TrainConfig


def training_step(net: torch.nn.Module, batch: FeatureBatch, config: TrainConfig, generator: torch.Generator, world: World = ALONE,
                  queues: ChunkQueues | None = None) -> PolicyLoss:
    """One forward pass and its loss; the same for both stages. `net`: a PolicyNet, or what wraps one.

    Noise and guidance scales of the global batch come from `generator`, on its device, and this process takes its part. The loss is
    scaled so that its mean over the processes is that of the global batch; unconditional negatives are this process's own.
    """
    inner = cast(PolicyNet, getattr(net, "module", net))
    dit, device, b = inner.config.dit, batch.tokens.device, len(batch)
    shape = (world.size * b, config.draws, dit.horizon, dit.noise_dim)
    noise = world.slice(torch.randn(shape, generator=generator, device=generator.device)).to(device)       # [B,G,T,n]
    alpha, negatives, weights = torch.ones(b, device=device), None, None                                    # [B]
    mine = torch.Generator().manual_seed(int(mix(generator.initial_seed(), 8, world.rank)) >> 1)            # the rest needs no other's
    if config.alpha_max > 1:
        drawn = sample_alpha(world.size * b, high=config.alpha_max, device=generator.device, generator=generator)
        alpha = world.slice(drawn).to(device)                                                               # [B]
        on_device = mine if device.type == "cpu" else torch.Generator(device).manual_seed(mine.initial_seed())
        negatives, weights = batch_negatives(batch, alpha, config.draws, config.negatives, on_device)       # [B,M,T,128], [B,M]
    with autocast(config, device):
        return head_loss(net, batch, config.loss, noise=noise, alpha=alpha, generator=mine, negatives=negatives, w_neg=weights,
                         queues=queues, reduce=world.total if world.size > 1 else None)


def train(config: TrainConfig, on_log: Callable[[dict[str, Any]], None] = lambda _: None,
          say: Callable[[str], None] = print, stop_after: int | None = None) -> TrainReport:
    """Stage two: train from a cache, or go on with the run in `config.out` if it was begun with the same settings."""
    cache = open_cache(config)
    require_trainable(config, cache)    # before a run folder is made
    with join(config.device) as world:
        torch.manual_seed(config.seed)
        net = policy_net(config, cache)
        if config.init is not None and not ck.checkpoints(Path(config.out)):
            start_from(config, cache, net, say if world.main else lambda _: None)
        net.to(world.device)
        return run(Session(config, cache, net, policy_document(net, cache, config), on_log=on_log, say=say, world=world), stop_after)


def policy_net(config: TrainConfig, cache: Cache) -> PolicyNet:
    """The untrained network that `config` asks for, for the features of `cache`."""
    text_width = cache.text_width if cache.text_width != cache.width else None
    dit = head_dit(dit_config(config.model_size, **config.dit), config.loss.kind)
    slots: tuple[int, ...] = ()
    if config.action_space == "active":
        used = np.any([mask for d in cache.datasets for mask in (d.action_mask, d.proprio_mask)], axis=0)       # [128]
        slots = tuple(np.flatnonzero(used).tolist())
        dit = dataclasses.replace(dit, action_dim=len(slots), proprio_dim=len(slots))
    return PolicyNet(PolicyNetConfig(feature_width=cache.width, text_width=text_width, dit=dit, slots=slots))


def policy_document(net: PolicyNet, cache: Cache, config: TrainConfig) -> dict[str, Any]:
    """policy.json: all that inference needs besides the weights."""
    encoder = {"spec": cache.datasets[0].attributes["encoder"], "fingerprint": cache.fingerprint["encoder"]}
    return {"format": ck.POLICY_FORMAT, "net": dataclasses.asdict(net.config), "encoder": encoder,
            "datasets": [describe_dataset(d) for d in cache.datasets],
            "loss": {"kind": config.loss.kind, "sample_steps": config.loss.sample_steps},   # how the head samples
            "conditions": {"blind": config.blind, "masking": dataclasses.asdict(config.masking), "alpha_max": config.alpha_max}}


def learning_rate(step: int, config: TrainConfig) -> float:
    """Peak rate × linear warm-up × cosine decay, at `step` (0-based) of `config.steps`."""
    warmup = max(1, min(config.optimizer.warmup, config.steps // 2))
    return config.optimizer.lr * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def run(session: Session, stop_after: int | None = None) -> TrainReport:
    """The loop. Resumes from the newest whole checkpoint and stops at `config.steps`, or at step `stop_after` of the run.

    SIGINT and SIGTERM in any process save and stop all after the same step; a non-finite loss stops before the optimiser step
    (`UserError`).
    """
    config, world, folder, device = session.config, session.world, Path(session.config.out), session.world.device
    prepare(session)
    state, checkpoint = begin(session)
    step, first_loss, loss, metrics, best = (state[k] for k in ("step", "first_loss", "loss", "metrics", "best"))
    thaw(session.parameters(), config.unfreeze, step)
    shared = share_network(session)
    named, optimizer = shared.named, shared.optimizer
    ema = {name: p.detach().clone() for name, p in named.items()}
    if checkpoint is not None:
        restore(checkpoint, shared, ema)
    for text in banner(session):
        session.say(text)
    last = config.steps if stop_after is None else min(stop_after, config.steps)
    batches, began, ending, meter = 0, time.perf_counter(), False, Meter(world, config.batch_size * world.size)
    session.net.train()
    tracking = Tracker(folder, config.wandb, settings_of(session), step=step) if world.main else contextlib.nullcontext()
    with open_loader(session, split="train", start=state["offset"]) as loader, signals() as stopped, kernel_threads(config.cpu_threads), tracking as tracker, memory_errors(device):
        panels = Panels(session, loader)
        while step < last and not ending:
            rate = learning_rate(step, config)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["lr_scale"] * 0.5 ** sum(step >= at for at in group["halved"])
            if thaw(named, config.unfreeze, step):
                shared.share()
            meter.begin(loader.wait_seconds)
            optimizer.zero_grad(set_to_none=True)
            total, suspect = 0.0, None
            for k in range(config.accumulate):
                at = loader.state_dict()["offset"]
                with session.learning(at), shared.batch(last=k == config.accumulate - 1):
                    batch = session.features(next(loader), loader.masked(at)[1], loader.variants(at))
                    result = training_step(shared.module, batch, config, noise_generator(config.seed, step * config.accumulate + k, 0, device), world,
                                           session.queues)
                    shared.backward(result.total / config.accumulate)
                value = result.total.item()
                total += value / config.accumulate
                suspect = batch if suspect is None or not math.isfinite(value) else suspect
            norm = shared.clip(config.optimizer.clip)
            mine, [total] = total, world.mean(total)
            if not (math.isfinite(total) and math.isfinite(norm)):
                assert suspect is not None      # of at least one batch
                raise _stopped_at(session, step, total, norm, suspect, mine)
            shared.step()
            step += 1
            decay = min(config.optimizer.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(ema.values()), [p.detach() for p in named.values()], 1 - decay)
            batches += config.accumulate
            meter.end(config.accumulate, loader.wait_seconds)
            loss, first_loss, record = total, total if first_loss is None else first_loss, False
            due = bool(config.eval_every and config.holdout) and (step % config.eval_every == 0 or step == config.steps)
            turn = panels.turn(step, due)
            if due or turn:
                with swapped(named, ema):
                    seen = panels.look(step, turn, due)
                    metrics = evaluate(session, seen) if due else metrics
            if due:
                record = best is None or metrics["mse"] < best["mse"]
                best = {"step": step, "mse": metrics["mse"]} if record else best
            if due or step % config.log_every == 0 or step in (1, config.steps):
                numbers = world.mean(*(x.item() for x in (result.mse, result.drift, result.scale, *result.mean_square)))
                line = {"step": step, "loss": loss, **dict(zip(("mse", "drift", "scale"), numbers)), "mean_square": numbers[3:], "grad_norm": norm, "lr": rate,
                        **meter.line(batch), **(session.first if step == 1 else {}), **({f"eval/{name}": v for name, v in metrics.items()} if due else {})}
                if tracker is not None:
                    tracker.log(line)
                session.on_log(line)
            if turn:
                panels.draw(turn, seen, tracker)
            ending = world.any(step == last or bool(stopped))       # read once: a signal after this line ends the next step
            if step % config.save_every == 0 or ending or record and config.keep_best:
                save(session, shared, ema, {"step": step, "offset": loader.state_dict()["offset"], "first_loss": first_loss, "loss": loss,
                                            "metrics": metrics, "best": best, "processes": world.size})
        elapsed, waited = max(time.perf_counter() - began, 1e-9), loader.wait_seconds
    return TrainReport(folder, step, first_loss, loss, metrics.get("mse"), batches * meter.samples / elapsed, waited / elapsed, ending and step < last)


def _stopped_at(session: Session, step: int, loss: float, norm: float, suspect: FeatureBatch, mine: float) -> UserError:
    """What is wrong with a step whose loss or gradient is not finite, naming the batch: of the processes, those whose loss is not."""
    names = [d.name for d in session.cache.datasets]
    rows = [f"{names[d]}:{row}" for d, row in zip(suspect.dataset.tolist(), suspect.frame_index.tolist())]
    broken = ~torch.stack([x.flatten(1).isfinite().all(1) for x in (suspect.tokens, suspect.text, suspect.proprio, suspect.action)]).all(0)     # [B]
    found = [row for row, bad in zip(rows, broken.tolist()) if bad]
    said = ", ".join((found or rows)[:8]) + ("…" if len(found or rows) > 8 else "") + (" hold values that are not finite" if found else "")
    guilty = session.world.gather(None if math.isfinite(mine) else said) or [said]
    return UserError(f"the loss of step {step + 1} is {loss}, its gradient's norm {norm:g}; training stopped before the optimiser step. Its batch: "
                     f"rows {'; '.join(guilty)}. Lower the learning rate, or run `dvla cache verify {session.config.cache}`")
