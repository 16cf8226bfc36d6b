"""Section steps: the product's training step by batch and noise samples, its implicit waits, its compilation, and what
its parts would cost done otherwise.

Letters: B observations, G noise samples.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from resident import Resident
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from train import PEAK_TFLOPS

from dvla.drifting.dit import set_attention
from dvla.stages.policy.compile import compile_blocks

from .items import Number, Place, item, passed
from .policies import batch_of, loss_of, network, size, steps_of

SWEEPS = {False: ((64, 1), (64, 4), (64, 8), (256, 4), (1024, 4)), True: ((64, 4), (256, 4), (1024, 4), (512, 8))}


def work_of(place: Place, g: int) -> float:
    """FLOPs of a sample, forward and backward."""
    net, batch = network(place), batch_of(place, 2)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss_of(place, net, batch, g).total.backward()
    return counter.get_total_flops() / 2


def share_of_peak(place: Place, rate: float) -> str:
    """MFU of so many FLOP/s, in bfloat16."""
    name = torch.cuda.get_device_name(place.device) if place.cuda else "CPU"
    peak = next((peak for kind, peak in PEAK_TFLOPS.items() if kind in name), None)
    return f"{rate / 1e12:.3g} TFLOP/s" + (f", MFU {rate / peak / 1e12:.1%}" if peak else "")


@item("implicit waits in a training step, by line", cuda=True)
def waits(place: Place) -> str:
    """Where the host waits for the device, in forward and backward pass; none may be in the usual loss."""
    found = {name: _waits(place, alpha) for name, alpha in (("usual", 1.0), ("alpha_max 4", 4.0))}
    text = "; ".join(f"{name}: {', '.join(lines) or 'none'}" for name, lines in found.items())
    return passed(not found["usual"], text)


def _waits(place: Place, alpha: float) -> list[str]:
    """file:line × times, in two steps of which the first is not watched."""
    from dvla.stages.training.config import TrainConfig
    from dvla.stages.training.step import batch_loss, noise_generator

    net, batch = network(place), batch_of(place, 32)
    config = TrainConfig("", "", precision="bf16", alpha_max=alpha)
    batch_loss(net, batch, config, noise_generator(0, 0, 0, place.device)).total.backward()
    place.wait()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            batch_loss(net, batch, config, noise_generator(0, 1, 0, place.device)).total.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lines = [f"{Path(w.filename).name}:{w.lineno}" for w in seen if "synchroniz" in str(w.message)]
    return [f"{line} × {lines.count(line)}" for line in dict.fromkeys(lines)]


@item("compiled blocks: the same numbers, graphs, speed")
def compiled(place: Place) -> str:
    import torch._dynamo as dynamo

    dynamo.reset()
    dynamo.utils.counters.clear()
    b, g = place.size((256, 4), (4, 2))
    net, batch = network(place), batch_of(place, b)

    def step() -> None:
        loss_of(place, net, batch, g).total.backward()

    plain, slow = loss_of(place, net, batch, g).total.item(), place.timed(step, 6)
    compile_blocks(net)
    began = time.perf_counter()
    step()
    place.wait()
    took = time.perf_counter() - began
    fast, again = place.timed(step, 6), loss_of(place, net, batch, g).total.item()
    graphs, breaks = (
        dynamo.utils.counters["stats"]["unique_graphs"],
        sum(dynamo.utils.counters["graph_break"].values()),
    )
    text = (
        f"forward and backward of B={b} G={g}: {slow * 1e3:.1f} to {fast * 1e3:.1f} ms (× {slow / fast:.2f}); compiled "
        f"in {took:.0f} s; {graphs} graphs, {breaks} graph breaks; loss {plain:.5f} to {again:.5f}"
    )
    return passed(breaks == 0 and abs(again - plain) < 0.02 * abs(plain), text)


def _sweep(compiled: bool) -> Callable[[Place], Any]:
    return lambda place: place.size(SWEEPS[compiled], ((4, 2),))


def _measured(place: Place, compiled: bool, b: int, g: int) -> str:
    """A step of the sweep; the network and its compilation are kept from one point to the next."""
    name = f"steps, compiled {compiled}"
    if name not in place.made:
        place.made[name] = steps_of(place, 4, g, compile=compiled)
    step: Resident = place.made[name]
    step.give(batch_of(place, b), draws=g)
    place.reset_peak()
    rate = place.rate(step, max(4, min(20, 4096 // b)))
    work = work_of(place, g) * b * rate
    return Number(f"{1e3 / rate:.1f} ms, {b * rate:.0f} samples/s, {share_of_peak(place, work)}, {place.peak()}")


@item("step, B and G = {}", each=_sweep(False))
def eager_step(place: Place, point: tuple[int, int]) -> str:
    return _measured(place, False, *point)


@item("step, compiled, B and G = {}", each=_sweep(True))
def compiled_step(place: Place, point: tuple[int, int]) -> str:
    return _measured(place, True, *point)


@item("AdamW foreach against fused; averaged weights; clipping")
def update(place: Place) -> str:
    net = network(place)
    named = list(net.parameters())
    for p in named:
        p.grad = torch.randn_like(p)
    ema, rows = [p.detach().clone() for p in named], {}
    for name, fused in (("foreach", False), ("fused", True)):
        optimizer = torch.optim.AdamW(named, lr=1e-6, fused=fused)
        rows[name] = place.timed(optimizer.step)
        del optimizer
    rows["averaging"] = place.timed(lambda: torch._foreach_lerp_(ema, [p.detach() for p in named], 1e-4))
    rows["clipping"] = place.timed(lambda: nn.utils.clip_grad_norm_(named, 1.0))
    return Number("ms: " + ", ".join(f"{name} {seconds * 1e3:.2f}" for name, seconds in rows.items()))


@item("attention kernels in the step")
def kernels(place: Place) -> str:
    b, g = place.size((256, 4), (4, 2))
    net, batch, rows = network(place), batch_of(place, b), []
    kinds: dict[str, Any] = {"as chosen": None}
    if place.cuda:
        efficient, flash = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION
        kinds |= {"cuDNN": [SDPBackend.CUDNN_ATTENTION, flash], "efficient and flash": [flash, efficient]}
        kinds |= {"flex": "flex"}
    for name, kind in kinds.items():
        set_attention(net, "flex" if kind == "flex" else "sdpa")
        chosen = sdpa_kernel(kind, set_priority=True) if isinstance(kind, list) else contextlib.nullcontext()
        try:
            with chosen:
                took = place.timed(lambda: loss_of(place, net, batch, g).total.backward(), 5)
            rows.append(f"{name} {took * 1e3:.1f}")
        except Exception as error:  # of one kernel; the others are measured
            rows.append(f"{name} {type(error).__name__}: {' '.join(str(error).split())[:80]}")
    return Number(f"B={b} G={g}, forward and backward, ms: {', '.join(rows)}")


@item("float32 step, with and without TF32")
def tf32(place: Place) -> str:
    b, g = place.size((64, 4), (4, 2))
    net, batch, rows = network(place), batch_of(place, b), []
    for allowed in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = allowed
        rows.append(place.timed(lambda: loss_of(place, net, batch, g, False).total.backward(), 4))
    torch.backends.cuda.matmul.allow_tf32 = False
    ms = [f"{seconds * 1e3:.1f} ms" for seconds in rows]
    return Number(f"B={b} G={g}, forward and backward: {ms[0]}; TF32 {ms[1]} (× {rows[0] / rows[1]:.2f})")


@item("largest batch of G=4 that fits", cuda=True)
def largest(place: Place) -> str:
    net, fits = network(place), []
    for b in (1024, 1280, 1536):
        try:
            place.reset_peak()
            net.zero_grad(set_to_none=True)
            loss_of(place, net, batch_of(place, b), 4).total.backward()
            fits.append(f"{b}: {place.peak()}")
        except torch.OutOfMemoryError:
            fits.append(f"{b}: no")
            break
    return Number(f"{size(place)}, without AdamW and averaged weights: {', '.join(fits)}")
