"""The store: any Zarr library reads it, no interruption changes its bytes, and nothing wrong is accepted silently."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from dvla.cache.store.cache import Cache
from dvla.cache.store.checksums import verify_checksums
from dvla.cache.store.shard_reader import ShardFiles, read_index, read_records
from dvla.cache.store.shard_writer import MISSING, ShardWriter
from dvla.cache.store.writer import CacheWriter
from dvla.common.files import crc32c
from dvla.errors import UserError
from support import synthetic_cache as synthetic


def tree(path: Path) -> dict[str, bytes]:
    """Every file of a cache but the lock."""
    return {
        p.relative_to(path).as_posix(): p.read_bytes()
        for p in sorted(path.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "cache"
    synthetic.build(path)
    return path


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    path = tmp_path / "copy"
    for name, data in (tree(whole)).items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def test_zarr_python_reads_what_was_written(whole: Path) -> None:
    import zarr

    plan = synthetic.make_plan()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        root = zarr.open_group(str(whole), mode="r")
        members = dict(root.members(max_depth=None))
    for dataset in plan.datasets:
        tables = synthetic.make_tables(plan, dataset.name)
        for view in dataset.views:
            array = zarr.open_array(str(whole / dataset.name / "features" / view), mode="r")  # its own zarr.json
            expected = np.stack([synthetic.feature(dataset.name, view, row) for row in range(dataset.frames)])
            if (dataset.name, view) == synthetic.BROKEN[:2]:
                start = dataset.starts[[e.episode_id for e in dataset.episodes].index(synthetic.BROKEN[2])]
                expected[start + 2 : start + 17] = 0
            assert array.dtype == np.float16 and array.chunks == (1, synthetic.TOKENS, synthetic.WIDTH)
            np.testing.assert_array_equal(array[:], expected)
            np.testing.assert_array_equal(members[f"{dataset.name}/features/{view}"][5:20], expected[5:20])
            np.testing.assert_array_equal(root[f"{dataset.name}/null/{view}"][:], tables.null_features[view])
        for name, values in {
            "action": tables.action,
            "proprio": tables.proprio,
            "timestamp": tables.timestamp,
            "action_mask": tables.action_mask,
            "proprio_mask": tables.proprio_mask,
            "null_text": tables.null_text,
            "text/length": tables.text_length,
            "episodes/start": dataset.starts,
        }.items():
            stored = root[f"{dataset.name}/{name}"]
            assert stored.dtype == values.dtype
            np.testing.assert_array_equal(stored[:], values)
        assert root[dataset.name].attrs["licence"] == "mit"


def test_reader_gives_the_same_arrays(whole: Path) -> None:
    cache, plan = Cache.open(whole), synthetic.make_plan()
    assert [d.name for d in cache.datasets] == [d.name for d in plan.datasets]
    for stored, dataset in zip(cache.datasets, plan.datasets):
        tables = synthetic.make_tables(plan, dataset.name)
        np.testing.assert_array_equal(stored.action, tables.action)
        np.testing.assert_array_equal(stored.timestamp, tables.timestamp)
        np.testing.assert_array_equal(stored.null_features[0], tables.null_features[dataset.views[0]])
        assert stored.instructions == dataset.instructions and stored.views == dataset.views
        assert [stored.instructions[i] for i in stored.episode_instruction] == [e.instruction for e in dataset.episodes]
        assert stored.attributes["action_map"] == synthetic.MAP.to_dict()
        for row in (0, 15, 16, dataset.frames - 1):
            np.testing.assert_array_equal(
                stored.feature(dataset.views[0], row), synthetic.feature(dataset.name, dataset.views[0], row)
            )
        np.testing.assert_array_equal(
            stored.episode_of(np.arange(dataset.frames)),
            np.repeat(np.arange(len(dataset.episodes)), [e.length for e in dataset.episodes]),
        )
        with pytest.raises(ValueError, match="rows"):
            stored.episode_of(np.array([dataset.frames]))
    with pytest.raises(UserError, match="alpha"):
        cache.named("alhpa")


@pytest.mark.parametrize("shape", [(1,), (128,), (7, 128), (3000, 128), (5000,), (2, 700, 400)])
def test_tables_of_any_size_are_arrays_zarr_reads(tmp_path: Path, shape: tuple[int, ...]) -> None:
    import zarr

    from dvla.cache.store.zarr_format import open_table, write_table

    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    write_table(tmp_path / "t", values, tuple("abc"[: len(shape)]))
    np.testing.assert_array_equal(zarr.open_array(str(tmp_path / "t"), mode="r")[:], values)
    np.testing.assert_array_equal(open_table(tmp_path, "t", (shape, "float32")), values)


def test_quarantine_is_a_ledger_and_a_count(whole: Path) -> None:
    cache = Cache.open(whole)
    lines = [json.loads(line) for line in (whole / "quarantine.jsonl").read_text().splitlines()]
    assert lines == [
        {"dataset": "alpha", "episode_id": 13, "reason": "alpha episode 13: video ends at frame 2"},
        {"dataset": "alpha", "episode_id": 99, "reason": "no video"},
    ]
    assert cache.manifest["quarantine_count"] == 2
    assert cache.named("alpha").episode_id[cache.named("alpha").quarantined].tolist() == [13]
    assert not cache.named("beta").quarantined.any()


def test_order_and_interruptions_do_not_change_a_byte(whole: Path, tmp_path: Path) -> None:
    expected = tree(whole)
    synthetic.build(tmp_path / "reversed", arrange=lambda tasks: tasks[::-1])
    assert tree(tmp_path / "reversed") == expected
    for stop in (0, 1, 5):
        path = tmp_path / f"stop{stop}"
        synthetic.build(path, stop_after=stop)
        with pytest.raises(UserError, match="rerun the same `dvla cache build`"):
            Cache.open(path)
        synthetic.build(path, stop_after=2)
        synthetic.build(path)
        assert tree(path) == expected
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*")}
    synthetic.build(whole)  # already complete: nothing is written
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*")} == before


def test_error_inside_a_shard_leaves_no_trace_of_it(tmp_path: Path) -> None:
    plan = synthetic.make_plan()
    with CacheWriter.create_or_resume(tmp_path / "c", synthetic.FINGERPRINT, plan) as writer:
        before, task = tree(tmp_path / "c"), writer.missing()[0]

        def broken():
            yield synthetic.feature("alpha", "front", 0)
            raise RuntimeError("encoder")

        with pytest.raises(RuntimeError, match="encoder"):
            writer.write_shard(task, broken())
        assert tree(tmp_path / "c") == before and task in writer.missing()
        with pytest.raises(ValueError, match="expected 16"):
            writer.write_shard(task, [synthetic.feature("alpha", "front", 0)])
        with pytest.raises(ValueError, match="missing"):
            writer.finish()


def test_killed_builds_resume_to_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    """SIGKILL at several moments, some inside a shard; the last run is left to finish."""
    command = [sys.executable, synthetic.__file__, str(tmp_path / "c"), "0.002"]
    kills = 0
    for shards in (0, 4, 12):
        process = subprocess.Popen(command)
        commits, deadline = tmp_path / "c" / ".commits", time.monotonic() + 30
        while len(list(commits.glob("*/*/*.json"))) < shards or not list((tmp_path / "c").glob("alpha/**/.*.tmp-*")):
            if process.poll() is not None or time.monotonic() > deadline:
                break  # too late for the temporary file; kill (or not) where it stands
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 2
    subprocess.run(command, check=True)
    assert tree(tmp_path / "c") == tree(whole)


def test_stopped_between_any_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop before the n-th rename, for n all over a build and its finish: the same bytes each time."""
    from dvla.cache.store import shard_writer, writer
    from dvla.common import files

    publish, plan = files.publish, synthetic.make_plan(shard_frames=64)
    synthetic.build(tmp_path / "plain", plan=plan)
    expected, n, places = tree(tmp_path / "plain"), 0, (files, shard_writer, writer)

    class Stop(BaseException):
        pass

    while True:
        left = n = n + 17

        def limited(temporary: Path, path: Path) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Stop
            publish(temporary, path)

        for place in places:
            monkeypatch.setattr(place, "publish", limited)
        path = tmp_path / f"n{n}"
        try:
            synthetic.build(path, plan=plan)
            break
        except Stop:
            assert not (path / "manifest.json").exists()
        for place in places:
            monkeypatch.setattr(place, "publish", publish)
        synthetic.build(path, plan=plan)
        assert tree(path) == expected
    assert n > 60


