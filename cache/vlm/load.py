"""Loading an encoder, and refusing another one than expected."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...common import fingerprint as fp
from ...errors import UserError, unknown
from .encoder import VisionLanguageEncoder
from .spec import EncoderSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

NAMES = {"qwen3vl": "Qwen3-VL", "paligemma2": "PaliGemma 2"}


def load_encoder(
    spec: EncoderSpec,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> VisionLanguageEncoder:
    """Load the vision part, the embedding table and the tokenizer of `spec.path`, frozen and in eval mode.

    `dtype` overrides `spec.dtype`. `say` gets a line before the work begins, which takes minutes for a large model,
    and one of what was read.
    `UserError` when the checkpoint is missing, incomplete, damaged or of another architecture, when the resolution or
    tokens do not fit its patches, or when an adapter was trained on other weights.
    """
    from . import adapter as adapters  # they import this module
    from .paligemma2 import encoder as paligemma2
    from .qwen3vl import load as qwen3vl

    families = {"qwen3vl": qwen3vl.load, "paligemma2": paligemma2.load}
    if spec.vlm not in families:
        raise unknown("vlm", spec.vlm, families)
    device = torch.device(device)
    if dtype is None:
        dtype = DTYPES.get(spec.dtype) or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    say(f"loading {NAMES[spec.vlm]} from {spec.path}")
    encoder = families[spec.vlm](spec, device, dtype).requires_grad_(False).eval()
    for folder in spec.adapters:
        adapters.merge_adapter(encoder, folder)
    say(f"loaded {encoder.contents()}")
    return encoder


def require_encoder(encoder: VisionLanguageEncoder, fingerprint: Mapping[str, Any], what: str) -> None:
    """`UserError` naming the differing fields unless this encoder, without its adapter, made the features."""
    if lines := encoder_differences(fingerprint, encoder.fingerprint(), was="it has", now="this VLM has"):
        differences = "; ".join(lines[:6])
        raise UserError(
            f"{what} belongs to another VLM than {encoder.spec.path}: {differences}; give that VLM's folder"
        )


def encoder_differences(a: Mapping[str, Any], b: Mapping[str, Any], **words: str) -> list[str]:
    """`fingerprint.diff` of two encoders, except for the dtype of the computation, which only changes rounding."""
    first, second = ({k: v for k, v in one.items() if k != "dtype"} for one in (a, b))
    return fp.diff(first, second, **words)
