"""A cache of which some demonstrations are used, and of these the frames with motion; its features stay as they are.

What is learned from it is what a cache of these demonstrations alone would teach: the same samples in the same order,
the same statistics, the same padding. Letters: N frames, E episodes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...errors import UserError
from ..actions.idle import bands, idle_frames
from ..actions.selection import Choice, Selection
from ..actions.statistics import Statistics, statistics_of
from ..store.cache import Cache
from ..store.dataset import CacheDataset
from .provenance import choice_of

LOOKED_AT = 64  # episodes by which the share of idle frames is estimated


def select(cache: Cache, selection: Selection) -> Cache:
    """`cache` as `selection` leaves it. `UserError` for episodes that it does not hold, or where none is left."""
    if not selection:
        return cache
    choices = selection.by_dataset([d.name for d in cache.datasets])
    if selection.success_only and not any(
        d.attributes.get("failed") or choice_of(cache, d.name).success_only for d in cache.datasets
    ):
        raise UserError(
            f"--success-only: cache {cache.path} marks no demonstration as failed; leave it out, or, if an earlier "
            "release built the cache, build it anew with --success-only"
        )
    chosen = object.__new__(type(cache))  # `copy` would open it again
    chosen.__dict__ |= cache.__dict__
    chosen.datasets = tuple(_selected(d, choices[d.name]) for d in cache.datasets)
    return chosen


def _selected(d: CacheDataset, choice: Choice) -> CacheDataset:
    if not choice:
        return d
    known = sorted({*d.episode_id.tolist(), *d.attributes["quarantined"]})
    choice = choice.numbered(known, d.name, None)
    used = set(choice.episodes(known, d.name))
    if choice.success_only:
        used -= set(d.attributes.get("failed", ()))
    mask = np.isin(d.episode_id, list(used))
    if not (mask & ~d.quarantined).any():
        raise UserError(f"no usable episode of {d.name} is left by {choice}; choose others")
    chosen = copy.copy(d)
    for name in ("action_normalizer", "proprio_normalizer", "scale_statistics"):
        chosen.__dict__.pop(name, None)
    chosen.used, chosen.quarantined = mask, d.quarantined | ~mask
    chosen.attributes = {**d.attributes, "left_out": int((~mask).sum()), "selection": str(choice)}
    if not mask.all():
        chosen.attributes |= {f"{kind}_stats": _statistics(d, kind, mask).to_dict() for kind in ("action", "proprio")}
        if len(d.attributes["starts"]) == len(mask):
            chosen.attributes["starts"] = [s for s, use in zip(d.attributes["starts"], mask.tolist()) if use]
        chosen.text = d.text[:, : int(d.text_length[np.unique(d.episode_instruction[mask])].max())]
    if choice.drop_idle or choice.frames is not None:
        chosen.idle = _not_sampled(chosen, choice, np.flatnonzero(mask))
    return chosen


def _statistics(d: CacheDataset, kind: str, used: np.ndarray) -> Statistics:
    """Of the rows of the episodes `used` [E] bool."""
    table = getattr(d, kind)
    spans = zip(d.episode_start[used].tolist(), d.episode_length[used].tolist())
    return statistics_of(*(table[start : start + length] for start, length in spans))


def _not_sampled(d: CacheDataset, choice: Choice, episodes: np.ndarray) -> np.ndarray:
    """[N] bool: the frames of these episodes (positions in the table) that are not trained on."""
    idle = np.zeros(d.frames, bool)
    look = idle_of(d)
    for e in episodes.tolist():
        number, start, length = int(d.episode_id[e]), int(d.episode_start[e]), int(d.episode_length[e])
        choice.require_frames(number, length, d.name)
        idle[start : start + length] = not_kept(choice, number, length)
        if choice.drop_idle:
            idle[start : start + length] |= look(e)
    return idle


def not_kept(choice: Choice, number: int, length: int) -> np.ndarray:
    """[length] bool: the frames of an episode that the choice's list of frames to keep leaves out."""
    out = np.full(length, choice.frames is not None)
    for first, end in (choice.frames or {}).get(str(number), ()):
        out[first:end] = False
    return out


def idle_of(d: CacheDataset) -> Callable[[int], np.ndarray]:
    """A function: position of an episode → [T] bool, its idle frames."""
    tables = [
        (getattr(d, kind), bands(Statistics.from_dict(d.attributes[f"{kind}_stats"]), getattr(d, f"{kind}_mask")))
        for kind in ("action", "proprio")
    ]

    def look(e: int) -> np.ndarray:
        rows = slice(int(d.episode_start[e]), int(d.episode_start[e] + d.episode_length[e]))
        return idle_frames([(values[rows], band) for values, band in tables], d.control_hz)

    return look


def idle_share(datasets: Sequence[CacheDataset]) -> float:
    """The share of idle frames, of some episodes of each dataset: of all where few."""
    idle: list[Any] = []
    for d in datasets:
        usable, look = np.flatnonzero(~d.quarantined), idle_of(d)
        some = np.unique(np.linspace(0, len(usable) - 1, min(LOOKED_AT, len(usable))).astype(int))
        idle += [look(e) for e in usable[some].tolist()]
    return float(np.concatenate(idle).mean()) if idle else 0.0
