"""The lists of LeRobot's `meta/`: other types, torn and odd lines, missing files. One bad entry costs one episode."""

import codecs
import json
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dvla.cache.readers import open_source
from dvla.errors import Failed, UserError
from support.lerobot_written import LENGTHS, change_info, change_table, info, lines, write_v2, write_v3

EPISODES = "meta/episodes.jsonl"


def outcome(root):
    """Episode → its instruction, or why it cannot be used."""
    source = open_source(root)
    found = {e: source.attempt(source.load, e) for e in source.episode_ids}
    return {e: x.reason if isinstance(x, Failed) else x.instruction for e, x in found.items()}


def good(*episodes, text="push the puck"):
    return dict.fromkeys(episodes, text)


# --- files of meta/episodes with other column types ---


def second_file(root, change):
    """The last episode in a file of its own, as a recorder that was resumed with other libraries writes it."""
    first = root / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(first)
    pq.write_table(table.slice(0, 2), first)
    pq.write_table(change(table.slice(2)), first.with_name("file-001.parquet"))


def cast(name, kind):
    return lambda t: t.set_column(t.column_names.index(name), name, t[name].cast(kind))


@pytest.mark.parametrize(
    "change",
    [
        cast("tasks", pa.large_list(pa.large_string())),
        cast("length", pa.float64()),
        cast("length", pa.int32()),
        cast("length", pa.string()),
        cast("episode_index", pa.float32()),
        cast("data/file_index", pa.decimal128(19, 0)),
        cast("dataset_from_index", pa.float64()),
        lambda t: t.set_column(2, "length", pa.array([[LENGTHS[2]]])),
        lambda t: t.set_column(1, "tasks", pa.array(["push the puck"]).dictionary_encode()),
        lambda t: t.append_column("success", pa.array([True])),
        lambda t: t.drop_columns(["dataset_from_index"]),
    ],
)
def test_types_may_differ_between_files(tmp_path, change):
    root = write_v3(tmp_path / "d")
    second_file(root, change)
    assert outcome(root) == good(0, 1, 2)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.set_column(2, "length", pa.array([None], pa.int64())),
        lambda t: t.set_column(2, "length", pa.array([float("nan")])),
        lambda t: t.drop_columns(["length"]),
    ],
)
def test_rows_tell_a_length_that_is_not_listed(tmp_path, change):
    root = write_v3(tmp_path / "d")
    second_file(root, change)
    assert outcome(root) == good(0, 1, 2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.set_column(2, "length", pa.array([5.5])), "'length' is 5.5, expected a whole number"),
        (lambda t: t.set_column(2, "length", pa.array([-5])), "'length' is -5, expected a whole number"),
        (lambda t: t.set_column(2, "length", pa.array(["five"])), "'length' is 'five', expected a number"),
        (lambda t: t.set_column(4, "data/file_index", pa.array([None], pa.int64())), "'data/file_index' is empty"),
    ],
)
def test_an_entry_that_cannot_be_used_costs_its_episode(tmp_path, change, reason):
    root = write_v3(tmp_path / "d")
    second_file(root, change)
    found = outcome(root)
    assert reason in found.pop(2) and found == good(0, 1)


def test_a_list_file_that_cannot_be_read_costs_its_episodes(tmp_path):
    root = write_v3(tmp_path / "d")
    second_file(root, lambda t: t)
    path = root / "meta/episodes/chunk-000/file-001.parquet"
    path.write_bytes(path.read_bytes()[:-20])  # the recorder was killed before it wrote the footer
    found = outcome(root)
    assert "chunk-000/file-001.parquet cannot be read as parquet" in found.pop(2) and found == good(0, 1)
    assert "its episodes are not listed" in open_source(root).notes()[0].text


# --- lines ---


def text_of(root, name=EPISODES):
    return (root / name).read_text()


def rewrite(root, change, name=EPISODES):
    (root / name).write_bytes(change((root / name).read_bytes()))


