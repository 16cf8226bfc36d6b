"""info.json of LeRobot datasets as people write and spoil it: read, or one line that says what is wrong."""

import json

import pytest

from dvla.cache.readers import open_source
from dvla.cache.readers.lerobot.documents import Template
from dvla.errors import UserError
from support.lerobot_written import CAMERA, LENGTHS, change_info, info, write_v2, write_v3

FEATURES = info("v2.1")["features"]
V2_PATH = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"


def with_feature(key, **changes):
    return {**FEATURES, key: {**FEATURES[key], **changes}}


@pytest.mark.parametrize(
    "changes",
    [
        {"fps": "10"},
        {"fps": 10.0},
        {"chunks_size": 0},
        {"chunks_size": None},
        {"chunks_size": "1000"},
        {"codebase_version": "2.1"},
        {"codebase_version": 2.1},
        {"codebase_version": None},
        {"data_path": None},
        {"data_path": "data/chunk-{episode_chunk:03}/episode_{episode_index:06}.parquet"},
        {"data_path": "./data//chunk-{chunk_index:03d}/episode_{episode_index:06d}.parquet"},
        {"data_path": "data\\chunk-{chunk_index:03d}\\episode_{episode_index:06d}.parquet"},
        {"video_path": "../{nonsense}"},  # there is no video
        {"total_episodes": None},
        {"total_episodes": "many", "total_frames": [1]},
        {"splits": None},
        {"features": with_feature("action", shape=["4"])},
        {"features": with_feature("action", shape=4)},
        {"features": with_feature("action", shape=None)},
        {"features": with_feature("action", shape=["four"])},
        {"features": with_feature("action", shape=[4.0], names=7)},
        {"features": with_feature("action", dtype=None)},
        {"features": with_feature(CAMERA, shape=None, names={"height": 0, "width": 1, "channel": 2})},
        {"features": with_feature(CAMERA, info=["video.is_depth_map"], video_info="yes")},
        {"features": {**FEATURES, "reward": None, "note": "text", "list": [1]}},
    ],
)
def test_odd_info_is_read(tmp_path, changes):
    root = write_v2(tmp_path / "d")
    change_info(root, **changes)
    source = open_source(root)
    assert [source.load(e).length for e in source.episode_ids] == list(LENGTHS)
    assert source.fps == 10 and source.view_names == ("front",)


@pytest.mark.parametrize("dtype", [None, "vide", 7])
def test_a_camera_that_is_not_read_is_named(tmp_path, dtype):
    root = write_v2(tmp_path / "d")
    change_info(root, features={**FEATURES, f"{CAMERA}_2": {**FEATURES[CAMERA], "dtype": dtype}})
    source = open_source(root)
    assert source.view_names == ("front",)
    (note,) = source.notes()
    assert note.rule == "camera-unknown" and f"{CAMERA}_2" in note.text and "not read" in note.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fps": None}, "'fps' is missing in meta/info.json"),
        ({"fps": 0}, "'fps' is 0, expected rows per second"),
        ({"fps": -1}, "'fps' is -1, expected rows per second"),
        ({"fps": "fast"}, "'fps' is 'fast', expected a number"),
        ({"fps": float("nan")}, "'fps' is nan, expected a number"),
        ({"fps": 1e300}, r"'fps' is 1e\+300, expected rows per second"),
        ({"fps": {"video": 30}}, "'fps' is {'video': 30}, expected a number"),
        ({"features": None}, "'features' is missing"),
        ({"features": [1, 2]}, r"'features' is \[1, 2\], expected an object"),
        ({"features": {}}, "'features' is {}, expected an object"),
        ({"codebase_version": "v1.6"}, "version v1.6 is not readable; convert it with lerobot"),
        ({"codebase_version": "v3.1"}, "version v3.1 is not readable; look for a newer dvla"),
        ({"codebase_version": "v4.0"}, "version v4.0 is not readable; look for a newer dvla"),
        ({"codebase_version": "banana"}, "version vbanana is not readable"),
        ({"codebase_version": ["v2.1"]}, r"version \['v2.1'\] is not readable"),
        ({"storage_format": "lance"}, "is stored as 'lance'"),
        ({"data_path": "data/file-{file_index:03d}.parquet"}, "has the field 'file_index'"),
        ({"data_path": "data/{episode_index.__class__}.parquet"}, "has braces that are no field"),
        ({"data_path": "data/{episode_index:099999d}.parquet"}, "has braces that are no field"),
        ({"data_path": "data/{}.parquet"}, "has braces that are no field"),
        ({"data_path": "data/{episode_index}" + "-{episode_index}" * 9}, "has 10 fields, expected at most 8"),
        ({"data_path": "data/{episode_index"}, "has braces that are no field"),
        ({"data_path": ["data"]}, r"is \['data'\], expected a path"),
        ({"data_path": "../data/episode_{episode_index:06d}.parquet"}, "leaves its folder"),
        ({"data_path": "/etc/{episode_index:06d}"}, "leaves its folder"),
        ({"data_path": "..\\{episode_index:06d}"}, "leaves its folder"),
    ],
)
def test_unusable_info_is_one_line(tmp_path, changes, message):
    root = write_v2(tmp_path / "d")
    change_info(root, **changes)
    with pytest.raises(UserError, match=message) as caught:
        open_source(root)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "null", '"text"', '{"fps": 10, "fps": 20}', "[" * 100_000, "\x00" * 8]
)
def test_info_that_is_no_object_is_one_line(tmp_path, text):
    root = write_v2(tmp_path / "d")
    (root / "meta/info.json").write_text(text)
    with pytest.raises(UserError, match="info.json (cannot be read as JSON|holds)") as caught:
        open_source(root)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_video_key_cannot_leave_the_folder(tmp_path):
    root = write_v3(tmp_path / "d")
    given = json.loads((root / "meta/info.json").read_text())
    given["features"]["../../etc"] = {"dtype": "video", "shape": [16, 16, 3]}
    (root / "meta/info.json").write_text(json.dumps(given))
    with pytest.raises(UserError, match="leaves its folder"):
        open_source(root)