def test_second_builder_is_refused(tmp_path: Path) -> None:
    with CacheWriter.create_or_resume(tmp_path / "c", synthetic.FINGERPRINT, synthetic.make_plan()):
        with pytest.raises(UserError, match="another process is building"):
            CacheWriter.create_or_resume(tmp_path / "c", synthetic.FINGERPRINT, synthetic.make_plan())
    synthetic.build(tmp_path / "c")


@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_are_refused_and_named(tmp_path: Path, finished: bool) -> None:
    synthetic.build(tmp_path / "c", stop_after=None if finished else 2)
    before, plan = tree(tmp_path / "c"), synthetic.make_plan()
    other = {**synthetic.FINGERPRINT, "encoder": {"resolution": 224, "weights": "abc"}, "augment": 2}
    with pytest.raises(UserError, match="encoder.resolution: cache has 448, you requested 224") as error:
        CacheWriter.create_or_resume(tmp_path / "c", other, plan)
    assert "augment: cache has no such field, you requested 2" in str(error.value) and "weights" not in str(error.value)
    with pytest.raises(UserError, match="store.shard_frames: cache has 16, you requested 8"):
        CacheWriter.create_or_resume(tmp_path / "c", synthetic.FINGERPRINT, synthetic.make_plan(shard_frames=8))
    assert tree(tmp_path / "c") == before


