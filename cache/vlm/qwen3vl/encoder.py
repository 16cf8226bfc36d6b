"""Qwen3-VL as an encoder: its vision tower and merger, and on request layers of its language model, on transformers'
own modules.

Letters: N images, S patches of one image (of hidden states at a language boundary: tokens of the sequence), F values of
one patch, C vision width, K merged tokens (patches / merge^2), D language width, R room for tokens after the image's.

`depth: vision`, `features: merged` (default) are the output of the model's own pretrained merger, K = S/4 tokens of
width D. `features: patch` are the output of the last block, S tokens of width C: the residual stream before the
LayerNorm that begins the merger. Both are ordered row by row over the image. Qwen3-VL also feeds three DeepStack
features from inner blocks into its first language layers: `layers: deepstack` keeps them beside the merged ones;
otherwise their mergers are neither read nor computed.

`depth: language`: hidden states of the language model after the layers asked for, 4/7 of them by default (16 of 28),
with DeepStack and the model's own positions (language.py). Every view is read with the instruction by itself:
attention is causal, so that of several views in one sequence the later ones alone would see the others, and views stay
separate in a build. `keep: all` (default) keeps the image's tokens and all after them, which have seen the instruction
and the image; `keep: image` those of the image, which come before the instruction and do not depend on it. With
`queries` there are query tokens at the end of the sequence, and they alone are kept.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F

from ....errors import UserError
from .. import checkpoint
from ..encoder import VisionLanguageEncoder, short
from ..pooling import average_pool
from ..preprocess import ImageSpec, preprocess
from ..spec import EncoderSpec, LoraLayers
from .language import ChatPrompt, Qwen3VLLanguage, chat_prompt, positions, text_identity
from .tower import (
    ROTARY_BASE,
    PositionTables,
    embed_patches,
    position_tables,
    rotary_base,
    rotary_frequencies,
    run_blocks,
)

VISION_PREFIX = "model.visual."
DEEPSTACK_PREFIX = "model.visual.deepstack_merger_list."
LANGUAGE_PREFIX = "model.language_model."
EMBEDDING_NAME = "model.language_model.embed_tokens.weight"
IMAGE_TOKEN = "<|image_pad|>"
CONFIG_FIELDS = (
    "depth hidden_size hidden_act intermediate_size num_heads in_channels patch_size spatial_merge_size "
    "temporal_patch_size out_hidden_size num_position_embeddings"
)


class Qwen3VLEncoder(VisionLanguageEncoder):
    """`vision` is transformers' Qwen3VLVisionModel, with the DeepStack mergers that are used; `vision.language` are the
    language layers, with depth language."""

    lora_layers = LoraLayers(
        r"blocks\.({n})\.",
        r"attn\.qkv",
        r"attn\.(qkv|proj)",
        r"mlp\.linear_fc[12]",
        r"merger\.linear_fc[12]|deepstack_merger_list\.\d+\.linear_fc[12]",
    )

    _prompt: ChatPrompt | None = None

    def __init__(self, *args: Any, prompt: ChatPrompt | None = None) -> None:
        super().__init__(*args)
        self._tables: dict[torch.device, PositionTables] = {}
        self._prompt = prompt  # with depth language
        if prompt is None:
            self.require_boundary(self.blocks, "vision tower")
        else:
            most = len(self.language.layers) - len(self.vision.deepstack_merger_list)
            self.require_boundary(most, "language model above the layers that DeepStack enters")

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
        return self._merged(self.vision.merger, hidden)  # [N,K,D]

    def vision_features(self, patches: torch.Tensor) -> list[torch.Tensor]:
        if not self.spec.deepstack:
            return super().vision_features(patches)
        merged, inner = self._tower(patches)
        return [merged, *inner]  # [N,K,D] each

    def _tower(self, patches: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Patch rows [N,S,F] -> (merged tokens [N,K,D], those of the DeepStack mergers)."""
        hidden, at, inner = embed_patches(self.vision, patches, self.tables), 0, []
        for index, merger in zip(self.vision.config.deepstack_visual_indexes, self.vision.deepstack_merger_list):
            hidden, at = run_blocks(self.vision, hidden, self.tables, at, index + 1), index + 1  # [N,S,C]
            inner.append(self._merged(merger, hidden))  # [N,K,D]
        return self.vision_upper(hidden, at), inner

    def _merged(self, merger: Any, hidden: torch.Tensor) -> torch.Tensor:
        return merger(hidden.flatten(0, 1)).reshape(len(hidden), self.image.tokens, -1)  # [N,K,D]

    def to_rows(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden[:, self.tables.row_major]  # [N,S,C]

    def from_rows(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden[:, self.tables.merge_order]  # [N,S,C]

    # --- the language model -------------------------------------------------------------------------------------------

    @property
    def language(self) -> Qwen3VLLanguage:
        """The language layers, with depth language."""
        return cast(Qwen3VLLanguage, self.vision.language)

    @property
    def prompt(self) -> ChatPrompt:
        """What the language model reads around an image, with depth language."""
        assert self._prompt is not None
        return self._prompt

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the language layers that features are made of, the last one the last."""
        return self.spec.layers or (len(self.language.layers),)

    @property
    def reads(self) -> Literal["image", "instruction", "observation"]:
        if self._prompt is None or self.spec.keep == "image":  # an image's tokens come before the instruction's
            return "image"
        return "instruction"

    @property
    def of_patches(self) -> bool:
        return self._prompt is None and super().of_patches

    @property
    def parts(self) -> int:
        if self._prompt is None:
            return 1 + len(self.vision.deepstack_merger_list)
        return len(self.layers)

    @property
    def tokens(self) -> int:
        queries = self.spec.queries or 0
        if self._prompt is not None and self.spec.boundary is not None:
            return len(self.prompt.prefix) + self.native_tokens + self.spec.prompt_tokens + queries
        return queries * self.each or super().tokens

    @property
    def width(self) -> int:
        return super().width if self.spec.boundary is None or self._prompt is None else self.text_width

    @property
    def image_span(self) -> tuple[int, int, int]:
        if self._prompt is not None and self.spec.boundary is not None:
            return len(self.prompt.prefix), self.native_tokens, 1
        return (0, 0, 1) if self.spec.queries else super().image_span

    def visible(self, instruction: str) -> int:
        if self.reads == "image" or self.spec.queries and self.spec.boundary is None:
            return self.tokens
        unused = self.spec.prompt_tokens - len(self.prompt.suffix(instruction))
        return self.tokens - unused * self.each

    def require_fits(self, views: int, instructions: Sequence[str]) -> None:
        if self._prompt is None or self.reads == "image":
            return
        longest = max(instructions, key=lambda text: len(self.prompt.suffix(text)))
        after = len(self.prompt.suffix(longest))
        total = len(self.prompt.prefix) + self.native_tokens + after + (self.spec.queries or 0)
        most = self.language.context
        if total > most:
            raise UserError(
                f"an image of {self.native_tokens} tokens with the prompt of {short(longest)} has {total} tokens, this "
                f"language model's context {most} (max_position_embeddings); use a shorter instruction or a smaller "
                "resolution"
            )
        self.require_room(longest, after)

    def encode_images(self, images: torch.Tensor | np.ndarray, instruction: str = "") -> torch.Tensor:
        patches = preprocess(images, self.image, self.device)  # [N,S,F]
        if self._prompt is None:
            return self(patches)
        self.require_fits(1, [instruction])
        image, inner = self._tower(patches)  # [N,K,D]
        n, suffix, queries = len(image), [], self.prompt.queries(self.spec.queries or 0)
        if self.reads == "instruction":
            suffix = self.prompt.suffix(instruction)
        before, after = (
            self.embed(ids).to(self.device).expand(n, -1, -1) for ids in (self.prompt.prefix, suffix + queries)
        )
        hidden, at = torch.cat([before, image, after], 1), before.shape[1]  # [N,S,D]
        where = positions(at, self._side, after.shape[1]).to(self.device)
        run = functools.partial(self.language.run, deepstack=inner, at=at, recompute=self.vision.recompute)
        count = len(self.language.layers)
        if self.spec.boundary is not None:
            hidden, _ = run(hidden, where, range(count - self.spec.boundary), ())
            return F.pad(hidden, (0, 0, 0, self.tokens - hidden.shape[1]))  # [N,S,D]
        _, states = run(hidden, where, range(count), self.layers)
        lengths = torch.full((n,), hidden.shape[1], device=self.device)
        return self.arrange([self._kept(state, lengths) for state in states])  # [N,K,D]

    def encode_upper(self, hidden: torch.Tensor, n: int, visible: torch.Tensor | None = None) -> torch.Tensor:
        if self._prompt is None:
            return super().encode_upper(hidden, n)
        count, at = len(self.language.layers), len(self.prompt.prefix)
        lengths = torch.full((len(hidden),), hidden.shape[1], device=hidden.device) if visible is None else visible
        where = positions(at, self._side, hidden.shape[1] - at - self.native_tokens).to(hidden.device)
        hidden = hidden.to(self.dtype)
        _, states = self.language.run(
            hidden, where, range(count - n, count), self.layers, (), at, self.vision.recompute
        )
        return self._kept(states[0], lengths.to(hidden.device))  # [N,K,D]

    def _kept(self, hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """What features are of the hidden states [N,S,D] of sequences of these lengths [N]."""
        at, end = len(self.prompt.prefix), len(self.prompt.prefix) + self.native_tokens
        if self.spec.queries:
            index = lengths[:, None] + torch.arange(-self.spec.queries, 0, device=hidden.device)  # [N,queries]
            return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
        image = average_pool(hidden[:, at:end], self.image_tokens)
        if self.reads == "image":
            return image
        room = self.spec.prompt_tokens
        rest = F.pad(hidden[:, end:], (0, 0, 0, room - (hidden.shape[1] - end)))  # [N,R,D]
        unused = torch.arange(room, device=hidden.device) >= lengths[:, None] - end  # [N,R]
        return torch.cat([image, rest.masked_fill(unused[..., None], 0)], 1)

    @property
    def _side(self) -> int:
        """Merged tokens of one side of an image."""
        return self.image.grid // self.image.merge_size

    def fingerprint(self) -> dict[str, Any]:
        spec, found = self.spec, super().fingerprint()
        if self._prompt is None:
            return found | ({"layers": "deepstack", "layers_as": spec.layers_as} if spec.deepstack else {})
        found |= {"depth": "language", "layers": list(self.layers), "template": self.prompt.template}
        found |= {"prompt": self.prompt.text, "prompt_tokens": spec.prompt_tokens, "queries": spec.queries}
        own = {"keep": spec.keep or "all", "layers_as": spec.layers_as}
        return found | (own if spec.boundary is None else {})


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
