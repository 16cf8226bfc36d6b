"""LeRobot datasets written without lerobot, so that any of their parts can be odd; each image shows which one it is."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FPS = 10
LENGTHS = (12, 14, 10)
CAMERA = "observation.images.front"
DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
DATA_V2 = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO_V2 = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
TYPES = {
    "action": pa.list_(pa.float32()),
    "observation.state": pa.list_(pa.float32()),
    "timestamp": pa.float32(),
}


def image_of(number: int) -> np.ndarray:
    """The image of the dataset's row `number`, of the first 40."""
    return np.full((64, 64, 3), 8 + 6 * number, np.uint8)


def number_of(image: np.ndarray) -> int:
    return round((float(image.mean()) - 8) / 6)


def numbers(source: Any, episode: int) -> list[int]:
    """Which rows' images an episode shows, in order."""
    return [number_of(frame) for frame in source.load(episode).views[0].frames()]


def rows_of(episode: int, lengths: Sequence[int] = LENGTHS) -> list[int]:
    first = sum(lengths[:episode])
    return list(range(first, first + lengths[episode]))


def write_video(
    path: Path,
    shown: Sequence[int],
    pts: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
) -> None:
    """An H.264 file of the images `shown`; `pts` in thousandths of a second, None for one frame every 1/FPS."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=container or {}) as out:
        stream = out.add_stream("libx264", rate=FPS, options={"crf": "8", "g": "4", "bf": "0", **(options or {})})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for i, number in enumerate(shown):
            frame = av.VideoFrame.from_ndarray(image_of(number), format="rgb24")
            frame.pts, frame.time_base = 1000 * i // FPS if pts is None else pts[i], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def _png(number: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image_of(number)).save(data, "PNG")
    return data.getvalue()


def table_of(episode: int, lengths: Sequence[int] = LENGTHS, images: bool = False) -> pa.Table:
    """The rows of one episode as lerobot writes them; the action's first value is the row's number."""
    all_rows = rows_of(episode, lengths)
    count = len(all_rows)
    columns = {
        "action": [[r, 0.5, -0.5, 0.25] for r in all_rows],
        "observation.state": [[0.1 * r, 0.4, 0.2, 0.0] for r in all_rows],
        "timestamp": [k / FPS for k in range(count)],
        "frame_index": list(range(count)),
        "episode_index": [episode] * count,
        "index": all_rows,
        "task_index": [0] * count,
    }
    if images:
        columns[CAMERA] = [{"bytes": _png(r), "path": None} for r in all_rows]
    return pa.table({k: pa.array(v, TYPES.get(k)) for k, v in columns.items()})


def put(table: pa.Table, name: str, values: Any, kind: pa.DataType | None = None) -> pa.Table:
    """The table with another column in the place of `name`."""
    array = values if isinstance(values, (pa.Array, pa.ChunkedArray)) else pa.array(list(values), kind)
    at = table.column_names.index(name)
    return table.set_column(at, name, array)


def _info(version: str, kind: str, lengths: Sequence[int]) -> dict[str, Any]:
    def feature(dtype: str, *shape: int) -> dict[str, Any]:
        return {"dtype": dtype, "shape": list(shape), "names": None}

    is_v3 = version == "v3.0"
    features = {"action": feature("float32", 4), "observation.state": feature("float32", 4)}
    features |= {CAMERA: feature(kind, 64, 64, 3), "timestamp": feature("float32", 1)}
    features |= {k: feature("int64", 1) for k in ("frame_index", "episode_index", "index", "task_index")}
    return {
        "codebase_version": version,
        "robot_type": "metaworld_sawyer",
        "total_episodes": len(lengths),
        "total_frames": sum(lengths),
        "fps": FPS,
        "data_path": DATA if is_v3 else DATA_V2,
        "video_path": VIDEO if is_v3 else VIDEO_V2,
        "features": features,
    }


Change = Callable[[pa.Table], pa.Table]
Film = Callable[[Path, Sequence[int]], None]


def write_v2(
    root: Path, change: Change = lambda t: t, film: Film = write_video, images: bool = False, **info: Any
) -> Path:
    """v2.1: files of their own for each episode. `change` its rows, `film` writes its video; `info` goes to
    info.json."""
    (root / "meta").mkdir(parents=True)
    listed = [{"episode_index": e, "tasks": ["push"], "length": n} for e, n in enumerate(LENGTHS)]
    described = {**_info("v2.1", "image" if images else "video", LENGTHS), **info}
    (root / "meta/info.json").write_text(json.dumps(described))
    (root / "meta/tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": "push"}) + "\n")
    (root / "meta/episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in listed))
    (root / "data/chunk-000").mkdir(parents=True)
    for episode in range(len(LENGTHS)):
        path = root / DATA_V2.format(episode_chunk=0, episode_index=episode)
        pq.write_table(change(table_of(episode, images=images)), path)
        if not images:
            film(root / VIDEO_V2.format(episode_chunk=0, video_key=CAMERA, episode_index=episode), rows_of(episode))
    return root


def write_v3(
    root: Path,
    change: Change = lambda t: t,
    film: Film = write_video,
    listed: Callable[[int, dict[str, Any]], dict[str, Any]] = lambda _, row: row,
    images: bool = False,
    order: Sequence[int] = (0, 1, 2),
    lengths: Sequence[int] = LENGTHS,
) -> Path:
    """v3.0: all episodes in one data file and one video, in which they lie in this `order`; `listed` changes a row of
    meta/episodes."""
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    (root / "data/chunk-000").mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(_info("v3.0", "image" if images else "video", lengths)))
    pq.write_table(pa.table({"task_index": [0], "task": ["push"]}), root / "meta/tasks.parquet")
    rows, of = [], f"videos/{CAMERA}"
    for episode, length in enumerate(lengths):
        first = sum(lengths[:episode])
        begins = sum(lengths[e] for e in order[: order.index(episode)])
        row = {"episode_index": episode, "tasks": ["push"], "length": length}
        row |= {"data/chunk_index": 0, "data/file_index": 0}
        row |= {"dataset_from_index": first, "dataset_to_index": first + length}
        if not images:
            row |= {f"{of}/chunk_index": 0, f"{of}/file_index": 0}
            row |= {f"{of}/from_timestamp": begins / FPS, f"{of}/to_timestamp": (begins + length) / FPS}
        rows.append(listed(episode, row))
    pq.write_table(pa.Table.from_pylist(rows), root / "meta/episodes/chunk-000/file-000.parquet")
    table = pa.concat_tables([table_of(e, lengths, images) for e in range(len(lengths))])
    pq.write_table(change(table), root / DATA.format(chunk_index=0, file_index=0))
    if not images:
        shown = [r for e in order for r in rows_of(e, lengths)]
        film(root / VIDEO.format(video_key=CAMERA, chunk_index=0, file_index=0), shown)
    return root