def test_foreign_folders_and_bad_names_are_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match="photo.jpg"):
        CacheWriter.create_or_resume(tmp_path, synthetic.FINGERPRINT, synthetic.make_plan())
    assert os.listdir(tmp_path) == ["photo.jpg"]
    with pytest.raises(UserError, match="cannot write a cache"):
        CacheWriter.create_or_resume(tmp_path / "photo.jpg" / "c", synthetic.FINGERPRINT, synthetic.make_plan())
    with pytest.raises(UserError, match="photo.jpg is a file; choose another --out"):
        CacheWriter.create_or_resume(tmp_path / "photo.jpg", synthetic.FINGERPRINT, synthetic.make_plan())
    with pytest.raises(UserError, match="photo.jpg is a file; give the folder of a cache"):
        Cache.open(tmp_path / "photo.jpg")
    with pytest.raises(UserError, match="no cache at"):
        Cache.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a dvla cache"):
        Cache.open(tmp_path)
    plan = synthetic.make_plan()
    for name in ("../up", ".commits", "a/b", "zarr.json", ""):
        bad = plan.__class__((plan.datasets[0].__class__(name, ("v",), plan.datasets[0].episodes),), 1, 1, 1)
        with pytest.raises(UserError, match="cannot name"):
            CacheWriter.create_or_resume(tmp_path / "c", synthetic.FINGERPRINT, bad)
    assert not (tmp_path / "c").exists()


def test_attributes_of_the_store_must_agree_with_the_plan(tmp_path: Path) -> None:
    plan = synthetic.make_plan()
    tables = synthetic.make_tables(plan, "alpha")
    with CacheWriter.create_or_resume(tmp_path / "c", synthetic.FINGERPRINT, plan) as writer:
        for given in ({"frames": 1}, {"quarantined": []}):
            with pytest.raises(ValueError, match=f"{next(iter(given))}.* belong to the store"):
                writer.write_tables("alpha", dataclasses.replace(tables, attributes=given))
        assert "alpha" in writer.tables_missing()
        writer.write_tables("alpha", dataclasses.replace(tables, attributes={"tokens": plan.tokens}))
        assert "alpha" not in writer.tables_missing()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_name_their_frame(tmp_path: Path, bad: float) -> None:
    with CacheWriter.create_or_resume(tmp_path / "c", synthetic.FINGERPRINT, synthetic.make_plan()) as writer:
        task = writer.missing()[1]
        block = np.stack([synthetic.feature(task.dataset, task.view, row) for row in range(task.start, task.stop)])
        block[9, 1, 4] = bad
        with pytest.raises(UserError, match=f"alpha/front: the feature of row {task.start + 9} "):
            writer.write_shard(task, [block[:8], block[8:]])
        assert task in writer.missing()


def test_damage_is_found_and_named(copy: Path) -> None:
    seen: list[tuple[int, int]] = []
    assert verify_checksums(copy, lambda done, total: seen.append((done, total))) == []
    assert seen[-1] == (Cache.open(copy).manifest["bytes"],) * 2
    flipped, short, gone = (copy / f"alpha/features/front/c/{i}/0/0" for i in range(3))
    data = bytearray(flipped.read_bytes())
    data[100] ^= 4
    flipped.write_bytes(data)
    short.write_bytes(short.read_bytes()[:-7])
    gone.unlink()
    table = copy / "beta/action/c/0/0"
    table.write_bytes(table.read_bytes()[:-1] + b"\xff")
    problems = verify_checksums(copy)
    assert [p.split(":")[0] for p in problems] == [
        *(f"alpha/features/front/c/{i}/0/0" for i in range(3)),
        "beta/action/c/0/0",
    ]
    dataset = Cache.open(copy).named("alpha")
    for row, path in ((17, short), (33, gone)):
        with pytest.raises(UserError, match=f"shard {path}"):
            dataset.feature("front", row)


