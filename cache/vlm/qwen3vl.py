"""Qwen3-VL as an encoder: its vision tower and merger, on transformers' own module.

Letters: N images, S patches of one image, F values of one patch, C vision width, K merged tokens (S / merge^2),
D language width.

`features: merged` (default) are the output of the model's own pretrained merger, K = S/4 tokens of width D.
`features: patch` are the output of the last block, S tokens of width C: the residual stream before the LayerNorm that
begins the merger. Both are ordered row by row over the image. Qwen3-VL also feeds three DeepStack features from inner
blocks into its first language layers; these are not cached, and their mergers are neither read nor computed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from ...errors import UserError
from . import checkpoint
from .encoder import VisionLanguageEncoder
from .preprocess import ImageSpec
from .qwen3vl_tower import (
    ROTARY_BASE,
    PositionTables,
    embed_patches,
    position_tables,
    rotary_base,
    rotary_frequencies,
    run_blocks,
)
from .spec import EncoderSpec, LoraLayers

VISION_PREFIX = "model.visual."
DEEPSTACK_PREFIX = "model.visual.deepstack_merger_list."
EMBEDDING_NAME = "model.language_model.embed_tokens.weight"
CONFIG_FIELDS = (
    "depth hidden_size hidden_act intermediate_size num_heads in_channels patch_size spatial_merge_size "
    "temporal_patch_size out_hidden_size num_position_embeddings"
)


class Qwen3VLEncoder(VisionLanguageEncoder):
    """`vision` is transformers' Qwen3VLVisionModel without DeepStack."""

    lora_layers = LoraLayers(
        r"blocks\.({n})\.", r"attn\.qkv", r"attn\.(qkv|proj)", r"mlp\.linear_fc[12]", r"merger\.linear_fc[12]"
    )

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._tables: dict[torch.device, PositionTables] = {}

    @property
    def blocks(self) -> int:
        return len(self.vision.blocks)

    @property
    def vision_width(self) -> int:
        return self.vision.config.hidden_size

    @property
    def tables(self) -> PositionTables:
        """Position tables of this resolution on the current device, computed once."""
        if self.device not in self._tables:
            self._tables[self.device] = position_tables(self.vision, self.image.grid, self.device)
        return self._tables[self.device]

    def vision_lower(self, patches: torch.Tensor, end: int) -> torch.Tensor:
        hidden = embed_patches(self.vision, patches, self.tables)  # [N,S,C]
        return run_blocks(self.vision, hidden, self.tables, 0, end)  # [N,S,C]

    def vision_upper(self, hidden: torch.Tensor, begin: int) -> torch.Tensor:
        hidden = run_blocks(self.vision, hidden, self.tables, begin, self.blocks)  # [N,S,C]
        if self.spec.features == "patch":
            return self.to_rows(hidden)  # [N,S,C]
        merged = self.vision.merger(hidden.flatten(0, 1))  # [N*K,D]
        return merged.reshape(len(hidden), self.image.tokens, -1)  # [N,K,D]

    def to_rows(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden[:, self.tables.row_major]  # [N,S,C]

    def from_rows(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden[:, self.tables.merge_order]  # [N,S,C]


def load(spec: EncoderSpec, device: torch.device, dtype: torch.dtype) -> Qwen3VLEncoder:
    """See `load_encoder`."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    folder = checkpoint.checkpoint_folder(spec.path, spec.revision, canonical)
    checkpoint.require_model_type(folder, spec.path, spec.vlm, "qwen3_vl")
    whole = checkpoint.load_config(folder)
    config, rows = copy.deepcopy(whole.vision_config), whole.text_config.vocab_size
    sides = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
    image = ImageSpec(spec.resolution, *sides, *checkpoint.image_statistics(folder))
    width, heads, side = config.hidden_size, config.num_heads, int(config.num_position_embeddings**0.5)
    if width % (4 * heads) or side**2 != config.num_position_embeddings:
        raise UserError(
            f"{folder}/config.json is damaged: vision_config has width {width} for {heads} heads (expected a multiple "
            f"of 4 × heads) and {config.num_position_embeddings} positions (expected a square number)"
        )
    config.deepstack_visual_indexes = []
    with checkpoint.without_code(folder), torch.device("meta"):
        vision = Qwen3VLVisionModel(config)

    def expected(header: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        table = torch.empty(rows, config.out_hidden_size, device="meta")
        return {VISION_PREFIX + name: t for name, t in vision.state_dict().items()} | {EMBEDDING_NAME: table}

    tensors = checkpoint.read_tensors(folder, canonical, "Qwen3-VL", EMBEDDING_NAME, expected)
    base = rotary_base(config)
    weights = {
        "sha256": checkpoint.tensors_sha256(tensors),
        "config": {name: getattr(config, name) for name in CONFIG_FIELDS.split()}
        | ({} if base == ROTARY_BASE else {"rope_theta": base}),  # no release has another
    }
    embedding = tensors.pop(EMBEDDING_NAME)
    checkpoint.assign_tensors(
        vision, {name.removeprefix(VISION_PREFIX): t for name, t in tensors.items()}, device, dtype, spec.path
    )
    for name, _ in list(vision.rotary_pos_emb.named_buffers()):  # the only buffers; they are in no state dict
        setattr(vision.rotary_pos_emb, name, rotary_frequencies(config).to(device))
    checkpoint.require_filled(vision)
    return Qwen3VLEncoder(
        spec, image, vision, embedding, checkpoint.load_tokenizer(folder, spec.path, len(embedding)), weights
    )


def canonical(name: str) -> str | None:
    """The name of a stored tensor when it is needed, else None. Every version of transformers stores these names."""
    needed = name == EMBEDDING_NAME or (name.startswith(VISION_PREFIX) and not name.startswith(DEEPSTACK_PREFIX))
    return name if needed else None
