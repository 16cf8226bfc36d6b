"""The settings of a feature cache's VLM: which encoder, at which resolution, with which tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval

from ...common.config import COUNT, Option, configs_dir, from_mapping, require_ranges
from ...common.documents import read_yaml
from ...errors import UserError, unknown

PROMPT_TOKENS = 32
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
    depth: Literal["vision", "language"] = "vision"  # language: hidden states of the language model
    layers: Annotated[tuple[int, ...], Interval(ge=1, le=1024)] = ()  # of the language model, as `hidden_states` counts
    deepstack: bool = False  # depth vision of qwen3vl: also what it feeds into its first language layers
    layers_as: Literal["width", "tokens"] = "width"  # several layers: side by side in the width, or as tokens
    keep: Literal["image", "all"] | None = None  # depth language: image tokens, or also those after them; None: usual
    prompt_tokens: Annotated[int, COUNT] = PROMPT_TOKENS  # room for the tokens after the image's
    queries: Annotated[int | None, Interval(ge=1, le=4096)] = None  # query tokens at the end: they alone are kept
    adapters: tuple[str, ...] = ()  # folders of adapters that are merged into the weights, in this order
    boundary: Annotated[int | None, COUNT] = (
        None  # n: hidden states that enter the last n blocks of the tower, or of the language layers; None = features
    )

    def __post_init__(self) -> None:
        if self.boundary is not None:
            self._check_boundary()
        if list(self.layers) != sorted(set(self.layers)):
            raise UserError(f"layers {list(self.layers)}: give each once, the first ones first, as --layers 8,16,24")
        if self.layers_as == "tokens" and len(self.layers) < 2 and not self.deepstack:
            raise UserError("layers-as tokens needs several layers, as --layers 8,16,24 or deepstack")
        keeps = self.keep or ("all" if self.vlm == "qwen3vl" else "image")
        if self.prompt_tokens != PROMPT_TOKENS and (self.depth, keeps) != ("language", "all"):
            raise UserError(
                f"prompt-tokens {self.prompt_tokens} needs depth language with keep all; given: depth {self.depth}, "
                f"keep {keeps} of {self.vlm}"
            )
        if self.depth == "language":
            self._check_language()
            return
        others = {"layers": self.layers, "keep": self.keep, "queries": self.queries}
        if given := [name for name, value in others.items() if value]:
            raise UserError(f"{given[0]} is a setting of depth language; give --depth language, or leave it out")
        if self.deepstack and (self.vlm != "qwen3vl" or self.features != "merged"):
            raise UserError(
                f"layers deepstack needs qwen3vl with features merged; given: {self.vlm} with features {self.features}"
            )

    def _check_boundary(self) -> None:
        if self.tokens is not None or self.features != "merged" or self.keep or self.deepstack:
            raise UserError(
                "leave out tokens, features patch, keep and layers deepstack: a boundary stops before features are "
                "made; the fine-tuned policy has these settings"
            )
        if self.depth == "language" and (self.vlm != "qwen3vl" or len(self.layers) > 1):
            raise UserError(
                f"a boundary with depth language needs qwen3vl and one layer; given: {self.vlm}, layers "
                f"{list(self.layers)}"
            )

    def _check_language(self) -> None:
        if self.features != "merged" or self.deepstack:
            raise UserError(
                "depth language needs features merged, without layers deepstack: the language model reads both"
            )
        if self.queries and (self.vlm != "qwen3vl" or self.keep or self.tokens):
            raise UserError(
                "pool queries:N keeps the query tokens alone, of qwen3vl: leave out --keep and --tokens (in PaliGemma "
                "2 image tokens attend to what follows, so queries would change them)"
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


def layers_of(found: Mapping[str, Any]) -> tuple[int, str]:
    """(how many layers the features of an encoder's fingerprint are made of, where they are: width or tokens)."""
    layers, inner = found.get("layers") or (), found.get("vision_config", {}).get("deepstack_visual_indexes", ())
    count = 1 + len(inner) if layers == "deepstack" else max(1, len(layers))
    return count, found.get("layers_as", "width") if count > 1 else "width"


def features_in_words(found: Mapping[str, Any]) -> str:
    """Which features the encoder of a fingerprint gives.

    >>> features_in_words({"depth": "language", "layers": [8, 16], "layers_as": "width", "keep": "image"})
    'language layers 8, 16 side by side, image tokens'
    """
    kind = "hidden states" if found.get("features") == "hidden" else f"{found.get('features', '?')} tokens"
    how = "as tokens" if found.get("layers_as") == "tokens" else "side by side"
    if found.get("layers") == "deepstack":
        return f"{kind} and DeepStack's {how}"
    if found.get("depth") != "language":
        return kind
    layers = found.get("layers") or ["last"]
    several = f"s {', '.join(map(str, layers))} {how}" if len(layers) > 1 else f" {layers[0]}"
    if "boundary" in found:
        return f"hidden states below the last {found['boundary']} layers up to language layer{several}"
    kept = "image and prompt tokens" if found.get("keep") == "all" else "image tokens"
    return f"language layer{several}, {f'{n} query tokens' if (n := found.get('queries')) else kept}"


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
            help="Adapt the last n blocks, of vision tower and language layers together; default: those above the "
            "cache's boundary, the language layers with depth language, else the vision tower.",
        ),
    ] = None  # None: the vision tower's
    seed: Annotated[int, Ge(0)] = 0  # of the random matrices A

    def __post_init__(self) -> None:
        require_ranges(self)
        if self.targets not in TARGETS:
            raise unknown("LoRA target", self.targets, TARGETS)


@dataclass(frozen=True)
class LoraLayers:
    """Where LoRA can go in a family's tower or language model, as regular expressions over names in `vision`."""

    block: str  # prefix of a block's layers, "{n}" for its number
    query_value: str  # linear layers of its attention that give queries and values
    attention: str  # all linear layers of its attention
    mlp: str  # and of its MLP
    projection: str = ""  # from the tower into the language model's width
