"""The vision-language model as a frozen feature encoder: pictures to merged tokens, instructions to embeddings.

One module serves the cache build (frozen), fine-tuning (live, with LoRA from `cache.lora`) and inference.

Letters: N images, S patches of one image, F values of one patch, C vision width, K merged tokens of one image
(S / merge^2), D width of the language model (= width of the features), V vocabulary, n texts, Lt text tokens.

Features are the output of the model's own pretrained merger. Qwen3-VL also feeds three DeepStack features from inner
blocks into its first language layers; these are not cached, and their mergers are neither read nor computed. Text
features are rows of the language model's embedding table. Nothing else of the checkpoint is read: a file that holds
only language layers may be missing.

All images of a batch have the same size, which `cache.vision_tower` uses to make one attention call per block.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from ..errors import UserError, unknown
from ..settings import configs_dir, from_mapping, load_yaml
from .codec import average_pool, check_pooling
from .preprocess import PADDING_RULE, ImageSpec, preprocess
from .vision_tower import PositionTables, embed_patches, position_tables, rotary_frequencies, run_blocks

if TYPE_CHECKING:
    from peft import PeftModel

# Raise it when this file, vision_tower.py or preprocess.py computes other features from the same weights.
ENCODER_CODE_VERSION = 1
VISION_PREFIX = "model.visual."
DEEPSTACK_PREFIX = "model.visual.deepstack_merger_list."
EMBEDDING_NAME = "model.language_model.embed_tokens.weight"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class EncoderSpec:
    """Which model encodes, and how its pictures are prepared."""

    path: str                                                   # checkpoint folder or hub id
    vlm: Literal["qwen3vl"] = "qwen3vl"                         # architecture
    revision: str | None = None                                 # hub commit or tag
    resolution: int = 448                                       # side of the square input, pixels
    features: Literal["merged"] = "merged"                      # merger output
    tokens: int | None = None                                   # averaged on the grid down to this many; None = all
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"      # computation; auto: bfloat16 on CUDA, else float32


def encoder_spec(model: str, **overrides: Any) -> EncoderSpec:
    """The spec in `configs/models/<model>.yaml` with `overrides` (None = keep).

    `UserError` for an unknown model or a missing path.
    """
    folder = configs_dir() / "models"
    file = folder / f"{model}.yaml"
    if not file.is_file():
        raise unknown("model", model, [f.stem for f in folder.glob("*.yaml")])
    values = load_yaml(file) | {name: value for name, value in overrides.items() if value is not None}
    if "path" not in values:
        raise UserError(f"model '{model}' has no default checkpoint; give the folder (--vlm-path DIR)")
    return from_mapping(EncoderSpec, values, where=f"model {model}")


class VisionLanguageEncoder(nn.Module):
    """The vision tower and the embedding table of one checkpoint. Made by `load_encoder`; all weights frozen.

    `vision` is transformers' own tower (LoRA goes there). `adapter` is peft's wrapper of it once LoRA was added, else
    None; it is set by `cache.lora` and is not a submodule, since its modules are those of `vision`.
    """

    adapter: PeftModel | None

    def __init__(self, spec: EncoderSpec, image: ImageSpec, vision: nn.Module, embedding: torch.Tensor, tokenizer: Any,
                 weights: dict[str, Any]) -> None:
        super().__init__()
        self.spec, self.image, self.tokenizer = spec, image, tokenizer
        self.vision = vision
        self.embedding = embedding      # [V,D] in the checkpoint's dtype; stays on the CPU: read once per instruction
        self.weights = weights          # {"sha256", "config"} for the fingerprint
        self.merged_adapter: dict[str, Any] | None = None     # of an adapter that was merged into the weights
        self.set_adapter(None)
        self._tables: dict[torch.device, PositionTables] = {}

    def set_adapter(self, adapter: PeftModel | None) -> None:
        """Remember peft's wrapper without registering it: its modules are those of `vision`."""
        object.__setattr__(self, "adapter", adapter)

    @property
    def tokens(self) -> int:
        """K, tokens of one image: the merger's, or fewer when they are pooled."""
        return self.spec.tokens or self.image.tokens

    @property
    def width(self) -> int:
        """D, width of image and text features."""
        return self.embedding.shape[1]

    @property
    def device(self) -> torch.device:
        return self.vision.pos_embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the computation and of all features returned."""
        return self.vision.pos_embed.weight.dtype

    @property
    def tables(self) -> PositionTables:
        """Position tables of this resolution on the current device, computed once."""
        if self.device not in self._tables:
            self._tables[self.device] = position_tables(self.vision, self.image.grid, self.device)
        return self._tables[self.device]

    def encode_images(self, images: torch.Tensor | np.ndarray) -> torch.Tensor:
        """uint8 RGB [N,H,W,3] -> features [N,K,D]. Builds a graph only for weights that require gradients."""
        return self(preprocess(images, self.image, self.device))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Normalised patch rows [N,S,F] (from `preprocess`) -> features [N,K,D]."""
        hidden = embed_patches(self.vision, patches, self.tables)                   # [N,S,C]
        hidden = run_blocks(self.vision, hidden, self.tables)                       # [N,S,C]
        merged = self.vision.merger(hidden.flatten(0, 1))                           # [N*K,D]
        merged = merged.reshape(len(patches), self.image.tokens, -1)                # [N,K',D]
        return average_pool(merged, self.tokens)                                    # [N,K,D]

    def encode_text(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Instructions -> (embeddings [n,Lt,D] padded with zeros, lengths [n] int64), on the encoder's device.

        No special tokens are added; an empty instruction is the one pad token, so that every length is at least 1.
        """
        tokenizer = self.tokenizer
        rows = [tokenizer(text, add_special_tokens=False)["input_ids"] or [tokenizer.pad_token_id] for text in texts]
        lengths = torch.tensor([len(r) for r in rows], dtype=torch.int64)           # [n]
        out = torch.zeros(len(rows), int(lengths.max()) if rows else 0, self.width, dtype=self.dtype)   # [n,Lt,D]
        for i, row in enumerate(rows):
            out[i, :len(row)] = self.embedding[row].to(self.dtype)
        return out.to(self.device), lengths.to(self.device)

    @torch.no_grad()
    def null_image_features(self) -> torch.Tensor:
        """Features [K,D] of a black picture: the stand-in for a masked view."""
        side = self.image.resolution
        return self.encode_images(torch.zeros(1, side, side, 3, dtype=torch.uint8))[0]

    def fingerprint(self) -> dict[str, Any]:
        """Everything the features depend on, as JSON values: equal fingerprints, equal features (up to rounding)."""
        image = self.image
        adapter = adapter_identity(self.adapter) if self.adapter is not None else self.merged_adapter
        return {
            "code_version": ENCODER_CODE_VERSION, "vlm": self.spec.vlm, "features": self.spec.features,
            "tokens": self.tokens, "weights_sha256": self.weights["sha256"], "vision_config": self.weights["config"],
            "resolution": image.resolution, "padding": PADDING_RULE, "resize": "bicubic-antialias",
            "image_mean": list(image.mean), "image_std": list(image.std),
            "dtype": str(self.dtype).removeprefix("torch."), "adapter": adapter,
        }


# --- loading ---------------------------------------------------------------------------------------------------------

def load_encoder(spec: EncoderSpec, device: torch.device | str = "cpu",
                 dtype: torch.dtype | None = None) -> VisionLanguageEncoder:
    """Read the vision tower, the embedding table and the tokenizer of `spec.path`; frozen, in eval mode, on `device`.

    `dtype` overrides `spec.dtype`. `UserError` when the checkpoint is missing, incomplete, damaged or of another
    architecture, or when the resolution does not fit its patches.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    device = torch.device(device)
    if dtype is None:
        dtype = DTYPES.get(spec.dtype) or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    folder = _checkpoint_folder(spec)
    model_type = _read_json(folder / "config.json").get("model_type")
    if model_type != "qwen3_vl":
        raise UserError(f"{spec.path} is a '{model_type}' checkpoint; --vlm {spec.vlm} needs model_type 'qwen3_vl'")
    config = copy.deepcopy(AutoConfig.from_pretrained(folder).vision_config)
    image = _image_spec(folder, config, spec.resolution)
    check_pooling(spec.tokens or image.tokens, image.tokens)
    tensors = _read_tensors(folder)
    weights = {"sha256": tensors_sha256(tensors), "config": _config_identity(config)}
    embedding = tensors.pop(EMBEDDING_NAME)

    config.deepstack_visual_indexes = []
    with torch.device("meta"):
        vision = Qwen3VLVisionModel(config)
    state = {name.removeprefix(VISION_PREFIX): t.to(device=device, dtype=dtype) for name, t in tensors.items()}
    try:
        vision.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{spec.path}: its vision weights do not fit its config: {reason}") from None
    for name, _ in list(vision.rotary_pos_emb.named_buffers()):     # the only buffers; a state dict does not hold them
        setattr(vision.rotary_pos_emb, name, rotary_frequencies(config).to(device))
    left = [name for name, t in (*vision.named_parameters(), *vision.named_buffers()) if t.is_meta]
    if left:
        raise ValueError(f"this transformers version has vision tensors neither stored nor rebuilt: {', '.join(left)}")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(f"{spec.path} has no tokenizer: neither tokenizer.json nor vocab.json is there")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vision.requires_grad_(False)
    return VisionLanguageEncoder(spec, image, vision, embedding, tokenizer, weights).eval()


def _checkpoint_folder(spec: EncoderSpec) -> Path:
    """The local folder of the checkpoint; of a hub id, only the needed files are downloaded, unless there already."""
    folder = Path(spec.path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{spec.path} is no checkpoint folder: config.json is missing")
        return folder
    if folder.is_absolute() or spec.path.startswith(".") or spec.path.count("/") != 1:
        raise UserError(f"checkpoint folder {spec.path} does not exist (and it is no hub id of the form owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    try:
        small = ["*.json", "*.txt", "*.jinja"]
        folder = Path(snapshot_download(spec.path, revision=spec.revision, allow_patterns=small))
        files = sorted(set(_tensor_files(folder).values())) or ["model.safetensors"]
        return Path(snapshot_download(spec.path, revision=spec.revision, allow_patterns=small + files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot get {spec.path} from the hub: give a local checkpoint folder, or go online, check the "
                        f"name and log in if it is gated ({type(error).__name__}: {reason})") from None


def _tensor_files(folder: Path) -> dict[str, str]:
    """{needed tensor: file name} from the index; empty for a checkpoint in one file."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return {}
    return {name: file for name, file in _read_json(index)["weight_map"].items() if _needed(name)}


def _needed(name: str) -> bool:
    return name == EMBEDDING_NAME or (name.startswith(VISION_PREFIX) and not name.startswith(DEEPSTACK_PREFIX))


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The needed tensors, sorted by name, in the stored dtype."""
    from safetensors import SafetensorError, safe_open

    wanted = _tensor_files(folder)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(set(wanted.values())) or ["model.safetensors"]:
        if not (folder / file).is_file():
            raise UserError(f"{folder} is incomplete: {file}, which holds vision or embedding weights, is missing")
        try:
            with safe_open(folder / file, framework="pt") as f:
                tensors |= {name: f.get_tensor(name) for name in f.keys() if _needed(name)}
        except SafetensorError as error:
            raise UserError(f"{folder / file} is damaged: {error}") from None
    absent = sorted(set(wanted) - set(tensors)) or [n for n in (EMBEDDING_NAME,) if n not in tensors]
    if absent or len(tensors) < 2:
        raise UserError(f"{folder} lacks weights of a Qwen3-VL model: {', '.join(absent[:3]) or VISION_PREFIX + '*'}")
    return dict(sorted(tensors.items()))


def _image_spec(folder: Path, config: Any, resolution: int) -> ImageSpec:
    """Mean and std from the processor's file (transformers 5: in processor_config.json), the rest from the model."""
    file = folder / "preprocessor_config.json"
    newer = folder / "processor_config.json"
    values = _read_json(file) if file.is_file() else _read_json(newer).get("image_processor", {})
    if "image_mean" not in values or "image_std" not in values:
        raise UserError(f"{folder}: the processor config gives no image_mean and image_std")
    return ImageSpec(resolution, config.patch_size, config.spatial_merge_size, config.temporal_patch_size,
                     tuple(values["image_mean"]), tuple(values["image_std"]))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not valid JSON: {error}") from None


# --- identity --------------------------------------------------------------------------------------------------------

CONFIG_FIELDS = ("depth", "hidden_size", "hidden_act", "intermediate_size", "num_heads", "in_channels", "patch_size",
                 "spatial_merge_size", "temporal_patch_size", "out_hidden_size", "num_position_embeddings")


def _config_identity(config: Any) -> dict[str, Any]:
    """The fields of the vision config that features depend on, by name: the same in every transformers version."""
    return {name: getattr(config, name) for name in CONFIG_FIELDS}


def adapter_identity(adapter: PeftModel) -> dict[str, Any]:
    """What a LoRA adapter adds to the features: its weights (as they are now) and its scaling."""
    lora = {name: p for name, p in adapter.named_parameters() if "lora_" in name}
    config = adapter.peft_config["default"]
    return {"sha256": tensors_sha256(lora), "scaling": config.lora_alpha / config.r}


def tensors_sha256(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 over name, dtype, shape and bytes of the tensors, in order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
