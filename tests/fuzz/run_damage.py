"""A tiny run of each stage with all that is made from it, and seeded damage to its documents, tensors and files."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from dvla.common.documents import json_bytes
from dvla.common.files import crc32c, file_crc32c
from fixtures.make_landing import BUILDS, RUNS, observation
from fuzz.bounded import command, run_command
from fuzz.mutations import ANY, LFS, odd_value
from support.repository import ROOT

LANDING = ROOT / "tests" / "fixtures" / "landing_16"
TOPS = ("stage_two", "stage_three", "policy", "policy_lora", "eval", "vlm")  # folders that are damaged
QUEUES = ("--set", "loss.queue=task", "--set", "loss.queue_size=3")
COMMANDS = {  # name → command line, its stopping step apart
    "stage_two": (*RUNS["stage_two"][1], *QUEUES),
    "stage_three": RUNS["stage_three"][1],
}
TASK = {
    "success": 0.5,
    "ci95": [0.1, 0.9],
    "episodes": 2,
    "successes": [0, 1],
    "mean_return": 1.5,
    "ms_per_action": 2.0,
    "ms_per_chunk": 8.0,
    "expert": 1.0,
    "expert_ci95": [0.3, 1.0],
    "blind": 0.0,
    "blind_ci95": [0.0, 0.6],
}


@dataclass(frozen=True)
class Damage:
    """What was done to which file."""

    file: str
    what: str
    kind: str  # "bytes" of any file; "form": it is another document or tensors of another form; "value": another value
    forged: bool = False  # the checksums were made to fit


def make_sample(folder: Path) -> None:
    """Runs of stages two and three, stopped halfway, their policies, an evaluation, and what they were made from."""
    for name in ("data", "vlm"):
        shutil.copytree(LANDING / name, folder / name)
    os.chdir(folder)

    def dvla(*words: str) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            run_command(command, list(words))

    dvla(*BUILDS["cache_fp16"])
    dvla(*COMMANDS["stage_two"], "--stop-after", "4", "--save-every", "2")
    dvla(*COMMANDS["stage_three"], "--stop-after", "2")
    dvla("export", "stage_two", "--out", "policy")
    dvla("export", "stage_three", "--out", "policy_lora", "--format", "lerobot")
    (folder / "stage_two" / "wandb.json").write_text('{"id": "abcd1234", "project": "dvla"}\n')
    panels = folder / "stage_two" / "panels" / "step-00000004"
    panels.mkdir(parents=True)
    (panels / "findings.json").write_text('{"A2": "It learns", "D2": "It drifts"}\n')
    from PIL import Image

    Image.new("RGB", (8, 8)).save(panels / "A2.png")
    (folder / "eval").mkdir()
    settings = {"environments": ["metaworld/push-v3"], "episodes": 2, "seed": 0}
    summary = {"policy": "stage_two", "tasks": {"metaworld/push-v3": TASK}, "seconds": 3.5, "settings": settings}
    (folder / "eval" / "summary.json").write_bytes(json_bytes({**summary, "blind_is": "the same policy"}))
    for lock in folder.rglob(".lock"):
        lock.unlink()


def damage(root: Path, rng: random.Random) -> Damage:
    """Damage one file below one of `TOPS` in `root`."""
    top = rng.choice(TOPS)
    files = sorted(p for one in TOPS for p in (root / one).rglob("*") if p.is_file())
    mine = [p for p in files if p.relative_to(root).parts[0] == top]
    names = sorted({p.name for p in mine})
    path = rng.choice([p for p in mine if p.name == rng.choice(names)] or mine)
    folder = next((p for p in path.parents if (p / "state.json").is_file() and p != root), None)
    forge = folder is not None and rng.random() < 0.6
    structured = {".json": _json, ".jsonl": _lines, ".safetensors": _tensors}.get(path.suffix)
    chance = rng.random()
    if chance < 0.12:
        what, kind, forge = _replaced(path, rng), "bytes", False
    elif structured and chance < 0.85:
        before = path.read_bytes()
        try:
            what, kind = structured(path, rng)
        except (ValueError, TypeError, RuntimeError, RecursionError) as error:
            path.write_bytes(before)
            what, kind = f"nothing, {type(error).__name__}", "value"
    else:
        what, kind = rng.choice(ANY)(path, rng, files), "bytes"
    if forge and folder is not None and path.is_file():
        forge = _forge(folder)
    return Damage(path.relative_to(root).as_posix(), what, kind, forge)


def _forge(folder: Path) -> bool:
    """Make the checksums of state.json fit again."""
    file = folder / "state.json"
    try:
        state = json.loads(file.read_text())
        state.pop("crc32c", None)
        for name in state["files"]:
            if (folder / name).is_file():
                state["files"][name] = list(file_crc32c(folder / name))
        text = json_bytes(state)
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError):
        return False
    file.write_bytes(json_bytes({**state, "crc32c": crc32c(text)}))
    return True


# --- files ------------------------------------------------------------------------------------------------------------


def _replaced(path: Path, rng: random.Random) -> str:
    kinds: dict[str, Callable[[], object]] = {
        "a folder": path.mkdir,
        "a pipe": lambda: os.mkfifo(path),
        "a socket": lambda: _socket(path),
        "a link to itself": lambda: path.symlink_to(path.name),
        "a link to nothing": lambda: path.symlink_to("nowhere"),
        "a link to /dev/zero": lambda: path.symlink_to("/dev/zero"),
        "nothing": path.touch,
        "a hole of 3 GiB": lambda: (path.touch(), os.truncate(path, 3 << 30)),
        "a Git LFS pointer": lambda: path.write_bytes(LFS),
    }
    what = rng.choice(sorted(kinds))
    path.unlink()
    kinds[what]()
    return f"replaced by {what}"


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


# --- JSON -------------------------------------------------------------------------------------------------------------


def _json(path: Path, rng: random.Random) -> tuple[str, str]:
    text, what, kind = _changed(path.read_text(), rng)
    path.write_text(text)
    return what, kind


def _lines(path: Path, rng: random.Random) -> tuple[str, str]:
    lines = path.read_text().splitlines()
    at = rng.randrange(len(lines))
    lines[at], what, kind = _changed(lines[at], rng)
    path.write_text("\n".join(lines) + "\n")
    return f"line {at}: {what}", kind


def _changed(text: str, rng: random.Random) -> tuple[str, str, str]:
    document = json.loads(text)
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            if not (isinstance(value[key], list) and len(value[key]) > 64):  # one place of a long list
                walk(value[key])
            else:
                places.append((value[key], rng.randrange(len(value[key]))))

    walk(document)
    if not places:
        return odd_value(rng, document), "replaced as a whole", "form"
    parent, key = rng.choice(places)
    old = parent[key]
    how = rng.choice(("odd", "odd", "odd", "value", "value", "remove", "rename", "more", "twice", "huge"))
    if how == "remove" or how == "rename" and not isinstance(parent, dict):
        del parent[key]
        return json.dumps(document), f"{key!r} removed", "form" if isinstance(parent, dict) else "value"
    if how == "rename":
        parent[f"{key}_"] = parent.pop(key)
        return json.dumps(document), f"{key!r} renamed", "form"
    if how == "more":
        inner = old if isinstance(old, dict) else parent if isinstance(parent, dict) else document
        (inner if isinstance(inner, dict) else {})["more"] = 1
        return json.dumps(document), f"'more' in {key!r}", "form"
    if how == "value":
        parent[key] = _value(old, rng)
        return json.dumps(document), f"{key!r}: {str(old)[:40]} is {str(parent[key])[:40]}", "value"
    numeric = isinstance(old, (int, float)) and not isinstance(old, bool)
    odd = rng.choice(("1000000000000", "1e30", "-1000000000", "NaN", "1000000")) if how == "huge" and numeric else ""
    odd = odd or odd_value(rng, old)
    parent[key] = "<<<here>>>"
    new = odd if how != "twice" or not isinstance(parent, dict) else f"{json.dumps(old)}, {json.dumps(key)}: {odd}"
    named = f"{key!r}: {str(old)[:40]} is {odd if len(odd) < 60 else odd[:40]}{' as well' * (new != odd)}"
    return json.dumps(document).replace('"<<<here>>>"', new), named, _kind(old, odd)


def _kind(old: Any, odd: str) -> str:
    """Whether JSON text is a value like the old one."""
    try:
        new = json.loads(odd)
    except (ValueError, RecursionError):
        return "form"
    return "value" if type(new) is type(old) and not (isinstance(new, float) and abs(new) > 1e20) else "form"


def _value(old: Any, rng: random.Random) -> Any:
    """Another value of the same type."""
    if isinstance(old, bool):
        return not old
    if isinstance(old, int):
        return rng.choice((old + 1, old - 1, old * 2, old // 2))
    if isinstance(old, float):
        return rng.choice((old * 1.5, -old, old + 1.0, 0.0))
    if isinstance(old, str):
        return rng.choice((f"{old}x", "../" + old, old[:-1], re.sub(r"\d", "1", old)))
    return old[::-1] if isinstance(old, list) else dict(reversed(old.items())) if isinstance(old, dict) else 0


# --- tensors ----------------------------------------------------------------------------------------------------------


def _tensors(path: Path, rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.35:
        return _header(path, rng)
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    old, how = tensors[name], rng.choice(TENSORS)
    value = {
        "not finite": lambda: torch.full_like(old, float(rng.choice(("nan", "inf", "-inf")))),
        "one NaN": lambda: old.flatten().index_fill(0, torch.tensor([rng.randrange(max(old.numel(), 1))]), np.nan),
        "another type": lambda: old.to(rng.choice(DTYPES)),
        "one axis more": lambda: old[None],
        "turned": lambda: old.transpose(0, -1) if old.ndim else old[None],
        "flat": lambda: old.flatten(),
        "short": lambda: old[:-1] if old.ndim else old.new_zeros(0),
        "twice as long": lambda: torch.cat([old, old]) if old.ndim else old[None],
        "negative": lambda: -old.abs() - 1,
        "other values": lambda: old + 1,
        "huge values": lambda: old * 0 + (1e30 if old.is_floating_point() else 2**40),
    }.get(how)
    if how == "one NaN" and value is not None and old.is_floating_point() and old.numel():
        tensors[name] = value().reshape(old.shape)
    elif value is not None:
        tensors[name] = value()
    elif how == "removed":
        del tensors[name]
    elif how == "renamed":
        tensors[f"{name}_"] = tensors.pop(name)
    elif how == "exchanged":
        other = rng.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other], old.clone()
    elif how == "more":
        tensors["more"] = old.clone()
    else:
        tensors = {}
    save_file({n: t.contiguous() for n, t in tensors.items()}, path)
    turned = how == "turned" and tensors[name].shape == old.shape  # a square matrix
    values = turned or how in ("other values", "huge values", "exchanged", "negative")
    return f"{name} {how}", "value" if values else "form"


DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64, torch.bool, torch.uint8)
TENSORS = (
    *("not finite", "one NaN", "another type", "one axis more", "turned", "flat", "short", "twice as long"),
    *("negative", "other values", "huge values", "removed", "renamed", "exchanged", "more", "none"),
)


def _header(path: Path, rng: random.Random) -> tuple[str, str]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text, what, _ = _changed(data[8 : 8 + length].decode(), rng)
    header = text.encode()
    if rng.random() < 0.2:
        length = rng.choice((0, 2**63, 2**40, len(data), 10**8))
        return (path.write_bytes(length.to_bytes(8, "little") + data[8:]), f"header of {length} bytes")[1], "form"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    return f"header: {what}", "form"


def seen() -> tuple[dict[str, np.ndarray], str, np.ndarray]:
    """What a policy is asked with."""
    return observation()
