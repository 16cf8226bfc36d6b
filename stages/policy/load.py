"""Loading what a checkpoint holds: its document, its network, its encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...cache.vlm.adapter import load_adapter, put_weights
from ...cache.vlm.encoder import VisionLanguageEncoder
from ...cache.vlm.load import load_encoder, require_encoder
from ...cache.vlm.spec import EncoderSpec
from ...common.config import from_mapping
from ...drifting.policy_net import PolicyNet
from ...errors import UserError
from . import checkpoint as ck
from .document import net_config, read_document


def adapted_spec(checkpoint: str | Path, **overrides: Any) -> EncoderSpec:
    """The encoder of the stage-three policy `checkpoint`, its adapter merged, with `overrides` (None: keep).

    `UserError` for a checkpoint without an adapter.
    """
    folder = ck.resolve(checkpoint)
    if not (folder / "adapter").is_dir():
        raise UserError(
            f"give a run of `dvla finetune --vlm-mode lora` or `full`: {folder} holds no adapter, so its features are "
            "those of the cache it was trained from"
        )
    spec = from_mapping(EncoderSpec, read_document(folder)["encoder"]["spec"], "policy.json")
    given = {name: value for name, value in overrides.items() if value is not None}
    if "boundary" in given:  # tokens and their kind are made above it
        given = {"tokens": None, "features": "merged", "keep": None, **given}
    return dataclasses.replace(spec, **given, adapters=(*spec.adapters, str((folder / "adapter").resolve())))


def load_net(document: Mapping[str, Any], folder: Path, stem: str = "ema") -> PolicyNet:
    """The network that policy.json describes, with the weights "ema" or "model" of a checkpoint. `UserError`, before
    memory is asked for, unless they are its own; and where they are not finite."""
    config = net_config(document)
    with torch.device("meta"):
        expected = PolicyNet(config).state_dict()
    tensors = ck.policy_tensors(folder, expected, stem)
    net = PolicyNet(config)
    net.load_state_dict(tensors)
    return net


def load_policy_encoder(
    folder: Path, document: Mapping[str, Any], device: torch.device | str = "cpu", vlm_path: str | None = None
) -> VisionLanguageEncoder:
    """The encoder that a checkpoint belongs to, with its adapter or the weights it was merged into.

    `UserError` naming the fields that differ for another VLM."""
    spec = from_mapping(EncoderSpec, document["encoder"]["spec"], "policy.json")
    spec = dataclasses.replace(spec, path=vlm_path) if vlm_path else spec
    encoder = load_encoder(spec, device)
    fingerprint, vision = document["encoder"]["fingerprint"], folder / "vision.safetensors"
    if vision.is_file():  # of an exported policy: the weights that fine-tuning changed
        put_weights(encoder, vision, fingerprint.get("adapter"))
    require_encoder(encoder, fingerprint, f"checkpoint {folder}")
    net = net_config(document)
    if (net.feature_width, net.text_width or net.feature_width) != (encoder.width, encoder.text_width):
        raise UserError(
            f"{folder}/policy.json is damaged: its network reads features of width {net.feature_width}, this VLM gives "
            f"{encoder.width} (text: {net.text_width or net.feature_width}, {encoder.text_width})"
        )
    if (folder / "adapter").is_dir():
        load_adapter(encoder, folder / "adapter")
    return encoder
