"""Bad input goes all the way through a build: one clear line each, the ledger names it, and everything else is built.

What readers alone say about damage is in the tests of each reader; here the whole of `build` runs, with a tiny VLM.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dvla.cache.loader.loader import gather
from dvla.cache.store.cache import Cache
from dvla.cache.store.checksums import verify_checksums
from dvla.cache.vlm.spec import EncoderSpec
from dvla.cache.vlm.tiny_qwen3vl import make_tiny_qwen3vl
from dvla.errors import UserError
from dvla.stages.caching.build import BuildReport, build
from dvla.stages.caching.config import BuildConfig
from dvla.stages.data.check.check import CheckConfig, check
from support import rlbench_samples
from support.lerobot_samples import LENGTHS, VIEWS, convert_to_v2, rewrite, with_column
from support.tolerances import assert_same_features
from support.vlm_samples import TINY

LISTED, PRESENT = 100, 11
HARMED = {  # episode → what the ledger says about it, after "damaged episode N: "
    1: r"episode_000001\.mp4 (is cut off|cannot be read as video|has no frame).*",
    2: r"episode_000002\.parquet cannot be read as parquet \(.*\)",
    4: r"column 'action' is nan at frame 3, dimension 2",
    5: r"episode_000005\.mp4 has 10 frames for 16 rows",
    6: r"(frame \d+ of )?episode_000006\.mp4 cannot be (decoded|read as video.*)",
    7: r"episode_000007\.mp4 has 13 frames for 12 rows",
    8: r"videos/chunk-000/observation\.images\.wrist/episode_000008\.mp4 is missing",
}
KINDS = {  # episode → what `data check` calls it
    1: "unreadable-file",
    2: "unreadable-file",
    4: "not-finite",
    5: "row-count",
    6: "unreadable-file",
    7: "row-count",
    8: "missing-file",
}
HEALTHY = [n for n in range(PRESENT) if n not in HARMED]  # 0, 3, 9, 10
MIDWAY = 6  # found while images are decoded: its rows are in the cache, marked


def lay_out(recorded: Path, root: Path) -> Path:
    """v2.1: `PRESENT` episodes that repeat the three recorded ones, `LISTED` in the metadata."""
    first = convert_to_v2(recorded, root.with_name("three"))
    shutil.copytree(first / "meta", root / "meta")
    listed = [json.loads(line) for line in (first / "meta/episodes.jsonl").read_text().splitlines()]
    lines = [json.dumps({**listed[n % 3], "episode_index": n}) for n in range(LISTED)]
    (root / "meta/episodes.jsonl").write_text("\n".join(lines) + "\n")
    for number in range(PRESENT):
        (root / "data/chunk-000").mkdir(parents=True, exist_ok=True)
        table = pq.read_table(first / f"data/chunk-000/episode_{number % 3:06d}.parquet")
        pq.write_table(
            with_column(table, "episode_index", [number] * table.num_rows),
            root / f"data/chunk-000/episode_{number:06d}.parquet",
        )
        for view in VIEWS:
            folder = Path(f"videos/chunk-000/observation.images.{view}")
            (root / folder).mkdir(parents=True, exist_ok=True)
            shutil.copy(first / folder / f"episode_{number % 3:06d}.mp4", root / folder / f"episode_{number:06d}.mp4")
    return root


def harm(root: Path) -> None:
    """What `HARMED` lists."""

    def table(number: int) -> Path:
        return root / f"data/chunk-000/episode_{number:06d}.parquet"

    def video(number: int, view: str = "front") -> Path:
        return root / f"videos/chunk-000/observation.images.{view}/episode_{number:06d}.mp4"

    def nan_action(rows: pa.Table) -> pa.Table:
        action = rows["action"].to_pylist()
        action[3][2] = float("nan")
        return with_column(rows, "action", action)

    video(1).write_bytes(video(1).read_bytes()[: video(1).stat().st_size * 6 // 10])
    table(2).write_bytes(table(2).read_bytes()[:-300])
    rewrite(table(4), nan_action)
    shutil.copy(video(3), video(5))
    spoil_picture(video(6), 6)
    rewrite(table(7), lambda rows: rows.slice(0, rows.num_rows - 1))
    video(8, "wrist").unlink()


def spoil_picture(path: Path, frame: int) -> None:
    """Overwrite the compressed bytes of one frame; the file's index stays whole."""
    with av.open(str(path)) as container:
        packets = sorted((p.pts, p.pos, p.size) for p in container.demux(video=0) if p.pts is not None)
    _, position, size = packets[frame]
    data = bytearray(path.read_bytes())
    data[position + 4 : position + size] = b"\xff" * (size - 4)
    path.write_bytes(data)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3vl(tmp_path_factory.mktemp("vlm") / "tiny", TINY)


