"""The vision-language model as a frozen feature encoder: images to tokens, instructions to embeddings.

One module serves the cache build (frozen), fine-tuning (live, with LoRA from lora.py) and inference. qwen3vl.py and
paligemma2.py hold what is specific to a model family.

Letters: N images or observations, V views, S patches of one image, F values of one patch, C vision width, K tokens of
one image, D width of the features, Dt width of the language model and of text features (D = Dt except for
`features: patch`), n texts, Lt text tokens.

Features are what the language model would receive: image tokens after the model's own projection into its width
(`features: merged`) and rows of its embedding table for text, both on the scale of the hidden state that enters its
first layer. `features: patch` are the tokens before that projection, more of them and narrower. Nothing else of a
checkpoint is read, so a file that holds only language layers may be missing. All images of a batch have the same size,
so that every block makes one attention call.

An observation is what a robot sees at one moment: an image of each view, and the instruction. With `depth: vision` its
views are encoded separately from each other and from the text. With `depth: language` the features are hidden states of
the language model (`layers`), of its image tokens or of everything from them on (`keep`), or of query tokens after the
prompt (`queries`). `reads` says what a view's features depend on then; where that is the whole observation, its views
are encoded together. A record has room for `prompt_tokens` tokens after the image's: of its tokens only the first
`visible(instruction)` are real, the others are zeros.

With a `boundary` n the encoder stops before the last n blocks of its vision tower, or of its language layers, and
returns the hidden states that enter them, from which `encode_upper` makes the features: where only those blocks are
trained, everything below them is computed once.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn

from ...common.text import size
from ...errors import UserError
from .checkpoint import tensors_sha256
from .pooling import average_pool, check_pooling
from .preprocess import PADDING_RULE, ImageSpec, preprocess
from .spec import EncoderSpec, LoraLayers

if TYPE_CHECKING:
    from peft import PeftModel


# Raise it when this file, a family's or preprocess.py computes other features from the same weights.
ENCODER_CODE_VERSION = 1


class VisionLanguageEncoder(nn.Module):
    """The vision part and the embedding table of one checkpoint. Made by `load_encoder`; all weights frozen.

    `vision` is everything between pixels and features (LoRA goes there). `adapter` is peft's wrapper of it once LoRA
    was added, else None; it is not a submodule, since its modules are those of `vision`.
    """

    vision: Any  # a module of the family's; torch types what is in one as `Tensor | Module`
    adapter: PeftModel | None
    lora_layers: ClassVar[LoraLayers]
    text_scale: float = 1.0  # between the embedding table and the language model's first layer

    def __init__(
        self,
        spec: EncoderSpec,
        image: ImageSpec,
        vision: nn.Module,
        embedding: torch.Tensor,
        tokenizer: Any,
        weights: dict[str, Any],
    ) -> None:
        super().__init__()
        self.spec, self.image, self.tokenizer = spec, image, tokenizer
        self.vision = vision
        self.embedding = embedding  # [V,Dt] in the checkpoint's dtype; stays on the CPU: read once per instruction
        self.weights = weights  # {"sha256", "config"} for the fingerprint
        self.merged_adapter: dict[str, Any] | None = None  # identity of an adapter merged into the weights
        self.vision.recompute = False  # gradient checkpointing of its blocks
        self.set_adapter(None)
        check_pooling(self.image_tokens, self.native_tokens)

    def require_boundary(self, most: int, of: str) -> None:
        """`UserError` unless the boundary leaves out 1 to `most` blocks `of` some stack."""
        if self.spec.boundary is not None and not 1 <= self.spec.boundary <= most:
            raise UserError(
                f"--boundary {self.spec.boundary}: give the number of last blocks to leave out, 1 to {most}, of this "
                f"{of}"
            )

    # --- what a family implements ------------------------------------------------------------------------------------

    @property
    def blocks(self) -> int:
        """Number of transformer blocks of the vision tower."""
        raise NotImplementedError

    @property
    def vision_width(self) -> int:
        """C, width of the tokens before the projection."""
        raise NotImplementedError

    def vision_lower(self, patches: torch.Tensor, end: int) -> torch.Tensor:
        """Normalized patch rows [N,S,F] -> hidden states [N,S,C] that enter block `end`, in the tower's order."""
        raise NotImplementedError

    def vision_upper(self, hidden: torch.Tensor, begin: int) -> torch.Tensor:
        """Hidden states [N,S,C] that enter block `begin` -> features before pooling [N,K,D], row by row."""
        raise NotImplementedError

    def to_rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N,S,C] from the tower's order of patches to row by row."""
        return hidden

    def from_rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """Inverse of `to_rows`."""
        return hidden

    def require_fits(self, views: int, instructions: Sequence[str]) -> None:
        """`UserError` when so many views and one of these instructions exceed the model's context, or a record."""

    def require_room(self, instruction: str, after: int) -> None:
        """`UserError` when a record has no room for so many tokens `after` the image's."""
        if after > self.spec.prompt_tokens and (self.room or self.spec.boundary is not None):
            raise UserError(
                f"the prompt of {short(instruction)} has {after} tokens, a record has room for "
                f"{self.spec.prompt_tokens}; build the cache with --prompt-tokens {after} or more, or give a shorter "
                "instruction"
            )

    # --- what all share -----------------------------------------------------------------------------------------------

    def contents(self) -> str:
        """What was read of the checkpoint, and its bytes in memory, for people."""
        layers, text = self.language_layers, self.weights["config"].get("text", {})
        of = f"{layers} of {text['num_hidden_layers']} language layers, " if layers else ""
        tensors = (*self.parameters(), self.embedding)
        return f"{of}{self.blocks} vision blocks: {size(sum(t.nbytes for t in tensors))}"

    def set_adapter(self, adapter: PeftModel | None) -> None:
        """Remember peft's wrapper without registering it: its modules are those of `vision`."""
        object.__setattr__(self, "adapter", adapter)

    def adapted(self) -> dict[str, Any] | None:
        """Identity of the fine-tuning in these weights: the adapter, on those merged before; None without any."""
        if self.adapter is None:
            return self.merged_adapter
        return adapter_identity(self.adapter) | ({"on": self.merged_adapter} if self.merged_adapter else {})

    @property
    def reads(self) -> Literal["image", "instruction", "observation"]:
        """What the features of a view depend on: its image; also the instruction; also the other views."""
        return "image"

    @property
    def by_observation(self) -> bool:
        """Whether all views of an observation are encoded together."""
        return self.reads == "observation"

    def visible(self, instruction: str) -> int:
        """How many of a record's tokens, the first, are real for this instruction."""
        return self.tokens

    @property
    def language_layers(self) -> int:
        """Number of layers read of the language model, `vision.language.layers`; 0 with depth vision."""
        language = getattr(self.vision, "language", None)
        return 0 if language is None else len(language.layers)

    @property
    def of_patches(self) -> bool:
        """Whether the output has one vision-tower token per patch."""
        return self.spec.features == "patch" or self.spec.boundary is not None

    @property
    def native_tokens(self) -> int:
        """Tokens of one image before pooling."""
        return self.image.grid**2 if self.of_patches else self.image.tokens

    def unpooled(self) -> VisionLanguageEncoder:
        """The same encoder, on the same weights, with all tokens of an image."""
        full = copy.copy(self)
        full.spec = dataclasses.replace(self.spec, tokens=None)
        return full

    def at_boundary(self, n: int) -> VisionLanguageEncoder:
        """The same encoder, on the same weights, stopped before its last n blocks."""
        lower = copy.copy(self)
        lower.spec = dataclasses.replace(self.spec, boundary=n, tokens=None, features="merged", keep=None)
        return lower

    @property
    def image_tokens(self) -> int:
        """Tokens of one image in each layer: the model's own, or fewer when they are pooled."""
        return self.native_tokens if self.spec.tokens is None else self.spec.tokens

    @property
    def pools(self) -> bool:
        """Whether tokens of an image are averaged."""
        return self.image_tokens < self.native_tokens

    @property
    def image_span(self) -> tuple[int, int, int]:
        """(first, count, each): where in a record the tokens of the image are, `each` of as many layers in turn."""
        return 0, self.image_tokens, self.each

    @property
    def parts(self) -> int:
        """Layers that features are made of."""
        return 1

    @property
    def each(self) -> int:
        """Tokens of a record for each token of the sequence: as many as layers, where these are tokens."""
        return self.parts if self.spec.layers_as == "tokens" else 1

    @property
    def room(self) -> int:
        """Tokens of the sequence that a record has room for after the image's."""
        return self.spec.prompt_tokens if self.reads == "instruction" and not self.spec.queries else 0

    @property
    def tokens(self) -> int:
        """K, tokens of one view's record."""
        return (self.image_tokens + self.room) * self.each

    @property
    def width(self) -> int:
        """D, width of image features; of hidden states with a boundary."""
        if self.of_patches:
            return self.vision_width
        return self.text_width * (self.parts if self.spec.layers_as == "width" else 1)

    @property
    def text_width(self) -> int:
        """Dt, width of text features: the language model's."""
        return self.embedding.shape[1]

    @property
    def device(self) -> torch.device:
        return next(self.vision.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the computation and of all features returned."""
        return next(self.vision.parameters()).dtype

    def encode_images(self, images: torch.Tensor | np.ndarray, instruction: str = "") -> torch.Tensor:
        """uint8 RGB [N,H,W,3] of one view, with one instruction -> features [N,K,D].

        Builds a graph only for weights that require gradients."""
        return self(preprocess(images, self.image, self.device))

    def encode_upper(self, hidden: torch.Tensor, n: int, visible: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states [N,S,C] that enter the last n blocks, from `at_boundary(n)` -> features [N,K,D].

        `visible` [N] int64: how many tokens of each record are real, where that differs."""
        features = self.vision_upper(self.from_rows(hidden.to(self.dtype)), self.blocks - n)  # [N,K',D]
        return average_pool(features, self.image_tokens)  # [N,K,D]

    def encode_observation(self, views: Sequence[torch.Tensor | np.ndarray], instruction: str) -> torch.Tensor:
        """Images of each view, uint8 RGB [N,H,W,3], and their one instruction -> features [N,V,K,D]."""
        return torch.stack([self.encode_images(view, instruction) for view in views], 1)

    def arrange(self, layers: Sequence[torch.Tensor]) -> torch.Tensor:
        """Features [N,K,D] of each layer -> [N,K,n·D], or [N,K·n,D] with the layers of a token beside each other."""
        if len(layers) == 1:
            return layers[0]
        return (
            torch.cat(list(layers), -1)
            if self.spec.layers_as == "width"
            else torch.stack(list(layers), 2).flatten(1, 2)
        )

    def of_image(self, features: torch.Tensor) -> torch.Tensor:
        """The image's tokens of features [N,K,D], layers side by side: [N,K',n·D]."""
        if self.spec.layers_as == "tokens" and self.parts > 1:
            features = features.unflatten(1, (-1, self.parts)).flatten(2)
        return features[:, : self.image_tokens]

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Patch rows [N,S,F] from `preprocess` -> features [N,K,D]; hidden states [N,S,C] with a boundary."""
        if self.spec.boundary is not None:
            return self.to_rows(self.vision_lower(patches, self.blocks - self.spec.boundary))  # [N,S,C]
        return self.arrange([average_pool(layer, self.image_tokens) for layer in self.vision_features(patches)])

    def vision_features(self, patches: torch.Tensor) -> list[torch.Tensor]:
        """Normalized patch rows [N,S,F] -> features before pooling [N,K,D], row by row, of each layer of the tower."""
        return [self.vision_upper(self.vision_lower(patches, self.blocks), self.blocks)]  # [N,K,D]

    def encode_text(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Instructions -> (embeddings [n,Lt,Dt] padded with zeros, lengths [n] int64), on the encoder's device.

        No special tokens are added; an empty instruction is the one pad token, so that every length is at least 1.
        """
        tokenizer = self.tokenizer
        rows = [tokenizer(text, add_special_tokens=False)["input_ids"] or [tokenizer.pad_token_id] for text in texts]
        lengths = torch.tensor([len(r) for r in rows], dtype=torch.int64)  # [n]
        out = torch.zeros(len(rows), int(lengths.max()) if rows else 0, self.text_width, dtype=self.dtype)  # [n,Lt,Dt]
        for i, row in enumerate(rows):
            out[i, : len(row)] = self.embed(row)
        return out.to(self.device), lengths.to(self.device)

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        """Token ids [Lt] -> input of the language model's first layer [Lt,Dt], on the CPU, rounded as there."""
        return self.embedding[list(ids)].to(self.dtype) * torch.tensor(self.text_scale, dtype=self.dtype)

    @torch.no_grad()
    def null_image_features(self, views: int) -> torch.Tensor:
        """Features [V,K,D] of black images and, where it matters, no instruction: the null embedding."""
        side = self.image.resolution
        return self.encode_observation([torch.zeros(1, side, side, 3, dtype=torch.uint8)] * views, "")[0]

    def fingerprint(self) -> dict[str, Any]:
        """Everything the features depend on, as JSON values: equal fingerprints, equal features (up to rounding)."""
        image = self.image
        boundary = self.spec.boundary
        kind = {"features": self.spec.features} if boundary is None else {"features": "hidden", "boundary": boundary}
        return {
            "code_version": ENCODER_CODE_VERSION,
            "vlm": self.spec.vlm,
            **kind,
            "tokens": self.tokens,
            "weights_sha256": self.weights["sha256"],
            "vision_config": self.weights["config"],
            "resolution": image.resolution,
            "padding": PADDING_RULE,
            "resize": "bicubic-antialias",
            "image_mean": list(image.mean),
            "image_std": list(image.std),
            "dtype": str(self.dtype).removeprefix("torch."),
            "adapter": self.adapted(),
        }


def short(instruction: str) -> str:
    """An instruction for messages, in quotes."""
    return f"'{instruction[:60]}…'" if len(instruction) > 60 else f"'{instruction}'"


def adapter_identity(adapter: PeftModel) -> dict[str, Any]:
    """What a LoRA adapter adds to the features: its current weights and its scaling."""
    lora = {name: p for name, p in adapter.named_parameters() if "lora_" in name}
    config: Any = adapter.peft_config["default"]  # a LoraConfig
    return {"sha256": tensors_sha256(lora), "scaling": config.lora_alpha / config.r}
