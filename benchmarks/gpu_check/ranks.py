"""Section ranks: two processes as one run, over NCCL where there are two GPUs, over gloo in the dry form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import torch

from .items import Number, Place, Skipped, item, passed, tests_of

STEPS = 3


@item("a cache")
def cache(place: Place) -> str:
    if place.cuda and torch.cuda.device_count() < 2:
        raise Skipped("needs two GPUs")
    tests_of(place)
    from support import synthetic_cache

    path = place.work / "ranks" / "cache"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        synthetic_cache.build(path, plan=synthetic_cache.make_plan(**synthetic_cache.SETTINGS["fp16"]))
    place.made["cache"] = path
    return Number("ready")


def _losses(place: Place, out: str, processes: int, *more: str) -> list[float]:
    """Of each step of a run."""
    run = place.work / "ranks" / out
    train = ["-m", "dvla.cli", "train", "--recipe", "tiny", "--from-cache", str(place.of("cache")), "--out", str(run)]
    train += ["--steps", str(STEPS), "--log-every", "1", "--device", place.device.type, "--eval-every", "0"]
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=29731"]
    command = [sys.executable, *(launch if processes > 1 else []), *train, *more]
    environment: dict[str, Any] = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    if done.returncode:
        raise RuntimeError(" ".join((done.stdout + done.stderr).split())[-400:])
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


@item("two processes against one, strategy {}", each=lambda place: ("ddp", "fsdp2"))
def two(place: Place, strategy: str) -> str:
    if "alone" not in place.made:
        place.made["alone"] = _losses(place, "alone", 1, "--batch-size", "8")
    wanted = place.of("alone")
    found = _losses(place, strategy, 2, "--batch-size", "4", "--strategy", strategy)
    worst = max(abs(a - b) / abs(b) for a, b in zip(found, wanted))
    return passed(len(found) == len(wanted) and worst < 1e-3, f"losses of {len(found)} steps differ by {worst:.1e}")
