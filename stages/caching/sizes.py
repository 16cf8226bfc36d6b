"""Bytes of a planned cache, and whether a disk has room for them."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from ...cache.actions.slots import UNIFIED_DIM
from ...cache.store.plan import BuildPlan, DatasetPlan, ShardTask
from ...cache.store.shard_writer import index_nbytes
from ...common.text import size
from ...errors import UserError

ROW_NBYTES = 2 * 4 * UNIFIED_DIM + 8  # of a frame's tables: action, proprio, timestamp
ROOM_MARGIN = 1.02  # over the bytes counted: folders, blocks that are not full, JSON
BEST_COMPRESSION = 1.5  # no lossless compression of features reached it; `dvla cache plan` measures the real ratio
CHARACTERS_PER_TOKEN = 3  # of an instruction; few words have more tokens


def features_nbytes(plan: BuildPlan, tasks: Iterable[ShardTask]) -> int:
    """Bytes of the shards of `tasks` before compression: features, token scales and indexes."""
    record = plan.format.record_nbytes(plan.tokens, plan.width)
    index = index_nbytes(plan.shard_frames) * (1 + plan.format.quantized)
    return sum((t.stop - t.start) * record + index for t in tasks)


def tables_nbytes(plan: BuildPlan, dataset: DatasetPlan) -> int:
    """Bytes of a dataset without its features. The number of text tokens is estimated from the longest instruction."""
    rows = dataset.frames * ROW_NBYTES
    tokens = 1 + max(len(text) for text in dataset.instructions) // CHARACTERS_PER_TOKEN
    text = len(dataset.instructions) * tokens * plan.width * 2  # [n,Lt,D] float16
    return rows + text + 4 * 8 * len(dataset.episodes) + len(dataset.views) * plan.tokens * plan.width * 2


def plan_nbytes(plan: BuildPlan) -> int:
    """Bytes of the whole cache before compression."""
    return features_nbytes(plan, plan.tasks()) + sum(tables_nbytes(plan, d) for d in plan.datasets)


def existing_folder(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there: its file system is where `path` will be."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def free_nbytes(path: Path) -> int:
    """Free bytes, for this user, of the file system that holds or will hold `path`."""
    return shutil.disk_usage(existing_folder(path)).free


def require_room(
    plan: BuildPlan, out: Path, tasks: Sequence[ShardTask] | None = None, datasets: Sequence[str] | None = None
) -> None:
    """`UserError` when the disk of `out` cannot hold the shards of `tasks` and the tables of `datasets` (None: all).

    Compressed features are counted at `BEST_COMPRESSION`, so that a refusal is never wrong.
    """
    features = features_nbytes(plan, plan.tasks() if tasks is None else tasks)
    if plan.format.compression != "none":
        features = int(features / BEST_COMPRESSION)
    tables = sum(tables_nbytes(plan, d) for d in plan.datasets if datasets is None or d.name in datasets)
    needed, free = int((features + tables) * ROOM_MARGIN), free_nbytes(out)
    if needed > free:
        raise UserError(
            f"{out} needs {size(needed)} more, and its disk has {size(free)} free; choose --dtype int8, fewer "
            "--tokens, a larger --frame-stride or another --out (`dvla cache plan` compares them)"
        )
