"""Damaged, hostile and missing RLBench demonstrations: each is one clear line, and nothing else is lost."""

import contextlib
import dataclasses
import os
import pickle
import shutil
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dvla.cache.readers import open_source
from dvla.cache.readers.episode import CorruptEpisode
from dvla.cache.readers.images import decode
from dvla.cache.readers.search import load_config
from dvla.errors import UserError
from support.rlbench_samples import CAMERAS, LENGTH, Demo, copy_two, dump, observations, pack, picture, png, write_tree

CONFIG = load_config("rlbench")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """rlbench/train: two tasks, close_jar with 5 episodes and open_drawer with 2."""
    return write_tree(tmp_path_factory.mktemp("base") / "rlbench" / "train", episodes=5)


@pytest.fixture
def one(tree, tmp_path):
    """One task of two episodes that a test may damage, as (root, folder of episode 1)."""
    return copy_two(tree, tmp_path / "rlbench")


def corrupt(source, number, message):
    with pytest.raises(CorruptEpisode, match=message) as caught:
        for view in source.load(number).views:
            list(view.frames())
    assert str(caught.value).startswith(f"{source.name} episode {number}: ") and "\n" not in str(caught.value)
    return str(caught.value)


# --- damage in an episode ------------------------------------------------------------------------------------------


def change(folder, **fields):
    """Write the episode's observations again; a list gives each frame its own value."""
    demo = observations(LENGTH, 1)
    for name, values in fields.items():
        for t, one in enumerate(demo):
            setattr(one, name, values[t] if isinstance(values, list) else values)
    (folder / "low_dim_obs.pkl").write_bytes(dump(Demo(demo)))


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


class Attack:
    def __reduce__(self):
        return os.mkdir, ("ran",)


