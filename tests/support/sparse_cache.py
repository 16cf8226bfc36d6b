"""Caches that are large on paper: shards are holes in a file, except for the row number at the head of each record."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import numpy as np

from dvla.cache.actions.statistics import RunningStatistics
from dvla.cache.store.manifest import shard_commit
from dvla.cache.store.plan import BuildPlan, DatasetPlan, DatasetTables, EpisodePlan
from dvla.cache.store.shard_writer import MISSING
from dvla.cache.store.writer import CacheWriter
from dvla.cache.store.zarr_format import features_folder
from dvla.common.files import crc32c

DESCRIPTION = {"state_map": {}, "environment": None, "starts": [], "license": "mit", "encoder": {}}
BLOCK = 65536  # rows of the tables made at a time


def make_plan(
    shards: int, shard_frames: int, tokens: int, width: int, views: tuple[str, ...] = ("front",), episode: int = 200
) -> BuildPlan:
    frames = shards * shard_frames
    lengths = [min(episode, frames - at) for at in range(0, frames, episode)]
    episodes = tuple(EpisodePlan(i, n, f"task {i % 50}", "hash") for i, n in enumerate(lengths))
    return BuildPlan((DatasetPlan("sparse", views, episodes),), tokens, width, shard_frames)


def tables(plan: BuildPlan) -> DatasetTables:
    """Tables whose first active slot is the row."""
    dataset = plan.datasets[0]
    values, mask = np.zeros((dataset.frames, 128), np.float32), np.zeros(128, bool)
    mask[:8] = True
    values[:, 0] = np.arange(dataset.frames)
    stats = RunningStatistics()
    for at in range(0, dataset.frames, BLOCK):
        stats.update(values[at : at + BLOCK])
    n, half = len(dataset.instructions), np.float16
    rotation, result = np.zeros(128, bool), stats.result()
    return DatasetTables(
        action=values,
        action_mask=mask,
        action_rotation=rotation,
        action_stats=result,
        proprio=values,
        proprio_mask=mask,
        proprio_rotation=rotation,
        proprio_stats=result,
        timestamp=np.arange(dataset.frames) / 30.0,
        text=np.ones((n, 16, plan.width), half),
        text_length=np.full(n, 16),
        null_text=np.zeros((2, plan.width), half),
        null_features={v: np.zeros((plan.tokens, plan.width), half) for v in dataset.views},
        embodiment=1,
        control_hz=30.0,
        attributes=DESCRIPTION,
    )


def build(path: Path, plan: BuildPlan, marked: bool = True) -> None:
    """A finished cache of holes, whose content `row_of` reads if they are `marked`. Its checksums are wrong."""
    record = plan.tokens * plan.width * 2
    with mock.patch("os.fsync"), CacheWriter.create_or_resume(path, {"encoder": {}}, plan) as writer:
        for task in writer.missing():
            shard = features_folder(path, task.dataset, task.array) / "c" / str(task.index) / "0" / "0"
            shard.parent.mkdir(parents=True)
            count = task.stop - task.start
            index = np.full((plan.shard_frames, 2), MISSING, "<u8")
            index[:count, 0], index[:count, 1] = np.arange(count) * record, record
            with open(shard, "wb", buffering=0) as file:
                for i in range(count if marked else 0):
                    os.pwrite(file.fileno(), np.int64(task.start + i).tobytes(), i * record)
                os.pwrite(file.fileno(), index.tobytes() + np.uint32(crc32c(index)).tobytes(), count * record)
            writer._commit(
                shard_commit(path, task),
                {shard: (shard.stat().st_size, 0)},
                quarantined=[],
            )
        writer.write_tables("sparse", tables(plan))
        writer.finish()


def row_of(tokens: np.ndarray) -> np.ndarray:
    """Rows int64 [B] of features float16 [B, tokens of one view, width]."""
    return np.ascontiguousarray(tokens.reshape(len(tokens), -1)[:, :4]).view(np.int64)[:, 0]
