"""RLDS datasets as people write them: compressed shards, texts in many places, tensors for images, parts missing."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tracemalloc
import zlib

import numpy as np
import pytest

from dvla.cache.readers import open_source
from dvla.cache.readers.episode import CorruptEpisode
from dvla.cache.readers.rlds.tfrecord import index_records, read_record
from dvla.errors import UserError
from support.rlds_samples import (
    EPISODES,
    TOY_FEATURES,
    frame,
    hashes,
    leaf,
    picture,
    shard,
    toy_config,
    write_toy,
)

# --- compressed shards -----------------------------------------------------------------------------------------------


def halves(data):
    """gzip allows one stream after another."""
    return gzip.compress(data[:1000]) + gzip.compress(data[1000:]) + bytes(7)


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress, halves])
def test_compressed_shards_are_read(toy, tmp_path, pack):
    packed = write_toy(tmp_path, pack=pack)
    assert hashes(open_source(packed, toy_config())) == hashes(open_source(toy, toy_config()))


def test_compressed_under_another_name(toy, tmp_path):
    packed = write_toy(tmp_path, pack=gzip.compress)
    for path in packed.glob("*.tfrecord*"):
        path.rename(f"{path}.gz")
    assert hashes(open_source(packed, toy_config())) == hashes(open_source(toy, toy_config()))


@pytest.mark.parametrize(
    ("pack", "message"),
    [
        (bz2.compress, "it is compressed with bzip2, which is not read; decompress it"),
        (lzma.compress, "compressed with xz"),
        (lambda data: b"\x28\xb5\x2f\xfd" + data, "compressed with zstd"),
        (lambda data: gzip.compress(data)[:-30], "the compressed file is cut short"),
        (lambda data: gzip.compress(data[:-30]), "the file is cut short: record [12] claims"),
    ],
)
def test_other_compressions_and_damage_are_named(tmp_path, pack, message):
    found = hashes(open_source(write_toy(tmp_path, pack=pack), toy_config()))
    with pytest.raises(CorruptEpisode, match=message):
        raise found[EPISODES - 1]


def test_compressed_records_in_any_order_and_little_memory(tmp_path):
    """Many more unpacked bytes than may be held at once; every record is found again, from places on the way."""
    records = [bytes([n]) * (n % 7 * 1_000_000 + 5) for n in range(40)]
    path = tmp_path / "x.tfrecord.gz"
    path.write_bytes(gzip.compress(b"".join(map(frame, records)), 1))
    tracemalloc.start()
    try:
        assert len(index_records(path, "x")) == 40
        for number in (39, 3, 20, 0, 19, 38):
            assert read_record(path, number, "x") == records[number]
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()


# --- task texts ------------------------------------------------------------------------------------------------------

SAID = "put the pot on the towel"


def without_text(features):
    for name in [n for n in features if n.endswith("language_instruction")]:
        del features[name]
    return len(features["steps/action/grip"])


def saying(path, per_step=None):
    """A change that puts the text into `path`, once or for each of the T steps."""

    def change(features):
        length = without_text(features)
        features[path] = per_step(length) if per_step else [SAID.encode()]

    return change


def every(length):
    return [SAID.encode()] * length


def codes(length):
    return np.tile(np.frombuffer(SAID.encode().ljust(64, b"\0"), np.uint8).astype(np.int64), length)


STEP = {k: v for k, v in TOY_FEATURES.items() if k != "language_instruction"}
TEXTS = {  # path: (features of a step, of the episode, change)
    "episode_metadata/language_instruction": (STEP, {"language_instruction": leaf("text")}, saying),
    "episode_metadata/task": (STEP, {"task": leaf("text")}, saying),
    "steps/instruction": ({**STEP, "instruction": leaf("text")}, {}, lambda p: saying(p, every)),
    "steps/observation/task_description": (
        {**STEP, "observation": {**STEP["observation"], "task_description": leaf("text")}},
        {},
        lambda p: saying(p, every),
    ),
    "steps/annotation/human/lang": (
        {**STEP, "annotation": {"human": {"lang": leaf("text")}}},
        {},
        lambda p: saying(p, every),
    ),
    "steps/language_instruction": (
        {**STEP, "language_instruction": leaf("tensor", 3, dtype="string")},
        {},
        lambda p: saying(p, lambda n: [b"", SAID.encode(), b"another way to say it"] * n),
    ),
    "steps/observation/instruction": (
        {**STEP, "observation": {**STEP["observation"], "instruction": leaf("tensor", 64, dtype="int32")}},
        {},
        lambda p: saying(p, codes),
    ),
}


@pytest.mark.parametrize("path", TEXTS)
def test_texts_wherever_they_are(tmp_path, path):
    features, metadata, change = TEXTS[path]
    folder = write_toy(tmp_path, features=features, metadata=metadata, change=change(path))
    source = open_source(folder, toy_config())
    assert source.load(0).instruction == source.instruction_of(1) == SAID
    assert source.text_from == path


def test_the_next_text_where_the_preferred_is_empty(tmp_path):
    """DROID: up to three texts of an episode, any of which may be empty."""

    def change(features):
        length = len(features["steps/action/grip"])
        features["steps/language_instruction"] = [b""] * length
        features["steps/language_instruction_2"] = every(length)

    features = {**TOY_FEATURES, "language_instruction_2": leaf("text")}
    source = open_source(write_toy(tmp_path, features=features, change=change), toy_config())
    assert source.load(0).instruction == SAID
    assert source.text_from == "steps/language_instruction, else steps/language_instruction_2"


def test_what_is_no_text_is_none(tmp_path):
    """An embedding under a text's name, a label under a vague one."""
    features = {**STEP, "language": leaf("tensor", 8), "task": leaf("text")}

    def change(features):
        length = without_text(features)
        features |= {"steps/language": np.ones(8 * length, np.float32), "steps/task": [b"pot"] * length}

    source = open_source(write_toy(tmp_path, features=features, change=change), toy_config())
    assert source.load(0).instruction == ""


