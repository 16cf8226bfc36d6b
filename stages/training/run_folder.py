"""A run's folder from inside the loop: make it, resume from it, save into it. What it holds: see checkpoint.py."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...cache.actions.schemes import EARLIER
from ...common import fingerprint as fp
from ...common.config import from_mapping
from ...common.documents import json_bytes
from ...common.files import hold, write_file
from ...common.packages import version_of
from ...common.text import public
from ...errors import UserError
from ..policy import checkpoint as ck
from ..policy.document import read_document
from ..policy.robot import NOTED
from .checks import ENVIRONMENT, fingerprint_of
from .config import ALL, TrainConfig, read_settings
from .context import Session
from .parallel.replicas import Replicas, place, unsharded
from .parallel.world import World
from .run_log import RunLog
from .setup import banner, prepare, share_network, thaw
from .step import learning_rate

FREE = (
    "out",
    "cache",  # it is known by its fingerprint
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
    "trackers",
    "wandb",
    "gradient_checkpointing",
    "compile",
    "attention",
    "strategy",
)
"""Settings that may change when a run resumes: they do not change what is learned."""
LOCK = ".lock"  # held by the one training


@dataclass
class Progress:
    """How far a run is: the state.json of its checkpoints."""

    step: int = 0
    offset: int = 0  # where the next step's samples begin
    first_loss: float | None = None  # of the run's first step
    loss: float | None = None  # of the newest
    metrics: dict[str, float] = field(default_factory=dict)  # of the newest evaluation
    best: dict[str, Any] | None = None  # step and mse of the best one
    processes: int = 1  # that took the newest step

    def advance(self, loss: float, next_offset: int) -> None:
        """One more step is done."""
        self.step, self.offset, self.loss = self.step + 1, next_offset, loss
        self.first_loss = loss if self.first_loss is None else self.first_loss

    def note_best(self) -> bool:
        """Remember the newest evaluation if its MSE is the smallest so far; whether it is."""
        smallest = self.best is None or self.metrics["mse"] < self.best["mse"]
        if smallest:
            self.best = {"step": self.step, "mse": self.metrics["mse"]}
        return smallest


def resume(session: Session, held: contextlib.ExitStack) -> tuple[Progress, Replicas]:
    """Make the run folder or load the run's newest intact checkpoint; share the network over the processes.

    The folder stays locked until `held` is closed. `UserError` when another training holds it.
    """
    prepare(session)
    session.world.on_main(lambda: _lock(Path(session.config.out), held))
    progress, checkpoint = _begin(session)
    thaw(session.parameters(), session.config.unfreeze, progress.step)
    shared = share_network(session)
    if checkpoint is not None:
        _restore(checkpoint, shared, progress.step)
    for line in banner(session):
        session.say(line)
    return progress, shared


def open_log(session: Session, step: int) -> contextlib.AbstractContextManager[RunLog | None]:
    """The log of the run after `step` steps, in the process that writes it."""
    if not session.world.main:
        return contextlib.nullcontext()
    return RunLog(Path(session.config.out), session.config, settings_of(session), step=step, say=session.say)


def settings_of(session: Session) -> dict[str, Any]:
    """What RUN/config.json holds: no password of an address."""
    settings = public(json.loads(json.dumps(dataclasses.asdict(session.config))))
    return (
        settings
        if session.stage_three is None
        else {**settings, "stage_three": json.loads(json.dumps(session.stage_three))}
    )


def _begin(session: Session) -> tuple[Progress, Path | None]:
    """(progress, checkpoint): make the run folder, or find the newest intact checkpoint of the same run and load its
    weights into the network. Rank 0 looks and writes, all do the same."""
    progress, checkpoint = session.world.on_main(lambda: _find(session))
    before, now = progress.processes, session.world.size
    progress.processes = now
    if checkpoint is None:
        return progress, None
    parameters = session.parameters()
    stored = ck.load_tensors(checkpoint, "model", lambda _: parameters)
    for name, parameter in parameters.items():
        place(parameter, stored[name])
    if before != now:
        session.say(
            f"resuming in {now} process{'es' if now > 1 else ''} a run of {before}: same samples in the same order, "
            f"{session.config.batch_size * session.config.accumulate * now} per step"
        )
    return progress, checkpoint


def _find(session: Session) -> tuple[Progress, Path | None]:
    folder, settings = Path(session.config.out), settings_of(session)
    if not (folder / "config.json").exists():
        _make_folder(folder, settings, session)
        return Progress(), None
    saved = whole_settings(read_settings(folder))
    if lines := fp.diff(_fixed(saved), _fixed(settings), was="run has", now="you requested"):
        raise UserError(
            f"run {folder} has other settings: {'; '.join(lines[:6])}. Choose another --out, or repeat its settings"
        )
    if fingerprint_of(session.config.out) not in (None, session.cache.manifest["fingerprint"]):
        raise UserError(
            f"cache {session.config.cache} is not the one run {folder} was begun with: it was built again or grown, "
            "and that generation is gone (see `dvla cache diff`); begin a new run from its weights with --init"
        )
    if session.cache.path.absolute() != Path(session.config.cache).absolute() and session.cache.folder is not None:
        session.say(f"the cache was grown since: {folder} resumes with {session.cache.path}, which it was begun with")
    found = ck.latest_intact(folder)
    if found is None:
        _replan(session, folder, saved, settings, 0)
        return Progress(), None
    checkpoint, state, complaints = found
    for line in complaints:
        session.say(line)
    document = _meaning(json.loads(json.dumps(session.document)))
    begun = _filled(_meaning(read_document(checkpoint)), document)
    lines = fp.diff(begun, document, "run has", "the cache has")
    if lines:
        raise UserError(
            f"cache {session.config.cache} is not the one run {folder} was begun with: {'; '.join(lines[:6])}"
        )
    _replan(session, folder, saved, settings, state["step"])
    session.say(f"resuming {folder} at step {state['step']} of {session.config.steps}")
    known = {f.name for f in dataclasses.fields(Progress)}
    return Progress(**{name: value for name, value in state.items() if name in known}), checkpoint


def _fixed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a resumed run must repeat. How many steps are planned is none of them, nor when wsd decays:
    before that, its rates are those of a constant schedule."""
    optimizer = {k: v for k, v in settings["optimizer"].items() if k != "decay"}
    if optimizer["schedule"] != "cosine":
        optimizer["schedule"] = "constant or wsd"
    return {k: v for k, v in settings.items() if k not in (*FREE, "steps")} | {"optimizer": optimizer}


