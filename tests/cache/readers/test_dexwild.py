"""DexWild HDF5, on files made to its documented layout: exact values, one clock, and one clear line for every
damage."""

from __future__ import annotations

import dataclasses
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from dvla.cache.actions.action_map import FieldSpec
from dvla.cache.actions.slots import SLOTS
from dvla.cache.readers import detect_format, open_source
from dvla.cache.readers.episode import CorruptEpisode
from dvla.cache.readers.search import load_config
from dvla.errors import Failed, UserError
from support.dex_samples import (
    CAMERAS,
    PERIOD_NS,
    PICTURE_SIZE,
    START_NS,
    dex_picture,
    jpeg,
    streams,
    write_dexwild,
    write_episode,
)

VIEWS = ("right_thumb_cam", "right_pinky_cam")  # the config's order


@pytest.fixture
def dexwild(tmp_path):
    write_dexwild(tmp_path / "dexwild-dataset")
    return tmp_path / "dexwild-dataset"


def one_episode(tmp_path: Path, change=lambda values: None, length=8, **how) -> Path:
    return write_dexwild(tmp_path / "dexwild", (length,), change=change, **how)


def loaded(path, **changes):
    config = dataclasses.replace(load_config("dexwild"), **changes) if changes else None
    return open_source(path, config).load(0)


def replace(group, values):
    """The stream of `group` now holds `values`."""
    name = group.name.rsplit("/", 1)[-1]
    del group[name]
    group[name] = values


def test_episodes_are_what_was_written(dexwild):
    source = open_source(dexwild)
    assert source.format == detect_format(dexwild) == "dexwild"
    assert source.view_names == VIEWS and source.control_hz == 30 and source.config.embodiment == "dex_hand"
    assert source.episode_ids == (0, 1) and [source.length_of(e) for e in (0, 1)] == [8, 6]
    for number, length in enumerate((8, 6)):
        episode, written = source.load(number), streams(length, seed=number)
        native = np.hstack([written["right_arm_eef"][:, 1:], written["right_leapv1"][:, 1:]])
        assert np.array_equal(
            episode.action, native[[*range(1, length), length - 1]].astype(np.float32)
        )  # one frame ahead
        assert np.array_equal(episode.state, written["right_arm_eef"][:, 1:].astype(np.float32))
        assert np.allclose(episode.timestamps, np.arange(length) * PERIOD_NS / 1e9, atol=1e-12)
        assert episode.instruction == source.instruction_of(number) == "pour the liquid into the cup"
        for view in episode.views:
            assert (view.height, view.width, view.length) == (*PICTURE_SIZE, length)
            expected = [dex_picture(CAMERAS.index(view.name), t) for t in range(length)]
            assert np.array_equal(list(view.frames()), expected)
            assert np.array_equal(list(view.frames(2, 4)), expected[2:4])


def test_sixteen_fingers_and_the_wrist_have_their_slots_and_come_back(dexwild):
    source = open_source(dexwild)
    table = source.table(0)
    unified = source.action_map.to_unified(table.action)
    assert np.array_equal(unified[:, 103:119], table.action[:, 7:])
    assert np.array_equal(unified[:, SLOTS["eef_pos_x"] :][:, :3], table.action[:, :3])
    assert source.action_map.mask.sum() == 3 + 6 + 16
    back = source.action_map.to_native(unified)
    sign = np.sign((back[:, 3:7] * table.action[:, 3:7]).sum(1, keepdims=True))  # q and -q are one rotation
    back[:, 3:7] *= sign
    assert np.abs(back - table.action).max() < 1e-6


def test_jpeg_bytes_are_decoded_and_are_not_raw_arrays(tmp_path):
    raw = loaded(write_dexwild(tmp_path / "raw"))
    coded = loaded(write_dexwild(tmp_path / "coded", encoded=True))
    for a, b in zip(raw.views, coded.views, strict=True):
        difference = np.abs(np.array(list(a.frames()), np.int16) - np.array(list(b.frames()), np.int16))
        assert difference.mean() < 3 and (b.height, b.width) == PICTURE_SIZE
    assert raw.source_hash != coded.source_hash


