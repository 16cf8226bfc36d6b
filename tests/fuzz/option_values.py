"""Hostile values of options and settings, and hostile recipes; the machine's faults are in machine.py."""

from __future__ import annotations

import dataclasses
import random
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

NUMBERS = [
    "0",
    "-1",
    "-0",
    "1",
    "2",
    "3",
    "7",
    "1_000",
    "1e3",
    "1e-400",
    "1e400",
    "1.5",
    "0.5",
    "-0.5",
    "100000",
    "1000000000",
    "100000000000000000000000000",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551616",
    "inf",
    "-inf",
    "nan",
    "NaN",
    ".inf",
    ".nan",
    "+5",
    "0x10",
    "0b11",
    "0x" + "f" * 5000,
    "٣",
    "1,5",
    "5%",
]
TEXTS = [
    "",
    " ",
    "x",
    "a/b",
    "../..",
    "/",
    ".",
    "a=b=c",
    "=x",
    "x=",
    "=",
    "-",
    "--",
    "a\nb",
    "a\tb",
    "\x1b[2J\x1b]0;x\x07",
    "caf\udce9",
    "\udcff\udcfe",
    "é" * 120,
    "n" * 300,
    "x" * 100_000,
    "null",
    "true",
    "no",
    "2020-01-01",
    "2020-13-99",
    "[1, 2]",
    "[]",
    "{}",
    "{a: 1}",
    "[a",
    "{a: &a [*a, *a]}",
    "!!python/object:os.system x",
    "&a [&b [*a]]",
    "{" * 3000,
    "a.b.c",
    "optimizer.lr.x",
    "..",
    "{name}",
    "%s",
    "$(touch X)",
    "`x`",
    "auto",
    "none",
    "owner/name",
    "s3://key:secret@bucket/x?token=1",
    "http://127.0.0.1:9/x",
    "pipe:cat {name}",
    "file:///etc/passwd",
    "\u202eabc",
    "NAME=1",
    "a=nan",
    "a=inf",
    "0-",
    "-5",
    "9-1",
    "0-99999999999999999999",
    "[[0, 1e9]]",
    "images/front=",
    "action.0=drop",
    "1x1",
    "0x0",
    "999999999x999999999",
    "1,0",
    "nan,inf",
    "cuda",
    "cuda:99",
    "cuda:99999999999999999999",
    "cpu:1",
    "meta",
    "tiny",
    "-inf,1",
]
PATHS = [
    "folder",
    "missing",
    "fifo",
    "socket",
    "loop",
    "empty.json",
    "words.txt",
    "words.txt/below",
    "/dev/zero",
    "/dev/full",
    "/dev/null",
    "/proc/self/mem",
    "/root/none/x",
    "missing/deep/er",
    "data",
    "cache",
    "run",
    "file.yaml",
    "file.sh",
    "~/x",
    "dir.yaml",
    "dir.sh",
    "fifo.yaml",
    "fifo.sh",
    "zero.yaml",
    "latin\udce9.yaml",
]


def hostile(rng: random.Random, what: str, sensible: list[str] | None = None) -> str:
    """A value for an option of type `what`: mostly of its own kind, sometimes of another."""
    kinds: dict[str, list[str]] = {"int": NUMBERS, "list[int]": NUMBERS, "float": NUMBERS, "Path": PATHS + TEXTS[:24]}
    own = kinds.get(what, PATHS + TEXTS if "Path" in what else TEXTS + PATHS + NUMBERS)
    if sensible and rng.random() < 0.2:
        return rng.choice(sensible)
    value = rng.choice(own if rng.random() < 0.85 else NUMBERS + TEXTS + PATHS)
    if what not in ("int", "float") and rng.random() < 0.08:
        value = f"{rng.choice(PATHS + TEXTS[:8])}/{value}"
    return value


def _settings(cls: Any, prefix: str = "") -> list[str]:
    names = []
    for field in dataclasses.fields(cls):
        hint = typing.get_type_hints(cls)[field.name]
        if dataclasses.is_dataclass(hint):
            names += _settings(hint, f"{prefix}{field.name}.")
        names.append(prefix + field.name)
    return names


def _training() -> list[str]:
    from dvla.drifting.dit import DiTConfig
    from dvla.stages.training.config import TrainConfig

    own = [*_settings(TrainConfig), *(f"dit.{name}" for name in _settings(DiTConfig))]
    return [*own, "unfreeze.dit", "weights.alpha", "normalize.alpha"]


def _launching() -> list[str]:
    return ["processes", "port", "nodes", "walltime", "none", "command", ""]


