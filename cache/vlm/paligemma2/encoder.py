"""PaliGemma 2 as an encoder: SigLIP, the multi-modal projector, and on request layers of Gemma 2, on transformers' own
modules.

Letters: N images or observations, V views, S patches of one image = its tokens K (SigLIP has no class token), F values
of one patch, C vision width, D language width, Lt prompt tokens.

`depth: vision` (default) with `features: merged`: the projector's output, [S,D], which is what Gemma's first layer sees
and what `get_image_features` returns from transformers 5.4 on. Earlier versions divide it by sqrt(D), and the language
model multiplies all embeddings by sqrt(D) again (one more rounding, left out here). Text features are embedding rows
times sqrt(D), on the same scale. `features: patch`: SigLIP's output after its last LayerNorm, [S,C]. At another
resolution than the checkpoint's own, SigLIP's learned positions are interpolated as transformers does.

`depth: language`: hidden states of Gemma 2 after the layers asked for, by default the last one after its final norm.
Every token attends to every other, as in PaliGemma's prefix, so that image tokens have read the instruction.
`keep: image` (default): the image tokens of all views, with the instruction appended once: <image>·V·K <bos>
instruction \\n. Features of one view then depend on the other views, too: they are encoded by observation
(`encode_observation`), not by image. `keep: all`: each view is read with the instruction by itself, and the prompt's
tokens follow those of the image.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from ....errors import UserError
from .. import checkpoint
from ..encoder import VisionLanguageEncoder
from ..pooling import average_pool
from ..preprocess import ImageSpec, preprocess
from ..spec import EncoderSpec, LoraLayers
from .tower import GemmaLanguage, PaliGemmaVision

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


class PaliGemma2Encoder(VisionLanguageEncoder):
    """`vision` has SigLIP, the projector and, with depth language, Gemma's layers as `language`."""

    vision: PaliGemmaVision
    lora_layers = LoraLayers(
        r"vision_tower\.vision_model\.encoder\.layers\.({n})\.",
        r"self_attn\.(q|v)_proj",
        r"self_attn\.(q|k|v|out)_proj",
        r"mlp\.fc[12]",
        r"multi_modal_projector\.linear",
    )

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.text_scale = self.text_width**0.5
        self.require_boundary(self.blocks, "vision tower")

    @property
    def reads(self) -> Literal["image", "instruction", "observation"]:
        if self.spec.depth == "vision":
            return "image"
        return "instruction" if self.spec.keep == "all" else "observation"

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the language layers that features are made of, the last one the last."""
        return self.spec.layers or (self.language_layers,)

    @property
    def parts(self) -> int:
        return len(self.layers)

    @property
    def blocks(self) -> int:
        return len(self.vision.siglip.encoder.layers)

    @property
    def vision_width(self) -> int:
        return self.vision.multi_modal_projector.linear.in_features

    def vision_lower(self, patches: torch.Tensor, end: int) -> torch.Tensor:
        return self.vision.lower(patches, end)  # [N,S,C]

    def vision_upper(self, hidden: torch.Tensor, begin: int) -> torch.Tensor:
        hidden = self.vision.upper(hidden, begin)  # [N,S,C]
        return hidden if self.spec.features == "patch" else self.vision.multi_modal_projector.linear(hidden)  # [N,S,D]

    def visible(self, instruction: str) -> int:
        return self.tokens - (self.room - len(self.prompt(instruction))) * self.each if self.room else self.tokens

    def encode_images(self, images: torch.Tensor | np.ndarray, instruction: str = "") -> torch.Tensor:
        if self.reads == "image":
            return super().encode_images(images, instruction)
        if self.reads == "observation":
            raise UserError(
                "use encode_observation, or depth vision: depth language makes features of all views of a frame and "
                "the instruction together, not of single images"
            )
        kept = [self._pooled(state, 0, state[:, self.native_tokens :]) for state in self._read([images], instruction)]
        return F.pad(self.arrange(kept), (0, 0, 0, self.tokens - self.visible(instruction)))  # [N,K,D]

    def encode_observation(self, views: Sequence[torch.Tensor | np.ndarray], instruction: str) -> torch.Tensor:
        """As `VisionLanguageEncoder`. `UserError` when views and prompt exceed the model's context."""
        if self.reads != "observation":
            return super().encode_observation(views, instruction)
        states = self._read(views, instruction)
        each = [self.arrange([self._pooled(state, v) for state in states]) for v in range(len(views))]
        return torch.stack(each, 1)  # [N,V,K,D]

    def require_fits(self, views: int, instructions: Sequence[str]) -> None:
        if self.reads == "image":
            return
        longest = max(instructions, key=lambda text: len(self.prompt(text)))
        prompt, most = len(self.prompt(longest)), self.vision.language.context
        images = self.native_tokens * (views if self.by_observation else 1)
        if images + prompt > most:
            raise UserError(
                f"{images} image tokens and a prompt of {prompt} are more than the {most} tokens of this language "
                "model's context; use fewer views or a smaller resolution"
            )
        self.require_room(longest, prompt)

    def prompt(self, instruction: str) -> list[int]:
        """Token ids after the image tokens, as PaliGemmaProcessor makes them."""
        return self.tokenizer(f"{self.tokenizer.bos_token}{instruction}\n", add_special_tokens=False)["input_ids"]

    def _read(self, views: Sequence[torch.Tensor | np.ndarray], instruction: str) -> list[torch.Tensor]:
        """Images [N,H,W,3] of each view and one prompt through Gemma 2 -> [N,V*S+Lt,D] of each of the `layers`."""
        self.require_fits(len(views), [instruction])
        images = [self.vision_features(preprocess(view, self.image, self.device))[0] for view in views]  # [N,S,D] each
        text = self.embed(self.prompt(instruction)).to(self.device).expand(len(images[0]), -1, -1)  # [N,Lt,D]
        return self.vision.language.run(torch.cat([*images, text], 1), self.layers, self.vision.recompute)

    def _pooled(self, hidden: torch.Tensor, view: int, *after: torch.Tensor) -> torch.Tensor:
        """The tokens of one view's image in hidden states [N,V*S+Lt,D], averaged, and what comes `after` them."""
        image = hidden[:, view * self.native_tokens : (view + 1) * self.native_tokens]
        return torch.cat([average_pool(image, self.image_tokens), *after], 1)

    def fingerprint(self) -> dict[str, Any]:
        spec, found = self.spec, super().fingerprint() | {"depth": self.spec.depth}
        total = self.weights["config"].get("text", {}).get("num_hidden_layers", 0)
        if spec.depth == "language" and self.layers != (total,):
            found["layers"] = list(self.layers)
        if self.parts > 1:
            found["layers_as"] = spec.layers_as
        if self.room:
            prompt = f"{self.tokenizer.bos_token}{{instruction}}\n"
            found |= {"keep": "all", "prompt": prompt, "prompt_tokens": spec.prompt_tokens}
        return found


