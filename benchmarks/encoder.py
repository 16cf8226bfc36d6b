"""Images/s of dvla's encoder against the plain transformers call, on the real vision tower with random weights.

    python benchmarks/encoder.py                                    # CPU, float32: one image and two, all 24 blocks
    python benchmarks/encoder.py --blocks 2 --batch 8               # a quick look
    python benchmarks/encoder.py --device cuda --dtype bfloat16 --batch 1 8 32 64 --repeats 10
    python benchmarks/encoder.py --vlm paligemma2                   # SigLIP so400m/14 and its projector

Plain: transformers' image processor (its torch version, on the device; then its PIL version) and the vision tower as
`from_pretrained` returns it, with `sdpa` attention by default; for Qwen3-VL that includes DeepStack's mergers, which
dvla leaves out. dvla: the two halves of `encode_images`. Both receive the same uint8 images in memory and leave
features on the device; both run in one process, in turn. "total" is the sum of both parts. Features must agree to
rounding.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from measuring import QWEN3VL_2B, machine, ratios, spread, tower, turns, wait_for
from torch import nn

from dvla.cache.vlm.encoder import VisionLanguageEncoder
from dvla.cache.vlm.load import load_encoder
from dvla.cache.vlm.preprocess import preprocess
from dvla.cache.vlm.spec import EncoderSpec
from dvla.cache.vlm.tiny_paligemma2 import TinyPaliGemmaSpec, make_tiny_paligemma2
from dvla.cache.vlm.tiny_qwen3vl import make_tiny_qwen3vl

RESOLUTION = 448
SHORT = 5  # preprocessing takes milliseconds: the median of so many calls counts
# Largest allowed difference over the RMS of the features. bfloat16 has 8 bits, and both sides round after every layer.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
PROCESSORS = {"qwen3vl": "Qwen2VLImageProcessor", "paligemma2": "SiglipImageProcessor"}
TORCH, PIL, OWN = "transformers", "transformers, PIL processor", "dvla"


def checkpoint(folder: Path, vlm: str, blocks: int | None) -> Path:
    """The vision part of the real model, with few words and one language layer, which neither side runs."""
    if vlm == "qwen3vl":  # Qwen/Qwen3-VL-2B-Instruct; DeepStack from blocks 5, 11 and 17
        return make_tiny_qwen3vl(folder, tower(**{**QWEN3VL_2B, "depth": blocks or 24}, vision_mlp=4))
    return make_tiny_paligemma2(
        folder,
        TinyPaliGemmaSpec(  # google/paligemma2-3b-mix-448
            vision_depth=blocks or 27,
            vision_width=1152,
            vision_heads=16,
            vision_mlp=4304 / 1152,
            image_size=448,
            out_width=2304,
            text_layers=1,
            vocabulary=512,
            init_std=0.02,
        ),
    )


class Plain:
    """The same with transformers alone."""

    def __init__(self, folder: Path, vlm: str, device: torch.device, dtype: torch.dtype, attention: str) -> None:
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention
        )
        self.vlm, self.device, self.dtype = vlm, device, dtype
        self.tower = (model.model.visual if vlm == "qwen3vl" else model.model.vision_tower).to(device).eval()
        self.projector = None if vlm == "qwen3vl" else model.model.multi_modal_projector.to(device).eval()
        size = (
            {"height": RESOLUTION, "width": RESOLUTION}
            if vlm == "paligemma2"
            else {"shortest_edge": (RESOLUTION - 1) ** 2, "longest_edge": (RESOLUTION + 1) ** 2}
        )  # its arithmetic is not exact to a pixel
        name = PROCESSORS[vlm]  # version 5 calls these X and XPil, version 4 XFast and X
        self.torch_processor = getattr(transformers, f"{name}Fast", getattr(transformers, name)).from_pretrained(
            folder, size=size
        )
        self.pil_processor = getattr(transformers, f"{name}Pil", getattr(transformers, name)).from_pretrained(
            folder, size=size
        )

    def by_torch(self, images: np.ndarray) -> dict[str, torch.Tensor]:
        return self._inputs(self.torch_processor(images=list(images), return_tensors="pt", device=self.device))

    def by_pil(self, images: np.ndarray) -> dict[str, torch.Tensor]:
        return self._inputs(self.pil_processor(images=list(images), return_tensors="pt"))

    def _inputs(self, batch: Any) -> dict[str, torch.Tensor]:
        return {k: v.to(self.device, self.dtype if v.is_floating_point() else None) for k, v in batch.items()}

    def features(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """[N,K,D] from a processor's output."""
        if self.vlm == "paligemma2":
            return self.projector(self.tower(inputs["pixel_values"]).last_hidden_state)
        grid = inputs["image_grid_thw"]
        out = self.tower(inputs["pixel_values"], grid)
        merged = out[0] if isinstance(out, tuple) else out.pooler_output  # a pair in version 4, an object in 5
        return merged.reshape(len(grid), -1, merged.shape[-1])


