"""Which rows of which data file are an episode's, in which order, and numbers as converters store them."""

import json
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dvla.cache.readers import open_source
from dvla.cache.readers.episode import CorruptEpisode
from dvla.errors import Failed
from support.lerobot_files import DATA, LENGTHS, numbers, put, rows_of, write_v2, write_v3


def data_file(root, number=0, chunk=0):
    return root / DATA.format(chunk_index=chunk, file_index=number)


def change_list(root, **columns):
    """Other values of columns of meta/episodes; a name's "__" stands for "/"."""
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    for name, values in columns.items():
        table = put(table, name.replace("__", "/"), values)
    pq.write_table(table, path)


def split(root, *sizes, chunks=(0, 0, 0)):
    """The rows of the only data file in several, of these numbers of rows."""
    table, first = pq.read_table(data_file(root)), 0
    for number, size in enumerate(sizes):
        path = data_file(root, number, chunks[number])
        path.parent.mkdir(exist_ok=True)
        pq.write_table(table.slice(first, size), path)
        first += size
    return root


def all_right(source, episodes=(0, 1, 2)):
    """Rows and images of every episode, from `load` and from `tables`, with the notes of each."""
    assert [list(source.table(e).action[:, 0]) for e in episodes] == [rows_of(e) for e in episodes]
    assert [numbers(source, e) for e in episodes] == [rows_of(e) for e in episodes]
    (block,) = source.tables()
    assert {e: list(block.action[block.episode_ids == e, 0]) for e in episodes} == {e: rows_of(e) for e in episodes}
    assert not [f for f in block.refused if f.episode in episodes]
    return [[(n.rule, n.text) for n in source.table(e).notes] for e in episodes]


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize(
    ("sizes", "listed", "chunks"),
    [
        ((12, 24), [0, 0, 1], (0, 0)),  # the first episode of a new file is listed with the old one
        ((12, 14, 10), [0, 0, 0], (0, 0, 0)),
        ((12, 14, 10), [2, 0, 1], (0, 0, 0)),
        ((12, 14, 10), [0, 9, 1], (0, 0, 0)),  # a file that does not exist
        ((12, 14, 10), [0, 1, 2], (0, 0, 1)),  # another chunk
    ],
)
def test_stale_file_index(tmp_path, images, sizes, listed, chunks):
    root = split(write_v3(tmp_path / "d", images=images), *sizes, chunks=chunks)
    change_list(root, data__file_index=listed)
    found = all_right(open_source(root))
    files = [f for f, n in enumerate(sizes) for _ in range({24: 2}.get(n, 1))]
    stale = [e for e in range(3) if (files[e], chunks[files[e]]) != (listed[e], 0)]
    assert [e for e in range(3) if found[e]] == stale
    rule, text = found[stale[0]][0]
    place = DATA.format(chunk_index=chunks[files[stale[0]]], file_index=files[stale[0]])
    assert rule == "file-index" and text.startswith(f"its rows are in {place}, meta/ lists ")


def test_each_file_is_searched_once(tmp_path, monkeypatch):
    from dvla.cache.readers.lerobot import placement

    root = split(write_v3(tmp_path / "d"), 12, 14, 10)
    change_list(root, data__file_index=[0, 0, 0])
    seen, real = [], placement.read_places
    monkeypatch.setattr(placement, "read_places", lambda path, where: seen.append(path) or real(path, where))
    source = open_source(root)
    for _ in range(3):
        [source.table(e) for e in range(3)]
    assert len(seen) <= 4 and {p.name for p in seen} == {"file-000.parquet", "file-001.parquet", "file-002.parquet"}


def test_missing_file_costs_its_episodes_only(tmp_path):
    root = split(write_v3(tmp_path / "d"), 12, 14, 10)
    change_list(root, data__file_index=[0, 1, 2])
    data_file(root, 1).unlink()
    source = open_source(root)
    all_right(source, (0, 2))
    with pytest.raises(CorruptEpisode, match="file-001.parquet is missing"):
        source.table(1)
    (block,) = source.tables()
    assert [f.episode for f in block.refused] == [1] and isinstance(block.refused[0], Failed)


def test_rows_of_another_recording_do_not_take_the_place_of_damaged_ones(tmp_path):
    """The second file of a merge counts its episodes from 0 again; the first one is gone."""
    root = split(write_v3(tmp_path / "d"), 12, 24)
    table = pq.read_table(data_file(root, 1))
    pq.write_table(put(table, "episode_index", [0] * 14 + [1] * 10), data_file(root, 1))
    change_list(root, data__file_index=[0, 1, 1])
    data_file(root, 0).write_bytes(b"nothing")
    with pytest.raises(CorruptEpisode, match="those in .*file-001.parquet have index 12, meta/ lists 0"):
        open_source(root).table(0)


