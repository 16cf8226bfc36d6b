"""A run's folder from inside the loop: beginning it, going on with it, saving into it. What it holds: see checkpoint.py."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import __version__
from ...common import fingerprint as fp
from ...common.doctor import version_of
from ...common.files import json_bytes, read_json, write_file
from ...errors import UserError
from ..policy import checkpoint as ck
from .config import TrainConfig
from .context import Session
from .parallel.replicas import Replicas, place, whole
from .parallel.world import World

FREE = (
    "out",
    "local",
    "local_gib",
    "device",
    "threads",
    "log_every",
    "eval_every",
    "eval_batches",
    "save_every",
    "keep_last",
    "keep_best",
    "panels",
    "wandb",
    "gradient_checkpointing",
    "compile",
    "attention",
    "strategy",
)
"""Settings that may change when a run goes on: they do not change what is learnt."""
FRESH: dict[str, Any] = {"step": 0, "offset": 0, "first_loss": None, "loss": None, "metrics": {}, "best": None}


def settings_of(session: Session) -> dict[str, Any]:
    """What RUN/config.json holds."""
    settings = json.loads(json.dumps(dataclasses.asdict(session.config)))
    return (
        settings
        if session.stage_three is None
        else {**settings, "stage_three": json.loads(json.dumps(session.stage_three))}
    )


def begin(session: Session) -> tuple[dict[str, Any], Path | None]:
    """(state, checkpoint): make the run folder, or find the newest whole checkpoint of the same run and load its weights into the
    network. Rank 0 looks and writes, all do the same."""
    state, folder = session.world.on_main(lambda: _begin(session))
    if folder is None:
        return state, None
    stored = ck.load_tensors(folder, "model")
    for name, parameter in session.parameters().items():
        place(parameter, stored[name])
    before, now = state.get("processes", 1), session.world.size
    if before != now:
        session.say(
            f"it ran in {before} process{'es' if before > 1 else ''} and goes on in {now}: with the same samples in the same order, "
            f"{session.config.batch_size * session.config.accumulate * now} to a step"
        )
    return state, folder


def _begin(session: Session) -> tuple[dict[str, Any], Path | None]:
    folder, settings = Path(session.config.out), settings_of(session)
    if not (folder / "config.json").exists():
        try:
            if folder.exists() and any(folder.iterdir()):
                raise UserError(f"{folder} holds other files; choose another --out")
            write_file(folder / "config.json", json_bytes(settings))
            write_file(folder / "environment.json", json_bytes(environment(session.world)))
        except OSError as error:
            raise UserError(
                f"cannot make run folder {folder}: {error.strerror or error}; choose another --out"
            ) from None
        return dict(FRESH), None
    saved = whole_settings(read_json(folder / "config.json"))
    lines = fp.diff(
        {k: v for k, v in saved.items() if k not in FREE},
        {k: v for k, v in settings.items() if k not in FREE},
        was="it has",
    )
    if lines:
        raise UserError(
            f"run {folder} was begun with other settings: {'; '.join(lines[:6])}. "
            "Choose another --out, or repeat its settings"
        )
    found = ck.latest_intact(folder)
    if found is None:
        return dict(FRESH), None
    checkpoint, state, complaints = found
    for line in complaints:
        session.say(line)
    documents = json.loads(json.dumps(session.documents))
    lines = fp.diff(_filled(read_json(checkpoint / "policy.json"), documents), documents)
    if lines:
        raise UserError(
            f"cache {session.config.cache} is not the one run {folder} was begun with: {'; '.join(lines[:6])}"
        )
    session.say(f"resuming {folder} at step {state['step']} of {session.config.steps}")
    return {**FRESH, **state}, checkpoint


def whole_settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a config.json, with those that did not exist when the run began as they were then: the defaults."""
    return _filled(saved, json.loads(json.dumps(dataclasses.asdict(TrainConfig("", "")))))


def environment(world: World) -> dict[str, Any]:
    """What a run began in: versions, device, number of processes; not who or where."""
    packages = ("dvla", "torch", "numpy", "transformers", "peft", "flash-attn", "deepspeed")
    versions = {name: found for name in packages if (found := version_of(name))}
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    return {
        "begun": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "device": device,
        "processes": world.size,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {**versions, "dvla": __version__},
        **({"cuda": torch.version.cuda} if torch.version.cuda else {}),
    }


def _filled(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the keys that it lacks, at any depth, from `defaults`."""
    out = {**defaults, **values}
    return {
        k: _filled(v, defaults[k]) if isinstance(v, dict) and isinstance(defaults.get(k), dict) else v
        for k, v in out.items()
    }


def restore(checkpoint: Path, shared: Replicas, ema: Mapping[str, Tensor]) -> None:
    """Load a checkpoint's averaged weights and AdamW's state; `begin` has loaded the weights."""
    stored = ck.load_tensors(checkpoint, "ema")
    for name, tensor in ema.items():
        place(tensor, stored[name])
    shared.load_moments(ck.load_tensors(checkpoint, "optimizer"))
    if shared.session.queues is not None:
        shared.session.queues.load_state_dict(ck.load_tensors(checkpoint, "queues"))


def save(session: Session, shared: Replicas, ema: Mapping[str, Tensor], progress: dict[str, Any]) -> None:
    """One checkpoint: raw weights to go on with, averaged weights (and adapter) to act with, AdamW's moments. Every process calls it."""
    raw = {name: t.detach().clone() for name, t in whole(shared.named).items()}
    tensors = {"model": raw, "ema": whole(ema), "optimizer": shared.moments()}
    if session.queues is not None:
        tensors["queues"] = session.queues.state_dict()
    best = progress["best"]["step"] if progress["best"] and session.config.keep_best else None
    with swapped(shared.named, ema) if session.save_adapter else contextlib.nullcontext():
        session.world.on_main(
            lambda: ck.save_checkpoint(
                Path(session.config.out),
                progress["step"],
                tensors,
                {"policy": session.documents, "state": progress},
                session.config.keep_last,
                session.save_adapter,
                best,
            )
        )


@contextlib.contextmanager
def swapped(named: Mapping[str, Tensor], ema: Mapping[str, Tensor]) -> Iterator[None]:
    """The averaged weights in the place of the trained ones."""
    raw = {name: p.detach().clone() for name, p in named.items()}
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(ema[name])
        try:
            yield
        finally:
            for name, p in named.items():
                p.copy_(raw[name])
