"""The instruction of a LeRobot episode: its rows decide; odd task tables, annotations of GR00T, columns of text."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dvla.cache.readers import open_source
from dvla.errors import Failed
from support.lerobot_written import LENGTHS, change_info, change_table, lines, write_v2, write_v3


def outcome(root):
    """(instruction, rules of the notes) of every episode, or why it cannot be used."""
    source = open_source(root)
    found = [source.attempt(source.table, e) for e in source.episode_ids]
    return [x.reason if isinstance(x, Failed) else (x.instruction, [n.rule for n in x.notes]) for x in found]


def add_column(root, name, values):
    """A column of the rows of every episode of a v2 dataset: `values[k]` for episode k."""
    for path, value in zip(sorted(root.glob("data/*/*.parquet")), values, strict=True):
        change_table(path, lambda t, v=value: t.append_column(name, pa.array([v] * t.num_rows)))  # noqa: B023
    features = json.loads((root / "meta/info.json").read_text())["features"] | {name: {"dtype": "string", "shape": [1]}}
    change_info(root, features=features)


@pytest.mark.parametrize("name", ["task", "__index_level_0__", "tasks", "task_description", "odd"])
def test_the_text_column_may_have_any_name(tmp_path, name):
    root = write_v3(tmp_path / "d", ("push", "pull"))
    pq.write_table(pa.table({name: ["pull", "push"], "task_index": [1, 0]}), root / "meta/tasks.parquet")
    assert outcome(root) == [("push", []), ("pull", []), ("push", [])]


def test_tasks_without_an_index_are_counted(tmp_path):
    root = write_v2(tmp_path / "d", ("push", "pull"))
    lines(root / "meta/tasks.jsonl", [{"task": "push"}, {"task": "pull"}])
    assert outcome(root) == [("push", []), ("pull", []), ("push", [])]


def test_a_table_without_texts_is_named(tmp_path):
    root = write_v3(tmp_path / "d", ("push",))
    pq.write_table(pa.table({"task_index": [0], "a": ["x"], "b": ["y"]}), root / "meta/tasks.parquet")
    assert outcome(root) == [("push", [])] * 3
    assert "tasks.parquet has no column of texts (columns: task_index, a, b)" in open_source(root).notes()[0].text


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        ([{"task_index": 0, "task": "push it"}], [("push it", ["task-differs"])] * 3),  # edited in one place only
        ([{"task_index": 0, "task": "push "}], [("push ", ["task-differs"])] * 3),
        ([{"task_index": 0, "task": None}], [("push", ["task-unknown"])] * 3),
        ([{"task_index": 0, "task": ""}], [("push", ["task-unknown"])] * 3),
        ([{"task_index": 0, "task": 7}], [("push", ["task-unknown"])] * 3),
        ([{"task_index": 0}], [("push", [])] * 3),
        ([{"task_index": 5, "task": "pull"}], [("push", ["task-unknown"])] * 3),
        ([{"task_index": "0", "task": ["push"]}], [("push", [])] * 3),
        ([{"task_index": 0, "task": "a"}, {"task_index": 0, "task": "b"}], [("push", [])] * 3),
        ([{"task_index": 0, "task": "push"}, {"task_index": 0, "task": "push"}], [("push", [])] * 3),
        ([], [("push", [])] * 3),
    ],
)
def test_odd_task_tables(tmp_path, tasks, expected):
    root = write_v2(tmp_path / "d", ("push",))
    lines(root / "meta/tasks.jsonl", tasks)
    assert outcome(root) == expected


def test_task_numbers_of_a_type_that_is_none_are_no_numbers(tmp_path):
    root = write_v2(tmp_path / "d", ("push",))
    path = sorted(root.glob("data/*/*.parquet"))[0]
    task = pa.array([{"n": 0}] * LENGTHS[0])
    change_table(path, lambda t: t.set_column(t.column_names.index("task_index"), "task_index", task))
    assert outcome(root) == [("push", [])] * 3


def test_a_torn_task_line_is_named(tmp_path):
    root = write_v2(tmp_path / "d", ("push", "pull"))
    path = root / "meta/tasks.jsonl"
    path.write_text(path.read_text()[:-8])
    assert outcome(root) == [("push", []), ("pull", ["task-unknown"]), ("push", [])]
    assert "meta/tasks.jsonl line 2 cannot be read as JSON" in open_source(root).notes()[0].text


def test_a_task_that_does_not_exist_costs_the_episode_if_nothing_else_tells(tmp_path):
    root = write_v2(tmp_path / "d", ("push", "pull"))
    lines(root / "meta/tasks.jsonl", [{"task_index": 0, "task": "push"}])
    lines(root / "meta/episodes.jsonl", [{"episode_index": e, "length": n} for e, n in enumerate(LENGTHS)])
    assert outcome(root) == [("push", []), "task_index 1 is not among the 1 tasks of meta/", ("push", [])]


@pytest.mark.parametrize(
    "values", [pa.array([1.0] * 4), pa.array(["1"] * 4), pa.array([[1]] * 4), pa.array([None, 1, 1, 1])]
)
def test_indices_may_have_any_type(tmp_path, values):
    root = write_v2(tmp_path / "d", ("push", "pull"))
    at = 7  # of task_index
    change_table(root / "data/chunk-000/episode_000000.parquet", lambda t: t.set_column(at, "task_index", values))
    assert outcome(root)[0] == ("pull", ["task-differs"])


def test_texts_may_be_bytes(tmp_path):
    root = write_v3(tmp_path / "d")
    texts = pa.array([b"push"], pa.binary())
    pq.write_table(pa.table({"task_index": [0], "task": texts}), root / "meta/tasks.parquet")
    assert outcome(root) == [("push", ["task-differs"])] * 3


def test_one_row_of_another_task_is_named(tmp_path):
    root = write_v2(tmp_path / "d", ("push", "pull"))
    for path, other in zip(sorted(root.glob("data/*/*.parquet")), (1, 1, 9)):
        change_table(
            path,
            lambda t, o=other: t.set_column(
                t.column_names.index("task_index"), "task_index", [[*t["task_index"].to_pylist()[:-1], o]]
            ),
        )
    assert outcome(root) == [("push; pull", ["task-differs"]), ("pull", []), ("push", ["task-unknown"])]


def test_without_a_task_table_the_list_has_the_texts(tmp_path):
    root = write_v2(tmp_path / "d", ("push", "pull"))
    (root / "meta/tasks.jsonl").unlink()
    assert outcome(root) == [("push", []), ("pull", []), ("push", [])]
    assert "no tasks file" in open_source(root).notes()[0].text


def test_the_cheap_look_agrees_with_the_rows(tmp_path):
    root = write_v2(tmp_path / "d", ("push",))
    lines(root / "meta/tasks.jsonl", [{"task_index": 0, "task": "push it"}])
    source = open_source(root)
    assert source.instruction_of(1) == "push it"
    (root / "meta/tasks.jsonl").unlink()
    source = open_source(root)
    assert source.instruction_of(1) == source.table(1).instruction == "push"


# --- GR00T ---


def gr00t(root, listed=("pick the pear", "valid"), **columns):
    """Task 0 is the instruction, task 1 the mark of validity; each row points at both."""
    write_v2(root, ("pick the pear",), codebase_version="v2.0")
    lines(root / "meta/tasks.jsonl", [{"task_index": 0, "task": "pick the pear"}, {"task_index": 1, "task": "valid"}])
    (root / "meta/tasks.jsonl").write_text((root / "meta/tasks.jsonl").read_text() + "\n")  # as their sets end
    entries = [{"episode_index": e, "tasks": list(listed), "length": n} for e, n in enumerate(LENGTHS)]
    lines(root / "meta/episodes.jsonl", entries)
    for name, value in columns.items():
        add_column(root, name.replace("__", "."), [value] * 3)
    return root


def test_marks_of_validity_are_no_instruction(tmp_path):
    assert outcome(gr00t(tmp_path / "d")) == [("pick the pear", [])] * 3


def test_annotations_are_asked_where_the_task_is_a_mark(tmp_path):
    root = gr00t(tmp_path / "d", ("valid",), annotation__human__validity=1, annotation__human__action__other=0)
    for path in root.glob("data/*/*.parquet"):
        change_table(path, lambda t: t.set_column(t.column_names.index("task_index"), "task_index", [[1] * t.num_rows]))
    assert outcome(root) == [("pick the pear", [])] * 3


@pytest.mark.parametrize("name", ["language_instruction", "annotation.human.task_description", "task", "subtask"])
def test_columns_of_text_are_asked_where_the_task_has_none(tmp_path, name):
    root = write_v2(tmp_path / "d", ("", "pull"))
    add_column(root, name, ["push", "never", None])
    assert outcome(root) == [("push", []), ("pull", []), ("", [])]


@pytest.mark.parametrize("column", [True, False])
def test_columns_of_text_are_asked_where_there_is_no_task_table(tmp_path, column):
    root = write_v2(tmp_path / "d", ("pull",))
    add_column(root, "language_instruction", ["push", "push it", ""])
    if column:
        (root / "meta/tasks.jsonl").unlink()
    else:
        for path in root.glob("data/*/*.parquet"):
            change_table(path, lambda t: t.drop_columns(["task_index"]))
        features = json.loads((root / "meta/info.json").read_text())["features"]
        change_info(root, features={k: v for k, v in features.items() if k != "task_index"})
    assert [x[0] for x in outcome(root)] == ["push", "push it", "pull"]


def test_the_first_language_column_with_a_text_is_used(tmp_path):
    root = write_v2(tmp_path / "d", ("",))
    add_column(root, "language_instruction", ["", "", "a"])
    add_column(root, "language_instruction_2", ["b", None, "c"])
    assert [x[0] for x in outcome(root)] == ["b", "", "a"]