def test_files_of_different_types(tmp_path):
    root = split(write_v3(tmp_path / "d"), 12, 14, 10)
    change_list(root, data__file_index=[0, 1, 2])
    table = pq.read_table(data_file(root, 1))
    for name in ("episode_index", "frame_index"):
        table = put(table, name, table[name].to_pylist(), pa.int32())
    table = put(table, "action", table["action"].to_pylist(), pa.large_list(pa.float64()))
    pq.write_table(table.select(sorted(table.column_names)), data_file(root, 1))
    all_right(open_source(root))


# --- the rows in it --------------------------------------------------------------------------------------------------


def test_data_of_a_merge_that_kept_the_old_numbers(tmp_path):
    """Two recordings in one dataset: `meta/` counts on, the rows of the second file begin at 0 again. The numbers of a
    row are taken for others' wherever they say something else than the place."""
    root = split(write_v3(tmp_path / "d", images=True), 12, 24)
    table = pq.read_table(data_file(root, 1))
    ids, index = [0] * 14 + [1] * 10, list(range(24))
    pq.write_table(put(put(table, "episode_index", ids), "index", index), data_file(root, 1))
    change_list(root, data__file_index=[0, 1, 1])
    found = all_right(open_source(root))
    assert [bool(f) for f in found] == [False, True, True]
    assert "0 rows of" in found[2][0][1] and "episode_index 1" in found[1][0][1] + found[2][0][1]


def test_two_places_with_as_much_for_them(tmp_path):
    """`episode_index` says one place, `index` and the list another, for episodes of the same length."""
    root = write_v3(tmp_path / "d", lengths=(10, 10, 10))
    table = pq.read_table(data_file(root))
    pq.write_table(put(table, "episode_index", [1] * 10 + [0] * 10 + [2] * 10), data_file(root))
    source = open_source(root)
    with pytest.raises(CorruptEpisode, match="rows of episode_index 0 begin at row 10 .*lists 0.*episode_index is 1"):
        source.table(0)
    assert list(source.table(2).action[:, 0]) == list(range(20, 30))
    (block,) = source.tables()
    assert sorted(f.episode for f in block.refused) == [0, 1]


def test_listed_rows_that_are_wrong(tmp_path):
    """After a deletion `meta/` still counts the rows that went."""
    root = write_v3(tmp_path / "d")
    change_list(root, dataset_from_index=[0, 40, 54], dataset_to_index=[12, 54, 64])
    found = all_right(open_source(root))
    assert [f[0][0] if f else None for f in found] == [None, "row-index", "row-index"]


def test_file_of_v2_with_another_episode_number(tmp_path):
    found = all_right(open_source(write_v2(tmp_path / "d", change=lambda t: put(t, "episode_index", [0] * t.num_rows))))
    assert [bool(f) for f in found] == [False, True, True]


@pytest.mark.parametrize("write", [write_v2, write_v3])
@pytest.mark.parametrize("images", [False, True])
def test_rows_out_of_order_are_sorted(tmp_path, write, images):
    rng = np.random.default_rng(0)

    def change(table):
        order = np.lexsort((rng.random(table.num_rows), np.array(table["episode_index"])))
        return table.take(order)

    found = all_right(open_source(write(tmp_path / "d", change=change, images=images)))
    assert all(
        ("row-order", "its rows are not in the order of frame_index; they were sorted by it") in f for f in found
    )


def test_order_that_timestamps_contradict(tmp_path):
    reverse = lambda t: put(t, "frame_index", t["frame_index"].to_pylist()[::-1])  # noqa: E731
    with pytest.raises(CorruptEpisode, match="frame_index and timestamps order its rows differently"):
        open_source(write_v2(tmp_path / "d", change=reverse)).table(0)


def test_rows_out_of_order_without_a_frame_index(tmp_path):
    """Their timestamps sort them, unless these go back in another way."""

    def shuffled(table):
        return table.take(np.random.default_rng(0).permutation(table.num_rows)).drop_columns(["frame_index"])

    found = all_right(open_source(write_v2(tmp_path / "d", change=shuffled)))
    assert ("row-order", "its rows are not in the order of timestamp; they were sorted by it") in found[0]

    def back(table):
        return put(table, "timestamp", [k / 10 % 0.7 for k in range(table.num_rows)]).drop_columns(["frame_index"])

    with pytest.raises(CorruptEpisode, match="timestamps go back, and there is no frame_index"):
        open_source(write_v2(tmp_path / "e", change=back)).table(0)


