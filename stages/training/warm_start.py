"""The way back from stage three: a cache of the fine-tuned encoder's features, and training that goes on with its policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...cache.store.cache import Cache
from ...cache.vlm.adapter import adapter_document
from ...cache.vlm.load import encoder_differences
from ...common import fingerprint as fp
from ...common.files import read_json
from ...drifting.policy_net import PolicyNet
from ...errors import UserError
from ..policy import checkpoint as ck
from ..policy.robot import describe_dataset
from .config import TrainConfig


def network_of(checkpoint: str | Path) -> dict[str, Any]:
    """Settings of the network of a run's checkpoint, so that one need not repeat them; empty for one that is outside its run."""
    settings = ck.resolve(checkpoint, lambda _: None).parent.parent / "config.json"
    if not settings.is_file():
        return {}
    return {name: value for name, value in read_json(settings).items() if name in ("model_size", "dit", "action_space")}


def start_from(config: TrainConfig, cache: Cache, net: PolicyNet, say: Callable[[str], None]) -> None:
    """Give `net` the averaged weights of the policy `config.init`. `UserError` when it saw other features than `cache` holds (the fields
    are named), or has another network, head, or scale of actions."""
    assert config.init is not None
    folder = ck.resolve(config.init, say)
    document = read_json(folder / "policy.json")
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
            f"{folder} is a {'blind' if document['conditions']['blind'] else 'seeing'} policy; train it on as such, or without --init"
        )
    lines = fp.diff(dataclasses.asdict(net.config), document["net"], "asked for", "it has")
    if lines:
        raise UserError(
            f"the network of {folder} is another than is to be trained: {'; '.join(lines[:6])}; "
            "leave --model-size and dit out, which are the policy's"
        )
    stored = {d["name"]: d for d in document["datasets"]}
    for dataset in cache.datasets:
        now, before = describe_dataset(dataset), stored.get(dataset.name)
        different = [
            key
            for key in ("action_map", "state_map", "action_stats", "proprio_stats")
            if before is not None and before[key] != now[key]
        ]
        if different:
            raise UserError(
                f"dataset {dataset.name} of cache {cache.path} has another {different[0]} than {folder} was trained with: its actions would "
                "mean something else; train without --init"
            )
    net.load_state_dict(ck.policy_tensors(folder, "ema"))
    say(f"going on with the averaged weights of {folder}")
