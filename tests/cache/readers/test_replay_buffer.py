"""Diffusion Policy's replay buffers: rows, images and ids of Zarr v2 and v3; damage gives one clear line."""

import json
import shutil
import zipfile

import numpy as np
import pytest

from dvla.cache.actions.action_map import FieldSpec
from dvla.cache.readers import open_source
from dvla.cache.readers.config import DatasetConfig
from dvla.cache.readers.episode import CorruptEpisode
from dvla.cache.readers.replay_buffer import ReplayBufferSource, store
from dvla.cache.readers.search import load_config
from dvla.errors import UserError
from dvla.stages.data.export import export
from support.hdf5_samples import LENGTHS, frames, pictures, same_unified, serve, values, write_replay_buffer

zarr = pytest.importorskip("zarr")
ROWS = sum(LENGTHS)
ENDS = np.cumsum(LENGTHS).tolist()
CHUNK = 4
IMAGES = np.concatenate([pictures(e, n) for e, n in enumerate(LENGTHS)])  # uint8 [N, H, W, 3]
PUSHT = load_config("pusht")
PLAIN = DatasetConfig(
    name="plain",
    match=(),
    format="replay_buffer",
    embodiment="gripper_eef",
    state=(),
    control_hz=10.0,
    action=(FieldSpec(fields=("eef_pos_x", "eef_pos_y")),),
    action_columns=("action",),
)


@pytest.fixture(params=[2, 3], ids=["v2", "v3"])
def version(request):
    return request.param


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return {v: write_replay_buffer(tmp_path_factory.mktemp("zarr") / "x.zarr", zarr_format=v) for v in (2, 3)}


@pytest.fixture
def pusht(written, tmp_path, version):
    """A copy that the test may damage."""
    return shutil.copytree(written[version], tmp_path / "pusht_tiny.zarr")


def chunk_file(root, version, array, row_chunk, dims):
    at = [str(row_chunk)] + ["0"] * (dims - 1)
    return root / "data" / array / (".".join(at) if version == 2 else "c/" + "/".join(at))


def edit_metadata(root, version, array, change):
    path = root / array / (".zarray" if version == 2 else "zarr.json")
    about = json.loads(path.read_text())
    change(about)
    path.write_text(json.dumps(about))


