"""Training from a cache of the hub by its id: a hub on this machine, the hub's own client and fsspec class."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dvla.cache.store.cache import Cache
from dvla.common.documents import read_json
from dvla.common.hub import dataset_url
from dvla.errors import UserError
from dvla.stages.caching.transfer import object_store
from support.fake_hub import environment, hub

SETTINGS = "--model-size tiny --dit.horizon=4 --dit.width=16 --dit.blocks=1 --dit.heads=2 --steps 4 --batch-size 4"
TINY = shlex.split(f"{SETTINGS} --eval-every 0 --num-workers 1 --device cpu --panels.every=0")
RUNNER = """
import json, sys
from dvla.cli import run
from dvla.errors import UserError
for words in json.loads(sys.argv[1]):
    try:
        run(words)
        print("DONE")
    except UserError as error:
        print("REFUSED", error)
"""


def perform(commands: list[list[str]], where: Path, variables: dict[str, str]) -> list[str]:
    """Run command lines in a process of their own; the last line that each printed."""
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, json.dumps(commands)], cwd=where, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (where / "out").write_text(done.stdout)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("DONE", "REFUSED"))]
    assert len(lines) == len(commands), done.stdout
    return lines


def test_training_from_a_cache_of_the_hub(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README.md").write_text("no cache")
    with hub(cache=cache, gated=cache, other=tmp_path / "other") as server:
        train = ["train", *TINY, "--from-cache"]
        found = perform(
            [
                [*train, "me/cache", "--out", "run", "--stop-after", "2"],
                [*train, "me/cache@v1", "--out", "run"],  # another name of the same cache
                [*train, str(cache), "--out", "straight"],
                ["cache", "pull", "me/cache", "--out", "pulled"],
                [*train, "me/cache@v9", "--out", "none"],
                [*train, "me/none", "--out", "none"],
                [*train, "me/gated", "--out", "none"],
                [*train, "me/other", "--out", "none"],
                ["cache", "pull", "me/none", "--out", "none"],
            ],
            tmp_path,
            environment(server, tmp_path / "home"),
        )
        said = (tmp_path / "out").read_text()
    assert found[:4] == ["DONE"] * 4, said
    assert f"hf://datasets/me/cache are kept in {tmp_path / 'home' / 'dvla' / 'caches'}" in said
    losses = [[json.loads(line)["loss"] for line in open(tmp_path / run / "log.jsonl")] for run in ("run", "straight")]
    assert losses[0] and losses[0][-1] == losses[1][-1]
    assert read_json(tmp_path / "run" / "config.json")["cache"] == "me/cache@v1"
    assert Cache.open(tmp_path / "pulled").manifest == Cache.open(cache).manifest
    assert not (tmp_path / "none").exists() and (tmp_path / "home" / "dvla" / "caches" / ".locks").is_dir()
    for line, words in zip(
        found[4:],
        (
            "no folder me/cache@v9, and of the hub: no cache at hf://datasets/me/cache@v9: it has no such revision",
            "no folder me/none, and of the hub: no cache at hf://datasets/me/none: there is none of that name",
            "no cache at hf://datasets/me/gated: its owner grants access on request; ask on its page",
            "no finished cache at hf://datasets/me/other: it has no manifest.json, which is written last",
            "no cache at hf://datasets/me/none: there is none of that name, or it is private; check it",
        ),
    ):
        assert line.startswith("REFUSED") and words in line and len(line) < 400, line


def test_offline_and_without_a_network(tmp_path: Path, cache: Path) -> None:
    with hub() as server:
        variables = environment(server, tmp_path / "home")
    train = [["train", *TINY, "--from-cache", "me/cache", "--out", "none"]]
    (gone,) = perform(train, tmp_path, variables)  # nobody listens there any more
    assert "no cache at hf://datasets/me/cache: the hub cannot be reached; check the network" in gone
    (offline,) = perform(train, tmp_path, variables | {"HF_HUB_OFFLINE": "1"})
    assert "no cache at hf://datasets/me/cache: HF_HUB_OFFLINE is set" in offline


def test_what_is_an_id_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "caches" / "droid").mkdir(parents=True)
    assert dataset_url("me/droid") == "hf://datasets/me/droid"
    assert dataset_url("me/droid@v1.0") == "hf://datasets/me/droid@v1.0"
    for name in (
        "caches/droid",
        "droid",
        "./me/droid",
        "/me/droid",
        "me/droid/part",
        "me/../droid",
        "s3://me/droid",
        "",
    ):
        assert dataset_url(name) is None


def test_pushing_by_id(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What may be meant as a folder is no repository."""
    pushed: list[str] = []
    monkeypatch.setattr(object_store, "_push_to_hub", lambda cache, url, *_: pushed.append(url))
    monkeypatch.chdir(tmp_path)
    object_store.push_cache(cache, "me/cache")
    assert pushed == ["hf://datasets/me/cache"]
    (tmp_path / "backup").mkdir()
    for name in ("backup/cache", "me/cache@v1", str(tmp_path / "copy")):
        with pytest.raises(
            UserError, match="is not a URL; give one like s3://bucket/cache or hf://datasets/owner/name"
        ):
            object_store.push_cache(cache, name)
    assert len(pushed) == 1
