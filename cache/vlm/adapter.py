"""Fine-tuned encoder weights (LoRA, or all between pixels and features): save, load, merge."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ...common import fingerprint as fp
from ...common.documents import Form, json_bytes, read_json
from ...common.files import new_folder, write_file
from ...common.tensors import form_of, open_tensors, require_tensors
from ...common.text import printable
from ...errors import UserError
from .checkpoint import tensors_sha256
from .encoder import VisionLanguageEncoder
from .lora import load_lora, merge_lora, write_lora

IDENTITY, TOWER = "identity.json", "tower.safetensors"


class BaseForm(Form):
    """The weights that an adapter belongs to."""

    vlm: str
    weights_sha256: str
    adapter: dict[str, Any] | None


class IdentityForm(Form):
    """identity.json."""

    base: BaseForm
    adapter: dict[str, Any]


def tower_parameters(encoder: VisionLanguageEncoder, language: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of everything in `encoder.vision` that features depend on, so no projection of patches; its
    `language` layers, or none of them."""
    projection = encoder.lora_layers.projection.split(r"\.")[0] + "."
    unused = (projection,) * (encoder.spec.features == "patch") + ("language.",) * (not language)
    return ((name, p) for name, p in encoder.vision.named_parameters() if not name.startswith(unused))


def save_adapter(encoder: VisionLanguageEncoder, folder: Path | str, language: bool = True) -> None:
    """Write the encoder's adapter, or its tower where it has none (with its `language` layers or without), into a new
    `folder`. `UserError` when it exists."""
    with new_folder(Path(folder)) as part:
        if encoder.adapter is not None:
            write_lora(encoder, part)
            adapted = encoder.adapted()
        else:
            found = tower_parameters(encoder, language)
            tensors = {name: p.detach().to("cpu", torch.float32).contiguous() for name, p in found}
            save_file(tensors, part / TOWER)
            adapted = _tower_identity(tensors, encoder)
        write_file(part / IDENTITY, json_bytes({"base": base_identity(encoder), "adapter": adapted}))


def load_adapter(encoder: VisionLanguageEncoder, folder: Path | str) -> None:
    """Load what `save_adapter` wrote, frozen: LoRA as `encoder.adapter`, a tower in place of its own weights.

    `UserError` when it is missing, damaged, or was trained on other weights (differing fields named).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"adapter {folder}, which these features of {encoder.spec.path} need, is missing; restore that checkpoint"
        )
    identity = adapter_document(folder) if (folder / IDENTITY).exists() else None
    if identity is not None:
        lines = fp.diff(identity["base"], base_identity(encoder), "adapter has", "this VLM has")
        if lines:
            raise UserError(
                f"the adapter in {folder} was trained on another VLM than {encoder.spec.path}: {'; '.join(lines[:6])}; "
                "give that VLM's folder, and the depth and layers of the run"
            )
    if (folder / TOWER).exists():
        _load_tower(encoder, folder)
    else:
        load_lora(encoder, folder, trainable=False)
    if identity is not None and identity["adapter"] != encoder.adapted():
        raise UserError(f"the weights in {folder} are not those that its {IDENTITY} names; copy the checkpoint again")


def _load_tower(encoder: VisionLanguageEncoder, folder: Path) -> None:
    with open_tensors(folder / TOWER, "copy the checkpoint again") as file:
        whole = any(name.startswith("language.") for name in file.header)  # earlier releases left these layers alone
        wanted = dict(tower_parameters(encoder, whole))
        try:
            require_tensors(file.header, {n: in_float32(p) for n, p in wanted.items()}, folder, "its tower")
        except UserError as error:
            raise UserError(
                f"the tower in {folder} does not fit {encoder.spec.path}; give the checkpoint it was trained on "
                f"({error})"
            ) from None
        tensors = file.load(file.header)
    adapted = _tower_identity(tensors, encoder)
    with torch.no_grad():
        for name, p in wanted.items():
            p.copy_(tensors[name])
    encoder.merged_adapter = adapted


def in_float32(parameter: torch.Tensor) -> torch.Tensor:
    """The form of a parameter whose fine-tuned values are stored in float32, on the meta device."""
    return torch.empty(parameter.shape, device="meta")


def merge_adapter(encoder: VisionLanguageEncoder, folder: Path | str) -> None:
    """As `load_adapter`, with a LoRA adapter merged into the weights it adapts."""
    load_adapter(encoder, folder)
    if encoder.adapter is not None:
        merge_lora(encoder)


def adapter_document(folder: Path) -> dict[str, Any]:
    """identity.json: "base", the weights it was trained on, and "adapter", its entry in a fingerprint. `UserError`."""
    return read_json(folder / IDENTITY, IdentityForm, "copy the checkpoint again")


def base_identity(encoder: VisionLanguageEncoder) -> dict[str, Any]:
    """The weights that an adapter of this encoder belongs to."""
    return {"vlm": encoder.spec.vlm, "weights_sha256": encoder.weights["sha256"], "adapter": encoder.merged_adapter}


def _tower_identity(tensors: dict[str, torch.Tensor], encoder: VisionLanguageEncoder) -> dict[str, Any]:
    merged = {"on": encoder.merged_adapter} if encoder.merged_adapter else {}
    return {"tower_sha256": tensors_sha256(tensors)} | merged


def changed_weights(encoder: VisionLanguageEncoder, base: VisionLanguageEncoder) -> dict[str, torch.Tensor]:
    """Merge the adapter of `encoder`, if any, and return the weights of `vision` that differ from those of `base`."""
    if encoder.adapter is not None:
        merge_lora(encoder)
    of_base = dict(base.vision.named_parameters())
    return {name: p.detach() for name, p in encoder.vision.named_parameters() if not torch.equal(p, of_base[name])}


@torch.no_grad()
def put_weights(encoder: VisionLanguageEncoder, file: Path, identity: dict[str, Any] | None) -> None:
    """Put `changed_weights` that a safetensors file holds into a base model, in its own dtype.

    `identity`: `adapted()` of the encoder they come from, for the fingerprint. `UserError` naming the first weight that
    the model lacks or has in another shape.
    """
    own = dict(encoder.vision.named_parameters())
    with open_tensors(file, "copy the checkpoint again") as stored:
        for name, form in stored.header.items():
            if name not in own or own[name].shape != form.shape or form.dtype != torch.float32:
                raise UserError(
                    f"{file} does not fit {encoder.spec.path}: {printable(name)[:120]} {form_of(form)}; give "
                    "the VLM it was trained on"
                )
        if not stored.header:
            raise UserError(f"{file} is damaged: it holds no weight; copy the checkpoint again")
        weights = stored.load(stored.header)
    for name, weight in weights.items():
        own[name].copy_(weight)
    encoder.merged_adapter = identity
