"""Damaged RLDS files: each episode that is hit is refused in one line, and no other is lost."""

import json
import random
import tracemalloc
import zlib

import numpy as np
import pytest

from dvla.cache.readers import open_source
from dvla.cache.readers.episode import CorruptEpisode
from dvla.cache.readers.rlds.tfrecord import index_records, read_record
from dvla.errors import UserError
from support.rlds_samples import encoded, frame, hashes, shard, toy_config, toy_record, write_toy

# --- descriptions ---------------------------------------------------------------------------------------------------


def describe(**changes):
    def change(folder):
        info = json.loads((folder / "dataset_info.json").read_text())
        split = {k: v for k, v in changes.items() if k in ("filepathTemplate", "shardLengths", "name")}
        info["splits"][0] |= split
        info |= {k: v for k, v in changes.items() if k not in split}
        (folder / "dataset_info.json").write_text(json.dumps(info))

    return change


def spoil(name, text):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (describe(fileFormat="array_record"), "'array_record' files, only tfrecord"),
        (describe(filepathTemplate="../{SHARD_X_OF_Y}"), "leaves the folder"),
        (describe(filepathTemplate="/etc/{SHARD_INDEX}"), "leaves the folder"),
        (describe(filepathTemplate="x" * 70000), "x…' is no name of a file"),
        (describe(filepathTemplate="{FOO}-{SPLIT}"), "'FOO' is not known"),
        (describe(shardLengths=["-1"]), "-1 records"),
        (describe(shardLengths=["99999999999999"]), "99999999999999 records"),
        (describe(shardLengths=["1000000", "0"]), "1,000,000 records in [0-9,]+ bytes"),
        (describe(shardLengths=["0"] * 200_000), "200,000 shards"),
        (describe(shardLengths=["many"]), "'many'"),
        (describe(shardLengths=None), "splits cannot be read"),
        (describe(name=7), "splits cannot be read"),
        (describe(splits=5), "splits cannot be read"),
        (spoil("dataset_info.json", "{"), "dataset_info.json is not valid JSON"),
        (spoil("dataset_info.json", "[]"), r"it is \[\], expected"),
        (spoil("features.json", "\ufffe"), "features.json is not valid JSON"),
        (spoil("features.json", "[" * 100_000), "features.json is not valid JSON: it is nested too deeply"),
        (spoil("features.json", '{"featuresDict": {"features": {}}}'), "no episodes"),
        (
            spoil("features.json", '{"type": "tensorflow_datasets.core.features.FeaturesDict", "content": {}}'),
            "no episodes",
        ),
        (lambda folder: (folder / "features.json").unlink(), "holds no RLDS dataset"),
    ],
)
def test_a_description_that_cannot_be_used_is_one_line(toy_copy, change, message):
    change(toy_copy)
    with pytest.raises(UserError, match=message) as error:
        open_source(toy_copy, toy_config())
    assert "\n" not in str(error.value)


# --- files ----------------------------------------------------------------------------------------------------------


def rewritten(path, change):
    path.write_bytes(change(path.read_bytes()))


def offsets(path):
    return index_records(path, "t").offsets.tolist()


def flip(path, position):
    rewritten(path, lambda d: d[:position] + bytes([d[position] ^ 16]) + d[position + 1 :])


def second(folder, what):
    """Byte of record 1 of the first shard: its length, the length's checksum, its data, the data's checksum."""
    start, stop = offsets(shard(folder))[1:3]
    return {"length": start + 1, "length checksum": start + 9, "data": (start + stop) // 2, "data checksum": stop - 2}[
        what
    ]


def bogus_length(folder):
    """Record 1 claims 2⁶² bytes, with a checksum that fits."""
    start = offsets(shard(folder))[1]
    rewritten(shard(folder), lambda d: d[:start] + frame(b"", length=2**62)[:12] + d[start + 12 :])


