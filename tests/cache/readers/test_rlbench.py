"""RLBench demonstrations: the same episodes unpacked, zipped and in a tar, here or on the hub."""

import dataclasses
import os
import pickle
import shutil
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dvla.cache.readers import archive, open_source
from dvla.cache.readers.episode import CorruptEpisode
from dvla.cache.readers.rlbench.source import RlbenchSource
from dvla.cache.readers.search import load_config
from dvla.errors import UserError
from support.rlbench_samples import (
    CAMERAS,
    LENGTH,
    TEXT,
    Demo,
    copy_two,
    dump,
    observations,
    pack,
    picture,
    png,
    write_episode,
    write_task,
    write_tree,
)

CONFIG = load_config("rlbench")


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """rlbench/train: two tasks, close_jar with 11 episodes and open_drawer with 2; 13 in all."""
    return write_tree(tmp_path_factory.mktemp("base") / "rlbench" / "train")


@pytest.fixture
def one(tree, tmp_path):
    """One task of two episodes that a test may change, as (root, folder of episode 1)."""
    return copy_two(tree, tmp_path / "rlbench")


def test_an_episode_is_what_was_recorded(tree):
    source = open_source(tree)
    assert (source.name, source.config.name, source.control_hz) == ("rlbench_train", "rlbench", 20.0)
    assert source.episode_ids == tuple(range(13)) and source.view_names == CAMERAS
    for number, seed, text in ((0, 0, "close_jar"), (2, 2, "close_jar"), (10, 10, "close_jar"), (12, 1, "open_drawer")):
        episode, recorded = source.load(number), observations(LENGTH, seed)  # episode10 is number 10, not 2
        native = np.stack([[*o.gripper_pose, o.gripper_open] for o in recorded]).astype(np.float32)
        np.testing.assert_array_equal(episode.state, native)
        np.testing.assert_array_equal(episode.action, native[[1, 2, 3, 3]])  # the pose reached next; the end holds
        np.testing.assert_allclose(episode.timestamps, np.arange(LENGTH) / 20)
        assert episode.instruction == source.instruction_of(number) == TEXT[text] and source.length_of(number) == LENGTH
        for index, view in enumerate(episode.views):
            assert (view.name, view.height, view.width) == (CAMERAS[index], 12, 16)
            for t, frame in enumerate(view.frames()):
                np.testing.assert_array_equal(frame, picture(seed, t, index))
            assert [f.tobytes() for f in view.frames(1, 3)] == [picture(seed, t, index).tobytes() for t in (1, 2)]


def test_every_way_of_packing_gives_the_same_episodes(tree, tmp_path):
    """Zips with and without the task's folder, a tar, and a mixture under data/train, against the folder."""
    expected = [(e.source_hash, e.instruction, e.length) for e in map(open_source(tree, CONFIG).load, range(13))]
    for name, kinds in {"zips": ("zip", "zip"), "tars": ("tar", "tar"), "mixed": ("zip", None)}.items():
        for inner in (True, False):
            root = tmp_path / f"{name}{inner}" / "RLBench-18-Tasks"
            for task, kind in zip(("close_jar", "open_drawer"), kinds):
                target = root / "data" / "train" / task
                if kind:
                    pack(tree / task, target.with_suffix(f".{kind}"), with_folder=inner)
                else:
                    shutil.copytree(tree / task, target)
            source = open_source(root, CONFIG)
            assert [(e.source_hash, e.instruction, e.length) for e in map(source.load, source.episode_ids)] == expected
            assert source.view_names == CAMERAS and source.name == "RLBench-18-Tasks"
            frame = next(source.load(12).views[4].frames(3))
            np.testing.assert_array_equal(frame, picture(1, 3, 4))


