"""Section latency: the time of an action at two views: DiT alone, the entire policy, through the server."""

from __future__ import annotations

import time
from typing import Any

import torch

from dvla.drifting.config import LossConfig
from dvla.drifting.heads import generate
from dvla.stages.policy.observation import Observation
from dvla.stages.serving.config import LatencyConfig
from dvla.stages.serving.latency import _observations, _policy, measure

from .checkpoints import checkpoint
from .items import Failed, Number, Place, item
from .policies import batch_of, bfloat16, network, noise, size

TEXTS = (
    *("go", "go", "pick it up", "open the drawer", "put the red cube into the bowl"),
    *("put the red cube into the blue bowl on the left", "go"),
)


def _config(place: Place, **more: Any) -> LatencyConfig:
    repeats = {"repeats": 3, "warm_up": 1, "camera": (96, 128)} if place.toy else {"repeats": 60, "warm_up": 10}
    return LatencyConfig(device=str(place.device), model_size=size(place), views=2, **{**repeats, **more})


def _entire(place: Place, **more: Any) -> LatencyConfig:
    return _config(place, vlm_path=str(checkpoint(place)), vlm="qwen3vl", **more)


def _batches(place: Place) -> tuple[int, ...]:
    return tuple(place.size((1, 8), (1,)))


def _rows(config: LatencyConfig) -> str:
    """p50/p99 ms of every part."""
    report = measure(config)
    rows = [f"{row['part']}, batch {row['batch']}: {row['p50']:.2f}/{row['p99']:.2f}" for row in report["rows"]]
    kind = Failed if "server_failed" in report else Number
    return kind(f"p50/p99 ms: {'; '.join(rows)}{'; server: ' * (kind is Failed)}{report.get('server_failed', '')}")


@item("DiT alone (aim 5 ms)")
def dit(place: Place) -> str:
    return _rows(_config(place, batches=_batches(place)))


@item("DiT alone, compiled")
def compiled_dit(place: Place) -> str:
    return _rows(_config(place, compile=True))


@item("entire policy (aim 25 ms)")
def policy(place: Place) -> str:
    place.reset_peak()
    found = _rows(_entire(place, batches=_batches(place), server=False))
    return type(found)(f"{found}; {place.peak()}")


@item("entire policy, compiled, and through the server")
def served(place: Place) -> str:
    return _rows(_entire(place, compile=True, server=True))


@item("new instructions: what each length costs once")
def instructions(place: Place) -> str:
    config = _entire(place)
    acting = _policy(config, place.device)
    seen, taken = _observations(acting, config, 1)[0], []
    for text in TEXTS:
        began = time.perf_counter()
        acting.act_batch([Observation(seen.images, text, seen.state)])
        taken.append((time.perf_counter() - began) * 1e3)
    return Number("ms: " + ", ".join(f"{ms:.1f}" for ms in taken))


@item("DiT in float32, in bfloat16, and as one CUDA graph")
def graph(place: Place) -> str:
    net, batch = network(place).eval(), batch_of(place, 1, words=16)
    drawn, alpha, found = noise(1, 1, place.device), torch.ones(1, device=place.device), {}

    def call() -> torch.Tensor:
        return generate(net, net.encode(batch), drawn, alpha, LossConfig())

    with torch.inference_mode():
        found["float32"] = place.timed(call, 30)
        with bfloat16(place):
            found["bfloat16"] = place.timed(call, 30)
        if place.cuda:
            found["bfloat16, graph"] = place.timed(_graph(call).replay, 30)
    return Number("ms: " + ", ".join(f"{name} {seconds * 1e3:.2f}" for name, seconds in found.items()))


def _graph(call: Any) -> torch.cuda.CUDAGraph:
    """The call as a CUDA graph in bfloat16."""
    mixed = {"device_type": "cuda", "dtype": torch.bfloat16, "cache_enabled": False}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.autocast(**mixed):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.autocast(**mixed):
        call()
    return graph
