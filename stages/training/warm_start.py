"""Training that starts from another run's policy, e.g. on a cache of a fine-tuned encoder's features."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...cache.actions.history import history_of
from ...cache.actions.schemes import EARLIER
from ...cache.store.cache import Cache
from ...cache.vlm.adapter import adapter_document
from ...cache.vlm.load import encoder_differences
from ...common import fingerprint as fp
from ...drifting.policy_net import PolicyNet
from ...errors import UserError
from ..policy import checkpoint as ck
from ..policy.document import net_config, read_document
from ..policy.robot import describe_dataset
from .config import ALL, TrainConfig, read_settings


def settings_of_start(checkpoint: str | Path) -> dict[str, Any]:
    """What training from a checkpoint keeps, so that it need not be repeated: what its actions mean, what it sees and,
    of a run's, the network's settings."""
    folder = ck.resolve(checkpoint, lambda _: None)
    settings, kept = folder.parent.parent / "config.json", meaning_of(read_document(folder))
    if settings.is_file():
        kept |= {k: v for k, v in read_settings(settings.parent).items() if k in ("model_size", "dit", "action_space")}
    return kept


def meaning_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """The normalization and frame of a policy.json's actions, and its history, as settings of a run."""
    found = {d["name"]: d.get("normalize", EARLIER) for d in document["datasets"]}
    schemes = set(found.values())
    relative = any(d.get("action_frame") == "chunk" for d in document["datasets"])
    past = history_of(document)
    return {
        "history": list(past.frames),
        "proprio_history": list(past.proprio),
        "normalize": {ALL: schemes.pop()} if len(schemes) == 1 else found,
        "action_frame": "chunk" if relative else "absolute",
    }


def start_from(config: TrainConfig, cache: Cache, net: PolicyNet, say: Callable[[str], None]) -> None:
    """Give `net` the averaged weights of the policy `config.init`. `UserError` when it saw other features than `cache`
    holds (the fields are named), or has another network, head, or scale of actions."""
    assert config.init is not None
    folder = ck.resolve(config.init, say)
    document = read_document(folder)
    seen = dict(document["encoder"]["fingerprint"])
    if (folder / "adapter").is_dir():
        seen["adapter"] = adapter_document(folder / "adapter")["adapter"]
    lines = encoder_differences(cache.fingerprint["encoder"], seen, was="the cache has", now="the policy saw")
    if lines:
        raise UserError(
            f"policy {folder} saw other features than cache {cache.path} holds: {'; '.join(lines[:6])}; "
            f"build a cache of what it sees with `dvla cache build … --adapter {config.init}`, or train without --init"
        )
    if document["conditions"]["blind"] != config.blind:
        raise UserError(
            f"blind is {str(config.blind).lower()}, but {folder} was trained with blind "
            f"{str(document['conditions']['blind']).lower()}; use the same, or train without --init"
        )
    own = dataclasses.asdict(net_config(document))
    lines = fp.diff(dataclasses.asdict(net.config), own, was="you requested", now="the policy has")
    if lines:
        raise UserError(
            "leave out --model-size, dit and --proprio-history, which are the policy's: the network of "
            f"{folder} differs: {'; '.join(lines[:6])}"
        )
    stored = {d["name"]: d for d in document["datasets"]}
    for dataset in cache.datasets:
        now, before = describe_dataset(dataset), stored.get(dataset.name)
        different = [
            key
            for key in ("action_map", "state_map", "normalize", "action_frame", "action_stats", "proprio_stats")
            if before is not None and before.get(key) != now.get(key)
        ]
        if different:
            raise UserError(
                f"train without --init: {different[0]} of dataset {dataset.name} in cache {cache.path} is not what "
                f"{folder} was trained with, so its actions would mean something else"
            )
    if (before := history_of(document).frames) != config.history:
        say(f"frames at offsets {list(config.history)} take the place of those the policy saw, {list(before)}")
    net.load_state_dict(ck.policy_tensors(folder, net.state_dict()))
    say(f"starting from the averaged weights of {folder}")
