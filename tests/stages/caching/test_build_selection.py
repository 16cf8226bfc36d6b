"""A build of chosen demonstrations: the bytes of a build from a dataset of these alone; kept by append and update."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pytest

from dvla.cache.actions.selection import Selection
from dvla.cache.readers import open_source
from dvla.cache.store.cache import Cache
from dvla.cache.vlm.spec import EncoderSpec
from dvla.cache.vlm.tiny_qwen3vl import make_tiny_qwen3vl
from dvla.errors import UserError
from dvla.stages.caching.build import build
from dvla.stages.caching.cli import build_lines
from dvla.stages.caching.config import BuildConfig
from dvla.stages.caching.planning.pilot import plan_build
from dvla.stages.caching.transfer.webdataset import export, import_cache
from dvla.stages.caching.upkeep.repair import repair
from support import hdf5_samples, rlds_samples
from support.cli_runner import Dvla, refused
from support.corner import Corner, tree
from support.lerobot_samples import LENGTHS, convert_to_v2, rewrite, the_file
from support.pauses import KEPT, marked, with_pause
from support.vlm_samples import TINY

Reduced = tuple[Path, Path, str]  # a dataset, one with some of its episodes alone, which


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3vl(tmp_path_factory.mktemp("vlm") / "tiny", TINY)


@pytest.fixture
def corner(recorded: dict[str, Path], vlm: Path, tmp_path: Path) -> Corner:
    return Corner(tmp_path, recorded["image"], vlm)


def content(cache: Path) -> dict[str, bytes]:
    """Features, tables and the documents of these; not what names the source's place and metadata."""
    return {
        name: data
        for name, data in tree(cache).items()
        if "/c/" in name or name.endswith("zarr.json") and name.count("/") > 1
    }


def lerobot_v2(tmp_path: Path, recorded: dict[str, Path]) -> Reduced:
    full = convert_to_v2(recorded["hevc"], tmp_path / "full/data")
    some = convert_to_v2(recorded["hevc"], tmp_path / "some/data")
    listed = (some / "meta/episodes.jsonl").read_text().splitlines(keepends=True)
    (some / "meta/episodes.jsonl").write_text(listed[0] + listed[2])
    (some / "data/chunk-000/episode_000001.parquet").unlink()
    return full, some, "0,2"


def lerobot_v3(tmp_path: Path, recorded: dict[str, Path]) -> Reduced:
    for name in ("full", "some"):
        shutil.copytree(recorded["h264"], tmp_path / name / "data")
    some = tmp_path / "some/data"
    rewrite(the_file(some, "meta/episodes/*/*.parquet"), lambda t: t.filter(pa.compute.equal(t["episode_index"], 0)))
    return tmp_path / "full/data", some, "0"


def robomimic(tmp_path: Path, recorded: dict[str, Path]) -> Reduced:
    full, some = (hdf5_samples.write_robomimic(tmp_path / name / "can/image.hdf5") for name in ("full", "some"))
    with h5py.File(some, "r+") as file:
        del file["data/demo_2"]
    return full, some, "0,10"


def episode_files(tmp_path: Path, recorded: dict[str, Path]) -> Reduced:
    full, some = (hdf5_samples.write_episode_folder(tmp_path / name / "sample") for name in ("full", "some"))
    (some / "ep_000000.hdf5").unlink()
    return full, some, "1-"


def replay_buffer(tmp_path: Path, recorded: dict[str, Path]) -> Reduced:
    import zarr

    full, some = (hdf5_samples.write_replay_buffer(tmp_path / name / "pusht.zarr") for name in ("full", "some"))
    rows = sum(hdf5_samples.LENGTHS[:2])
    group = zarr.open_group(some)
    group["meta/episode_ends"].resize((2,))
    for name in group["data"].array_keys():
        group[f"data/{name}"].resize((rows, *group[f"data/{name}"].shape[1:]))
    return full, some, "0-1"