def test_a_version_that_is_missing_is_seen_by_the_files(tmp_path):
    root = write_v3(tmp_path / "d")
    change_info(root, codebase_version=None)
    source = open_source(root)
    assert source.meta.version == "v3.0" and source.load(2).length == LENGTHS[2]


def test_template_fills_and_matches():
    template = Template("a/{episode_chunk:03d}/{video_key}/e_{episode_index:06d}_{episode_index}.mp4", _FIELDS)
    path = template.fill(episode_chunk=1, video_key="front.left", episode_index=42)
    assert path == "a/001/front.left/e_000042_42.mp4"
    assert template.match(path)["video_key"] == "front.left" and not template.match("a/b.mp4")
    assert template.glob(video_key="x[1]") == "a/*/x[[]1]/e_*_*.mp4"


_FIELDS = ("episode_chunk", "episode_index", "video_key")


def test_a_camera_without_a_column_is_skipped_and_named(tmp_path):
    root = write_v2(tmp_path / "d")
    change_info(root, features=FEATURES | {"observation.images.wrist": FEATURES[CAMERA]})
    source = open_source(root)
    assert source.view_names == ("front",) and source.load(1).length == LENGTHS[1]
    assert [n.text for n in source.notes()] == ["no images of observation.images.wrist: not read"]


@pytest.mark.parametrize("folder", ["videos/observation.images.top", "videos/chunk-000/observation.images.top"])
def test_videos_that_are_not_listed_are_named(tmp_path, folder):
    root = write_v2(tmp_path / "d")
    assert not open_source(root).notes()
    (root / folder).mkdir(parents=True)
    said = "images of observation.images.top are here, but not in meta/info.json: not read"
    assert [n.text for n in open_source(root).notes()] == [said]


def test_image_columns_that_are_not_listed_are_named(tmp_path):
    root = write_v2(tmp_path / "d")
    change_info(root, features=FEATURES | {"observation.images.top": FEATURES[CAMERA]})
    change_info(root, features={k: f for k, f in FEATURES.items() if k != CAMERA})
    assert f"images of {CAMERA} are here, but not in" in open_source(root, unmapped=True).notes()[0].text


def test_a_video_of_a_dataset_without_a_camera_is_one_line(tmp_path, dvla):
    root = write_v2(tmp_path / "d")
    change_info(root, features={k: f for k, f in FEATURES.items() if k != CAMERA})
    found = dvla("data", "video", root, "--episode", 0, "-o", tmp_path / "x.mp4")
    assert found.code == 2 and "d has no camera; a video needs one" in found.err
    assert dvla("data", "show", root).code == 0


def test_an_episode_in_another_chunk_is_found(tmp_path):
    root = write_v2(tmp_path / "d")
    (root / "data/chunk-007").mkdir()
    (root / "data/chunk-000/episode_000001.parquet").rename(root / "data/chunk-007/episode_000001.parquet")
    source = open_source(root)
    assert source.load(1).length == LENGTHS[1] and not source.notes()
