"""A small cache with random features, no encoder. As a script, `python synthetic_cache.py OUT [seconds per frame]`."""

from __future__ import annotations

import json
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dvla.cache.actions.action_map import ActionMap, FieldSpec
from dvla.cache.actions.statistics import RunningStatistics
from dvla.cache.store.codec import quantize
from dvla.cache.store.feature_format import FeatureFormat
from dvla.cache.store.plan import BuildPlan, DatasetPlan, DatasetTables, EpisodePlan, ShardTask
from dvla.cache.store.writer import CacheWriter, Features
from dvla.common.files import crc32c
from dvla.errors import Failed

TOKENS, WIDTH, SHARD = 3, 8, 16
FINGERPRINT = {"encoder": {"resolution": 448, "weights": "abc"}, "prompt": "do {instruction}"}
MAP = ActionMap([FieldSpec(fields=("eef_pos_x", "eef_pos_y", "eef_pos_z")), FieldSpec(field="gripper_open")], 30.0)
DESCRIPTION = {
    "state_map": MAP.to_dict(),
    "environment": None,
    "starts": [],
    "license": "mit",
    "dataset_config": "synthetic",
    "encoder": {"vlm": "qwen3vl", "path": "nowhere"},
}  # what training copies into a policy
BROKEN = ("alpha", "wrist", 13)  # (dataset, view, episode id): decoding fails at its third frame
CHANNELS = np.array([1, 1, 0.5, 2, 1, 1, 3, 1], np.float32)  # channel scales of 8-bit caches
SETTINGS: dict[str, dict[str, Any]] = {  # ways of storing, as arguments of `make_plan`
    "fp16": {},
    "fp16-lz4-stride3": {"format": FeatureFormat("float16", "lz4"), "frame_stride": 3},
    "int8-variants": {"format": FeatureFormat("int8"), "variants": 2},
    "int8-zstd-stride2-variant": {"format": FeatureFormat("int8", "zstd"), "frame_stride": 2, "variants": 1},
    "fp8": {"format": FeatureFormat("float8_e4m3fn")},
}


def make_plan(shard_frames: int = SHARD, **settings: Any) -> BuildPlan:
    def dataset(name: str, views: tuple[str, ...], lengths: tuple[int, ...], **kw: object) -> DatasetPlan:
        episodes = (EpisodePlan(10 + i, n, f"{name} task {i % 3}", f"hash{i}") for i, n in enumerate(lengths))
        return DatasetPlan(name, views, tuple(episodes), **kw)

    return BuildPlan(
        (
            dataset("alpha", ("front", "wrist"), (5, 23, 1, 17, 9, 30, 12), quarantined=((99, "no video"),)),
            dataset("beta", ("top",), (8, 40, 3, 21)),
        ),
        TOKENS,
        WIDTH,
        shard_frames,
        **settings,
    )


def generator(*key: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def feature(dataset: str, view: str, row: int, variant: int = 0) -> np.ndarray:
    """The [tokens, width] float16 feature of one frame."""
    key = (dataset, view, int(row), variant) if variant else (dataset, view, int(row))
    return generator(*key).standard_normal((TOKENS, WIDTH)).astype(np.float16)


def stored(plan: BuildPlan, features: np.ndarray) -> Features:
    """What a cache of this plan holds of float16 [n, tokens, width]."""
    if not plan.format.quantized:
        return features
    codes, scale = quantize(torch.from_numpy(features), torch.from_numpy(CHANNELS), plan.format.dtype)
    return codes.numpy(), scale.numpy()


def make_tables(plan: BuildPlan, name: str) -> DatasetTables:
    dataset = next(d for d in plan.datasets if d.name == name)
    rng, n = generator(name), len(dataset.instructions)
    tables = {}
    for kind, active in (("action", slice(30, 45)), ("proprio", slice(30, 50))):
        mask = np.zeros(128, bool)
        mask[active] = True
        values = (rng.standard_normal((dataset.frames, 128)) * mask).astype(np.float32)
        stats = RunningStatistics()
        stats.update(values)
        rotation = np.zeros(128, bool)
        rotation[33:39] = True
        tables |= {kind: values, f"{kind}_mask": mask, f"{kind}_rotation": rotation, f"{kind}_stats": stats.result()}
    text_tokens = 4 if name == "alpha" else 6
    half = lambda *shape: rng.standard_normal(shape).astype(np.float16)  # noqa: E731
    return DatasetTables(
        **tables,
        timestamp=np.arange(dataset.frames) / 30.0,
        text=half(n, text_tokens, WIDTH),
        text_length=np.arange(1, n + 1),
        null_text=half(2, WIDTH),
        null_features={view: half(TOKENS, WIDTH) for view in dataset.views},
        embodiment=1 if name == "alpha" else 4,
        control_hz=30.0 if name == "alpha" else 15.0,
        attributes={"licence": "mit", "action_map": MAP.to_dict(), **DESCRIPTION},
    )


def produce(plan: BuildPlan, task: ShardTask, delay: float = 0.0) -> Iterator[Features | Failed]:
    """The observations of one shard, as a decoder and encoder would give them."""
    dataset = next(d for d in plan.datasets if d.name == task.dataset)
    counts = dataset.observations(plan.frame_stride)
    starts = np.cumsum(counts) - counts
    for observation in range(task.start, task.stop):
        time.sleep(delay)
        i = int(np.searchsorted(starts, observation, side="right")) - 1
        step, episode = int(observation - starts[i]) * plan.frame_stride, dataset.episodes[i].episode_id
        values = feature(task.dataset, task.view, int(dataset.starts[i]) + step, task.variant)
        if (task.dataset, task.view, episode) == BROKEN and step >= 2:
            yield Failed(episode, f"{task.dataset} episode {episode}", "unreadable-file", "video ends at frame 2", 1)
        else:
            yield stored(plan, values[None])


def build(
    path: Path,
    *,
    delay: float = 0.0,
    stop_after: int | None = None,
    plan: BuildPlan | None = None,
    arrange: Callable[[list[ShardTask]], list[ShardTask]] = list,
) -> None:
    """Build or resume; after `stop_after` shards it gives up without finishing."""
    plan = plan or make_plan()
    with CacheWriter.create_or_resume(path, FINGERPRINT, plan) as writer:
        writer.channel_scale(lambda: CHANNELS)
        for done, task in enumerate(arrange(writer.missing())):
            if done == stop_after:
                return
            writer.write_shard(task, produce(plan, task, delay))
        for name in writer.tables_missing():
            writer.write_tables(name, make_tables(plan, name))
        writer.finish()


def seal(path: Path) -> None:
    """Write the manifest's checksums anew, as who changes a cache on purpose would."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name in manifest["files"]:
        if (path / name).is_file():
            data = (path / name).read_bytes()
            manifest["files"][name] = {"bytes": len(data), "crc32c": crc32c(data)}
    manifest["bytes"] = sum(entry["bytes"] for entry in manifest["files"].values())
    (path / "manifest.json").write_text(json.dumps(manifest))


if __name__ == "__main__":
    build(Path(sys.argv[1]), delay=float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)
