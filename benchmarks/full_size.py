"""A checkpoint of a VLM at its real size with random weights, made offline, for measurements of memory and speed.

    python benchmarks/full_size.py --out /tmp/qwen3vl                       # 4.3 GB: as Qwen3-VL-2B
    python benchmarks/full_size.py --out /tmp/paligemma2 --vlm paligemma2   # 6.1 GB: as PaliGemma 2 3B
    dvla cache build DATASET --vlm qwen3vl --vlm-path /tmp/qwen3vl --depth language --layer 16 --out cache

All sizes are those of the released model, its vocabulary included, and so are names, dtype (bfloat16) and the order of
tensors in the files; the tokenizer is a toy checkpoint's. Random weights show time, memory and bytes, not how good
features are. A shard is written as soon as it is full, so that 1.5 GB of memory suffice.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from dvla.cache.vlm.tiny_paligemma2 import TinyPaliGemmaSpec, make_tiny_paligemma2
from dvla.cache.vlm.tiny_qwen3vl import TinySpec, make_tiny_qwen3vl
from dvla.common.documents import json_bytes

SHARD_NBYTES = 1 << 30
STD = 0.02
# Qwen/Qwen3-VL-2B-Instruct
QWEN_TEXT = {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28}
QWEN_TEXT |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262144}
QWEN_VISION = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2048}
QWEN_VISION |= {"num_position_embeddings": 48**2, "deepstack_visual_indexes": [5, 11, 17]}
# google/paligemma2-3b-mix-448
GEMMA_TEXT = {"vocab_size": 257216, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
GEMMA_TEXT |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256}
SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}


def full_config(folder: Path, vlm: str) -> Any:
    """The config of a toy checkpoint with the released model's sizes."""
    config = transformers.AutoConfig.from_pretrained(folder)
    text, vision = (QWEN_TEXT, QWEN_VISION) if vlm == "qwen3vl" else (GEMMA_TEXT, SIGLIP)
    for part, sizes in ((config.text_config, text), (config.vision_config, vision)):
        for name, value in sizes.items():
            setattr(part, name, value)
    if vlm == "qwen3vl":
        name = "rope_parameters" if hasattr(config.text_config, "rope_parameters") else "rope_scaling"  # 5; 4
        setattr(config.text_config, name, {**getattr(config.text_config, name), "mrope_section": [24, 20, 20]})
    else:
        kinds = config.text_config.layer_types[:2]
        config.text_config.layer_types = kinds * (GEMMA_TEXT["num_hidden_layers"] // 2)
        config.projection_dim = config.hidden_size = config.vision_config.projection_dim = GEMMA_TEXT["hidden_size"]
    return config


def make_full_size(folder: Path, vlm: str = "qwen3vl", seed: int = 0) -> Path:
    """Write the checkpoint folder and return it."""
    if vlm == "qwen3vl":
        make_tiny_qwen3vl(folder, TinySpec(text_layers=1))
    else:
        make_tiny_paligemma2(folder, TinyPaliGemmaSpec(text_layers=2, image_size=448))
    for file in folder.glob("model*"):
        file.unlink()
    config = full_config(folder, vlm)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    tensors = {name: t for name, t in model.state_dict().items() if not name.startswith("lm_head.")}  # it is tied
    generator, shards, names, nbytes = torch.Generator().manual_seed(seed), [{}], {}, 0
    for name, t in sorted(tensors.items(), key=lambda item: ".layers." in item[0] and "language_model" in item[0]):
        if nbytes > SHARD_NBYTES:
            _save(folder, shards), shards.append({})
            nbytes = 0
        shards[-1][name] = _random(name, t, generator, vlm)
        names[name] = _file(len(shards))
        nbytes += 2 * t.numel()
    _save(folder, shards)
    total = sum(2 * t.numel() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_bytes(json_bytes(index))
    return folder


def _random(name: str, like: torch.Tensor, generator: torch.Generator, vlm: str) -> torch.Tensor:
    """Norms scale by 1 (Gemma's count from 1), biases are 0."""
    if like.ndim == 1:
        from_one = vlm == "paligemma2" and "language_model" in name
        return torch.full(like.shape, float(name.endswith("weight") and not from_one), dtype=torch.bfloat16)
    return torch.empty(like.shape, dtype=torch.bfloat16).normal_(0, STD, generator=generator)


def _file(number: int) -> str:
    return f"model-{number:05d}.safetensors"


def _save(folder: Path, shards: list[dict[str, torch.Tensor]]) -> None:
    """Write the last shard, and forget its tensors."""
    save_file(shards[-1], folder / _file(len(shards)), {"format": "pt"})
    shards[-1].clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--vlm", choices=("qwen3vl", "paligemma2"), default="qwen3vl")
    args = parser.parse_args()
    folder = make_full_size(args.out, args.vlm)
    gigabytes = sum(file.stat().st_size for file in folder.iterdir()) / 1e9
    print(f"{folder}: {gigabytes:.1f} GB")


if __name__ == "__main__":
    main()
