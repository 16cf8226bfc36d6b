"""The training loop of stages two and three: train steps, and once in a while evaluation, log line, checkpoint."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path

from ...cache.loader.sample import Sample
from ...common.signals import signals
from .context import Session, TrainReport, open_loader
from .panels.catalogue import Panel
from .panels.data import PanelData
from .panels.schedule import Panels
from .parallel.replicas import Replicas
from .run_folder import Progress, open_log, resume, save
from .run_log import RunLog
from .setup import kernel_threads, memory_errors, thaw
from .step import StepDone, batch_loss, learning_rate, noise_generator, on_host, require_finite
from .throughput import Meter
from .validation import held_out_metrics


def run(session: Session, stop_after: int | None = None) -> TrainReport:
    """Train from the newest intact checkpoint to `config.steps`, or to step `stop_after` of the run.

    SIGINT and SIGTERM in any process save and stop all after the same step; a non-finite loss stops before the
    optimizer step (`UserError`).
    """
    with contextlib.ExitStack() as held:
        return _run(session, *resume(session, held), stop_after)


def _run(session: Session, progress: Progress, shared: Replicas, stop_after: int | None) -> TrainReport:
    config, world = session.config, session.world
    last = config.steps if stop_after is None else min(stop_after, config.steps)
    began, first, ending = time.perf_counter(), progress.step, progress.step >= last
    session.net.train()
    with (
        open_loader(session, split="train", start=progress.offset) as loader,
        signals() as stopped,
        kernel_threads(config.cpu_threads),
        open_log(session, progress.step) as run_log,
        memory_errors(world.device),
    ):
        meter = Meter(world, loader, config.batch_size * world.size)
        panels = Panels(session, loader.order.quotas)
        samples = panels.counting(loader)
        while not ending:
            with meter.step(config.accumulate):
                done = train_step(session, shared, samples, progress.step)
            progress.advance(done.loss, done.next_offset)
            step = progress.step

            due = bool(config.eval_every and config.holdout) and (step % config.eval_every == 0 or step == config.steps)
            turn, seen, record = panels.turn(step, due), None, False
            if due or turn:
                seen, record = evaluate(session, shared, progress, panels, turn, due)
            if due or step % config.log_every == 0 or step in (1, config.steps):
                log(session, progress, done, meter, run_log, due)
            if turn:
                panels.draw(turn, seen, run_log)
            ending = world.any(step == last or bool(stopped))  # read once: a signal after this line ends the next step
            if step % config.save_every == 0 or ending or record and config.keep_best:
                save(session, shared, progress)
        elapsed, waited = max(time.perf_counter() - began, 1e-9), loader.wait_seconds
    steps = progress.step - first
    return TrainReport(
        Path(config.out),
        progress.step,
        progress.first_loss,
        progress.loss,
        progress.metrics.get("mse"),
        steps * config.accumulate * meter.samples / elapsed,
        waited / elapsed,
        ending and progress.step < last,
    )


def train_step(session: Session, shared: Replicas, samples: Iterator[Sample], step: int) -> StepDone:
    """One optimizer step after `step` others: gradients of the next `accumulate` batches, AdamW, the averaged weights.

    `UserError` before the optimizer step where the loss or its gradient is not finite."""
    config, world = session.config, session.world
    rate = learning_rate(step, config)
    for group in shared.optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"] * 0.5 ** sum(step >= at for at in group["halved"])
    if thaw(shared.named, config.unfreeze, step):
        shared.share()
    shared.optimizer.zero_grad(set_to_none=True)
    mine, suspect = 0.0, None
    for k in range(config.accumulate):
        sample = next(samples)
        noise = noise_generator(config.seed, step * config.accumulate + k, 0, world.device)
        last = k == config.accumulate - 1
        with session.learning(sample.offset), shared.batch(last):
            batch = session.batch(sample)
            result = batch_loss(shared.module, batch, config, noise, world, session.queues)
            shared.backward(result.total / config.accumulate)
        value, *norm = on_host(result.total, *([shared.clip(config.optimizer.clip)] if last else []))
        mine += value / config.accumulate
        suspect = batch if suspect is None or not math.isfinite(value) else suspect
    [loss] = world.mean(mine)
    require_finite(session, step, loss, norm[0], suspect, mine)
    shared.step()
    shared.average(min(config.optimizer.ema, (2 + step) / (11 + step)))
    return StepDone(loss, norm[0], rate, result, batch.tokens.nbytes + batch.text.nbytes, sample.next_offset)


def evaluate(
    session: Session, shared: Replicas, progress: Progress, panels: Panels, turn: list[Panel], due: bool
) -> tuple[PanelData | None, bool]:
    """Look at held-out observations with the averaged weights, for this `turn`'s panels and, where `due`, for metrics:
    (what was seen, whether its MSE is the smallest so far)."""
    with shared.averaged():
        seen = panels.look(progress.step, turn, due)
        if not due:
            return seen, False
        progress.metrics = held_out_metrics(session, seen)
    return seen, progress.note_best()


def log(
    session: Session, progress: Progress, done: StepDone, meter: Meter, run_log: RunLog | None, evaluated: bool
) -> None:
    """Write a line of log.jsonl, and show it. Every process must: means are over all of them."""
    parts = done.parts
    numbers = session.world.mean(*on_host(parts.mse, parts.drift, parts.scale, *parts.mean_square))
    line = {
        "step": progress.step,
        "loss": done.loss,
        **dict(zip(("mse", "drift", "scale"), numbers)),
        "mean_square": numbers[3:],
        "grad_norm": done.norm,
        "lr": done.rate,
        **({"layer_weights": shares} if (shares := session.net.layer_weights) else {}),  # of the VLM, in their mix
        **meter.line(done.nbytes),
        **(session.first if progress.step == 1 else {}),
        **({f"eval/{name}": v for name, v in progress.metrics.items()} if evaluated else {}),
    }
    if run_log is not None:
        run_log.log(line)
    session.on_log(line)
