"""Every LeRobot-format family on files made to the layout its facts list: found by name, read, mapped and mapped
back."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dvla.cache.readers import open_source
from dvla.cache.readers.search import load_config

ROWS = 6
FAMILIES = {
    "aloha": "aloha_sim_transfer_cube_human_image",
    "bc_z": "berkeley_autolab_ur5",
    "taco_play": "taco_play",
    "droid": "droid_1.0.1",
    "stanford_hydra": "stanford_hydra_dataset",
    "cmu_stretch": "cmu_stretch",
    "utaustin_mutex": "utaustin_mutex",
    "nyu_franka": "nyu_franka_play_dataset",
    "dexora": "airbot_pick_and_place",
    "behavior1k": "behavior1k-task0003",
}


def write(root: Path, cameras: dict[str, list[int]], action: np.ndarray, state: np.ndarray, fps: float) -> Path:
    """A LeRobot v2.1 dataset of one episode, images as PNG in parquet."""

    def picture(i: int, size: list[int]) -> bytes:
        y, x = np.mgrid[0 : size[0], 0 : size[1]]
        pixels = np.stack([(x + 9 * i) % 256, (y + 5 * i) % 256, (x + y) % 256], -1).astype(np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG", compress_level=1)
        return out.getvalue()

    columns = {
        "action": action.tolist(),
        "observation.state": state.tolist(),
        "timestamp": (np.arange(ROWS) / fps).tolist(),
        "frame_index": list(range(ROWS)),
        "episode_index": [0] * ROWS,
        "index": list(range(ROWS)),
        "task_index": [0] * ROWS,
    }
    columns |= {key: [{"bytes": picture(i, size), "path": None} for i in range(ROWS)] for key, size in cameras.items()}
    (root / "meta").mkdir(parents=True)
    (root / "data" / "chunk-000").mkdir(parents=True)
    pq.write_table(pa.table(columns), root / "data/chunk-000/episode_000000.parquet")
    features = {
        "action": {"dtype": "float32", "shape": [action.shape[1]]},
        "observation.state": {"dtype": "float32", "shape": [state.shape[1]]},
    }
    features |= {key: {"dtype": "image", "shape": [*size, 3]} for key, size in cameras.items()}
    info = {
        "codebase_version": "v2.1",
        "robot_type": "unknown",
        "fps": fps,
        "chunks_size": 1000,
        "features": features,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": None,
    }
    (root / "meta/info.json").write_text(json.dumps(info))
    (root / "meta/tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": "do it"}) + "\n")
    (root / "meta/episodes.jsonl").write_text(
        json.dumps({"episode_index": 0, "length": ROWS, "tasks": ["do it"]}) + "\n"
    )
    return root


@pytest.mark.parametrize("family", FAMILIES)
def test_family_reads_files_of_its_listed_layout(family: str, shared_dir: Path, tmp_path: Path) -> None:
    facts = {f["family"].split(" ")[0]: f for f in json.loads((shared_dir / "facts/datasets.json").read_text())}[family]
    cameras = {key: [max(4, side // 8) for side in size] for key, size in facts["cameras"].items()}
    rng = np.random.default_rng(0)
    width = facts["state_dim"]
    action, state = (rng.uniform(-0.5, 0.5, (ROWS, n)).astype(np.float32) for n in (facts["action_dim"], width))
    start = 0
    for spec in load_config(family).state:
        if spec.rotation == "quat_xyzw":  # a unit quaternion, of the two the one that comes back
            part = state[:, start : start + 4]
            part *= np.sign(part[:, 3:]) / np.linalg.norm(part, axis=1, keepdims=True)
        start += spec.width
    fps = float(str(facts["hz"]).split(" ")[0])
    source = open_source(write(tmp_path / FAMILIES[family], cameras, action, state, fps))
    assert source.config.name == family and len(source.view_names) == len(cameras)
    episode = source.load(0)
    np.testing.assert_array_equal(episode.action, action)
    np.testing.assert_array_equal(episode.state, state)
    assert episode.instruction == "do it"
    assert [sum(1 for _ in v.frames()) for v in episode.views] == [ROWS] * len(cameras)
    for mapping, native in ((source.action_map, action), (source.state_map, state)):
        unified = mapping.to_unified(native)
        assert not unified[:, ~mapping.mask].any()
        kept = [i for i, name in enumerate(mapping.field_names) if name != "dropped"]
        np.testing.assert_allclose(mapping.to_native(unified)[:, kept], native[:, kept], atol=2e-6)
