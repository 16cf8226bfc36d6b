"""A few observations of each dataset, decoded and timed as a build decodes them. H × W: the size of an image."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from ....cache.readers import Source
from ....cache.readers.episode import CorruptEpisode, View
from ....cache.store.plan import DatasetPlan
from ....errors import UserError
from .forecast import ViewCost

RUNS = 2  # episodes of each dataset that are decoded


@dataclass
class Look:
    """Images of one camera of one dataset, and the time to decode them. All cameras show the same observations."""

    dataset: str
    view: str
    images: list[np.ndarray] = field(default_factory=list)  # uint8 [H,W,3] of observations
    instructions: list[str] = field(default_factory=list)  # of the images
    pairs: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)  # (observation, last skipped frame)
    pair_instructions: list[str] = field(default_factory=list)
    load: list[float] = field(default_factory=list)  # seconds, per episode: for the first time
    reload: list[float] = field(default_factory=list)  # seconds, per episode: again
    first: list[float] = field(default_factory=list)  # seconds, per episode
    following: list[float] = field(default_factory=list)  # seconds per further observation, per episode

    def cost(self) -> ViewCost:
        load, reload, first = (float(np.mean(seconds)) for seconds in (self.load, self.reload, self.first))
        return ViewCost(self.dataset, self.view, load, reload, first, float(np.mean(self.following or [first])))


def look_into(source: Source, dataset: DatasetPlan, stride: int, each: int) -> list[Look]:
    """Decode about `each` observations of every view, of `RUNS` episodes; `UserError` when none works."""
    looks = {view: Look(dataset.name, view) for view in dataset.views}
    count, runs, reason = len(dataset.episodes), 0, ""
    for number in dict.fromkeys([0, count // 2, *range(count)]):  # first and middle; others where these are corrupt
        entry = dataset.episodes[number]
        try:
            began = time.perf_counter()
            episode = source.load(entry.episode_id)
            loaded = time.perf_counter()
            source.load(entry.episode_id)
            again = time.perf_counter() - loaded
            seen = [_decode(view, stride, -(-each // RUNS)) for view in episode.views]
        except CorruptEpisode as error:
            reason = str(error)
            continue
        for view, (images, pairs, first, following) in zip(episode.views, seen):
            look = looks[view.name]
            look.images += images
            look.pairs += pairs
            look.instructions += [entry.instruction] * len(images)
            look.pair_instructions += [entry.instruction] * len(pairs)
            look.load.append(loaded - began)
            look.reload.append(again)
            look.first.append(first)
            look.following += following
        runs += 1
        if runs == RUNS:
            break
    if not runs:
        raise UserError(f"no episode of {source.path} can be decoded ({reason}); run `dvla data check` on it")
    return list(looks.values())


def _decode(
    view: View, stride: int, count: int
) -> tuple[list[np.ndarray], list[tuple[np.ndarray, np.ndarray]], float, list[float]]:
    """(images of the first `count` observations, a pair over a stride, seconds to the first image, per other)."""
    rows = min(count, -(-view.length // stride))
    frames = islice(view.frames(0, (rows - 1) * stride + 1), 0, None, stride)
    began = time.perf_counter()
    images = [next(frames)]
    first = time.perf_counter()
    images += frames
    ended = time.perf_counter()
    pairs = [(images[0], next(view.frames(stride - 1, stride)))] if stride > 1 and view.length >= stride else []
    return images, pairs, first - began, [(ended - first) / (rows - 1)] if rows > 1 else []


def observations(looks: Sequence[Look]) -> tuple[list[tuple[np.ndarray, ...]], list[str]]:
    """Images of every view of all observations, and their instructions."""
    images: list[tuple[np.ndarray, ...]] = []
    instructions: list[str] = []
    for name in dict.fromkeys(look.dataset for look in looks):
        views = [look for look in looks if look.dataset == name]
        images += zip(*(look.images for look in views))
        instructions += views[0].instructions
    return images, instructions
