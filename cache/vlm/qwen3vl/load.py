"""Reading what a Qwen3-VL encoder needs of a checkpoint: vision tower, embedding table, its first language layers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from ....errors import UserError
from .. import checkpoint
from ..preprocess import ImageSpec
from ..spec import EncoderSpec
from .encoder import Qwen3VLEncoder
from .language import Qwen3VLLanguage, chat_prompt, text_identity
from .tower import ROTARY_BASE, rotary_base, rotary_frequencies

VISION_PREFIX = "model.visual."
DEEPSTACK_PREFIX = "model.visual.deepstack_merger_list."
LANGUAGE_PREFIX = "model.language_model."
EMBEDDING_NAME = "model.language_model.embed_tokens.weight"
IMAGE_TOKEN = "<|image_pad|>"
CONFIG_FIELDS = (
    "depth hidden_size hidden_act intermediate_size num_heads in_channels patch_size spatial_merge_size "
    "temporal_patch_size out_hidden_size num_position_embeddings"
)


def load(spec: EncoderSpec, device: torch.device, dtype: torch.dtype) -> Qwen3VLEncoder:
    """See `load_encoder`."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    folder = checkpoint.checkpoint_folder(spec.path, spec.revision, functools.partial(_needed, spec))
    needed = _needed(spec, folder)
    whole = copy.deepcopy(checkpoint.load_config(folder))
    config, rows = whole.vision_config, whole.text_config.vocab_size
    sides = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
    image = ImageSpec(spec.resolution, *sides, *checkpoint.image_statistics(folder))
    width, heads, side = config.hidden_size, config.num_heads, int(config.num_position_embeddings**0.5)
    if width % (4 * heads) or side**2 != config.num_position_embeddings:
        raise UserError(
            f"{folder}/config.json is damaged: vision_config has width {width} for {heads} heads (expected a multiple "
            f"of 4 × heads) and {config.num_position_embeddings} positions (expected a square number)"
        )
    count, mergers = _counts(spec, whole, str(folder))
    config.deepstack_visual_indexes = list(config.deepstack_visual_indexes)[:mergers]
    with checkpoint.without_code(folder), torch.device("meta"):
        vision = Qwen3VLVisionModel(config)
        own = {VISION_PREFIX + name: t for name, t in vision.state_dict().items()}
        if count:
            vision.language = Qwen3VLLanguage(whole.text_config, count)
            own |= {LANGUAGE_PREFIX + name: t for name, t in vision.language.state_dict().items()}

    def expected(header: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return own | {EMBEDDING_NAME: torch.empty(rows, config.out_hidden_size, device="meta")}

    tensors = checkpoint.read_tensors(folder, needed, "Qwen3-VL", EMBEDDING_NAME, expected)
    base = rotary_base(config)
    identity = {name: getattr(config, name) for name in CONFIG_FIELDS.split()}
    identity |= {} if base == ROTARY_BASE else {"rope_theta": base}  # no release has another
    if mergers:
        identity["deepstack_visual_indexes"] = config.deepstack_visual_indexes
    if count:
        identity["text"] = text_identity(whole.text_config)
    weights = {"sha256": checkpoint.tensors_sha256(tensors), "config": identity}
    embedding = tensors.pop(EMBEDDING_NAME)
    named = {_module_name(name): tensors.pop(name) for name in list(tensors)}
    checkpoint.assign_tensors(vision, named, device, dtype, spec.path)
    for name, _ in list(vision.rotary_pos_emb.named_buffers()):  # the only buffers; they are in no state dict
        setattr(vision.rotary_pos_emb, name, rotary_frequencies(config).to(device))
    if count:
        cast(Qwen3VLLanguage, vision.language).rebuild_buffers(whole.text_config, device)
    checkpoint.require_filled(vision)
    tokenizer = checkpoint.load_tokenizer(folder, spec.path, len(embedding))
    prompt = chat_prompt(folder, tokenizer, IMAGE_TOKEN) if count else None
    return Qwen3VLEncoder(spec, image, vision, embedding, tokenizer, weights, prompt=prompt)


def _counts(spec: EncoderSpec, config: Any, where: str) -> tuple[int, int]:
    """(language layers, DeepStack mergers) that features need. `UserError` for a layer that the model does not have."""
    total, inner = config.text_config.num_hidden_layers, len(config.vision_config.deepstack_visual_indexes)
    if spec.depth == "vision":
        if spec.deepstack and not inner:
            raise UserError(
                f"--layers deepstack: {where} has no such layers (vision_config.deepstack_visual_indexes is empty)"
            )
        return 0, inner if spec.deepstack else 0
    last = spec.layers[-1] if spec.layers else max(1, round(total * 4 / 7))
    checkpoint.require_layer(last, total, where)
    return last, min(inner, last)


def _needed(spec: EncoderSpec, folder: Path) -> checkpoint.Canonical:
    """`canonical` of the tensors that `spec` needs of the checkpoint in `folder`."""
    checkpoint.require_model_type(folder, spec.path, spec.vlm, "qwen3_vl")
    config = checkpoint.load_config(folder)
    count, mergers = _counts(spec, config, spec.path)
    return functools.partial(
        canonical, layers=count, mergers=mergers, norm=count == config.text_config.num_hidden_layers
    )


def _module_name(name: str) -> str:
    """The name in the encoder's `vision` of a stored tensor."""
    if name.startswith(LANGUAGE_PREFIX):
        return "language." + name.removeprefix(LANGUAGE_PREFIX)
    return name.removeprefix(VISION_PREFIX)


def canonical(name: str, layers: int = 0, mergers: int = 0, norm: bool = False) -> str | None:
    """The name of a stored tensor when it is needed, else None: of the language model its first `layers`, with the last
    `norm` or without. Every version of transformers stores these names."""
    for prefix, count in ((DEEPSTACK_PREFIX, mergers), (f"{LANGUAGE_PREFIX}layers.", layers)):
        number = name.removeprefix(prefix).partition(".")[0]
        if name.startswith(prefix):
            return name if number.isdecimal() and int(number) < count else None
    last = norm and name == f"{LANGUAGE_PREFIX}norm.weight"
    return name if last or name == EMBEDDING_NAME or name.startswith(VISION_PREFIX) else None
