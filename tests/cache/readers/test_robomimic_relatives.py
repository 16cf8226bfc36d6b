"""What robomimic's relatives do differently: names of demos, places of texts, success marks, actions, locks."""

from __future__ import annotations

import fcntl
import json
import shutil

import h5py
import numpy as np
import pytest

from dvla.cache.readers import open_source
from dvla.cache.readers.episode import CorruptEpisode
from dvla.errors import UserError
from support.hdf5_samples import CAN, LENGTHS, edit, exchange, write_robomimic


@pytest.fixture
def demos(tmp_path):
    return write_robomimic(tmp_path / "can" / "image.hdf5")


def rename(*names):
    """A change that gives the three demos other names."""

    def change(file):
        for old, new in zip(("demo_0", "demo_2", "demo_10"), names):
            file["data"].move(old, f"t_{old}")
            file["data"].move(f"t_{old}", new)

    return change


def attributes(path, values):
    return lambda f: f[path].attrs.update(values)


# --- demos -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (("demo0", "demo2", "demo10"), (0, 2, 10)),
        (("episode_7", "episode_8", "episode_9"), (7, 8, 9)),
        (("000012", "000013", "000014"), (12, 13, 14)),
        (("b_1", "b_2", "c_1"), (0, 1, 2)),  # one number twice: places in the natural order
        (("a_1", "a_2_1", "a_10_1"), (0, 1, 2)),
    ],
)
def test_demos_under_other_names(demos, names, ids):
    before = [open_source(demos, CAN).load(i).source_hash for i in (0, 2, 10)]
    edit(demos, rename(*names))
    source = open_source(demos)  # found by its content, and by env_name
    assert source.episode_ids == ids
    loaded = [source.load(i).source_hash for i in ids]
    assert loaded == before


def test_other_members_of_data_are_no_demos(demos):
    before = open_source(demos, CAN).load(2).source_hash
    edit(demos, lambda f: (f["data"].create_group("metadata"), f["data"].create_dataset("version_2", data=1)))
    source = open_source(demos)
    assert source.episode_ids == (0, 2, 10) and source.load(2).source_hash == before


def test_an_odd_first_demo_does_not_speak_for_the_others(demos):
    """Neither its cameras nor its width; it alone is refused."""
    before = open_source(demos, CAN).load(2).source_hash
    edit(demos, lambda f: (f["data/demo_0/obs"].pop("agentview_image"), f["data"].copy("demo_2", "demo_11")))
    source = open_source(demos, CAN)
    assert source.view_names == ("agentview", "robot0_eye_in_hand") and source.load(2).source_hash == before
    with pytest.raises(CorruptEpisode, match="agentview_image' is missing"):
        source.load(0)
    edit(demos, exchange("data/demo_0/actions", np.zeros((LENGTHS[0], 14))))
    source = open_source(demos, CAN)
    assert source.load(2).source_hash == before
    with pytest.raises(CorruptEpisode, match="its action has 14 dimensions"):
        source.table(0)


@pytest.mark.parametrize("dtype", [">f8", "<f2", "<f4", ">f4"])
def test_numbers_of_any_type(demos, dtype):
    edit(demos, lambda f: exchange("data/demo_2/actions", f["data/demo_2/actions"][()].astype(dtype))(f))
    with h5py.File(demos) as file:
        expected = file["data/demo_2/actions"][()].astype(np.float32)
    assert np.array_equal(open_source(demos, CAN).load(2).action, expected)


# --- texts -----------------------------------------------------------------------------------------------------------

