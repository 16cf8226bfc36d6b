"""GR00T's flavor of LeRobot, as in its demonstration sets: no frame_index, a modality.json, a camera without files."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dvla.cache.readers import open_source
from dvla.cache.readers.lerobot.modality import Slice, read_modality
from dvla.errors import UserError
from support.lerobot_files import FPS, numbers, rows_of, write_video
from support.lerobot_written import info, lines

LENGTHS = (12, 14)
TASKS = ("pick the squash", "valid", "pick the ketchup")
PARTS = {"arm": {"start": 0, "end": 3}, "hand": {"start": 3, "end": 4}}
MODALITY = {
    "state": PARTS,
    "action": PARTS,
    "video": {"ego_view": {"original_key": "observation.images.ego_view"}},
    "annotation": {"human.action.task_description": {}, "human.validity": {}},
}


def camera(height, width):
    about = {"video.fps": 20.0, "video.codec": "h264", "video.is_depth_map": False, "has_audio": False}
    return {"dtype": "video", "shape": [height, width, 3], "names": ["height", "width", "channel"], "video_info": about}


def write(root, modality=MODALITY):
    """Two episodes; info.json lists a camera that was never written, and features without names."""
    (root / "meta").mkdir(parents=True)
    (root / "data/chunk-000").mkdir(parents=True)
    one = {"dtype": "int64", "shape": [1]}
    features = {"observation.images.egoview": camera(800, 1280), "observation.images.ego_view": camera(64, 64)}
    features |= dict.fromkeys(("observation.state", "action"), {"dtype": "float64", "shape": [4]})
    features |= {"timestamp": {"dtype": "float64", "shape": [1]}}
    features |= dict.fromkeys(("annotation.human.action.task_description", "task_index"), one)
    features |= dict.fromkeys(("annotation.human.validity", "episode_index", "index"), one)
    given = info("v2.0", features=features, total_chunks=0, fps=float(FPS), splits={"train": "0:100"})
    given["video_path"] = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    (root / "meta/info.json").write_text(json.dumps(given, indent=4))
    (root / "meta/modality.json").write_text(modality if isinstance(modality, str) else json.dumps(modality))
    for name in ("stats", "relative_stats"):
        (root / f"meta/{name}.json").write_text("{}")
    lines(root / "meta/tasks.jsonl", [{"task_index": i, "task": t} for i, t in enumerate(TASKS)])
    listed = [{"episode_index": e, "tasks": [TASKS[2 * e], "valid"], "length": n} for e, n in enumerate(LENGTHS)]
    lines(root / "meta/episodes.jsonl", listed)
    for e, length in enumerate(LENGTHS):
        rows = rows_of(e, LENGTHS)
        table = {
            "observation.state": [[r / 100, 0.0, 0.0, 1.0] for r in rows],
            "action": [[r / 100, 0.5, -0.5, 0.25] for r in rows],
            "timestamp": [(k + 1) / FPS for k in range(length)],
            "annotation.human.action.task_description": [2 * e] * length,
            "task_index": [2 * e] * length,
            "annotation.human.validity": [1] * length,
            "episode_index": [e] * length,
            "index": rows,
        }
        pq.write_table(pa.table(table), root / f"data/chunk-000/episode_{e:06d}.parquet")
        write_video(root / f"videos/chunk-000/observation.images.ego_view/episode_{e:06d}.mp4", rows)
    return root


def test_every_episode_is_read(tmp_path):
    source = open_source(write(tmp_path / "d"))
    assert source.view_names == ("ego_view",) and source.episode_ids == (0, 1)
    for e in (0, 1):
        assert numbers(source, e) == rows_of(e, LENGTHS)
        found = source.table(e)
        assert found.instruction == source.instruction_of(e) == TASKS[2 * e]
        assert [n.rule for n in found.notes] == ["time-start"]
    assert [n.text for n in source.notes()] == ["no images of observation.images.egoview: not read"]


def test_without_any_video_no_camera_is_skipped(tmp_path):
    root = write(tmp_path / "d")
    for path in root.glob("videos/*/*/*.mp4"):
        path.unlink()
    source = open_source(root)
    assert source.view_names == ("egoview", "ego_view")
    assert source.notes()[0].text.startswith("0 of 2 episodes present: 2 tables, 0 videos")


def test_a_camera_without_files_on_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    root = write(tmp_path / "0123abcd")
    files = [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repo, repo_type, revision: files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(root))
    monkeypatch.chdir(tmp_path)
    assert open_source("nvidia/gr00t").view_names == ("ego_view",)


def test_modality_is_read(tmp_path):
    found = open_source(write(tmp_path / "d")).meta.modality
    assert found.state == (Slice("arm", "observation.state", 0, 3), Slice("hand", "observation.state", 3, 4))
    assert [s.column for s in found.action] == ["action", "action"] and not found.notes
    assert found.cameras == {"ego_view": "observation.images.ego_view"}
    assert found.annotations["human.action.task_description"] == "annotation.human.action.task_description"


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"state": {"arm": {"start": 0, "end": 9}}}, "state 'arm' has the dimensions 0 to 9 of 'observation.state'"),
        ({"state": {"arm": {"start": 3, "end": 3}}}, "state 'arm' has the dimensions 3 to 3"),
        ({"state": {"arm": {"start": "zero", "end": 3}}}, "state 'arm' 'start' is 'zero', expected a number"),
        ({"state": {"arm": None}}, "state 'arm' has no 'start'"),
        ({"state": {"arm": {"start": 0, "end": 3, "original_key": "pose"}}}, "stands for 'pose', which info.json"),
        ({"action": ["arm"]}, r"action is ['arm'], expected an object"),
        ({"video": {"ego": {"original_key": "observation.images.nose"}}}, "video 'ego' stands for"),
    ],
)
def test_what_cannot_be_used_of_modality_is_left_out_and_named(tmp_path, change, note):
    source = open_source(write(tmp_path / "d", {**MODALITY, **change}))
    found = source.meta.modality
    assert len(found.notes) == 1 and note in found.notes[0].text and found.notes[0] in source.notes()
    assert len(source.load(1).action) == LENGTHS[1]


def test_modality_that_is_damaged_is_named(tmp_path):
    source = open_source(write(tmp_path / "d", "{"))
    assert "meta/modality.json cannot be read as JSON" in source.notes()[0].text
    assert len(source.load(0).action) == LENGTHS[0]


def test_options_of_a_slice(tmp_path):
    path = tmp_path / "modality.json"
    arm = {"start": 0.0, "end": "4", "absolute": False, "rotation_type": "quaternion", "range": [-1, 1]}
    path.write_text(json.dumps({"action": {"arm": arm}}))
    (found,) = read_modality(path, {"action": {"shape": []}}).action
    assert found == Slice("arm", "action", 0, 4, False, "quaternion", -1.0, 1.0)


def test_a_dataset_of_another_robot_names_its_config(tmp_path):
    root = write(tmp_path / "d")
    given = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(given | {"robot_type": "toaster"}))
    with pytest.raises(UserError, match="no dataset config fits"):
        open_source(root)