def zipped(root, path, folder="", method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as file:
        for part in sorted(root.rglob("*")):
            if part.is_file():
                file.write(part, folder + part.relative_to(root).as_posix())
    return path


# --- what is read ----------------------------------------------------------------------------------------------------


def check_pusht(source):
    assert isinstance(source, ReplayBufferSource) and source.config.name == "pusht"
    assert source.episode_ids == (0, 1, 2) and source.view_names == ("img",) and source.control_hz == 10
    action, state = values(0, ROWS, 2) * 512, values(1, ROWS, 5) * 512
    for number, stop in enumerate(ENDS):
        start, episode = stop - LENGTHS[number], source.load(number)
        assert episode.length == source.length_of(number) == LENGTHS[number]
        assert (
            episode.instruction == source.instruction_of(number) == "Push the T-shaped block onto the T-shaped target."
        )
        assert np.array_equal(episode.action, action[start:stop]) and np.array_equal(episode.state, state[start:stop])
        assert np.array_equal(frames(episode.views[0]), pictures(number, LENGTHS[number]))
        assert np.array_equal(frames(episode.views[0], 2, 5), pictures(number, LENGTHS[number])[2:5])
        unified = source.action_map.to_unified(episode.action)
        assert np.allclose(unified[:, 30:32], episode.action / 1000) and not unified[:, 32:].any()
        assert np.abs(source.action_map.to_native(unified) - episode.action).max() <= 1e-6 * 512


def test_pusht(pusht):
    check_pusht(open_source(pusht))


@pytest.mark.parametrize("folder", ["", "pusht/pusht.zarr/"])
def test_zip(pusht, tmp_path, folder):
    path = zipped(pusht, tmp_path / "pusht.zarr.zip", folder, zipfile.ZIP_DEFLATED if folder else zipfile.ZIP_STORED)
    source = open_source(path)
    check_pusht(source)
    assert source.revision_hash == open_source(pusht, PUSHT).revision_hash
    assert [source.load(n).source_hash for n in range(3)] == [
        open_source(pusht, PUSHT).load(n).source_hash for n in range(3)
    ]


@pytest.mark.parametrize(
    "pixels",
    [
        IMAGES,
        IMAGES.astype(np.float64),
        (IMAGES / 255).astype(np.float32),
        (IMAGES / 255).astype(np.float16),
        np.moveaxis(IMAGES, 3, 1),
        np.moveaxis(IMAGES, 3, 1) / 255,
    ],
    ids=["uint8", "float 255", "float 1", "half 1", "colours first", "colours first, float 1"],
)
def test_ways_to_store_pictures(tmp_path, version, pixels):
    source = open_source(write_replay_buffer(tmp_path / "x.zarr", zarr_format=version, pixels=pixels), PLAIN)
    for number, length in enumerate(LENGTHS):
        view = source.load(number).views[0]
        assert (view.height, view.width, view.length) == (6, 8, length)
        assert np.array_equal(frames(view), pictures(number, length))


def test_only_the_chunks_of_an_episode_are_read(pusht, version):
    """Episode 0 has rows 0..6 and so chunks 0 and 1."""
    kept = [open_source(pusht, PUSHT).load(0).source_hash, open_source(pusht, PUSHT).load(2).source_hash]
    for array, dims in (("img", 4), ("action", 2), ("state", 2)):
        chunk_file(pusht, version, array, 2, dims).write_bytes(b"")  # rows 8..11: all of them are episode 1's
    shutil.rmtree(pusht / "data" / "keypoint")  # not used
    source = open_source(pusht, PUSHT)
    assert [source.load(0).source_hash, source.load(2).source_hash] == kept
    with pytest.raises(CorruptEpisode, match="pusht_tiny.zarr episode 1: rows 7 to 11|data/action/2.0 has 0"):
        source.load(1)


def test_export_of_a_replay_buffer(pusht, tmp_path):
    export(open_source(pusht, PUSHT), tmp_path / "out")
    same_unified(open_source(pusht, PUSHT), open_source(tmp_path / "out"))


@pytest.mark.parametrize("codec", ["zstd", "gzip", "blosc", None])
def test_codecs(tmp_path, codec):
    from numcodecs import Blosc, GZip, Zstd

    made = {"zstd": Zstd(), "gzip": GZip(), "blosc": Blosc("zstd", 5, Blosc.BITSHUFFLE), None: None}[codec]
    path = write_replay_buffer(tmp_path / "pusht.zarr")
    group = zarr.open_group(path, mode="a")
    data = group["data/img"][:]
    del group["data/img"]
    group.create_array("data/img", data=data, chunks=(5, 4, 8, 3), compressors=made)
    check_pusht(open_source(path, PUSHT))


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("array", ["action", "state", "img"])
@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_damaged_chunk(pusht, version, array, damage):
    """A chunk that was cut is never made up; the episodes without it are as before."""
    path = chunk_file(pusht, version, array, 2, 4 if array == "img" else 2)
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "garbage": b"\xf7" * len(data), "empty": b""}[damage])
    source = open_source(pusht, PUSHT)
    message = f"data/{array} cannot be decoded|bytes, its header says"
    with pytest.raises(CorruptEpisode, match=message) as caught:
        frames(source.load(1).views[0])
    assert str(caught.value).startswith("pusht_tiny.zarr episode 1: ") and "\n" not in str(caught.value)
    for number in (0, 2):
        assert len(frames(source.load(number).views[0])) == LENGTHS[number]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_action_that_is_no_number(pusht, value):
    zarr.open_array(pusht, path="data/action", mode="r+")[9, 1] = value
    with pytest.raises(CorruptEpisode, match="episode 1: column 'action' is (nan|inf) at frame 2, dimension 1"):
        open_source(pusht, PUSHT).load(1)


@pytest.mark.parametrize("value", [np.nan, -3.0, 256.0])
def test_picture_out_of_range(pusht, value):
    zarr.open_array(pusht, path="data/img", mode="r+")[9, 0, 0, 0] = value
    episode = open_source(pusht, PUSHT).load(1)
    with pytest.raises(CorruptEpisode, match="episode 1: data/img holds .* its images range to 255"):
        frames(episode.views[0])
    assert len(frames(open_source(pusht, PUSHT).load(0).views[0])) == LENGTHS[0]


