"""`dvla doctor --report`: what a report of a bug needs, and none of what it must not hold."""

from __future__ import annotations

import getpass
import os
import socket
from pathlib import Path

import pytest

from dvla import __version__
from dvla.common.doctor import faults
from dvla.common.doctor.report import scrubbed
from support.cli_runner import Dvla, refused

TOKEN, KEY = "hf_" + "aBcDeFgH" * 4, "0123456789abcdef" * 2 + "01234567"


def test_the_report(dvla: Dvla, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(getpass, "getuser", lambda: "ada")
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu7.lab.example")
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("HF_TOKEN", "plain-words-of-ada's")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("HF_HOME", "/home/ada/hf")
    planted = f"""Traceback (most recent call last):
  File "/home/ada/code/x.py", line 1, in <module>
  File "/home/bob/y.py", line 2, in <module>
s3://AKIAABCDEFGHIJKLMNOP:hunter2@bucket/x?sig=abc for ada on gpu7 and gpu7.lab.example, plain-words-of-ada's
Authorization: Bearer {KEY} token={TOKEN} password: "hunter3" api_key=abcdef ada@lab.example
KeyError: 'observation.state'"""
    (tmp_path / f"{faults.PREFIX}one.txt").write_text(planted)
    result = dvla("doctor", "--report", tmp_path / "bug.md")
    text = (tmp_path / "bug.md").read_text()
    assert result.code == 0 and "bug.md: written" in result.out and dvla("doctor", "--report").out.startswith("# dvla")
    for wanted in (
        f"| dvla | {__version__} |",
        "| Python | CPython 3",
        "| memory |",
        "| working folder |",
        "| transformers |",
        "| OMP_NUM_THREADS | 3 |",
        "| HF_HOME | ~/hf |",
        '"~/code/x.py", line 1',
        "KeyError: 'observation.state'",
        "s3://bucket/x for USER on HOST and HOST",
    ):
        assert wanted in text, wanted
    for secret in ("hunter", "AKIA", TOKEN, KEY, "abcdef", "sig=", "ada", "bob", "gpu7", "plain-words", "/home"):
        assert secret not in text, secret


def test_what_is_no_secret_stays() -> None:
    text = "tokens per image 49; the key 'shape' is given twice; /data/root/x; cache.gen-1 at step 1000; --token-file"
    assert scrubbed(text, {}) == text
    assert scrubbed("x" * 100 + " at /root/cache", {"MY_KEY": "short"}).endswith(" at ~/cache")
    assert scrubbed("a\x1b[2Jb", {}) == "a\N{REPLACEMENT CHARACTER}[2Jb"


def test_a_file_alone_is_refused(dvla: Dvla, tmp_path: Path) -> None:
    refused(dvla("doctor", tmp_path / "bug.md"), "--report alone")
    refused(dvla("doctor", "--report", tmp_path), "cannot write", "Is a directory")
    assert os.listdir(tmp_path) == []