@pytest.mark.parametrize(
    "part, name, numbers",
    [
        ("", "rlbench_train", 13),
        ("close_jar", "rlbench_train_close_jar", 11),
        ("close_jar/all_variations", "rlbench_train_close_jar_all_variations", 11),
        ("open_drawer/all_variations/episodes", "train_open_drawer_all_variations_episodes", 2),
        ("open_drawer/all_variations/episodes/episode1", "open_drawer_all_variations_episodes_episode1", 1),
    ],
)
def test_any_folder_can_be_given(tree, part, name, numbers):
    source = open_source(str(tree / part), CONFIG)
    assert (source.name, len(source.episode_ids)) == (name, numbers)
    assert source.load(numbers - 1).instruction in TEXT.values()
    assert RlbenchSource.matches(
        [
            p.relative_to(tree / part).as_posix()
            for p in (tree / part).glob("**/*")
            if len(p.relative_to(tree / part).parts) <= 3
        ],
        tree / part,
    )


def test_a_zip_alone(tree, tmp_path):
    for name in ("close_jar.zip", "my_jars.zip", "close_jar.tar"):
        path = pack(tree / "close_jar", tmp_path / "rlbench" / name)
        assert RlbenchSource.matches([name], path.parent)
        source = open_source(path)
        assert source.name == name.split(".")[0] and len(source.episode_ids) == 11
        assert source.load(3).source_hash == open_source(tree, CONFIG).load(3).source_hash


def test_what_is_on_the_hub_is_known_by_name():
    assert RlbenchSource.matches(["README.md", "data/train/close_jar.zip", "data/val/turn_tap.zip"], None)
    assert not RlbenchSource.matches(["README.md", "data/train/episodes.zip", "meta/info.json"], None)


def test_hub_zip_and_folder(tree, tmp_path, monkeypatch):
    """A hub id, a folder of one and a zip of one: only what is below it is asked for, and the names say whence it
    is."""
    import huggingface_hub

    snapshot, asked = tmp_path / "0123abcd", []
    for split in ("train", "val"):
        pack(tree / "open_drawer", snapshot / "data" / split / "open_drawer.zip")
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo, allow_patterns, **_: asked.append(allow_patterns) or snapshot
    )
    source = RlbenchSource("hqfang/RLBench-18-Tasks")
    assert (source.name, len(source.episode_ids), source.config.name) == ("RLBench-18-Tasks", 4, "rlbench")
    folder = RlbenchSource("hqfang/RLBench-18-Tasks/data/val")
    zipped = RlbenchSource("hqfang/RLBench-18-Tasks/data/val/open_drawer.zip@main")
    assert (folder.name, zipped.name) == ("RLBench-18-Tasks_data_val", "RLBench-18-Tasks_data_val_open_drawer")
    assert "*.zip" in asked[0] and "data/val/*.zip" in asked[1] and asked[2] == ["data/val/open_drawer.zip"]
    assert folder.load(1).source_hash == zipped.load(1).source_hash
    with pytest.raises(UserError, match="has no file turn_tap.zip"):
        RlbenchSource("hqfang/RLBench-18-Tasks/data/val/turn_tap.zip")


def test_variations_in_folders_and_plain_lists(tmp_path):
    """RLBench's own generator: variationK/episodes, the texts once per variation; its older versions pickle a list."""
    for variation in (2, 10):
        folder = tmp_path / "rlbench" / "reach_target" / f"variation{variation}"
        write_episode(folder / "episodes" / "episode0", variation, plain_list=variation == 2, protocol=3)
        (folder / "variation_descriptions.pkl").write_bytes(dump([f"reach target {variation}"]))
    source = open_source(tmp_path / "rlbench", CONFIG)
    assert [source.instruction_of(i) for i in source.episode_ids] == ["reach target 2", "reach target 10"]
    assert source.load(0).instruction == "reach target 2" and source.load(0).length == LENGTH