@pytest.mark.parametrize("store", ["opaque", "vlen", "bytes"])
def test_encoded_pictures_may_be_one_opaque_value(tmp_path, store):
    path, data = one_episode(tmp_path), jpeg(dex_picture(1, 3))
    name = f"ep_0000/right_thumb_cam/{START_NS + 3 * PERIOD_NS}.jpg"
    with h5py.File(path, "a") as file:
        del file[name]
        if store == "vlen":
            file.create_dataset(name, shape=(), dtype=h5py.vlen_dtype(np.uint8))[()] = np.frombuffer(data, np.uint8)
        else:
            file.create_dataset(name, data=np.void(data) if store == "opaque" else np.bytes_(data))
    got = list(loaded(path).views[0].frames(3, 4))[0]
    assert np.abs(got.astype(int) - dex_picture(1, 3)).mean() < 3


def test_pictures_change_the_hash_and_nothing_else_does(tmp_path):
    first, same = loaded(write_dexwild(tmp_path / "a")), loaded(write_dexwild(tmp_path / "b"))
    path = write_dexwild(tmp_path / "c")
    with h5py.File(path, "a") as file:
        picture = file[f"ep_0000/right_pinky_cam/{START_NS}.jpg"]
        picture[0, 0, 0] = picture[0, 0, 0] ^ 1
    assert first.source_hash == same.source_hash != loaded(path).source_hash


def test_views_can_be_read_from_several_threads(dexwild):
    episode = open_source(dexwild).load(0)
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda view: list(view.frames()), episode.views * 4))
    for i, frames in enumerate(got):
        assert np.array_equal(frames, got[i % 2])


def test_files_of_several_tasks_are_one_dataset(tmp_path):
    for task in ("toy", "pour"):
        write_dexwild(tmp_path / "dexwild", (6,), task=task)
    source = open_source(tmp_path / "dexwild")
    assert [source.instruction_of(e) for e in source.episode_ids] == [
        "pour the liquid into the cup",
        "put the toy into the box",
    ]


def test_text_in_the_file_wins_over_the_task_of_its_name(dexwild):
    with h5py.File(next(dexwild.rglob("*.hdf5")), "a") as file:
        file.create_dataset("ep_0000/language/language", data="pour tea ")
    source = open_source(dexwild)
    assert source.instruction_of(0) == source.load(0).instruction == "pour tea"


# --- one clock ---


def test_streams_that_start_late_or_stop_early_shorten_the_episode(tmp_path):
    def late_and_short(values):
        values["right_arm_eef"] = values["right_arm_eef"][2:]
        values["right_leapv1"] = values["right_leapv1"][:-1]

    path = one_episode(tmp_path, late_and_short, length=12)
    episode, written = loaded(path), streams(12)
    assert episode.length == open_source(path).length_of(0) == 9
    assert np.array_equal(episode.state, written["right_arm_eef"][2:11, 1:].astype(np.float32))
    assert np.array_equal(next(episode.views[0].frames(0, 1)), dex_picture(1, 2))
    assert episode.timestamps[0] == 0


def test_rows_are_found_by_time_not_by_order_or_count(tmp_path):
    def shuffled_and_dense(values):
        between = values["right_leapv1"].copy()  # rows between the images, out of order, must not be taken
        between[:, 0] += PERIOD_NS / 2.5
        between[:, 1:] = 99
        values["right_leapv1"] = np.vstack([values["right_leapv1"], between])[np.random.default_rng(1).permutation(16)]

    episode = loaded(one_episode(tmp_path, shuffled_and_dense))
    assert np.array_equal(episode.action[:-1, 7:], streams(8)["right_leapv1"][1:, 1:].astype(np.float32))