def run(vlm: Path, source: Path, out: Path, **changes: Any) -> BuildReport:
    spec = EncoderSpec(str(vlm), resolution=64, dtype="float32")
    return build(
        BuildConfig(
            **{
                "sources": (str(source),),
                "encoder": spec,
                "out": out,
                "batch_size": 8,
                "shard_frames": 16,
                "device": "cpu",
                "allow_quarantine": True,
                **changes,
            }
        )
    )


def ledger(cache: Path) -> dict[int, str]:
    lines = [json.loads(line) for line in (cache / "quarantine.jsonl").read_text().splitlines()]
    return {line["episode_id"]: line["reason"] for line in lines}


@pytest.fixture(scope="module")
def damaged(
    recorded: dict[str, Path], vlm: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path, BuildReport]:
    """(damaged dataset, its cache, the cache of the same dataset before, report of the damaged one's build)."""
    base = tmp_path_factory.mktemp("bad")
    root = lay_out(recorded["hevc"], base / "damaged")
    run(vlm, root, base / "whole")
    harm(root)
    report = run(vlm, root, base / "cache")
    return root, base / "cache", base / "whole", report


# --- a dataset with everything wrong at once --------------------------------------------------------------------------


def test_each_damage_is_one_line_in_the_ledger(damaged: tuple[Path, Path, Path, BuildReport]) -> None:
    _, cache, _, report = damaged
    reasons = ledger(cache)
    assert set(reasons) == set(HARMED) | set(range(PRESENT, LISTED)) and report.quarantined == len(
        reasons
    ) == LISTED - len(HEALTHY)
    for number, pattern in HARMED.items():
        assert re.fullmatch(f"damaged episode {number}: {pattern}", reasons[number]), reasons[number]
    for number in range(PRESENT, LISTED):
        assert reasons[number] == f"damaged episode {number}: data/chunk-000/episode_{number:06d}.parquet is missing"


def test_nothing_else_is_lost(damaged: tuple[Path, Path, Path, BuildReport]) -> None:
    """Every healthy episode has the features (in other batches), actions and text it has in the cache of the undamaged
    dataset."""
    _, cache, whole, _ = damaged
    ours, all_of_it = Cache.open(cache).datasets[0], Cache.open(whole).datasets[0]
    assert ours.episode_id.tolist() == sorted([*HEALTHY, MIDWAY])
    assert ours.quarantined.tolist() == [n == MIDWAY for n in ours.episode_id.tolist()]
    assert all_of_it.episode_id.tolist() == [*range(PRESENT)] and not all_of_it.quarantined.any()
    for number in HEALTHY:
        here, there = (int(d.episode_start[d.episode_id.tolist().index(number)]) for d in (ours, all_of_it))
        length = LENGTHS[number % 3]
        for view in VIEWS:
            assert_same_features(
                ours.features(view, np.arange(here, here + length)),
                all_of_it.features(view, np.arange(there, there + length)),
            )
        np.testing.assert_array_equal(ours.action[here : here + length], all_of_it.action[there : there + length])
        np.testing.assert_array_equal(ours.proprio[here : here + length], all_of_it.proprio[there : there + length])
        mine, theirs = (
            d.instructions[d.episode_instruction[d.episode_id.tolist().index(number)]] for d in (ours, all_of_it)
        )
        assert mine == theirs


def test_a_marked_row_never_reaches_training(damaged: tuple[Path, Path, Path, BuildReport]) -> None:
    _, cache, _, _ = damaged
    opened = Cache.open(cache)
    start = int(opened.datasets[0].episode_start[opened.datasets[0].episode_id.tolist().index(MIDWAY)])
    with pytest.raises(ValueError, match="quarantined"):
        gather(opened, [0], [start], 4)
    assert verify_checksums(cache) == []


