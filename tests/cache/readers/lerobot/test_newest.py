"""What datasets of lerobot 0.6 newly have: depth maps beside cameras, encoders with settings of their own, language
columns, tools, marks of interventions."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dvla.cache.readers import open_source
from support.lerobot_samples import config_for, the_file

lerobot_dataset = pytest.importorskip("lerobot.datasets.lerobot_dataset", reason="needs lerobot")
LeRobotDataset = lerobot_dataset.LeRobotDataset
pytestmark = pytest.mark.skipif(
    "rgb_encoder" not in inspect.signature(LeRobotDataset.create).parameters, reason="needs lerobot 0.6"
)
SIDE, LENGTHS = 64, (6, 8)
IMAGE = {"names": ["height", "width", "channels"]}
VECTOR = {"dtype": "float32", "shape": (4,), "names": ["x", "y", "z", "gripper"]}
FLAG = {"dtype": "bool", "shape": (1,), "names": None}
DEPTH = {"shape": (SIDE, SIDE, 1), "info": {"is_depth_map": True}, **IMAGE}
FEATURES: dict[str, dict[str, Any]] = {
    "observation.state": VECTOR,
    "action": VECTOR,
    "observation.images.front": {"dtype": "video", "shape": (SIDE, SIDE, 3), **IMAGE},
    "observation.images.wrist": {"dtype": "image", "shape": (SIDE, SIDE, 3), **IMAGE},
    "observation.images.front_depth": {"dtype": "video", **DEPTH},
    "observation.images.wrist_depth": {"dtype": "image", **DEPTH},
    "intervention": FLAG,
    "next.done": FLAG,
    "note": {"dtype": "string", "shape": (1,), "names": None},
}


def frame_of(episode: int, t: int, rng: np.random.Generator) -> dict[str, Any]:
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    image = np.stack([(4 * x + 9 * t) % 256, 4 * y, np.full_like(x, 30 * t)], -1).astype(np.uint8)
    deep = (1000 + 10 * x + t).astype(np.uint16)[..., None]
    return {
        **{key: rng.normal(size=4).astype(np.float32) for key in ("observation.state", "action")},
        **{f"observation.images.{view}": image for view in ("front", "wrist")},
        **{f"observation.images.{view}_depth": deep for view in ("front", "wrist")},
        **{"intervention": np.array([t == 2]), "next.done": np.array([t == LENGTHS[episode] - 1])},
        "note": "as recorded",
        "task": ("push the puck", "open the drawer")[episode],
    }


def written(root: Path, codec: str, **settings: Any) -> Path:
    from lerobot.configs.video import RGBEncoderConfig

    dataset = LeRobotDataset.create(
        "dvla/newest", 10, FEATURES, root, "metaworld_sawyer", rgb_encoder=RGBEncoderConfig(codec, **settings)
    )
    rng = np.random.default_rng(0)
    for episode, length in enumerate(LENGTHS):
        for t in range(length):
            dataset.add_frame(frame_of(episode, t, rng))
        dataset.save_episode(parallel_encoding=False)
    dataset.finalize()
    return root


def annotate(root: Path) -> None:
    """The columns and the entries of info.json that lerobot's annotations add, in the types of its writer."""
    from lerobot.datasets.language import language_feature_info

    file = the_file(root, "data/*/*.parquet")
    table = pq.read_table(file)
    call = {"type": "function", "function": {"name": "say", "arguments": {"text": "done"}}}
    spoken = {"role": "assistant", "style": "interjection", "content": None, "camera": None, "tool_calls": [call]}
    subtask = {"role": "assistant", "style": "subtask", "content": "another text", "camera": None, "tool_calls": None}
    persistent = [[{**subtask, "timestamp": 0.0}]] * table.num_rows
    events = [[spoken] if i == 3 else [] for i in range(table.num_rows)]
    table = table.append_column("language_persistent", pa.array(persistent))
    table = table.append_column("language_events", pa.array(events))
    pq.write_table(table.replace_schema_metadata(None), file)
    info = json.loads((root / "meta/info.json").read_text())
    features = {**info["features"], **json.loads(json.dumps(language_feature_info()))}
    tools = [{"type": "function", "function": {"name": "say", "parameters": {}}}]
    (root / "meta/info.json").write_text(json.dumps({**info, "features": features, "tools": tools}))


@pytest.mark.parametrize(
    "codec, settings",
    [
        ("libsvtav1", {"g": 5, "preset": 10, "crf": 20}),
        ("h264", {"pix_fmt": "yuv444p", "extra_options": {"tune": "film"}}),
        ("hevc", {"fast_decode": 1, "g": 1}),
    ],
)
def test_equals_lerobot(tmp_path: Path, codec: str, settings: dict[str, Any]) -> None:
    root = written(tmp_path / "newest", codec, **settings)
    source = open_source(root, config_for())
    assert source.view_names == ("front", "wrist") and source.episode_ids == (0, 1)
    assert any("depth" in note.text and "front_depth" in note.text for note in source.notes())
    annotate(root)
    annotated = open_source(root, config_for())
    theirs, row = LeRobotDataset("dvla/newest", root=root, video_backend="pyav"), 0
    for number in source.episode_ids:
        episode, again = source.load(number), annotated.load(number)
        assert episode.length == LENGTHS[number] and episode.instruction == again.instruction
        frames = {view.name: list(view.frames()) for view in episode.views}
        assert {v.name: v.sha256 for v in episode.views} == {v.name: v.sha256 for v in again.views}
        for t in range(episode.length):
            item = theirs[row]
            row += 1
            assert item["task"] == episode.instruction
            np.testing.assert_array_equal(item["action"].numpy(), episode.action[t])
            for view, shown in frames.items():
                expected = (item[f"observation.images.{view}"].numpy() * 255).round().astype(np.uint8)
                np.testing.assert_array_equal(shown[t], expected.transpose(1, 2, 0))
    assert row == sum(LENGTHS)
