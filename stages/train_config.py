"""Settings of a training run: dataclasses, YAML recipes, command-line overrides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ..cache.loader import ConditionMasking
from ..cache.lora import LoraSpec
from ..drifting.losses import LossConfig
from ..errors import UserError, unknown
from ..settings import configs_dir, from_mapping, load_yaml


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay to zero; EMA of the weights."""

    lr: float = 4e-4                # peak learning rate of the DiT
    projector_lr_scale: float = 0.5  # projector's rate = lr × this
    vlm_lr_scale: float = 0.1       # LoRA's rate = lr × this (stage three)
    weight_decay: float = 1e-4      # on matrices; vectors have none
    betas: tuple[float, ...] = (0.9, 0.95)
    warmup: int = 500               # steps
    clip: float = 1.0               # global gradient norm
    ema: float = 0.9999             # decay, reached gradually: min(ema, (1+step)/(10+step))


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run, as saved in RUN/config.json."""

    cache: str                              # cache folder
    out: str                                # run folder
    model_size: str = "base"                # tiny, small, base, large
    dit: dict[str, Any] = field(default_factory=dict)   # overrides of the size's DiT fields, e.g. {"horizon": 8}
    steps: int = 10_000                     # optimiser steps
    batch_size: int = 16                    # observations per step and device
    accumulate: int = 1                     # batches per optimiser step
    draws: int = 4                          # G, noise draws per observation
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    masking: ConditionMasking = field(default_factory=ConditionMasking)
    image_aug: bool = False                 # draw pictures among the cache's augmented variants (--augment of the build)
    blind: bool = False                     # pictures always replaced by black frames: the proprioception-only baseline
    alpha_max: float = 1.0                  # guidance scales are drawn from [1, this]; 1 = no guidance
    negatives: int = 8                      # unconditional negatives per observation when alpha_max > 1
    holdout: float = 0.05                   # fraction of episodes kept for evaluation
    eval_every: int = 1000                  # steps between evaluations on the held-out episodes; 0 = never
    eval_batches: int = 50                  # batches of one evaluation
    save_every: int = 1000                  # steps between checkpoints
    keep_last: int = 2                      # checkpoints kept
    log_every: int = 50                     # steps between log lines
    seed: int = 0                           # order of samples, noise, initialisation
    threads: int = 2                        # loader threads
    cpu_threads: int = 0                    # of torch's CPU kernels; 0 = torch's choice. Small networks are fastest with 1
    device: str = "auto"                    # auto, cpu, cuda
    precision: Literal["fp32", "bf16"] = "fp32"   # autocast of the forward pass

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "draws", "eval_batches", "save_every", "keep_last", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.cpu_threads < 0:
            raise UserError(f"cpu_threads is {self.cpu_threads}; it must be 0 (torch's choice) or more")
        if self.eval_every < 0 or not 0 <= self.optimizer.ema < 1 or self.alpha_max < 1:
            raise UserError("eval_every must be 0 or more, ema in [0, 1), alpha_max at least 1")


@dataclass(frozen=True)
class FinetuneConfig:
    """Stage three: what it starts from, the pictures, and which VLM weights are trained."""

    start: str                              # run or checkpoint of stage two
    sources: tuple[str, ...]                # the dataset folders or hub ids behind the cache
    train: TrainConfig                      # settings of the loop; cache, network and horizon are the start's own
    lora: LoraSpec | None = None            # None = the VLM stays frozen but live
    vlm_path: str | None = None             # where the VLM is now, if not where the cache was built from
    memory_gib: float = 2.0                 # room for decoded pictures


def recipe_names() -> tuple[str, ...]:
    """Names of the shipped recipes, sorted."""
    return tuple(sorted(p.stem for p in (configs_dir() / "train").glob("*.yaml")))


def load_recipe(name_or_file: str) -> dict[str, Any]:
    """The mapping of a recipe: a YAML file, or a shipped one by name. `UserError` for an unknown name."""
    if name_or_file.endswith((".yaml", ".yml")):
        return load_yaml(name_or_file)
    if name_or_file not in recipe_names():
        raise unknown("recipe", name_or_file, recipe_names())
    return load_yaml(configs_dir() / "train" / f"{name_or_file}.yaml")


def apply(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`values` with dotted `overrides` ("optimizer.lr": 1e-4) put in; those that are None are not given."""
    out = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
    for key, value in overrides.items():
        if value is None:
            continue
        target = key.split(".")
        node = out
        for part in target[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise UserError(f"setting '{key}': '{part}' is a value, not a group of settings")
        node[target[-1]] = value
    return out


def train_config(recipe: str | None, overrides: dict[str, Any]) -> TrainConfig:
    """`TrainConfig` from a recipe and dotted overrides; unknown keys are refused with the nearest name."""
    return from_mapping(TrainConfig, apply(load_recipe(recipe) if recipe else {}, overrides), "training settings")
