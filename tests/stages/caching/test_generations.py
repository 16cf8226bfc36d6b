"""`--append` and `--update`: only what is new is encoded, everything else is the earlier generation's, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dvla.cache.readers.episode import CorruptEpisode
from dvla.cache.readers.search import load_config
from dvla.cache.store.cache import Cache
from dvla.cache.store.checksums import verify_checksums
from dvla.cache.store.feature_format import FeatureFormat
from dvla.cache.store.writer import CacheWriter
from dvla.cache.vlm.tiny_qwen3vl import make_tiny_qwen3vl
from dvla.common.files import lock_folder
from dvla.errors import UserError
from dvla.stages.caching import build as build_module
from dvla.stages.caching import generations as generations_module
from dvla.stages.caching import pipeline
from dvla.stages.caching.build import build
from dvla.stages.caching.config import PilotConfig
from dvla.stages.caching.planning.pilot import plan_build
from support.corner import SHARD, Corner, other_instruction, other_pictures, tree
from support.lerobot_samples import LENGTHS, VIEWS, rewrite, the_file, with_column
from support.tolerances import assert_same_features
from support.vlm_samples import TINY

OLD = sum(LENGTHS[:2])  # frames of the dataset before it grew


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3vl(tmp_path_factory.mktemp("vlm") / "tiny", TINY)


@pytest.fixture
def corner(recorded: dict[str, Path], vlm: Path, tmp_path: Path) -> Corner:
    return Corner(tmp_path, recorded["image"], vlm)


def features(path: Path, view: str, frames: int | None = None, dataset: str = "data") -> np.ndarray:
    return Cache.open(path).named(dataset).features(view, observed(path, dataset)[:frames])


def observed(path: Path, dataset: str = "data") -> np.ndarray:
    """The frames that have features."""
    found = Cache.open(path).named(dataset)
    ends = found.episode_start + found.episode_length
    return np.concatenate([np.arange(start, end, found.frame_stride) for start, end in zip(found.episode_start, ends)])


# --- append -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"format": FeatureFormat("int8", "zstd"), "frame_stride": 3, "augment": 1}])
def test_only_new_episodes_are_encoded(corner: Corner, changes: dict[str, Any]) -> None:
    stride, arrays = changes.get("frame_stride", 1), len(VIEWS) * (1 + changes.get("augment", 0))
    rows = [-(-n // stride) for n in LENGTHS]
    corner.record(2).build(**changes)
    before = tree(corner.out)
    corner.record(3)
    report = corner.build("append", **changes)
    whole = (rows[0] + rows[1]) // SHARD
    assert report.timing.images == arrays * rows[2] and report.adopted_shards == arrays * whole
    assert report.timing.reused == arrays * (rows[0] + rows[1] - whole * SHARD)
    assert report.previous == corner.folder / "cache.gen-1" and tree(report.previous) == before
    assert verify_checksums(corner.out) == [] and not (corner.folder / "cache.next").exists()
    corner.build(out=corner.folder / "fresh", **changes)
    kept = np.concatenate([np.arange(0, LENGTHS[0], stride), LENGTHS[0] + np.arange(0, LENGTHS[1], stride)])
    new = OLD + np.arange(0, LENGTHS[2], stride)
    first, second, fresh = (Cache.open(p).datasets[0] for p in (report.previous, corner.out, corner.folder / "fresh"))
    assert second.episode_id.tolist() == [0, 1, 2] and len(second.action) == sum(LENGTHS)
    np.testing.assert_array_equal(second.action, fresh.action)
    np.testing.assert_array_equal(second.text, fresh.text)
    for view in VIEWS:
        for variant in range(1 + changes.get("augment", 0)):
            for a, b in zip(first.records(view, kept, variant), second.records(view, kept, variant)):
                np.testing.assert_array_equal(a, b)
            assert_same_features(
                second.features(view, new, variant), fresh.features(view, new, variant), second.format.dtype
            )


def test_a_second_dataset_is_appended(corner: Corner, recorded: dict[str, Path]) -> None:
    corner.record(2).build()
    report = corner.build("append", more=(recorded["hevc"],))
    assert report.timing.images == 2 * sum(LENGTHS) and report.timing.reused == 0
    assert report.adopted_shards == 2 * -(-OLD // SHARD)
    cache = Cache.open(corner.out)
    assert [d.name for d in cache.datasets] == ["data", "hevc"]
    for view in VIEWS:
        np.testing.assert_array_equal(features(corner.out, view), features(report.previous, view))
    again = corner.build("append", more=(recorded["hevc"],))
    assert again.previous is None and again.timing.images == 0


def test_nothing_new_changes_nothing(corner: Corner) -> None:
    corner.record(2).build()
    before = tree(corner.folder)
    for mode in ("append", "update"):
        report = corner.build(mode)
        assert report.previous is None and (report.timing.images, report.adopted_shards) == (0, 0)
        assert tree(corner.folder) == before


def test_append_refuses_what_is_not_new(corner: Corner, recorded: dict[str, Path]) -> None:
    corner.record(2).build()
    before = tree(corner.out)
    for change, line in (
        (other_pictures("front", 1), "episode 1 of data changed or is gone"),
        (other_instruction, "episode 1 of data changed or is gone"),
    ):
        corner.record(3, change)
        with pytest.raises(UserError, match=f"use --update: --append adds new episodes only, but {line}"):
            corner.build("append")
    corner.record(1)
    with pytest.raises(UserError, match="episode 1 of data changed or is gone"):
        corner.build("append")
    corner.record(3)
    with pytest.raises(UserError, match="but shard_frames: cache has 8, you requested 4"):
        corner.build("append", shard_frames=4)
    with pytest.raises(UserError, match="resolution: cache has 64, you requested 96"):
        corner.build("append", resolution=96)
    with pytest.raises(UserError, match="no cache at .*none; build one"):
        corner.build("append", out=corner.folder / "none")
    assert tree(corner.out) == before and sorted(p.name for p in corner.folder.iterdir()) == ["cache", "data"]


def of_a_toaster(root: Path) -> None:
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(info | {"robot_type": "toaster"}))


def test_a_cache_keeps_its_own_map(corner: Corner) -> None:
    """A dataset that was built with a config of one's own is updated and appended to without it, wherever it is; and
    one that a shipped config fits, too, does not change its map unasked."""
    mine = corner.folder / "mine.yaml"
    mine.write_text(Path(load_config("metaworld").origin).read_text())
    for change in (of_a_toaster, lambda root: None):
        shutil.rmtree(corner.out, ignore_errors=True)
        corner.record(2, change).build(dataset_config=str(mine))
        assert corner.build("update").previous is None
        corner.record(3, change)
        said: list[str] = []
        report = build_module.build(corner.config("append"), say=said.append)
        assert report.timing.images == len(VIEWS) * LENGTHS[2]
        assert any("read with the map 'mine' of the cache; --dataset-config takes another" in line for line in said)
        assert Cache.open(corner.out).datasets[0].attributes["dataset_config"] == "mine"
        shutil.rmtree(report.previous)
    mine.unlink()
    assert corner.build("update").previous is None


# --- update -----------------------------------------------------------------------------------------------------------


def test_update_does_only_what_changed(corner: Corner) -> None:
    corner.record(3).build()
    planned = plan_build(corner.record(3, other_pictures("wrist", 1)).config("update"), PilotConfig(images=4))
    report = corner.build("update")
    assert report.timing.images == LENGTHS[1]  # one episode, one view
    shards = -(-sum(LENGTHS) // SHARD)
    assert (
        report.adopted_shards == shards + LENGTHS[0] // SHARD
    )  # all of front, and of wrist what lies before the episode
    foreseen = {share.kind: share.pictures for share in planned.shares}
    before = LENGTHS[0] // SHARD * SHARD
    assert foreseen == {"new": 0, "again": LENGTHS[1], "copied": report.timing.reused, "adopted": sum(LENGTHS) + before}
    assert planned.pictures == LENGTHS[1] and [v.decode_seconds > 0 for v in planned.views] == [False, True]
    np.testing.assert_array_equal(features(corner.out, "front"), features(report.previous, "front"))
    old, new, rows = features(report.previous, "wrist"), features(corner.out, "wrist"), np.arange(LENGTHS[0], OLD)
    np.testing.assert_array_equal(np.delete(old, rows, 0), np.delete(new, rows, 0))
    assert (old[rows] != new[rows]).any(axis=(1, 2)).all()
    corner.build(out=corner.folder / "fresh")
    assert_same_features(new, features(corner.folder / "fresh", "wrist"))


def test_an_instruction_costs_no_picture(corner: Corner) -> None:
    corner.record(3).build()
    report = corner.record(3, other_instruction).build("update")
    assert (report.timing.images, report.timing.reused, report.adopted_shards) == (0, 0, 2 * -(-sum(LENGTHS) // SHARD))
    assert "open the oven" in Cache.open(corner.out).datasets[0].instructions
    corner.build(out=corner.folder / "fresh")
    assert tree(corner.out) == tree(corner.folder / "fresh")


@pytest.mark.parametrize(
    "changes, images",
    [
        ({"tokens": 1}, 2 * OLD),
        ({"format": FeatureFormat("int8")}, 2 * OLD),
        ({"frame_stride": 2}, 0),
        ({"shard_frames": 4}, 0),
        ({"batch_size": 4}, 0),
        ({"format": FeatureFormat(compression="lz4")}, 0),
        ({"views": ("wrist",)}, 0),
    ],
)
def test_settings_redo_what_they_touch(corner: Corner, changes: dict[str, Any], images: int) -> None:
    corner.record(2).build()
    report = corner.build("update", **changes)
    assert report.timing.images == images and verify_checksums(corner.out) == []
    if not images:
        np.testing.assert_array_equal(
            features(corner.out, "wrist"), features(report.previous, "wrist")[observed(corner.out)]
        )
    corner.build(out=corner.folder / "fresh", **changes)
    if images:
        assert tree(corner.out) == tree(corner.folder / "fresh")
    else:
        assert_same_features(features(corner.out, "wrist"), features(corner.folder / "fresh", "wrist"))


def test_an_episode_that_is_gone_moves_the_rest(corner: Corner) -> None:
    corner.record(3).build()

    def drop(root: Path) -> None:
        def nan(table: Any) -> Any:
            actions = table["action"].to_pylist()
            actions[2][0] = float("nan")  # in episode 0
            return with_column(table, "action", actions)

        rewrite(the_file(root, "data/*/*.parquet"), nan)

    report = corner.record(3, drop).build("update")
    assert (report.quarantined, report.timing.images) == (1, 0) and report.timing.reused == 2 * sum(LENGTHS[1:])
    for view in VIEWS:
        np.testing.assert_array_equal(features(corner.out, view), features(report.previous, view)[LENGTHS[0] :])


# --- faults -----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def test_stopped_anywhere_equals_uninterrupted(corner: Corner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after every commit, between and after the renames: a rerun finishes, and readers never see a mixture."""
    corner.record(2).build()
    first = tree(corner.out)
    corner.record(3)
    twin = Corner(corner.folder / "twin", corner.whole, corner.vlm)
    twin.source = corner.source
    shutil.copytree(corner.out, twin.out)
    twin.build("append")
    expected = tree(twin.out)

    commit, rename, left = CacheWriter._commit, os.rename, 0

    def count(real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **more: Any) -> Any:
            nonlocal left
            done = real(*arguments, **more)
            left -= 1
            if left < 0:
                raise Killed
            return done

        return counted

    monkeypatch.setattr(CacheWriter, "_commit", count(commit))
    monkeypatch.setattr(os, "rename", count(rename))
    stops = 0
    while True:
        left = 1 if stops % 2 else 0
        try:
            corner.build("append")
            break
        except Killed:
            stops += 1
            if corner.out.exists():
                assert tree(corner.out) in (first, expected)
            else:
                assert tree(corner.folder / "cache.gen-1") == first and tree(corner.folder / "cache.next") == expected
    assert stops > 5 and tree(corner.out) == expected and tree(corner.folder / "cache.gen-1") == first
    assert not (corner.folder / "cache.next").exists()


