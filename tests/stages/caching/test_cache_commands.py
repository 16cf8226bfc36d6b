"""`dvla cache plan | status | inspect | diff | repair | gc` from the command line: what they print and repair."""

from __future__ import annotations

import collections
import dataclasses
import fcntl
import gc
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dvla.cache.store.cache import Cache
from dvla.cache.store.checksums import verify_checksums
from dvla.cache.store.feature_format import FeatureFormat
from dvla.cache.store.plan import BuildPlan, DatasetPlan, EpisodePlan
from dvla.cache.vlm.spec import EncoderSpec
from dvla.cache.vlm.tiny_qwen3vl import make_tiny_qwen3vl
from dvla.common.console import console
from dvla.errors import UserError
from dvla.stages.caching import sizes
from dvla.stages.caching.build import BuildReport, build
from dvla.stages.caching.cli import build_lines
from dvla.stages.caching.config import BuildConfig
from dvla.stages.caching.generations import ViewChange, generations
from dvla.stages.caching.planning.cluster import cluster_forecast, read_cluster, work_of
from dvla.stages.caching.planning.forecast import Measured, ViewCost, forecast
from dvla.stages.caching.planning.tables import show_cluster, show_forecast
from dvla.stages.caching.sizes import plan_nbytes, require_room
from dvla.stages.caching.upkeep import repair as cache_repair
from support import synthetic_cache as synthetic
from support.cli_runner import Dvla, argv, refused
from support.corner import tree
from support.lerobot_samples import LENGTHS, VIEWS
from support.vlm_samples import TINY

FRAMES = sum(LENGTHS)
Usage = collections.namedtuple("Usage", "total used free")