def rlds(tmp_path: Path, recorded: dict[str, Path]) -> Reduced:
    full = rlds_samples.write_toy(tmp_path / "full")
    shutil.copytree(tmp_path / "full", tmp_path / "some")
    some = tmp_path / "some" / full.relative_to(tmp_path / "full")
    info = json.loads((some / "dataset_info.json").read_text())
    (some / "dataset_info.json").write_text(json.dumps({**info, "splits": info["splits"][:1]}))
    return full, some, "0-4"


FORMATS = (lerobot_v2, lerobot_v3, robomimic, episode_files, replay_buffer, rlds)


@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
def test_a_selection_is_a_build_of_the_reduced_dataset(
    make: Callable[[Path, dict[str, Path]], Reduced], recorded: dict[str, Path], vlm: Path, tmp_path: Path
) -> None:
    full, some, chosen = make(tmp_path, recorded)
    spec, config = EncoderSpec(str(vlm), resolution=64, dtype="float32"), None
    if make is rlds:
        config = str(tmp_path / "toy.yaml")
        Path(config).write_text(
            "embodiment: gripper_delta_eef\nformat: rlds\ncontrol_hz: 4\nmatch: []\naction: [{drop: 6}]\n"
            "action_columns: [action/move, action/grip, action/stop]\nstate: [{drop: 7}]\n"
            "state_columns: [observation/pose, observation/packed]\n"
        )

    def made(source: Path, out: str, **how: object) -> Path:
        settings = {"batch_size": 4, "shard_frames": 8, "device": "cpu", "dataset_config": config, **how}
        build(BuildConfig((str(source),), spec, tmp_path / out, **settings))
        return tmp_path / out

    selected, reduced = made(full, "a", select=Selection((chosen,))), made(some, "b")
    assert content(selected) == content(reduced) and len(content(reduced)) > 20
    listed, used = (set(open_source(str(p), config).episode_ids) for p in (full, some))
    left = made(full, "c", select=Selection(exclude=(",".join(map(str, listed - used)),)))
    assert content(left) == content(reduced)
    documents = [json.loads((p / "fingerprint.json").read_text())["store"] for p in (selected, reduced, left)]
    assert documents[0] == documents[1] == documents[2]


def test_without_a_selection_nothing_is_noted(corner: Corner) -> None:
    corner.record(3).build()
    assert "selection" not in (corner.out / "fingerprint.json").read_text()
    assert Cache.open(corner.out).manifest["format"] == 2


def test_what_is_left_out_is_said_and_shown(corner: Corner, dvla: Dvla) -> None:
    config = corner.record(3).config(select=Selection(("0-1",)))
    report = build(config)
    assert report.frames == sum(LENGTHS[:2])
    assert "data: 1 of 3 episodes left out by --include-episodes 0-1" in build_lines(config, report)
    shown = dvla("cache", "inspect", corner.out)
    assert "--include-episodes 0-1" in shown.out


# --- append, update, repair -------------------------------------------------------------------------------------------


def test_append_and_update_keep_the_selection(corner: Corner, tmp_path: Path) -> None:
    corner.record(2).build(select=Selection(exclude=("0",)))
    corner.record(3)
    assert corner.build("append").timing.images == 2 * LENGTHS[2]
    assert Cache.open(corner.out).datasets[0].episode_id.tolist() == [1, 2]
    assert corner.build("append", select=Selection(exclude=("0",))).complete_before
    assert corner.build("update").complete_before
    corner.build(out=tmp_path / "once", select=Selection(exclude=("0",)))
    assert content(corner.out) == content(tmp_path / "once")
    for mode in ("append", "update"):
        with pytest.raises(UserError, match="was built with --exclude-episodes 0, and the cache keeps that: leave"):
            corner.build(mode, select=Selection(exclude=("1",)))
    with pytest.raises(UserError, match=r"sources.data.selection: cache has"):
        corner.build()  # the same place, without the selection


def test_a_cache_of_everything_keeps_everything(corner: Corner) -> None:
    corner.record(2).build()
    with pytest.raises(UserError, match="data was built with all episodes, and the cache keeps that: leave --include"):
        corner.build("append", select=Selection(("0",)))