def with_ends(path, ends):
    group = zarr.open_group(path, mode="a")
    del group["meta/episode_ends"]
    group.create_array("meta/episode_ends", data=np.asarray(ends, None if len(ends) else np.int64))


@pytest.mark.parametrize(
    "ends, refused, message",
    [
        ([7, 7, ROWS], {1}, "episode 1: it has no rows"),
        ([12, 7, ROWS], {1, 2}, "episode 1: meta/episode_ends goes from 12 to 7 here, and up to 12 before"),
        ([7, 12, ROWS + 1], {2}, f"episode 2: data/action has {ROWS} rows, by meta/episode_ends it is rows 12 to 22"),
        ([7, 999, ROWS], {1, 2}, f"episode 1: data/action has {ROWS} rows, .* rows 7 to 999"),
    ],
)
def test_an_end_that_cannot_be_costs_its_episode(pusht, ends, refused, message):
    before = open_source(pusht, PUSHT).load(0).source_hash
    with_ends(pusht, ends)
    source = open_source(pusht, PUSHT)
    for number in refused:
        for read in (source.length_of, source.table, source.load):
            with pytest.raises(CorruptEpisode, match=message if number == min(refused) else f"episode {number}: "):
                read(number)
    assert [n for n in source.episode_ids if n not in refused and source.load(n)] == sorted({0, 1, 2} - refused)
    assert ends[0] != 7 or source.load(0).source_hash == before


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.uint16, ">i8"])
@pytest.mark.parametrize("first", [(), (0,)])
def test_ends_of_another_type_or_with_a_leading_zero(pusht, dtype, first):
    before = [open_source(pusht, PUSHT).load(n).source_hash for n in range(3)]
    with_ends(pusht, np.array([*first, *ENDS], dtype))
    source = open_source(pusht, PUSHT)
    assert [source.load(n).source_hash for n in source.episode_ids] == before


@pytest.mark.parametrize(
    "ends, message",
    [
        ([], "expected the end of at least one episode"),
        ([[7, ROWS]], "expected the end of at least one"),
        ([7.5, ROWS], "is no row number at 0"),
        ([7.0, np.nan], "is no row number at 1"),
    ],
)
def test_ends_that_are_none(pusht, ends, message):
    with_ends(pusht, ends)
    with pytest.raises(UserError, match=message):
        open_source(pusht, PUSHT)


def test_arrays_of_different_length(pusht):
    group = zarr.open_group(pusht, mode="a")
    group["data/state"].resize((ROWS - 2, 5))
    source = open_source(pusht, PUSHT)
    assert source.load(1).length == LENGTHS[1]
    with pytest.raises(CorruptEpisode, match=f"data/state has {ROWS - 2} rows"):
        source.load(2)


def test_rows_behind_the_last_episode(pusht):
    """What a recording that was cut off leaves."""
    before = [open_source(pusht, PUSHT).load(n).source_hash for n in range(3)]
    with_ends(pusht, ENDS[:2])
    source = open_source(pusht, PUSHT)
    assert [source.load(n).source_hash for n in source.episode_ids] == before[:2]
    (note,) = source.notes()
    assert note.rule == "rows-left" and note.text.startswith("9 rows after the last episode, 12 to 20, belong to none")


# --- chunks without a file -------------------------------------------------------------------------------------------


def test_chunks_of_nothing_but_the_fill_value_are_data(pusht, version):
    """zarr-python 3 does not write them; that a copy lost them looks the same, so `check` names them."""
    for array, dims in (("img", 4), ("action", 2), ("state", 2)):
        chunk_file(pusht, version, array, 2, dims).unlink()  # rows 8..11: frames 1..4 of episode 1
    source = open_source(pusht, PUSHT)
    episode, table = source.load(1), source.table(1)
    seen = frames(episode.views[0])
    assert not episode.action[1:].any() and not episode.state[1:].any() and episode.action[0].all()
    assert not seen[1:].any() and np.array_equal(seen[0], pictures(1, 5)[0])
    notes = (*table.notes, *episode.views[0].notes)
    assert [n.rule for n in notes] == ["chunks-without-file"] * 3
    assert "1 chunks of data/img have no file" in notes[2].text and "read as 0.0" in notes[2].text
    assert not source.table(0).notes and not source.load(2).views[0].notes