# --- loading ---------------------------------------------------------------------------------------------------------


def load(spec: EncoderSpec, device: torch.device, dtype: torch.dtype) -> PaliGemma2Encoder:
    """See `load_encoder`."""
    folder = checkpoint.checkpoint_folder(spec.path, spec.revision, functools.partial(_needed, spec))
    needed = _needed(spec, folder)
    config = copy.deepcopy(checkpoint.load_config(folder))
    image = ImageSpec(spec.resolution, config.vision_config.patch_size, 1, 1, *checkpoint.image_statistics(folder))
    if config.vision_config.hidden_size % config.vision_config.num_attention_heads:
        raise UserError(f"{folder}/config.json is damaged: vision_config.hidden_size is no multiple of its heads")
    config.vision_config.vision_use_head = False
    count = _count(spec, config.text_config, str(folder))
    made: list[PaliGemmaVision] = []  # on the meta device

    def expected(header: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        table = header[EMBEDDING_NAME]
        with checkpoint.without_code(folder), torch.device("meta"):
            made.append(PaliGemmaVision(config.vision_config, table.shape[1]))
            if count:
                made[0].language = GemmaLanguage(config.text_config, count)
        rows = torch.empty(config.text_config.vocab_size, table.shape[1], device="meta")
        own = {re.sub(r"^language\.", LANGUAGE_PREFIX, name): t for name, t in made[0].state_dict().items()}
        return own | {EMBEDDING_NAME: rows}

    tensors = checkpoint.read_tensors(folder, needed, "PaliGemma 2", EMBEDDING_NAME, expected)
    weights = {"sha256": checkpoint.tensors_sha256(tensors), "config": _config_identity(config, bool(count))}
    embedding, vision = tensors.pop(EMBEDDING_NAME), made[0]
    named = {n.replace(LANGUAGE_PREFIX, "language."): tensors.pop(n) for n in list(tensors)}
    checkpoint.assign_tensors(vision, named, device, dtype, spec.path)
    vision.rebuild_buffers(device)
    if count:
        vision.language.rebuild_buffers(config.text_config, device)
    checkpoint.require_filled(vision)
    tokenizer = checkpoint.load_tokenizer(folder, spec.path, len(embedding))
    if count and not isinstance(tokenizer.bos_token, str):
        raise UserError(f"{folder} is damaged: its tokenizer has no bos_token, with which every prompt begins")
    return PaliGemma2Encoder(spec, image, vision, embedding, tokenizer, weights)


def _count(spec: EncoderSpec, config: Any, where: str) -> int:
    """Language layers that features need. `UserError` for a layer that the model does not have."""
    if spec.depth == "vision":
        return 0
    last = spec.layers[-1] if spec.layers else config.num_hidden_layers
    checkpoint.require_layer(last, config.num_hidden_layers, where)
    return last


def _needed(spec: EncoderSpec, folder: Path) -> checkpoint.Canonical:
    """`canonical` of the tensors that `spec` needs of the checkpoint in `folder`."""
    checkpoint.require_model_type(folder, spec.path, spec.vlm, "paligemma")
    checkpoint.require_model_type(folder, spec.path, spec.vlm, "gemma2", "text_config")
    config = checkpoint.load_config(folder).text_config
    count = _count(spec, config, str(folder))
    return functools.partial(canonical, layers=count, norm=count == config.num_hidden_layers)


def canonical(name: str, layers: int = 0, norm: bool = False) -> str | None:
    """The hub's name of a stored tensor when it is needed, else None: of Gemma its first `layers`, with the last
    `norm` or without."""
    for stored, ours in LAYOUTS:
        name, found = re.subn(stored, ours, name)
        if found:
            break
    if name.startswith(f"{LANGUAGE_PREFIX}layers."):
        number = name.removeprefix(f"{LANGUAGE_PREFIX}layers.").partition(".")[0]
        return name if number.isdecimal() and int(number) < layers else None
    if name.startswith(HEAD_PREFIX):
        return None
    last = norm and name == f"{LANGUAGE_PREFIX}norm.weight"
    return name if last or name == EMBEDDING_NAME or name.startswith(VISION_PREFIXES) else None


def _config_identity(config: Any, language: bool) -> dict[str, Any]:
    """The fields that features depend on, by name: the same in every transformers version."""
    values = {name: getattr(config.vision_config, name) for name in VISION_FIELDS.split()}
    if language:
        text = config.text_config
        base = (getattr(text, "rope_parameters", None) or {}).get("rope_theta") or getattr(text, "rope_theta", 10000.0)
        values["text"] = {name: getattr(text, name) for name in TEXT_FIELDS.split()} | {"rope_theta": base}
    return values
