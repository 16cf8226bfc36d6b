"""Bytes of a sample beside the error of each setting of a cache's features, measured with any Qwen3-VL checkpoint.

    python benchmarks/feature_settings.py                                    # a toy with random weights, minutes
    python benchmarks/feature_settings.py --vlm-path Qwen3-VL-2B-Instruct --device cuda --images 2000

Images hold a red and a blue disc at random; the instruction names one of them. Columns:

    KiB       of one view, with the widths of Qwen3-VL-2B: fp16, and int8
    int8, fp8 RMS of the storage error over the RMS of the features
    pooling   RMS of what averaging discards over the RMS of all tokens
    text      RMS of the features' change with the instruction over their RMS: 0 means that they do not depend on it
    red disc  held-out error of a linear probe of the red disc's place, in image widths: is the place still there?
    named     the same of the disc that the instruction names: have instruction and image met?

A probe is ridge regression of all tokens of a sample, with the instruction's own embeddings beside them, on so many
images that it generalizes. "chance" always says the middle. A random model shows bytes, storage and pooling of *its*
features, and that a place survives; whether instruction and image meet is learned, so only a trained one shows that.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import machine

from dvla.cache.store.codec import channel_scale, relative_error
from dvla.cache.store.feature_format import feature_format
from dvla.cache.vlm.load import load_encoder
from dvla.cache.vlm.pooling import pooling_error
from dvla.cache.vlm.spec import EncoderSpec
from dvla.cache.vlm.tiny_qwen3vl import TinySpec, make_tiny_qwen3vl

RESOLUTION, WIDTH = 448, 2048  # of Qwen3-VL-2B
TEXTS = "push the red cube to the goal", "push the blue cube to the goal"
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the ridge, over the mean of the kernel's diagonal
TOY = TinySpec(vision_depth=4, vision_width=64, vision_heads=2, out_width=128, text_layers=7, init_std=0.1)


def settings(total: int) -> dict[str, dict[str, Any]]:
    """The rows; `total` language layers."""
    low, middle, high = (max(1, round(total * n / 7)) for n in (2, 4, 6))
    language = {"depth": "language", "layers": (middle,)}
    return {
        "vision": {},
        "vision, 7 × 7": {"tokens": 49},
        "vision, 4 × 4": {"tokens": 16},
        "vision, DeepStack": {"deepstack": True},
        f"layer {middle}": language,
        f"layer {middle}, 7 × 7": language | {"tokens": 49},
        f"layer {middle}, 4 × 4": language | {"tokens": 16},
        f"layer {middle}, image tokens": language | {"keep": "image"},
        f"layer {middle}, 64 queries": language | {"queries": 64},
        f"layer {middle}, 16 queries": language | {"queries": 16},
        f"layers {low}, {middle}, {high}": language | {"layers": (low, middle, high)},
        f"layers {low}, {middle}, {high}, 4 × 4": language | {"layers": (low, middle, high), "tokens": 16},
    }


def scenes(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n,H,W,3] of two discs, and their places [n,2 (red, blue),2] in image widths."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:RESOLUTION, 0:RESOLUTION] / RESOLUTION
    places = rng.uniform(0.15, 0.85, (count, 2, 2))
    images = np.full((count, RESOLUTION, RESOLUTION, 3), 200, np.uint8)
    for image, discs in zip(images, places):
        for (u, v), color in zip(discs, ((220, 40, 40), (40, 40, 220))):
            image[(x - u) ** 2 + (y - v) ** 2 < 0.08**2] = color
    return images, places


def encode(encoder: Any, images: np.ndarray, named: np.ndarray) -> torch.Tensor:
    """float32 [n,K,D] on the CPU; `named` [n]: which instruction."""
    out = torch.empty(len(images), encoder.tokens, encoder.width)
    for text in np.unique(named):
        rows = np.flatnonzero(named == text)
        for part in np.array_split(rows, max(1, len(rows) // 8)):
            out[part] = encoder.encode_images(images[part], TEXTS[text]).float().cpu()
    return out


def probe(features: torch.Tensor, wanted: np.ndarray, seed: int = 0) -> float:
    """Held-out RMS distance of a linear probe of places [n,2] in features [n,F]; a fifth chooses the penalty."""
    n = len(features)
    train, choose, test = np.split(np.random.default_rng(seed).permutation(n), [n * 3 // 5, n * 4 // 5])
    mean = features[train].mean(0)
    centered = (features - mean).double()
    kernel, middle = (centered @ centered.T).numpy(), wanted[train].mean(0)
    inner = kernel[np.ix_(train, train)]

    def error(rows: np.ndarray, penalty: float) -> float:
        weights = np.linalg.solve(
            inner + penalty * inner.trace() / len(train) * np.eye(len(train)), wanted[train] - middle
        )
        found = kernel[np.ix_(rows, train)] @ weights + middle
        return float(np.sqrt(np.square(found - wanted[rows]).sum(-1).mean()))

    return error(test, min(PENALTIES, key=lambda penalty: error(choose, penalty)))


def chance(wanted: np.ndarray) -> float:
    return float(np.sqrt(np.square(wanted - wanted.mean(0)).sum(-1).mean()))


def row(name: str, encoder: Any, images: np.ndarray, places: np.ndarray) -> str:
    named = np.arange(len(images)) % 2
    features = encode(encoder, images, named)
    scale = channel_scale(features)
    stored = [relative_error(features, feature_format(kind), scale)[0] for kind in ("int8", "fp8")]
    few, common = slice(0, 16), min(encoder.visible(text) for text in TEXTS)
    other = encode(encoder, images[few], 1 - named[few])
    change, usual = (x[:, :common].square().mean().sqrt().item() for x in (other - features[few], features[few]))
    pooled = ""
    if encoder.pools:
        full = encoder.unpooled()
        pooled = f"{pooling_error(full.of_image(encode(full, images[few], named[few])), encoder.image_tokens):.2f}"
    text, _ = encoder.encode_text(TEXTS)  # [2,Lt,D]
    beside = text.float().cpu().flatten(1)[named] / text.float().std().cpu()  # [n,·]
    seen = torch.cat([(features / torch.from_numpy(scale)).flatten(1), beside], 1)
    errors = [probe(seen, places[:, 0]), probe(seen, places[np.arange(len(images)), named])]
    width = encoder.width * WIDTH // encoder.text_width
    half, eight = (encoder.tokens * n / 1024 for n in (2 * width, width + 4))
    return (
        f"| {name} | {encoder.tokens} × {width} | {half:.0f} | {eight:.0f} | {stored[0]:.4f} | {stored[1]:.3f} "
        f"| {pooled} | {change / usual:.3f} | {errors[0]:.3f} | {errors[1]:.3f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vlm-path", help="Qwen3-VL checkpoint; default: a toy with random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=500)
    args = parser.parse_args()
    images, places = scenes(args.images)
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        path = args.vlm_path or str(make_tiny_qwen3vl(Path(temporary) / "vlm", TOY))
        spec = EncoderSpec(path, resolution=RESOLUTION)
        language = load_encoder(dataclasses.replace(spec, depth="language"), args.device)
        total = language.weights["config"]["text"]["num_hidden_layers"]
        print(
            f"{machine(args.device)}; {args.vlm_path or 'a random toy'}: {total} language layers, {args.images} images"
        )
        head = "features | tokens × width | KiB, fp16 | int8 | error of int8 | fp8 | pooling | text | red disc | named"
        print(f"\n| {head} |")
        print("|---" * 10 + "|")
        for name, changes in settings(total).items():
            encoder = load_encoder(dataclasses.replace(spec, **changes), args.device)
            print(row(name, encoder, images, places), flush=True)
    named = places[np.arange(len(images)), np.arange(len(images)) % 2]
    print(f"| chance | | | | | | | | {chance(places[:, 0]):.3f} | {chance(named):.3f} |")


if __name__ == "__main__":
    main()