DAMAGE = {
    "no observations": (lambda f: (f / "low_dim_obs.pkl").unlink(), "episode1/low_dim_obs.pkl is missing"),
    "observations cut off": (lambda f: cut(f / "low_dim_obs.pkl"), "low_dim_obs.pkl is cut off or damaged"),
    "a pickle that runs code": (
        lambda f: (f / "low_dim_obs.pkl").write_bytes(pickle.dumps(Attack())),
        "low_dim_obs.pkl asks for posix.mkdir, which is not an observation record; refused",
    ),
    "code in the texts": (
        lambda f: (f / "variation_descriptions.pkl").write_bytes(pickle.dumps([Attack()])),
        "variation_descriptions.pkl asks for posix.mkdir",
    ),
    "another pickle": (
        lambda f: (f / "low_dim_obs.pkl").write_bytes(dump([1, 2])),
        "holds no list of 1 to 100,000 observations",
    ),
    "an empty demo": (lambda f: (f / "low_dim_obs.pkl").write_bytes(dump(Demo([]))), "holds no list of 1 to"),
    "texts that are none": (
        lambda f: (f / "variation_descriptions.pkl").write_bytes(dump({"a": 1})),
        "holds no list of texts",
    ),
    "a field that is None": (
        lambda f: change(f, gripper_pose=None),
        "no numbers called 'gripper_pose' .it has gripper_joint",
    ),
    "None in one frame": (lambda f: change(f, gripper_open=[1.0, None, 1.0, 1.0]), "has no 'gripper_open' in frame 1"),
    "a shape that changes": (
        lambda f: change(f, gripper_pose=[*map(np.ones, (7, 7, 6, 7))]),
        r"'gripper_pose' has shape \(6,\) in frame 2, \(7,\) before",
    ),
    "a text for a number": (lambda f: change(f, gripper_open="open"), "no numbers called 'gripper_open'"),
    "an object array": (lambda f: change(f, gripper_pose=np.array([None] * 7)), "no numbers called 'gripper_pose'"),
    "a number beyond floats": (lambda f: change(f, gripper_open=10**400), "no numbers called 'gripper_open'"),
    "NaN": (lambda f: change(f, gripper_open=[1.0, 1.0, float("nan"), 1.0]), "'gripper_open' is nan at frame 2"),
    "a pose too short": (lambda f: change(f, gripper_pose=np.ones(6)), "its action has 7 dimensions, .* describes 8"),
    "a quaternion of zeros": (lambda f: change(f, gripper_pose=np.zeros(7)), "is not a rotation"),
    "a camera missing": (
        lambda f: shutil.rmtree(f / "wrist_rgb"),
        "wrist_rgb is missing or empty, so there is no image of 'wrist'",
    ),
    "an image missing": (
        lambda f: (f / "front_rgb" / "2.png").unlink(),
        "front_rgb has 3.png where image 2 should be",
    ),
    "the last image missing": (lambda f: (f / "front_rgb" / "3.png").unlink(), "3 images of 'front' for 4 rows"),
    "one observation more": (
        lambda f: (f / "low_dim_obs.pkl").write_bytes(dump(Demo(observations(5, 1)))),
        "4 images of 'front' for 5 rows",
    ),
    "no image": (
        lambda f: (f / "front_rgb" / "0.png").write_bytes(b"GIF89a"),
        "front_rgb/0.png is not an image \\(PNG\\)",
    ),
    "an image cut off": (lambda f: cut(f / "overhead_rgb" / "1.png"), "overhead_rgb/1.png cannot be decoded"),
    "an image of another size": (
        lambda f: (f / "wrist_rgb" / "3.png").write_bytes(png(picture(0, 0, 0, (8, 8)))),
        "wrist_rgb/3.png is 8x8, the first is 16x12",
    ),
    "everything missing": (
        lambda f: [shutil.rmtree(p) if p.is_dir() else p.unlink() for p in f.iterdir()],
        "episode1/low_dim_obs.pkl is missing",
    ),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_clear_line_and_loses_nothing_else(one, tmp_path, monkeypatch, name, packed):
    (root, folder), (harm, message) = one, DAMAGE[name]
    good = open_source(root, CONFIG).load(0).source_hash
    harm(folder)
    monkeypatch.chdir(tmp_path)
    if packed:
        root = pack(root / "close_jar", tmp_path / "packed" / "rlbench" / "close_jar.zip").parent
    source = open_source(root, CONFIG)
    assert source.episode_ids == (0, 1)
    text = corrupt(source, 1, message)
    assert "episode1/" not in text or ("close_jar.zip: " in text) == packed  # where the file is, when one is to blame
    assert source.load(0).source_hash == good and not (tmp_path / "ran").exists()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_pictures_are_never_another_error(tree, data):
    good = (tree / "close_jar/all_variations/episodes/episode0/front_rgb/1.png").read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    bad = good[:at] + data.draw(st.binary(max_size=8)) + good[at + data.draw(st.integers(0, 8)) :]
    with contextlib.suppress(CorruptEpisode):
        decode(bad, "x", ("PNG",))


# --- what cannot be opened -----------------------------------------------------------------------------------------


def refuse(path, message):
    with pytest.raises(UserError, match=message) as caught:
        open_source(path, CONFIG)
    assert "\n" not in str(caught.value)


def test_sources_that_cannot_be_opened(tree, tmp_path):
    root = tmp_path / "rlbench"
    refuse(root, "does not exist")
    root.mkdir()
    refuse(root, "holds no RLBench episode: a folder like all_variations/episodes/episode0")
    path = pack(tree / "open_drawer", root / "train" / "open_drawer.zip")
    shutil.copytree(tree / "open_drawer", root / "train" / "open_drawer")  # unpacked beside it
    refuse(
        root,
        "train/open_drawer/all_variations/episodes/episode0 appears twice, in .*open_drawer.*; move one of them away",
    )
    shutil.rmtree(root / "train" / "open_drawer")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refuse(root, "open_drawer.zip is cut off or damaged .*; fetch it again")
    refuse(path, "open_drawer.zip is cut off or damaged")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("../../open_drawer/all_variations/episodes/episode0/low_dim_obs.pkl", b"x")
    refuse(root, "open_drawer.zip: member '../../open_drawer/.*' is outside its folder; the archive is refused")
    path.write_bytes(whole)
    count = len(open_source(root, CONFIG).episode_ids)
    (root / "train" / "close_jar.tar.xz").write_bytes(b"\xfd7zXZ\0")
    pack(tree / "close_jar", root / "train" / "turn_tap.zip").write_bytes(whole[: len(whole) // 2])
    source = open_source(root, CONFIG)  # each counts as one episode
    assert len(source.episode_ids) == count + 2 and source.load(1).length
    corrupt(source, 0, "close_jar.tar.xz is compressed as one stream, .*; extract it first")
    corrupt(source, count + 1, "turn_tap.zip is cut off or damaged .*; fetch it again")
    (root / "notes.txt").write_text("x")
    refuse(root / "notes.txt", "notes.txt is not a folder, a .zip or a .tar file")


def test_five_of_a_hundred_episodes_are_there(tree, tmp_path):
    """What was listed and is empty is named one by one; what is there is read."""
    inner = "rlbench/close_jar/all_variations/episodes"
    for number in range(100):
        folder = tmp_path / inner / f"episode{number}"
        if number % 20 == 7:
            shutil.copytree(tree / "close_jar/all_variations/episodes/episode4", folder)
        else:
            folder.mkdir(parents=True)
    shutil.copytree(
        tmp_path / inner / "episode7" / "wrist_rgb", tmp_path / inner / "episode7" / "extra_rgb"
    )  # in one alone
    source = open_source(tmp_path / "rlbench", CONFIG)
    assert len(source.episode_ids) == 100 and source.view_names == CAMERAS
    assert [n.text for n in source.notes()] == ["camera 'extra' is in 1 of 5 episodes looked at and not used"]
    bad = [n for n in source.episode_ids if n % 20 != 7]
    for number in bad[::19]:
        corrupt(source, number, f"episode{number}/low_dim_obs.pkl is missing")
    assert [source.load(n).length for n in (7, 87)] == [LENGTH, LENGTH]


def test_texts_that_are_empty_are_skipped(tree, tmp_path):
    root = shutil.copytree(tree / "close_jar", tmp_path / "close_jar")
    folders = sorted((root / "all_variations/episodes").iterdir())
    for folder, texts in zip(folders, ([], [" ", " close it "])):
        (folder / "variation_descriptions.pkl").write_bytes(dump(texts))
    source = open_source(root, dataclasses.replace(CONFIG, instruction="do it"))
    assert [source.load(n).instruction for n in source.episode_ids[:2]] == ["do it", "close it"]
