"""The first layers of Qwen3-VL's language model, on transformers' own modules, and the chat prompt that they read.

One image and the instruction make a sequence, as the checkpoint's chat template has them:

    <|im_start|>user\\n<|vision_start|>                                      prefix
    [K image tokens]
    <|vision_end|>instruction<|im_end|>\\n<|im_start|>assistant\\n            suffix

Attention is causal, so tokens added on the right change nothing on their left, and image tokens do not see the
instruction: tokens after them see both. DeepStack features of the vision tower are added to the image tokens after each
of the first layers. Positions have three axes (M-RoPE): text counts on all three, the K tokens of an image keep the
first and count rows and columns.

Letters: N images, S tokens of the sequence, K image tokens of a square, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ....common.documents import Form, read_json, shown
from ....common.fingerprint import digest
from ....common.hashing import mix
from ....errors import UserError
from ..blocks import through
from ..checkpoint import without_code

PLACEHOLDER = "{instruction}"
KEPT = 256  # instructions whose token ids are remembered: acting and training ask for them at every step
TEXT_FIELDS = (
    "head_dim hidden_act hidden_size intermediate_size num_attention_heads num_hidden_layers num_key_value_heads "
    "rms_norm_eps"
)


class Qwen3VLLanguage(nn.Module):
    """The first `count` layers of a language model, and its last norm where these are all of them."""

    layers: Any
    rotary_emb: Any

    def __init__(self, config: Any, count: int) -> None:
        from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen

        super().__init__()
        self.context: int = config.max_position_embeddings  # most tokens of a sequence
        config._attn_implementation = "sdpa"  # causal where no mask is given
        self.layers = nn.ModuleList(qwen.Qwen3VLTextDecoderLayer(config, i) for i in range(count))
        self.rotary_emb = qwen.Qwen3VLTextRotaryEmbedding(config)
        self.norm = (
            qwen.Qwen3VLTextRMSNorm(config.hidden_size, eps=config.rms_norm_eps) if self.is_whole(config) else None
        )

    def is_whole(self, config: Any) -> bool:
        """Whether no layer is left out."""
        return len(self.layers) == config.num_hidden_layers

    def rebuild_buffers(self, config: Any, device: torch.device) -> None:
        """Make the rotary frequencies, buffers that a state dict does not hold."""
        self.rotary_emb = type(self.rotary_emb)(config=config).to(device)

    def run(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        layers: range,
        wanted: Sequence[int],
        deepstack: Sequence[torch.Tensor],
        at: int,
        recompute: bool,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Hidden states [N,S,D] through some of the layers -> (what leaves the last of them, what left each `wanted`).

        Args:
            positions: [3,S] int64.
            wanted: numbers of layers, 1 for the first; of the model's last one it is the norm's output.
            deepstack: [N,K,D] each, added after the first layers to the image tokens, which begin `at` there.
        """
        rotary = self.rotary_emb(hidden, positions[:, None])

        def through_layer(layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
            out = layer(hidden, position_embeddings=rotary, attention_mask=None)
            return out[0] if isinstance(out, tuple) else out  # [N,S,D]

        found = []
        for i in layers:
            hidden = through(self.layers[i : i + 1], through_layer, hidden, recompute)  # [N,S,D]
            if i < len(deepstack):
                end = at + deepstack[i].shape[1]
                hidden = torch.cat([hidden[:, :at], hidden[:, at:end] + deepstack[i], hidden[:, end:]], 1)
            if i + 1 in wanted:
                found.append(hidden if self.norm is None or i + 1 < len(self.layers) else self.norm(hidden))
        return hidden, found


def positions(before: int, side: int, after: int) -> torch.Tensor:
    """int64 [3,S] of `before` text tokens, an image of `side` x `side` tokens and `after` text tokens."""
    row = torch.arange(side).repeat_interleave(side) + before  # [K]
    column = torch.arange(side).repeat(side) + before
    image = torch.stack([torch.full_like(row, before), row, column])  # [3,K]
    first, last = torch.arange(before), torch.arange(after) + before + side
    return torch.cat([first.expand(3, -1), image, last.expand(3, -1)], 1)


@dataclass(frozen=True)
class ChatPrompt:
    """What the chat template puts around an image and an instruction."""

    tokenizer: Any
    before: str  # up to the image
    after: str  # after it, with a placeholder for the instruction
    template: str  # sha256 of the template

    @property
    def text(self) -> str:
        """The prompt with placeholders."""
        return f"{self.before}{{image}}{self.after}"

    @functools.cached_property
    def prefix(self) -> list[int]:
        """Token ids before the image's."""
        return self._ids(self.before)

    def suffix(self, instruction: str) -> list[int]:
        """Token ids after the image's; not to be changed, since those of the last instructions are remembered."""
        return self._suffix(instruction)

    @functools.cached_property
    def _suffix(self) -> Callable[[str], list[int]]:
        return functools.lru_cache(KEPT)(lambda text: self._ids(self.after.replace(PLACEHOLDER, text)))

    def queries(self, count: int) -> list[int]:
        """Token ids of query tokens: ordinary ones, always the same, so that their embeddings are of a usual kind."""
        return [int(mix(0, i)) % self.tokenizer.vocab_size for i in range(count)]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # lengths are checked here


class _TemplateForm(Form, extra="ignore"):
    """chat_template.json, where earlier processors keep the template."""

    chat_template: str


def chat_prompt(folder: Path, tokenizer: Any, image: str) -> ChatPrompt:
    """The prompt of a checkpoint whose tokenizer calls an image's token `image`. `UserError` without a template, or for
    one that does not put the image before the instruction."""
    template = tokenizer.chat_template
    if not isinstance(template, str) and (folder / "chat_template.json").exists():
        template = read_json(folder / "chat_template.json", _TemplateForm, "download it again")["chat_template"]
    if not isinstance(template, str):
        raise UserError(
            f"{folder} has no chat template (chat_template.jinja, chat_template.json or in tokenizer_config.json), "
            "which depth language needs; copy it from the original checkpoint, or use --depth vision"
        )
    content = [{"type": "image"}, {"type": "text", "text": PLACEHOLDER}]
    with without_code(folder):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=template, tokenize=False, add_generation_prompt=True
        )
    before, _, after = text.partition(image)
    if image in after or after.count(PLACEHOLDER) != 1:
        raise UserError(
            f"{folder}: its chat template makes {shown(text)} of an image and an instruction; depth language needs one "
            "image token and then the instruction; use --depth vision"
        )
    return ChatPrompt(tokenizer, before, after, digest({"template": template}))


def text_identity(config: Any) -> dict[str, object]:
    """The fields of a text config that hidden states depend on: the same in every transformers version. `UserError` for
    rotary positions of another kind than Qwen3-VL's."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    section = rope.get("mrope_section", [24, 20, 20])
    if rope.get("rope_type", rope.get("type", "default")) != "default" or 2 * sum(section) != config.head_dim:
        raise UserError(
            f"text_config has rotary positions {shown(rope)} for heads of width {config.head_dim}; Qwen3-VL has the "
            "default ones, in sections that fill half a head"
        )
    base: Any = rope.get("rope_theta") or getattr(config, "rope_theta", 5000000.0)
    return {name: getattr(config, name) for name in TEXT_FIELDS.split()} | {
        "rope_theta": float(base),
        "mrope_section": list(section),
    }