def times(path: Path) -> dict[str, int]:
    return {
        p.relative_to(path).as_posix(): p.stat().st_mtime_ns
        for p in sorted(path.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


def flip(file: Path, at: int = 7) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def declined(result: Any, damaged: str, *words: str) -> None:
    """Refused after saying which file is damaged."""
    assert f"{damaged}: altered" in result.out
    refused(result._replace(out=""), *words)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("commands") / "cache"
    synthetic.build(path)
    return path


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "cache")


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3vl(tmp_path_factory.mktemp("vlm") / "tiny", TINY)


def configure(source: Path, vlm: Path, out: Path, **changes: Any) -> BuildConfig:
    spec = EncoderSpec(str(vlm), resolution=64, dtype="float32")
    return BuildConfig(
        **{
            "sources": (str(source),),
            "encoder": spec,
            "out": out,
            "batch_size": 5,
            "shard_frames": 8,
            "device": "cpu",
            **changes,
        }
    )


@pytest.fixture(scope="module")
def built(recorded: dict[str, Path], vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An 8-bit cache of two views with an augmented variant, on a source of its own."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(recorded["h264"], folder / "source")
    build(configure(folder / "source", vlm, folder / "cache", format=FeatureFormat("int8"), augment=1))
    return folder / "cache"


# --- status -----------------------------------------------------------------------------------------------------------


def test_status_of_unfinished_finished_and_next(dvla: Dvla, whole: Path, tmp_path: Path) -> None:
    path, plan = tmp_path / "cache", synthetic.make_plan()
    synthetic.build(path, stop_after=3)
    (path / "alpha" / ".left.tmp-7").write_bytes(b"half")
    result = dvla("cache", "status", path, "--json", tmp_path / "status.json")
    assert result.code == 0 and result.err == ""
    total = len(plan.tasks())
    assert (
        f"{path}: unfinished, 3 of {total} shards" in result.out
        and "1 temporary files" in result.out
        and "missing" in result.out
    )
    (found,) = json.loads((tmp_path / "status.json").read_text())
    counts = {(a["dataset"], a["array"]): (a["done"], a["shards"]) for a in found["arrays"]}
    rows = {d.name: d.frames for d in plan.datasets}
    assert counts == {
        (d.name, v): (3 if v == "front" else 0, -(-rows[d.name] // synthetic.SHARD))
        for d in plan.datasets
        for v in d.views
    }
    assert found["quarantined"] == 1 and not found["building"] and found["tables_missing"] == ["alpha", "beta"]
    assert found["bytes"] == sum(p.stat().st_size for p in path.glob("*/features/*/c/*/0/0"))

    shutil.move(path, tmp_path / "cache.next")
    shutil.copytree(whole, path)
    shutil.copytree(whole, tmp_path / "cache.gen-2")
    out = dvla("cache", "status", path).out
    assert f"{path}: finished, {total} of {total} shards" in out and "2 quarantined" in out
    assert out.index(f"{path}.next: unfinished") < out.index(f"{path}.gen-2: finished") and "resolution 448" in out
    next(path.glob("*/features/*/c/1/0/0")).unlink()
    assert f"{path}: unfinished, {total - 1} of {total} shards" in dvla("cache", "status", path).out


def test_status_sees_a_builder(dvla: Dvla, copy: Path) -> None:
    assert "being built" not in dvla("cache", "status", copy).out
    with open(copy / ".lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "being built now" in dvla("cache", "status", copy).out
    assert "being built" not in dvla("cache", "status", copy).out


@pytest.mark.parametrize("command", [("status",), ("inspect",), ("repair",), ("gc",), ("diff", ".")], ids=" ".join)
def test_no_cache_is_refused(
    dvla: Dvla, tmp_path: Path, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    where = "." if command[0] == "diff" else "folder"
    refused(
        dvla("cache", *command, tmp_path / "none"),
        *(["is not a dvla cache"] if command[0] == "diff" else ["no cache at", "none"]),
    )
    refused(dvla("cache", *command, tmp_path / "folder"), f"{where} is not a dvla cache")
    assert list((tmp_path / "folder").iterdir()) == []


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_and_norm_images(dvla: Dvla, whole: Path, tmp_path: Path) -> None:
    result = dvla("cache", "inspect", whole, "--out", tmp_path / "norms")
    assert result.code == 0 and result.err == ""
    for words in (
        "97 frames",
        "7 episodes of 1 to 30 frames",
        "30 Hz",
        "instructions (3)",
        "“alpha task 0” (3)",
        "qwen3vl",
        "eef_pos_x",
    ):
        assert words in result.out, words
    names = {"alpha.front.png", "alpha.wrist.png", "beta.top.png"}
    assert {p.name for p in (tmp_path / "norms").iterdir()} == names
    picture = np.asarray(Image.open(tmp_path / "norms" / "beta.top.png")).astype(int)
    dataset = Cache.open(whole).named("beta")
    rows = np.unique(np.linspace(0, dataset.frames - 1, 8).astype(int))
    norms = np.linalg.norm(dataset.features("top", rows).astype(np.float32), axis=-1)  # [8,3], one row of tokens
    cells = np.stack([picture[8, f * 52 + 8 + 16 * t] for f in range(8) for t in range(3)]).sum(
        1
    )  # viridis brightens with the norm
    assert (
        np.argmax(cells) == np.argmax(norms)
        and np.argmin(cells) == np.argmin(norms)
        and picture.shape == (16, 8 * 52 - 4, 3)
    )
    before = times(tmp_path / "norms")
    refused(dvla("cache", "inspect", whole, "--out", tmp_path / "norms"), "exists; choose another --out")
    assert times(tmp_path / "norms") == before


# --- diff -------------------------------------------------------------------------------------------------------------


def test_diff_of_equal_and_other_caches(dvla: Dvla, whole: Path, copy: Path, tmp_path: Path) -> None:
    result = dvla("cache", "diff", whole, copy)
    assert result.code == 0 and "the caches are equal" in result.out and result.err == ""

    synthetic.build(tmp_path / "shards", plan=synthetic.make_plan(shard_frames=5))  # other files, the same features
    result = dvla("cache", "diff", whole, tmp_path / "shards", "--json", tmp_path / "diff.json")
    found = json.loads((tmp_path / "diff.json").read_text())
    assert (
        result.code == 1 and found["fingerprint"] == ["store.shard_frames: A has 16, B has 5"] and found["only"] == []
    )
    assert all(a["equal"] and a["relative"] == 0 for a in found["arrays"]) and not found["same_files"]
    assert {(a["dataset"], a["array"]) for a in found["arrays"]} >= {
        ("alpha", "wrist"),
        ("beta", "top"),
        ("beta", "action"),
    }

    synthetic.build(tmp_path / "int8", plan=synthetic.make_plan(**synthetic.SETTINGS["int8-zstd-stride2-variant"]))
    assert dvla("cache", "diff", whole, tmp_path / "int8", "--json", tmp_path / "diff.json").code == 1
    found = json.loads((tmp_path / "diff.json").read_text())
    features = [a for a in found["arrays"] if a["array"] in ("front", "wrist", "top")]
    assert len(features) == 3 and all(0 < a["relative"] < 0.02 and not a["equal"] for a in features)
    assert any(line == "store.dtype: A has float16, B has int8" for line in found["fingerprint"])


def test_diff_names_episodes_and_unsampled_changes(
    dvla: Dvla, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = synthetic.make_plan()
    alpha = dataclasses.replace(plan.datasets[0], episodes=plan.datasets[0].episodes[:-2])
    changed = dataclasses.replace(alpha.episodes[0], source_hash="another")
    alpha = dataclasses.replace(alpha, episodes=(changed, *alpha.episodes[1:]))
    synthetic.build(tmp_path / "less", plan=dataclasses.replace(plan, datasets=(alpha,)))
    result = dvla("cache", "diff", whole, tmp_path / "less")
    assert result.code == 1
    for line in (
        "dataset beta only in A",
        "2 episodes of alpha only in A: 15, 16",
        "1 episodes of alpha have another source: 10",
    ):
        assert line in result.out

    feature = synthetic.feature
    monkeypatch.setattr(
        synthetic,
        "feature",
        lambda d, v, row, variant=0: feature(d, v, row, variant) + np.float16((d, row) == ("beta", 50)),
    )
    synthetic.build(tmp_path / "one")
    refused(dvla("cache", "diff", whole, tmp_path / "one", "--samples", 0), "--samples is 0; it must be at least 1")
    found = dvla("cache", "diff", whole, tmp_path / "one", "--samples", 1000)
    assert found.code == 1 and [line.split()[1] for line in found.out.splitlines() if "differs" in line] == ["top"]
    few = dvla(
        "cache", "diff", whole, tmp_path / "one", "--samples", 1
    )  # frame 50 is not drawn; the checksums still tell
    assert few.code == 1 and "but some checksums differ" in few.out


# --- gc ---------------------------------------------------------------------------------------------------------------


def test_gc_lists_asks_and_leaves_the_cache_alone(
    dvla: Dvla, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "nothing to remove" in dvla("cache", "gc", copy).out
    old, shared = tmp_path / "cache.gen-1", "beta/features/top/c/0/0/0"
    shutil.copytree(copy, old)
    (old / shared).unlink()
    os.link(copy / shared, old / shared)
    (tmp_path / "cache.next").mkdir()
    (tmp_path / "cache.next" / "fingerprint.json").write_text("{}")
    (copy / "alpha" / ".x.tmp-1").write_bytes(bytes(100))
    before, sizes = tree(copy), sum(p.stat().st_size for p in old.rglob("*") if p.is_file())
    listed = dvla("cache", "gc", copy)
    assert listed.code == 0 and "nothing was removed; give --yes" in listed.out
    assert (
        all(kind in listed.out for kind in ("earlier generation", "unfinished generation", "temporary file"))
        and tree(copy) == before
    )
    with open(copy / ".lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(dvla("cache", "gc", copy, "--yes"), "another process is building")
    assert old.exists() and tree(copy) == before
    from dvla.stages.caching.upkeep.garbage import garbage

    frees = {g.kind: (g.bytes, g.frees) for g in garbage(copy)}
    assert frees["earlier generation"] == (sizes, sizes - len(before[shared])) and frees["temporary file"] == (100, 100)
    assert dvla("cache", "gc", copy, "--yes").code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache"]
    assert tree(copy) == {k: v for k, v in before.items() if k != "alpha/.x.tmp-1"} and verify_checksums(copy) == []


def test_gc_keeps_the_generation_that_a_training_reads(dvla: Dvla, copy: Path, tmp_path: Path) -> None:
    """A training keeps the generation it opened after `--append` has put the next one in its place."""
    reader = Cache.open(copy)
    copy.rename(tmp_path / "cache.gen-1")
    shutil.copytree(tmp_path / "cache.gen-1", copy)
    said = dvla("cache", "gc", copy, "--yes")
    assert said.code == 0 and "in use" in said.out and "nothing to remove but what is in use" in said.out
    reader.datasets[0].feature("front", 90)  # a shard that was not open yet
    del reader
    gc.collect()
    assert "1 removed" in dvla("cache", "gc", copy, "--yes").out and not (tmp_path / "cache.gen-1").exists()


def test_gc_asks_on_a_terminal(dvla: Dvla, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(copy, tmp_path / "cache.gen-1")
    monkeypatch.setattr("dvla.common.console.console._force_terminal", True)
    answers = iter(["yes", "remove"])
    monkeypatch.setattr("typer.prompt", lambda *a, **k: next(answers))
    assert "nothing was removed" in dvla("cache", "gc", copy).out and generations(copy)
    assert "freed" in dvla("cache", "gc", copy).out and not generations(copy)


def test_gc_leaves_an_interrupted_exchange(dvla: Dvla, copy: Path, tmp_path: Path) -> None:
    copy.rename(tmp_path / "cache.next")
    shutil.copytree(tmp_path / "cache.next", tmp_path / "cache.gen-1")
    refused(dvla("cache", "gc", copy, "--yes"), "interrupted while it took in its next generation")
    assert (tmp_path / "cache.next").exists() and (tmp_path / "cache.gen-1").exists()


# --- repair -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    ["zarr.json", "manifest.json", "manifest entry", "manifest value", "quarantine.jsonl", "features/front/zarr.json"],
)
def test_metadata_is_repaired_without_a_vlm(dvla: Dvla, copy: Path, damage: str) -> None:
    before = tree(copy)
    if damage.startswith("manifest "):
        manifest = json.loads((copy / "manifest.json").read_text())
        if damage == "manifest value":
            manifest["frames"] += 1
        else:
            manifest["files"]["alpha/action/c/0/0"]["crc32c"] ^= 1
        (copy / "manifest.json").write_text(json.dumps(manifest))
    elif damage == "quarantine.jsonl":
        (copy / damage).unlink()
    else:
        flip(copy / ("alpha" if "/" in damage else ".") / damage, 0)
    result = dvla("cache", "repair", copy)
    assert (
        result.code == 0
        and result.err == ""
        and ": intact again; rebuilt the metadata" in result.out
        and tree(copy) == before
    )


def test_repair_of_a_whole_cache_changes_nothing(dvla: Dvla, copy: Path) -> None:
    before = times(copy)
    assert "all files are intact" in dvla("cache", "repair", copy).out and times(copy) == before


def test_what_cannot_be_repaired_is_refused(dvla: Dvla, copy: Path) -> None:
    flip(copy / "alpha/features/front/c/0/0/0")
    before = tree(copy)
    declined(
        dvla("cache", "repair", copy), "alpha/features/front/c/0/0/0", "neither", "tells what alpha was built from"
    )  # a synthetic cache has no source
    flip(copy / "fingerprint.json", 40)
    refused(dvla("cache", "repair", copy), "put back a copy of", "fingerprint.json", "damaged")
    assert tree(copy) == before | {"fingerprint.json": (copy / "fingerprint.json").read_bytes()}
    with open(copy / ".lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(dvla("cache", "repair", copy), "another process is building")
    shutil.rmtree(copy / ".commits")
    refused(dvla("cache", "repair", copy), "has no commit records")


def damage_everything(cache: Path) -> None:
    """A flipped bit, a truncated shard, a deleted table, a scale, the channel scales, a commit record, metadata."""
    name = "source"
    flip(cache / name / "features/front/c/2/0/0")
    shard = cache / name / "features/wrist.aug1/c/1/0/0"
    shard.write_bytes(shard.read_bytes()[:-30])
    flip(cache / name / "scales/wrist/c/3/0")
    (cache / name / "action/c/0/0").unlink()
    flip(cache / "channel_scale/c/0")
    (cache / ".commits" / name / "front" / "4.json").write_bytes(b"{")
    flip(cache / "zarr.json")


def test_repair_gives_the_undamaged_bytes_and_only_those(dvla: Dvla, built: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(built, tmp_path / "cache")
    damage_everything(cache)
    before = times(cache)
    result = dvla("cache", "repair", cache, "--device", "cpu")
    assert result.code == 0, result
    assert tree(cache) == tree(built) and verify_checksums(cache) == []
    assert (
        "intact again; rebuilt 4 shards, the tables of source, the metadata" in result.out
        and "source/features/front/c/2/0/0: altered" in result.out
        and "other bytes" not in result.out
    )
    after = times(cache)
    shards = {name for name in before if "/features/" in name and "/c/" in name}
    assert {n for n in shards if before[n] != after[n]} == {
        f"source/features/{n}/0/0" for n in ("front/c/2", "front/c/4", "wrist/c/3", "wrist.aug1/c/1")
    }


def test_an_interrupted_repair_leaves_an_unfinished_cache(
    dvla: Dvla, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = shutil.copytree(built, tmp_path / "cache")
    flip(cache / "source/features/front/c/2/0/0")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(cache_repair, "run_here", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("killed")))
        cache_repair.repair(cache, device="cpu", say=lambda _: None)
    with pytest.raises(UserError, match="is incomplete"):
        Cache.open(cache)
    assert dvla("cache", "repair", cache, "--device", "cpu").code == 0 and tree(cache) == tree(built)


def test_channel_scales_come_back_to_the_bit_or_not_at_all(
    dvla: Dvla, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = shutil.copytree(built, tmp_path / "cache")
    flip(cache / "channel_scale/c/0")
    before, measure = tree(cache), cache_repair.pilot_features
    monkeypatch.setattr(
        cache_repair, "pilot_features", lambda *a: 1.01 * measure(*a)
    )  # as after --append, or on other hardware
    declined(
        dvla("cache", "repair", cache, "--device", "cpu"),
        "channel_scale/c/0",
        "channel scales measured now are not the same",
    )
    assert tree(cache) == before
    shutil.copytree(built, tmp_path / "cache.gen-1")  # an earlier generation has them
    assert dvla("cache", "repair", cache, "--device", "cpu").code == 0 and tree(cache) == tree(built)


def test_repair_refuses_another_source_or_vlm(dvla: Dvla, built: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(built, tmp_path / "cache")
    flip(cache / "source/features/front/c/2/0/0")
    before = tree(cache)
    other = make_tiny_qwen3vl(tmp_path / "other", dataclasses.replace(TINY, seed=1))
    declined(
        dvla("cache", "repair", cache, "--vlm-path", other, "--device", "cpu"),
        "source/features/front/c/2/0/0",
        "was not built from",
        "encoder.weights_sha256",
    )
    moved = shutil.copytree(built.parent / "source", tmp_path / "source")
    info = moved / "meta" / "info.json"
    content = json.loads(info.read_text())
    info.write_text(json.dumps(content | {"robot_type": content["robot_type"], "note": "edited"}))
    declined(
        dvla("cache", "repair", cache, "--source", moved, "--device", "cpu"),
        "source/features/front/c/2/0/0",
        "was not built from",
        "sources.source.revision",
    )
    assert tree(cache) == before
    shutil.copy(built.parent / "source" / "meta" / "info.json", info)  # the same source at another place
    flip(cache / "source/action/c/0/0")
    assert dvla("cache", "repair", cache, "--source", moved, "--device", "cpu").code == 0 and tree(cache) == tree(built)


# --- plan -------------------------------------------------------------------------------------------------------------


def test_plan_counts_what_a_build_writes(dvla: Dvla, recorded: dict[str, Path], vlm: Path, tmp_path: Path) -> None:
    options = argv(
        f"{recorded['h264']} --vlm tiny_qwen3vl --vlm-path {vlm} --resolution 128 --tokens 4 --dtype int8 "
        f"--frame-stride 3 --augment 1 --out {tmp_path / 'cache'} --device cpu --shard-frames 8"
    )
    result = dvla(
        *argv("cache plan"),
        *options,
        *argv(
            f"--price 2.5 --pilot 8 --json {tmp_path / 'plan.json'} --model-size tiny --draws 2 "
            "--train-samples-per-second measured"
        ),
    )
    assert result.code == 0 and result.err == "", result
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]  # the temporary shard is gone
    found = json.loads((tmp_path / "plan.json").read_text())
    measured = found["measured"]
    told = dvla("cache", "build", *options)
    assert told.code == 0 and "stored as int8: relative error 0.0" in told.out
    assert float(re.search(r"pooled to 4 tokens: relative error (\S+)", told.out)[1]) == pytest.approx(
        measured["pooling_error"], rel=0.5
    )
    cache = Cache.open(tmp_path / "cache")
    dataset = cache.datasets[0]
    assert (found["frames"], found["observations"], found["pictures"]) == (
        FRAMES,
        dataset.observations,
        4 * dataset.observations,
    )
    assert found["bytes_per_sample"] == 2 * 4 * (32 + 4)
    features = sum(
        e["bytes"] for n, e in cache.manifest["files"].items() if "/c/" in n and ("/features/" in n or "/scales/" in n)
    )
    plan = BuildPlan.from_document(cache.fingerprint["store"])
    data = sum(e["bytes"] for n, e in cache.manifest["files"].items() if "/c/" in n)
    assert sizes.features_nbytes(plan, plan.tasks()) == features and found["bytes"] == pytest.approx(data, rel=0.1)
    assert (
        0 < measured["storing_error"][0] < 0.05
        and 0 < measured["pooling_error"] < 1
        and 0 < measured["stride_change"] < 3
    )
    assert found["hours"] > 0 and found["cost"] == pytest.approx(2.5 * found["hours"])
    assert 0 < found["train_samples"] <= min(found["read_samples"], measured["model"])
    assert {(v["dataset"], v["view"], v["observations"]) for v in found["views"]} == {
        ("h264", v, dataset.observations) for v in VIEWS
    }


def test_plan_without_pooling_or_stride(dvla: Dvla, recorded: dict[str, Path], vlm: Path, tmp_path: Path) -> None:
    options = argv(
        f"{recorded['image']} --vlm tiny_qwen3vl --vlm-path {vlm} --resolution 64 "
        f"--out {tmp_path / 'deep' / 'cache'} --device cpu"
    )
    result = dvla(
        *argv("cache plan"),
        *options,
        *argv(f"--pilot 4 --json {tmp_path / 'p.json'} --disk-rate 1e-6 --train-samples-per-second 1e9"),
    )
    found = json.loads((tmp_path / "p.json").read_text())
    assert (
        result.code == 0
        and found["measured"]["pooling_error"] is None
        and found["measured"]["stride_change"] is None
        and found["cost"] is None
    )
    assert (
        found["train_binds"] == "reading"
        and found["read_samples"] == pytest.approx(1e3 / (2 * 4 * 32 * 2))
        and "tables" in result.out
    )
    for wrong, words in (
        (("--pilot", 1), "it must be at least 2 (--pilot)"),
        (("--price", -1), "--price"),
        (("--train-samples-per-second", "fast"), "a number, or 'measured'"),
        (("--frame-stride", 0), "it must be at least 1 (--frame-stride)"),
        (("--json", tmp_path / "p.json" / "none"), "cannot write"),
        (("--dtype", "int4"), "unknown --dtype"),
        (("--model-size", "huge", "--train-samples-per-second", "measured"), "DiT size"),
    ):
        refused(dvla("cache", "plan", *options, "--pilot", 4, *wrong), words)
    refused(dvla("cache", "plan", "--vlm-path", vlm), "no source given")


def one_dataset(lengths: tuple[int, ...], **settings: Any) -> BuildPlan:
    episodes = tuple(EpisodePlan(i, n, "go", "") for i, n in enumerate(lengths))
    return BuildPlan((DatasetPlan("d", ("a", "b"), episodes),), 4, 32, 8, **settings)


def measured(**changes: Any) -> Measured:
    views = tuple(ViewCost("d", view, load=0.5, reload=0.0625, first=0.25, following=0.125) for view in ("a", "b"))
    return Measured(
        **{
            "views": views,
            "encode": 1.0,
            "compression": 1.0,
            "write": 1e9,
            "read": 1e6,
            "read_warm": 1e8,
            "model": None,
            "storing_error": (0, 0),
            "pooling_error": None,
            "stride_change": None,
            **changes,
        }
    )


def test_forecast_is_the_arithmetic_it_says() -> None:
    plan = one_dataset((10, 5))
    f = forecast(plan, measured(), free=10**9, memory=0, price=36.0)
    decode = 2 * (2 * 0.3125 + 13 * 0.125)
    assert f.seconds == {
        "tables": pytest.approx(1.0),
        "decode": pytest.approx(decode),
        "encode": 30.0,
        "write": pytest.approx(f.bytes / 1e9),
    }
    assert f.binds == "encode" and f.hours * 3600 == pytest.approx(1.0 + 30.0) and f.cost == pytest.approx(31 / 100)
    assert (
        f.read_samples == pytest.approx(1e6 / f.bytes_per_sample)
        and f.bytes_per_sample == 2 * 4 * 32 * 2
        and f.bytes == plan_nbytes(plan)
    )
    assert forecast(plan, measured(), free=0, memory=10**12).read_samples == pytest.approx(
        1e8 / f.bytes_per_sample
    )  # it stays in memory
    assert f.fits and not forecast(plan, measured(), free=f.bytes, memory=0).fits
    shared = forecast(plan, measured(), free=0, memory=0, overlap=False)
    assert shared.hours * 3600 == pytest.approx(1 + 30 + decode + f.seconds["write"])
    half = forecast(plan, measured(), free=0, memory=0, parallel=2)
    assert half.hours * 3600 == pytest.approx(1 + 15)
    assert f.break_even_epoch == 2  # one live epoch takes 30 s, the build 31 s
    assert forecast(one_dataset((10, 5), variants=3), measured(), free=0, memory=0).break_even_epoch == 5
    assert (
        forecast(plan, measured(read=1.0), free=0, memory=0).break_even_epoch is None
    )  # reading is slower than encoding
    assert forecast(plan, measured(compression=2.0), free=0, memory=0).bytes_per_sample == f.bytes_per_sample / 2
    bound = forecast(plan, measured(model=5.0), free=0, memory=0)
    assert bound.train_samples == 5.0 and bound.train_binds == "model"
    assert f.shares == () and f.bytes_to_write == f.bytes


def test_forecast_of_an_update_counts_what_stays() -> None:
    """8 of the first episode's 10 observations lie in a reused shard, 2 are copied; the 5 of the second are encoded."""
    plan, record = one_dataset((10, 5), variants=1), 4 * 32 * 2
    changed = [ViewChange("d", "a", 0, 5, 2, 8, 1), ViewChange("d", "b", 5, 0, 2, 8, 1)]
    f = forecast(plan, measured(), free=10**9, memory=0, changed=changed)
    whole = forecast(plan, measured(), free=10**9, memory=0)
    assert [(s.kind, s.pictures, s.bytes) for s in f.shares] == [
        ("new", 10, 10 * record),
        ("again", 10, 10 * record),
        ("copied", 8, 8 * record),
        ("adopted", 32, 32 * record),
    ]
    assert [s.hours * 3600 for s in f.shares] == pytest.approx([10.0, 10.0, 8 * record / 1e9, 0.0])
    assert (
        f.seconds["decode"] == pytest.approx(2 * 2 * (0.3125 + 4 * 0.125)) and f.seconds["encode"] == f.pictures == 20
    )
    assert (
        f.seconds["tables"] == whole.seconds["tables"]
        and f.bytes == whole.bytes
        and f.bytes_to_write == f.bytes - 32 * record
    )
    assert (
        f.hours * 3600 == pytest.approx(1.0 + 20.0)
        and f.fits
        and not forecast(plan, measured(), free=f.bytes_to_write, memory=0, changed=changed).fits
    )


# --- lines ---


def test_lines_fit_eighty_columns(dvla: Dvla, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(whole, tmp_path / "cache")
    shutil.copytree(whole, tmp_path / "cache.gen-1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "width", 80)
    for command in ("status", "inspect", "verify", "gc", "repair"):
        out = dvla("cache", command, "cache").out.replace(f"{tmp_path}/", "")
        assert out and max(map(len, out.splitlines())) <= 80, out
    assert max(map(len, dvla("cache", "diff", "cache", "cache.gen-1").out.splitlines())) <= 80


def test_forecasts_fit_eighty_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, "width", 80)
    plan = one_dataset((10**6, 5 * 10**6), variants=3)
    found = measured(
        model=12345.6, pooling_error=0.123456, stride_change=0.123456, compression=1.23456, storing_error=(0.1, 0.2)
    )
    forecasts = [forecast(plan, found, free=1, memory=m, price=36.0, draws=16) for m in (0, 10**14)]
    forecasts.append(dataclasses.replace(forecasts[0], boundary=12, quarantined=123))
    words = "language layers 8, 16, 24 side by side, image and prompt tokens"
    told = {"features": words, "tokens": (228, 6144), "prompt": (4096, 4096), "reads": "observation"}
    forecasts.append(dataclasses.replace(forecasts[0], **told))
    for f in forecasts:
        show_forecast(f)
    show_cluster(cluster_forecast(work_of(forecasts[0], 10**8, None), read_cluster("cluster"), model=123.4))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 50 and max(map(len, lines)) <= 80, max(lines, key=len)


def test_the_closing_lines_of_a_build(tmp_path: Path) -> None:
    config = BuildConfig((), EncoderSpec("vlm", tokens=49), Path("caches/droid"), format=FeatureFormat("int8", "none"))
    report = BuildReport(config.out, 35_000_000, 10**13, 12345, 0, 123, 98765.4, error=(0.0081, 0.021), pooled=0.31)
    again = build_lines(config, report)
    assert again[1] == "12345 shards reused; 98765.4 s, already complete"
    report.timing.images, report.timing.encode, report.previous = 70_000_000, 9e4, Path("caches/droid.gen-12")
    lines = build_lines(config, report)
    assert "709 images/s, bottleneck: encoding" in lines[1] and lines[3] == "previous generation: caches/droid.gen-12"
    assert max(map(len, [*again, *lines])) <= 80, max(lines, key=len)
    assert lines[-2].startswith("peak memory of this process: ")


# --- room -------------------------------------------------------------------------------------------------------------


def test_plan_bytes_are_those_of_a_cache(whole: Path, tmp_path: Path) -> None:
    manifest = Cache.open(whole).manifest
    data = sum(e["bytes"] for n, e in manifest["files"].items() if "/c/" in n and "/text/" not in n)
    plan = synthetic.make_plan()
    assert plan_nbytes(plan) == pytest.approx(data, rel=0.1)


def test_a_build_that_the_disk_cannot_hold_is_refused(
    dvla: Dvla, recorded: dict[str, Path], vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = argv(
        f"cache build {recorded['h264']} --vlm tiny_qwen3vl --vlm-path {vlm} --resolution 64 "
        f"--out {tmp_path / 'cache'} --device cpu --shard-frames 8 --batch-size 5"
    )
    room = [60_000]
    monkeypatch.setattr(sizes.shutil, "disk_usage", lambda path: Usage(10**9, 0, room[0]))
    refused(
        dvla(*options),
        "needs 62.7 KiB more",
        "58.6 KiB free",
        "--dtype",
        "--tokens",
        "--frame-stride",
        "dvla cache plan",
    )
    assert not (tmp_path / "cache").exists()
    room[0] = 10**6
    assert dvla(*options).code == 0
    for shard in (tmp_path / "cache").glob("h264/features/front/c/*/0/0"):
        if shard.parts[-3] != "0":
            shard.unlink()
    room[0] = 10_000  # four of ten shards are missing
    assert dvla(*options).code == 0 and verify_checksums(tmp_path / "cache") == []


def test_room_counts_only_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = synthetic.make_plan()
    monkeypatch.setattr(sizes.shutil, "disk_usage", lambda path: Usage(0, 0, 4500))
    require_room(plan, tmp_path / "a" / "b", plan.tasks()[:2], [])
    with pytest.raises(UserError, match="needs .* more, and its disk has 4.4 KiB free"):
        require_room(plan, tmp_path / "a" / "b", plan.tasks()[:6], [])
    packed = dataclasses.replace(plan, format=FeatureFormat("float16", "zstd"))  # may become smaller, so is counted so
    require_room(packed, tmp_path, plan.tasks()[:6], [])