@pytest.mark.parametrize(
    ("damage", "refused", "message"),
    [
        (lambda f: shard(f, number=1).unlink(), {3, 4}, "shard toy-train.tfrecord-00001-of-00002 is missing"),
        (lambda f: rewritten(shard(f), lambda d: d[: offsets(shard(f))[1] + 40]), {1, 2}, "cut short: record 1 claims"),
        (
            lambda f: rewritten(shard(f), lambda d: d[: offsets(shard(f))[2] + 5]),
            {2},
            "cut short in the header of record 2",
        ),
        (
            lambda f: rewritten(shard(f), lambda d: d[: offsets(shard(f))[2]]),
            {2},
            "record 2 of .* ends after 2 records",
        ),
        (lambda f: rewritten(shard(f), lambda d: b""), {0, 1, 2}, "ends after 0 records"),
        (
            lambda f: rewritten(shard(f), lambda d: bytes(len(d))),
            {0, 1, 2},
            "length of record 0, at byte 0, is damaged",
        ),
        (
            lambda f: rewritten(shard(f), lambda d: d + frame(toy_record(0))),
            {0, 1, 2},
            "holds 4 records, dataset_info.json lists 3",
        ),
        (
            lambda f: flip(shard(f), second(f, "data")),
            {1},
            "record 1 of .*-00000-of-00002 is damaged: its checksum does not match",
        ),
        (lambda f: flip(shard(f), second(f, "data checksum")), {1}, "is damaged: its checksum does not match"),
        (lambda f: flip(shard(f), second(f, "length")), {1, 2}, "length of record 1, at byte .* is damaged"),
        (lambda f: flip(shard(f), second(f, "length checksum")), {1, 2}, "length of record 1, at byte .* is damaged"),
        (bogus_length, {1, 2}, "record 1 claims 4611686018427387904 bytes"),
        (
            lambda f: rewritten(shard(f, "val"), lambda d: frame(b"\xff\xff") + frame(toy_record(6))),
            {5},
            "not a tf.train.Example",
        ),
        (lambda f: (shard(f, "val").unlink(), shard(f, "val").mkdir()), {5, 6}, "shard toy-val.* is missing"),
    ],
)
def test_damaged_files_lose_only_what_is_damaged(toy, toy_copy, damage, refused, message):
    whole = hashes(open_source(toy, toy_config()))
    source = open_source(toy_copy, toy_config())  # opened before: a file that changes later is noticed too
    assert hashes(source) == whole
    damage(toy_copy)
    for found in (hashes(source), hashes(open_source(toy_copy, toy_config()))):
        assert {n for n, v in found.items() if isinstance(v, CorruptEpisode)} == refused
        assert all(found[n] == whole[n] for n in set(found) - refused)
        for number in refused:
            with pytest.raises(CorruptEpisode):
                source.length_of(number)
        with pytest.raises(CorruptEpisode, match=message):
            raise found[min(refused)]


# --- records --------------------------------------------------------------------------------------------------------


def replace(name, values):
    return lambda f: f.update({f"steps/{name}": values})


def edited(name, edit):
    return lambda f: edit(f[f"steps/{name}"])


