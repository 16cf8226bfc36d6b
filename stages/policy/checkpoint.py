"""Runs and checkpoints on disk: safetensors + JSON, no pickle. A checkpoint is a policy directory.

RUN/config.json                     settings of the run
RUN/log.jsonl                       one line per logged step
RUN/checkpoints/step-00000400/      written under a temporary name, synced, renamed
    policy.json                     network shape, datasets (field maps, statistics, initial states), encoder, dropout
    model.safetensors ema.safetensors optimizer.safetensors, and queues.safetensors where the loss has queues
    adapter/                        LoRA weights, when the vision tower was adapted
    state.json                      step, sample offset, content hashes of the other files
RUN/checkpoints/best                name of the checkpoint with the smallest held-out error, which is kept as well
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ...common.documents import Count, Crc32c, Field, Form, json_bytes, read_file, read_json
from ...common.files import crc32c, file_crc32c, write_file
from ...common.hub import policy_snapshot
from ...common.tensors import open_tensors, require_tensors
from ...errors import UserError

_STEP = re.compile(r"step-(\d{8})")
Entry = Annotated[list[Count], Field(min_length=2, max_length=2)]  # size in bytes, crc32c


class Best(Form):
    """The evaluation with the smallest error."""

    step: Count
    mse: float


class StateForm(Form):
    """state.json; an exported policy's has the step and the metrics alone, and earlier releases' no `crc32c`."""

    files: dict[str, Entry]
    step: Count
    metrics: dict[str, float] = {}
    offset: Count = 0
    first_loss: float | None = None
    loss: float | None = None
    best: Best | None = None
    processes: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    crc32c: Crc32c = 0


READ = (  # files of a checkpoint or policy that are read
    *("policy.json", "model.safetensors", "ema.safetensors", "optimizer.safetensors", "queues.safetensors"),
    *("vision.safetensors", "adapter/identity.json", "adapter/tower.safetensors"),
    *("adapter/adapter_config.json", "adapter/adapter_model.safetensors"),
)


def checkpoints(run: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("step-*") if _STEP.fullmatch(p.name))


def save_checkpoint(
    run: Path,
    step: int,
    tensors: dict[str, dict[str, torch.Tensor]],
    documents: dict[str, Any],
    keep_last: int,
    adapter: Any = None,
    best: int | None = None,
) -> Path:
    """Write `RUN/checkpoints/step-<step>`, which appears only when all of it is on disk; drop old checkpoints.

    Args:
        tensors: file stem → named tensors.
        documents: file stem → JSON, "state" among them.
        keep_last: how many of the newest checkpoints stay.
        adapter: writes LoRA weights into a folder.
        best: step of the checkpoint that stays in any case; written to `RUN/checkpoints/best`.

    Raises:
        UserError: the checkpoint cannot be written.
    """
    final = run / "checkpoints" / f"step-{step:08d}"
    temporary = final.with_name(f".{final.name}.tmp-{os.getpid()}")
    final.parent.mkdir(parents=True, exist_ok=True)
    for left in final.parent.glob(".step-*.tmp-*"):
        shutil.rmtree(left)
    temporary.mkdir()
    try:
        write_files(temporary, tensors, documents, adapter)
        if final.exists():  # the same step again: a resumed run that was stopped before its next one
            shutil.rmtree(final)
        os.replace(temporary, final)
        if best is not None:
            write_file(final.with_name("best"), f"step-{best:08d}\n".encode())
    except (OSError, SafetensorError) as error:  # the latter is what safetensors makes of the former
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"make room and rerun the same command to resume: cannot write checkpoint {final} "
            f"({getattr(error, 'strerror', None) or error}); earlier checkpoints are intact"
        ) from None
    for old in checkpoints(run)[:-keep_last]:
        if best is None or old.name != f"step-{best:08d}":
            shutil.rmtree(old)
    return final


def write_files(
    folder: Path, tensors: dict[str, dict[str, torch.Tensor]], documents: dict[str, Any], adapter: Any = None
) -> None:
    """Add the files of a checkpoint to `folder`, arguments as in `save_checkpoint`, and sync all of them.

    state.json, with size and crc32c of every other file, comes last."""
    for stem, named in tensors.items():
        save_file({n: t.detach().cpu().contiguous() for n, t in named.items()}, folder / f"{stem}.safetensors")
        (folder / f"{stem}.safetensors").chmod(folder.stat().st_mode & 0o666)  # safetensors lets nobody else read it
    if adapter is not None:
        adapter(folder / "adapter")
    for stem, document in documents.items():
        if stem != "state":
            write_file(folder / f"{stem}.json", json_bytes(document))
    files = {p.relative_to(folder).as_posix(): list(file_crc32c(p)) for p in sorted(folder.rglob("*")) if p.is_file()}
    for name in files:
        with open(folder / name, "rb") as handle:
            os.fsync(handle.fileno())
    state = {**documents["state"], "files": files}
    write_file(folder / "state.json", json_bytes({**state, "crc32c": _own_crc32c(state)}))


def load_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint after checking it and every file's size and crc32c; `UserError` naming the damaged
    one. Checkpoints of earlier releases have no checksum of state.json itself."""
    file = folder / "state.json"
    state = read_json(file, StateForm)
    own, files = state.pop("crc32c", None), state["files"]
    if own not in (None, _own_crc32c(state)):
        raise UserError(f"{file} is damaged (its checksum differs)")
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
        raise UserError(f"{file} is damaged (it names a file outside the folder)")
    named = _STEP.fullmatch(folder.name) if folder.parent.name == "checkpoints" else None
    if named and int(named[1]) != state["step"]:
        raise UserError(f"{folder} is damaged (its state.json is of step {state['step']})")
    for name in READ:
        if name not in files and ((folder / name).exists() or name == "policy.json"):
            raise UserError(f"{folder / name} is not listed in state.json; copy the checkpoint again")
    for name, (nbytes, crc) in files.items():
        try:
            found = file_crc32c(folder / name)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {folder / name}: {getattr(error, 'strerror', None) or error}") from None
        if found != (nbytes, crc):
            how = f"{found[0]} of {nbytes} bytes" if found[0] != nbytes else "its checksum differs"
            raise UserError(f"{folder / name} is damaged ({how})")
    return state