def test_a_swapped_index_is_found_though_the_checksum_of_the_file_is_blind_to_it(tmp_path: Path) -> None:
    """A crc32c over data that ends in its own crc32c is constant: only reading the index tells."""
    for name in ("fp16", "fp16-lz4-stride3", "int8-zstd-stride2-variant"):
        plan = synthetic.make_plan(**synthetic.SETTINGS[name])
        synthetic.build(tmp_path / name, plan=plan)
        assert verify_checksums(tmp_path / name) == []
        for shard in ("alpha/features/front/c/0/0/0", "alpha/episodes/id/c/0", "beta/action/c/0/0"):
            path, chunks = tmp_path / name / shard, plan.shard_frames if "features" in shard else 1
            data = path.read_bytes()
            size = 16 * chunks + 4
            index = np.frombuffer(data[-size:-4], "<u8").reshape(-1, 2).copy()
            if chunks > 1:
                index[[0, 1]] = index[[1, 0]] if name != "fp16" else index[[0, 1]]
                if name == "fp16":  # and none is left out at the end
                    index[np.flatnonzero(index[:, 0] < MISSING)[-1]] = MISSING
            else:
                index[0] = index[0, 0] + 8, index[0, 1] - 8
            forged = data[:-size] + index.tobytes() + np.uint32(crc32c(index)).tobytes()
            assert crc32c(np.frombuffer(forged, np.uint8)) == crc32c(np.frombuffer(data, np.uint8)) and forged != data
            path.write_bytes(forged)
            assert [p.split(":")[0] for p in verify_checksums(tmp_path / name)] == [shard], name
            path.write_bytes(data)


@pytest.mark.parametrize(
    ("table", "change"),
    [
        ("alpha/timestamp", {"data_type": "object"}),  # would map pointers from the file
        ("beta/episodes/id", {"data_type": "O"}),
        ("alpha/timestamp", {"data_type": "int64"}),  # the same bytes, other numbers
        ("alpha/action", {"data_type": "float64"}),
        ("alpha/action", {"data_type": None}),
        ("alpha/action", {"shape": [128, 128]}),
        ("alpha/action", {"shape": [True, 128]}),
        ("alpha/action_mask", {"shape": [64]}),
        ("alpha/text/embedding", {"shape": [0, 2, 8]}),
        ("alpha/null_text", {"shape": [-1, 8]}),
        ("beta/episodes/id", {"shape": []}),
        ("beta/episodes/id", {"shape": None}),
    ],
)
def test_a_table_is_mapped_with_the_expected_dtype_and_shape_only(copy: Path, table: str, change: dict) -> None:
    """A pulled cache brings its own manifest, so its checksums are no defense."""
    file = copy / table / "zarr.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match="zarr.json is damaged: it is not what the build wrote"):
        Cache.open(copy)
    synthetic.seal(copy)
    with pytest.raises(
        UserError, match=f"{table}.*(cannot read|is damaged|it says)|cannot read table .*{table}"
    ) as error:
        Cache.open(copy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("views", ["../../alpha/features/front"], "cannot name"),
        ("views", "front", "'attributes.views' is 'front', expected a valid list"),
        ("views", None, "damaged"),
        ("frames", 98.0, "damaged"),
        ("frames", 10**12, "damaged|cannot read table"),
        ("frame_stride", 0, "damaged"),
        ("dtype", "object", "unknown feature dtype"),
        ("action_stats", {}, "'attributes.action_stats.mean' is missing"),
        ("control_hz", 0, "expected greater than 0"),
        ("kept", [[[0, 10**12]]] + [None] * 6, "frames are kept that its episodes do not have"),
        ("view_hashes", {"front": ["x"]}, "lists .1, 7. episodes"),
        ("quarantined", [1], "quarantined"),
        ("source_hashes", [], "at least 1 item"),
        ("source_hashes", ["x"] * 8, "episodes"),
        ("instructions", ["a"], "cannot read table"),
    ],
)
def test_forged_attributes_are_a_line(copy: Path, name: str, value: object, said: str) -> None:
    file = copy / "alpha/zarr.json"
    document = json.loads(file.read_text())
    document["attributes"][name] = value
    file.write_text(json.dumps(document))
    synthetic.seal(copy)
    with pytest.raises(UserError, match=said):
        Cache.open(copy)


