"""Open shard files: bounded, shared by threads, and right for shards that other tools wrote. Caches of many shards."""

from __future__ import annotations

import gc
import os
import resource
import threading
from pathlib import Path

import numpy as np
import pytest

from dvla.cache.loader.loader import Loader
from dvla.cache.store import shard_reader as shard
from dvla.cache.store.cache import Cache
from dvla.cache.store.shard_reader import ShardFiles, read_records
from dvla.cache.store.shard_writer import ShardWriter, index_nbytes
from dvla.common.files import crc32c
from dvla.errors import UserError
from support import sparse_cache as sparse

SHARDS, ROWS = 400, 5


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("many") / "cache"
    sparse.build(path, sparse.make_plan(SHARDS, ROWS, tokens=2, width=8, views=("front", "wrist"), episode=37))
    return path


def handles() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_the_limit_is_a_part_of_what_the_process_may_open(monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, limit in ((1024, 128), (64, 16), (1 << 20, 4096)):
        monkeypatch.setattr(resource, "getrlimit", lambda kind, soft=soft: (soft, 1 << 20))
        assert ShardFiles()._limit == limit


@pytest.mark.parametrize("order", ["global", "block", "sequential"])
def test_many_shards_are_read_through_few_files(many: Path, monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (128, 128))  # so 16 files
    cache = Cache.open(many)
    gc.collect()  # what earlier tests left
    before, threads, seen = handles(), 8, []
    with Loader(cache, batch_size=40, threads=threads, order=order, seed=1) as loader:
        for _ in range(SHARDS * ROWS // 40):
            batch = next(loader).batch
            assert handles() <= before + 16 + threads + 4  # what is being read, what is read ahead
            np.testing.assert_array_equal(sparse.row_of(batch.tokens.numpy()), batch.frame_index)
            np.testing.assert_array_equal(
                sparse.row_of(batch.tokens[:, 2:].numpy()), batch.frame_index
            )  # the second view
            seen += batch.frame_index.tolist()
    assert sorted(seen) == list(range(SHARDS * ROWS))
    assert handles() == before


def test_an_index_is_read_once(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards without gaps are opened again without reading their index, unless they have changed in size."""
    reads, dataset = [], Cache.open(many).datasets[0]
    real = shard.read_index
    monkeypatch.setattr(
        shard, "read_index", lambda handle, path, chunks: reads.append(path) or real(handle, path, chunks)
    )
    files, out = ShardFiles(limit=1), [memoryview(bytearray(32))]
    for _ in range(3):
        for row in (0, ROWS, 2 * ROWS):
            dataset.read_features("front", np.array([row]), out, files)
    assert len(reads) == 3
    path = reads[0]
    data = path.read_bytes()
    try:
        path.write_bytes(data[:-1])
        with pytest.raises(UserError, match="damaged"):
            dataset.read_features("front", np.array([0]), out, files)
    finally:
        path.write_bytes(data)
    files.close()


def test_what_is_remembered_of_shards_is_bounded(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "REMEMBERED", 10)
    files, dataset, out = ShardFiles(limit=2), Cache.open(many).datasets[0], [memoryview(bytearray(32))]
    for row in range(0, 50 * ROWS, ROWS):
        dataset.read_features("front", np.array([row]), out, files)
        assert len(files._plain) <= 10 and len(files._open) <= 2
    files.close()


def test_neighbours_come_in_one_call_and_nothing_is_read_ahead(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the disk is asked for: each run of neighbours at once, in files that are said to be read at random."""
    calls, advice, (read, advise) = [], [], (os.preadv, os.posix_fadvise)
    monkeypatch.setattr(
        os, "preadv", lambda handle, buffers, at: calls.append((len(buffers), at)) or read(handle, buffers, at)
    )
    monkeypatch.setattr(
        os,
        "posix_fadvise",
        lambda handle, at, size, kind: advice.append((handle, at, size, kind)) or advise(handle, at, size, kind),
    )
    files, out = ShardFiles(), np.zeros((8, 2, 8), np.float16)
    rows = np.array([7, 2, 0, 1, 9, 8, 13, 4])  # shards of 5: 0-1-2, 4 | 7-8-9 | 13
    Cache.open(many).datasets[0].read_features("wrist", rows, [memoryview(o).cast("B") for o in out], files)
    assert calls == [(3, 0), (1, 4 * 32), (3, 2 * 32), (1, 3 * 32)]
    np.testing.assert_array_equal(sparse.row_of(out), rows)
    assert (
        sorted(advice) == sorted((opened.handle, 0, 0, os.POSIX_FADV_RANDOM) for opened in files._open.values())
        and len(advice) == 3
    )
    files.close()


def test_a_cache_is_opened_without_a_look_at_its_shards(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the time does not depend on how many there are; and a batch opens only those it reads."""
    away = many / "sparse/away"
    (many / "sparse/features").rename(away)
    try:
        cache = Cache.open(many)
    finally:
        away.rename(many / "sparse/features")
    opened, real = [], shard.open_file
    monkeypatch.setattr(shard, "open_file", lambda path, folder=None: opened.append(path) or real(path, folder))
    with Loader(cache, batch_size=4, threads=1, prefetch=1) as loader:
        next(loader)
    assert 0 < len(opened) <= 3 * 4 * 2  # batches made so far, samples, views


def test_files_in_use_outlive_their_place_in_the_table(tmp_path: Path) -> None:
    """Threads that push each other's files out of the table all read what they asked for."""
    records = np.arange(60, dtype=np.int64).reshape(60, 1)
    for i in range(20):
        with ShardWriter(tmp_path / f"c/{i}/0/0", (1, 1), "int64", 3) as writer:
            writer.append(records[3 * i : 3 * i + 3])
            writer.commit()
    gc.collect()
    files, wrong, before = ShardFiles(limit=2), [], handles()

    def read(seed: int) -> None:
        rng, out = np.random.default_rng(seed), np.empty((8, 1), np.int64)
        for _ in range(150):
            rows = rng.integers(0, 60, 8)
            read_records(files, tmp_path / "c", rows, [memoryview(o).cast("B") for o in out], 3)
            if (out[:, 0] != rows).any():
                wrong.append(rows)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and handles() <= before + 2
    files.close()
    assert handles() == before


def test_records_in_any_order_inside_a_shard(tmp_path: Path) -> None:
    """Zarr prescribes no order: where records do not follow each other, the index says where they are."""
    records, chunks = np.random.default_rng(0).integers(0, 99, (6, 4), dtype=np.int64), 8
    order, index = np.array([3, 0, 5, 1, 4, 2]), np.full((chunks, 2), 2**64 - 1, "<u8")
    index[order, 0], index[:6, 1] = np.arange(6) * 32, 32
    path = tmp_path / "c/0/0/0"
    path.parent.mkdir(parents=True)
    path.write_bytes(records[order].tobytes() + index.tobytes() + np.uint32(crc32c(index)).tobytes())
    assert path.stat().st_size == 6 * 32 + index_nbytes(chunks)
    files, rows = ShardFiles(), np.array([2, 3, 4, 0, 5, 5, 1])
    out = np.empty((7, 4), np.int64)
    read_records(files, tmp_path / "c", rows, [memoryview(o).cast("B") for o in out], chunks)
    np.testing.assert_array_equal(out, records[rows])
    with pytest.raises(UserError, match="does not hold row 7"):
        read_records(files, tmp_path / "c", np.array([7]), [memoryview(out[0]).cast("B")], chunks)