def test_a_fill_value_that_is_no_number(pusht, version):
    edit_metadata(pusht, version, "data/action", lambda about: about.update(fill_value="NaN"))
    chunk_file(pusht, version, "action", 2, 2).unlink()
    with pytest.raises(CorruptEpisode, match="column 'action' is nan at frame 1"):
        open_source(pusht, PUSHT).load(1)


def test_a_chunk_without_a_fill_value_is_missing(tmp_path):
    path = write_replay_buffer(tmp_path / "pusht.zarr")
    edit_metadata(path, 2, "data/action", lambda about: about.update(fill_value=None))
    chunk_file(path, 2, "action", 2, 2).unlink()
    with pytest.raises(CorruptEpisode, match="data/action/2.0 is missing"):
        open_source(path, PUSHT).load(1)


def test_an_array_that_lost_every_chunk(pusht, version):
    for path in sorted((pusht / "data/action").rglob("*"), reverse=True):
        if path.name not in (".zarray", "zarr.json"):
            path.unlink() if path.is_file() else path.rmdir()
    with pytest.raises(UserError, match="data/action has no values, only its description; copy the whole folder again"):
        open_source(pusht, PUSHT)


# --- other arrays, other folders -------------------------------------------------------------------------------------


def test_arrays_that_are_not_used_need_not_be_understood(pusht, version):
    before = open_source(pusht, PUSHT).load(1).source_hash
    edit_metadata(
        pusht, version, "data/keypoint", lambda about: about.update({"dtype": "|O", "data_type": {"name": "struct"}})
    )
    assert open_source(pusht, PUSHT).load(1).source_hash == before


@pytest.mark.parametrize("inner", ["replay_buffer", "a/b"])
def test_a_group_inside_a_group(pusht, tmp_path, inner):
    before = open_source(pusht, PUSHT).load(1).source_hash
    outer = tmp_path / "outer.zarr"
    (outer / inner).parent.mkdir(parents=True)
    pusht.rename(outer / inner)
    (outer / ".zgroup").write_text('{"zarr_format": 2}')
    assert ReplayBufferSource.matches([inner, f"{inner}/meta", f"{inner}/meta/episode_ends"], outer)
    assert open_source(outer, PUSHT).load(1).source_hash == before


def test_a_text_in_the_attributes(pusht, version):
    zarr.open_group(pusht, mode="a").attrs["task_description"] = "push it to the left"
    source = open_source(pusht, PUSHT)
    assert source.load(0).instruction == source.instruction_of(0) == "push it to the left"
    assert source.text_from == "the group's attributes"


@pytest.mark.parametrize("codec", ["Zstd", "LZ4", "Blosc"])
def test_a_chunk_that_lies_takes_no_memory(tmp_path, codec):
    """Its header claims 2 GB, which a decoder would take before it looks at the rest."""
    import numcodecs

    path = write_replay_buffer(tmp_path / "pusht.zarr")
    group = zarr.open_group(path, mode="a")
    del group["data/action"]
    array = group.create_array(
        "data/action", shape=(ROWS, 2), chunks=(ROWS, 2), dtype="f4", compressors=getattr(numcodecs, codec)()
    )
    array[:] = values(0, ROWS, 2)
    assert len(open_source(path, PUSHT).load(1).action) == 5
    chunk = path / "data/action/0.0"
    data = bytearray(chunk.read_bytes())
    if codec == "Zstd":
        data[4] |= 0xC0  # eight bytes of size instead of one, which fall on what follows
    else:
        data[{"LZ4": 3, "Blosc": 7}[codec]] = 0x7F
    chunk.write_bytes(data)
    with pytest.raises(CorruptEpisode, match="data/action/0.0 unpacks to more than a chunk's 168 bytes"):
        open_source(path, PUSHT).load(1)