@pytest.mark.parametrize(
    "change",
    [
        lambda b: codecs.BOM_UTF8 + b,
        lambda b: b.replace(b"\n", b"\r\n"),
        lambda b: b.replace(b"\n", b"\n\n \n") + b"\n\n",
        lambda b: b.rstrip(b"\n"),
        lambda b: b + bytes(64),  # zeros at the end, after a loss of power
        lambda b: b.decode().encode("utf-16"),
        lambda b: b.replace(b"\n", b"", 1),  # two objects in one line
        lambda b: b.replace(b'"length": 4', b'"length": 4.0, "note": "a\tb"'),
        lambda b: b.replace(b'"length": 4', b'"length": "4"'),
        lambda b: b"[" + b.strip().replace(b"\n", b",\n") + b"]",
        lambda b: json.dumps([json.loads(x) for x in b.decode().split("\n") if x], indent=1).encode(),
        lambda b: b.replace(b'"tasks": ["push the puck"]', b'"tasks": "push the puck"'),
        lambda b: b.replace(b'"tasks": ["push the puck"]', b'"tasks": null'),
        lambda b: b.replace(b'"tasks": ["push the puck"], ', b""),
        lambda b: b.replace(b'"tasks": ["push the puck"]', b'"tasks": {"a": [1]}'),
        lambda b: b.replace(b'"tasks": ["push the puck"]', b'"tasks": [0]'),
        lambda b: b + b.splitlines(keepends=True)[1],  # the same entry again
        lambda b: b + b'{"episode_index": 2, "length": 9}\n',  # another one: the rows decide
        lambda b: b.replace(b'"length": 5', b'"length": NaN'),
    ],
)
def test_odd_lists_are_read(tmp_path, change):
    root = write_v2(tmp_path / "d")
    rewrite(root, change)
    assert outcome(root) == good(0, 1, 2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda b: b[:-12], "episodes.jsonl line 3 cannot be read as JSON"),  # torn: a crash while it was written
        (lambda b: b.replace(b'"length": 5', b'"length": Infinity'), "line 3 'length' is inf, expected a number"),
        (lambda b: b.replace(b'"length": 5', b'"length": 1e400'), "line 3 'length' is inf, expected a number"),
        (lambda b: b.replace(b'"length": 5', b'"length": ' + b"9" * 30), "expected a whole number"),
        (lambda b: b.replace(b'"length": 5', b'"length": ' + b"9" * 5000), "line 3 cannot be read as JSON: Exceeds"),
        (lambda b: b.replace(b'"length": 5', b'"length": true'), "line 3 'length' is True, expected a number"),
        (lambda b: b.replace(b'"length": 5', b'"length": [5, 5]'), "line 3 'length' is [5, 5], expected a number"),
        (lambda b: b.replace(b'"length": 5', b'"length": {"n": 5}'), "'length' is {'n': 5}, expected a number"),
        (lambda b: b.replace(b'"length": 5', b'"length": 5, "length": 6'), "'length' is given twice"),
        (lambda b: b.replace(b'"length": 5', b'"x": ' + b"[" * 100_000), "line 3 cannot be read as JSON"),
        (lambda b: b.replace(b'{"episode_index": 2', b"[3, 4]#"), "line 3 holds [3, 4], expected an object"),
        (lambda b: b.replace(b'"episode_index": 2', b'"episode_index": null'), "line 3 'episode_index' is empty"),
    ],
)
def test_a_bad_line_costs_its_episode(tmp_path, change, reason):
    root = write_v2(tmp_path / "d")
    rewrite(root, change)
    found = outcome(root)
    assert reason in found.pop(2) and found == good(0, 1)


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_lines_end_at_line_feeds_alone(tmp_path, sign):
    text = f"push{sign}the puck"
    root = write_v2(tmp_path / "d", (text,))
    for name, rows in {
        "tasks": [{"task_index": 0, "task": text}],
        "episodes": [{"episode_index": e, "tasks": [text], "length": n} for e, n in enumerate(LENGTHS)],
    }.items():
        lines(root / f"meta/{name}.jsonl", rows, ascii=False)
        if sign < " ":  # JSON escapes it; some writers do not
            rewrite(root, lambda b: b.replace(f"\\u{ord(sign):04x}".encode(), sign.encode()), f"meta/{name}.jsonl")
    assert outcome(root) == good(0, 1, 2, text=text)


def test_half_of_a_pair_of_escapes_is_replaced(tmp_path):
    root = write_v2(tmp_path / "d")
    (root / "meta/tasks.jsonl").write_text('{"task_index": 0, "task": "push \\ud83d the \\ud83d\\ude00 puck"}\n')
    assert outcome(root) == good(0, 1, 2, text="push ? the 😀 puck")


def test_of_two_entries_the_rows_choose_one(tmp_path):
    root = write_v2(tmp_path / "d")
    rewrite(root, lambda b: b'{"episode_index": 2, "length": 9}\n' + b)
    assert outcome(root) == good(0, 1, 2)
    assert "listed 2 times: 9 frames (meta/episodes.jsonl line 1) and 5 frames" in open_source(root).notes()[0].text


def test_windows_texts_are_read_and_named(tmp_path):
    root = write_v2(tmp_path / "d")
    (root / "meta/tasks.jsonl").write_bytes('{"task_index": 0, "task": "Tür öffnen"}\n'.encode("latin-1"))
    assert outcome(root) == good(0, 1, 2, text="Tür öffnen")
    assert "meta/tasks.jsonl line 1 is not UTF-8" in open_source(root).notes()[0].text


def test_a_list_that_is_damaged_as_a_whole_is_one_line(tmp_path):
    root = write_v2(tmp_path / "d")
    rewrite(root, lambda b: b"\x89PNG" + bytes(range(256)))
    with pytest.raises(UserError, match="d: meta/episodes.jsonl cannot be read as JSON lines"):
        open_source(root)


# --- without a list ---


def test_v2_without_a_list_is_read_by_its_files(tmp_path):
    root = write_v2(tmp_path / "d")
    (root / EPISODES).unlink()
    (root / "data/chunk-000/episode_000001.parquet").write_bytes(b"nothing")
    found = outcome(root)
    assert "episode_000001.parquet cannot be read as parquet" in found.pop(1) and found == good(0, 2)
    assert "meta/episodes.jsonl is missing or empty; 3 episodes were found" in open_source(root).notes()[0].text


