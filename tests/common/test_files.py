"""Durable files, locks and JSON documents."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from dvla.common.documents import json_bytes, read_json
from dvla.common.files import file_crc32c, lock_folder, names_full_disk, new_folder, write_file
from dvla.errors import UserError


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "deep" / "file.json"
    assert write_file(file, json_bytes({"b": "é", "a": [1]})) == file_crc32c(file)
    assert file.read_text() == '{\n "a": [\n  1\n ],\n "b": "é"\n}\n' and read_json(file) == {"a": [1], "b": "é"}
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    with pytest.raises(OSError):
        write_file(file, b"other")
    assert read_json(file)["a"] == [1] and [p.name for p in file.parent.iterdir()] == ["file.json"]
    for path in (tmp_path / "none.json", file.parent):
        with pytest.raises(UserError, match=f"cannot read {path}"):
            read_json(path)


def test_a_folder_appears_only_when_its_block_succeeds(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out") as part:
        (part / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "out") as part:
        (part / "whole").write_text("x")
    with pytest.raises(UserError, match="exists already"), new_folder(tmp_path / "out"):
        pass
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["whole"]


def test_one_process_holds_the_lock(tmp_path: Path) -> None:
    with lock_folder(tmp_path), pytest.raises(UserError, match="another process is building .*; wait for it"):
        lock_folder(tmp_path)
    lock_folder(tmp_path).close()


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    class Writer:
        path = tmp_path

        @names_full_disk
        def write(self, code: int) -> None:
            raise OSError(code, "No space left on device")

    with pytest.raises(UserError, match="No space left .* rerun the same command to resume"):
        Writer().write(errno.ENOSPC)
    with pytest.raises(OSError):
        Writer().write(errno.EIO)