def _replan(session: Session, folder: Path, saved: dict[str, Any], settings: dict[str, Any], done: int) -> None:
    """Note in config.json the steps and the schedule of a run that has `done` steps, where they are others than it was
    begun with, and say what becomes of the learning rate. `UserError` for fewer steps than are done."""
    now = session.config
    if now.steps < done:
        raise UserError(f"run {folder} has done {done} steps; give --steps {done} or more, not {now.steps}")
    if (saved["steps"], saved["optimizer"]) != (settings["steps"], settings["optimizer"]):
        optimizer = from_mapping(type(now.optimizer), saved["optimizer"], f"{folder}/config.json: optimizer")
        before = dataclasses.replace(now, steps=saved["steps"], optimizer=optimizer)
        was, rate = learning_rate(done, before), learning_rate(done, now)
        change = f"stays {rate:.3g}" if math.isclose(was, rate) else f"goes from {was:.3g} to {rate:.3g}"
        session.say(
            f"planned for {before.steps} steps ({optimizer.schedule}), now {now.steps} ({now.optimizer.schedule}): the "
            f"learning rate of step {done + 1} {change}"
        )
    kept = {name: settings[name] for name in ("steps", "optimizer", "cache")}
    if kept != {name: saved[name] for name in kept}:
        write_file(folder / "config.json", json_bytes({**read_settings(folder), **kept}))


