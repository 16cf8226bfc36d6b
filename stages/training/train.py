"""Stage two: training of the policy from cached features, with the loop that stage three shares.

In one process or, started by `torchrun`, in several: each reads its part of every global batch, and the result is what
one process with the full batch would learn, up to rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...cache.loader.provenance import choice_of
from ...cache.store.cache import Cache
from ...cache.vlm.spec import layers_of
from ...drifting.dit import dit_config
from ...drifting.heads import head_dit
from ...drifting.policy_net import PolicyNet, PolicyNetConfig
from ..policy import checkpoint as ck
from ..policy.robot import describe_dataset
from .checks import open_cache, remarks, require_trainable
from .config import TrainConfig
from .context import Session, TrainReport
from .loop import run
from .parallel.world import join
from .run_folder import as_begun
from .warm_start import start_from


def train(
    config: TrainConfig,
    on_log: Callable[[dict[str, Any]], None] = lambda _: None,
    say: Callable[[str], None] = print,
    stop_after: int | None = None,
) -> TrainReport:
    """Train from a cache, or resume the run in `config.out` if it has the same settings."""
    config = as_begun(dataclasses.replace(config, select=config.select.pinned()))
    cache = open_cache(config, config.out)
    require_trainable(config, cache)  # before a run folder is made
    with join(config.device) as world:
        for line in remarks(cache) if world.main else ():
            say(line)
        torch.manual_seed(config.seed)
        net = policy_net(config, cache)
        if config.init is not None and not ck.checkpoints(Path(config.out)):
            start_from(config, cache, net, say if world.main else lambda _: None)
        net.to(world.device)
        return run(
            Session(config, cache, net, policy_document(net, cache, config), on_log=on_log, say=say, world=world),
            stop_after,
        )


def policy_net(config: TrainConfig, cache: Cache) -> PolicyNet:
    """The untrained network that `config` asks for, for the features of `cache`."""
    text_width = cache.text_width if cache.text_width != cache.width else None
    dit = head_dit(dit_config(config.model_size, **config.dit), config.loss.kind)
    slots: tuple[int, ...] = ()
    if config.action_space == "active":
        used = np.any([mask for d in cache.datasets for mask in (d.action_mask, d.proprio_mask)], axis=0)  # [128]
        slots = tuple(np.flatnonzero(used).tolist())
        dit = dataclasses.replace(dit, action_dim=len(slots), proprio_dim=len(slots))
    count, how = layers_of(cache.fingerprint["encoder"])
    return PolicyNet(
        PolicyNetConfig(
            feature_width=cache.width,
            text_width=text_width,
            dit=dit,
            layers=count,
            layers_as=how,
            past_states=len(config.past.states),
            slots=slots,
        )
    )


def policy_document(net: PolicyNet, cache: Cache, config: TrainConfig) -> dict[str, Any]:
    """policy.json: everything that inference needs besides the weights."""
    encoder = {"spec": cache.datasets[0].attributes["encoder"], "fingerprint": cache.fingerprint["encoder"]}
    chosen = {d.name: (str(choice_of(cache, d.name)), d.attributes.get("selection", "")) for d in cache.datasets}
    selection = {name: "; then ".join(filter(None, words)) for name, words in chosen.items() if any(words)}
    datasets = [describe_dataset(d) for d in cache.datasets]
    history = config.past.to_document()
    # as earlier releases, which know no such fields, read it
    unused = ["past_states"] * (not net.config.past_states) + ["layers", "layers_as"] * (net.config.layers == 1)
    shape = {name: value for name, value in dataclasses.asdict(net.config).items() if name not in unused}
    said = any("normalize" in d or "action_frame" in d for d in datasets)
    return {
        "format": 3 if history else 2 if said else 1,
        "net": shape,
        "encoder": encoder,
        "datasets": datasets,
        "loss": {"kind": config.loss.kind, "sample_steps": config.loss.sample_steps},  # how the head samples
        "conditions": {
            "blind": config.blind,
            "masking": dataclasses.asdict(config.masking),
            "alpha_max": config.alpha_max,
        },
        **history,
        **({"selection": selection} if selection else {}),  # options by which demonstrations were chosen, by dataset
    }
