"""A toy checkpoint of the real PaliGemma 2 architecture, made offline, that transformers' own classes load.

Weights are random, the tokenizer is a real Gemma one (BPE over ▁-joined words with byte fallback) trained on the
instructions of `tiny_qwen3vl`, and the layout is that of `google/paligemma2-3b-mix-448`: sharded safetensors with an
index, tokenizer, processor files, <image>, location and segmentation tokens. The same spec gives the same bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.documents import json_bytes
from ...common.files import new_folder, write_file
from ...errors import UserError
from .tiny_qwen3vl import instructions, write_weights

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")  # ids 0 to 4, as Gemma's
BYTES = tuple(f"<0x{i:02X}>" for i in range(256))
IMAGE_TOKEN = "<image>"
PLAIN_TOKENS = (*(f"<loc{i:04d}>" for i in range(1024)), *(f"<seg{i:03d}>" for i in range(128)))
HEAD_WIDTH = 32  # of the language model


@dataclass(frozen=True)
class TinyPaliGemmaSpec:
    """Sizes of the toy model."""

    vision_depth: int = 4  # transformer blocks of SigLIP
    vision_width: int = 128  # its hidden size, a multiple of its heads
    vision_heads: int = 4  # its attention heads
    vision_mlp: float = 4  # its MLP width over its hidden size, rounded
    patch_size: int = 14  # pixels per patch side
    image_size: int = 112  # its own resolution: a multiple of the patch side
    out_width: int = 128  # features' width = hidden size of Gemma; a multiple of 32
    text_layers: int = 2  # Gemma's layers
    vocabulary: int = 1024  # maximum number of text tokens, bytes and special ones included; 1153 more follow
    init_std: float = 0.05  # standard deviation of Gemma's and the projector's matrices
    seed: int = 0

    def __post_init__(self) -> None:
        if self.vision_width % self.vision_heads or self.image_size % self.patch_size or self.out_width % HEAD_WIDTH:
            raise UserError(
                f"vision_width {self.vision_width} must be a multiple of vision_heads {self.vision_heads}, image_size "
                f"{self.image_size} of patch_size {self.patch_size}, out_width {self.out_width} of {HEAD_WIDTH}"
            )
        least = len(SPECIAL_TOKENS) + len(BYTES) + 128
        if self.vocabulary < least:
            raise UserError(f"vocabulary {self.vocabulary} is too small; at least {least}")


def make_tiny_paligemma2(out: Path | str, spec: TinyPaliGemmaSpec = TinyPaliGemmaSpec()) -> Path:
    """Write the checkpoint folder `out` and return it. `UserError` when it exists."""
    from transformers import PaliGemmaForConditionalGeneration

    with new_folder(Path(out)) as part:
        tokenizer = _write_tokenizer(part, spec)
        write_weights(part, PaliGemmaForConditionalGeneration, _config(spec, tokenizer), spec.seed)
        tokens = (spec.image_size // spec.patch_size) ** 2
        config = {
            "do_convert_rgb": None,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "image_processor_type": "SiglipImageProcessor",
            "image_seq_length": tokens,
            "processor_class": "PaliGemmaProcessor",
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"height": spec.image_size, "width": spec.image_size},
        }
        write_file(part / "preprocessor_config.json", json_bytes(config, indent=2))
    return Path(out)


def _config(spec: TinyPaliGemmaSpec, tokenizer: Any) -> Any:
    from transformers import PaliGemmaConfig

    vision = dict(
        model_type="siglip_vision_model",
        hidden_size=spec.vision_width,
        intermediate_size=round(spec.vision_width * spec.vision_mlp),
        num_hidden_layers=spec.vision_depth,
        num_attention_heads=spec.vision_heads,
        patch_size=spec.patch_size,
        image_size=spec.image_size,
        vision_use_head=False,
    )
    heads = spec.out_width // HEAD_WIDTH
    text = dict(
        model_type="gemma2",
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=spec.out_width,
        head_dim=HEAD_WIDTH,
        intermediate_size=2 * spec.out_width,
        num_hidden_layers=spec.text_layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        query_pre_attn_scalar=HEAD_WIDTH,
        max_position_embeddings=8192,
        sliding_window=4096,
        initializer_range=spec.init_std,
    )
    special: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}  # of the base class
    return PaliGemmaConfig(
        vision_config=vision,
        text_config=text,
        projection_dim=spec.out_width,
        hidden_size=spec.out_width,
        image_token_index=tokenizer.token_to_id(IMAGE_TOKEN),
        **special,
        tie_word_embeddings=True,
    )


def _write_tokenizer(folder: Path, spec: TinyPaliGemmaSpec) -> Any:
    """Train a BPE with byte fallback on the built-in instructions and write its files as Gemma's are."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    def pipeline(model: Any) -> Any:
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        return tokenizer

    trained = pipeline(models.BPE())
    # the normalizer leaves no spaces to split at, and pieces must not grow beyond a word: train on single words
    words = [f" {word}" for line in instructions() for word in line.split()] + ["\n"]
    learned = spec.vocabulary - len(SPECIAL_TOKENS) - len(BYTES)
    trained.train_from_iterator(
        words,
        trainers.BpeTrainer(vocab_size=learned, show_progress=False, initial_alphabet=[chr(i) for i in range(33, 127)]),
    )
    model = json.loads(trained.to_str())["model"]
    pieces = [*SPECIAL_TOKENS, *BYTES, *sorted(model["vocab"], key=model["vocab"].get)]
    tokenizer = pipeline(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[tuple(m) for m in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in (*SPECIAL_TOKENS, IMAGE_TOKEN)]
    )
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in PLAIN_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "additional_special_tokens": [IMAGE_TOKEN],
        "bos_token": "<bos>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<eos>",
        "model_max_length": 8192,
        "pad_token": "<pad>",
        "processor_class": "PaliGemmaProcessor",
        "tokenizer_class": "GemmaTokenizer",
        "unk_token": "<unk>",
    }
    write_file(folder / "tokenizer_config.json", json_bytes(config, indent=2))
    return tokenizer