def test_building_again_changes_nothing(damaged: tuple[Path, Path, Path, BuildReport], vlm: Path) -> None:
    root, cache, _, _ = damaged
    before = {p: p.read_bytes() for p in sorted(cache.rglob("*")) if p.is_file() and p.name != ".lock"}
    again = run(vlm, root, cache)
    assert again.timing.images == 0 and again.quarantined == LISTED - len(HEALTHY)
    assert {p: p.read_bytes() for p in sorted(cache.rglob("*")) if p.is_file() and p.name != ".lock"} == before


def test_the_doctor_finds_the_same_episodes(damaged: tuple[Path, Path, Path, BuildReport]) -> None:
    root, cache, _, _ = damaged
    report = check(CheckConfig(str(root), everything=True))
    found, reasons = {f.episode: str(f) for f in report.facts.failures}, ledger(cache)
    assert found.keys() == reasons.keys() and report.must_fix
    assert {n: r for n, r in found.items() if n != MIDWAY} == {n: r for n, r in reasons.items() if n != MIDWAY}
    kinds = {f.episode: f.kind for f in report.facts.failures}
    assert {n: kinds[n] for n in HARMED} == KINDS and {kinds[n] for n in range(PRESENT, LISTED)} == {"missing-file"}
    (missing,) = [f for f in report.findings if f.rule == "missing-file" and len(f.episodes) > 1]
    assert missing.episodes == tuple(range(PRESENT, LISTED))  # 89 files in one finding


# --- refused as a whole -----------------------------------------------------------------------------------------------


def test_unknown_field_name(recorded: dict[str, Path], vlm: Path, tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(
        "embodiment: gripper_eef\naction:\n  - {fields: [eef_pos_x, eef_pos_y, eef_poz_z, gripper_open]}\nstate: []\n"
    )
    with pytest.raises(
        UserError, match=r"mine.yaml: .*unknown action field 'eef_poz_z'; did you mean 'eef_pos_z'\?"
    ) as caught:
        run(vlm, recorded["h264"], tmp_path / "cache", dataset_config=str(config))
    assert "\n" not in str(caught.value) and not (tmp_path / "cache").exists()


def test_nothing_present_at_all(recorded: dict[str, Path], vlm: Path, tmp_path: Path) -> None:
    root = lay_out(recorded["hevc"], tmp_path / "empty")
    shutil.rmtree(root / "data")
    said = (
        r"has no usable episode \(0 of 100 episodes present: 0 tables, 11 videos; empty episode 0: .*parquet is missing"
    )
    with pytest.raises(UserError, match=said):
        run(vlm, root, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


# --- archives and pickles ---------------------------------------------------------------------------------------------


class Runs:
    """A pickle of this makes a folder when it is loaded by Python's own unpickler."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._folder),)


def test_pickle_that_runs_code(vlm: Path, tmp_path: Path) -> None:
    task = rlbench_samples.write_task(tmp_path / "rlbench", "close_jar", 3)
    trap, victim = tmp_path / "trap", sorted(task.rglob("low_dim_obs.pkl"))[1]
    victim.write_bytes(pickle.dumps(Runs(trap)))
    report = run(vlm, tmp_path / "rlbench", tmp_path / "cache", views=("front",))
    dataset = Cache.open(tmp_path / "cache").datasets[0]
    assert (
        report.quarantined == 1 and dataset.episode_id.tolist() == [0, 2] and report.timing.images == dataset.frames > 0
    )
    assert re.fullmatch(
        r"rlbench episode 1: .*low_dim_obs.pkl asks for \w+.mkdir, which is not an observation record; refused",
        ledger(tmp_path / "cache")[1],
    )
    assert not trap.exists()
    pickle.loads(victim.read_bytes())
    assert trap.exists()  # the trap works


def test_archive_member_outside_its_folder(vlm: Path, tmp_path: Path) -> None:
    rlbench_samples.write_task(tmp_path / "loose", "close_jar", 2)
    packed = tmp_path / "rlbench" / "close_jar.zip"
    packed.parent.mkdir()
    with zipfile.ZipFile(packed, "w") as file:
        for path in sorted((tmp_path / "loose").rglob("*.p*")):
            file.write(path, path.relative_to(tmp_path / "loose"))
        file.writestr("../../evil.png", b"evil")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        UserError, match=r"close_jar.zip: member '../../evil.png' is outside its folder; the archive is refused"
    ) as caught:
        run(vlm, packed.parent, tmp_path / "cache")
    assert (
        "\n" not in str(caught.value)
        and sorted(tmp_path.rglob("*")) == before
        and not (tmp_path.parent / "evil.png").exists()
    )
