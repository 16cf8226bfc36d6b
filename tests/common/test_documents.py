"""The gate of documents: what is refused, and that the line names file, place, what was found and what is allowed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from dvla.common.documents import Count, Form, parse_json, parse_yaml, read_file, read_json, read_json_lines, read_yaml
from dvla.errors import UserError

# Each line holds the one before it eight times: 8 to the power of 9 values.
BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 8)}]\n" for before, name in zip("abcdefgh", "bcdefghi")
)


class Entry(Form):
    nbytes: Count


class Listing(Form):
    files: dict[str, Entry]
    note: str | None = None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"files": {"a": {"nbytes": 1.5}}}', "'files.a.nbytes' is 1.5, expected a valid integer"),
        ('{"files": {"a": {"nbytes": true}}}', "'files.a.nbytes' is True, expected a valid integer"),
        ('{"files": {"a": {"nbytes": -1}}}', "'files.a.nbytes' is -1, expected greater than or equal to 0"),
        ('{"files": {"a": {}, "b": {}}}', r"'files.a.nbytes' is missing \(and 1 more\)"),
        ('{"files": {}, "notes": "x"}', "'notes' is no key of it"),
        ("{}", "'files' is missing"),
        ("[]", r"it is \[\], expected a valid mapping"),
        ('{"files": {}, "files": {}}', "the key 'files' is given twice"),
        ('{"files": {}, "note": NaN}', "it holds NaN"),
        ('{"files": {}, "note": -Infinity}', "it holds -Infinity"),
        ('{"files": {}, "note": 1e999}', "it holds inf"),
        ('{"files": {}, "note": "\\ud800"}', "half of a surrogate pair"),
        ('{"files": 1' + "0" * 5000 + "}", "Exceeds the limit"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 70 + "1" + "}" * 70, "nested over 64 levels deep"),
        ("{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
    ],
)
def test_json_of_another_form_is_one_line(text: str | bytes, reason: str) -> None:
    data = text if isinstance(text, bytes) else text.encode()
    with pytest.raises(UserError, match=reason) as told:
        parse_json(data, "list.json", Listing, "fetch it again")
    assert str(told.value).startswith("list.json ") and str(told.value).endswith("; fetch it again")
    assert "\n" not in str(told.value) and len(str(told.value)) < 250


def test_json_of_its_form_is_the_plain_value(tmp_path: Path) -> None:
    value: dict[str, Any] = {"files": {"a": {"nbytes": 3}}}
    (tmp_path / "a.json").write_text('{"files": {"a": {"nbytes": 3}}}')
    assert read_json(tmp_path / "a.json", Listing) == value
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    assert read_json_lines(tmp_path / "a.jsonl", dict[str, int]) == [{"a": 1}, {"a": 2}]
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": "2"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl line 2 is damaged: 'a' is '2', expected a valid integer"):
        read_json_lines(tmp_path / "a.jsonl", dict[str, int])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\na: 2", "'a' is given twice"),
        ("a: .inf", "it holds inf"),
        ("- " * 2000, "nested too deeply"),
        ("a: &x [*x]", "nested over"),
        ("? [1, 2]\n: 3", "unhashable"),
        ("a: !!python/object:os.system x", "python/object"),
        ("\x00", "not valid YAML"),
        ("a: [", "not valid YAML"),
        (BOMB, "stands for more than"),
    ],
)
def test_yaml_of_another_kind_is_one_line(text: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as told:
        parse_yaml(text, "a.yaml")
    assert str(told.value).startswith("a.yaml is not valid YAML: ") and "\n" not in str(told.value)


def test_yaml_as_people_write_it(tmp_path: Path) -> None:
    text = "base: &base {lr: 1e-4, day: 2020-01-01}\nrun:\n  <<: *base\n  steps: 10\n"
    file = tmp_path / "a.yaml"
    file.write_text("\ufeff" + text)
    assert read_yaml(file)["run"] == {"lr": "1e-4", "day": "2020-01-01", "steps": 10}
    file.write_text("- 1")
    with pytest.raises(UserError, match=r"expected a mapping at the top level, found \[1\]"):
        read_yaml(file)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"12345")
    for name, most, reason in [
        ("pipe", 9, "it is a pipe, expected a file"),  # nobody writes to it: opening it would wait
        ("", 9, "it is a folder, expected a file"),
        ("missing", 9, "No such file"),
        ("x" * 300, 9, "File name too long"),
        ("a\x00b", 9, "null (byte|character)"),
        ("large", 4, "it has 5 bytes, expected at most 4"),
    ]:
        with pytest.raises(UserError, match=reason):
            read_file(tmp_path / name, most)
    assert read_file(tmp_path / "large", 5) == b"12345"
