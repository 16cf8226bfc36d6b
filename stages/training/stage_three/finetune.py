"""Stage three: a stage-two policy is trained on live features, with LoRA in the VLM or all of it trained.

The loop, the step and the checkpoints are stage two's (loop.py); only the features differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ....batch import FeatureBatch
from ....cache.loader.live import Images, LiveFeatures
from ....cache.loader.provenance import require_sources, sources_of
from ....cache.store.cache import Cache
from ....cache.vlm.adapter import save_adapter, tower_parameters
from ....cache.vlm.encoder import VisionLanguageEncoder
from ....cache.vlm.load import require_encoder
from ....cache.vlm.lora import add_lora, lora_dropout, lora_parameters
from ....cache.vlm.spec import LoraSpec
from ....common.config import apply, from_mapping
from ....common.hashing import mix
from ....drifting.config import DENOISING
from ....errors import UserError
from ...policy import checkpoint as ck
from ...policy.document import read_document
from ...policy.load import load_net, load_policy_encoder
from ..checks import open_cache, require_trainable
from ..config import FinetuneConfig, TrainConfig, read_settings, with_offsets
from ..context import Features, Session, TrainReport
from ..loop import run
from ..parallel.world import World, join
from ..step import autocast
from ..train import policy_document
from ..warm_start import meaning_of
from .continuity import Continuity, compare, require_no_jump, spread
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
    """Settings of the run that `start` belongs to, with dotted `overrides`."""
    folder = ck.resolve(start)
    run_folder = folder.parent.parent
    if not (run_folder / "config.json").is_file():
        raise UserError(f"{folder} is not inside a run folder of `dvla train` (no config.json two levels up)")
    values = read_settings(run_folder)
    if "stage_three" in values:
        raise UserError(
            f"{run_folder} is a stage-three run; start from its stage-two run {values['stage_three']['start']}, "
            "or rerun the command that began it to resume it"
        )
    values |= meaning_of(read_document(folder))
    settings = with_offsets(apply({**values, "unfreeze": {}, "init": None}, overrides))  # whose steps were stage two's
    for name in ("model_size", "dit", "normalize", "action_frame", "history", "proprio_history"):
        if settings[name] != values[name]:
            raise UserError(
                f"{name} is {settings[name]}, but fine-tuning keeps the policy of {run_folder}, whose {name} is "
                f"{values[name]}: leave {name} out"
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
    """Continue the policy at `config.start`. `UserError` when VLM, cache and sources do not belong together, or when
    the loss would jump. No `Continuity` on a split cache for whose samples there are neither features nor sources."""
    train = dataclasses.replace(config.train, select=config.train.select.pinned())
    config = dataclasses.replace(config, train=train)
    with join(config.train.device) as world:
        session, continuity = _prepare(config, world, on_log, say)
        return run(session, stop_after), continuity


def _prepare(
    config: FinetuneConfig, world: World, on_log: Callable[[dict[str, Any]], None], say: Callable[[str], None]
) -> tuple[Session, Continuity | None]:
    say = say if world.main else lambda _: None
    start = ck.resolve(config.start, say)
    document = read_document(start)
    cache = _open(config, start, document)
    config = above_boundary(config, cache)
    torch.manual_seed(config.train.seed)
    encoder = load_policy_encoder(
        start, _in_float32(document) if config.full else document, world.device, config.vlm_path
    )
    live = _features(config, cache, encoder)
    config, language = _adapted_layers(config, encoder)
    encoder.vision.recompute = config.train.gradient_checkpointing
    net = load_net(document, start).to(world.device)
    if config.lora is not None:
        add_lora(encoder, config.lora)
    continuity = compare(net, cache, live, config)
    first = require_no_jump(continuity, cache, say)
    spec = dataclasses.replace(encoder.spec, dtype=document["encoder"]["spec"].get("dtype", "auto"))
    own = {"spec": dataclasses.asdict(spec), "fingerprint": document["encoder"]["fingerprint"]}
    lora = config.lora and dataclasses.asdict(config.lora)
    session = Session(
        config.train,
        cache,
        net,
        {**policy_document(net, cache, config.train), "encoder": own},
        features=_mixed(live, config.train, world) if config.full else live,
        live=cache.boundary is None,
        decode=live.decode if isinstance(live, LiveFeatures) else None,
        first=first,
        on_log=on_log,
        say=say,
        world=world,
        stage_three={"start": config.start, "lora": lora, **({"full": True} if config.full else {})}
        | ({"language": True} if config.full and language else {}),
    )
    _train_tower(session, config, encoder, language)
    session.say(live_memory(session, encoder, *(column[:2] for column in spread(cache, 32))))
    return session, continuity


def _open(config: FinetuneConfig, start: Path, document: dict[str, Any]) -> Cache:
    """The cache of the run. `UserError` where it, or the settings, do not fit the policy of `start`."""
    if document["conditions"]["blind"]:
        raise UserError(f"{start} is a blind policy (trained with images blanked); start from one that sees images")
    cache, kind = open_cache(config.train, config.train.out), config.train.loss.kind
    require_trainable(config.train, cache, live=True)
    if config.full and cache.boundary is not None:
        raise UserError(
            "--vlm-mode full trains all blocks; use --vlm-mode lora, or the cache that the policy "
            f"was trained from: cache {cache.path} holds what enters the last {cache.boundary} blocks (--boundary)"
        )
    if document["net"]["dit"].get("denoising", False) != (kind in DENOISING):
        raise UserError(
            f"loss.kind is {kind}, but {start} has a {document['loss']['kind']} head; leave loss.kind as it was"
        )
    return cache


def _adapted_layers(config: FinetuneConfig, encoder: VisionLanguageEncoder) -> tuple[FinetuneConfig, bool]:
    """(config with the number of blocks that LoRA is in, whether a full training includes language layers): as in the
    run that is resumed. A new one has LoRA in the language layers, where features come from these: the vision tower
    below them then needs no backward pass."""
    out = Path(config.train.out)
    begun = read_settings(out).get("stage_three") if (out / "config.json").is_file() else None
    language = encoder.language_layers > 0 and (begun is None or begun.get("language", False))
    if config.lora is None or config.lora.last_n_blocks is not None:
        return config, language
    last = encoder.language_layers or None
    if begun is not None and begun["lora"] is not None:
        last = begun["lora"].get("last_n_blocks")
    return dataclasses.replace(config, lora=dataclasses.replace(config.lora, last_n_blocks=last)), language


def _train_tower(session: Session, config: FinetuneConfig, encoder: VisionLanguageEncoder, language: bool) -> None:
    """Make LoRA, or all of the VLM (its `language` layers or none of them), trained parameters of the session."""
    lora, seed, rank = config.lora, config.train.seed, session.world.rank
    if lora is not None and lora.dropout:
        session.learning = lambda at: lora_dropout(encoder, int(mix(seed, 10, at, rank)) >> 1)
    if lora is None and not config.full:
        return
    session.adapter = dict(tower_parameters(encoder, language) if config.full else lora_parameters(encoder))
    for p in session.adapter.values():
        p.requires_grad_(True)
    session.save_adapter = lambda folder: save_adapter(encoder, folder, language)
    policy, tower, trained = (
        sum(p.numel() for p in parameters)
        for parameters in (session.net.parameters(), encoder.vision.parameters(), session.adapter.values())
    )
    session.say(
        f"training {policy:,} parameters of the policy and {trained:,} {'' if config.full else 'of LoRA '}"
        f"in a vision tower {'and language layers ' if encoder.language_layers else ''}of {tower:,}"
    )


def _features(config: FinetuneConfig, cache: Cache, encoder: VisionLanguageEncoder) -> LiveFeatures | SplitFeatures:
    """Live features of the cache's samples: from the source images, or on a split cache from its hidden states."""
    if cache.boundary is not None:
        return split_features(config, cache, encoder)
    require_encoder(encoder, cache.fingerprint["encoder"], f"cache {cache.path}")
    sources = sources_of(cache, config.sources)
    require_sources(cache, sources)
    return LiveFeatures(encoder, cache, sources, config.memory_gib, config.train.past)


def _mixed(features: Features, config: TrainConfig, world: World) -> Features:
    """A tower in float32 computes in the settings' precision; others have a dtype of their own."""

    def mixed(
        batch: FeatureBatch,
        no_images: np.ndarray | None = None,
        variant: np.ndarray | None = None,
        images: Images | None = None,
    ) -> FeatureBatch:
        with autocast(config, world.device):
            return features(batch, no_images, variant, images)

    return mixed


def _in_float32(document: dict[str, Any]) -> dict[str, Any]:
    """policy.json of the same policy with a VLM in float32: in bfloat16 small steps would be lost in rounding."""
    encoder = document["encoder"]
    return {**document, "encoder": {**encoder, "spec": {**encoder["spec"], "dtype": "float32"}}}