def small(dtype):
    return encoded(np.ones((5, 6), dtype), "png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("steps/action/move"), "feature 'steps/action/move' is missing"),
        (lambda f: f.pop("steps/observation/wrist"), "feature 'steps/observation/wrist' is missing"),
        (
            replace("action/move", np.zeros(11, np.float32)),
            "'action/move' has 11 numbers, which is no multiple of the 3",
        ),
        (replace("action/move", np.zeros(12, np.float32)), "columns differ in length .action/move 4, action/grip 5"),
        (
            replace("action/move", np.zeros(15, np.int64)),
            "'steps/action/move' is a int64_list, float_list was expected",
        ),
        (
            edited("action/move", lambda v: v.__setitem__((3, 1), np.nan)),
            "'action/move' is nan at frame 3, dimension 1",
        ),
        (replace("observation/pose", np.zeros(16, np.float32)), "columns differ in length"),
        (
            edited("observation/packed", lambda v: v.__setitem__(2, b"no")),
            "step 2 of 'observation/packed' cannot be decompressed",
        ),
        (edited("observation/packed", lambda v: v.__setitem__(2, v[2][:-9])), "is not the 24 bytes of float64"),
        (edited("observation/wrist", list.pop), "4 images of 'wrist' for 5 rows"),
        (edited("observation/wrist", lambda v: v.__setitem__(0, b"GIF")), "image 0 of 'wrist' is not an image"),
        (
            edited("observation/wrist", lambda v: v.__setitem__(3, v[3][: len(v[3]) // 2])),
            "image 3 of 'wrist' cannot be decoded",
        ),
        (edited("observation/front", lambda v: v.__setitem__(2, small(np.uint8))), "is 6x5, the first is 32x24"),
        (edited("observation/wrist", lambda v: v.__setitem__(0, small(np.uint16))), "not an 8-bit image"),
        (edited("language_instruction", list.pop), "4 texts of 'language_instruction' for 5 rows"),
        (edited("language_instruction", lambda v: v.__setitem__(1, b"\xff")), "not UTF-8"),
        (lambda f: [f.update({k: [] if isinstance(v, list) else v[:0]}) for k, v in f.items()], "it has no rows"),
    ],
)
def test_a_record_that_contradicts_its_description(tmp_path, change, message):
    found = hashes(open_source(write_toy(tmp_path, change={1: change}), toy_config()))
    assert [n for n, v in found.items() if isinstance(v, CorruptEpisode)] == [1]
    with pytest.raises(CorruptEpisode, match=message):
        raise found[1]


def test_any_flipped_byte_is_noticed(toy, toy_copy):
    """Each damaged episode is refused by name; no other is touched, except those behind a length that is lost."""
    path, rng = shard(toy_copy), random.Random(0)
    data, starts = path.read_bytes(), offsets(path)
    whole = {n: open_source(toy, toy_config()).table(n) for n in range(3)}
    source = open_source(toy_copy, toy_config())
    for position in (*range(12), *range(starts[1] - 4, starts[1] + 13), *rng.sample(range(len(data)), 60)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1 << rng.randrange(8)]) + data[position + 1 :])
        record = sum(position >= s for s in starts[1:])
        in_length = position - starts[record] < 12
        for number in range(3):
            if number == record or (in_length and number > record):
                with pytest.raises(CorruptEpisode, match=f"toy episode {number}: record {number} "):
                    source.table(number)
            else:
                np.testing.assert_array_equal(source.table(number).action, whole[number].action)


def test_a_bogus_length_takes_no_memory(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(frame(b"data") + frame(b"", length=2**40))
    tracemalloc.start()
    assert read_record(path, 0, "t") == b"data"
    with pytest.raises(
        CorruptEpisode, match="t: record 1 of x cannot be found: .* record 1 claims 1099511627776 bytes, 0 are"
    ):
        read_record(path, 1, "t")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_packed_bomb_takes_no_memory(tmp_path):
    bomb = zlib.compress(bytes(200 << 20))
    change = {1: edited("observation/packed", lambda v: v.__setitem__(0, bomb))}
    source = open_source(write_toy(tmp_path, change=change), toy_config())
    tracemalloc.start()
    with pytest.raises(CorruptEpisode, match="step 0 of 'observation/packed' is not the 24 bytes"):
        source.table(1)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def black(start=0, flag=0):
    """Black images from frame `start` on; the flag that says whether the camera was there, None for no flag."""

    def change(features):
        pictures = features["steps/observation/wrist"]
        pictures[start:] = [encoded(np.zeros((16, 20, 3), np.uint8), "png")] * (len(pictures) - start)
        if flag is not None:
            features["episode_metadata/has_wrist"] = np.array([flag])

    return change


def test_a_camera_that_was_not_there_is_refused(tmp_path):
    """False flag and one color: refused. False flag and real images, or black images without a false flag: kept."""
    change = {1: black(), 2: black(start=99), 3: black(flag=None), 4: black(start=3), 5: black(flag=1)}
    folder = write_toy(tmp_path, change=change)
    found = hashes(open_source(folder, toy_config()))
    assert [n for n, v in found.items() if isinstance(v, CorruptEpisode)] == [1, 4]
    with pytest.raises(
        CorruptEpisode, match="view 'wrist' was not recorded .*has_wrist is false, image 3 is one color"
    ):
        raise found[4]
    source = open_source(folder, toy_config(views=("front",)))
    assert not [v for v in hashes(source).values() if isinstance(v, CorruptEpisode)]
