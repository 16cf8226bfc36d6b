"""Images in LeRobot's parquet files, however a column holds them; depth maps are named and are no camera."""

import hashlib
import io
import json

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from dvla.cache.readers import open_source
from dvla.cache.readers.episode import CorruptEpisode
from dvla.cache.readers.search import load_config
from dvla.errors import Note, UserError
from support.lerobot_written import CAMERA, LENGTHS, change_info, change_table, info, png, write_v2, write_v3
from support.video_samples import write_video

FEATURES = info("v3.0")["features"]
FILE = "data/chunk-000/file-000.parquet"
EPISODES = [e for e, length in enumerate(LENGTHS) for _ in range(length)]
FRAMES = [i for length in LENGTHS for i in range(length)]
STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def pixels(episode, frame):
    return np.asarray(Image.open(io.BytesIO(png(episode, frame))).convert("RGB"))


def file_of(episode, frame):
    return f"images/{CAMERA}/episode_{episode:06d}/frame_{frame:06d}.png"


def dataset(tmp_path, value, kind, files=False):
    root = write_v3(tmp_path / "x")
    values = [value(e, i) for e, i in zip(EPISODES, FRAMES, strict=True)]
    change_table(root / FILE, lambda t: t.set_column(t.column_names.index(CAMERA), CAMERA, pa.array(values, kind)))
    for episode, frame in zip(EPISODES, FRAMES, strict=True) if files else ():
        path = root / file_of(episode, frame)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(episode, frame))
    return root


def equal(view, wanted):
    found = list(view.frames())
    return len(found) == len(wanted) and all(np.array_equal(f, w) for f, w in zip(found, wanted))


