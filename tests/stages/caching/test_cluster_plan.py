"""The cost model of a cluster: identities and limits of its arithmetic, and `dvla cache plan --cluster`."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from dvla.cache.vlm.tiny_qwen3vl import make_tiny_qwen3vl
from dvla.common.documents import read_json
from dvla.errors import UserError
from dvla.stages.caching.planning.cluster import GB, Pool, Work, cluster_forecast, read_cluster, stage_one
from support.cli_runner import Dvla, argv, refused
from support.repository import ROOT
from support.run_samples import TINY

WORK = Work(
    frames=35_000_000,
    images=2,
    stored=196 * 2048 * 2,
    rows=1032,
    source=0.0,
    encode=1 / 600,
    decode=1e-3,
    table=1e-5,
    shard_frames=334,
)
POOL = Pool(workers=8, devices=8, cores=12, start=60, overhead=0.2)


def test_the_corpus_of_the_proposal() -> None:
    """35 M frames with two views of merged Qwen3-VL tokens on 64 GPUs: 56 TB, as counted by hand."""
    found = cluster_forecast(WORK, read_cluster("cluster"), model=1000.0)
    assert found.bytes == pytest.approx(35e6 * (2 * 802_816 + 1032)) and found.gpus == 64
    shards = math.ceil(35e6 / 334) * 2
    assert found.build.shards == shards and found.build.rounds == math.ceil(shards / 64)
    alone = 70e6 / 600 / 64  # seconds of encoding alone
    assert alone < found.build.work < 1.5 * alone
    assert found.build.binds == "write" and found.build_write < 20 * GB  # 64 GPUs encode faster than the store takes
    assert found.build_cost == pytest.approx(found.build_hours * 64 * 3.0)
    assert (
        found.train_binds == "store"
        and found.first_epoch == pytest.approx(40 * GB / (2 * 802_816))
        and found.later_epochs == found.first_epoch
    )
    small = cluster_forecast(dataclasses.replace(WORK, stored=49 * 2048.0), read_cluster("cluster"), model=1000.0)
    assert small.build.binds == "encode"
    assert small.train_binds == "model" and small.first_epoch == 64_000


def test_more_of_anything_never_takes_longer_and_work_adds_up() -> None:
    base = stage_one(WORK, POOL)
    for changes in ({"workers": 16, "devices": 16}, {"cores": 24}, {"start": 1}, {"overhead": 0.0}):
        assert stage_one(WORK, dataclasses.replace(POOL, **changes)).seconds <= base.seconds
    twice = stage_one(dataclasses.replace(WORK, frames=70_000_000), POOL)
    assert twice.seconds - twice.start == pytest.approx(2 * (base.seconds - base.start), rel=1e-3)
    shared = stage_one(WORK, dataclasses.replace(POOL, workers=16))  # of 8 devices, by two each
    assert shared.work == pytest.approx(base.work, rel=1e-3) and shared.start == 2 * base.start


def test_what_binds() -> None:
    assert stage_one(WORK, POOL).binds == "encode"
    assert stage_one(dataclasses.replace(WORK, decode=1.0), POOL).binds == "decode"
    assert stage_one(dataclasses.replace(WORK, source=1e6), dataclasses.replace(POOL, source_read=1e8)).binds == "read"
    slow = stage_one(WORK, dataclasses.replace(POOL, store_write=1e8))
    assert slow.binds == "write" and slow.seconds == pytest.approx(slow.start + slow.tables + slow.write)
    few = stage_one(dataclasses.replace(WORK, frames=100), POOL)
    assert few.binds == "start" and few.shards == 2 and few.rounds == 1
    assert stage_one(dataclasses.replace(WORK, table=1.0), POOL).binds == "tables"


def test_copies_on_the_nodes_serve_the_later_epochs() -> None:
    work, cluster = dataclasses.replace(WORK, frames=1_000_000), read_cluster("cluster")
    assert (
        cluster_forecast(work, cluster, model=5000.0).later_epochs
        == cluster_forecast(work, cluster, model=5000.0).first_epoch
    )  # 1.6 TB fit nowhere
    disks = cluster_forecast(work, dataclasses.replace(cluster, local_gib=4000), model=5000.0)
    assert disks.first_epoch < disks.later_epochs == pytest.approx(8 * 12 * GB / (2 * 802_816))
    memory = cluster_forecast(work, dataclasses.replace(cluster, memory_gib=4096), model=5000.0)
    assert memory.later_epochs == pytest.approx(64 * 5000)


def test_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give a YAML file .*or 'cluster' for the shipped one"):
        read_cluster("h100s")
    text = (ROOT / "configs" / "launch" / "cluster.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text.replace("gpus: 8 ", "gpsu: 8 "))
    with pytest.raises(UserError, match="did you mean 'gpus'"):
        read_cluster(str(tmp_path / "mine.yaml"))
    (tmp_path / "mine.yaml").write_text(text.replace("nodes: 8", "nodes: 0"))
    with pytest.raises(UserError, match="nodes is 0; it must be above 0"):
        read_cluster(str(tmp_path / "mine.yaml"))


def test_from_the_shell(dvla: Dvla, recorded: dict[str, Path], tmp_path: Path) -> None:
    vlm = make_tiny_qwen3vl(tmp_path / "vlm", TINY)
    options = argv(
        f"cache plan {recorded['h264']} --vlm tiny_qwen3vl --vlm-path {vlm} --resolution 64 "
        f"--out {tmp_path / 'cache'} --pilot 4 --device cpu"
    )
    done = dvla(*options, "--cluster", "cluster", "--frames", 35_000_000, "--json", tmp_path / "plan.json")
    assert done.code == 0 and "on 64 GPUs, 35,000,000 frames" in done.out
    found = read_json(tmp_path / "plan.json")
    assert (
        found["cluster"]["frames"] == 35_000_000
        and found["cluster"]["bytes_per_sample"] == found["bytes_per_sample"]
        and found["cluster"]["model"] is None
    )
    refused(dvla(*options, "--frames", 10), "--frames needs --cluster")
    refused(dvla(*options, "--cluster", "cluster", "--frames", 0), "--frames is 0; it must be at least 1")
