"""The cache of a training run, and whether it has what the run needs; called before a run folder is made."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Any

import numpy as np

from ...cache.actions.extremes import extremes
from ...cache.actions.normalizer import Normalizer
from ...cache.loader.loader import require_variants
from ...cache.loader.order import held_out, mixture, override
from ...cache.loader.select import select
from ...cache.store.cache import Cache
from ...cache.store.manifest import find_manifest
from ...cache.store.mirror import is_remote
from ...cache.store.samples import require_history
from ...cache.store.webdataset.cache import WebDatasetCache
from ...cache.store.webdataset.tars import INDEX
from ...common.documents import Form, Positive, read_json
from ...common.hub import dataset_url
from ...common.packages import require_package
from ...drifting.dit import dit_config
from ...drifting.policy_net import PolicyNetConfig
from ...errors import UserError
from .config import ALL, TrainConfig
from .trackers.catalogue import require_trackers

ABSOLUTE = "has a joint or a pose in both its actions and its state"
ENVIRONMENT = "environment.json"  # of a run folder: what it was begun in


class EnvironmentForm(Form):
    """What `run_folder.environment` gives; earlier releases did not name the cache."""

    begun: str = ""
    device: str = ""
    processes: Positive = 1
    python: str = ""
    system: str = ""
    packages: dict[str, str] = {}
    cuda: str = ""
    cache_fingerprint: str = ""


def open_cache(config: TrainConfig, run: str | None = None) -> Cache:
    """The cache that `config` names, as its selection leaves it, its numbers as it says: a folder, a URL, "owner/name"
    of the hub, or the folder of its WebDataset export; `UserError` without one, for a dataset or episode that it does
    not hold, or where no action can be relative.

    Where the folder `run` holds a run that was begun with an earlier generation of it, which `--append` has kept beside
    it, that generation.
    """
    cache = _generation(config, run)
    for name in config.normalize:
        if name != ALL:
            cache.named(name)
    horizon = dit_config(config.model_size, **config.dit).horizon if config.action_frame == "chunk" else None
    for d in cache.datasets:
        d.normalize(config.normalize.get(d.name) or config.normalize.get(ALL) or d.scheme, horizon)
    if horizon is not None and all(d.frame is None for d in cache.datasets):
        raise UserError(f"train with --action-frame absolute: no dataset of {cache.path} {ABSOLUTE}")
    return cache


def remarks(cache: Cache) -> list[str]:
    """What to know of the numbers before a run trains on them: what is far from all others, cut off or not relative."""
    mirror = cache.mirror
    lines = [f"copies of what is read from {mirror.place.where} are kept in {mirror.folder.parent}"] if mirror else []
    for d in cache.datasets:
        ends = list(zip(*(x[d.used].tolist() for x in (d.episode_id, d.episode_start, d.episode_length))))
        for table, kind in (("action", "action"), ("state", "proprio")):
            values, stats, own = getattr(d, kind), d.statistics(kind), getattr(d, f"{kind}_normalizer")
            rows = ((number, values[start : start + length]) for number, start, length in ends)
            found = extremes(table, stats, Normalizer(stats, own.mask, own.rotation_slots, d.scheme), rows)
            lines += [f"{d.name}: {line}" for line in found.lines(d.name)]
        if d.horizon is not None and d.frame is None:
            lines.append(f"{d.name}: its actions stay absolute: no dataset is relative unless it {ABSOLUTE}")
    return lines


def _generation(config: TrainConfig, run: str | None) -> Cache:
    cache, begun = _open(config), fingerprint_of(run)
    if begun not in (None, cache.manifest["fingerprint"]) and cache.folder is not None:
        for folder in sorted(cache.path.absolute().parent.glob(f"{glob.escape(cache.path.absolute().name)}.gen-*")):
            if (found := find_manifest(folder)) is not None and found["fingerprint"] == begun:
                cache = Cache.open(folder)
    return select(cache, config.select)


def fingerprint_of(run: str | None) -> str | None:
    """The fingerprint of the cache that the run in a folder was begun with; None where none is recorded."""
    return read_environment(Path(run)).get("cache_fingerprint") if run else None


def read_environment(run: Path) -> dict[str, Any]:
    """RUN/environment.json; empty where an earlier release began the run."""
    file = run / ENVIRONMENT
    return read_json(file, EnvironmentForm, "restore it from a copy") if file.exists() or file.is_symlink() else {}


def _copies() -> Path:
    """Where copies of what is read of the hub's caches are kept, unless --local-cache says another folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "dvla", "caches")


