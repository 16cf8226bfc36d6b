"""Small LeRobot datasets for tests of `meta/` and of images in parquet: a few rows, 16-pixel PNGs, any tasks."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FPS = 10
LENGTHS = (4, 6, 5)
CAMERA = "observation.images.front"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a" * 16 + b"\nsize 132735\n"


def png(episode: int, frame: int) -> bytes:
    """A 16-pixel image whose color tells its episode and frame."""
    out = io.BytesIO()
    Image.new("RGB", (16, 16), (40 * episode, 20 * frame, 90)).save(out, "PNG")
    return out.getvalue()


def rows(episode: int, length: int, first: int, task: int) -> dict[str, Any]:
    """Columns of one episode, as a reader of metaworld's four numbers takes them."""
    times = np.arange(length)
    values = np.stack([np.sin(times + episode), np.cos(times), times / 20, np.ones(length)], 1).astype(np.float32)
    return {
        "action": pa.array(list(values)),
        "observation.state": pa.array(list(values / 2)),
        CAMERA: pa.array([{"bytes": png(episode, i), "path": None} for i in times]),
        "timestamp": pa.array((times / FPS).astype(np.float32)),
        "frame_index": pa.array(times),
        "episode_index": pa.array(np.full(length, episode)),
        "index": pa.array(first + times),
        "task_index": pa.array(np.full(length, task)),
    }


def info(version: str, **changes: Any) -> dict[str, Any]:
    """A plain info.json; `changes` replace entries, those that are None leave them out."""
    vector, one = {"dtype": "float32", "shape": [4], "names": None}, {"dtype": "int64", "shape": [1], "names": None}
    features = {"action": vector, "observation.state": vector, "timestamp": {**one, "dtype": "float32"}}
    features |= dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), one)
    features[CAMERA] = {"dtype": "image", "shape": [16, 16, 3], "names": ["height", "width", "channel"]}
    is_v3 = version == "v3.0"
    given = {
        "codebase_version": version,
        "robot_type": "metaworld_sawyer",
        "total_episodes": len(LENGTHS),
        "total_frames": sum(LENGTHS),
        "chunks_size": 1000,
        "fps": FPS,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        if is_v3
        else "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": None,
        "features": features,
    }
    return {k: v for k, v in {**given, **changes}.items() if v is not None or k not in changes}


def write_v2(root: Path, tasks: Sequence[str] = ("push the puck",), **changes: Any) -> Path:
    """A v2.1 dataset, one file per episode; task k in episode k modulo their number."""
    (root / "meta").mkdir(parents=True)
    (root / "data/chunk-000").mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info("v2.1", **changes)))
    lines(root / "meta/tasks.jsonl", [{"task_index": i, "task": t} for i, t in enumerate(tasks)])
    listed = [
        {"episode_index": e, "tasks": [tasks[e % len(tasks)]], "length": length} for e, length in enumerate(LENGTHS)
    ]
    lines(root / "meta/episodes.jsonl", listed)
    for e, length in enumerate(LENGTHS):
        table = pa.table(rows(e, length, sum(LENGTHS[:e]), e % len(tasks)))
        pq.write_table(table, root / f"data/chunk-000/episode_{e:06d}.parquet")
    return root


def write_v3(root: Path, tasks: Sequence[str] = ("push the puck",), **changes: Any) -> Path:
    """A v3.0 dataset, all episodes in one file; task k in episode k modulo their number."""
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    (root / "data/chunk-000").mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info("v3.0", **changes)))
    pq.write_table(
        pa.table({"task_index": range(len(tasks)), "__index_level_0__": list(tasks)}), root / "meta/tasks.parquet"
    )
    starts = [sum(LENGTHS[:e]) for e in range(len(LENGTHS))]
    listed = [
        {
            "episode_index": e,
            "tasks": [tasks[e % len(tasks)]],
            "length": length,
            "data/chunk_index": 0,
            "data/file_index": 0,
            "dataset_from_index": starts[e],
            "dataset_to_index": starts[e] + length,
        }
        for e, length in enumerate(LENGTHS)
    ]
    pq.write_table(pa.Table.from_pylist(listed), root / "meta/episodes/chunk-000/file-000.parquet")
    parts = [pa.table(rows(e, length, starts[e], e % len(tasks))) for e, length in enumerate(LENGTHS)]
    pq.write_table(pa.concat_tables(parts), root / "data/chunk-000/file-000.parquet")
    return root


def lines(path: Path, values: Sequence[Any], ascii: bool = True) -> None:
    """A JSON lines file."""
    path.write_text("".join(json.dumps(v, ensure_ascii=ascii) + "\n" for v in values), encoding="utf-8")


def change_info(root: Path, **changes: Any) -> None:
    """Replace entries of info.json; None leaves an entry out."""
    path = root / "meta/info.json"
    given = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in given.items() if v is not None or k not in changes}))


def change_table(path: Path, change: Any) -> None:
    """Replace a parquet file by `change(table)`."""
    pq.write_table(change(pq.read_table(path)), path)