# --- success and ends ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "stored", "expected"),
    [
        ({"success": leaf("tensor", dtype="bool")}, np.array([0]), False),
        ({"success": leaf("tensor", dtype="bool")}, np.array([1]), True),
        ({"file_path": leaf("text")}, [b"/data/r2d2/ILIAD/success/2023-05-07/trajectory.h5"], True),
        ({"file_path": leaf("text")}, [b"/data/r2d2/ILIAD/failure/2023-05-07/trajectory.h5"], False),
        ({"file_path": leaf("text")}, [b"/data/success_stories/trajectory.h5"], None),
    ],
)
def test_success_by_the_record(tmp_path, metadata, stored, expected):
    folder = write_toy(
        tmp_path, metadata=metadata, change=lambda f: f.update({f"episode_metadata/{next(iter(metadata))}": stored})
    )
    assert open_source(folder, toy_config()).success_of(3) is expected


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("is_first", [1, 0, 1, 0, 0], "is_first marks step 2 of 5: it is not one episode"),
        ("is_first", [1, 0, 0, 0], "4 flags of 'is_first' for 5 rows"),
        ("is_last", [0, 1, 0, 0, 1], "is_last marks step 1 of 5"),
        ("is_last", [0, 0, 0, 1, 1], ""),  # the end repeated
        ("is_last", [0, 0, 0, 0, 0], ""),
    ],
)
def test_ends_inside_a_record(tmp_path, name, flags, message):
    features = {**TOY_FEATURES, "is_last": leaf("tensor", dtype="bool")}
    folder = write_toy(tmp_path, features=features, change={1: lambda f: f.update({f"steps/{name}": np.array(flags)})})
    source = open_source(folder, toy_config())
    if message:
        with pytest.raises(CorruptEpisode, match=message):
            source.load(1)
    else:
        assert source.load(1).length == 5
    assert source.load(0).length == 4


# --- images as tensors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["none", "zlib"])
@pytest.mark.parametrize("first", [False, True])
def test_images_as_tensors(tmp_path, encoding, first):
    shape = (3, 16, 20) if first else (16, 20, 3)
    seen = {k: v for k, v in TOY_FEATURES["observation"].items() if k not in ("front", "wrist")}
    raw = {"cam": leaf("tensor", *shape, dtype="uint8", encoding=encoding)}
    mask = {"cam_mask": leaf("tensor", *shape, dtype="uint8", encoding="none")}
    images = np.stack([picture(1, t, 16, 20) for t in range(5)])

    def change(features):
        length = len(features["steps/action/grip"])
        stored = images[:length].transpose(0, 3, 1, 2) if first else images[:length]
        packed = [zlib.compress(image.tobytes()) for image in stored]
        features["steps/observation/cam"] = packed if encoding == "zlib" else stored.astype(np.int64)
        features["steps/observation/cam_mask"] = np.zeros(stored.size, np.int64)

    features = {**TOY_FEATURES, "observation": {**seen, **raw, **mask}}
    source = open_source(write_toy(tmp_path, features=features, change=change), toy_config())
    assert source.view_names == ("cam",)
    (view,) = source.load(0).views
    assert np.array_equal(np.stack(list(view.frames(1, 3))), images[1:3])


# --- parts missing ---------------------------------------------------------------------------------------------------


def test_missing_shards_are_counted(toy_copy):
    shard(toy_copy).unlink()
    shard(toy_copy, "val").unlink()
    source = open_source(toy_copy, toy_config())
    with pytest.raises(CorruptEpisode, match="shard toy-train.*00000-of-00002 is missing; 1 of 3 shards are present"):
        source.load(0)
    assert source.load(3).length == 4
    shard(toy_copy).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (note,) = open_source(toy_copy, toy_config()).notes()
    assert note.rule == "partly-present" and note.text.startswith("2 of 7 episodes present: 1 of 3 shards; fetch the")
    with pytest.raises(CorruptEpisode, match="is a Git LFS pointer"):
        source.load(0)


def test_records_that_are_not_there_are_named(toy_copy):
    path = shard(toy_copy)
    first, second = index_records(path, "t").offsets[:2].tolist()
    path.write_bytes(path.read_bytes()[second:])
    source = open_source(toy_copy, toy_config())
    (note,) = source.table(0).notes
    assert first == 0 and note.rule == "records-missing" and "holds 2 records, dataset_info.json lists 3" in note.text
    assert not source.table(3).notes
    with pytest.raises(CorruptEpisode, match="record 2 of .* ends after 2 records"):
        source.table(2)


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json"])
def test_a_description_without_its_other_half(toy_copy, name):
    (toy_copy / name).unlink()
    for given in (toy_copy, toy_copy.parent):
        with pytest.raises(UserError, match=f"no RLDS dataset that can be read: {name} is missing beside"):
            open_source(given)
