"""Images/s of each kind of feature at full size: measured on this machine, and computed for an H200 by the roofline.

    python benchmarks/full_size.py --out /tmp/qwen3vl
    python benchmarks/depths.py --vlm-path /tmp/qwen3vl                  # Qwen3-VL-2B's sizes, float32 on a CPU
    python benchmarks/depths.py --vlm-path /tmp/qwen3vl --only "language 16" --dtype bfloat16
    python benchmarks/depths.py                                          # the computed part alone: needs no checkpoint

Measured: from uint8 images of 448 × 448 in memory to features on the device. transformers: its processor and its own
forward, cut to the layers that are asked for (as GR00T does), with `sdpa`. dvla: `encode_images`. Both run in one
process, in turn, on the same weights, and must agree to rounding. On a CPU one thread works, and its own time counts
(images per core-second), so that others on the machine disturb little.

Computed: floating-point operations by the formulas below from the model's sizes, compared with what torch counts in a
forward when one is run. Seconds of an image are the larger of operations / (40 % of the peak) and bytes / bandwidth;
bytes are the weights once for a batch of 64, and what every matrix product, norm and attention reads and writes. An
H200 SXM has 989 TFLOP/s in dense bfloat16 and 4.8 TB/s. That is no measurement on a GPU.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from encoder import RESOLUTION, TOLERANCE, difference, timed
from full_size import GEMMA_TEXT, QWEN_TEXT, QWEN_VISION, SIGLIP
from measuring import machine, ratios, spread, turns
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dvla.cache.vlm.encoder import VisionLanguageEncoder
from dvla.cache.vlm.load import load_encoder
from dvla.cache.vlm.spec import EncoderSpec

PEAK, SHARE, BANDWIDTH, BATCH = 989e12, 0.4, 4.8e12, 64  # H200 SXM: bfloat16 FLOP/s, used of them, bytes/s; images
ATEN = torch.ops.aten
# Attention's kernel on a CPU, which torch does not count.
ON_CPU = {ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, *_, **__: 4 * math.prod(q) * k[-2]}
TEXT = "push the blue block to the left"
LANGUAGE: dict[str, Any] = {"depth": "language"}
SETTINGS: dict[str, dict[str, Any]] = {
    "vision": {},
    "vision, DeepStack": {"deepstack": True},
    "language 8": LANGUAGE | {"layers": (8,)},
    "language 16, image tokens": LANGUAGE | {"layers": (16,), "keep": "image"},
    "language 16": LANGUAGE | {"layers": (16,)},
    "language 16, 64 queries": LANGUAGE | {"layers": (16,), "queries": 64},
    "language 8, 16, 24": LANGUAGE | {"layers": (8, 16, 24)},
    "language 28": LANGUAGE | {"layers": (28,)},
}
GEMMA_SETTINGS: dict[str, dict[str, Any]] = {
    "vision": {},
    "language 13": LANGUAGE | {"layers": (13,)},
    "language 26": LANGUAGE | {"layers": (26,)},
}


@dataclass(frozen=True)
class Work:
    """Of one image: operations, bytes of weights, bytes of activations."""

    operations: float = 0.0
    weights: float = 0.0
    activations: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(vars(self).values(), vars(other).values())))

    @property
    def seconds(self) -> float:
        """The roofline."""
        moved = self.weights / BATCH + self.activations
        return max(self.operations / (SHARE * PEAK), moved / BANDWIDTH)


def linear(rows: int, width: int, out: int) -> Work:
    return Work(2.0 * rows * width * out, 2.0 * width * out, 2.0 * rows * (width + out))


def attend(rows: int, width: int, causal: bool) -> Work:
    """Scores and mix of all heads together, without the scores in memory; a causal mask needs half of them."""
    return Work(4.0 * rows * rows * width / (2 if causal else 1), 0, 2.0 * rows * 4 * width)


def elementwise(rows: int, width: int, times: int) -> Work:
    """Norms, residuals and activations: `times` values read or written for each."""
    return Work(0, 0, 2.0 * rows * width * times)


def total(parts: list[Work]) -> Work:
    return sum(parts, Work())


def block(rows: int, width: int, mlp: int) -> Work:
    """A block of a vision tower."""
    products = [linear(rows, width, 3 * width), linear(rows, width, width), linear(rows, width, mlp)]
    rest = [attend(rows, width, False), elementwise(rows, width, 10), elementwise(rows, mlp, 2)]
    return total([*products, linear(rows, mlp, width), *rest])


def layer(rows: int, text: dict[str, int], causal: bool) -> Work:
    """A layer of a language model with grouped queries and a gated MLP."""
    width, mlp = text["hidden_size"], text["intermediate_size"]
    q, kv = (text[name] * text["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    products = [linear(rows, width, q + 2 * kv), linear(rows, q, width), linear(rows, width, 2 * mlp)]
    rest = [attend(rows, q, causal), elementwise(rows, width, 10), elementwise(rows, mlp, 3)]
    return total([*products, linear(rows, mlp, width), *rest])


def qwen3vl(settings: dict[str, Any], prompt: int) -> Work:
    """`prompt`: tokens of the sequence that are not the image's."""
    patches, c, d = (RESOLUTION // 16) ** 2, QWEN_VISION["hidden_size"], QWEN_TEXT["hidden_size"]
    merger = total([linear(patches // 4, 4 * c, 4 * c), linear(patches // 4, 4 * c, d), elementwise(patches, c, 4)])
    vision = [linear(patches, 3 * 2 * 16 * 16, c), *[block(patches, c, QWEN_VISION["intermediate_size"])] * 24, merger]
    deep = [merger] * 3 if settings else []
    count = settings.get("layers", (0,))[-1]
    keep = 0 if settings.get("keep") == "image" else prompt
    rows = patches // 4 + keep + settings.get("queries", 0)
    return total([*vision, *deep, *[layer(rows, QWEN_TEXT, True)] * count])


def paligemma2(settings: dict[str, Any], prompt: int) -> Work:
    patches, c, d = (RESOLUTION // 14) ** 2, SIGLIP["hidden_size"], GEMMA_TEXT["hidden_size"]
    vision = [linear(patches, 3 * 14 * 14, c), *[block(patches, c, SIGLIP["intermediate_size"])] * 27]
    count = settings.get("layers", (0,))[-1]
    return total([*vision, linear(patches, c, d), *[layer(patches + prompt, GEMMA_TEXT, False)] * count])


class Plain:
    """transformers' own processor and forward, cut after `count` language layers; on the weights of `encoder`."""

    def __init__(self, folder: Path, encoder: Any, count: int) -> None:
        config = transformers.AutoConfig.from_pretrained(folder)
        whole = count == config.text_config.num_hidden_layers
        config.text_config.num_hidden_layers = max(1, count)
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, config=config, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        own = dict(encoder.vision.named_parameters())
        for name, p in model.model.named_parameters():
            mine = name.removeprefix("visual.").replace("language_model.", "language.")
            p.data = own[mine].data if mine in own else p.data.to(encoder.device, encoder.dtype)
        self.model = model.model.to(encoder.device)
        if not whole:
            self.model.language_model.norm = nn.Identity()
        self.processor = transformers.AutoProcessor.from_pretrained(folder)
        self.encoder, self.device, self.count = encoder, encoder.device, count

    def features(self, images: np.ndarray) -> list[torch.Tensor]:
        """Hidden states [N,K,D] from the image on; or merged tokens and DeepStack's."""
        prompt = [self.encoder.prompt.text.format(image="<|image_pad|>", instruction=TEXT)] if self.count else ["x"]
        image = self.processor.image_processor if not self.count else None
        n, kinds = len(images), {"return_tensors": "pt"}
        inputs = image(list(images), **kinds) if image else self.processor(list(images), prompt * n, **kinds)
        inputs = {
            k: v.to(self.device, self.encoder.dtype if v.is_floating_point() else None) for k, v in inputs.items()
        }
        if not self.count:
            out = self.model.visual(inputs["pixel_values"], inputs["image_grid_thw"])
            merged, inner = out if isinstance(out, tuple) else (out.pooler_output, out.deepstack_features)
            return [x.reshape(n, -1, x.shape[-1]) for x in (merged, *inner)]
        if queries := self.encoder.prompt.queries(self.encoder.spec.queries or 0):
            more = torch.tensor(queries, device=self.device).expand(n, -1)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        hidden = self.model(**inputs, use_cache=False).last_hidden_state
        return [hidden[:, -len(queries) :] if queries else hidden[:, len(self.encoder.prompt.prefix) :]]


def compare(encoder: VisionLanguageEncoder, found: torch.Tensor, wanted: list[torch.Tensor]) -> float:
    """RMS of the difference. `AssertionError` beyond rounding. Of several layers, only the last is compared."""
    reference = torch.cat(wanted, -1) if encoder.spec.deepstack else wanted[0]
    width = min(reference.shape[-1], found.shape[-1])
    count = min(found.shape[1], reference.shape[1])
    largest, rms = difference(found[:, :count, -width:], reference[:, :count, -width:])
    assert largest <= TOLERANCE[encoder.dtype], f"features differ by {largest:.2g} of their RMS"
    return rms


def measure(args: argparse.Namespace, name: str, settings: dict[str, Any]) -> str:
    """The measured columns of a row."""
    spec = EncoderSpec(str(args.vlm_path), resolution=RESOLUTION, **settings)
    encoder: Any = load_encoder(spec, args.device, getattr(torch, args.dtype))
    plain = Plain(args.vlm_path, encoder, encoder.language_layers)
    images = np.random.default_rng(0).integers(0, 256, (args.batch, RESOLUTION, RESOLUTION, 3), np.uint8)
    sides = {"transformers": plain.features, "dvla": lambda x: encoder.encode_images(x, TEXT)}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    found: dict[str, Any] = {}
    with torch.inference_mode():
        with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
            encoder.encode_images(images[:1], TEXT)
        plain.features(images[:1])
        for _, side in turns(sides, args.repeats):
            began = time.process_time()
            taken, found[side] = timed(encoder.device, lambda: sides[side](images))
            seconds[side].append(time.process_time() - began if encoder.device.type == "cpu" else taken)
    rms = compare(encoder, found["dvla"], found["transformers"])
    prompt = len(encoder.prompt.prefix) + len(encoder.prompt.suffix(TEXT)) if settings.get("layers") else 0
    counted, formula = counter.get_total_flops(), qwen3vl(settings, prompt).operations
    print(f"  {name}: {encoder.contents()}; features differ by {rms:.1e} of their RMS; torch counts {counted:.4g}")
    assert abs(counted / formula - 1) < 0.05, f"by the formula {formula:.4g}, torch counts {counted:.4g}"
    rate = {side: f"{args.batch / statistics.median(values):.3g}" for side, values in seconds.items()}
    times = spread(ratios(seconds["transformers"], seconds["dvla"]), ".2f")
    return f" {rate['transformers']} | {rate['dvla']} | {times} |"


def row(name: str, work: Work) -> str:
    """The computed columns."""
    return (
        f"| {name} | {work.operations / 1e9:.0f} | {work.weights / 1e9:.2f} | {work.activations / 1e9:.2f} "
        f"| {1 / work.seconds:,.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vlm-path", type=Path, help="checkpoint of Qwen3-VL-2B's sizes; default: computed alone")
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    head = "| setting | GFLOP an image | weights, GB | moved, GB an image | H200, computed: images/s |"
    rows = {name: row(name, qwen3vl(SETTINGS[name], 24)) for name in args.only}
    if args.vlm_path:
        print(f"{machine(args.device)}, transformers {transformers.__version__}, {args.dtype}, batch {args.batch}")
        head += " transformers: images/s | dvla: images/s | × transformers |"
        for name, text in rows.items():
            rows[name] = text + measure(args, name, SETTINGS[name])
            print(rows[name], flush=True)
    else:
        rows |= {f"PaliGemma 2, {n}": row(f"PaliGemma 2, {n}", paligemma2(s, 16)) for n, s in GEMMA_SETTINGS.items()}
    print("\n" + head + "\n" + "|---" * head.count(" |") + "|")
    print("\n".join(rows.values()))


if __name__ == "__main__":
    main()
