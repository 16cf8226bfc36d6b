"""LoRA on an encoder, its vision part or its language layers, through peft: add, save, load, merge.

The target "qv" adapts queries and values of each block's attention. In Qwen3-VL these are one fused layer `qkv` with
the keys: one matrix A serves both, and the rows of B that would change the keys stay zero. "attention" adapts every
linear layer of the attention: `qkv` and `proj`, in PaliGemma 2 `q_proj`, `k_proj`, `v_proj` and `out_proj`.
"all-linear" adds the MLP layers of each block and those of the merger or projector, DeepStack's among them, unless
features are taken before them. The patch convolution and the position embedding are never adapted. B starts at zero, so
that features equal the base model's exactly.

`last_n_blocks` counts from the top of the whole stack: vision blocks, the projections, and with depth language the
layers of the language model. Where it reaches no vision block, the projections of a language model's input lie below it
and stay as they are. Without it LoRA is in the vision tower.

On disk an adapter has peft's own format (adapter_config.json, adapter_model.safetensors), so peft loads it without
this package.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from ...common.documents import Field, Form, read_json
from ...common.tensors import open_tensors, require_tensors
from ...errors import UserError
from .encoder import VisionLanguageEncoder
from .spec import LoraLayers, LoraSpec

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."  # as peft has them
FUSED = "qkv"  # a layer of this name gives queries, keys and values, a third of its rows each
LANGUAGE = LoraLayers(  # of both families
    r"language\.layers\.({n})\.", r"self_attn\.(q|v)_proj", r"self_attn\.(q|k|v|o)_proj", r"mlp\.(gate|up|down)_proj"
)


class AdapterForm(Form, extra="ignore"):
    """What of peft's adapter_config.json features depend on; other keys are peft's, which never reads the file here."""

    peft_type: Literal["LORA"]
    r: Annotated[int, Field(ge=1, le=4096)]
    lora_alpha: Annotated[float, Field(gt=0, le=1e6)]
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    bias: Literal["none"] = "none"
    use_rslora: Literal[False] = False
    use_dora: Literal[False] = False
    fan_in_fan_out: Literal[False] = False
    rank_pattern: Annotated[dict[str, int], Field(max_length=0)] = {}
    alpha_pattern: Annotated[dict[str, float], Field(max_length=0)] = {}
    modules_to_save: None = None
    layer_replication: None = None


def add_lora(encoder: VisionLanguageEncoder, spec: LoraSpec) -> None:
    """Add a fresh adapter to `encoder.vision`, in place. Only its matrices require gradients afterwards.

    `UserError` when `last_n_blocks` does not fit the stack; `ValueError` when the encoder already has an adapter.
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
    if encoder.device.type == "cuda":
        without_copies(encoder)
    for name, p in lora_parameters(encoder) if spec.targets == "qv" else ():
        if f".{FUSED}.lora_B." in name:
            p.register_hook(_without_keys)


def without_copies(encoder: VisionLanguageEncoder) -> None:
    """Multiply in the tower's own dtype, as autocast would: peft copies the input of every adapted layer to the float32
    of the matrices, and the backward pass keeps that copy."""
    from peft.tuners.lora import LoraLayer

    def rounded(matrix: Any, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, matrix.weight.to(x.dtype))

    for layer in encoder.vision.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False
            for matrix in (*layer.lora_A.values(), *layer.lora_B.values()):
                matrix.forward = functools.partial(rounded, matrix)  # type: ignore[method-assign]


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
    from peft import LoraConfig, get_peft_model

    _require_none(encoder)
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).exists():
            raise UserError(f"{folder} holds no LoRA adapter: {name} is missing; give an adapter's folder")
    config = read_json(folder / CONFIG, AdapterForm, "copy the checkpoint again")
    linear = {name: m for name, m in encoder.vision.named_modules() if isinstance(m, nn.Linear)}
    with open_tensors(folder / WEIGHTS, "copy the checkpoint again") as file:
        layers = sorted({_layer_of(name) for name in file.header} & linear.keys())
        form: dict[str, torch.Tensor] = {}
        for layer in layers:
            a, b = ((config["r"], linear[layer].in_features), (linear[layer].out_features, config["r"]))
            form |= {
                f"{PREFIX}{layer}.lora_{kind}.weight": torch.empty(s, device="meta") for kind, s in zip("AB", (a, b))
            }
        try:
            require_tensors(file.header, form, folder, "LoRA of this VLM")
        except UserError as error:
            raise UserError(
                f"the adapter in {folder} does not fit this model: {error}; give the checkpoint it was trained on"
            ) from None
        stored = file.load(file.header)
    if not layers:
        raise UserError(f"{folder / WEIGHTS} is damaged: it adapts no layer; copy the checkpoint again")
    with torch.random.fork_rng(devices=[]):
        made = LoraConfig(
            r=config["r"],
            lora_alpha=config["lora_alpha"],
            lora_dropout=config.get("lora_dropout", 0.0),
            bias="none",
            target_modules=layers,
        )
        encoder.set_adapter(get_peft_model(encoder.vision, made))
    with torch.no_grad():
        for name, p in lora_parameters(encoder):
            p.copy_(stored[PREFIX + name.replace(".default.", ".")])
            p.requires_grad_(trainable)
    encoder.vision.eval()


def _layer_of(name: str) -> str:
    """The layer that a stored matrix adapts."""
    return name.removeprefix(PREFIX).rpartition(".lora_")[0]


def merge_lora(encoder: VisionLanguageEncoder) -> None:
    """Add the adapter to the weights it adapts and remove it; features stay equal up to rounding."""
    adapter = _require_adapter(encoder)
    encoder.merged_adapter = encoder.adapted()  # so the fingerprint stays as it was
    encoder.vision = adapter.merge_and_unload().requires_grad_(False)
    encoder.set_adapter(None)


def _target_pattern(spec: LoraSpec, encoder: VisionLanguageEncoder) -> str:
    """A regular expression over module names of `encoder.vision` (peft matches it in full)."""
    vision, language, last = encoder.blocks, encoder.language_layers, spec.last_n_blocks
    count = vision + language
    if last is not None and not 1 <= last <= count:
        layers = f"{vision} blocks" + (f" and the language model {language} layers" if language else "")
        raise UserError(f"last_n_blocks is {last}, but the vision tower has {layers}; give 1 to {count}")
    chosen = range(vision) if last is None else range(count - last, count)
    found = [
        _inside(layers, spec.targets, numbers)
        for layers, numbers in (
            (encoder.lora_layers, [i for i in chosen if i < vision]),
            (LANGUAGE, [i - vision for i in chosen if i >= vision]),
        )
        if numbers
    ]
    projected = encoder.spec.features != "patch" and (language == 0 or chosen[0] < vision)
    return "|".join(found + [encoder.lora_layers.projection] * (spec.targets == "all-linear" and projected))


def _inside(layers: LoraLayers, targets: str, numbers: list[int]) -> str:
    """A regular expression over the linear layers of these blocks."""
    inside = {"qv": layers.query_value, "attention": layers.attention}.get(targets, f"{layers.attention}|{layers.mlp}")
    return f"{layers.block.replace('{n}', '|'.join(map(str, numbers)))}({inside})"


def _require_adapter(encoder: VisionLanguageEncoder) -> PeftModel:
    if encoder.adapter is None:
        raise ValueError("the encoder has no LoRA adapter; call add_lora or load_lora first")
    return encoder.adapter


def _require_none(encoder: VisionLanguageEncoder) -> None:
    if encoder.adapter is not None:
        raise ValueError("the encoder has a LoRA adapter already")
