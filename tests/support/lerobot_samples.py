"""Tiny datasets written by lerobot itself, and a converter of them to the older v2.1 layout."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dvla.cache.actions.action_map import FieldSpec
from dvla.cache.readers.config import DatasetConfig

FPS = 20
LENGTHS = (10, 13, 16)
TASKS = ("push the puck", "open the drawer", "push the puck")
KINDS = {"h264": ("h264", False), "hevc": ("hevc", True), "image": (None, False)}  # codec, one file per episode
VIEWS = {"front": (64, 64), "wrist": (48, 80)}  # name → height, width


def picture(episode: int, frame: int, view: int, height: int, width: int) -> np.ndarray:
    """Smooth, different for every frame: survives lossy coding and shows a frame that is off by one."""
    y, x = np.mgrid[0:height, 0:width]
    red = 255 * ((x + 5 * frame) % width) / width
    green = 255 * ((y + 7 * episode) % height) / height
    return np.stack([red, green, np.full_like(red, 12 * frame + 30 * view)], axis=-1).astype(np.uint8)


def encoder(codec: str, **settings: Any) -> dict[str, Any]:
    """The parameter of `LeRobotDataset.create` for video of `codec`, by either form that it has had."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    if "vcodec" in inspect.signature(LeRobotDataset.create).parameters:
        return {"vcodec": codec}
    from lerobot.configs.video import RGBEncoderConfig

    return {"rgb_encoder": RGBEncoderConfig(vcodec=codec, **settings)}


def text_column(tasks: Any) -> str:
    """Where the texts are in what was read of meta/tasks.parquet: lerobot 0.6 names the column, older ones did not."""
    return "task" if "task" in (tasks if isinstance(tasks, dict) else tasks.column_names) else "__index_level_0__"


def record(root: Path, codec: str | None, one_file_per_episode: bool = False) -> Path:
    """Three episodes with lerobot's writer: video of `codec`, or PNG pictures in parquet when it is None."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    vector = {"dtype": "float32", "shape": (4,), "names": ["x", "y", "z", "gripper"]}
    features = {"observation.state": vector, "action": vector}
    features |= {
        f"observation.images.{name}": {
            "dtype": "video" if codec else "image",
            "shape": (*size, 3),
            "names": ["height", "width", "channels"],
        }
        for name, size in VIEWS.items()
    }
    dataset = LeRobotDataset.create(
        "dvla/tiny",
        fps=FPS,
        features=features,
        root=root,
        robot_type="metaworld_sawyer",
        use_videos=codec is not None,
        **encoder(codec or "h264"),
    )
    if one_file_per_episode:  # megabytes after which lerobot begins a new file
        for name in ("data_files_size_in_mb", "video_files_size_in_mb"):
            if isinstance(dataset.meta.info, dict):
                dataset.meta.info[name] = 1e-9
            else:  # lerobot 0.6
                setattr(dataset.meta.info, name, 1e-9)
    rng = np.random.default_rng(0)
    for episode, (length, task) in enumerate(zip(LENGTHS, TASKS, strict=True)):
        for frame in range(length):
            pictures = {
                f"observation.images.{name}": picture(episode, frame, i, *size)
                for i, (name, size) in enumerate(VIEWS.items())
            }
            vectors = {k: rng.uniform(-1, 1, 4).astype(np.float32) for k in ("observation.state", "action")}
            dataset.add_frame({**vectors, **pictures, "task": task})
        dataset.save_episode(parallel_encoding=False)
    dataset.finalize()
    return root


def convert_to_v2(source: Path, root: Path, version: str = "v2.1") -> Path:
    """A v3.0 dataset with one file per episode (or pictures in parquet) in the v2 layout: JSON lines, a file each."""
    info = json.loads((source / "meta" / "info.json").read_text())
    listed = [e for p in sorted(source.glob("meta/episodes/*/*.parquet")) for e in pq.read_table(p).to_pylist()]
    texts = pq.read_table(source / "meta/tasks.parquet").to_pydict()
    rows = pa.concat_tables([pq.read_table(p) for p in sorted((source / "data").glob("*/*.parquet"))])
    keys = [k for k, f in info["features"].items() if f["dtype"] == "video"]
    for folder in ("meta", "data/chunk-000", *(f"videos/chunk-000/{k}" for k in keys)):
        (root / folder).mkdir(parents=True)
    for e in listed:
        number = e["episode_index"]
        part = rows.filter(pc.equal(rows["episode_index"], number))
        pq.write_table(part, root / f"data/chunk-000/episode_{number:06d}.parquet")
        for key in keys:
            chunk, file = e[f"videos/{key}/chunk_index"], e[f"videos/{key}/file_index"]
            source_file = source / f"videos/{key}/chunk-{chunk:03d}/file-{file:03d}.mp4"
            (root / f"videos/chunk-000/{key}/episode_{number:06d}.mp4").write_bytes(source_file.read_bytes())
    info |= {
        "codebase_version": version,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4" if keys else None,
    }
    tasks = [{"task_index": i, "task": t} for i, t in zip(texts["task_index"], texts[text_column(texts)], strict=True)]
    episodes = [{k: e[k] for k in ("episode_index", "tasks", "length")} for e in listed]
    (root / "meta/info.json").write_text(json.dumps(info))
    for name, lines in (("tasks", tasks), ("episodes", episodes)):
        (root / f"meta/{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def the_file(root, pattern, index=0):
    return sorted(root.glob(pattern))[index]


def rewrite(path, change):
    """Replace a parquet file by `change(table)`, one row group per episode as lerobot writes it."""
    table = change(pq.read_table(path))
    pq.write_table(table, path, row_group_size=max(1, table.num_rows // 3))


def with_column(table, name, values):
    return table.set_column(table.column_names.index(name), name, pa.array(values, table.schema.field(name).type))


def config_for(recorded_views=None, **changes):
    fields = {
        "name": "t",
        "match": (),
        "embodiment": "gripper_delta_eef",
        "views": recorded_views,
        "action": (FieldSpec(drop=4),),
        "state": (),
    }
    return DatasetConfig(**{**fields, **changes})