def test_a_clock_that_runs_apart_is_followed_while_it_is_near(tmp_path):
    def jitter(values):
        values["right_arm_eef"][:, 0] += np.linspace(-0.4, 0.4, 8) * PERIOD_NS

    assert np.array_equal(
        loaded(one_episode(tmp_path, jitter)).state, streams(8)["right_arm_eef"][:, 1:].astype(np.float32)
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda v: v.update(right_leapv1=np.delete(v["right_leapv1"], 4, axis=0)),
            "no row of 'right_leapv1' within 17 ms of the image",
        ),
        (
            lambda v: v.update(right_arm_eef=v["right_arm_eef"][:20]),
            "no row of 'right_arm_eef' within 17 ms .*number 39 of the 40",
        ),
        (
            lambda v: v.update(right_arm_eef=v["right_arm_eef"][20:]),
            "no row of 'right_arm_eef' within 17 ms .*number 0 of the 40",
        ),
        (lambda v: v["right_arm_eef"].__setitem__((slice(None), 0), 5.0), "no row of 'right_arm_eef' within 17 ms"),
        (
            lambda v: v["right_arm_eef"].__setitem__((3, 0), np.nan),
            "a time of 'right_arm_eef/right_arm_eef' is not finite",
        ),
        (
            lambda v: v["right_leapv1"].__setitem__((3, 2), np.nan),
            "column 'right_leapv1' is nan at frame 3, dimension 1",
        ),
        (lambda v: v["right_arm_eef"].__setitem__((5, slice(4, 8)), 0.0), "quaternion|rotation"),
    ],
)
def test_an_episode_that_does_not_fit_together_is_refused(tmp_path, change, message):
    write_dexwild(tmp_path / "dexwild", (8,), task="toy")
    one_episode(tmp_path, change, length=40)
    source = open_source(tmp_path / "dexwild")
    with pytest.raises(CorruptEpisode, match=f"^dexwild episode 0.*({message})") as error:
        source.action_map.to_unified(source.load(0).action)
    assert "\n" not in str(error.value)
    assert source.load(1).length == 8  # nothing else is lost


def test_a_picture_of_another_view_that_is_missing_is_refused(dexwild):
    with h5py.File(next(dexwild.rglob("*.hdf5")), "a") as file:
        del file[f"ep_0000/right_pinky_cam/{START_NS + 3 * PERIOD_NS}.jpg"]
    with pytest.raises(CorruptEpisode, match="no image of 'right_pinky_cam' within 17 ms"):
        open_source(dexwild).load(0)


# --- LEAP v2 and other configs ---


