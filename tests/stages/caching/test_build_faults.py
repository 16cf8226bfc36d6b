"""Builds that are killed, interrupted, starved of disk and contended: what is left, what is said, and that going on
gives the same bytes."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dvla.cache.store.cache import Cache
from dvla.cache.store.checksums import verify_checksums
from dvla.cache.store.plan import BuildPlan, units
from dvla.cache.vlm.spec import EncoderSpec
from dvla.cache.vlm.tiny_paligemma2 import TinyPaliGemmaSpec, make_tiny_paligemma2
from dvla.cache.vlm.tiny_qwen3vl import make_tiny_qwen3vl
from dvla.common.config import configs_dir
from dvla.common.documents import read_yaml
from dvla.common.signals import handled, terminable
from dvla.errors import UserError
from dvla.stages.caching.workers import Job, make_unit
from support import synthetic_cache as synthetic
from support.build_zygote import Zygote
from support.cli_runner import until
from support.lerobot_samples import LENGTHS, VIEWS, rewrite, the_file, with_column
from support.vlm_samples import TINY

SHARD, FRAMES = 4, sum(LENGTHS)
SHARDS = len(VIEWS) * -(-FRAMES // SHARD)


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    zygote = Zygote(tmp_path_factory.mktemp("zygote"))
    yield zygote
    zygote.close()


@pytest.fixture(scope="module")
def vlm(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3vl(tmp_path_factory.mktemp("vlm") / "tiny", TINY)


def command(source: Path, vlm: Path, out: Path, *more: str) -> list[str]:
    return [
        "cache",
        "build",
        str(source),
        "--vlm",
        "tiny_qwen3vl",
        "--vlm-path",
        str(vlm),
        "--resolution",
        "64",
        "--out",
        str(out),
        "--batch-size",
        "3",
        "--shard-frames",
        str(SHARD),
        "--device",
        "cpu",
        *more,
    ]


@pytest.fixture(scope="module")
def whole(
    zygote: Zygote, recorded: dict[str, Path], vlm: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The files of an uninterrupted build."""
    out = tmp_path_factory.mktemp("whole") / "cache"
    assert zygote.run(arguments=command(recorded["image"], vlm, out)) == 0, zygote.said
    return tree(out)


