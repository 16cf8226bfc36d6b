"""The LeRobot reader against lerobot's own, on datasets lerobot wrote, and on a real recording."""

import json
import pickle
import shutil

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dvla.cache.readers import open_source, video
from dvla.cache.readers.episode import CorruptEpisode
from dvla.cache.readers.search import load_config
from dvla.errors import UserError
from support.lerobot_samples import (
    FPS,
    KINDS,
    LENGTHS,
    TASKS,
    VIEWS,
    config_for,
    convert_to_v2,
    rewrite,
    the_file,
    with_column,
)

pytest.importorskip("lerobot", reason="lerobot is an optional dependency: pip install 'dvla[lerobot]'")


# --- the same as lerobot -------------------------------------------------------------------------------------------


def tables_of(dataset, row):
    item = dataset.hf_dataset[row]
    return {**item, "task": dataset.meta.tasks.iloc[item["task_index"].item()].name}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_lerobot(recorded, kind):
    """Every frame of every view, state, action, time and task text, bit for bit. lerobot's reader cannot seek to single
    HEVC frames of its own files (open groups of images), so there it is asked for an episode's frames at once."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    theirs = LeRobotDataset("dvla/tiny", root=recorded[kind], video_backend="pyav")
    source = open_source(recorded[kind])
    assert source.episode_ids == (0, 1, 2) and source.view_names == tuple(VIEWS) and source.fps == FPS
    row = 0
    for number in source.episode_ids:
        episode = source.load(number)
        assert episode.length == source.length_of(number) == LENGTHS[number]
        assert episode.instruction == source.instruction_of(number) == TASKS[number]
        assert {v.name: (v.height, v.width) for v in episode.views} == VIEWS
        frames = [list(v.frames()) for v in episode.views]
        at_once = {f"observation.images.{v.name}": episode.timestamps.tolist() for v in episode.views}
        reading = getattr(theirs, "reader", theirs)  # an object of its own since lerobot 0.5
        at_once = reading._query_videos(at_once, number) if kind == "hevc" else None
        for t in range(episode.length):
            item = theirs[row] if at_once is None else tables_of(theirs, row) | {k: v[t] for k, v in at_once.items()}
            row += 1
            assert item["task"] == episode.instruction and item["episode_index"] == number
            np.testing.assert_array_equal(item["action"].numpy(), episode.action[t])
            np.testing.assert_array_equal(item["observation.state"].numpy(), episode.state[t])
            assert item["timestamp"].item() == episode.timestamps[t]
            for view, pictures in zip(episode.views, frames, strict=True):
                expected = (item[f"observation.images.{view.name}"].numpy() * 255).round().astype(np.uint8)
                assert pictures[t].dtype == np.uint8 and pictures[t].flags.c_contiguous
                np.testing.assert_array_equal(pictures[t], expected.transpose(1, 2, 0))
    assert row == len(theirs)
    assert len(list(recorded[kind].glob("videos/*front/*/*.mp4"))) == {"h264": 1, "hevc": 3, "image": 0}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_part_of_an_episode_equals_the_whole(recorded, kind):
    episode = open_source(recorded[kind]).load(1)
    for view in episode.views:
        whole = list(view.frames())
        for start, stop in ((0, 1), (3, 9), (12, 13), (5, None), (4, 4)):
            part = list(view.frames(start, stop))
            assert len(part) == (13 if stop is None else stop) - start
            assert all(np.array_equal(a, b) for a, b in zip(part, whole[start:stop], strict=True))
        with pytest.raises(ValueError, match="0..14"):
            view.frames(0, 14)


@pytest.mark.parametrize(("kind", "version"), [("hevc", "v2.1"), ("image", "v2.0")])
def test_v2_layouts_equal_v3(recorded, tmp_path, kind, version):
    old, new = open_source(convert_to_v2(recorded[kind], tmp_path / "old", version)), open_source(recorded[kind])
    assert old.episode_ids == new.episode_ids and old.view_names == new.view_names
    for number in new.episode_ids:
        a, b = old.load(number), new.load(number)
        assert (a.instruction, a.source_hash, a.length) == (b.instruction, b.source_hash, b.length)
        np.testing.assert_array_equal(a.action, b.action)
        for x, y in zip(a.views, b.views, strict=True):
            np.testing.assert_array_equal(np.stack(list(x.frames())), np.stack(list(y.frames())))


def test_real_av1_recording(shared_dir):
    """Unitree G1 with Inspire hands, LeRobot v2.1, AV1: 100 episodes listed, five there."""
    from lerobot.datasets.video_utils import decode_video_frames

    root = shared_dir / "data" / "unitree_g1_inspire_v21"
    source = open_source(root)
    assert len(source.episode_ids) == 100 and source.config.name == "unitree_g1_inspire"
    there = [i for i in source.episode_ids if (root / f"data/chunk-000/episode_{i:06d}.parquet").exists()]
    assert there == [29, 30, 31, 59, 82]
    for number in there:
        episode = source.load(number)
        assert episode.length == source.length_of(number) and episode.action.shape == (episode.length, 26)
        assert episode.instruction == "Pick up the yellow bottle on the table."
        unified = source.action_map.to_unified(episode.action)
        assert source.action_map.mask.sum() == 26
        np.testing.assert_allclose(source.action_map.to_native(unified), episode.action, atol=1e-6)
    episode, picked = source.load(30), [0, 101, 276]
    path = root / "videos/chunk-000/observation.images.cam_high/episode_000030.mp4"
    expected = decode_video_frames(path, episode.timestamps[picked].tolist(), 1e-4, "pyav")
    for t, theirs in zip(picked, expected, strict=True):
        ours = next(episode.views[0].frames(t))
        assert ours.shape == (480, 640, 3)
        np.testing.assert_array_equal(ours, (theirs.numpy() * 255).round().astype(np.uint8).transpose(1, 2, 0))
    with pytest.raises(CorruptEpisode, match=r"episode 3: data/chunk-000/episode_000003.parquet is missing$"):
        source.load(3)


def test_reordered_frames_and_open_groups(tmp_path):
    """B-frames, one key frame per 12 frames, no key frame where the episode begins: matched by time, from any start."""
    path = tmp_path / "b.mp4"
    with av.open(str(path), "w") as out:
        options = {"bf": "3", "g": "12", "x264-params": "open-gop=1:scenecut=0", "crf": "1"}
        stream = out.add_stream("libx264", rate=10, options=options)
        stream.width = stream.height = 32
        for i in range(40):
            picture = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 6 * i, dtype=np.uint8), format="rgb24")
            out.mux(stream.encode(picture))
        out.mux(stream.encode())
    extent = video.find_extent(path, 0.7 + np.arange(30) / 10, "x")
    for start in range(30):
        levels = [f.mean() / 6 for f in video.decode(extent, "x", start, min(start + 6, 30))]
        np.testing.assert_allclose(levels, np.arange(start, min(start + 6, 30)) + 7, atol=0.4)


# --- cheap, once, in order -----------------------------------------------------------------------------------------


def test_each_file_is_opened_once_and_tables_need_no_video(copy_of, monkeypatch):
    root = copy_of("h264")
    opened, real = [], av.open
    monkeypatch.setattr(video.av, "open", lambda *a, **k: opened.append(a) or real(*a, **k))
    source = open_source(root)
    source.table(0), source.revision_hash, source.instruction_of(2)
    assert not opened
    episode = source.load(1)
    assert len(opened) == len(VIEWS)  # demuxed once a view
    assert sum(1 for _ in episode.views[0].frames()) == LENGTHS[1] and len(opened) == len(VIEWS) + 1
    shutil.rmtree(root / "videos")
    np.testing.assert_array_equal(open_source(root).table(1).action, episode.action)


def test_views_survive_pickling(recorded):
    for kind in ("h264", "image"):
        view = open_source(recorded[kind]).load(2).views[1]
        np.testing.assert_array_equal(next(pickle.loads(pickle.dumps(view)).frames(4)), next(view.frames(4)))


@pytest.mark.parametrize("kind", ["h264", "image"])
def test_source_hash_is_of_this_episode_alone(copy_of, kind):
    """Stable from run to run and under a change elsewhere; another as soon as a row, the text or an image changes."""
    root = copy_of(kind)
    before = [open_source(root).load(i).source_hash for i in range(3)]
    assert [open_source(root).load(i).source_hash for i in range(3)] == before and len(set(before)) == 3

    def nudge(table):
        action = np.array(table["action"].to_pylist())
        action[LENGTHS[0], 2] += 1e-3  # first row of episode 1
        return with_column(table, "action", action.tolist())

    rewrite(the_file(root, "data/*/*.parquet"), nudge)
    after = [open_source(root).load(i).source_hash for i in range(3)]
    assert [a == b for a, b in zip(after, before, strict=True)] == [True, False, True]


def test_source_hash_sees_a_changed_picture(recorded, copy_of):
    root = copy_of("hevc")
    first, second = sorted(root.glob("videos/*front/*/*.mp4"))[1:3]
    first.write_bytes(second.read_bytes())  # episode 1 (13 frames) now shows the beginning of episode 2 (16 frames)
    changed, original = open_source(root), open_source(recorded["hevc"])
    assert changed.load(1).source_hash != original.load(1).source_hash
    assert changed.load(2).source_hash == original.load(2).source_hash


def test_revision_hash_and_starts(copy_of):
    root = copy_of("image")
    source = open_source(root)
    before = source.revision_hash
    assert source.starts is None and open_source(root).revision_hash == before
    (root / "meta/dvla.json").write_text(
        json.dumps({"environment": "metaworld/push-v3", "starts": {"0": [0.5, 1], "2": [2.0]}})
    )
    again = open_source(root)
    assert (
        again.starts == {0: [0.5, 1.0], 2: [2.0]}
        and again.revision_hash != before
        and again.environment == "metaworld/push-v3"
    )
    for text in ("{}", '{"environment": 3, "starts": {}}', '{"environment": "x", "starts": {"-1": [0.5]}}'):
        (root / "meta/dvla.json").write_text(text)
        with pytest.raises(UserError, match="dvla.json is damaged.*; record the dataset again"):
            open_source(root)


# --- configs meet datasets -----------------------------------------------------------------------------------------


def test_view_choice_and_state_free_config(recorded):
    source = open_source(recorded["image"], config_for(("wrist", "observation.images.front"), control_hz=5.0))
    episode = source.load(0)
    assert source.view_names == ("wrist", "front") == tuple(v.name for v in episode.views)
    assert episode.state.shape == (LENGTHS[0], 0) and episode.control_hz == 5.0
    with pytest.raises(UserError, match="unknown view 'wrst'; did you mean 'wrist'"):
        open_source(recorded["image"], config_for(("wrst",)))


def test_swapped_colours_are_put_right(recorded):
    plain, turned = (open_source(recorded["image"], config_for(bgr_views=names)).load(0) for names in ((), ("wrist",)))
    for before, after, order in zip(plain.views, turned.views, (slice(None), slice(None, None, -1)), strict=True):
        frames = list(before.frames())
        assert all(np.array_equal(a, b[..., order]) for a, b in zip(after.frames(), frames, strict=True))
        assert np.array_equal(next(after.frames(4, 5)), frames[4][..., order])
    assert [a.sha256 == b.sha256 for a, b in zip(plain.views, turned.views)] == [True, False]
    assert plain.source_hash != turned.source_hash
    with pytest.raises(UserError, match="unknown view in bgr_views 'wirst'; did you mean 'wrist'"):
        open_source(recorded["image"], config_for(bgr_views=("wirst",)))


def test_config_that_does_not_describe_the_dataset(recorded):
    with pytest.raises(UserError, match="'action' has 4 dimensions, dataset config 'aloha' describes 14"):
        open_source(recorded["image"], load_config("aloha"))
    with pytest.raises(UserError, match="did you mean 'action'"):
        open_source(recorded["image"], config_for(action_columns=("actoin",)))


def test_cameras_with_the_same_last_name(copy_of):
    root = copy_of("image")
    info = json.loads((root / "meta/info.json").read_text())
    picture = info["features"]["observation.images.front"]
    info["features"] |= {
        "observation.images.rgb.head": picture,
        "observation.images.tactile.head": picture,
        "observation.images.depth.head": {**picture, "info": {"video.is_depth_map": True}},
    }
    (root / "meta/info.json").write_text(json.dumps(info))
    names = ("observation.images.rgb.head", "observation.images.tactile.head")
    for name in names:
        rewrite(the_file(root, "data/*/*.parquet"), lambda t, n=name: t.append_column(n, t["observation.images.front"]))
    assert open_source(root).view_names == ("front", "wrist", "rgb_head", "tactile_head")


def test_several_tasks_and_the_default_instruction(copy_of):
    root = copy_of("image")
    numbers = lambda t: [1] * 4 + [0] * 6 + t["task_index"].to_pylist()[10:]  # noqa: E731
    rewrite(the_file(root, "data/*/*.parquet"), lambda t: with_column(t, "task_index", numbers(t)))
    episodes = the_file(root, "meta/episodes/*/*.parquet")
    rewrite(episodes, lambda t: with_column(t, "tasks", [[TASKS[0], TASKS[1]], [TASKS[1]], [TASKS[0]]]))
    source = open_source(root)
    assert source.instruction_of(0) == source.load(0).instruction == "open the drawer; push the puck"  # in order of use
    rewrite(episodes, lambda t: with_column(t, "tasks", [[TASKS[0]], [TASKS[1]], [TASKS[0]]]))
    found = open_source(root).table(0)  # the rows decide
    assert found.instruction == "open the drawer; push the puck" and [n.rule for n in found.notes] == ["task-differs"]
    tasks = root / "meta/tasks.parquet"
    pq.write_table(pq.read_table(tasks).set_column(1, "__index_level_0__", pa.array(["", ""])), tasks)
    rewrite(episodes, lambda t: with_column(t, "tasks", [[""], [""], [""]]))
    source = open_source(root, config_for(instruction="do it"))
    assert source.instruction_of(1) == source.load(1).instruction == "do it"
