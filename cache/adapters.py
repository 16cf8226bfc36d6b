"""What fine-tuning leaves of an encoder's vision part, as a folder beside a policy: a LoRA adapter, or the whole tower.

    adapter/identity.json               what it was trained on, and what features with it are called in a fingerprint
    adapter/adapter_config.json, adapter_model.safetensors      LoRA, in peft's own format (lora.py)
    adapter/tower.safetensors           every trained weight of `encoder.vision`, float32

Adapters can lie on each other: one that was trained on a tower into which another was merged fits that tower only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import UserError
from . import fingerprint as fp
from .encoder import VisionLanguageEncoder
from .guard import new_folder
from .lora import load_lora, merge_lora, write_lora
from .vlm_files import tensors_sha256

IDENTITY, TOWER = "identity.json", "tower.safetensors"


def tower_parameters(encoder: VisionLanguageEncoder) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of everything in `encoder.vision` that features depend on: not of the projection where they are taken before it."""
    unused = encoder.lora_layers.projection.split(r"\.")[0] + "." if encoder.spec.features == "patch" else None
    return ((name, p) for name, p in encoder.vision.named_parameters() if unused is None or not name.startswith(unused))


def save_adapter(encoder: VisionLanguageEncoder, folder: Path | str) -> None:
    """Write the encoder's adapter, or without one its tower, into `folder`, which appears only when complete. `UserError` when it exists."""
    with new_folder(Path(folder)) as part:
        if encoder.adapter is not None:
            write_lora(encoder, part)
            adapted = encoder.adapted()
        else:
            tensors = {name: p.detach().to("cpu", torch.float32).contiguous() for name, p in tower_parameters(encoder)}
            save_file(tensors, part / TOWER)
            adapted = _tower_identity(tensors, encoder)
        (part / IDENTITY).write_text(json.dumps({"base": base_identity(encoder), "adapter": adapted}, indent=1, sort_keys=True) + "\n")


def load_adapter(encoder: VisionLanguageEncoder, folder: Path | str) -> None:
    """Put what `save_adapter` wrote into `encoder`, frozen: LoRA as `encoder.adapter`, a tower in the place of its own weights.

    `UserError` when it is missing, damaged, or was trained on other weights (differing fields named).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"adapter {folder}, which makes these features with {encoder.spec.path}, is not there; put the checkpoint back in its place")
    if (folder / IDENTITY).is_file():
        lines = fp.diff(adapter_document(folder)["base"], base_identity(encoder), "it has", "this one is")
        if lines:
            raise UserError(f"the adapter in {folder} was trained on another VLM than {encoder.spec.path}: {'; '.join(lines[:6])}")
    if not (folder / TOWER).is_file():
        load_lora(encoder, folder, trainable=False)
        return
    try:
        tensors = load_file(folder / TOWER)
    except SafetensorError as error:
        raise UserError(f"{folder / TOWER} is damaged: {error}") from None
    wanted = dict(tower_parameters(encoder))
    if tensors.keys() != wanted.keys() or any(tensors[name].shape != p.shape for name, p in wanted.items()):
        raise UserError(f"the tower in {folder} does not fit {encoder.spec.path}; give the checkpoint that it was trained on")
    adapted = _tower_identity(tensors, encoder)
    with torch.no_grad():
        for name, p in wanted.items():
            p.copy_(tensors[name])
    encoder.merged_adapter = adapted


def merge_adapter(encoder: VisionLanguageEncoder, folder: Path | str) -> None:
    """`load_adapter`, and a LoRA adapter merged into the weights it adapts."""
    load_adapter(encoder, folder)
    if encoder.adapter is not None:
        merge_lora(encoder)


def adapter_document(folder: Path) -> dict[str, Any]:
    """identity.json: "base", the weights it was trained on, and "adapter", what a fingerprint says of features with it. `UserError`."""
    try:
        return json.loads((folder / IDENTITY).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {folder / IDENTITY}: {error}") from None


def base_identity(encoder: VisionLanguageEncoder) -> dict[str, Any]:
    """The weights that an adapter of this encoder belongs to."""
    return {"vlm": encoder.spec.vlm, "weights_sha256": encoder.weights["sha256"], "adapter": encoder.merged_adapter}


def _tower_identity(tensors: dict[str, torch.Tensor], encoder: VisionLanguageEncoder) -> dict[str, Any]:
    return {"tower_sha256": tensors_sha256(tensors)} | ({"on": encoder.merged_adapter} if encoder.merged_adapter else {})
