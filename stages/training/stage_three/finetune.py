"""Stage three: the VLM comes back. Continues a stage-two policy on live features, with LoRA in the vision tower or all of it trained.

The loop, the step and the checkpoints are stage two's (train.py); only the features differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ....batch import FeatureBatch
from ....cache.loader.live import LiveFeatures
from ....cache.loader.provenance import require_sources, sources_of
from ....cache.store.cache import Cache
from ....cache.vlm.adapter import save_adapter, tower_parameters
from ....cache.vlm.encoder import VisionLanguageEncoder
from ....cache.vlm.load import require_encoder
from ....cache.vlm.lora import add_lora, lora_dropout, lora_parameters
from ....cache.vlm.spec import LoraSpec
from ....common.config import apply, from_mapping
from ....common.files import read_json
from ....common.hashing import mix
from ....drifting.config import DENOISING
from ....errors import UserError
from ...policy import checkpoint as ck
from ...policy.load import load_net, load_policy_encoder
from ..checks import open_cache, require_trainable
from ..config import FinetuneConfig, TrainConfig
from ..context import Features, Session, TrainReport
from ..loop import run
from ..parallel.world import World, join
from ..step import autocast
from ..train import policy_document
from .continuity import Continuity, _require_no_jump, compare, spread
from .memory import live_memory
from .split import SplitFeatures, above_boundary, split_features


def finetune_config(
    start: str | Path,
    sources: tuple[str, ...],
    lora: LoraSpec | None,
    overrides: dict[str, Any],
    vlm_path: str | None = None,
    full: bool = False,
) -> FinetuneConfig:
    """Settings of the run that `start` belongs to, with dotted `overrides` (None = keep)."""
    folder = ck.resolve(start)
    run_folder = folder.parent.parent
    if not (run_folder / "config.json").is_file():
        raise UserError(f"{folder} is not inside a run folder of `dvla train` (no config.json two levels up)")
    values = read_json(run_folder / "config.json")
    if "stage_three" in values:
        raise UserError(
            f"{run_folder} is a stage-three run; start from its stage-two run {values['stage_three']['start']}, or repeat the "
            "command that began it to go on with it"
        )
    settings = apply({**values, "unfreeze": {}, "init": None}, overrides)  # whose steps were stage two's
    for name in ("model_size", "dit"):
        if settings[name] != values[name]:
            raise UserError(
                f"{name} is {settings[name]} and that of {run_folder} is {values[name]}; fine-tuning goes on with its network: leave {name} out"
            )
    return FinetuneConfig(
        str(start), sources, from_mapping(TrainConfig, settings, "training settings"), lora, full, vlm_path
    )


def finetune(
    config: FinetuneConfig,
    on_log: Callable[[dict[str, Any]], None] = lambda _: None,
    say: Callable[[str], None] = print,
    stop_after: int | None = None,
) -> tuple[TrainReport, Continuity | None]:
    """Continue the policy at `config.start`. `UserError` when VLM, cache and sources do not belong together, or when the
    loss would jump. No `Continuity` on a split cache of samples of which nothing else is at hand."""
    with join(config.train.device) as world:
        session, continuity = _prepare(config, world, on_log, say)
        return run(session, stop_after), continuity


def _prepare(
    config: FinetuneConfig, world: World, on_log: Callable[[dict[str, Any]], None], say: Callable[[str], None]
) -> tuple[Session, Continuity | None]:
    say = say if world.main else lambda _: None
    start = ck.resolve(config.start, say)
    document = read_json(start / "policy.json")
    if document["conditions"]["blind"]:
        raise UserError(f"{start} is a blind policy (it never saw a picture); fine-tuning starts from one that does")
    cache = open_cache(config.train)
    require_trainable(config.train, cache, live=True)
    if config.full and cache.boundary is not None:
        raise UserError(
            f"cache {cache.path} holds what enters the last {cache.boundary} blocks (--boundary), and --vlm-mode full trains all of them; "
            "use --vlm-mode lora, or the cache that the policy was trained from"
        )
    config = above_boundary(config, cache)
    torch.manual_seed(config.train.seed)
    encoder = load_policy_encoder(
        start, _in_float32(document) if config.full else document, world.device, config.vlm_path
    )
    live = _features(config, cache, encoder)
    encoder.vision.recompute = config.train.gradient_checkpointing
    net = load_net(document, ck.policy_tensors(start, "ema"))
    if net.config.dit.denoising != (config.train.loss.kind in DENOISING):
        raise UserError(
            f"loss.kind is {config.train.loss.kind}, which the {document['loss']['kind']} head of {start} cannot go on with; leave it as it was"
        )
    net.to(world.device)
    if config.lora is not None:
        add_lora(encoder, config.lora)
    elif config.full:
        encoder.vision.requires_grad_(True)
    continuity = compare(net, cache, live, config)
    if continuity is not None:
        _require_no_jump(continuity, cache, say)
        first = {
            "switch/cached_loss": continuity.cached_loss,
            "switch/live_loss": continuity.live_loss,
            "switch/feature_difference": continuity.difference,
        }
    else:
        first = {}
        say(
            "the loss before the first step was not compared: the run's own cache is gone or holds other samples, and no --source was given"
        )
    documents = policy_document(net, cache, config.train)
    spec = dataclasses.replace(encoder.spec, dtype=document["encoder"]["spec"].get("dtype", "auto"))
    documents["encoder"] = {"spec": dataclasses.asdict(spec), "fingerprint": document["encoder"]["fingerprint"]}
    features = _mixed(live, config.train, world) if config.full else live
    session = Session(
        config.train,
        cache,
        net,
        documents,
        features=features,
        live=cache.boundary is None,
        first=first,
        on_log=on_log,
        say=say,
        world=world,
        stage_three={
            "start": config.start,
            "lora": config.lora and dataclasses.asdict(config.lora),
            **({"full": True} if config.full else {}),
        },
    )
    if config.lora is not None and config.lora.dropout:
        session.learning = lambda at: lora_dropout(encoder, int(mix(config.train.seed, 10, at, world.rank)) >> 1)
    if config.lora is not None or config.full:
        session.adapter = dict(tower_parameters(encoder) if config.full else lora_parameters(encoder))
        session.save_adapter = lambda folder: save_adapter(encoder, folder)
        say(
            f"training {sum(p.numel() for p in net.parameters()):,} parameters of the policy and {sum(p.numel() for p in session.adapter.values()):,} "
            f"{'' if config.full else 'of LoRA '}in {sum(p.numel() for p in encoder.vision.parameters()):,} of the vision tower"
        )
    say(live_memory(session, encoder, *(column[:2] for column in spread(cache, 32))))
    return session, continuity


def _features(config: FinetuneConfig, cache: Cache, encoder: VisionLanguageEncoder) -> LiveFeatures | SplitFeatures:
    """Live ones of the cache's samples: from its pictures, or on a split cache from its hidden states."""
    if cache.boundary is not None:
        return split_features(config, cache, encoder)
    require_encoder(encoder, cache.fingerprint["encoder"], f"cache {cache.path}")
    sources = sources_of(cache, config.sources)
    require_sources(cache, sources)
    return LiveFeatures(encoder, cache, sources, config.memory_gib)


def _mixed(features: Features, config: TrainConfig, world: World) -> Features:
    """A tower in float32 computes as the settings' precision says; frozen ones and those under LoRA have a dtype of their own."""

    def mixed(batch: FeatureBatch, masked: np.ndarray, variant: np.ndarray) -> FeatureBatch:
        with autocast(config, world.device):
            return features(batch, masked, variant)

    return mixed


def _in_float32(document: dict[str, Any]) -> dict[str, Any]:
    """policy.json of the same policy with a VLM in float32: small steps of weights in bfloat16 would be lost in rounding."""
    encoder = document["encoder"]
    return {**document, "encoder": {**encoder, "spec": {**encoder["spec"], "dtype": "float32"}}}
