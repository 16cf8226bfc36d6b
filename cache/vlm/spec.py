"""The settings of a feature cache's VLM: which encoder, at which resolution, with which tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval

from ...common.config import COUNT, Option, configs_dir, from_mapping, require_ranges
from ...common.documents import read_yaml
from ...errors import UserError, unknown

TARGETS = ("qv", "attention", "all-linear")


@dataclass(frozen=True)
class EncoderSpec:
    """The model that encodes and how its images are prepared. `UserError` for settings that exclude each other."""

    path: str  # checkpoint folder or hub id
    vlm: Literal["qwen3vl", "paligemma2"] = "qwen3vl"  # architecture
    revision: str | None = None  # hub commit or tag
    resolution: Annotated[int, Interval(ge=1, le=2**12)] = 448  # side of the square input, pixels
    features: Literal["merged", "patch"] = "merged"  # after the model's merger or projector; or before it
    tokens: Annotated[int | None, COUNT] = None  # averaged on the grid down to this many; None = all
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # computation; auto: bfloat16 on CUDA, else float32
    depth: Literal["vision", "language"] = "vision"  # language: the language model's last hidden state
    adapters: tuple[str, ...] = ()  # folders of adapters that are merged into the weights, in this order
    boundary: Annotated[int | None, COUNT] = (
        None  # n: hidden states that enter the last n blocks of the vision tower; None = features
    )

    def __post_init__(self) -> None:
        other = self.tokens is not None or self.features != "merged" or self.depth != "vision"
        if self.boundary is not None and other:
            raise UserError(
                "leave out tokens, features patch and depth language: a boundary stops inside the vision tower, before "
                "features are made; the fine-tuned policy has these settings"
            )
        if self.depth == "language" and (self.vlm != "paligemma2" or self.features != "merged"):
            raise UserError(
                f"depth language needs paligemma2 with features merged; given: {self.vlm} with features {self.features}"
            )


def encoder_spec(model: str, **overrides: Any) -> EncoderSpec:
    """The spec in `configs/models/<model>.yaml` with `overrides` (None = keep).

    `UserError` for an unknown model or a missing path.
    """
    folder = configs_dir() / "models"
    file = folder / f"{model}.yaml"
    if not file.is_file():
        raise unknown("model", model, [f.stem for f in folder.glob("*.yaml")])
    values = read_yaml(file) | {name: value for name, value in overrides.items() if value is not None}
    if "path" not in values:
        raise UserError(f"model '{model}' has no default checkpoint; give the folder (--vlm-path DIR)")
    return from_mapping(EncoderSpec, values, where=f"model {model}")


@dataclass(frozen=True)
class LoraSpec:
    """Size and place of the adapter."""

    r: Annotated[int, Option("--lora-r", help="Rank of LoRA."), Interval(ge=1, le=2**14)] = 16
    alpha: Annotated[float, Option("--lora-alpha", help="Scale of LoRA: the update is scaled by alpha / r."), Gt(0)] = (
        32.0
    )
    dropout: Annotated[
        float, Option("--lora-dropout", help="Dropout on LoRA's input in training."), Interval(ge=0, lt=1)
    ] = 0.0
    targets: Annotated[
        Literal["qv", "attention", "all-linear"],
        Option("--lora-targets", help="Layers that LoRA adapts: qv (queries and values), attention or all-linear."),
    ] = "attention"
    last_n_blocks: Annotated[
        int | None,
        Option(
            "--lora-last-blocks",
            help="Adapt the last n vision blocks alone; default: all, or those above the cache's boundary.",
        ),
    ] = None
    seed: Annotated[int, Ge(0)] = 0  # of the random matrices A

    def __post_init__(self) -> None:
        require_ranges(self)
        if self.targets not in TARGETS:
            raise unknown("LoRA target", self.targets, TARGETS)


@dataclass(frozen=True)
class LoraLayers:
    """Where LoRA can go in a family's `vision`, as regular expressions over module names."""

    block: str  # prefix of a block's layers, "{n}" for its number
    query_value: str  # linear layers of its attention that give queries and values
    attention: str  # all linear layers of its attention
    mlp: str  # and of its MLP
    projection: str  # after the blocks