def test_a_plain_build_mends_a_cut_exchange(corner: Corner) -> None:
    corner.record(3).build()
    before = tree(corner.out)
    (corner.out).rename(corner.folder / "cache.next")
    shutil.copytree(corner.folder / "cache.next", corner.folder / "cache.gen-1")
    with lock_folder(corner.folder / "cache.gen-1"):  # whoever makes the generation is between its two renames
        with pytest.raises(UserError, match="another process is building"):
            corner.build()
    assert corner.build().timing.images == 0 and tree(corner.out) == before


def test_one_next_generation_at_a_time(corner: Corner) -> None:
    corner.record(2).build()
    corner.record(3)
    with lock_folder(corner.out):
        for mode in ("append", "update"):
            with pytest.raises(UserError, match="another process is building .*cache; wait for it"):
                corner.build(mode)
        assert corner.record(2).build().timing.images == 0  # a finished cache is found finished all the same
    assert corner.record(3).build("append").previous is not None


def test_a_generation_begun_for_something_else_is_named(corner: Corner, monkeypatch: pytest.MonkeyPatch) -> None:
    corner.record(1).build()
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "exchange", lambda out: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            corner.record(2).build("append")
    with pytest.raises(
        UserError, match="remove the folder .*cache.next, then rerun: it is a generation begun from other"
    ):
        corner.record(3).build("append")
    shutil.rmtree(corner.folder / "cache.next")
    assert corner.build("append").timing.images == 2 * sum(LENGTHS[1:])


