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

import functools
from collections.abc import Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F

from ....errors import UserError
from ..encoder import VisionLanguageEncoder, short
from ..pooling import average_pool
from ..preprocess import preprocess
from ..spec import LoraLayers
from .language import ChatPrompt, Qwen3VLLanguage, positions
from .tower import PositionTables, embed_patches, position_tables, run_blocks


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