@pytest.mark.parametrize("codec", ["GZip", "Zlib", "BZ2", "LZMA"])
def test_a_chunk_that_unpacks_to_more_takes_no_memory(tmp_path, monkeypatch, codec):
    """Its format has no size in the header: it is unpacked piece by piece, up to what a chunk may be."""
    import numcodecs

    how = getattr(numcodecs, codec)()
    path = write_replay_buffer(tmp_path / "pusht.zarr")
    group = zarr.open_group(path, mode="a")
    del group["data/action"]
    array = group.create_array("data/action", shape=(ROWS, 2), chunks=(ROWS, 2), dtype="f4", compressors=how)
    array[:] = values(0, ROWS, 2)
    monkeypatch.setattr(store, "_MAX_CHUNK", 1 << 16)
    assert len(open_source(path, PUSHT).load(1).action) == 5
    (path / "data/action/0.0").write_bytes(how.encode(np.zeros(1 << 22, "u1")))
    with pytest.raises(CorruptEpisode, match="data/action/0.0 unpacks to more than a chunk's 168 bytes"):
        open_source(path, PUSHT).load(1)


@pytest.mark.parametrize("part", ["shape", "chunks"])
def test_a_description_that_lies_takes_no_memory(pusht, version, part):
    def change(about):
        sizes = about.get(part) or about["chunk_grid"]["configuration"]["chunk_shape"]
        sizes[1] = 2**40

    edit_metadata(pusht, version, "data/img", change)
    with pytest.raises(UserError, match="has no camera|more than is read at once"):
        open_source(pusht, PUSHT)


def test_missing_parts(pusht, version):
    shutil.rmtree(pusht / "data" / "action")
    with pytest.raises(UserError, match="unknown column 'action' .*dataset config 'pusht' asks for it"):
        open_source(pusht, PUSHT)
    shutil.rmtree(pusht / "data" / "img")
    with pytest.raises(UserError, match="unknown column|has no camera"):
        open_source(pusht, PUSHT)
    (pusht / "meta/episode_ends" / ("0" if version == 2 else "c/0")).unlink()
    with pytest.raises(UserError, match="meta/episode_ends/.*0 is missing, so no episode can be found"):
        open_source(pusht, PUSHT)
    shutil.rmtree(pusht / "meta")
    with pytest.raises(UserError, match="is not a replay buffer: meta/episode_ends is missing"):
        ReplayBufferSource(str(pusht))


@pytest.mark.parametrize("codec", ["imagecodecs_jpegxl", "pickle"])
def test_codec_that_is_not_there_is_named(pusht, version, codec):
    """JPEG XL is what UMI stores; pickle would run code."""

    def change(about):
        if version == 2:
            about["compressor"] = {"id": codec, "level": 99}
        else:
            about["codecs"] = [{"name": f"numcodecs.{codec}", "configuration": {}}]

    edit_metadata(pusht, version, "data/img", change)
    with pytest.raises(
        UserError, match=f"data/img is stored with the codec '(numcodecs.)?{codec}', which is not available here"
    ):
        open_source(pusht, PUSHT)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda about: about.pop("shape"), "does not describe an array of numbers .'shape'"),
        (lambda about: about.update(shape="ten"), "does not describe an array of numbers"),
        (lambda about: about.update({"dtype": "|O", "data_type": "string"}), "does not describe an array of numbers"),
    ],
)
def test_damaged_metadata(pusht, version, change, message):
    edit_metadata(pusht, version, "data/action", change)
    with pytest.raises(UserError, match=message):
        open_source(pusht, PUSHT)
    path = pusht / "data/action" / (".zarray" if version == 2 else "zarr.json")
    path.write_text(path.read_text()[:40])
    with pytest.raises(UserError, match="does not describe an array of numbers"):
        open_source(pusht, PUSHT)


def test_a_long_name_of_a_type_is_not_repeated(pusht, version):
    long = "x" * 70_000
    edit_metadata(pusht, version, "data/action", lambda about: about.update({"dtype": long, "data_type": long}))
    with pytest.raises(UserError, match="does not describe an array of numbers") as caught:
        open_source(pusht, PUSHT)
    assert len(str(caught.value)) < 250


def test_sharded_arrays_are_refused(tmp_path):
    path = write_replay_buffer(tmp_path / "pusht.zarr", zarr_format=3)
    group = zarr.open_group(path, mode="a")
    del group["data/action"]
    group.create_array("data/action", data=np.ones((ROWS, 2)), chunks=(2, 2), shards=(8, 2))
    with pytest.raises(UserError, match="data/action is sharded, which is not read"):
        open_source(path, PUSHT)