def tree(path: Path) -> dict[str, bytes]:
    return {
        p.relative_to(path).as_posix(): p.read_bytes()
        for p in sorted(path.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


def finished(out: Path) -> int:
    return len(list(out.glob(".commits/*/*/*.json")))


def open_files(pid: int) -> list[str]:
    files = []
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            files.append(os.readlink(file))
    return files


def require_sound(out: Path) -> None:
    """Every file under a final name is whole: its size and checksum are those of its commit record."""
    from dvla.common.files import file_crc32c

    for record in out.glob(".commits/**/*.json"):
        for name, entry in json.loads(record.read_text())["files"].items():
            assert file_crc32c(out / name) == (entry["bytes"], entry["crc32c"])


# --- kill -9 ----------------------------------------------------------------------------------------------------------


def test_fifty_kills_of_workers_and_parents_in_one_build(
    zygote: Zygote, recorded: dict[str, Path], vlm: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """With four workers, one and none, each killed at random moments and then the parent; last all four workers at
    once."""
    rng, out, kills = random.Random(1), tmp_path / "cache", 0
    (tmp_path / "cache.fault").write_text(json.dumps({"all": "slow", "wrist/9": "sleep"}))  # never whole
    for i, workers in enumerate(itertools.cycle([4, 0, 1, 4])):
        if kills >= 50:
            break
        before = finished(out)
        pid = zygote.start(arguments=command(recorded["image"], vlm, out, "--workers", str(workers)))
        for _ in range(workers):
            time.sleep(rng.uniform(0, 0.4))
            until(lambda: zygote.workers() or not zygote.alive(pid))  # dask may be replacing one
            for worker in rng.sample(alive := zygote.workers(), min(1, len(alive))):
                os.kill(worker, signal.SIGKILL)
                kills += 1
        if i % 3 == 0:
            until(lambda: before < finished(out) or finished(out) == SHARDS - 1 or not zygote.alive(pid))
        time.sleep(rng.uniform(0, 0.8))
        if zygote.alive(pid):
            os.kill(pid, signal.SIGKILL)
            kills += 1
        code = zygote.wait(pid)  # 2: too many workers died while they started
        assert (
            code == -signal.SIGKILL or code == 2 and re.fullmatch(r"error: .*run the same command.*\n", zygote.said)
        ), zygote.said
        until(lambda: not zygote.workers())  # they go with their parent
        require_sound(out)
    assert 0 < finished(out) < SHARDS
    (tmp_path / "cache.fault").write_text(json.dumps({"wrist/9": "sleep"}))
    pid = zygote.start(arguments=command(recorded["image"], vlm, out, "--workers", "4"))

    def making_the_last() -> list[int]:
        return [
            worker for worker in zygote.workers() if any("wrist/c/9/0/.0.tmp-" in name for name in open_files(worker))
        ]

    until(lambda: finished(out) == SHARDS - 1 and making_the_last())
    (tmp_path / "cache.fault").unlink()
    asleep = making_the_last()
    others = [worker for worker in zygote.workers() if worker not in asleep]
    assert len(asleep) == 1 and len(others) == 3
    for worker in (*asleep, *others):  # all at once: the shard is handed from one to the next and blamed for each
        os.kill(worker, signal.SIGKILL)
    assert zygote.wait(pid) == 0, zygote.said  # dask replaces them
    assert tree(out) == whole and not zygote.workers()


def test_four_workers_finish_shards_in_another_order(
    zygote: Zygote, recorded: dict[str, Path], vlm: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "cache"
    (tmp_path / "cache.fault").write_text(json.dumps({f"front/{i}": "slow" for i in (0, 3, 4, 7)}))
    assert zygote.run(arguments=command(recorded["image"], vlm, out, "--workers", "4")) == 0, zygote.said
    records = sorted(out.glob(".commits/*/*/*.json"), key=lambda record: record.stat().st_mtime_ns)
    planned = [
        f"{task.array}/{task.index}.json"
        for task in BuildPlan.from_document(json.loads(whole["fingerprint.json"])["store"]).tasks()
    ]
    order = ["/".join(record.parts[-2:]) for record in records]
    assert sorted(order) == sorted(planned) and order != planned
    assert tree(out) == whole


def test_units_of_several_shards_killed_with_and_without_workers(
    zygote: Zygote, recorded: dict[str, Path], tmp_path: Path
) -> None:
    """At depth language one pass makes the shards of both views. Killed while one of a unit's shards is there and the
    other is not."""
    sizes = TinyPaliGemmaSpec(
        vision_depth=1, vision_width=32, vision_heads=2, image_size=28, out_width=32, text_layers=1, vocabulary=512
    )
    vlm, whole, out = make_tiny_paligemma2(tmp_path / "vlm", sizes), tmp_path / "whole", tmp_path / "cache"

    def arguments(folder: Path, workers: int) -> list[str]:
        return [
            "cache",
            "build",
            str(recorded["image"]),
            "--vlm",
            "tiny_paligemma2",
            "--vlm-path",
            str(vlm),
            "--depth",
            "language",
            "--resolution",
            "28",
            "--out",
            str(folder),
            "--batch-size",
            "6",
            "--shard-frames",
            str(SHARD),
            "--device",
            "cpu",
            "--workers",
            str(workers),
        ]

    assert zygote.run(arguments=arguments(whole, 0)) == 0, zygote.said
    for workers, fault in ((0, "wrist/2"), (2, "front/5")):
        (tmp_path / "cache.fault").write_text(
            json.dumps({fault: "sleep", "wrist/9": "sleep"})
        )  # the unit's other shard is committed alone
        pid = zygote.start(arguments=arguments(out, workers))
        array, index = fault.split("/")
        other = "front" if array == "wrist" else "wrist"
        until(lambda: (out / f".commits/image/{other}/{index}.json").exists())
        os.kill(pid, signal.SIGKILL)
        assert zygote.wait(pid) == -signal.SIGKILL
        until(lambda: not zygote.workers())
        assert not (out / f".commits/image/{fault}.json").exists() and 0 < finished(out) < SHARDS
        require_sound(out)
    (tmp_path / "cache.fault").unlink()
    assert zygote.run(arguments=arguments(out, 2)) == 0, zygote.said
    assert tree(out) == tree(whole)


def test_fifty_kills_of_a_build_without_workers(zygote: Zygote, tmp_path: Path) -> None:
    """Killed wherever it happens to be, fifty times: no run makes more than two of the 133 shards."""
    rng, out = random.Random(4), tmp_path / "cache"
    synthetic.build(tmp_path / "whole", plan=synthetic.make_plan(2))
    for _ in range(50):
        pid = zygote.start(synthetic=str(out))
        time.sleep(rng.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        assert zygote.wait(pid) == -signal.SIGKILL
    assert finished(out) > 0 and not (out / "manifest.json").exists()
    synthetic.build(out, plan=synthetic.make_plan(2), arrange=lambda tasks: random.Random(5).sample(tasks, len(tasks)))
    assert tree(out) == tree(tmp_path / "whole")


def test_a_shard_that_kills_every_worker_ends_the_build(
    zygote: Zygote, recorded: dict[str, Path], vlm: Path, tmp_path: Path
) -> None:
    (tmp_path / "cache.fault").write_text(json.dumps({"front/1": "kill"}))
    assert zygote.run(arguments=command(recorded["image"], vlm, tmp_path / "cache", "--workers", "1")) == 2
    assert re.fullmatch(
        r"error: shard 1 of image/front killed 3 workers one after another, twice .*rerun the same command\n",
        zygote.said,
    )
    assert finished(tmp_path / "cache") == 1 and not zygote.workers()


# --- what a worker has to say -----------------------------------------------------------------------------------------


def test_an_error_in_a_worker_arrives_as_its_line(
    zygote: Zygote, recorded: dict[str, Path], vlm: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "cache.fault").write_text(json.dumps({"front/3": "break"}))
    arguments = command(recorded["image"], vlm, tmp_path / "cache", "--workers", "1")
    assert zygote.run(arguments=arguments) == 2
    assert zygote.said == "error: the shard is broken\n" and finished(tmp_path / "cache") == 3 and not zygote.workers()
    (tmp_path / "cache.fault").unlink()
    assert zygote.run(arguments=arguments) == 0 and tree(tmp_path / "cache") == whole


def test_workers_quarantine_as_one_process_does(zygote: Zygote, copy_of: Any, vlm: Path, tmp_path: Path) -> None:
    root = copy_of("image")

    def cut(table: Any) -> Any:
        pictures = table["observation.images.front"].to_pylist()
        pictures[15]["bytes"] = pictures[15]["bytes"][:60]
        return with_column(table, "observation.images.front", pictures)

    rewrite(the_file(root, "data/*/*.parquet"), cut)
    assert zygote.run(arguments=command(root, vlm, tmp_path / "one", "--max-quarantine", "50%")) == 0, zygote.said
    assert zygote.run(arguments=command(root, vlm, tmp_path / "two", "--workers", "2", "--allow-quarantine")) == 0, (
        zygote.said
    )
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert "1 episodes in quarantine" in zygote.said and Cache.open(tmp_path / "two").datasets[
        0
    ].quarantined.tolist() == [False, True, False]


def test_workers_that_cannot_help_say_so(whole: dict[str, bytes], vlm: Path, tmp_path: Path) -> None:
    """On a host without the shared folder, or with another checkpoint."""
    plan = BuildPlan.from_document(json.loads(whole["fingerprint.json"])["store"])
    job = Job("key", EncoderSpec(str(vlm), resolution=96), "cpu", 3, {}, tmp_path, None, None)
    unit = units(plan.tasks(), by_observation=False)[0]
    missing = make_unit(job, unit)
    assert isinstance(missing, UserError) and f"does not see {tmp_path}; give an --out that all workers share" in str(
        missing
    )
    (tmp_path / "fingerprint.json").write_bytes(whole["fingerprint.json"])
    other = make_unit(job, unit)
    assert isinstance(
        other, UserError
    ) and "has another encoder than the build: resolution: the build has 64, it has 96" in str(other)
    assert [p.name for p in tmp_path.iterdir()] == ["fingerprint.json"]


# --- Ctrl-C and walltimes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "workers, number", [("0", signal.SIGINT), ("0", signal.SIGTERM), ("2", signal.SIGINT), ("2", signal.SIGTERM)]
)
def test_interrupted_builds_end_quietly(
    zygote: Zygote,
    recorded: dict[str, Path],
    vlm: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    workers: str,
    number: int,
) -> None:
    out, fault = tmp_path / "cache", tmp_path / "cache.fault"
    fault.write_text(json.dumps({"all": "slow"}))
    arguments = command(recorded["image"], vlm, out, "--workers", workers)
    pid = zygote.start(arguments=arguments)
    until(lambda: finished(out) >= 2)
    os.killpg(pid, number)
    assert zygote.wait(pid) == 130
    assert zygote.said.startswith("interrupted; ") and zygote.said.count("\n") == 1
    assert not zygote.workers() and 2 <= finished(out) < SHARDS
    require_sound(out)
    fault.unlink()
    if workers == "0":
        assert zygote.run(arguments=arguments) == 0 and tree(out) == whole


def test_workers_do_not_see_ctrl_c(zygote: Zygote) -> None:
    """In a terminal the whole foreground group gets it. The worker that replaces a lost one does not see it either."""
    assert (
        zygote.run(
            script="""
import dask, os, signal
from dvla.stages.caching.dask_cluster import client_of
from dvla.stages.caching.config import WorkerSpec
with dask.config.set({"distributed.worker.multiprocessing-method": "spawn"}), client_of(WorkerSpec(1)) as client:
    asked = lambda *call: client.submit(*call, pure=False).result()
    mask, first = (signal.pthread_sigmask, signal.SIG_BLOCK, ()), asked(os.getpid)
    print(signal.SIGINT in asked(*mask), signal.SIGINT in signal.pthread_sigmask(*mask[1:]))
    os.kill(first, signal.SIGKILL)
    print(signal.SIGINT in asked(*mask), asked(os.getpid) != first)
"""
        )
        == 0
    )
    assert zygote.said.split() == ["True", "False", "True", "True"]


# --- no room ----------------------------------------------------------------------------------------------------------


def test_a_file_too_large_for_the_disk(
    zygote: Zygote, recorded: dict[str, Path], vlm: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """A real short write, by a limit on the size of one file: first of a table, then of a shard."""
    out, shard = tmp_path / "cache", SHARD * 4 * 32 * 2
    arguments = command(recorded["image"], vlm, out)
    for done in ({"all": "break"}, {}):
        (tmp_path / "cache.fault").write_text("{}")
        assert zygote.run(arguments=arguments, room=shard - 100) == 2
        assert re.fullmatch(
            r"error: cannot write \S+cache: File too large .*rerun the same command to resume\n", zygote.said
        )
        assert (out / ".commits" / "image" / "tables.json").exists() == (not done) and finished(out) == 0
        assert not list(out.rglob(".*.tmp-*")) and not list(out.glob("*/features/*/c/*/0/0"))
        (tmp_path / "cache.fault").write_text(json.dumps(done))
        zygote.run(arguments=arguments)  # with room: its tables, then all of it
    require_sound(out)
    assert tree(out) == whole


def test_the_disk_fills_up_at_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC from the n-th sync, for every n: nothing half-written has a name, and the same call goes on."""
    plan = synthetic.make_plan(40)
    synthetic.build(tmp_path / "whole", plan=plan)
    expected, fsync, out, failures = tree(tmp_path / "whole"), os.fsync, tmp_path / "cache", 0
    left = 0

    def full(handle: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    for room in range(0, 400, 4):
        left = room
        try:
            synthetic.build(out, plan=plan)
            break
        except UserError as error:
            failures += 1
            assert re.search(
                r"cannot write \S+: No space left on device \([\d.]+ GiB free\); .*rerun the same command to resume",
                str(error),
            )
            assert not list(out.rglob(".*.tmp-*"))
            for name, content in tree(out).items():
                assert expected[name] == content, name
    assert failures > 10 and tree(out) == expected and verify_checksums(out) == []


# In a mount namespace of its own: a build into a tmpfs of a megabyte, of which something else takes all but one page
# before the second shard.
SMALL_DISK = """
import ctypes, os, shutil, sys
import dvla.cli
from dvla.cache.store.writer import CacheWriter
root, whole, *arguments = sys.argv[1:]
NEWNS, RECURSIVE_PRIVATE = 0x20000, 0x4000 | 0x40000
libc = ctypes.CDLL(None, use_errno=True)
if (libc.unshare(NEWNS) or libc.mount(b"none", b"/", None, RECURSIVE_PRIVATE, None)
        or libc.mount(b"tmpfs", root.encode(), b"tmpfs", 0, b"size=1m")):
    print(os.strerror(ctypes.get_errno()))
    sys.exit(77)
write_shard, filler = CacheWriter.write_shard, root + "/filler"
def fill(self, task, *more):
    if (task.array, task.index) == ("front", 1):
        with open(filler, "wb") as file:
            file.write(bytes((os.statvfs(root).f_bavail - 1) * os.statvfs(root).f_frsize))
    return write_shard(self, task, *more)
def run(out):
    sys.argv = ["dvla", *arguments, "--out", out]
    try:
        dvla.cli.main()
        return 0
    except SystemExit as ending:
        return ending.code or 0
CacheWriter.write_shard = fill
print("code", run(root + "/cache"), flush=True)
shutil.copytree(root + "/cache", whole + "/first")
os.remove(filler)
CacheWriter.write_shard = write_shard
print("code", run(root + "/cache"), run(whole + "/whole"), flush=True)
shutil.copytree(root + "/cache", whole + "/second")
"""


def test_a_small_disk_that_fills_up_amid_a_shard(
    zygote: Zygote, recorded: dict[str, Path], vlm: Path, tmp_path: Path
) -> None:
    """A real tmpfs, checked for room while there is some: one line, nothing half-written, and the same command goes
    on."""
    (tmp_path / "disk").mkdir()
    arguments = [
        *command(recorded["image"], vlm, tmp_path / "unused"),
        "--shard-frames",
        "20",
    ]  # 5 KiB a shard: two pages
    script = f"import sys; sys.argv = {['', str(tmp_path / 'disk'), str(tmp_path), *arguments]!r}\n{SMALL_DISK}"
    code = zygote.run(script=script)
    if code == 77:
        pytest.skip(f"may not mount a tmpfs here: {zygote.said.strip()}")
    assert code == 0, zygote.said
    lines = [line for line in zygote.said.splitlines() if line.startswith(("error", "code"))]
    assert len(lines) == 3 and lines[1:] == ["code 2", "code 0 0"], zygote.said
    assert re.fullmatch(
        r"error: cannot write \S+disk/cache: No space left on device \(.*rerun the same command to resume", lines[0]
    )
    first, second, whole = (tree(tmp_path / name) for name in ("first", "second", "whole"))
    assert "image/features/front/c/0/0/0" in first and "manifest.json" not in first and first.items() < whole.items()
    assert not list((tmp_path / "first").rglob(".*.tmp-*"))
    assert second == whole


# --- two at once, and a plan that travels -----------------------------------------------------------------------------


def test_a_second_builder_is_refused_whatever_its_workers(
    zygote: Zygote, recorded: dict[str, Path], vlm: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cache"
    (tmp_path / "cache.fault").write_text(json.dumps({"front/2": "sleep"}))
    first = zygote.start(arguments=command(recorded["image"], vlm, out))
    until(lambda: finished(out) == 2)
    log = Path(zygote._folder) / "log"
    log.rename(tmp_path / "log")  # the first goes on writing there
    for workers in ("0", "1"):
        assert zygote.run(arguments=command(recorded["image"], vlm, out, "--workers", workers)) == 2
        assert (
            zygote.said == f"error: another process is building {out}; wait for it to finish or stop it, then rerun\n"
        )
    os.kill(first, signal.SIGKILL)
    assert zygote.wait(first) == -signal.SIGKILL


def test_ctrl_c_stays_ours_beside_jobqueue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """dask-jobqueue sets a handler when it is imported, here a stand-in for it."""
    from dvla.stages.caching.config import WorkerSpec
    from dvla.stages.caching.dask_cluster import client_of

    (tmp_path / "dask_jobqueue.py").write_text(
        "import signal, sys\nsignal.signal(signal.SIGINT, lambda *_: sys.exit())\n"
        "class SLURMCluster:\n    job_cls = object\n    def __init__(self, **_): raise ValueError('no queue')\n"
    )
    (tmp_path / "slurm.yaml").write_text("queue: gpu\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "dask_jobqueue", raising=False)
    with terminable():
        before = signal.getsignal(signal.SIGINT)
        with (
            pytest.raises(UserError, match="no queue"),
            client_of(WorkerSpec(count=1, slurm=str(tmp_path / "slurm.yaml"))),
        ):
            pass
        assert signal.getsignal(signal.SIGINT) is before
    del sys.modules["dask_jobqueue"]


def test_the_shipped_slurm_recipe_describes_a_job() -> None:
    with handled(signal.default_int_handler, (signal.SIGINT,)):
        jobqueue = pytest.importorskip("dask_jobqueue")
    with jobqueue.SLURMCluster(processes=1, **read_yaml(configs_dir() / "launch" / "slurm.yaml")) as cluster:
        script = cluster.job_script()
    for line in (
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --gres=gpu:1",
        "#SBATCH -t 04:00:00",
        "--nthreads 1",
        "--lifetime 3h50m",
    ):
        assert line in script


def test_workers_read_the_plan_from_the_fingerprint() -> None:
    plan = synthetic.make_plan()
    assert BuildPlan.from_document(json.loads(json.dumps(plan.document()))) == plan