def _open(config: TrainConfig) -> Cache:
    if (Path(config.cache) / INDEX).is_file():
        return WebDatasetCache.open(config.cache)
    url, limit = dataset_url(config.cache), None if config.local_gib is None else round(config.local_gib * 2**30)
    if url is not None:
        try:
            return Cache.open(url, config.local or _copies(), limit)
        except UserError as error:
            raise UserError(f"there is no folder {config.cache}, and of the hub: {error}") from None
    if is_remote(config.cache) and config.local is None:
        raise UserError(f"{config.cache} is remote; give a folder for copies of what is read: --local-cache FOLDER")
    return Cache.open(config.cache, config.local, limit)


def require_trainable(config: TrainConfig, cache: Cache, live: bool = False) -> None:
    """`UserError` naming the setting that `cache` (or this machine) cannot honor. `live`: features are computed at
    each step, so the cache need not hold augmented ones, nor features at all."""
    if cache.boundary is not None and not live:
        raise UserError(
            f"cache {cache.path} holds no features but what enters the last {cache.boundary} blocks (--boundary), for "
            "`dvla finetune --lora --from-cache`; to train from features build one without --boundary"
        )
    if config.image_aug and not live:
        require_variants(cache)
    dit, usable = dit_config(config.model_size, **config.dit), [~d.quarantined for d in cache.datasets]
    longest = max((int(d.episode_length[use].max()) for d, use in zip(cache.datasets, usable) if use.any()), default=0)
    if not longest:
        raise UserError(f"cache {cache.path} has no usable episode: all are in quarantine; see its quarantine.jsonl")
    if dit.horizon > longest:
        raise UserError(
            f"the horizon is {dit.horizon} steps and the longest episode of {cache.path} has {longest} frames; give a "
            "shorter one, e.g. --set dit.horizon=8"
        )
    require_history(cache, config.past)
    for name, offsets in (("history", config.history), ("proprio_history", config.proprio_history)):
        if -min(offsets) >= longest:
            raise UserError(
                f"{name} reaches {-min(offsets)} frames back and the longest episode of {cache.path} has {longest}; "
                f"give offsets down to {1 - longest}"
            )
    views, embodiments = max(len(d.views) for d in cache.datasets), 1 + max(d.embodiment_id for d in cache.datasets)
    if views > PolicyNetConfig.max_views:
        raise UserError(
            f"a dataset of {cache.path} has {views} views and the network can tell {PolicyNetConfig.max_views} apart; "
            "build the cache with fewer, using --view"
        )
    for name, count in (("dit.embodiments", dit.embodiments), ("loss.embodiments", config.loss.embodiments)):
        if embodiments > count:
            raise UserError(
                f"{name} is {count}; it must be at least {embodiments}: cache {cache.path} holds embodiment number "
                f"{embodiments - 1}"
            )
    _require_samples(config, cache, usable)
    require_trackers(config)


def _require_samples(config: TrainConfig, cache: Cache, usable: list[np.ndarray]) -> None:
    """`UserError` when the split leaves nothing to train or to evaluate on, or a weight cannot be given."""
    kept, out = [], 0
    for d, use in zip(cache.datasets, usable):
        held = held_out(d.name, d.episode_id[use], config.holdout, 0)
        kept.append(len(d.samples(np.flatnonzero(use)[~held])))
        out += int(held.sum())
    override(mixture(kept, config.temperature), [d.name for d in cache.datasets], config.weights)
    if config.holdout and config.eval_every and not out:
        raise UserError(
            f"no dataset of {cache.path} has two usable episodes, so none can be held out for evaluation; train with "
            "--set holdout=0"
        )


def require_deepspeed() -> None:
    """`UserError` where DeepSpeed is not installed."""
    require_package("deepspeed", "strategy zero2", "deepspeed", instead="train with --strategy ddp or fsdp2")
