"""A toy checkpoint of the real Qwen3-VL architecture, made offline, that transformers' own classes load.

Weights are random, the tokenizer is a real byte-level BPE trained on the instructions below, and the layout is that
of `Qwen/Qwen3-VL-2B-Instruct`: sharded safetensors with an index, tokenizer, chat template and processor files. The
same spec gives the same bytes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...common.documents import json_bytes
from ...common.files import new_folder, write_file
from ...errors import UserError

_SPECIAL = (
    "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start "
    "quad_end vision_start vision_end vision_pad image_pad video_pad"
)
SPECIAL_TOKENS = tuple(f"<|{name}|>" for name in _SPECIAL.split())
_PLAIN = (  # added tokens that Qwen does not mark as special
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> "
    "<|repo_name|> <|file_sep|> <tool_response> </tool_response> <think> </think>"
)
PLAIN_TOKENS = tuple(_PLAIN.split())
# Qwen2's pre-tokenization: contractions; words with one leading non-letter; digits; punctuation; newlines; spaces.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}{%- for part in message.content %}"
    "{%- if 'image' in part or part.type == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif 'video' in part or part.type == 'video' %}{{- '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{%- elif 'text' in part %}{{- part.text }}{%- endif %}{%- endfor %}{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# Every verb with every object and place is the corpus of the tokenizer.
VERBS = (
    "pick up, place, push, pull, open, close, lift, grasp, move, press, turn, slide, insert, stack, pour, "
    "reach, hand over, put, unplug, sweep"
)
OBJECTS = (
    "the red cube, the blue block, the green bowl, the drawer, the door, the button, the handle, the peg, "
    "the puck, the window, the cup, the plate, the lid, the banana, the bottle, the box, the lever, the "
    "faucet, the shelf, the towel, the spoon, the coffee machine, the hammer, the ball, the basket"
)
PLACES = (
    "to the goal, on the table, into the box, onto the plate, to the left, to the right, in the drawer, "
    "with the left hand, with the right hand, with both arms, next to the bowl, at the target position, "
    "above the table, in the sink"
)


@dataclass(frozen=True)
class TinySpec:
    """Sizes of the toy model. Widths must be divisible by their heads, head widths by 4."""

    vision_depth: int = 4  # transformer blocks of the vision tower
    vision_width: int = 128  # its hidden size
    vision_heads: int = 4  # its attention heads
    vision_mlp: int = 4  # its MLP width over its hidden size
    patch_size: int = 16  # pixels per patch side
    merge_size: int = 2  # patches per token side
    position_grid: int = 14  # side of the learned position grid (interpolated to the image's own)
    out_width: int = 128  # features' width = hidden size of the language model; a multiple of 32
    text_layers: int = 2  # language layers: they only make the checkpoint complete
    vocabulary: int = 1024  # maximum number of tokens, including the 256 bytes and the special ones
    init_std: float = 0.02  # standard deviation of all weight matrices
    seed: int = 0

    def __post_init__(self) -> None:
        if self.vision_width % (4 * self.vision_heads):
            raise UserError(
                f"vision_width {self.vision_width} must be a multiple of {4 * self.vision_heads} (4 x vision_heads)"
            )
        if self.out_width % 32:
            raise UserError(f"out_width {self.out_width} must be a multiple of 32")
        least = 256 + len(SPECIAL_TOKENS) + len(PLAIN_TOKENS)
        if self.vocabulary < least:
            raise UserError(f"vocabulary {self.vocabulary} is too small; at least {least}")


def make_tiny_qwen3vl(out: Path | str, spec: TinySpec = TinySpec()) -> Path:
    """Write the checkpoint folder `out` and return it. `UserError` when it exists."""
    from transformers import GenerationConfig, Qwen3VLForConditionalGeneration

    with new_folder(Path(out)) as part:
        tokenizer = _write_tokenizer(part, spec)
        end, stop = tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|im_end|>")
        generation = GenerationConfig(bos_token_id=end, pad_token_id=end, eos_token_id=[stop, end])
        write_weights(part, Qwen3VLForConditionalGeneration, _config(spec, tokenizer), spec.seed, generation)
        _write_processors(part, spec)
    return Path(out)


def write_weights(folder: Path, model_class: Any, config: Any, seed: int, generation: Any = None) -> None:
    """Write random weights of a model and its config, in shards of which the last holds language layers alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).eval()
    if generation is not None:
        model.generation_config = generation
    # Shards are filled in order, and language layers come last.
    limit = sum(p.numel() * p.element_size() for p in model.model.language_model.layers.parameters())
    model.save_pretrained(folder, max_shard_size=limit)


