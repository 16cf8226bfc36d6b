"""Section finetune: stage three's ways to train at full size, on one recording: live, LoRA, split, frozen, cached."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from typing import Any
from unittest import mock

import finetune as bench
import torch

from .checkpoints import checkpoint, resolution
from .items import Number, Place, item
from .policies import size


def _arguments(place: Place) -> Any:
    """As `benchmarks/finetune.py` takes them; the recording and the checkpoint are there already."""
    full = {"batch": 32, "boundary": 4, "frames": 100, "steps": 20, "live_steps": 6, "warm_up": 2}
    toy = {"batch": 2, "boundary": 2, "frames": 100, "steps": 2, "live_steps": 1, "warm_up": 1}
    rest = {"blocks": 0, "r": 16, "targets": "attention", "size": size(place), "precision": "bf16", "draws": 4}
    rest |= {"pixels": 480, "episodes": 8, "threads": 8, "cpu_threads": 0, "repeats": 1, "vlm": "there"}
    return SimpleNamespace(device=str(place.device), **place.size(full, toy), **rest)


@item("caches and sessions")
def caches(place: Place) -> str:
    work, folder = place.work / "finetune", checkpoint(place)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    towers = {"there": (resolution(place), bench.TOWERS["scaled"][1])}
    with (
        mock.patch.object(bench, "TOWERS", towers),
        mock.patch.object(bench, "record", lambda root, *_: shutil.copytree(place.recording, root)),
        mock.patch.object(bench, "make_tiny_qwen3vl", lambda *_: folder),
    ):
        place.made["ways"] = bench.Bench(work, _arguments(place))
    return Number(f"{', '.join(bench.WAYS)} are ready")


@item("features and LoRA's gradient: split against live")
def same(place: Place) -> str:
    with mock.patch.dict(bench.TOLERANCE, {torch.float32: 2e-2} if place.toy else {}):  # float16 between few channels
        bench.require_same(place.of("ways"))
    return "the same up to rounding"


@item("operations")
def operations(place: Place) -> str:
    ways = place.of("ways")
    bench.count_flops(ways)
    batch = ways.args.batch
    return Number("GFLOP a sample: " + ", ".join(f"{n} {w.flops / batch / 1e9:.0f}" for n, w in ways.ways.items()))


@item("step, {}", each=lambda place: bench.WAYS)
def steps(place: Place, name: str) -> str:
    ways = place.of("ways")
    place.reset_peak()
    rate = bench.measure(ways, name)
    place.made.setdefault("rates", {})[name] = rate
    flops = ways.ways[name].flops * rate / 1e12
    return Number(f"{rate:.2f} steps/s, {rate * ways.args.batch:.0f} samples/s, {flops:.3g} TFLOP/s, {place.peak()}")


@item("ratios of the ways")
def ratios(place: Place) -> str:
    rates: dict[str, float] = place.of("rates")
    frozen, lora = (rates[name] if name in rates else float("nan") for name in (bench.FROZEN, bench.LORA))
    shown = ", ".join(f"{name} {rate / lora:.2f}" for name, rate in rates.items())
    last = rates.get(bench.SPLIT, float("nan")) / rates.get(bench.LAST, float("nan"))
    return Number(
        f"× LoRA-live: {shown}; LoRA-split × LoRA-live with the same blocks {last:.2f} (aim 4); cached × frozen-live "
        f"{rates.get(bench.CACHED, float('nan')) / frozen:.1f} (aim 20)"
    )
