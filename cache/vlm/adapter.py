"""Fine-tuned encoder weights (LoRA or full tower): save, load, merge."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ...common import fingerprint as fp
from ...common.files import new_folder
from ...errors import UserError
from .checkpoint import tensors_sha256
from .encoder import VisionLanguageEncoder
from .lora import load_lora, merge_lora, write_lora

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
        (part / IDENTITY).write_text(
            json.dumps({"base": base_identity(encoder), "adapter": adapted}, indent=1, sort_keys=True) + "\n"
        )


def load_adapter(encoder: VisionLanguageEncoder, folder: Path | str) -> None:
    """Put what `save_adapter` wrote into `encoder`, frozen: LoRA as `encoder.adapter`, a tower in the place of its own weights.

    `UserError` when it is missing, damaged, or was trained on other weights (differing fields named).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"adapter {folder}, which makes these features with {encoder.spec.path}, is not there; put the checkpoint back in its place"
        )
    if (folder / IDENTITY).is_file():
        lines = fp.diff(adapter_document(folder)["base"], base_identity(encoder), "it has", "this one is")
        if lines:
            raise UserError(
                f"the adapter in {folder} was trained on another VLM than {encoder.spec.path}: {'; '.join(lines[:6])}"
            )
    if not (folder / TOWER).is_file():
        load_lora(encoder, folder, trainable=False)
        return
    try:
        tensors = load_file(folder / TOWER)
    except SafetensorError as error:
        raise UserError(f"{folder / TOWER} is damaged: {error}") from None
    wanted = dict(tower_parameters(encoder))
    if tensors.keys() != wanted.keys() or any(tensors[name].shape != p.shape for name, p in wanted.items()):
        raise UserError(
            f"the tower in {folder} does not fit {encoder.spec.path}; give the checkpoint that it was trained on"
        )
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
    return {"tower_sha256": tensors_sha256(tensors)} | (
        {"on": encoder.merged_adapter} if encoder.merged_adapter else {}
    )


def changed_weights(encoder: VisionLanguageEncoder, base: VisionLanguageEncoder) -> dict[str, torch.Tensor]:
    """Merge the adapter of `encoder`, if there is one, and return the weights of `vision` that are not those of `base`, by name."""
    if encoder.adapter is not None:
        merge_lora(encoder)
    of_base = dict(base.vision.named_parameters())
    return {name: p.detach() for name, p in encoder.vision.named_parameters() if not torch.equal(p, of_base[name])}


@torch.no_grad()
def put_weights(
    encoder: VisionLanguageEncoder, weights: dict[str, torch.Tensor], identity: dict[str, Any], where: str
) -> None:
    """Put `changed_weights` into a base model, in its own dtype; `identity`: `adapted()` of the encoder that they are from, for the fingerprint.

    `UserError` naming the first weight that the model has not, or has in another shape; `where`: the file they are from.
    """
    own = dict(encoder.vision.named_parameters())
    for name, weight in weights.items():
        if name not in own or own[name].shape != weight.shape:
            raise UserError(
                f"{where} does not fit {encoder.spec.path}: {name} {list(weight.shape)}; give the VLM that it was trained on"
            )
    for name, weight in weights.items():
        own[name].copy_(weight)
    encoder.merged_adapter = identity