SAID = "put the can in the bin"
PLACES = {  # name: (change, text_from)
    "demo": (attributes("data/demo_2", {"task_description": SAID}), "attribute task_description of each demo"),
    "demo, bytes": (attributes("data/demo_2", {"language": np.bytes_(SAID)}), "attribute language of each demo"),
    "data": (attributes("data", {"instruction": SAID}), "attribute instruction of data"),
    "file": (attributes("/", {"language_instruction": SAID}), "attribute language_instruction of the file"),
    "vague": (attributes("data", {"task": SAID}), "attribute task of data"),
    "env_args": (
        lambda f: attributes(
            "data", {"env_args": json.dumps({**json.loads(f["data"].attrs["env_args"]), "lang": SAID})}
        )(f),
        "attribute env_args of data",
    ),
    "bddl": (
        attributes("data", {"bddl_file_content": f"(define (problem X)\n (:language {SAID} )\n)"}),
        "attribute bddl_file_content of data",
    ),
    "dataset": (lambda f: f.__setitem__("data/demo_2/language", SAID), "language in each demo"),
    "rows": (
        lambda f: f.__setitem__("data/demo_2/obs/lang", np.array([SAID.encode()] * LENGTHS[1])),
        "lang in each demo",
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_texts_wherever_they_are(demos, name):
    change, place = PLACES[name]
    edit(demos, change)
    edit(demos, lambda f: (f["data"].pop("demo_0"), f["data"].pop("demo_10")))
    source = open_source(demos, CAN)
    assert source.instruction_of(2) == source.load(2).instruction == SAID
    assert source.text_from == place


def test_what_is_no_text_is_none(demos):
    """A label, a number, an embedding; the nearest and most telling text wins."""
    edit(demos, attributes("data", {"task": "PickPlaceCan", "language": 7}))
    edit(demos, lambda f: f.__setitem__("data/demo_2/language", np.zeros((LENGTHS[1], 8))))
    source = open_source(demos, CAN)
    assert (source.instruction_of(2), source.text_from) == ("", "")
    edit(demos, attributes("data", {"task": "some task of ours", "lang": "lift it"}))
    edit(demos, attributes("data/demo_0", {"task": "the nearest text"}))
    source = open_source(demos, CAN)
    assert (source.instruction_of(2), source.instruction_of(0)) == ("lift it", "the nearest text")


def test_text_that_is_not_utf8_costs_its_demo(demos):
    edit(demos, attributes("data/demo_2", {"language": np.bytes_(b"caf\xe9 cup")}))
    source = open_source(demos, CAN)
    with pytest.raises(CorruptEpisode, match="attribute language is not UTF-8 text"):
        source.load(2)
    assert source.load(0).length == LENGTHS[0]


# --- success ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (attributes("data/demo_2", {"success": False}), (None, False)),
        (attributes("data/demo_2", {"is_success": "True"}), (None, True)),
        (lambda f: f.__setitem__("data/demo_2/success", np.array([0, 0, 0, 0, 1])), (None, True)),
        (lambda f: f.__setitem__("data/demo_2/success", np.zeros(5, bool)), (None, False)),
        (
            lambda f: (f.__setitem__("data/demo_0/rewards", np.eye(7)[6]), f.__setitem__("data/demo_2/rewards", [0.0])),
            (True, False),
        ),
        (lambda f: f.__setitem__("data/demo_2/rewards", np.zeros(5)), (None, None)),  # no demo has a reward
        (lambda f: f.__setitem__("data/demo_2/rewards", np.linspace(0, 0.9, 5)), (None, None)),  # shaped
    ],
)
def test_success_by_the_files(demos, change, expected):
    edit(demos, change)
    source = open_source(demos, CAN)
    assert (source.success_of(0), source.success_of(2)) == expected


# --- actions that are no displacements -------------------------------------------------------------------------------


def absolute(number, length, roll):
    """Positions that follow the measured ones of `write_robomimic`, and an axis-angle rotation."""

    def change(file):
        place = np.linspace([0.1, 0.2, 0.9], [0.2, 0.1, 1.0], length)
        exchange(f"data/demo_{number}/obs/robot0_eef_pos", place)(file)
        exchange(f"data/demo_{number}/actions", np.c_[place + 0.01, np.tile([roll, 0, 0, 1.0], (length, 1))])(file)

    return change


@pytest.mark.parametrize("roll", [3.1, 0.0])
def test_absolute_poses_in_a_file_that_says_displacements(demos, roll):
    """Beyond the controller's range by the rotation, or by being where the hand was measured."""
    before = open_source(demos, CAN).load(10).source_hash
    edit(demos, absolute(2, LENGTHS[1], roll))
    source = open_source(demos, CAN)
    message = r"is 3.1 at frame 0, dimension 3; the controller takes -1 to 1" if roll else "at most 0.01 m from those"
    with pytest.raises(CorruptEpisode, match=message) as caught:
        source.load(2)
    assert len(str(caught.value)) < 220 and source.load(10).source_hash == before


def test_a_little_beyond_the_range_is_what_the_controller_clips(demos):
    edit(demos, lambda f: f["data/demo_2/actions"].__setitem__((3, 1), -1.2))
    assert open_source(demos, CAN).load(2).action[3, 1] == np.float32(-1.2)
    edit(demos, lambda f: f["data/demo_2/actions"].__setitem__((3, 1), -50))
    with pytest.raises(CorruptEpisode, match="its action is -50 at frame 3, dimension 1"):
        open_source(demos, CAN).load(2)


# --- files that cannot be opened -------------------------------------------------------------------------------------


def test_a_file_that_a_recorder_holds(demos):
    with open(demos, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # what HDF5 does while a file is open for writing
        for given in (demos, demos.parent):
            with pytest.raises(UserError, match="image.hdf5 is open in a program that may still write to it; close"):
                open_source(given)


def test_a_file_that_was_not_closed(tmp_path, demos):
    left = tmp_path / "left" / "image.hdf5"
    left.parent.mkdir()
    with h5py.File(tmp_path / "open.hdf5", "w", libver="latest") as file:
        file["x"] = 1
        file.flush()
        shutil.copy(tmp_path / "open.hdf5", left)
    with pytest.raises(UserError, match="was not closed by the program that wrote it; .*h5clear -s"):
        open_source(left)
    demos.write_bytes(demos.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"it is cut short \(\d+ of \d+ bytes\); copy it again"):
        open_source(demos)


def test_a_shape_that_lies_takes_no_memory(demos):
    """Only the demo whose header was damaged is lost."""
    data = bytearray(demos.read_bytes())
    needle = np.array([LENGTHS[1], 7], "<u8").tobytes()  # a shape in an object's header
    at, found = data.find(needle), 0
    while at >= 0:
        data[at : at + 8] = np.array([2**33], "<u8").tobytes()
        at, found = data.find(needle, at + 8), found + 1
    demos.write_bytes(data)
    assert found
    source = open_source(demos, CAN)
    with pytest.raises(CorruptEpisode, match="'actions' cannot be read"):
        source.load(2)
    assert source.load(0).length == LENGTHS[0]
