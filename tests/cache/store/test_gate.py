"""What may lie in the place of a cache's files: every document and table is refused, or gives what it did."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dvla.cache.store.cache import Cache
from dvla.cache.store.checksums import verify_checksums
from dvla.cache.store.codec import Compression
from dvla.cache.store.feature_format import FeatureFormat
from dvla.cache.store.manifest import plan_of, read_fingerprint, shard_commit, tables_commit
from dvla.cache.store.plan import MOST_FRAMES
from dvla.cache.store.shard_writer import index_nbytes
from dvla.cache.store.writer import CacheWriter
from dvla.common.files import crc32c
from dvla.errors import UserError
from dvla.stages.caching.transfer.object_store import pull_cache, push_cache
from dvla.stages.caching.upkeep.status import status
from support import synthetic_cache as synthetic

TABLE, SHARD = "alpha/action/c/0/0", "alpha/features/front/c/0/0/0"
FILES = ("fingerprint.json", "manifest.json", "alpha/zarr.json", "alpha/action/zarr.json", TABLE, SHARD)


@pytest.fixture
def copy(cache: Path, tmp_path: Path) -> Path:
    return shutil.copytree(cache, tmp_path / "cache")


@pytest.fixture(autouse=True)
def nothing_waits() -> Iterator[None]:
    """What waits for a pipe would wait for ever."""

    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def edit(file: Path, change: Any) -> None:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def read_all(path: Path) -> None:
    samples = Cache.open(path).dataset()
    for i in range(len(samples)):
        samples[i]


@pytest.mark.parametrize("what", ["pipe", "device", "folder", "itself", "another"])
@pytest.mark.parametrize("name", FILES)
def test_only_the_file_that_was_written_is_read(copy: Path, name: str, what: str) -> None:
    (copy / name).unlink()
    if what == "pipe":
        os.mkfifo(copy / name)
    elif what == "folder":
        (copy / name).mkdir()
    else:
        (copy / name).symlink_to({"device": "/dev/zero", "itself": name, "another": copy / "quarantine.jsonl"}[what])
    with pytest.raises(UserError) as error:
        read_all(copy)
    assert "\n" not in str(error.value)
    try:
        assert [p for p in verify_checksums(copy) if p.startswith(f"{name}: ")]
    except UserError as refused:
        assert name in str(refused) or "is incomplete" in str(refused)


@pytest.mark.parametrize("name", [".lock", ".commits/alpha/tables.json", ".commits/alpha/front/0.json"])
def test_a_pipe_among_the_records_of_a_build_is_not_waited_for(copy: Path, name: str) -> None:
    (copy / "manifest.json").unlink()
    (copy / name).unlink()
    os.mkfifo(copy / name)
    assert not status(copy)[0].finished
    if name == ".lock":
        with pytest.raises(UserError, match="cannot write a cache"):
            synthetic.build(copy)
    else:
        synthetic.build(copy)
        assert verify_checksums(copy) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m["files"].pop(TABLE), "'bytes' is"),
        (lambda m: m.update(frames=1), "'frames' is 1, its parts have 169"),
        (lambda m: m.update(tokens=4), "tokens are 3, the manifest has 4"),
        (lambda m: m["datasets"][0].update(quarantined=9), "are quarantined, the manifest has 9"),
        (lambda m: m["datasets"][0].update(episodes=3), "the manifest 3"),
        (lambda m: m["datasets"][0].update(name="../alpha"), "cannot name a dataset"),
        (lambda m: m["files"].update({"../x": m["files"][TABLE]}), "outside the cache"),
        (lambda m: m["files"].update({"a\nb": m["files"][TABLE]}), "outside the cache"),
        (lambda m: m["files"].update({"manifest.json": m["files"][TABLE]}), "outside the cache"),
        (lambda m: m["files"][TABLE].update(crc32c=2**32), "expected less than 4294967296"),
    ],
)
def test_a_manifest_agrees_with_itself_and_with_the_datasets(copy: Path, change: Any, said: str) -> None:
    edit(copy / "manifest.json", change)
    with pytest.raises(UserError, match=said):
        Cache.open(copy)


def test_a_manifest_that_lacks_files_is_no_whole_cache(copy: Path, tmp_path: Path) -> None:
    """Its bytes add up, and what it does not list would never be checked."""

    def forget(manifest: dict[str, Any]) -> None:
        manifest["bytes"] -= manifest["files"].pop(SHARD)["bytes"]

    edit(copy / "manifest.json", forget)
    assert verify_checksums(copy) == [f"{SHARD}: manifest.json does not list it"]
    with pytest.raises(UserError, match="repair"):
        push_cache(copy, f"local://{tmp_path}/remote")
    with pytest.raises(UserError, match="no whole cache"):
        pull_cache(f"local://{copy}", tmp_path / "pulled")
    assert not (tmp_path / "pulled/manifest.json").exists()


def test_a_document_that_was_changed_is_refused_when_opened(copy: Path) -> None:
    edit(copy / "alpha/zarr.json", lambda d: d["attributes"].update(control_hz=31.0))
    with pytest.raises(UserError, match=r"alpha/zarr.json is damaged: it is not what the build wrote; run `dvla cache"):
        Cache.open(copy)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda e: e.update(length=MOST_FRAMES + 1), "less than or equal to"),
        (lambda e: e.update(length=MOST_FRAMES), "shards, at most"),  # a list of them would not fit in memory
        (lambda e: e.update(length=MOST_FRAMES, kept=[[0, 2**40]]), "shards, at most"),
        (lambda e: e.update(kept=[[0, 99]]), "no sense in the kept frames"),
        (lambda e: e.update(kept=[[3, 4], [0, 1]]), "no sense in the kept frames"),
        (lambda e: e.update(view_hashes=["x"]), "no sense in the kept frames or hashes"),
        (lambda e: e.update(length=True), "'store.datasets.alpha.episodes.10.length' is True"),
    ],
)
def test_a_plan_that_makes_no_sense_is_a_line(copy: Path, change: Any, said: str) -> None:
    edit(copy / "fingerprint.json", lambda d: change(d["store"]["datasets"]["alpha"]["episodes"]["10"]))
    with pytest.raises(UserError, match=said):
        plan_of(read_fingerprint(copy), "fingerprint.json")
    with pytest.raises(UserError, match=said):
        status(copy)


def test_records_of_an_unfinished_build_that_were_changed_are_made_again(cache: Path, copy: Path) -> None:
    (copy / "manifest.json").unlink()
    plan = synthetic.make_plan()
    first, second = plan.tasks()[:2]
    tables = tables_commit(copy, "alpha")
    edit(tables, lambda record: record["attributes"].update(control_hz=31.0))
    shutil.copy(shard_commit(copy, second), shard_commit(copy, first))  # the other shard's files are all there
    writer = CacheWriter(copy, plan, None)
    assert writer.missing() == [first] and writer.tables_missing() == ["alpha"]
    synthetic.build(copy)
    for name in ("manifest.json", "alpha/zarr.json", ".commits/alpha/tables.json"):
        assert (copy / name).read_bytes() == (cache / name).read_bytes()


def test_a_resumed_pull_takes_only_what_is_as_it_was_written(copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "pulled"
    pull_cache(f"local://{copy}", out)
    (out / "manifest.json").rename(tmp_path / "manifest.json")
    (out / ".pulling").write_text(f"{crc32c((copy / 'manifest.json').read_bytes()):08x} local://{copy}\n")
    data = (out / TABLE).read_bytes()
    (out / TABLE).write_bytes(b"\1" + data[1:])
    again = pull_cache(f"local://{copy}", out)
    assert again.found == again.files - 1 and (out / TABLE).read_bytes() == data


def test_a_remote_file_without_end_is_given_up(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dvla.cache.store.mirror.ATTEMPTS", 1)
    (copy / TABLE).unlink()
    (copy / TABLE).symlink_to("/dev/zero")
    with pytest.raises(UserError, match="is damaged"):
        Cache.open(f"local://{copy}", local=tmp_path / "local")


def test_a_key_that_a_cache_lacks_is_a_line(copy: Path) -> None:
    """Only some commands need it: a cache made by hand has none."""
    attributes = Cache.open(copy).datasets[0].attributes
    with pytest.raises(UserError, match=r"alpha/zarr.json has no 'config', which this needs"):
        attributes["config"]


@pytest.mark.parametrize(("place", "value"), [(0, 2**62), (1, 2**62), (1, 2**63), (0, 10**9)])
def test_an_index_points_into_its_shard(tmp_path: Path, place: int, value: int) -> None:
    """Of a compressed one as much is read as it says: its checksum is right."""
    synthetic.build(tmp_path / "c", plan=synthetic.make_plan(format=FeatureFormat("float16", "zstd")))
    file = tmp_path / "c" / SHARD
    data = bytearray(file.read_bytes())
    start = len(data) - index_nbytes(synthetic.SHARD)
    data[start + 8 * place : start + 8 * place + 8] = value.to_bytes(8, "little")
    data[-4:] = crc32c(bytes(data[start:-4])).to_bytes(4, "little")
    file.write_bytes(data)
    assert [p.split(":")[0] for p in verify_checksums(tmp_path / "c")] == [SHARD]
    with pytest.raises(UserError, match="is damaged .truncated, or its index is wrong"):
        read_all(tmp_path / "c")


def test_a_record_that_would_grow_too_large_is_not_decompressed() -> None:
    packed = Compression("zstd", 2).encode(np.zeros(1 << 20, np.int16))
    for length in (0, 100, 1 << 20, (1 << 21) + 2):
        with pytest.raises(ValueError, match=f"its header says {1 << 21} bytes, not {length}"):
            Compression("zstd", 2).decode(packed, memoryview(bytearray(length)))
    for size in (2, 300, 600, 70_000, 1 << 21):
        values = np.random.default_rng(0).integers(0, 255, size // 2, np.int16)
        target = bytearray(size)
        Compression("zstd", 2).decode(Compression("zstd", 2).encode(values), memoryview(target))
        assert target == values.tobytes()


@pytest.mark.parametrize("name", ["manifest.json", "alpha/zarr.json", "alpha/episodes/id/c/0", "fingerprint.json"])
def test_a_copy_of_a_remote_document_that_was_changed_is_fetched_again(copy: Path, tmp_path: Path, name: str) -> None:
    url, local = f"local://{copy}", tmp_path / "local"
    file = Cache.open(url, local=local).path / name
    data = file.read_bytes()
    file.write_bytes(data[:-2] + b"\1\1")
    Cache.open(url, local=local)
    assert file.read_bytes() == data
    file.unlink()
    os.mkfifo(file)
    Cache.open(url, local=local)
    assert file.read_bytes() == data