@pytest.mark.parametrize(("table", "value"), [("start", 1), ("length", 0), ("length", 10**9), ("instruction", 99)])
def test_an_episode_table_that_points_elsewhere_is_refused(copy: Path, table: str, value: int) -> None:
    file = copy / f"alpha/episodes/{table}/c/0"
    data = file.read_bytes()
    file.write_bytes(np.int64(value).tobytes() + data[8:])
    with pytest.raises(UserError, match="damaged"):
        Cache.open(copy)


def test_lost_shards_alone_are_built_again(copy: Path, whole: Path) -> None:
    lost = copy / "beta/features/top/c/2/0/0"
    lost.unlink()
    with CacheWriter.create_or_resume(copy, synthetic.FINGERPRINT, synthetic.make_plan()) as writer:
        assert [(t.dataset, t.view, t.index, t.start, t.stop) for t in writer.missing()] == [("beta", "top", 2, 32, 48)]
        assert not writer.complete and writer.tables_missing() == []
    synthetic.build(copy)
    assert tree(copy) == tree(whole)


def test_read_only_folder(copy: Path) -> None:
    for path in [copy, *copy.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        before = {p: p.stat().st_mtime_ns for p in copy.rglob("*")}  # root ignores permissions
        cache = Cache.open(copy)
        assert cache.named("beta").feature("top", 3).shape == (synthetic.TOKENS, synthetic.WIDTH)
        assert verify_checksums(copy) == []
        synthetic.build(copy)  # finished: nothing to do, no lock needed
        assert {p: p.stat().st_mtime_ns for p in copy.rglob("*")} == before
    finally:
        for path in [copy, *copy.rglob("*")]:
            path.chmod(0o755)


def test_shard_index_and_scattered_reads(tmp_path: Path) -> None:
    """Random rows, repeats and more adjacent records than one preadv takes arrive in their own buffers."""
    count, capacity = 1300, 1400
    records = np.random.default_rng(1).integers(0, 255, (count, 6), dtype=np.int64)
    with ShardWriter(tmp_path / "c/0/0/0", (1, 6), "int64", capacity) as writer:
        writer.append(records[:1000])
        writer.append(records[1000:])
        nbytes, _ = writer.commit()
    with open(tmp_path / "c/0/0/0", "rb") as file:
        index = read_index(file.fileno(), tmp_path, capacity)
    assert nbytes == count * 48 + capacity * 16 + 4
    assert (index[:count, 0] == np.arange(count) * 48).all() and (index[count:] == MISSING).all()
    files = ShardFiles()
    shuffled = np.random.default_rng(2).integers(0, count, 700)
    for rows in (np.arange(count), shuffled, np.array([5, 5, 6, 4]), np.array([], int)):
        out = np.zeros((len(rows), 6), np.int64)
        read_records(files, tmp_path / "c", rows, [memoryview(o).cast("B") for o in out], capacity)
        np.testing.assert_array_equal(out, records[rows])
    with pytest.raises(UserError, match="does not hold row 1350"):
        two = [memoryview(bytearray(48)) for _ in range(2)]
        read_records(files, tmp_path / "c", np.array([3, 1350]), two, capacity)
    with pytest.raises(ValueError, match="more than"), ShardWriter(tmp_path / "x", (1, 6), "int64", 2) as writer:
        writer.append(records[:3])
    assert not list(tmp_path.glob("*x*"))
    files.close()


def test_open_files_stay_bounded(whole: Path) -> None:
    files = ShardFiles(limit=2)
    dataset, before = Cache.open(whole).named("alpha"), len(os.listdir("/proc/self/fd"))
    out = np.empty((dataset.frames, dataset.tokens, dataset.width), np.float16)
    rows = np.random.default_rng(0).permutation(dataset.frames)
    dataset.read_features("front", rows, [memoryview(o).cast("B") for o in out], files)
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    np.testing.assert_array_equal(out, np.stack([synthetic.feature("alpha", "front", row) for row in rows]))
    files.close()
    assert len(os.listdir("/proc/self/fd")) == before