def _own_crc32c(state: dict[str, Any]) -> int:
    """The checksum of state.json's own entries, which say where training resumes."""
    return crc32c(json_bytes(state))


def load_tensors(
    folder: Path,
    stem: str,
    expected: Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]],
    what: str = "the weights of its network",
    skip: tuple[str, ...] = (),
) -> dict[str, torch.Tensor]:
    """The tensors of one safetensors file of a checkpoint, once its header has the names, shapes and types that
    `expected(header)` gives. `UserError` otherwise, and for values that are not finite.

    `skip`: how names begin that are left out."""
    path = folder / f"{stem}.safetensors"
    with open_tensors(path, "copy the checkpoint again") as file:
        header = {name: tensor for name, tensor in file.header.items() if not name.startswith(skip)}
        require_tensors(header, expected(header), path, what)
        return file.load(header)


def policy_tensors(folder: Path, expected: Mapping[str, torch.Tensor], stem: str = "ema") -> dict[str, torch.Tensor]:
    """The policy network's tensors, averaged ("ema") or raw ("model"), without those of the adapter; `UserError`
    unless they are as `expected`.

    The one file of an export holds averaged ones, ema.safetensors in those of earlier releases."""
    if stem == "ema" and "ema.safetensors" not in read_json(folder / "state.json", StateForm)["files"]:
        stem = "model"
    return load_tensors(folder, stem, lambda _: expected, skip=("adapter.",))


def latest_intact(run: Path) -> tuple[Path, dict[str, Any], list[str]] | None:
    """(folder, state, a line for each damaged one skipped) of the newest intact checkpoint; None without any."""
    complaints: list[str] = []
    for folder in reversed(checkpoints(run)):
        try:
            return folder, load_state(folder), complaints
        except UserError as error:
            complaints.append(f"{error}; falling back to the previous checkpoint")
    if complaints:
        raise UserError(f"{run}: no checkpoint is intact ({complaints[0]})")
    return None


def resolve(path: str | Path, say: Callable[[str], None] = warnings.warn) -> Path:
    """The policy directory behind a path, with every checksum verified.

    Args:
        path: a run (its newest intact checkpoint), a checkpoint folder, a run's `checkpoints/best`, or
            "owner/name[@revision]" of the hub.
        say: gets a line for each damaged checkpoint that was skipped.

    Raises:
        UserError: `path` is none of these, or damaged.
    """
    given, path = str(path), Path(path)
    if path.name == "best" and path.is_file():
        name = read_file(path, most=100).decode(errors="replace").strip()
        if not _STEP.fullmatch(name):
            raise UserError(f"{path} is damaged: it names no checkpoint; give one, e.g. {path.parent}/step-00001000")
        path = path.with_name(name)
    if any((path / name).is_file() for name in ("policy.json", "state.json")):
        load_state(path)
        return path
    found = latest_intact(path)
    if found is not None:
        for line in found[2]:
            say(line)
        return found[0]
    if not path.exists():
        try:
            snapshot = policy_snapshot(given)
        except UserError as error:
            raise UserError(
                f"no run or checkpoint at {path}, and no policy of that name on the hub ({error})"
            ) from None
        if snapshot is not None:
            return resolve(snapshot, say)
        raise UserError(f"no run or checkpoint at {path}; train one with `dvla train --from-cache CACHE --out {path}`")
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is not a run, a checkpoint or an exported policy; give one of these folders")
    raise UserError(
        f"{path} holds no checkpoint yet; wait for its first one, or give a run of `dvla train` or `dvla finetune`"
    )