def test_repair_makes_the_same_shards(corner: Corner) -> None:
    corner.record(3, with_pause).build(select=Selection(exclude=("0",), drop_idle=True))
    before = tree(corner.out)
    the_file(corner.out, "data/features/front/c/*/0/0").unlink()
    (corner.out / "data/action/c/0/0").unlink()
    repair(corner.out, device="cpu", say=lambda _: None)
    assert tree(corner.out) == before


# --- frames -----------------------------------------------------------------------------------------------------------


def features_of(path: Path, kept: dict[str, range]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(frames, features) of each episode that should be there."""
    d = Cache.open(path).datasets[0]
    for number, frames in kept.items():
        (e,) = np.flatnonzero(d.episode_id == int(number))
        rows = d.episode_start[e] + np.array(frames)
        assert d.has_features(np.arange(d.episode_start[e], d.episode_start[e] + d.episode_length[e])).sum() == len(
            rows
        )
        yield rows, d.features("front", rows)


def test_idle_frames_are_not_encoded(corner: Corner, tmp_path: Path) -> None:
    corner.record(3, with_pause).build(out=tmp_path / "all")
    config = corner.config(select=Selection(drop_idle=True))
    report = build(config)
    kept = sum(map(len, KEPT.values()))
    assert report.timing.images == 2 * kept
    assert "data: 0 of 3 episodes left out by --drop-idle, 36% of frames idle" in build_lines(config, report)
    whole, some = Cache.open(tmp_path / "all").datasets[0], Cache.open(corner.out).datasets[0]
    assert some.observations == kept and some.frames == whole.frames  # actions of all frames stay
    np.testing.assert_array_equal(some.action, whole.action)
    for rows, values in features_of(corner.out, KEPT):
        np.testing.assert_array_equal(values, whole.features("front", rows))
        np.testing.assert_array_equal(some.frame_of(some.observation_of(rows)), rows)
    with pytest.raises(ValueError, match="frame 10 has no features; the build left it out"):
        some.observation_of(np.array([10]))
    assert Cache.open(corner.out).manifest["format"] == 3  # an earlier release refuses it
    samples = Cache.open(corner.out).dataset(horizon=4)
    assert [int(samples[i]["frame_index"]) for i in range(len(samples))] == some.frame_of(np.arange(kept)).tolist()


def test_frames_to_keep_by_a_file_like_openpis(corner: Corner, tmp_path: Path) -> None:
    file = tmp_path / "keep.json"
    file.write_text(json.dumps({"0": [[0, 3], [6, 9]], "2": [[10, 16]]}))
    corner.record(3).build(select=Selection((str(file),)))
    kept = {"0": [0, 1, 2, 6, 7, 8], "2": range(10, 16)}
    assert Cache.open(corner.out).datasets[0].episode_id.tolist() == [0, 2]
    assert len(list(features_of(corner.out, kept))) == 2
    file.write_text(json.dumps({"0": [[0, 11]]}))
    with pytest.raises(UserError, match=r"frames \[0, 11\) of episode 0 of data, which has 10 frames"):
        corner.build(out=tmp_path / "other", select=Selection((str(file),)))


@pytest.mark.parametrize("how", [{}, {"augment": 1, "frame_stride": 2}])
def test_a_cache_without_idle_frames_is_exported_and_updated(corner: Corner, tmp_path: Path, how: dict) -> None:
    corner.record(2, with_pause).build(select=Selection(drop_idle=True), **how)
    export(corner.out, str(tmp_path / "tars"))
    import_cache(str(tmp_path / "tars"), tmp_path / "back")
    assert content(tmp_path / "back") == content(corner.out)
    corner.record(3, with_pause)
    report = corner.build("update", **how)
    assert report.timing.reused + report.adopted_shards > 0
    corner.build(out=tmp_path / "once", select=Selection(drop_idle=True), **how)
    assert content(corner.out) == content(tmp_path / "once")


def test_a_plan_foretells_what_is_kept(corner: Corner) -> None:
    found = plan_build(corner.record(3, with_pause).config(select=Selection(("1-2",), drop_idle=True)))
    assert found.observations == len(KEPT["1"]) + len(KEPT["2"])


# --- success ----------------------------------------------------------------------------------------------------------


def test_failed_demonstrations_are_named_or_left_out(corner: Corner, tmp_path: Path) -> None:
    config = corner.record(3, marked(1)).config()
    report = build(config)
    said = "data: 1 of 3 demonstrations marked as failed (1); --success-only leaves them out"
    assert said in build_lines(config, report)
    assert Cache.open(config.out).datasets[0].attributes["failed"] == [1]
    corner.build(out=tmp_path / "good", select=Selection(success_only=True))
    corner.build(out=tmp_path / "same", select=Selection(("0,2",)))
    assert content(tmp_path / "good") == content(tmp_path / "same")
    assert Cache.open(tmp_path / "good").datasets[0].episode_id.tolist() == [0, 2]
    with pytest.raises(UserError, match="all 1 demonstrations are marked as failed"):
        corner.build(out=tmp_path / "none", select=Selection(("1",), success_only=True))


def test_a_dataset_of_successes_keeps_its_bytes(corner: Corner, tmp_path: Path) -> None:
    corner.record(3).build(out=tmp_path / "plain")
    corner.record(3, marked()).build()
    assert content(corner.out) == content(tmp_path / "plain")
    assert "failed" not in Cache.open(corner.out).datasets[0].attributes


def test_success_only_where_nothing_says_so_is_refused(corner: Corner) -> None:
    with pytest.raises(UserError, match="no demonstration says whether it succeeded; leave it out"):
        corner.record(3).build(select=Selection(success_only=True))


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--include-episodes", "99"), ("data has no episode 99",)),
        (("--include-episodes", "0-1", "--exclude-episodes", "1"), ("both name episode 1 of data",)),
        (("--exclude-episodes", "0-"), ("no episode of data is left",)),
        (("--include-episodes", "2-0"), ("reversed",)),
        (("--include-episodes", "grab=0"), ("unknown dataset", "grab")),
        (("--include-episodes", "none.json"), ("cannot read none.json",)),
        (("--success-only",), ("no demonstration says",)),
    ],
)
@pytest.mark.parametrize("command", ["build", "plan"])
def test_bad_input_is_one_line(
    corner: Corner, dvla: Dvla, command: str, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    corner.record(3)
    how = ("--vlm-path", corner.vlm, "--resolution", 64, "--device", "cpu", "--out", corner.out)
    refused(dvla("cache", command, corner.source, *how, *options), *words)
    assert not corner.out.exists()


def test_a_list_of_episodes_marks_success_too(corner: Corner) -> None:
    def change(root: Path) -> None:
        rewrite(the_file(root, "meta/episodes/*/*.parquet"), lambda t: t.append_column("success", pa.array(marks)))

    marks = [True, False, None]
    source = open_source(str(corner.record(3, change).source))
    assert [source.success_of(number) for number in range(3)] == marks


def test_openpis_filter_of_droid(tmp_path: Path, vlm: Path) -> None:
    """Its keys name the recording; it lists recordings that a part of DROID does not have."""

    def recorded_as(number: int) -> Callable[[dict], None]:
        paths = {"recording_folderpath": f"r2d2/{number}/recordings/MP4", "file_path": f"/data/{number}/trajectory.h5"}
        return lambda features: features.update({f"episode_metadata/{k}": [v.encode()] for k, v in paths.items()})

    folder = rlds_samples.write_toy(tmp_path, change={n: recorded_as(n) for n in range(rlds_samples.EPISODES)})
    key = "r2d2/{0}/recordings/MP4--/data/{0}/trajectory.h5"
    file = tmp_path / "droid_sample_ranges_v1_0_1.json"
    kept = {key.format(1): [[0, 3]], key.format(4): [[0, 1], [2, 4]], key.format(5): [], key.format(99): [[0, 50]]}
    file.write_text(json.dumps(kept))
    source = open_source(str(folder), rlds_samples.toy_config())
    source.choose(Selection((str(file),)).by_dataset(["toy"])["toy"])
    assert source.episode_ids == (1, 4) and source.left_out == (0, 2, 3, 5, 6)
    assert source.choice.frames == {"1": ((0, 3),), "4": ((0, 1), (2, 4)), "5": ()}
