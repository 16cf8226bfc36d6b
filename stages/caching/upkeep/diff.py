"""How two caches differ: settings, episodes, numbers, features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ....cache.store.cache import Cache
from ....cache.store.dataset import CacheDataset
from ....common import fingerprint as fp
from ....common.progress import Progress
from ....errors import UserError

BLOCK = 256 << 20  # bytes of features compared at a time


@dataclass(frozen=True)
class ArrayDiff:
    """Features of one view (or action, proprio, instruction) of the episodes that both caches hold."""

    dataset: str
    array: str
    compared: int  # frames
    equal: bool  # stored byte for byte alike, in all frames compared
    relative: float | None  # RMS of the difference over the RMS in the first cache; None: shapes differ


@dataclass(frozen=True)
class Drift:
    """How far apart the features of a dataset are in two caches, over all views of the frames compared."""

    dataset: str
    frames: int
    relative: float  # RMS of the difference over the RMS in the first cache
    cosine: float  # of a token in one cache and in the other, mean over tokens


@dataclass(frozen=True)
class CacheDiff:
    """How two finished caches differ; `same` when they do not."""

    fingerprint: tuple[str, ...]  # differing fields, episodes not among them
    only: tuple[str, ...]  # datasets, views and episodes in one of them alone, and episodes whose source differs
    arrays: tuple[ArrayDiff, ...]
    same_files: bool  # all features and tables have the same checksums
    drifts: tuple[Drift, ...] = ()  # of datasets whose features have one shape in both

    @property
    def same(self) -> bool:
        """Nothing differs, in what was compared and by the checksums of what was not."""
        return self.same_files and not self.fingerprint and not self.only and all(a.equal for a in self.arrays)


def diff(a: Path, b: Path, samples: int = 256, seed: int = 0, progress: Progress = lambda *_: None) -> CacheDiff:
    """Compare two finished caches.

    Compared are actions, proprio and instructions of all common episodes, features of up to `samples` random frames of
    each view, and the checksums of everything. `UserError` as `Cache.open`.
    """
    first, second = Cache.open(a), Cache.open(b)
    if samples < 1:
        raise UserError(f"--samples {samples}: give at least 1 frame to compare")
    lines = fp.diff(_settings(first), _settings(second), "A has", "B has")
    names = {d.name: d for d in second.datasets}
    only = [f"dataset {d.name} only in A" for d in first.datasets if d.name not in names]
    only += [f"dataset {name} only in B" for name in names if name not in {d.name for d in first.datasets}]
    arrays: list[ArrayDiff] = []
    drifts: list[Drift] = []
    common = [(d, names[d.name]) for d in first.datasets if d.name in names]
    for i, (x, y) in enumerate(common):
        only += _only(x, y)
        found, drift = _compare(x, y, samples, np.random.default_rng(seed))
        arrays += found
        drifts += drift
        progress("comparing: datasets", i + 1, len(common))
    files = [
        {name: entry for name, entry in c.manifest["files"].items() if not name.endswith("zarr.json")}
        for c in (first, second)
    ]
    return CacheDiff(tuple(lines), tuple(only), tuple(arrays), files[0] == files[1], tuple(drifts))


def _settings(cache: Cache) -> dict[str, Any]:
    """The fingerprint without its entries for single episodes."""
    store = {k: v for k, v in cache.fingerprint["store"].items() if k not in ("datasets", "order")}
    return {**cache.fingerprint, "store": store}


def _only(x: CacheDataset, y: CacheDataset) -> list[str]:
    lines = [f"view {x.name}/{v} only in {'A' if v in x.views else 'B'}" for v in sorted(set(x.views) ^ set(y.views))]
    one, two = (
        dict(zip(d.episode_id.tolist(), zip(d.attributes["source_hashes"], d.quarantined.tolist()))) for d in (x, y)
    )
    for name, mine, other in (("A", one, two), ("B", two, one)):
        alone = sorted(mine.keys() - other.keys())
        if alone:
            lines.append(f"{len(alone)} episodes of {x.name} only in {name}: {_few(alone)}")
    changed = sorted(e for e in one.keys() & two.keys() if one[e][0] != two[e][0])
    if changed:
        lines.append(f"{len(changed)} episodes of {x.name} have another source: {_few(changed)}")
    lines += [
        f"episode {e} of {x.name} is quarantined only in {'A' if one[e][1] else 'B'}"
        for e in sorted(one.keys() & two.keys())
        if one[e][1] != two[e][1]
    ]
    return lines


def _few(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", …" if len(numbers) > 8 else "")


def _compare(
    x: CacheDataset, y: CacheDataset, samples: int, rng: np.random.Generator
) -> tuple[list[ArrayDiff], list[Drift]]:
    """Tables of all frames of common episodes of the same length; features of some observations of both."""
    positions = {e: i for i, e in enumerate(y.episode_id.tolist())}
    pairs = [
        (i, j)
        for i, j in ((i, positions.get(e)) for i, e in enumerate(x.episode_id.tolist()))
        if j is not None and x.episode_length[i] == y.episode_length[j] and not x.quarantined[i] | y.quarantined[j]
    ]
    if not pairs:
        return [], []
    step = np.concatenate([np.arange(x.episode_length[i]) for i, _ in pairs])
    counts = [x.episode_length[i] for i, _ in pairs]
    rows = [np.repeat([d.episode_start[pair[k]] for pair in pairs], counts) + step for k, d in ((0, x), (1, y))]
    out = [_table(x.name, kind, getattr(x, kind), getattr(y, kind), *rows) for kind in ("action", "proprio")]
    texts = [(x.instructions[x.episode_instruction[i]], y.instructions[y.episode_instruction[j]]) for i, j in pairs]
    words = sum(s != t for s, t in texts)
    out += [ArrayDiff(x.name, "instruction", len(pairs), words == 0, words / len(pairs))]
    seen = np.flatnonzero(x.has_features(rows[0]) & y.has_features(rows[1]))
    chosen = np.sort(rng.choice(seen, min(samples, len(seen)), replace=False))
    arrays = [(view, k) for view in x.views if view in y.views for k in range(min(x.variants, y.variants) + 1)]
    found = [_features(x, y, view, k, rows[0][chosen], rows[1][chosen]) for view, k in arrays]
    out += [array for array, _ in found]
    plain = [sums for (_, k), (_, sums) in zip(arrays, found) if k == 0] or [np.zeros(4)]
    square, scale, cosine, tokens = np.sum(plain, 0)
    if not tokens:
        return out, []
    return out, [Drift(x.name, len(chosen), _relative(square, scale), float(cosine / tokens))]


def _relative(square: float, scale: float) -> float:
    """RMS of a difference over that of the values, from their sums of squares."""
    return float(square / max(scale, 1e-30)) ** 0.5


def _table(dataset: str, kind: str, a: np.ndarray, b: np.ndarray, rows: np.ndarray, others: np.ndarray) -> ArrayDiff:
    equal, square, scale = True, 0.0, 0.0
    for at in range(0, len(rows), 65536):
        one, two = a[rows[at : at + 65536]], b[others[at : at + 65536]]
        equal &= one.tobytes() == two.tobytes()
        square += float(((one - two).astype(np.float64) ** 2).sum())
        scale += float((one.astype(np.float64) ** 2).sum())
    return ArrayDiff(dataset, kind, len(rows), equal, _relative(square, scale))


def _features(
    x: CacheDataset, y: CacheDataset, view: str, variant: int, rows: np.ndarray, others: np.ndarray
) -> tuple[ArrayDiff, np.ndarray]:
    """The difference, and [4]: sums of its squares, of x's squares and of the tokens' cosines, number of tokens."""
    array = f"{view}.aug{variant}" if variant else view
    if (x.tokens, x.width) != (y.tokens, y.width):
        return ArrayDiff(x.name, array, len(rows), False, None), np.zeros(4)
    equal, sums = x.format.dtype == y.format.dtype, np.zeros(4)
    if equal and x.channel_scale is not None:
        equal = y.channel_scale is not None and np.array_equal(x.channel_scale, y.channel_scale)
    size = max(1, BLOCK // (x.tokens * x.width * 4))
    for at in range(0, len(rows), size):
        part = slice(at, at + size)
        if equal:
            stored = zip(x.records(view, rows[part], variant), y.records(view, others[part], variant))
            equal = all(u is None or v is not None and u.tobytes() == v.tobytes() for u, v in stored)
        one, two = (d.features(view, r[part], variant).astype(np.float32) for d, r in ((x, rows), (y, others)))
        norms = np.linalg.norm(one, axis=-1) * np.linalg.norm(two, axis=-1)  # [n,K]
        cosine = (one * two).sum(-1) / np.maximum(norms, 1e-30)  # [n,K]
        real = one.any(-1) | two.any(-1)  # [n,K]; the others are room that a prompt leaves
        sums += (
            np.square(one - two).sum(dtype=np.float64),
            np.square(one).sum(dtype=np.float64),
            cosine[real].sum(dtype=np.float64),
            real.sum(),
        )
    return ArrayDiff(x.name, array, len(rows), equal, _relative(sums[0], sums[1])), sums