def test_the_seventeenth_joint_needs_a_named_conversion(dexwild):
    with pytest.raises(UserError, match="24 dimensions.*describes 23.*LEAP v2 has 17 joints.*'drop: 1'"):
        loaded(dexwild, action_columns=("right_arm_eef", "right_leapv2"))
    named = (*load_config("dexwild").action, FieldSpec(drop=1))
    episode = loaded(dexwild, action_columns=("right_arm_eef", "right_leapv2"), action=named)
    assert np.array_equal(episode.action[:-1, 7:], streams(8)["right_leapv2"][1:, 1:].astype(np.float32))


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"action_columns": ("right_arm_eef", "right_leap1")},
            "unknown stream 'right_leap1'; did you mean 'right_leapv1'",
        ),
        ({"views": ("right_tumb_cam",)}, "unknown view 'right_tumb_cam'; did you mean 'right_thumb_cam'"),
        ({"state_columns": ("right_manus",)}, "'right_manus' has 70 dimensions.*describes 7"),
        ({"control_hz": None}, "add control_hz"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_when_opened(dexwild, changes, message):
    with pytest.raises(UserError, match=message):
        loaded(dexwild, **changes)


def test_arrays_called_otherwise_than_their_group_are_named_by_path(dexwild):
    with h5py.File(next(dexwild.rglob("*.hdf5")), "a") as file:
        for name in file:
            file[f"{name}/right_tracker/right_tracker_world_clipped_abs"] = file[f"{name}/right_arm_eef/right_arm_eef"][
                ()
            ]
            del file[f"{name}/right_arm_eef"]
    column = "right_tracker/right_tracker_world_clipped_abs"
    episode = loaded(dexwild, action_columns=(column, "right_leapv1"), state_columns=(column,))
    assert np.array_equal(episode.state, streams(8)["right_arm_eef"][:, 1:].astype(np.float32))


# --- damage ---


def test_a_file_cut_short_is_one_refused_episode(tmp_path):
    root = tmp_path / "dexwild"
    write_dexwild(root, (8,), task="pour")
    cut = write_dexwild(root, (6, 6), task="clothes")
    cut.write_bytes(cut.read_bytes()[:9000])
    source = open_source(root)
    assert source.episode_ids == (0, 1)
    with pytest.raises(CorruptEpisode, match="^dexwild episode 0: robot_clothes_data.hdf5 cannot be read as HDF5"):
        source.load(0)
    assert source.load(1).length == 8
    with pytest.raises(UserError, match="no HDF5 file here can be read"):
        open_source(cut, load_config("dexwild"))


def test_pictures_cut_short_or_of_another_size_are_refused(tmp_path):
    path = one_episode(tmp_path, encoded=True)
    with h5py.File(path, "a") as file:
        folder = file["ep_0000/right_thumb_cam"]
        names = sorted(folder)
        for name, data in (
            (names[2], jpeg(dex_picture(1, 2))[:300]),
            (names[4], jpeg(dex_picture(1, 4, 16, 16))),
            (names[6], b"no"),
        ):
            del folder[name]
            folder[name] = np.frombuffer(data, np.uint8)
    view = open_source(path).load(0).views[0]
    assert len(list(view.frames(0, 2))) == 2
    for frame, message in (
        (2, "is not an image"),
        (4, "is 16x16, the first image is 32x24"),
        (6, "is not an image"),
    ):
        with pytest.raises(CorruptEpisode, match=f"^robot_pour_data episode 0 .*{message}"):
            list(view.frames(frame, frame + 1))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda g: g.pop("right_leapv1"), "'right_leapv1' is missing"),
        (lambda g: g.pop("right_pinky_cam"), "'right_pinky_cam' is missing"),
        (lambda g: g["right_pinky_cam"].clear(), "'right_pinky_cam' holds no images"),
        (
            lambda g: g["right_pinky_cam"].create_dataset("cover.jpg", data=[1]),
            "image 'cover.jpg' of 'right_pinky_cam' is not named",
        ),
        (lambda g: g["right_pinky_cam"].create_dataset(f"{10**30}.jpg", data=[1]), "is not named by its time"),
        (lambda g: replace(g["right_leapv1"], np.zeros(4)), "is \\[4\\], a stream"),
        (lambda g: replace(g["right_leapv1"], np.zeros((0, 17))), "is \\[0, 17\\], a stream"),
        (lambda g: replace(g["right_leapv1"], np.array([[b"a", b"b"]])), "is not numeric"),
        (lambda g: replace(g["right_leapv1"], streams(8)["right_leapv1"][:, :16]), "22 dimensions"),
        (
            lambda g: (g.pop("right_leapv1"), g.__setitem__("right_leapv1", h5py.ExternalLink("other.h5", "/"))),
            "link into another file",
        ),
        (lambda g: g.create_dataset("language/language", data=[1.0]), "is not text"),
    ],
)
def test_every_damage_of_an_episode_is_one_line_and_costs_only_that_episode(dexwild, damage, message):
    with h5py.File(next(dexwild.rglob("*.hdf5")), "a") as file:
        damage(file["ep_0000"])
    source = open_source(dexwild)
    with pytest.raises(CorruptEpisode, match=f"^dexwild-dataset episode 0.*{message}") as error:
        source.load(0)
    assert "\n" not in str(error.value)
    assert source.load(1).length == 6


