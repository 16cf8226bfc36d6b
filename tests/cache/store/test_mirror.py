"""Caches behind fsspec URLs: the same batches, each shard fetched once, whole or not at all, within a bound."""

from __future__ import annotations

import contextlib
import functools
import http.server
import itertools
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from dvla.cache.loader.loader import Loader
from dvla.cache.store import locations
from dvla.cache.store import mirror as remote
from dvla.cache.store.cache import Cache
from dvla.cache.store.locations import Url
from dvla.cache.store.shard_reader import ShardFiles
from dvla.common.config import from_mapping
from dvla.errors import UserError
from dvla.stages.training.config import TrainConfig
from dvla.stages.training.train import train
from support import synthetic_cache as synthetic


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("remote") / "cache"
    synthetic.build(path, plan=synthetic.make_plan(**synthetic.SETTINGS["int8-variants"]))
    return path


@pytest.fixture
def url(built: Path, request: pytest.FixtureRequest) -> str:
    """The cache in fsspec's file system in memory, which it may change."""
    memory = fsspec.filesystem("memory")
    name = f"/{request.node.originalname}"
    memory.put(str(built), name, recursive=True)
    request.addfinalizer(lambda: memory.rm(name, recursive=True))
    return f"memory:/{name}"


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often each file was opened at its place."""
    counter: Counter = Counter()
    real = Url.open
    monkeypatch.setattr(Url, "open", lambda self, name: counter.update([name]) or real(self, name))
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    return counter


def shards(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and remote._is_shard(p.relative_to(folder).as_posix())]


def nbytes(paths: list[Path]) -> int:
    """What they hold; some may be renamed or removed at this very moment."""
    total = 0
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def assert_same_batches(a: Loader, b: Loader, steps: int) -> None:
    for one, other in itertools.islice(zip(a, b), steps):
        for name, value in vars(one.batch).items():
            assert (value is None) == (getattr(other.batch, name) is None) and (
                value is None or torch.equal(value, getattr(other.batch, name))
            ), name


@pytest.mark.parametrize("order", ["global", "block"])
def test_the_same_batches_and_each_file_once(
    built: Path, url: str, fetched: Counter, tmp_path: Path, order: str
) -> None:
    cache = Cache.open(url, local=tmp_path / "local")
    assert set(fetched) == {n for n in cache.manifest["files"] if not remote._is_shard(n)} | {
        "manifest.json"
    }  # tables, at once
    arguments = {"batch_size": 8, "seed": 3, "threads": 4, "order": order, "augment": True}
    with Loader(cache, **arguments) as ours, Loader(Cache.open(built), **arguments) as theirs:
        assert_same_batches(ours, theirs, 30)
    assert set(fetched.values()) == {1}
    for path in shards(cache.path):
        assert path.read_bytes() == (built / path.relative_to(cache.path)).read_bytes()
    again = Cache.open(url, local=tmp_path / "local")
    assert fetched.pop("manifest.json") == 2 and set(fetched.values()) == {1} and again.path == cache.path
    assert not list((tmp_path / "local").rglob("*.tmp-*"))


def test_a_bound_holds_and_the_oldest_go(built: Path, url: str, fetched: Counter, tmp_path: Path) -> None:
    size = max(p.stat().st_size for p in shards(built))
    cache = Cache.open(url, local=tmp_path / "local", local_nbytes=5 * size)
    arguments = {"batch_size": 8, "seed": 3, "threads": 3, "augment": True}
    with Loader(cache, **arguments) as ours, Loader(Cache.open(built), **arguments) as theirs:
        for _ in range(4):
            assert_same_batches(ours, theirs, 5)
            assert nbytes(shards(cache.path)) <= (5 + 3) * size  # and what each thread has just fetched
            removed = [
                shard for shard in list(ours._assemble.files._open.values()) if not os.fstat(shard.handle).st_nlink
            ]
            assert len(removed) <= 2 * 3  # a file that is removed is let go, so that its room is free
    assert nbytes(shards(cache.path)) <= 5 * size and max(fetched.values()) > 1
    front = cache.named("alpha")
    files = cache.shard_files()
    out = [memoryview(bytearray(synthetic.TOKENS * synthetic.WIDTH))], [memoryview(bytearray(4 * synthetic.TOKENS))]
    front.read_features("front", np.array([0]), out[0], files, scales=out[1])
    for path in shards(cache.path):
        path.unlink()
    front.read_features(
        "front", np.array([1]), out[0], files, scales=out[1]
    )  # a file in use stays readable when it is removed
    files.close()


def test_a_file_altered_on_the_way_is_not_used(url: str, fetched: Counter, tmp_path: Path) -> None:
    memory, name = fsspec.filesystem("memory"), "beta/features/top/c/1/0/0"
    path = f"{url.removeprefix('memory:/')}/{name}"
    data = memory.cat(path)
    cache = Cache.open(url, local=tmp_path / "local")
    for bad in (data[:-1], b"x" + data[1:], None):
        memory.pipe(path, bad) if bad is not None else memory.rm(path)
        fetched.clear()
        with pytest.raises(UserError, match=f"{name}.*(damaged|does not exist)"):
            cache.named("beta").features("top", np.array([16]))
        assert fetched[name] == remote.ATTEMPTS and not [
            p for p in cache.path.rglob("*") if p.parent.name == "0" and "/1/" in str(p)
        ]
    memory.pipe(path, data)
    assert cache.named("beta").features("top", np.array([16])).shape == (1, synthetic.TOKENS, synthetic.WIDTH)


def test_a_bad_moment_is_survived(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fetched: Counter) -> None:
    real, failed = Url.open, set()

    def flaky(self: Url, name: str) -> object:
        if name not in failed and name != "manifest.json":
            failed.add(name)
            raise ConnectionError("reset by peer")
        return real(self, name)

    monkeypatch.setattr(Url, "open", flaky)
    cache = Cache.open(url, local=tmp_path / "local")
    assert cache.named("beta").features("top", np.array([3])).any() and len(failed) > 10


def test_what_is_refused(built: Path, url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give a local folder"):
        Cache.open(url)
    with pytest.raises(UserError, match="no finished cache at memory://nowhere"):
        Cache.open("memory://nowhere", local=tmp_path / "local")
    with pytest.raises(UserError, match="nosuch"):
        Cache.open("nosuch://bucket/cache", local=tmp_path / "local")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another local folder"):
        Cache.open(url, local=tmp_path / "file")
    memory = fsspec.filesystem("memory")
    manifest = f"{url.removeprefix('memory:/')}/manifest.json"
    memory.pipe(manifest, memory.cat(manifest).replace(b'"format": 2', b'"format": 1'))
    with pytest.raises(UserError, match="format 1, this version reads"):
        Cache.open(url, local=tmp_path / "local")


class Loud(MemoryFileSystem):
    """Logs the traceback of what it raises, as gcsfs does."""

    protocol = "loud"

    def open(self, path: str, *args: Any, **kwargs: Any) -> Any:
        try:
            raise OSError("Name or service not known")
        except OSError:
            logging.getLogger(__name__).exception("a traceback")
            raise


def test_a_store_that_logs_does_not_print(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fsspec.register_implementation("loud", Loud)
    monkeypatch.setattr(logging.root, "handlers", [])  # as in a process of its own: what nobody handles is printed
    logging.getLogger(__name__).error("heard")
    with pytest.raises(UserError, match="Name or service not known"):
        Cache.open("loud://bucket/cache", local=tmp_path)
    assert "heard" in (shown := capsys.readouterr().err) and "Traceback" not in shown


def test_a_manifest_that_leads_out_of_the_folder_is_refused(url: str, tmp_path: Path) -> None:
    memory, manifest = fsspec.filesystem("memory"), f"{url.removeprefix('memory:/')}/manifest.json"
    whole = memory.cat(manifest)
    for name in (b"../../evil", b"/evil"):
        memory.pipe(manifest, whole.replace(b'"files": {', b'"files": {"' + name + b'": {"bytes": 1, "crc32c": 1}, '))
        with pytest.raises(UserError, match="outside the cache"):
            Cache.open(url, local=tmp_path / "local")


def test_what_is_there_already_is_opened_without_tending(
    built: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tending fetched files costs a call per open one, so it is done only after a download; opening marks it used."""
    cache = Cache.open(url, local=tmp_path / "local")
    everything = [
        (d, view, rows)
        for d in cache.datasets
        for view in d.views
        for rows in (np.arange(0, d.observations, synthetic.SHARD),)
    ]
    for d, view, rows in everything:
        d.features(view, rows)
    tended, path = [], cache.named("beta").shard_path("top", 0)
    os.utime(path, (0, 0))
    monkeypatch.setattr(ShardFiles, "_tend", lambda self: tended.append(self))
    for d, view, rows in everything:
        out = (
            [memoryview(bytearray(synthetic.TOKENS * synthetic.WIDTH)) for _ in rows],
            [memoryview(bytearray(4 * synthetic.TOKENS)) for _ in rows],
        )
        d.read_features(view, rows, out[0], cache.shard_files(), scales=out[1])
    assert not tended and path.stat().st_mtime > 0