def timed(device: torch.device, call: Callable[[], Any], times: int = 1) -> tuple[float, Any]:
    """(median seconds of `times` calls, the last result)."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        result = call()
        wait_for(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken), result


def difference(found: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
    """(largest, RMS) difference over the RMS of `wanted`."""
    error, scale = (found - wanted).float(), wanted.float().square().mean().sqrt()
    return (error.abs().max() / scale).item(), (error.square().mean().sqrt() / scale).item()


def warm(plain: Plain, encoder: VisionLanguageEncoder, image: np.ndarray) -> None:
    """Load libraries, and check that the two timed halves are `encode_images`; `image` uint8 [1,H,W,3]."""
    with torch.inference_mode():
        plain.by_torch(image), plain.by_pil(image)
        halves = encoder(preprocess(image, encoder.image, encoder.device))
        assert torch.equal(encoder.encode_images(image), halves)


def measure(
    plain: Plain, encoder: VisionLanguageEncoder, images: np.ndarray, repeats: int
) -> dict[str, dict[str, list[float]]]:
    """{part: {way: seconds of each repeat}}. `AssertionError` if the features differ by more than rounding."""
    device, dtype = encoder.device, encoder.dtype
    seconds: dict[str, dict[str, list[float]]] = {part: {} for part in ("total", "preprocessing", "tower")}

    def note(way: str, prepare: float, tower: float) -> None:
        for part, value in (("total", prepare + tower), ("preprocessing", prepare), ("tower", tower)):
            seconds[part].setdefault(way, []).append(value)

    def by_transformers() -> torch.Tensor:
        pil, _ = timed(device, lambda: plain.by_pil(images), SHORT)
        prepare, inputs = timed(device, lambda: plain.by_torch(images), SHORT)
        tower, features = timed(device, lambda: plain.features(inputs))
        note(TORCH, prepare, tower)
        note(PIL, pil, tower)  # the same tower
        return features

    def by_dvla() -> torch.Tensor:
        prepare, patches = timed(device, lambda: preprocess(images, encoder.image, device), SHORT)
        tower, features = timed(device, lambda: encoder(patches))
        note(OWN, prepare, tower)
        return features

    with torch.inference_mode():
        if device.type == "cuda":  # kernels are chosen and memory is reserved once per shape
            by_transformers(), by_dvla(), by_dvla(), by_transformers()
            seconds = {part: {} for part in seconds}
        sides, found = {TORCH: by_transformers, OWN: by_dvla}, {}
        for _, side in turns(sides, repeats):
            found[side] = sides[side]()
        wanted, features = found[TORCH], found[OWN]
        largest, rms = difference(features, wanted)
    assert features.shape == wanted.shape == (len(images), encoder.tokens, encoder.width)
    assert largest <= TOLERANCE[dtype], f"features differ by {largest:.2g} of their RMS"
    print(f"  batch {len(images)}: features differ by {rms:.1e} of their RMS, at most {largest:.1e}", flush=True)
    return seconds


def show(batch: int, seconds: dict[str, dict[str, list[float]]]) -> None:
    for part, ways in seconds.items():
        for way in (TORCH, PIL, OWN) if part != "tower" else (TORCH, OWN):
            times = "1" if way == TORCH else spread(ratios(ways[TORCH], ways[way]), ".2f")
            print(f"| {batch} | {part} | {way} | {batch / statistics.median(ways[way]):.3g} | {times} |")


def count(modules: Sequence[nn.Module | None]) -> float:
    """Parameters, in millions."""
    return sum(p.numel() for module in modules if module is not None for p in module.parameters()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vlm", choices=list(PROCESSORS), default="qwen3vl")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on a CPU, bfloat16 on CUDA")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2], help="images per call")
    parser.add_argument("--blocks", type=int, help="blocks of the tower; default: all")
    parser.add_argument(
        "--size", type=int, default=480, help=f"side of the square images, which are resized to {RESOLUTION}"
    )
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own")
    parser.add_argument("--attention", default="sdpa", help="of transformers: sdpa, flash_attention_2, eager")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    print(f"{machine(args.device)}, transformers {transformers.__version__}, {dtype}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        folder = checkpoint(Path(temporary) / "vlm", args.vlm, args.blocks)
        plain = Plain(folder, args.vlm, device, dtype, args.attention)
        encoder = load_encoder(EncoderSpec(str(folder), args.vlm, resolution=RESOLUTION), device, dtype)
    print(
        f"{encoder.blocks} blocks; {count([plain.tower, plain.projector]):.0f} M parameters in transformers' vision "
        f"part, {count([encoder.vision]):.0f} M of them read by dvla; an image is {encoder.tokens} × {encoder.width}"
    )
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (max(args.batch), args.size, args.size, 3), np.uint8)
    warm(plain, encoder, images[:1])
    results = {batch: measure(plain, encoder, images[:batch], args.repeats) for batch in args.batch}
    print("\n| batch | part | way | images/s | × transformers (median, min – max) |\n|---|---|---|---|---|")
    for batch, seconds in results.items():
        show(batch, seconds)


if __name__ == "__main__":
    main()