def _meaning(document: dict[str, Any]) -> dict[str, Any]:
    """policy.json without what earlier releases did not store, as the dataset configs, whose maps are in it, too; and
    without the place of the VLM, which is known by its fingerprint."""
    datasets = [{k: v for k, v in d.items() if k not in NOTED} for d in document["datasets"]]
    encoder = document["encoder"]
    spec = {k: v for k, v in encoder["spec"].items() if k != "path"}
    return {**document, "datasets": datasets, "encoder": {**encoder, "spec": spec}}


def _lock(folder: Path, held: contextlib.ExitStack) -> None:
    """Be the only training in a run folder, which is made if needed. `UserError` when another one is, or when the
    folder holds anything but a run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "config.json").exists() and {p.name for p in folder.iterdir()} - {LOCK}:
            raise UserError(f"{folder} holds other files; choose another --out")
        hold(held.enter_context(open(folder / LOCK, "ab")), f"another process is training in {folder}")
    except OSError as error:
        raise UserError(f"cannot make run folder {folder}: {error.strerror or error}; choose another --out") from None


def _make_folder(folder: Path, settings: dict[str, Any], session: Session) -> None:
    try:
        write_file(folder / "config.json", json_bytes(settings))
        begun = environment(session.world) | {"cache_fingerprint": session.cache.manifest["fingerprint"]}
        write_file(folder / ENVIRONMENT, json_bytes(begun))
    except OSError as error:
        raise UserError(f"cannot make run folder {folder}: {error.strerror or error}; choose another --out") from None


def whole_settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a config.json; those that did not exist when the run began have their defaults, or what was done
    then."""
    then = {"normalize": {ALL: EARLIER}, **saved}
    return _filled(then, json.loads(json.dumps(dataclasses.asdict(TrainConfig("", "")))))


def as_begun(config: TrainConfig) -> TrainConfig:
    """`config`, or the run's own normalization where an earlier release began the run in `config.out`."""
    saved = Path(config.out) / "config.json"
    if config.normalize or not saved.is_file() or "normalize" in read_settings(saved.parent):
        return config
    return dataclasses.replace(config, normalize={ALL: EARLIER})


def environment(world: World) -> dict[str, Any]:
    """What a run began in: versions, device, number of processes; no names of people or machines."""
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


def _restore(checkpoint: Path, shared: Replicas, step: int) -> None:
    """Load the averaged weights, AdamW's state and the queues of a checkpoint after `step` steps; `_begin` has loaded
    the weights."""
    parameters = shared.session.parameters()
    stored = ck.load_tensors(checkpoint, "ema", lambda _: parameters)
    for name, tensor in shared.ema.items():
        place(tensor, stored[name])
    own = "AdamW's state of its network"
    moments = ck.load_tensors(checkpoint, "optimizer", lambda found: shared.moments_form(found, step), own)
    for name, tensor in moments.items():
        counts = name.endswith(":step") and not (1 <= float(tensor) <= step and float(tensor).is_integer())
        if counts or name.endswith(":exp_avg_sq") and bool((tensor < 0).any()):
            raise UserError(f"{checkpoint}/optimizer.safetensors is damaged: {name} is nothing that {step} steps give")
    shared.load_moments(moments)
    if (queues := shared.session.queues) is not None:
        queues.load_state_dict(ck.load_tensors(checkpoint, "queues", queues.state_form, "queues of its settings"))


def save(session: Session, shared: Replicas, progress: Progress) -> None:
    """Write a checkpoint: raw and averaged weights, AdamW's moments, the adapter. Every process must call it."""
    raw = {name: t.detach().clone() for name, t in unsharded(shared.named).items()}
    tensors = {"model": raw, "ema": unsharded(shared.ema), "optimizer": shared.moments()}
    if session.queues is not None:
        tensors["queues"] = session.queues.state_dict()
    best = progress.best["step"] if progress.best and session.config.keep_best else None
    with shared.averaged() if session.save_adapter else contextlib.nullcontext():
        session.world.on_main(
            lambda: ck.save_checkpoint(
                Path(session.config.out),
                progress.step,
                tensors,
                {"policy": session.document, "state": dataclasses.asdict(progress)},
                session.config.keep_last,
                session.save_adapter,
                best,
            )
        )
