"""LoRA on the vision part of an encoder, through peft: add, save, load, merge.

The target "qv" adapts queries and values of each block's attention. In Qwen3-VL these are one fused layer `qkv` with
the keys: one matrix A serves both, and the rows of B that would change the keys stay zero. "attention" adapts every
linear layer of the attention: `qkv` and `proj`, in PaliGemma 2 `q_proj`, `k_proj`, `v_proj` and `out_proj`.
"all-linear" adds both MLP layers of each block and those of the merger or projector, unless features are taken before
it. The patch convolution and the position embedding are never adapted. B starts at zero, so that features equal the
base model's exactly.

On disk an adapter has peft's own format (adapter_config.json, adapter_model.safetensors), so peft loads it without
this package.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...errors import UserError
from .encoder import VisionLanguageEncoder
from .spec import LoraSpec

if TYPE_CHECKING:
    from peft import PeftModel

FUSED = "qkv"  # a layer of this name gives queries, keys and values, a third of its rows each


def add_lora(encoder: VisionLanguageEncoder, spec: LoraSpec) -> None:
    """Add a fresh adapter to `encoder.vision`, in place. Only its matrices require gradients afterwards.

    `UserError` when `last_n_blocks` does not fit the tower; `ValueError` when the encoder already has an adapter.
    """
    from peft import LoraConfig, get_peft_model

    _require_none(encoder)
    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # only divided by r
        lora_dropout=spec.dropout,
        bias="none",
        target_modules=_target_pattern(spec, encoder),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        encoder.set_adapter(get_peft_model(encoder.vision, config))
    encoder.vision.eval()  # dropout works in `lora_dropout` only
    for name, p in lora_parameters(encoder) if spec.targets == "qv" else ():
        if f".{FUSED}.lora_B." in name:
            p.register_hook(_without_keys)


def _without_keys(gradient: torch.Tensor) -> torch.Tensor:
    """The gradient [3C,r] of a fused layer's B with zeros for the keys, whose rows so stay at zero."""
    third = len(gradient) // 3
    return torch.cat([gradient[:third], torch.zeros_like(gradient[:third]), gradient[2 * third :]])


@contextlib.contextmanager
def lora_dropout(encoder: VisionLanguageEncoder, key: int) -> Iterator[None]:
    """Apply the spec's dropout in a forward and backward pass, with a mask that depends on `key` alone."""
    layers = [m for name, m in encoder.vision.named_modules() if ".lora_dropout." in name and isinstance(m, nn.Dropout)]
    device = encoder.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(key)
        for layer in layers:
            layer.train()
        try:
            yield
        finally:
            for layer in layers:
                layer.eval()


def lora_parameters(encoder: VisionLanguageEncoder) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of the adapter's trainable matrices, in a fixed order; empty without an adapter."""
    return ((name, p) for name, p in encoder.vision.named_parameters() if "lora_" in name)


def write_lora(encoder: VisionLanguageEncoder, folder: Path) -> None:
    """Write the adapter's files into an existing folder. `ValueError` without an adapter."""
    _require_adapter(encoder).save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)  # peft's unfilled model card template


def load_lora(encoder: VisionLanguageEncoder, folder: Path | str, trainable: bool = True) -> None:
    """Load the adapter in `folder` into `encoder.vision`. `UserError` when missing, damaged or of another model."""
    from peft import PeftModel
    from safetensors import SafetensorError, safe_open

    _require_none(encoder)
    folder = Path(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} holds no LoRA adapter: {name} is missing; give an adapter's folder")
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as f:
            stored = {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}
    except SafetensorError as error:
        file = folder / "adapter_model.safetensors"
        raise UserError(f"{file} is damaged ({error}); copy the checkpoint again") from None
    modules = dict(encoder.vision.named_modules())
    for name, shape in stored.items():
        layer, _, kind = name.removeprefix("base_model.model.").rpartition(".lora_")
        linear = modules.get(layer)
        wanted = getattr(linear, "in_features", None) if kind == "A.weight" else getattr(linear, "out_features", None)
        if wanted is None or wanted != shape[1 if kind == "A.weight" else 0]:
            raise UserError(
                f"the adapter in {folder} does not fit this model: {name} {list(shape)}; "
                "give the checkpoint it was trained on"
            )
    encoder.set_adapter(PeftModel.from_pretrained(encoder.vision, str(folder), is_trainable=trainable))
    encoder.vision.eval()


def merge_lora(encoder: VisionLanguageEncoder) -> None:
    """Add the adapter to the weights it adapts and remove it; features stay equal up to rounding."""
    adapter = _require_adapter(encoder)
    encoder.merged_adapter = encoder.adapted()  # so the fingerprint stays as it was
    encoder.vision = adapter.merge_and_unload().requires_grad_(False)
    encoder.set_adapter(None)


def _target_pattern(spec: LoraSpec, encoder: VisionLanguageEncoder) -> str:
    """A regular expression over module names of `encoder.vision` (peft matches it in full)."""
    depth, layers = encoder.blocks, encoder.lora_layers
    last = depth if spec.last_n_blocks is None else spec.last_n_blocks
    if not 1 <= last <= depth:
        raise UserError(f"last_n_blocks is {last}, but the vision tower has {depth} blocks; give 1 to {depth}")
    block = layers.block.replace("{n}", "|".join(str(i) for i in range(depth - last, depth)))
    if spec.targets in ("qv", "attention"):
        return f"{block}{layers.query_value if spec.targets == 'qv' else layers.attention}"
    inside = f"{block}({layers.attention}|{layers.mlp})"
    return inside if encoder.spec.features == "patch" else f"{inside}|{layers.projection}"


def _require_adapter(encoder: VisionLanguageEncoder) -> PeftModel:
    if encoder.adapter is None:
        raise ValueError("the encoder has no LoRA adapter; call add_lora or load_lora first")
    return encoder.adapter


def _require_none(encoder: VisionLanguageEncoder) -> None:
    if encoder.adapter is not None:
        raise ValueError("the encoder has a LoRA adapter already")