def test_frame_index_twice(tmp_path):
    double = lambda t: put(t, "frame_index", [max(i, 1) for i in t["frame_index"].to_pylist()])  # noqa: E731
    with pytest.raises(CorruptEpisode, match="frame_index 1 is given to several of its 12 rows, meta/ lists 12"):
        open_source(write_v2(tmp_path / "d", change=double)).table(0)


def test_frame_index_of_one_value_or_running_on(tmp_path):
    same = lambda t: put(t, "frame_index", [0] * t.num_rows)  # noqa: E731
    found = all_right(open_source(write_v2(tmp_path / "d", change=same)))
    assert found[1] == [("row-order", "frame_index is 0 in all rows; they were taken in file order")]
    all_right(open_source(write_v3(tmp_path / "e", change=lambda t: put(t, "frame_index", t["index"]))))


# --- lengths ---------------------------------------------------------------------------------------------------------


def edit_lines(root, change):
    path = root / "meta/episodes.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in change(lines)))
    return root


def test_list_without_a_length(tmp_path):
    def change(lines):
        del lines[1]["length"]
        lines[2]["length"] = None
        return [*lines, {"episode_index": 3, "tasks": ["push"]}]

    source = open_source(edit_lines(write_v2(tmp_path / "d"), change))
    all_right(source)
    assert [source.length_of(e) for e in range(3)] == list(LENGTHS)
    with pytest.raises(CorruptEpisode, match="episode_000003.parquet is missing"):
        source.table(3)


@pytest.mark.parametrize("images", [False, True])
def test_episode_that_is_listed_twice_with_two_lengths(tmp_path, images):
    def twice(lines):
        return [*lines, {**lines[1], "length": 5}]

    all_right(open_source(edit_lines(write_v2(tmp_path / "d", images=images), twice)))
    root = write_v3(tmp_path / "e", images=images)
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([put(table.slice(1, 1), "length", [5]), table]), path)
    source = open_source(root)
    all_right(source)
    assert source.length_of(1) == 14


def test_wrong_length_is_proven_by_the_video_or_refused(tmp_path):
    wrong = lambda lines: [*lines[:1], {**lines[1], "length": 20}, *lines[2:]]  # noqa: E731
    all_right(open_source(edit_lines(write_v2(tmp_path / "d"), wrong)))
    with pytest.raises(CorruptEpisode, match="has 14 rows, meta/ lists 20"):  # images in the rows prove nothing
        open_source(edit_lines(write_v2(tmp_path / "i", images=True), wrong)).table(1)
    for name, images in (("v3", False), ("v3i", True)):
        root = write_v3(tmp_path / name, images=images)
        change_list(root, length=[12, 20, 10])
        all_right(open_source(root))


def test_episode_without_rows(tmp_path):
    empty = lambda t: t.slice(0, 0) if t["episode_index"][0].as_py() == 1 else t  # noqa: E731
    source = open_source(write_v2(tmp_path / "d", change=empty))
    all_right(source, (0, 2))
    with pytest.raises(CorruptEpisode, match="has 0 rows, meta/ lists 14"):
        source.load(1)


def test_ids_with_gaps(tmp_path):
    root = write_v3(tmp_path / "d")
    new = {0: 0, 1: 3, 2: 4}
    for path in (data_file(root), root / "meta/episodes/chunk-000/file-000.parquet"):
        table = pq.read_table(path)
        pq.write_table(put(table, "episode_index", [new[e] for e in table["episode_index"].to_pylist()]), path)
    source = open_source(root)
    assert source.episode_ids == (0, 3, 4) and numbers(source, 3) == rows_of(1) and numbers(source, 4) == rows_of(2)


def test_splits_are_read_as_one_and_said(tmp_path):
    source = open_source(write_v2(tmp_path / "d", splits={"train": "0:2", "val": "2:3"}))
    all_right(source)
    text = "meta/info.json has splits (train '0:2', val '2:3'); all 3 are read"
    assert [n.text for n in source.notes()] == [text]
    assert not open_source(write_v2(tmp_path / "e", splits={"train": "0:3"})).notes()


# --- types -----------------------------------------------------------------------------------------------------------


def as_type(name, change, kind=None):
    return lambda t: put(t, name, [change(v) for v in t[name].to_pylist()], kind)


