"""PaliGemma 2 as an encoder: SigLIP, the multi-modal projector, and on request Gemma 2, on transformers' own modules.

Letters: N images or observations, V views, S patches of one image = its tokens K (SigLIP has no class token), F values
of one patch, C vision width, A heads, E head width, D language width, Lt prompt tokens.

`depth: vision` (default) with `features: merged`: the projector's output, [S,D], which is what Gemma's first layer sees
and what `get_image_features` returns from transformers 5.4 on. Earlier versions divide it by sqrt(D), and the language
model multiplies all embeddings by sqrt(D) again (one more rounding, left out here). Text features are embedding rows
times sqrt(D), on the same scale. `features: patch`: SigLIP's output after its last LayerNorm, [S,C]. At another
resolution than the checkpoint's own, SigLIP's learned positions are interpolated as transformers does.

`depth: language`: the last hidden state of Gemma 2 (after its final norm) over the image tokens of all views, with the
instruction appended once: <image>·V·K <bos> instruction \\n, every token attending to every other, as in PaliGemma's
prefix. Features of one view then depend on the other views and on the instruction, so they are encoded by observation
(`encode_observation`), not by image. LoRA still goes into SigLIP (and the projector); its gradient comes through
Gemma's layers, which stay frozen.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ...common.documents import shown
from ...errors import UserError
from . import checkpoint
from .blocks import attention, through
from .encoder import VisionLanguageEncoder
from .pooling import average_pool
from .preprocess import ImageSpec, preprocess
from .spec import EncoderSpec, LoraLayers

EMBEDDING_NAME = "language_model.model.embed_tokens.weight"
VISION_PREFIXES = ("vision_tower.", "multi_modal_projector.")
HEAD_PREFIX = "vision_tower.vision_model.head."  # SigLIP's pooling head, which PaliGemma does not use
LANGUAGE_PREFIX = "language_model.model."
# (stored name, name on the hub): newer transformers store "model.…" without the inner "model." or "vision_model."
LAYOUTS = (
    (r"^(model\.)?vision_tower\.(vision_model\.)?", "vision_tower.vision_model."),
    (r"^(model\.)?multi_modal_projector\.", "multi_modal_projector."),
    (r"^(model\.)?language_model\.(model\.)?", LANGUAGE_PREFIX),
)
VISION_FIELDS = (
    "hidden_size hidden_act image_size intermediate_size layer_norm_eps num_attention_heads num_channels "
    "num_hidden_layers patch_size"
)
TEXT_FIELDS = (
    "attn_logit_softcapping head_dim hidden_activation hidden_size intermediate_size num_attention_heads "
    "num_hidden_layers num_key_value_heads query_pre_attn_scalar rms_norm_eps"
)


class PaliGemmaVision(nn.Module):
    """SigLIP and the projector, with modules named as the hub's tensors are."""

    vision_tower: Any  # modules that only name what is in them
    multi_modal_projector: Any
    recompute: bool  # gradient checkpointing of SigLIP's layers; the encoder sets it

    def __init__(self, config: Any, out_width: int) -> None:
        from transformers.models.siglip.modeling_siglip import SiglipVisionModel

        super().__init__()
        tower = SiglipVisionModel(config)
        self.vision_tower, self.multi_modal_projector = nn.Module(), nn.Module()
        self.vision_tower.vision_model = getattr(tower, "vision_model", tower)
        self.multi_modal_projector.linear = nn.Linear(config.hidden_size, out_width)

    @property
    def siglip(self) -> Any:
        """transformers' vision transformer."""
        return self.vision_tower.vision_model

    def rebuild_buffers(self, device: torch.device) -> None:
        """Make the position indices, buffers that a state dict does not hold."""
        embeddings = self.siglip.embeddings
        for name, buffer in list(embeddings.named_buffers()):
            setattr(embeddings, name, torch.arange(buffer.shape[-1], device=device).expand(1, -1))

    def lower(self, patches: torch.Tensor, end: int) -> torch.Tensor:
        """Normalized patch rows [N,S,F], row by row -> hidden states that enter layer `end` [N,S,C]."""
        conv = self.siglip.embeddings.patch_embedding  # stride = kernel: one matrix product
        hidden = F.linear(patches.to(conv.weight.dtype), conv.weight.flatten(1), conv.bias)  # [N,S,C]
        hidden = hidden + self._positions(patches.shape[1])  # [N,S,C]
        return self._run(hidden, 0, end)  # [N,S,C]

    def upper(self, hidden: torch.Tensor, begin: int) -> torch.Tensor:
        """Hidden states that enter layer `begin` [N,S,C] -> SigLIP's output after its last LayerNorm [N,S,C]."""
        hidden = self._run(hidden, begin, len(self.siglip.encoder.layers))  # [N,S,C]
        return self.siglip.post_layernorm(hidden)  # [N,S,C]

    def _run(self, hidden: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        def run(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
            hidden = hidden + _attend(layer.self_attn, layer.layer_norm1(hidden))  # [N,S,C]
            return hidden + layer.mlp(layer.layer_norm2(hidden))  # [N,S,C]

        return through(self.siglip.encoder.layers[begin:end], run, hidden, self.recompute)

    def _positions(self, patches: int) -> torch.Tensor:
        """Learned positions [S,C] of a square image of S patches."""
        learned = self.siglip.embeddings.position_embedding.weight  # [S0,C]
        if patches == len(learned):
            return learned
        side, target = int(len(learned) ** 0.5), int(patches**0.5)
        grid = learned.T.reshape(1, -1, side, side)  # [1,C,side,side]
        return F.interpolate(grid, (target, target), mode="bicubic", align_corners=False)[0].flatten(1).T


def _attend(attn: Any, x: torch.Tensor) -> torch.Tensor:
    """Self-attention of SigLIP: [N,S,C] -> [N,S,C], one call for all images."""
    q, k, v = (
        layer(x).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
        for layer in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    return attn.out_proj(attention(q, k, v).transpose(1, 2).flatten(2))  # q, k, v [N,A,S,E]


class PaliGemma2Encoder(VisionLanguageEncoder):
    """`language` is transformers' Gemma2Model without its embedding table, only with `depth: language`."""

    vision: PaliGemmaVision
    language: Any  # None with depth vision
    lora_layers = LoraLayers(
        r"vision_tower\.vision_model\.encoder\.layers\.({n})\.",
        r"self_attn\.(q|v)_proj",
        r"self_attn\.(q|k|v|out)_proj",
        r"mlp\.fc[12]",
        r"multi_modal_projector\.linear",
    )

    def __init__(self, *args: Any, language: nn.Module | None = None) -> None:
        super().__init__(*args)
        self.language = language
        self.text_scale = self.text_width**0.5
        self.require_boundary(self.blocks, "vision tower")

    @property
    def reads(self) -> Literal["image", "instruction", "observation"]:
        return "image" if self.language is None else "observation"

    @property
    def blocks(self) -> int:
        return len(self.vision.siglip.encoder.layers)

    @property
    def language_layers(self) -> int:
        return 0 if self.language is None else len(self.language.layers)

    @property
    def vision_width(self) -> int:
        return self.vision.multi_modal_projector.linear.in_features

    def vision_lower(self, patches: torch.Tensor, end: int) -> torch.Tensor:
        return self.vision.lower(patches, end)  # [N,S,C]

    def vision_upper(self, hidden: torch.Tensor, begin: int) -> torch.Tensor:
        hidden = self.vision.upper(hidden, begin)  # [N,S,C]
        return hidden if self.spec.features == "patch" else self.vision.multi_modal_projector.linear(hidden)  # [N,S,D]

    def encode_images(self, images: torch.Tensor | np.ndarray, instruction: str = "") -> torch.Tensor:
        if self.language is not None:
            raise UserError(
                "use encode_observation, or depth vision: depth language makes features of all views of a frame and "
                "the instruction together, not of single images"
            )
        return super().encode_images(images, instruction)

    def encode_observation(self, views: Sequence[torch.Tensor | np.ndarray], instruction: str) -> torch.Tensor:
        """As `VisionLanguageEncoder`. `UserError` when views and prompt exceed the model's context."""
        if self.language is None:
            return super().encode_observation(views, instruction)
        images = [self.vision_features(preprocess(view, self.image, self.device)) for view in views]  # V times [N,S,D]
        seen = self._read(torch.cat(images, 1), self.embed(self.prompt(instruction)))  # [N,V*S,D]
        return torch.stack([average_pool(part, self.tokens) for part in seen.chunk(len(images), 1)], 1)  # [N,V,K,D]

    def require_fits(self, views: int, instructions: Sequence[str]) -> None:
        if self.language is not None:
            self._require_length(views * self.native_tokens, max(len(self.prompt(text)) for text in instructions))

    def prompt(self, instruction: str) -> list[int]:
        """Token ids after the image tokens, as PaliGemmaProcessor makes them."""
        return self.tokenizer(f"{self.tokenizer.bos_token}{instruction}\n", add_special_tokens=False)["input_ids"]

    def _read(self, images: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Image tokens [N,V*S,D] and one prompt [Lt,D] through Gemma 2 -> [N,V*S,D]."""
        self._require_length(images.shape[1], len(text))
        hidden = torch.cat([images, text.to(images.device).expand(len(images), -1, -1)], 1)  # [N,V*S+Lt,D]
        positions = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)[None]  # counted from 1
        rotary = self.language.rotary_emb(hidden, positions)

        def run(layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:  # no mask: every token sees every other
            out = layer(hidden, position_embeddings=rotary, attention_mask=None, position_ids=positions)
            return out[0] if isinstance(out, tuple) else out  # [N,V*S+Lt,D]

        hidden = through(self.language.layers, run, hidden, self.vision.recompute)  # [N,V*S+Lt,D]
        return self.language.norm(hidden)[:, : images.shape[1]]  # [N,V*S,D]

    def _require_length(self, images: int, prompt: int) -> None:
        longest = self.language.config.max_position_embeddings
        if images + prompt > longest:
            raise UserError(
                f"{images} image tokens and a prompt of {prompt} are more than the {longest} tokens of this language "
                "model's context; use fewer views or a smaller resolution"
            )

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | {"depth": self.spec.depth}


# --- loading ---------------------------------------------------------------------------------------------------------


def load(spec: EncoderSpec, device: torch.device, dtype: torch.dtype) -> PaliGemma2Encoder:
    """See `load_encoder`."""

    reads_language = spec.depth == "language"
    needed = functools.partial(canonical, language=reads_language)
    folder = checkpoint.checkpoint_folder(spec.path, spec.revision, lambda _: needed)
    checkpoint.require_model_type(folder, spec.path, spec.vlm, "paligemma")
    checkpoint.require_model_type(folder, spec.path, spec.vlm, "gemma2", "text_config")
    config = copy.deepcopy(checkpoint.load_config(folder))
    image = ImageSpec(spec.resolution, config.vision_config.patch_size, 1, 1, *checkpoint.image_statistics(folder))
    if config.vision_config.hidden_size % config.vision_config.num_attention_heads:
        raise UserError(f"{folder}/config.json is damaged: vision_config.hidden_size is no multiple of its heads")
    config.vision_config.vision_use_head = False
    modules: dict[str, nn.Module] = {}  # on the meta device

    def expected(header: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        table = header[EMBEDDING_NAME]
        with checkpoint.without_code(folder), torch.device("meta"):
            modules["vision"] = PaliGemmaVision(config.vision_config, table.shape[1])
            if reads_language:
                modules["language"] = _language(config.text_config)
        own = {LANGUAGE_PREFIX + n: t for n, t in modules["language"].state_dict().items()} if reads_language else {}
        rows = torch.empty(config.text_config.vocab_size, table.shape[1], device="meta")
        return modules["vision"].state_dict() | own | {EMBEDDING_NAME: rows}

    tensors = checkpoint.read_tensors(folder, needed, "PaliGemma 2", EMBEDDING_NAME, expected)
    weights = {"sha256": checkpoint.tensors_sha256(tensors), "config": _config_identity(config, reads_language)}
    embedding = tensors.pop(EMBEDDING_NAME)
    vision = cast(PaliGemmaVision, modules["vision"])
    checkpoint.assign_tensors(
        vision, {n: t for n, t in tensors.items() if n.startswith(VISION_PREFIXES)}, device, dtype, spec.path
    )
    vision.rebuild_buffers(device)
    checkpoint.require_filled(vision)
    language: Any = modules.get("language")
    if language is not None:
        own = {n.removeprefix(LANGUAGE_PREFIX): t for n, t in tensors.items() if n.startswith(LANGUAGE_PREFIX)}
        checkpoint.assign_tensors(language, own, device, dtype, spec.path)
        buffers = type(language.rotary_emb)(config=config.text_config)  # in no state dict
        language.rotary_emb = buffers.to(device)
        checkpoint.require_filled(language)
    tokenizer = checkpoint.load_tokenizer(folder, spec.path, len(embedding))
    if reads_language and not isinstance(tokenizer.bos_token, str):
        raise UserError(f"{folder} is damaged: its tokenizer has no bos_token, with which every prompt begins")
    return PaliGemma2Encoder(spec, image, vision, embedding, tokenizer, weights, language=language)


def _language(config: Any) -> nn.Module:
    """Gemma 2 of this config without its embedding table: prompts are looked up in the encoder's."""
    from transformers import Gemma2Model

    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"text_config has rotary positions of type {shown(rope)}; PaliGemma 2 has the default ones")
    config._attn_implementation = "eager"  # the only one in transformers that always soft-caps Gemma 2's logits
    language = Gemma2Model(config)
    del language.embed_tokens
    return language


def canonical(name: str, language: bool = False) -> str | None:
    """The hub's name of a stored tensor when it is needed (Gemma's layers with `language` only), else None."""
    for stored, ours in LAYOUTS:
        name, found = re.subn(stored, ours, name)
        if found:
            break
    if name.startswith(HEAD_PREFIX):
        return None
    layers = language and name.startswith((f"{LANGUAGE_PREFIX}layers.", f"{LANGUAGE_PREFIX}norm."))
    return name if layers or name == EMBEDDING_NAME or name.startswith(VISION_PREFIXES) else None


def _config_identity(config: Any, language: bool) -> dict[str, Any]:
    """The fields that features depend on, by name: the same in every transformers version."""
    values = {name: getattr(config.vision_config, name) for name in VISION_FIELDS.split()}
    if language:
        text = config.text_config
        base = (getattr(text, "rope_parameters", None) or {}).get("rope_theta") or getattr(text, "rope_theta", 10000.0)
        values["text"] = {name: getattr(text, name) for name in TEXT_FIELDS.split()} | {"rope_theta": base}
    return values
