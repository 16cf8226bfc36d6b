"""What fine-tuning made of an encoder's vision part, as plain weights: those that differ from the base model's. Needs neither peft nor the
adapters they came from, be it LoRA, a whole tower, or several on each other."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import UserError
from .encoder import VisionLanguageEncoder
from .lora import merge_lora


def changed_weights(encoder: VisionLanguageEncoder, base: VisionLanguageEncoder) -> dict[str, torch.Tensor]:
    """Merge the adapter of `encoder`, if there is one, and return the weights of `vision` that are not those of `base`, by name."""
    if encoder.adapter is not None:
        merge_lora(encoder)
    of_base = dict(base.vision.named_parameters())
    return {name: p.detach() for name, p in encoder.vision.named_parameters() if not torch.equal(p, of_base[name])}


@torch.no_grad()
def put_weights(encoder: VisionLanguageEncoder, weights: dict[str, torch.Tensor], identity: dict[str, Any], where: str) -> None:
    """Put `changed_weights` into a base model, in its own dtype; `identity`: `adapted()` of the encoder that they are from, for the fingerprint.

    `UserError` naming the first weight that the model has not, or has in another shape; `where`: the file they are from.
    """
    own = dict(encoder.vision.named_parameters())
    for name, weight in weights.items():
        if name not in own or own[name].shape != weight.shape:
            raise UserError(f"{where} does not fit {encoder.spec.path}: {name} {list(weight.shape)}; give the VLM that it was trained on")
    for name, weight in weights.items():
        own[name].copy_(weight)
    encoder.merged_adapter = identity
