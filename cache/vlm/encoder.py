"""The vision-language model as a frozen feature encoder: pictures to tokens, instructions to embeddings.

One module serves the cache build (frozen), fine-tuning (live, with LoRA from `cache.lora`) and inference. What all families share is
here; `cache.qwen3vl` and `cache.paligemma2` hold the rest.

Letters: N images or observations, V views, S patches of one image, F values of one patch, C vision width, K tokens of one image, D width
of the features, Dt width of the language model (= of text features; D = Dt but for `features: patch`), n texts, Lt text tokens.

Features are what the language model would be given: image tokens after the model's own projection into its width (`features: merged`),
text as rows of its embedding table, both on the scale of the hidden state that enters its first layer. `features: patch` are the tokens
before that projection: more of them and narrower. Nothing else of a checkpoint is read: a file that holds only language layers may be
missing. All images of a batch have the same size, so that every block makes one attention call.

An observation is what a robot sees at one moment: a picture of each view, and the instruction. With `depth: vision` its views are encoded
apart and the text has no part in it; with `depth: language` features of a view depend on the other views and on the instruction, so that
an observation can only be encoded as a whole (`by_observation`).

With a `boundary` n the encoder stops before the last n blocks of its vision tower and gives the hidden states [S,C] that enter them:
`encode_lower`, of which `encode_upper` makes the features. Where only those blocks learn, what lies below them is computed once.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import nn

from ...errors import UserError
from .checkpoint import tensors_sha256
from .pooling import average_pool, check_pooling
from .preprocess import PADDING_RULE, ImageSpec, preprocess
from .spec import EncoderSpec, LoraLayers

if TYPE_CHECKING:
    from peft import PeftModel


# Raise it when this file, a family's, vision_tower.py or preprocess.py computes other features from the same weights.
ENCODER_CODE_VERSION = 1


class VisionLanguageEncoder(nn.Module):
    """The vision part and the embedding table of one checkpoint. Made by `load_encoder`; all weights frozen.

    `vision` is everything between pixels and features (LoRA goes there). `adapter` is peft's wrapper of it once LoRA was added, else
    None; it is set by `cache.lora` and is not a submodule, since its modules are those of `vision`.
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
        self.merged_adapter: dict[str, Any] | None = None  # of an adapter that was merged into the weights
        self.vision.recompute = False  # gradient checkpointing of its blocks (recompute.py)
        self.set_adapter(None)
        if spec.boundary is not None and not 1 <= spec.boundary <= self.blocks:
            raise UserError(
                f"--boundary {spec.boundary}: the vision tower has {self.blocks} blocks; give the number of last ones to leave out, 1 to {self.blocks}"
            )
        check_pooling(self.tokens, self.native_tokens)

    # --- what a family adds -------------------------------------------------------------------------------------------

    @property
    def blocks(self) -> int:
        """Number of transformer blocks of the vision tower."""
        raise NotImplementedError

    @property
    def vision_width(self) -> int:
        """C, width of the tokens before the projection."""
        raise NotImplementedError

    def vision_lower(self, patches: torch.Tensor, end: int) -> torch.Tensor:
        """Normalised patch rows [N,S,F] -> hidden states [N,S,C] that enter block `end`, in the tower's own order (see `to_rows`)."""
        raise NotImplementedError

    def vision_upper(self, hidden: torch.Tensor, begin: int) -> torch.Tensor:
        """Hidden states [N,S,C] that enter block `begin`, in the tower's own order -> features before pooling [N,K,D], row by row."""
        raise NotImplementedError

    def to_rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N,S,C] from the tower's own order of patches to row by row."""
        return hidden

    def from_rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """Inverse of `to_rows`."""
        return hidden

    def require_fits(self, views: int, instructions: Sequence[str]) -> None:
        """`UserError` when an observation of so many views and one of these instructions is more than the model reads at once."""

    # --- what all share -----------------------------------------------------------------------------------------------

    def set_adapter(self, adapter: PeftModel | None) -> None:
        """Remember peft's wrapper without registering it: its modules are those of `vision`."""
        object.__setattr__(self, "adapter", adapter)

    def adapted(self) -> dict[str, Any] | None:
        """What features owe to fine-tuning: the adapter that works now, on those that were merged before; None without any."""
        if self.adapter is None:
            return self.merged_adapter
        return adapter_identity(self.adapter) | ({"on": self.merged_adapter} if self.merged_adapter else {})

    @property
    def by_observation(self) -> bool:
        """Whether features of a view depend on the other views and on the instruction."""
        return self.spec.depth == "language"

    @property
    def of_patches(self) -> bool:
        """Whether what is given are tokens of the vision tower, one for each patch."""
        return self.spec.features == "patch" or self.spec.boundary is not None

    @property
    def native_tokens(self) -> int:
        """Tokens of one image before pooling."""
        return self.image.grid**2 if self.of_patches else self.image.tokens

    def unpooled(self) -> VisionLanguageEncoder:
        """The same encoder, on the same weights, with all tokens of an image."""
        whole = copy.copy(self)
        whole.spec = dataclasses.replace(self.spec, tokens=None)
        return whole

    def at_boundary(self, n: int) -> VisionLanguageEncoder:
        """The same encoder, on the same weights, stopping before its last n blocks."""
        lower = copy.copy(self)
        lower.spec = dataclasses.replace(self.spec, boundary=n, tokens=None, features="merged", depth="vision")
        return lower

    @property
    def tokens(self) -> int:
        """K, tokens of one image: the model's own, or fewer when they are pooled."""
        return self.native_tokens if self.spec.tokens is None else self.spec.tokens

    @property
    def width(self) -> int:
        """D, width of image features; of hidden states with a boundary."""
        return self.vision_width if self.of_patches else self.text_width

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

    def encode_images(self, images: torch.Tensor | np.ndarray) -> torch.Tensor:
        """uint8 RGB [N,H,W,3] -> features [N,K,D]. Builds a graph only for weights that require gradients."""
        return self(preprocess(images, self.image, self.device))

    def encode_lower(self, images: torch.Tensor | np.ndarray, n: int) -> torch.Tensor:
        """uint8 RGB [N,H,W,3] -> hidden states [N,S,C] that enter the last n blocks, row by row."""
        return self.at_boundary(n).encode_images(images)

    def encode_upper(self, hidden: torch.Tensor, n: int) -> torch.Tensor:
        """Hidden states [N,S,C] that enter the last n blocks -> features [N,K,D]: `encode_images` is `encode_lower`, then this."""
        features = self.vision_upper(self.from_rows(hidden.to(self.dtype)), self.blocks - n)  # [N,K',D]
        return average_pool(features, self.tokens)  # [N,K,D]

    def encode_observation(self, views: Sequence[torch.Tensor | np.ndarray], instruction: str) -> torch.Tensor:
        """Pictures of each view, uint8 RGB [N,H,W,3] (sizes may differ between views), and the one instruction of these N observations
        -> features [N,V,K,D]."""
        return torch.stack([self.encode_images(view) for view in views], 1)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Normalised patch rows [N,S,F] (from `preprocess`) -> features [N,K,D]; hidden states [N,S,C] with a boundary."""
        if self.spec.boundary is not None:
            return self.to_rows(self.vision_lower(patches, self.blocks - self.spec.boundary))  # [N,S,C]
        return average_pool(self.vision_features(patches), self.tokens)  # [N,K,D]

    def vision_features(self, patches: torch.Tensor) -> torch.Tensor:
        """Normalised patch rows [N,S,F] -> features before pooling [N,K,D], row by row."""
        return self.vision_upper(self.vision_lower(patches, self.blocks), self.blocks)  # [N,K,D]

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
        """Token ids [Lt] -> what enters the language model's first layer [Lt,Dt], on the CPU; rounded as transformers does."""
        return self.embedding[list(ids)].to(self.dtype) * torch.tensor(self.text_scale, dtype=self.dtype)

    @torch.no_grad()
    def null_image_features(self, views: int) -> torch.Tensor:
        """Features [V,K,D] of black pictures of all views, and of no instruction where features depend on it: the stand-in for masked ones."""
        side = self.image.resolution
        return self.encode_observation([torch.zeros(1, side, side, 3, dtype=torch.uint8)] * views, "")[0]

    def fingerprint(self) -> dict[str, Any]:
        """Everything the features depend on, as JSON values: equal fingerprints, equal features (up to rounding)."""
        image = self.image
        kind = (
            {"features": self.spec.features}
            if self.spec.boundary is None
            else {"features": "hidden", "boundary": self.spec.boundary}
        )
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


def adapter_identity(adapter: PeftModel) -> dict[str, Any]:
    """What a LoRA adapter adds to the features: its weights (as they are now) and its scaling."""
    lora = {name: p for name, p in adapter.named_parameters() if "lora_" in name}
    config: Any = adapter.peft_config["default"]  # a LoraConfig
    return {"sha256": tensors_sha256(lora), "scaling": config.lora_alpha / config.r}