@pytest.mark.parametrize(
    "pixels, message",
    [
        (np.zeros((ROWS, 6, 8, 3), np.float32), "data/img is float32 and may range to 1 or to 255"),
        (np.ones((ROWS, 6, 8, 3), np.float32), "may range to 1 or to 255"),
        (IMAGES / 50 - 2.1, "may range to 1 or to 255"),
        (IMAGES / 127.5, "may range to 1 or to 255"),
        (np.full((ROWS, 3, 6, 3), 7, np.uint8), r"data/img \[21, 3, 6, 3\] has its colors first or last"),
    ],
)
def test_pictures_whose_meaning_is_open(tmp_path, pixels, message):
    zarr.config.set({"array.write_empty_chunks": True})
    with pytest.raises(UserError, match=message):
        open_source(write_replay_buffer(tmp_path / "x.zarr", pixels=pixels), PLAIN)


def test_no_camera(tmp_path):
    path = write_replay_buffer(tmp_path / "x.zarr", pixels=values(3, ROWS, 4))
    with pytest.raises(UserError, match="x.zarr has no camera"):
        open_source(path, PLAIN)


def test_what_the_config_must_say(pusht):
    def config(**changes):
        return DatasetConfig(**{**vars(PLAIN), **changes})

    with pytest.raises(UserError, match="do not give the number of rows per second; add control_hz"):
        open_source(pusht, config(control_hz=None))
    with pytest.raises(UserError, match="'action' has 2 dimensions, dataset config 'plain' describes 1"):
        open_source(pusht, config(action=(FieldSpec(field="eef_pos_x"),)))
    with pytest.raises(UserError, match="unknown view 'camera'"):
        open_source(pusht, config(views=("camera",)))
    shutil.move(pusht, pusht.parent / "mine.zarr")
    with pytest.raises(UserError, match="no dataset config fits mine.zarr; run `dvla data add "):
        open_source(pusht.parent / "mine.zarr")


@pytest.mark.parametrize("damage", ["half", "garbage", "chunk"])
def test_damaged_zip(pusht, tmp_path, damage, version):
    path = zipped(pusht, tmp_path / "pusht.zarr.zip")
    data = bytearray(path.read_bytes())
    if damage == "chunk":  # one byte of a stored chunk differs from what its checksum says
        with zipfile.ZipFile(path) as file:
            info = file.getinfo("data/img/" + ("2.0.0.0" if version == 2 else "c/2/0/0/0"))
        data[info.header_offset + 30 + len(info.filename) + 5] ^= 1
    path.write_bytes({"half": data[: len(data) // 2], "garbage": b"no zip" * 99, "chunk": data}[damage])
    if damage != "chunk":
        with pytest.raises(UserError, match="pusht.zarr.zip"):
            ReplayBufferSource(str(path))
        return
    with pytest.raises(CorruptEpisode, match="pusht.zarr.zip episode 1: data/img/.* is damaged"):
        open_source(path, PUSHT).load(1)
    assert open_source(path, PUSHT).load(0).length == LENGTHS[0]


def test_episodes_are_known_again_after_more_were_added(pusht):
    """Only an episode whose chunks were written again, here the last one's, gets another hash."""
    before = [open_source(pusht, PUSHT).load(n).source_hash for n in range(3)]
    group = zarr.open_group(pusht, mode="a")
    for name in ("img", "action", "state", "keypoint"):
        array = group[f"data/{name}"]
        more = array[:6]
        array.resize((ROWS + 6, *array.shape[1:]))
        array[ROWS:] = more
    del group["meta/episode_ends"]
    group.create_array("meta/episode_ends", data=np.array([*ENDS, ROWS + 6]))
    source = open_source(pusht, PUSHT)
    assert source.episode_ids == (0, 1, 2, 3) and [source.load(n).source_hash for n in range(2)] == before[:2]
    assert np.array_equal(frames(source.load(3).views[0]), IMAGES[:6])


@pytest.mark.parametrize("packed", [False, True])
def test_on_the_hub(pusht, tmp_path, monkeypatch, packed):
    remote = tmp_path / "remote" / "pusht"
    if packed:
        remote.mkdir(parents=True)
        zipped(pusht, remote / "pusht.zarr.zip")
    else:
        shutil.copytree(pusht, remote)
    serve(monkeypatch, tmp_path / "remote", tmp_path / "0123abcd")
    check_pusht(open_source("owner/name/pusht"))