KINDS = {
    "struct": (lambda e, i: {"bytes": png(e, i), "path": "x.png"}, STRUCT, False),
    "bytes": (png, pa.binary(), False),
    "large bytes": (png, pa.large_binary(), False),
    "numbers": (lambda e, i: list(png(e, i)), pa.list_(pa.uint8()), False),
    "array": (lambda e, i: pixels(e, i).tolist(), pa.list_(pa.list_(pa.list_(pa.uint8()))), False),
    "fixed array": (lambda e, i: pixels(e, i).tolist(), pa.list_(pa.list_(pa.list_(pa.uint8(), 3), 16), 16), False),
    "int64 array": (lambda e, i: pixels(e, i).tolist(), pa.list_(pa.list_(pa.list_(pa.int64()))), False),
    "channels first": (
        lambda e, i: pixels(e, i).transpose(2, 0, 1).tolist(),
        pa.large_list(pa.list_(pa.list_(pa.uint8()))),
        False,
    ),
    "path": (lambda e, i: {"bytes": None, "path": file_of(e, i)}, STRUCT, True),
    "empty bytes": (lambda e, i: {"bytes": b"", "path": file_of(e, i)}, STRUCT, True),
    "path text": (file_of, pa.string(), True),
    "path of another machine": (lambda e, i: {"bytes": None, "path": f"/home/me/set/{file_of(e, i)}"}, STRUCT, True),
    "name only": (lambda e, i: {"bytes": None, "path": f"frame_{i:06d}.png"}, STRUCT, True),
    "path of windows": (
        lambda e, i: {"bytes": None, "path": "D:\\set\\" + file_of(e, i).replace("/", "\\")},
        STRUCT,
        True,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_ways_of_a_column(tmp_path, kind):
    source = open_source(dataset(tmp_path, *KINDS[kind]))
    for episode, length in enumerate(LENGTHS):
        (view,) = source.load(episode).views
        assert (view.height, view.width, view.length) == (16, 16, length)
        assert equal(view, [pixels(episode, i) for i in range(length)])


def test_the_hash_of_an_ordinary_column_is_what_it_was(tmp_path):
    wanted = hashlib.sha256()
    for frame in range(LENGTHS[1]):
        wanted.update(f"{len(png(1, frame))};".encode() + png(1, frame))
    for kind in ("struct", "bytes", "path"):
        assert open_source(dataset(tmp_path / kind, *KINDS[kind])).load(1).views[0].sha256 == wanted.hexdigest()


def test_images_of_another_size_than_listed_are_read_and_named(tmp_path):
    root = write_v3(tmp_path / "x")
    assert open_source(root).load(0).views[0].notes == ()
    change_info(root, features={**FEATURES, CAMERA: {**FEATURES[CAMERA], "shape": [24, 32, 3]}})
    (view,) = open_source(root).load(0).views
    text = f"'{CAMERA}' is 16x16, meta/info.json lists [24, 32, 3]: read as it is"
    assert view.notes == (Note("image-size", text),) and equal(view, [pixels(0, i) for i in range(LENGTHS[0])])


@pytest.mark.parametrize(
    "value, kind, message",
    [
        (lambda e, i: None, STRUCT, "holds no image bytes and no path in a row"),
        (lambda e, i: {"bytes": None, "path": "/etc/passwd"}, STRUCT, "image file '/etc/passwd' .* is missing"),
        (lambda e, i: {"bytes": None, "path": "../../x.png"}, STRUCT, r"image file '\.\./\.\./x\.png' .* is missing"),
        (lambda e, i: i, pa.int64(), "is a column of int64; images are bytes, paths or nested lists"),
        (
            lambda e, i: [[0.5] * 16] * 16,
            pa.list_(pa.list_(pa.float32())),
            "lists hold float that are no whole numbers",
        ),
        (lambda e, i: [[300] * 16] * 16, pa.list_(pa.list_(pa.int32())), "lists hold int32 that are no whole numbers"),
        (lambda e, i: [[1] * 16, [1] * 15], pa.list_(pa.list_(pa.uint8())), "rows of an image differ in length"),
        (lambda e, i: [1, 2, 3], pa.list_(pa.uint8()), "image 0 of .* is not an image"),
    ],
)
def test_what_is_no_image(tmp_path, value, kind, message):
    source = open_source(dataset(tmp_path, value, kind))
    with pytest.raises(CorruptEpisode, match=message) as error:
        source.load(1)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_a_lost_image_costs_its_episode(tmp_path):
    root = dataset(tmp_path, *KINDS["path"])
    (root / file_of(1, 2)).unlink()
    source = open_source(root)
    with pytest.raises(CorruptEpisode, match="frame_000002.png' of .* is missing") as error:
        source.load(1)
    assert error.value.kind == "missing-file" and source.load(2).length == LENGTHS[2]


def deep(episode, frame):
    file = io.BytesIO()
    Image.fromarray(np.full((16, 16), 400 + 20 * frame, np.uint16)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


@pytest.mark.parametrize("write", [write_v2, write_v3])
@pytest.mark.parametrize(
    "feature",
    [
        {"dtype": "image", "shape": [16, 16, 1]},  # only its pixels tell
        {"dtype": "image", "shape": [16, 16, 3], "info": {"is_depth_map": True}},
        {"dtype": "image", "shape": [16, 16, 3], "info": {"video.is_depth_map": True}},
        {"dtype": "image", "shape": [16, 16, 3], "video_info": {"video.is_depth_map": True}},
        {"dtype": "depth", "shape": [16, 16, 1]},
        {"dtype": "video", "shape": [16, 16, 1], "info": {"video.pix_fmt": "gray12le"}},
        {"dtype": "uint16", "shape": [16, 16]},
    ],
)
def test_depth_maps_are_named_and_no_camera(tmp_path, write, feature):
    root = write(tmp_path / "x")
    key = "observation.images.front_depth"
    for path in root.glob("data/*/*.parquet"):
        change_table(path, lambda t: t.append_column(key, pa.array([deep(0, i) for i in range(len(t))], STRUCT)))
    change_info(root, features={**FEATURES, key: feature}, video_path="videos/{video_key}/x.mp4")
    source = open_source(root)
    assert source.view_names == ("front",)
    assert [n.text for n in source.notes() if n.rule == "depth-map"] == [f"{key}: depth maps, not read as cameras"]
    assert equal(source.load(1).views[0], [pixels(1, i) for i in range(LENGTHS[1])])


@pytest.mark.parametrize("name, shape", [("front_depth", [16, 16, 3]), ("tof", [16, 16, 1]), ("tof", [16, 16])])
def test_depth_video_that_nothing_marks(tmp_path, name, shape):
    root = write_v3(tmp_path / "x")
    key, path = f"observation.images.{name}", f"videos/observation.images.{name}/chunk-000/file-000.mkv"
    planes = [np.full(16 * 16, 100 * k, np.uint16) for k in range(sum(LENGTHS))]
    write_video(root / path, planes, "gray12le", (16, 16))
    template = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mkv"
    feature = {"dtype": "video", "shape": shape, "info": {"video.fps": 10}}
    change_info(root, features={**FEATURES, key: feature}, video_path=template)

    def place(table):
        columns = {"chunk_index": 0, "file_index": 0, "from_timestamp": 0.0, "to_timestamp": 1.0}
        for name, value in columns.items():
            table = table.append_column(f"videos/{key}/{name}", pa.array([value] * len(table)))
        return table

    change_table(root / "meta/episodes/chunk-000/file-000.parquet", place)
    source = open_source(root)
    assert source.view_names == ("front",) and source.load(1).length == LENGTHS[1]
    assert [n.text for n in source.notes() if n.rule == "depth-map"] == [f"{key}: depth maps, not read as cameras"]


def test_a_depth_map_asked_for_is_refused(tmp_path):
    root = write_v3(tmp_path / "x")
    change_info(root, features={**FEATURES, CAMERA: {**FEATURES[CAMERA], "info": {"is_depth_map": True}}})
    config = tmp_path / "mine.yaml"
    config.write_text(json.dumps({**BY_HAND, "views": ["front"]}))
    with pytest.raises(UserError, match="view 'front' is a depth map, not a camera; leave it out of `views`"):
        open_source(root, load_config(config))


BY_HAND = {"embodiment": "gripper_delta_eef", "match": [], "action": [{"drop": 4}], "state": []}


def test_a_gray_camera_is_a_camera(tmp_path):
    def gray(episode, frame):
        file = io.BytesIO()
        Image.open(io.BytesIO(png(episode, frame))).convert("L").save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    root = dataset(tmp_path, gray, STRUCT)
    change_info(root, features={**FEATURES, CAMERA: {"dtype": "image", "shape": [16, 16, 1], "names": None}})
    (view,) = open_source(root).load(0).views
    wanted = [np.asarray(Image.fromarray(pixels(0, i)).convert("L").convert("RGB")) for i in range(LENGTHS[0])]
    assert equal(view, wanted)