SETTINGS: dict[str, Callable[[], list[str]]] = {"train": _training, "finetune": _training, "launch": _launching}

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")
)
RAW = [
    b"",
    b"\x00",
    b"\xff\xfe",
    b"a: 1\na: 2\n",
    b"- 1\n",
    b"5\n",
    b"{a: 1",
    BOMB.encode(),
    b"[" * 50_000,
    b"a: !!python/name:os.system\n",
    b"? [1]\n: 2\n",
    b"1: 2\n",
    b"null: 1\n",
    b"2020-01-01: x\n",
    b"a: .nan\n",
    b"steps: " + b"9" * 5000 + b"\n",
    b"a: 1\n" * 2000,
    b"\xef\xbb\xbfsteps: 3\n",
    "steps: 3\n".encode("utf-16"),
    b"%YAML 9.9\n---\na: 1\n",
    b"--- 1\n--- 2\n",
    b"<<: *x\n",
    b"\x1b[2J: 1\n",
]
ODD: list[Any] = [
    0,
    -1,
    10**26,
    2**63,
    1e300,
    float("inf"),
    float("nan"),
    True,
    None,
    "",
    " ",
    "x" * 5000,
    "caf\x85",
    "1_000",
    "1e-4",
    "nan",
    "inf",
    [],
    [[]],
    {},
    {"x": 1},
    [1, "a", None],
    "2020-01-01",
    "../..",
    "/dev/zero",
    "{0.__class__}",
    "--out x",
    "'",
    "\n",
    0.5,
    ["a"] * 1000,
    {"a": {"b": {"c": 1}}},
    -0.0,
    3.0,
    [0, 0],
    "yes",
    "\x1b[2J",
]
# Command → lines with {file}, the document that is changed.
DOCUMENTS: dict[str, list[list[str]]] = {
    "recipe": [
        ["train", "--from-cache", "cache", "--out", "new", "--recipe", "{file}", "--device", "cpu", "--steps", "1"],
        ["finetune", "tuned", "--out", "new", "--recipe", "{file}", "--device", "cpu", "--steps", "1"],
    ],
    "ablation": [["ablate", "{file}", "--print"], ["ablate", "{file}", "--out", "new"]],
    "dataset": [
        ["data", "show", "data", "--dataset-config", "{file}", "--episode", "0"],
        ["data", "check", "data", "--dataset-config", "{file}"],
        [
            "cache",
            "build",
            "data",
            "--dataset-config",
            "{file}",
            "--out",
            "new",
            "--vlm-path",
            "vlm",
            "--device",
            "cpu",
        ],
    ],
    "cluster": [
        [
            "cache",
            "plan",
            "data",
            "--cluster",
            "{file}",
            "--vlm-path",
            "vlm",
            "--device",
            "cpu",
            "--out",
            "new",
            "--pilot",
            "2",
        ]
    ],
    "slurm": [["cache", "build", "data", "--slurm", "{file}", "--out", "new", "--vlm-path", "vlm", "--device", "cpu"]],
    "launch": [
        ["launch", "{file}", "--print", "--", "train", "--from-cache", "c", "--out", "r"],
        ["launch", "{file}", "--settings"],
    ],
}


def mutated_document(rng: random.Random, work: Path) -> list[str]:
    """A command line that reads a changed document, which is written into `work`."""
    kind = rng.choice(list(DOCUMENTS))
    suffix = "sh" if kind == "launch" else "yaml"
    source, file = work / f"{kind}.{suffix}", work / f"changed.{suffix}"
    data = source.read_bytes()
    how = rng.random()
    if how < 0.2:
        data = rng.choice(RAW)
    elif how < 0.4 or kind == "launch":
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            data = (
                data[:at]
                + rng.choice([b"", bytes([rng.randrange(256)]), b"\n", b": ", b"  ", b"{{x}}"])
                + data[at + 1 :]
            )
    else:
        value = yaml.safe_load(data)
        for _ in range(rng.choice((1, 1, 2))):
            _change(rng, value)
        data = yaml.safe_dump(value, allow_unicode=True).encode()
    file.write_bytes(data)
    return [word.format(file=file.name) for word in rng.choice(DOCUMENTS[kind])]


def _change(rng: random.Random, value: Any) -> None:
    """Replace, remove, rename or add one part of a document, anywhere in it."""
    places = list(_places(value))
    owner, key = rng.choice(places)
    how = rng.random()
    if how < 0.7:
        owner[key] = rng.choice(ODD)
    elif how < 0.8:
        del owner[key]
    elif isinstance(owner, dict):
        owner[rng.choice(["extra", "", "x" * 300, 5, None, f"{key}x", "a/b", "../x"])] = (
            owner.pop(key) if how < 0.9 else rng.choice(ODD)
        )
    else:
        owner.append(rng.choice(ODD))


def _places(value: Any) -> typing.Iterator[tuple[Any, Any]]:
    for key, part in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(part, (dict, list)) and part:
            yield from _places(part)