def test_v3_without_a_list_is_read_by_its_rows(tmp_path):
    root = write_v3(tmp_path / "d")
    (root / "meta/episodes/chunk-000/file-000.parquet").unlink()
    source = open_source(root)
    assert outcome(root) == good(0, 1, 2) and [source.length_of(e) for e in range(3)] == list(LENGTHS)
    change_table(root / "data/chunk-000/file-000.parquet", lambda t: t.take([*range(6, 15), *range(6)]))
    with pytest.raises(UserError, match="the rows of episode 1 are not together"):
        open_source(root)


def test_what_macos_leaves_beside_files_is_no_file(tmp_path):
    old, new = write_v2(tmp_path / "old"), write_v3(tmp_path / "new")
    (old / EPISODES).unlink()
    for path in (*old.rglob("*.parquet"), *new.rglob("*.parquet")):
        path.with_name(f"._{path.name}").write_bytes(b"\x00\x05\x16\x07")
    assert outcome(old) == outcome(new) == good(0, 1, 2) and not open_source(new).notes()


def test_no_list_and_no_data_is_one_line(tmp_path):
    root = write_v2(tmp_path / "d")
    (root / EPISODES).write_text("\n")
    for path in root.glob("data/*/*"):
        path.unlink()
    with pytest.raises(UserError, match="episodes.jsonl is missing or empty, and no data file of it is here"):
        open_source(root)


# --- more than a file honestly holds ---


def test_many_objects_in_one_line_take_no_square_of_time(tmp_path):
    root, begun = write_v2(tmp_path / "x"), time.process_time()
    (root / "meta/tasks.jsonl").write_text('{"task_index": 0, "task": "push"}' * 60_000)
    assert outcome(root) == good(0, 1, 2, text="push") and time.process_time() - begun < 8


def test_an_episode_listed_many_times_takes_no_square_of_time(tmp_path):
    root, begun = write_v2(tmp_path / "x"), time.process_time()
    lines(root / EPISODES, [{"episode_index": 0, "tasks": [], "length": n} for n in range(20_000)])
    assert outcome(root) == {0: "it is listed 20000 times"} and time.process_time() - begun < 8


@pytest.mark.parametrize("text", ['{"a": ' * 100 + "1" + "}" * 100, "[" * 3000 + "]" * 3000, "[" * 10**6])
def test_nesting_is_bounded(tmp_path, text):
    root = write_v2(tmp_path / "x")
    with (root / EPISODES).open("a") as file:
        file.write(text + "\n")
    found = outcome(root)
    assert {e: found[e] for e in range(3)} == good(0, 1, 2) and "nested" in found.pop(3)


def test_rows_that_are_claimed_are_not_read(tmp_path, monkeypatch):
    from dvla.cache.readers.lerobot import parquet

    root = write_v2(tmp_path / "x")
    path = root / "data/chunk-000/episode_000001.parquet"
    change_table(path, lambda t: pa.concat_tables([t] * 50))
    monkeypatch.setattr(parquet, "_MOST_ROWS", 100)
    monkeypatch.setattr(parquet, "_SEEN", {})
    assert {e: r for e, r in outcome(root).items() if e != 1} == good(0, 2)
    assert "a row group claims 300 rows of" in outcome(root)[1]
    zeros = pa.table({"episode_index": np.zeros(100_000, np.int64), "zeros": np.zeros(100_000)})
    pq.write_table(zeros, path, use_dictionary=False, compression="zstd")
    monkeypatch.setattr(parquet, "_MOST_ROWS", 10**6)
    monkeypatch.setattr(parquet, "_MOST_BYTES", 10)
    assert "a row group claims 100,000 rows of" in outcome(root)[1]


@pytest.mark.parametrize("file", ["meta/tasks.parquet", "data/chunk-000/file-000.parquet"])
def test_a_text_in_every_row_takes_no_memory(tmp_path, file):
    """A dictionary holds it once; in the rows it would be a terabyte."""
    root = write_v3(tmp_path / "x", tasks=[""])
    table = pq.read_table(root / file)
    rows = 1_000_000 if "tasks" in file else table.num_rows
    text = "x" * (1_000_000 if "tasks" in file else 40_000_000)
    said = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([text]))
    if "tasks" in file:
        table = pa.table({"task_index": range(rows), "task": said})
        pq.write_table(table, root / file)
        with pytest.raises(
            UserError, match="tasks.parquet cannot be read as parquet .its texts have 1,000,000,000,000 b"
        ):
            open_source(root)
        return
    pq.write_table(table.append_column("language_instruction", said), root / file)
    change_info(root, features={**info("v3.0")["features"], "language_instruction": {"dtype": "string", "shape": [1]}})
    reasons = outcome(root)
    assert all("its texts have 600,000,000 bytes" in reason for reason in reasons.values()), reasons
