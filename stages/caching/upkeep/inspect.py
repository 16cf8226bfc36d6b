"""`dvla cache inspect`: what is in a finished cache. n frames, K tokens of a view, S side of a square token grid."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ....cache.actions.slots import slots
from ....cache.actions.statistics import Statistics
from ....cache.loader.provenance import choice_of
from ....cache.store.cache import Cache
from ....cache.store.dataset import CacheDataset
from ....common.files import write_output
from ....errors import UserError
from .status import summary

CELL = 16  # pixels of one token in an image of norms
GAP = 4  # pixels between frames
SHOWN_FRAMES = 8


@dataclass(frozen=True)
class SlotRow:
    """One active entry of the unified vector, in the robot's units (velocity slots per second)."""

    slot: int
    name: str
    mean: float
    std: float
    min: float
    max: float


@dataclass(frozen=True)
class DatasetFacts:
    """One dataset of a cache."""

    name: str
    views: tuple[str, ...]
    episodes: int
    quarantined: int
    frames: int
    observations: int
    lengths: tuple[int, int, int]  # shortest, median, longest episode, frames
    control_hz: float
    embodiment: str
    source: str
    selection: str  # options by which its demonstrations were chosen; "" for all
    instructions: tuple[tuple[str, int], ...]  # (text, episodes), most frequent first
    action: tuple[SlotRow, ...]
    proprio: tuple[SlotRow, ...]


@dataclass(frozen=True)
class CacheFacts:
    """What a finished cache was built with, and its tables."""

    path: str
    bytes: int
    files: int
    encoder: dict[str, Any]  # the encoder's settings
    fingerprint: dict[str, Any]  # the fingerprint in short
    datasets: tuple[DatasetFacts, ...]


def inspect(path: Path) -> CacheFacts:
    """Read the tables of a finished cache; no features. `UserError` as `Cache.open`."""
    cache = Cache.open(path)
    return CacheFacts(
        str(path),
        cache.manifest["bytes"],
        len(cache.manifest["files"]),
        cache.datasets[0].attributes.get("encoder", {}),
        summary(cache.fingerprint),
        tuple(_facts(d, str(choice_of(cache, d.name))) for d in cache.datasets),
    )


def _facts(d: CacheDataset, selection: str) -> DatasetFacts:
    counts = np.bincount(d.episode_instruction, minlength=len(d.instructions))
    order = np.argsort(-counts, kind="stable")
    lengths = d.episode_length
    return DatasetFacts(
        d.name,
        d.views,
        len(d.episode_id),
        int(d.quarantined.sum()),
        d.frames,
        d.observations,
        (int(lengths.min()), int(np.median(lengths)), int(lengths.max())),
        d.control_hz,
        str(d.attributes.get("embodiment_name", d.embodiment_id)),
        str(d.attributes.get("source", "")),
        selection,
        tuple((d.instructions[i], int(counts[i])) for i in order),
        _slots(d, "action"),
        _slots(d, "proprio"),
    )


def _slots(d: CacheDataset, kind: str) -> tuple[SlotRow, ...]:
    stats = Statistics.from_dict(d.attributes[f"{kind}_stats"])
    rows = np.flatnonzero(d.action_mask if kind == "action" else d.proprio_mask).tolist()
    return tuple(
        SlotRow(i, slots()[i].name, *(float(getattr(stats, field)[i]) for field in ("mean", "std", "min", "max")))
        for i in rows
    )


def norm_images(path: Path, out: Path) -> dict[Path, tuple[float, float]]:
    """Write a PNG per dataset and view: token norms of up to `SHOWN_FRAMES` observations side by side, dark to bright.

    Returns file → (smallest, largest norm). `UserError` when one of the files exists: nothing is overwritten.
    """
    from PIL import Image

    cache = Cache.open(path)
    files = {(d.name, view): out / f"{d.name}.{view}.png" for d in cache.datasets for view in d.views}
    for file in files.values():
        if file.exists():
            raise UserError(f"{file} exists; choose another --out")
    ranges = {}
    for d in cache.datasets:
        rows = shown_rows(d, SHOWN_FRAMES)
        for view in d.views:
            image, ranges[files[d.name, view]] = norm_strip(d, view, rows)
            png = io.BytesIO()
            Image.fromarray(image).save(png, "png")
            write_output(files[d.name, view], png.getvalue())
    return ranges


def shown_rows(d: CacheDataset, count: int) -> np.ndarray:
    """At most `count` frames, int64, spread evenly over a dataset's observations; none of a quarantined episode."""
    usable = np.flatnonzero(~d.quarantined[d.episode_of(d.frame_of(np.arange(d.observations)))])
    return d.frame_of(usable[np.unique(np.linspace(0, len(usable) - 1, count).astype(int))] if len(usable) else usable)


def norm_strip(d: CacheDataset, view: str, rows: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """Norms of the image's tokens (of query tokens where these are kept alone) of frames `rows` side by side, dark to
    bright, uint8 [H,W,3], and (smallest, largest norm)."""
    from matplotlib import colormaps

    norms = np.linalg.norm(d.features(view, rows).astype(np.float32), axis=-1)  # [n,K]
    first, count, layers = d.image_tokens
    if count:
        norms = norms[:, first : first + count * layers]
    low, high = (float(norms.min()), float(norms.max())) if norms.size else (0.0, 0.0)
    shape = (side, side) if (side := math.isqrt(count)) ** 2 == count > 0 else (1, norms.shape[1] // layers)  # S, S
    grid = norms.reshape(len(rows), *shape, layers).transpose(0, 3, 1, 2)  # [n,layers,S,S]
    grid = grid.reshape(len(rows), layers * shape[0], shape[1])  # layers below each other
    scaled = (grid - low) / max(high - low, 1e-12)
    tiles = [np.kron(frame, np.ones((CELL, CELL))) for frame in scaled]
    strips = [(colormaps["viridis"](tile)[..., :3] * 255).astype(np.uint8) for tile in tiles]
    strips = [np.pad(strip, ((0, 0), (0, GAP), (0, 0)), constant_values=255) for strip in strips]
    return np.concatenate(strips, axis=1)[:, :-GAP] if strips else np.full((CELL, CELL, 3), 255, np.uint8), (low, high)