def instructions() -> list[str]:
    """The corpus of the toy tokenizers."""
    parts = (text.split(", ") for text in (VERBS, OBJECTS, PLACES))
    corpus = [f"{verb} {thing} {place}." for verb, thing, place in itertools.product(*parts)]
    return corpus + [line.capitalize() for line in corpus]


def _config(spec: TinySpec, tokenizer: Any) -> Any:
    from transformers import Qwen3VLConfig

    token_id = tokenizer.token_to_id
    inner = {(spec.vision_depth * k) // 4 - 1 for k in (1, 2, 3)}  # the 2B model: 5, 11, 17 of 24
    vision = dict(
        depth=spec.vision_depth,
        hidden_size=spec.vision_width,
        intermediate_size=spec.vision_width * spec.vision_mlp,
        num_heads=spec.vision_heads,
        patch_size=spec.patch_size,
        spatial_merge_size=spec.merge_size,
        temporal_patch_size=2,
        out_hidden_size=spec.out_width,
        num_position_embeddings=spec.position_grid**2,
        initializer_range=spec.init_std,
        deepstack_visual_indexes=sorted(i for i in inner if i >= 0),
    )
    text = dict(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=spec.out_width,
        intermediate_size=2 * spec.out_width,
        num_hidden_layers=spec.text_layers,
        num_attention_heads=spec.out_width // 32,
        num_key_value_heads=spec.out_width // 32,
        head_dim=32,
        max_position_embeddings=4096,
        initializer_range=spec.init_std,
        tie_word_embeddings=True,
        rope_theta=5000000.0,
        rope_scaling={"rope_type": "default", "mrope_interleaved": True, "mrope_section": [6, 5, 5]},
        bos_token_id=token_id("<|endoftext|>"),
        eos_token_id=token_id("<|im_end|>"),
    )
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )


def _write_tokenizer(folder: Path, spec: TinySpec) -> Any:
    """Train a byte-level BPE on the built-in instructions and write its files as Qwen's are."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False)
    learned = spec.vocabulary - len(SPECIAL_TOKENS) - len(PLAIN_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=learned, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    tokenizer.train_from_iterator(instructions(), trainer)
    tokenizer.model.save(str(folder))  # vocab.json, merges.txt
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in PLAIN_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(tokenizer.token_to_id(t)): {"content": t, **flags, "special": t in SPECIAL_TOKENS}
        for t in SPECIAL_TOKENS + PLAIN_TOKENS
    }
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 4096,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write_file(folder / "tokenizer_config.json", json_bytes(config, indent=2))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return tokenizer


def _write_processors(folder: Path, spec: TinySpec) -> None:
    """The image and video processor files of the 2B model, with this model's patches; one-token images are allowed."""
    common = {
        "patch_size": spec.patch_size,
        "temporal_patch_size": 2,
        "merge_size": spec.merge_size,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
        "size": {"shortest_edge": (spec.patch_size * spec.merge_size) ** 2, "longest_edge": 16777216},
    }
    image = common | {"image_processor_type": "Qwen2VLImageProcessorFast"}
    video = common | {"video_processor_type": "Qwen3VLVideoProcessor"}
    write_file(folder / "preprocessor_config.json", json_bytes(image, indent=2))
    write_file(folder / "video_preprocessor_config.json", json_bytes(video, indent=2))