def test_another_generation_is_another_folder(built: Path, url: str, tmp_path: Path) -> None:
    first = Cache.open(url, local=tmp_path / "local")
    synthetic.build(tmp_path / "other", plan=synthetic.make_plan(shard_frames=8))
    memory, path = fsspec.filesystem("memory"), url.removeprefix("memory:/")
    memory.rm(path, recursive=True)
    memory.put(str(tmp_path / "other"), path, recursive=True)
    second = Cache.open(url, local=tmp_path / "local")
    assert second.path != first.path
    np.testing.assert_array_equal(second.named("beta").feature("top", 9), synthetic.feature("beta", "top", 9))


READ = """
import sys
from dvla.cache.store.cache import Cache
from dvla.cache.loader.loader import Loader
with Loader(Cache.open(sys.argv[1], local=sys.argv[2]), batch_size=8, threads=4, seed=int(sys.argv[3])) as loader:
    print(sum(float(next(loader).batch.tokens.double().sum()) for _ in range(12)))
"""


@contextlib.contextmanager
def served(folder: Path, on_get: Callable[[str], object]) -> Iterator[str]:
    """The host and port at which the files of a folder are; `on_get(path)` comes before each answer."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            on_get(self.path)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a reader that gave up
                super().do_GET()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_stalled_server_is_given_up_in_one_line(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locations, "PATIENCE", 0.3)
    again = threading.Event()
    with served(built.parent, lambda path: again.wait(20) if "action/c" in path else None) as host:
        url = f"http://me:secret@{host}/{built.name}"
        with pytest.raises(UserError, match=r"has not answered for 0.3 s; check the network, then rerun") as error:
            Cache.open(url, local=tmp_path / "local")
        assert "secret" not in str(error.value) and "\n" not in str(error.value)
        again.set()
        monkeypatch.setattr(locations, "PATIENCE", 20.0)
        assert Cache.open(url, local=tmp_path / "local").frames == Cache.open(built).frames  # what was copied is used


def test_passwords_of_an_address_stay_out_of_the_run(built: Path, tmp_path: Path) -> None:
    with served(built.parent, lambda path: None) as host:
        settings = {"model_size": "tiny", "dit": {"width": 32, "blocks": 1, "heads": 2, "horizon": 4}, "steps": 1}
        values = {"cache": f"http://me:secret@{host}/{built.name}", "out": str(tmp_path / "run"), "batch_size": 4}
        more = {"local": str(tmp_path / "local"), "device": "cpu", "eval_every": 0, "threads": 1}
        train(from_mapping(TrainConfig, {**settings, **values, **more}), say=lambda _: None)
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert f"http://{host}/{built.name}" in (tmp_path / "run/config.json").read_text()
    assert [p.name for p in files if b"secret" in p.read_bytes()] == []


def test_two_processes_share_a_folder_over_http(built: Path, tmp_path: Path) -> None:
    asked: Counter = Counter()
    shutil.copytree(built, tmp_path / "www/cache")
    with served(tmp_path / "www", lambda path: asked.update([path])) as host:
        command = [sys.executable, "-c", READ, f"http://{host}/cache", str(tmp_path / "local"), "1"]
        readers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        said = [reader.communicate(timeout=240)[0] for reader in readers]
    with Loader(Cache.open(built), batch_size=8, threads=1, seed=1) as loader:
        expected = sum(float(next(loader).batch.tokens.double().sum()) for _ in range(12))
    assert [r.returncode for r in readers] == [0, 0] and [float(s) for s in said] == [expected, expected]
    assert {n for n, count in asked.items() if count > 1} <= {
        "/cache/manifest.json"
    }  # each of the others once, by one of them