def test_a_picture_array_of_another_kind_is_refused(dexwild):
    with h5py.File(next(dexwild.rglob("*.hdf5")), "a") as file:
        for name in file["ep_0000/right_thumb_cam"]:
            del file[f"ep_0000/right_thumb_cam/{name}"]
            file[f"ep_0000/right_thumb_cam/{name}"] = np.zeros((4, 4, 4), np.uint8)
    with pytest.raises(CorruptEpisode, match="is uint8 \\[4, 4, 4\\]; an image is uint8 \\[H, W, 3\\]"):
        open_source(dexwild).load(0)


@pytest.mark.parametrize("form", ["gray", "gray without an axis", "rgba", "turned"])
def test_pictures_stored_otherwise(dexwild, form):
    def stored(image):
        if form == "turned":
            exif, file = Image.Exif(), io.BytesIO()
            exif[274] = 3
            Image.fromarray(image).save(file, "PNG", exif=exif)
            return np.frombuffer(file.getvalue(), np.uint8)
        gray = image[..., :1]
        return {"gray": gray, "gray without an axis": gray[..., 0], "rgba": np.concatenate([image, gray], 2)}[form]

    before = open_source(dexwild).load(0)
    images = list(before.views[0].frames())
    with h5py.File(next(dexwild.rglob("*.hdf5")), "a") as file:
        for image, name in zip(images, sorted(file["ep_0000/right_thumb_cam"]), strict=True):
            del file[f"ep_0000/right_thumb_cam/{name}"]
            file[f"ep_0000/right_thumb_cam/{name}"] = stored(image)
    view = open_source(dexwild).load(0).views[0]
    shown = {"turned": lambda i: i[::-1, ::-1], "rgba": lambda i: i}.get(form, lambda i: np.repeat(i[..., :1], 3, 2))
    assert all(np.array_equal(f, shown(i)) for f, i in zip(view.frames(), images, strict=True))
    assert view.sha256 != before.views[0].sha256


def test_folders_without_dexwild_files(tmp_path):
    with pytest.raises(UserError, match="holds no .hdf5 file; .*join and unpack"):
        open_source(tmp_path, load_config("dexwild"))
    with h5py.File(tmp_path / "robot_pour_data.hdf5", "w") as file:
        file["data"] = 1
    with pytest.raises(UserError, match="no HDF5 file here can be read and holds groups ep_0000"):
        open_source(tmp_path, load_config("dexwild"))
    with h5py.File(tmp_path / "robot_toy_data.hdf5", "w") as file:
        write_episode(file, "ep_0000")
    assert detect_format(tmp_path) == "dexwild"
    assert open_source(tmp_path).load(1).instruction == "put the toy into the box"


def test_an_odd_first_episode_does_not_speak_for_the_others(tmp_path):
    """A camera, and a column's width, that one episode of three has."""
    path = write_dexwild(tmp_path / "dexwild", (8, 6, 7))
    with h5py.File(path, "r+") as file:
        file.copy("ep_0000/right_thumb_cam", file["ep_0000"], "another_cam")
        replace(file["ep_0000/right_leapv1"], np.zeros((8, 5)))
    source = open_source(path, dataclasses.replace(load_config("dexwild"), views=None))
    assert "another_cam" not in source.view_names
    assert [n.text for n in source.notes()] == ["camera 'another_cam' is in 1 of 3 episodes looked at and not used"]
    assert [source.load(n).length for n in (1, 2)] == [open_source(path).length_of(n) for n in (1, 2)]


def test_a_huge_dataset_in_the_place_of_a_group_costs_that_episode(tmp_path: Path) -> None:
    """Looking for a member by name would read each of its rows."""
    path = write_dexwild(tmp_path, (4, 3, 3))
    with h5py.File(path, "r+") as file:
        del file["ep_0000"]
        file.create_dataset("ep_0000", (10**9, 8), np.uint8, chunks=(1, 8))
    source = open_source(path)
    lost, *others = (source.attempt(source.load, number) for number in source.episode_ids)
    assert isinstance(lost, Failed) and "is a dataset, not a group" in lost.reason
    assert [each.length for each in others] == [3, 3]
