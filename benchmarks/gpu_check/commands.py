"""Section commands: the commands as a user types them, at toy size: does anything break on this device."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from unittest import mock

from dvla import cli

from .checkpoints import fields
from .items import Place, item, passed

FEW = (
    *("--set", "holdout=0.2", "--set", "eval_batches=2", "--eval-every", "4", "--save-every", "4"),
    *("--log-every", "2", "--set", "panels.every=4", "--set", "panels.share=1"),
)
MIXED = ("--precision", "bf16", "--batch-size", "8")
TESTS = ("tests/cache/loader/test_loader_device.py", "tests/stages/training/test_train_options.py")


def _dvla(place: Place, words: str, *more: str) -> str:
    """In this process, as `dvla` would, with the section's folder as the current one; the end of what it prints."""
    out, folder = io.StringIO(), place.work / "commands"
    folder.mkdir(exist_ok=True)
    given = [
        "dvla",
        *words.split(),
        *more,
        *(() if "--out" in words and "vlm tiny" in words else _device(place, words)),
    ]
    with contextlib.chdir(folder), mock.patch.object(sys, "argv", given), mock.patch.dict(os.environ, COLUMNS="200"):
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                cli.main()
        except SystemExit as end:
            if end.code:
                said = " ".join(out.getvalue().split())[-400:]
                raise RuntimeError(f"exit {end.code}: {' '.join(given[:3])}: {said}") from None
    return " ".join(out.getvalue().split())[-160:]


def _device(place: Place, words: str) -> tuple[str, ...]:
    return () if words.startswith(("vlm", "export")) else ("--device", str(place.device))


def _build(place: Place, out: str, *more: str, stride: int = 8) -> str:
    given = ("--dataset-config", str(fields(place)), "--frame-stride", str(stride), *more)
    words = f"cache build {place.recording} --vlm qwen3vl --vlm-path vlm --resolution 128 --out {out}"
    return _dvla(place, words, *given)


@item("toy checkpoint and cache build")
def build(place: Place) -> str:
    _dvla(place, "vlm tiny --out vlm")
    return _build(place, "cache")


@item("int8 cache with variants, verify --live")
def int8(place: Place) -> str:
    _build(place, "int8", "--dtype", "int8", "--augment", "1", stride=25)
    return _dvla(place, "cache verify int8 --live 4")


@item("depth language, layer 1, verify --live")
def language(place: Place) -> str:
    _build(place, "language", "--depth", "language", "--layer", "1", stride=25)
    return _dvla(place, "cache verify language --live 4")


@item("train in bf16, stopped and resumed, with evaluation and panels")
def train(place: Place) -> str:
    given = (*MIXED, *FEW)
    _dvla(place, "train --recipe tiny --from-cache cache --steps 8 --out run --stop-after 4", *given)
    return _dvla(place, "train --recipe tiny --from-cache cache --steps 8 --out run", *given)


@item("train --compile from int8, with guidance and augmentation")
def train_compiled(place: Place) -> str:
    given = ("--compile", "--set", "alpha_max=3", "--image-aug", *MIXED, *FEW)
    return _dvla(place, "train --recipe tiny --from-cache int8 --steps 6 --out run-int8", *given)


@item("train --loss-type {}", each=lambda place: ("flow", "diffusion"))
def heads(place: Place, kind: str) -> str:
    words = f"train --recipe tiny --from-cache cache --steps 4 --loss-type {kind} --out run-{kind}"
    return _dvla(place, words, *MIXED, *FEW)


@item("train --dry-run")
def dry_run(place: Place) -> str:
    return _dvla(place, "train --recipe tiny --from-cache cache --dry-run", *MIXED)


@item("finetune --lora on live images")
def lora(place: Place) -> str:
    words = f"finetune --lora run --source {place.recording} --steps 4 --batch-size 4 --lora-dropout 0.1 --out lora"
    return _dvla(place, words, *FEW)


@item("finetune of the entire tower, recomputing")
def full(place: Place) -> str:
    words = (
        f"finetune run --vlm-mode full --source {place.recording} --steps 2 --batch-size 4 --precision bf16 --out full"
    )
    return _dvla(place, words, "--set", "gradient_checkpointing=true", *FEW)


@item("split cache, and finetune from it")
def split(place: Place) -> str:
    _build(place, "split", "--boundary", "2")
    return _dvla(place, "finetune --lora run --from-cache split --steps 3 --batch-size 4 --out lora-split", *FEW)


@item("export, and latency of what was exported")
def export(place: Place) -> str:
    _dvla(place, "export lora --out policy")
    return _dvla(place, "bench latency policy --repeats 3")


@item("the product's own tests of CUDA", cuda=True)
def tests(place: Place) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *TESTS]
    command += ["-k", "cuda or gpu or device"]
    done = subprocess.run(command, cwd=place.source, capture_output=True, text=True, timeout=120)
    return passed(done.returncode == 0, " ".join(done.stdout.strip().splitlines()[-1:])[:300])