def test_other_columns_views_and_the_default_text(one):
    root, folder = one
    (folder / "variation_descriptions.pkl").unlink()
    fields = tuple(f for f in CONFIG.action if f.field) + (
        dataclasses.replace(CONFIG.action[2], field=None, drop=16 + 2),
    )
    config = dataclasses.replace(
        CONFIG,
        action=fields,
        state=(),
        views=("wrist",),
        instruction="do it",
        action_shift=0,
        action_columns=("gripper_open", "gripper_matrix", "gripper_joint_positions"),
    )
    episode = open_source(root, config).load(1)
    expected = [
        [o.gripper_open, *o.gripper_matrix.ravel(), *o.gripper_joint_positions] for o in observations(LENGTH, 1)
    ]
    np.testing.assert_array_equal(episode.action, np.array(expected, np.float32))
    assert [v.name for v in episode.views] == ["wrist"] and episode.instruction == "do it"
    with pytest.raises(UserError, match="did you mean 'wrist'"):
        open_source(root, dataclasses.replace(config, views=("wrst",)))


def test_hashes_see_changes(one):
    root, folder = one
    before, revision = (
        [open_source(root, CONFIG).load(i).source_hash for i in (0, 1)],
        open_source(root, CONFIG).revision_hash,
    )
    (folder / "overhead_rgb" / "2.png").write_bytes(png(picture(1, 3, 3)))
    after = [open_source(root, CONFIG).load(i).source_hash for i in (0, 1)]
    assert before[0] == after[0] and before[1] != after[1] and open_source(root, CONFIG).revision_hash == revision
    (folder / "low_dim_obs.pkl").write_bytes(dump(Demo(observations(LENGTH + 1, 1))))
    assert open_source(root, CONFIG).revision_hash != revision


def test_views_are_safe_in_threads_and_survive_pickling(tree, tmp_path, monkeypatch):
    """Several threads in more archives than indexes are kept; no file stays open."""
    for task in ("close_jar", "open_drawer"):
        pack(tree / task, tmp_path / "rlbench" / f"{task}.zip")
    archive._read_index.cache_clear()
    source = open_source(tmp_path / "rlbench", CONFIG)
    views = [pickle.loads(pickle.dumps(source.load(n).views[1])) for n in (0, 5, 11, 12) * 3]
    with warnings.catch_warnings(), ThreadPoolExecutor(6) as pool:
        warnings.simplefilter("error", ResourceWarning)
        found = list(pool.map(lambda v: [f.tobytes() for f in v.frames()], views))
    assert found == [[f.tobytes() for f in v.frames()] for v in views]
    if Path("/proc/self/fd").is_dir():
        assert not [p for p in Path("/proc/self/fd").iterdir() if p.exists() and str(tmp_path) in os.path.realpath(p)]


def test_formats_are_told_apart(tree, tmp_path):
    """By the folders four deep, by what an unknown zip holds, and not by any zip at all."""
    root = tmp_path / "RLBench-18-Tasks"
    shutil.copytree(tree / "open_drawer", root / "data" / "train" / "my_task")
    names = [p.relative_to(root).as_posix() for p in root.glob("*")] + ["data/train", "data/train/my_task"]
    assert RlbenchSource.matches(names, root) and not RlbenchSource.matches(names, None)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("data/.zgroup", "{}")
    assert not RlbenchSource.matches(["other.zip"], tmp_path) and not RlbenchSource.matches(
        ["train", "meta/info.json"], tmp_path
    )


def test_what_stands_in_many_places_is_looked_at_once(tmp_path):
    """One large value may be named by every observation, every attribute and every text."""
    task = write_task(tmp_path / "rlbench", "close_jar", 1)
    folder, begun = task / "all_variations/episodes/episode0", time.process_time()
    rows = observations(2, seed=0)
    large = np.zeros(2_000_000)
    for row in rows:
        row.gripper_pose = large
    (folder / "low_dim_obs.pkl").write_bytes(dump(Demo([rows[0]] * 50 + [rows[1]] * 50)))
    source = open_source(task, CONFIG)
    with pytest.raises(CorruptEpisode, match=r"'gripper_pose' is \[2000000\] in each of 100 frames"):
        source.table(0)
    (folder / "variation_descriptions.pkl").write_bytes(dump([" " * 10_000_000] * 10_000 + ["close the jar"]))
    assert source.instruction_of(0) == "close the jar" and time.process_time() - begun < 10
