"""Section encoder: images/s of both depths against transformers, and features against the CPU in float32."""

from __future__ import annotations

import statistics
import time

import depths
import encoder as bench
import numpy as np
import torch
from measuring import turns

from dvla.cache.vlm.load import load_encoder
from dvla.cache.vlm.observations import to_float16
from dvla.cache.vlm.preprocess import preprocess

from .checkpoints import LAYER, checkpoint, resolution, spec
from .items import Number, Place, item, passed, relative
from .policies import attention_of, kernels_of


def _batches(place: Place) -> tuple[int, ...]:
    return tuple(place.size((1, 8, 32, 64), (1, 2)))


def _images(count: int, height: int = 480, width: int = 480) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


@item("load")
def load(place: Place) -> str:
    folder = checkpoint(place)
    began = time.perf_counter()
    ours = place.made["encoder"] = load_encoder(spec(place), place.device, torch.bfloat16)
    took = time.perf_counter() - began
    bench.RESOLUTION, bench.SHORT = resolution(place), place.size(bench.SHORT, 1)
    bench.transformers.logging.set_verbosity_error()
    place.made["transformers"] = bench.Plain(folder, "qwen3vl", place.device, torch.bfloat16, "sdpa")
    return Number(f"{took:.1f} s, {bench.count([ours.vision]):.0f} M parameters in {ours.dtype}")


@item("depth vision against transformers, batch {}", each=_batches)
def vision(place: Place, n: int) -> str:
    place.reset_peak()
    seconds = bench.measure(place.of("transformers"), place.of("encoder"), _images(n), place.size(3, 1))
    parts = []
    for part, ways in seconds.items():
        rate = {way: n / statistics.median(values) for way, values in ways.items()}
        times = rate["dvla"] / rate["transformers"]
        parts.append(f"{part} {rate['dvla']:.0f} images/s, transformers {rate['transformers']:.0f} (× {times:.2f})")
    return Number(f"{'; '.join(parts)}; {place.peak()}")


@item(f"load, depth language, layer {LAYER}")
def load_language(place: Place) -> str:
    place.made.pop("transformers", None)
    began = time.perf_counter()
    ours = place.made["language"] = load_encoder(spec(place, language=True), place.device, torch.bfloat16)
    took = time.perf_counter() - began
    place.made["transformers, language"] = depths.Plain(checkpoint(place), ours, ours.language_layers)
    return Number(f"{took:.1f} s, {bench.count([ours.vision]):.0f} M parameters; {ours.contents()}")


@item(f"depth language, layer {LAYER}, against transformers, batch {{}}", each=_batches)
def language(place: Place, n: int) -> str:
    """With the processor of each, from images of the encoder's own size, as `benchmarks/depths.py` measures."""
    ours, plain = place.of("language"), place.of("transformers, language")
    images, seconds, found = _images(n, resolution(place), resolution(place)), {}, {}
    sides = {"transformers": plain.features, "dvla": lambda x: ours.encode_images(x, depths.TEXT)}
    place.reset_peak()
    with torch.inference_mode():
        for side in sides.values():
            side(images)
        for _, name in turns(sides, place.size(3, 1)):
            taken, found[name] = bench.timed(place.device, lambda: sides[name](images))
            seconds.setdefault(name, []).append(taken)
    rms = depths.compare(ours, found["dvla"], found["transformers"])
    rate = {name: n / statistics.median(values) for name, values in seconds.items()}
    return Number(
        f"{rate['dvla']:.0f} images/s, transformers {rate['transformers']:.0f} "
        f"(× {rate['dvla'] / rate['transformers']:.2f}); features differ by {rms:.1e} of their RMS; {place.peak()}"
    )


@item("features in bfloat16 against the CPU in float32")
def exact(place: Place) -> str:
    ours, wanted_by = place.of("encoder"), load_encoder(spec(place), "cpu", torch.float32)
    few, many = _images(2), place.size(32, 2)
    with torch.inference_mode():
        found, wanted = ours.encode_images(few), wanted_by.encode_images(few)
        alone, together = ours.encode_images(few[:1]), ours.encode_images(np.repeat(few, many, 0))
    error = relative(found, wanted)
    batch = max(relative(alone, found[:1]), relative(together[:1], found[:1]))
    text = f"{error:.1e}; the same image alone, in 2 and in {2 * many}: {batch:.1e} (cache verify --live allows 4e-2)"
    return passed(error < 0.05 and batch < 0.04, text)


@item("attention in the tower", cuda=True)
def attention(place: Place) -> str:
    images = _images(8)
    with torch.inference_mode():
        found = attention_of(kernels_of(place, lambda: place.of("encoder").encode_images(images)))
    return passed("math" not in found and "cudnn" not in found, found)


@item("the way of an image, part by part")
def parts(place: Place) -> str:
    ours, n = place.of("encoder"), place.size(64, 2)
    images = torch.from_numpy(_images(n, 480, 640))
    with torch.inference_mode():
        there = images.to(place.device)
        seconds = {"copy up": place.timed(lambda: images.to(place.device), 5)}
        seconds["preprocessing"] = place.timed(lambda: preprocess(there, ours.image, place.device), 5)
        patches = preprocess(there, ours.image, place.device)
        seconds["tower"] = place.timed(lambda: ours(patches), 5)
        features = ours(patches)
        seconds["to float16 on the host"] = place.timed(lambda: to_float16(features, "x"), 5)
    shown = ", ".join(f"{name} {value * 1e3:.1f}" for name, value in seconds.items())
    return Number(f"{n} images of 480 × 640, ms: {shown}")