TYPES = {
    "float episode_index": as_type("episode_index", float),
    "listed episode_index": as_type("episode_index", lambda v: [v], pa.list_(pa.int64(), 1)),
    "dictionary episode_index": lambda t: put(t, "episode_index", t["episode_index"].dictionary_encode()),
    "small episode_index": as_type("episode_index", int, pa.uint8()),
    "listed frame_index": as_type("frame_index", lambda v: [v], pa.list_(pa.int64())),
    "float frame_index": as_type("frame_index", float),
    "listed timestamp": as_type("timestamp", lambda v: [v], pa.large_list(pa.float32())),
    "timestamp in a type of time": as_type("timestamp", lambda v: round(1e6 * v), pa.timestamp("us")),
    "decimal action": as_type("action", lambda v: [Decimal(str(x)) for x in v], pa.list_(pa.decimal128(10, 4))),
    "double action": as_type("action", lambda v: v, pa.list_(pa.float64(), 4)),
    "half action": as_type("action", lambda v: np.array(v, np.float16), pa.list_(pa.float16())),
    "integer action": lambda t: put(t, "action", [[r, 1, 0, 0] for r in t["index"].to_pylist()], pa.list_(pa.int16())),
    "large lists": as_type("action", lambda v: v, pa.large_list(pa.float32())),
    "two by two": as_type("action", lambda v: [v[:2], v[2:]], pa.list_(pa.list_(pa.float32(), 2), 2)),
}


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("write", [write_v2, write_v3])
def test_types_that_converters_write(tmp_path, write, name):
    root = write(tmp_path / "d", change=TYPES[name])
    for path in root.glob("data/*/*.parquet"):  # as lerobot writes them
        pq.write_table(pq.read_table(path), path, row_group_size=7)
    source = open_source(root)
    assert not any(all_right(source))
    assert source.load(0).timestamps == pytest.approx(np.arange(12) / 10)


def null_at(row, inside=False):
    def change(table):
        values = table["action"].to_pylist()
        if table["index"][0].as_py() <= row <= table["index"][-1].as_py():
            values[row - table["index"][0].as_py()] = [None, 0.0, 0.0, 0.0] if inside else None
        return put(table, "action", values, pa.list_(pa.float32()))

    return change


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("write", [write_v2, write_v3])
def test_empty_row_costs_its_episode_and_is_named(tmp_path, write, inside):
    source = open_source(write(tmp_path / "d", change=null_at(19, inside)))
    all_right(source, (0, 2))
    with pytest.raises(CorruptEpisode, match="episode 1: column 'action' is empty at frame 7$"):
        source.table(1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda v: [str(x) for x in v], "column 'action' is not numeric"),
        (lambda v: v[: 1 + round(v[0]) % 4], "rows of column 'action' differ in width"),
    ],
)
def test_columns_that_are_no_numbers(tmp_path, values, message):
    source = open_source(
        write_v2(tmp_path / "d", change=lambda t: put(t, "action", map(values, t["action"].to_pylist())))
    )
    with pytest.raises(CorruptEpisode, match=message):
        source.table(0)


@pytest.mark.parametrize("name", ["frame_index", "timestamp", "index", "task_index", "episode_index"])
@pytest.mark.parametrize("write", [write_v2, write_v3])
def test_column_that_is_empty_in_all_rows(tmp_path, write, name):
    empty = lambda t: put(t, name, pa.nulls(t.num_rows, t.schema.field(name).type))  # noqa: E731
    all_right(open_source(write(tmp_path / "d", change=empty)))


@pytest.mark.parametrize("name", ["frame_index", "timestamp", "index"])
@pytest.mark.parametrize("write", [write_v2, write_v3])
def test_column_of_texts(tmp_path, write, name):
    texts = lambda t: put(t, name, [f"{v} of" for v in t[name].to_pylist()])  # noqa: E731
    found = all_right(open_source(write(tmp_path / "d", change=texts)))
    assert [bool(f) for f in found] == [name != "index"] * 3


def test_files_without_a_column_of_episodes(tmp_path):
    """A file of its own tells the episode, and so does a listed place where frame_index begins and ends."""
    for name, write in (("v2", write_v2), ("v3", write_v3)):
        all_right(open_source(write(tmp_path / name, change=lambda t: t.drop_columns(["episode_index"]))))
    missing = ["episode_index", "frame_index"]
    with pytest.raises(CorruptEpisode, match="'episode_index' is missing"):
        open_source(write_v3(tmp_path / "e", change=lambda t: t.drop_columns(missing))).table(1)
