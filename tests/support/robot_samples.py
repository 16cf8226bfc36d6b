"""LeRobot datasets of any robot: its names, numbers of given ranges, one small camera. Nothing of lerobot is needed."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FPS = 10
CAMERA = "observation.images.front"


def write_robot(
    root: Path,
    robot: str | None,
    names: Sequence[str] | int,
    values: np.ndarray,
    *,
    state: np.ndarray | None = None,
    columns: tuple[str, str] = ("action", "observation.state"),
    episodes: int = 2,
    extra: Mapping[str, np.ndarray] | None = None,
    modality: Mapping[str, object] | None = None,
) -> Path:
    """A v2.1 dataset whose episodes all have `values` [T, d] as action and `state` (default: the same) as state.

    `names`: of the dimensions, or their number; `extra`: other columns [T] or [T, d].
    """
    state = values if state is None else state
    tables = {columns[0]: values, columns[1]: state, **(extra or {})}
    features = {
        key: {
            "dtype": str(array.dtype),
            "shape": list(array.shape[1:] or (1,)),
            "names": list(names) if not isinstance(names, int) and array.shape[1:] == (len(names),) else None,
        }
        for key, array in tables.items()
    }
    features[CAMERA] = {"dtype": "image", "shape": [24, 32, 3], "names": ["height", "width", "channels"]}
    (root / "meta").mkdir(parents=True)
    (root / "data/chunk-000").mkdir(parents=True)
    info = {
        "codebase_version": "v2.1",
        "robot_type": robot,
        "fps": FPS,
        "features": features,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": None,
    }
    (root / "meta/info.json").write_text(json.dumps(info))
    (root / "meta/tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": "pick the cube"}) + "\n")
    length = len(values)
    lines = [{"episode_index": e, "tasks": ["pick the cube"], "length": length} for e in range(episodes)]
    (root / "meta/episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if modality is not None:
        (root / "meta/modality.json").write_text(json.dumps(modality))
    for episode in range(episodes):
        images = [{"bytes": _png(episode, t), "path": None} for t in range(length)]
        rows = {key: pa.array(list(array)) for key, array in tables.items()}
        index = {
            "timestamp": (np.arange(length) / FPS).astype(np.float32),
            "frame_index": np.arange(length),
            "episode_index": np.full(length, episode),
            "task_index": np.zeros(length, np.int64),
        }
        pq.write_table(
            pa.table({**rows, **index, CAMERA: images}), root / f"data/chunk-000/episode_{episode:06d}.parquet"
        )
    return root


def ramp(limits: Sequence[tuple[float, float]], length: int = 20) -> np.ndarray:
    """float32 [length, d]: each dimension goes from the first to the second of its limits."""
    return np.stack([np.linspace(low, high, length) for low, high in limits], 1).astype(np.float32)


def _png(episode: int, frame: int) -> bytes:
    pixels = np.full((24, 32, 3), (40 * episode, 10 * frame, 90), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
