"""The training loop of stages two and three."""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path

import torch

from ...batch import FeatureBatch
from ...common.signals import signals
from ...errors import UserError
from .context import Session, TrainReport, open_loader
from .panels.schedule import Panels
from .run_folder import begin, restore, save, settings_of, swapped
from .run_log import Tracker
from .setup import banner, kernel_threads, memory_errors, prepare, share_network, thaw
from .step import learning_rate, noise_generator, training_step
from .throughput import Meter
from .validation import evaluate


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
    tracking = (
        Tracker(folder, config.wandb, settings_of(session), step=step) if world.main else contextlib.nullcontext()
    )
    with (
        open_loader(session, split="train", start=state["offset"]) as loader,
        signals() as stopped,
        kernel_threads(config.cpu_threads),
        tracking as tracker,
        memory_errors(device),
    ):
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
                    result = training_step(
                        shared.module,
                        batch,
                        config,
                        noise_generator(config.seed, step * config.accumulate + k, 0, device),
                        world,
                        session.queues,
                    )
                    shared.backward(result.total / config.accumulate)
                value = result.total.item()
                total += value / config.accumulate
                suspect = batch if suspect is None or not math.isfinite(value) else suspect
            norm = shared.clip(config.optimizer.clip)
            mine, [total] = total, world.mean(total)
            if not (math.isfinite(total) and math.isfinite(norm)):
                assert suspect is not None  # of at least one batch
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
                line = {
                    "step": step,
                    "loss": loss,
                    **dict(zip(("mse", "drift", "scale"), numbers)),
                    "mean_square": numbers[3:],
                    "grad_norm": norm,
                    "lr": rate,
                    **meter.line(batch),
                    **(session.first if step == 1 else {}),
                    **({f"eval/{name}": v for name, v in metrics.items()} if due else {}),
                }
                if tracker is not None:
                    tracker.log(line)
                session.on_log(line)
            if turn:
                panels.draw(turn, seen, tracker)
            ending = world.any(step == last or bool(stopped))  # read once: a signal after this line ends the next step
            if step % config.save_every == 0 or ending or record and config.keep_best:
                save(
                    session,
                    shared,
                    ema,
                    {
                        "step": step,
                        "offset": loader.state_dict()["offset"],
                        "first_loss": first_loss,
                        "loss": loss,
                        "metrics": metrics,
                        "best": best,
                        "processes": world.size,
                    },
                )
        elapsed, waited = max(time.perf_counter() - began, 1e-9), loader.wait_seconds
    return TrainReport(
        folder,
        step,
        first_loss,
        loss,
        metrics.get("mse"),
        batches * meter.samples / elapsed,
        waited / elapsed,
        ending and step < last,
    )


def _stopped_at(session: Session, step: int, loss: float, norm: float, suspect: FeatureBatch, mine: float) -> UserError:
    """What is wrong with a step whose loss or gradient is not finite, naming the batch: of the processes, those whose loss is not."""
    names = [d.name for d in session.cache.datasets]
    rows = [f"{names[d]}:{row}" for d, row in zip(suspect.dataset.tolist(), suspect.frame_index.tolist())]
    broken = ~torch.stack(
        [x.flatten(1).isfinite().all(1) for x in (suspect.tokens, suspect.text, suspect.proprio, suspect.action)]
    ).all(0)  # [B]
    found = [row for row, bad in zip(rows, broken.tolist()) if bad]
    said = (
        ", ".join((found or rows)[:8])
        + ("…" if len(found or rows) > 8 else "")
        + (" hold values that are not finite" if found else "")
    )
    guilty = session.world.gather(None if math.isfinite(mine) else said) or [said]
    return UserError(
        f"the loss of step {step + 1} is {loss}, its gradient's norm {norm:g}; training stopped before the optimiser step. Its batch: "
        f"rows {'; '.join(guilty)}. Lower the learning rate, or run `dvla cache verify {session.config.cache}`"
    )