def test_damage_is_not_carried_on(corner: Corner) -> None:
    """A flipped bit in a shard that would be copied from; a shard that is not there."""
    corner.record(2).build()
    corner.record(3)
    last = corner.out / "data/features/front/c" / str(OLD // SHARD) / "0/0"
    content = last.read_bytes()
    last.write_bytes(content[:5] + bytes([content[5] ^ 1]) + content[6:])
    with pytest.raises(UserError, match=r"c/2/0/0 of the previous generation is damaged; run `dvla cache repair"):
        corner.build("append")
    last.unlink()
    with pytest.raises(UserError, match=r"c/2/0/0 is missing or damaged; run `dvla cache repair"):
        corner.build("append")
    last.write_bytes(content)
    assert corner.build("append").previous is not None and verify_checksums(corner.out) == []


def test_a_reader_keeps_its_generation(corner: Corner) -> None:
    """Opened before an exchange, a cache and a loader's files still read what they were opened for."""
    corner.record(2).build()
    reader, old = Cache.open(corner.out), {view: features(corner.out, view) for view in VIEWS}
    corner.record(2, lambda root: (other_pictures("front", 0)(root), other_pictures("wrist", 0)(root))).build("update")
    assert not np.array_equal(features(corner.out, "front"), old["front"])
    dataset, files, buffer = reader.datasets[0], reader.shard_files(), np.empty_like(old["front"][:1])
    for view in VIEWS:
        np.testing.assert_array_equal(dataset.features(view, np.arange(OLD)), old[view])
        dataset.read_features(view, np.array([3]), [memoryview(buffer[0]).cast("B")], files)
        np.testing.assert_array_equal(buffer[0], old[view][3])


def test_a_reader_opens_one_generation_while_they_change(corner: Corner) -> None:
    """Two finished generations change places again and again, OUT being absent at times: either of them opens."""
    corner.record(2).build()
    corner.record(2, other_pictures("front", 0)).build("update")
    out, later, away = corner.out, corner.folder / "cache.next", corner.folder / "cache.gen-1"
    expected = {json.dumps(Cache.open(p).manifest["files"], sort_keys=True): features(p, "front") for p in (out, away)}
    ended, changes = threading.Event(), 0

    def change() -> None:
        nonlocal changes
        while not ended.is_set():
            os.rename(away, later)
            os.rename(out, away)
            time.sleep(0.001)
            os.rename(later, out)
            changes += 1
            time.sleep(0.02)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        seen = set()
        for _ in range(25):
            cache = Cache.open(out)
            name = json.dumps(cache.manifest["files"], sort_keys=True)
            np.testing.assert_array_equal(cache.datasets[0].features("front", np.arange(OLD)), expected[name])
            seen.add(name)
    finally:
        ended.set()
        thread.join()
    assert changes > 3 and seen == expected.keys()


def test_generations_are_numbered(corner: Corner) -> None:
    corner.record(1).build()
    for episodes, number in ((2, 1), (3, 2)):
        assert corner.record(episodes).build("append").previous == corner.folder / f"cache.gen-{number}"
    (corner.folder / "cache.gen-1").rename(corner.folder / "elsewhere")
    assert [p.name for p in generations_module.generations(corner.out)] == ["cache.gen-2"]
    assert dataclasses.replace(corner.build("update")).previous is None


def test_a_file_that_is_away_for_a_moment_stops_the_build_and_costs_nothing(corner: Corner) -> None:
    """It was hashed when the build began: an unmounted folder is no damaged episode."""
    corner.record(3).build(out=corner.folder / "whole")
    file = the_file(corner.source, "data/*/*.parquet")

    def leave(name: str, done: int, total: int) -> None:
        if name.endswith(": images") and done and file.exists():
            file.rename(corner.folder / "away")

    with pytest.raises(UserError, match=r"was there when the build began; put it back and rerun") as error:
        build(corner.config(), leave)
    assert "\n" not in str(error.value) and not (corner.out / "manifest.json").exists()
    (corner.folder / "away").rename(file)
    assert corner.build().quarantined == 0 and tree(corner.out) == tree(corner.folder / "whole")


def test_an_update_encodes_what_can_be_read_again(corner: Corner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes are those of before, so that nothing but its quarantine says that something is to do."""
    corner.record(3).build(out=corner.folder / "whole")
    images = pipeline._Decoder._images

    def failing(self: Any, entry: Any, frames: np.ndarray) -> Any:
        if entry.episode_id == 1:
            raise CorruptEpisode("data episode 1: the network is away", "unreadable-file")
        return images(self, entry, frames)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline._Decoder, "_images", failing)
        assert corner.build().quarantined == 1
        assert corner.build("update").previous is not None  # it could be read, but not by this build
    report = corner.build("update")
    assert report.quarantined == 0 and report.timing.images > 0
    content = {name: data for name, data in tree(corner.out).items() if "/c/" in name}
    assert content == {name: data for name, data in tree(corner.folder / "whole").items() if "/c/" in name}
    assert corner.build("update").previous is None
