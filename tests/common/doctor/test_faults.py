"""How a command ends: one line for what a machine refuses, for a fault of its own, and for output that nobody reads."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dvla.common.doctor import doctor, faults
from dvla.errors import UserError
from support.cli_runner import Dvla, refused
from support.repository import ROOT

DVLA = (sys.executable, "-m", "dvla.cli")


def shell(line: str, where: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """A line of bash in which `dvla` is the command."""
    script = f'dvla() {{ "{sys.executable}" -m dvla.cli "$@"; }}; {line}'
    env = {**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT.parent)), **changes}
    return subprocess.run(["bash", "-c", script], cwd=where, env=env, capture_output=True, text=True, timeout=60)


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device", "/data/x"), ["/data/x: No space left", "free some space"]),
        (OSError(30, "Read-only file system", b"run"), ["run: Read-only", "choose another folder"]),
        (OSError(24, "Too many open files"), ["Too many open files", "ulimit -n"]),
        (OSError(40, "Too many levels of symbolic links", "a"), ["links point at each other"]),
        (FileNotFoundError(2, "No such file or directory"), ["the working directory was removed"]),
        (MemoryError(), ["not enough memory (MemoryError)", "smaller batch"]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), ["not enough memory", "smaller batch"]),
        (Exception("File too large (os error 27)"), ["File too large", "ulimit -f"]),
        (ConnectionResetError(104, "Connection reset by peer"), ["Connection reset by peer"]),
        (OSError("only words"), ["only words"]),
    ],
)
def test_what_a_machine_refuses_is_one_line(
    dvla: Dvla, monkeypatch: pytest.MonkeyPatch, error: Exception, words: list[str]
) -> None:
    monkeypatch.setattr(doctor, "examine", raising(error))
    refused(dvla("doctor"), *words)


def test_a_fault_is_one_line_and_its_traceback_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["dvla", "cache", "pull", "s3://me:secret@bucket/x"])
    monkeypatch.delenv(faults.VARIABLE, raising=False)
    assert faults.last_fault() is None
    assert faults.ended(raising(IndexError("list\nindex s3://me:secret@bucket"))) == faults.FAULT
    line = capsys.readouterr().err
    kept = faults.last_fault()
    assert kept is not None and kept.stat().st_mode & 0o777 == 0o600
    assert line == (
        f"error: unexpected IndexError: list; please report it with `dvla doctor --report`, which takes {kept} in\n"
    )
    text = kept.read_text()
    assert "dvla cache pull s3://bucket/x" in text and "raise error" in text and "secret" not in text

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    assert faults.ended(raising(IndexError())) == faults.FAULT
    assert "cannot be kept" in (said := capsys.readouterr().err) and "DVLA_TRACEBACK=1" in said
    monkeypatch.setenv(faults.VARIABLE, "1")
    with pytest.raises(IndexError):
        faults.ended(raising(IndexError()))


def test_other_ends(capsys: pytest.CaptureFixture[str]) -> None:
    assert faults.ended(lambda: None) == 0
    assert faults.ended(raising(UserError("a\nb"))) == 2 and capsys.readouterr().err == "error: a b\n"
    assert faults.ended(raising(KeyboardInterrupt())) == 130
    assert faults.ended(raising(BrokenPipeError(32, "Broken pipe"))) == 141
    assert capsys.readouterr().err.splitlines() == ["interrupted; rerun the same command to resume"]


def test_the_end_of_a_file_is_no_interruption(dvla: Dvla, monkeypatch: pytest.MonkeyPatch) -> None:
    """click takes every EOFError for Ctrl-D at a question."""
    monkeypatch.setattr(doctor, "examine", raising(EOFError("compressed file ended")))
    with pytest.raises(EOFError, match="compressed file ended"):
        dvla("doctor")


def test_output_that_nobody_takes(tmp_path: Path) -> None:
    launch = "dvla launch torchrun --print -- train --from-cache c --out r"
    piped = shell(f"dvla data list | head -1; {launch} | head -1", tmp_path)
    assert piped.stderr == "" and piped.stdout.startswith("family") and "#!/usr/bin/env bash" in piped.stdout
    for line in ("dvla data list", launch):
        full = shell(f"{line} >/dev/full", tmp_path)
        assert (full.returncode, full.stderr) == (
            2,
            "error: No space left on device; free some space, then rerun\n",
        )
    closed = shell("dvla data list >&- 2>&- <&-", tmp_path)
    assert closed.returncode == 0


def test_a_removed_working_directory(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    done = shell("cd gone; rmdir ../gone; dvla cache status cache", tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "the working directory was removed: change to another" in done.stderr


def test_no_empty_file_is_left_on_a_disk_that_is_full(dvla: Dvla, tmp_path: Path, cache: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for words in (("status", cache, "--json", tmp_path / "a.json"), ("inspect", cache, "--out", tmp_path / "b")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
        try:
            result = dvla("cache", *words)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        refused(result, "cannot write", "File too large")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_json_goes_into_what_is_no_file_too(dvla: Dvla, tmp_path: Path, cache: Path) -> None:
    """A device is written to, not replaced; a pipe that nobody reads is not waited for; a link is followed."""
    assert dvla("cache", "status", cache, "--json", "/dev/null").code == 0 and Path("/dev/null").is_char_device()
    os.mkfifo(tmp_path / "pipe")
    refused(dvla("cache", "status", cache, "--json", tmp_path / "pipe"), "cannot write", "give another --json")
    refused(dvla("cache", "status", cache, "--json", tmp_path), "Is a directory")
    (tmp_path / "file").touch()
    refused(dvla("cache", "status", cache, "--json", tmp_path / "file" / "x"), "file is no folder")
    (tmp_path / "link").symlink_to("file")
    assert dvla("cache", "status", cache, "--json", tmp_path / "link").code == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").stat().st_size > 100
