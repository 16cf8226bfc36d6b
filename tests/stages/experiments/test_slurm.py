"""Jobs of a real Slurm: `make slurm` starts one of a single node and runs these; elsewhere they are skipped."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from support import synthetic_cache as synthetic
from support.cli_runner import until
from support.vlm_samples import TINY

STEPS = 1200
TRAINING = (
    f"--model-size tiny --steps {STEPS} --batch-size 2 --draws 2 --device cpu --eval-every 0 --log-every 50 "
    "--set dit.width=32 --set dit.blocks=1 --set dit.heads=2 --set dit.horizon=2"
).split()
# `dvla` of the jobs: training takes 0.05 s a step or longer, so that it does not end before a walltime
DVLA = f"""#!{sys.executable}
import sys, time
if sys.argv[1] == "train":
    from dvla.stages.training import loop
    real = loop.batch_loss
    loop.batch_loss = lambda *args: (time.sleep(0.05), real(*args))[1]
from dvla.cli import main
main()
"""


def ask(*command: str) -> str:
    """What a command says, whether it succeeds or not."""
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


@pytest.fixture(scope="module", autouse=True)
def one_node() -> None:
    if "one-node" not in os.environ.get("SLURM_CONF", "") or not ask("sinfo", "--noheader"):
        pytest.skip("needs the Slurm of tests/support/one_node_slurm.sh: make slurm")


@pytest.fixture
def dvla(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """`dvla(*arguments)`: (exit code, all it says), in a folder of its own, with the program that jobs find too."""
    program = tmp_path / "bin" / "dvla"
    program.parent.mkdir()
    program.write_text(DVLA)
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(*arguments: str) -> tuple[int, str]:
        done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout + done.stderr

    return run


def submit(dvla: Callable[..., tuple[int, str]], *settings: str, out: str) -> str:
    """Number of a training's job on one CPU."""
    size = ("nodes=1", "processes=1", "cpus=1", "memory=2G")
    options = [word for setting in (*size, *settings) for word in ("--set", setting)]
    code, said = dvla(
        "launch", "slurm-train", *options, "--", "train", "--from-cache", "cache", "--out", out, *TRAINING
    )
    assert code == 0, said
    return re.fullmatch(r"Submitted batch job (\d+)\n", said)[1]


def state(job: str) -> dict[str, str]:
    return dict(re.findall(r"(JobState|Restarts|ExitCode)=(\S+)", ask("scontrol", "show", "job", job)))


def log(job: str) -> str:
    file = Path(f"dvla-{job}.log")
    return file.read_text() if file.exists() else ""


def losses(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in map(json.loads, (run / "log.jsonl").read_text().splitlines())]


def test_a_training_resumes_after_its_walltime(dvla: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    """Told while it loads, and before the walltime of a minute, it is requeued until it is done: bit for bit the losses
    and weights of one that was not stopped."""
    synthetic.build(tmp_path / "cache")
    job = submit(dvla, "walltime=00:01:00", "notice=15", out="run")
    until(lambda: state(job)["JobState"] == "RUNNING", 60)
    ask("scancel", "--signal=TERM", job)
    until(lambda: state(job)["JobState"] == "COMPLETED", 900)
    assert int(state(job)["Restarts"]) >= 2 and "resuming run at step" in log(job)
    train = [sys.executable, "-m", "dvla.cli", "train", "--from-cache", "cache", "--out", "straight", *TRAINING]
    assert subprocess.run(train, capture_output=True, timeout=300).returncode == 0
    last = f"checkpoints/step-{STEPS:08d}"
    for name in ("model", "ema", "optimizer"):
        one, other = (tmp_path / run / last / f"{name}.safetensors" for run in ("straight", "run"))
        assert one.read_bytes() == other.read_bytes(), name
    straight, stopped = dict(losses(tmp_path / "straight")), dict(losses(tmp_path / "run"))
    assert stopped == straight and len(straight) > STEPS / 50


def test_of_two_jobs_in_one_folder_one_is_refused(dvla: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    """On one machine, where both need a port. The first one is cancelled, and stays so."""
    synthetic.build(tmp_path / "cache")
    first = submit(dvla, out="run")
    until(lambda: re.search(r"step +50/", log(first)), 120)
    second = submit(dvla, out="run")
    until(lambda: state(second)["JobState"] == "FAILED", 120)
    assert state(second)["ExitCode"] == "2:0" and "error: another process is training in run" in log(second)
    ask("scancel", first)
    until(lambda: state(first)["JobState"] == "CANCELLED", 60)


def test_a_build_by_jobs(dvla: Callable[..., tuple[int, str]], recorded: dict[str, Path], tmp_path: Path) -> None:
    """The bytes of a build without workers, though a job is cancelled; what Slurm refuses, and jobs that end before
    their worker connects, end the build with one line."""
    from dvla.cache.vlm.tiny_qwen3vl import make_tiny_qwen3vl

    if find_spec("dask_jobqueue") is None:
        pytest.skip("needs dask-jobqueue (the extra slurm)")
    make_tiny_qwen3vl(tmp_path / "vlm", TINY)
    settings = {
        "cores": 1,
        "memory": "2GB",
        "walltime": "00:05:00",
        "python": sys.executable,
        "log_directory": str(tmp_path),
    }
    build = [
        "cache",
        "build",
        str(recorded["image"]),
        "--vlm",
        "tiny_qwen3vl",
        "--vlm-path",
        "vlm",
        "--resolution",
        "64",
    ]
    build += ["--batch-size", "1", "--shard-frames", "1", "--device", "cpu", "--out"]
    by_jobs = ["--slurm", "jobs.yaml", "--workers", "2"]
    for change, message in (
        ({"queue": "nosuch"}, "error: Slurm refused a worker's job: invalid partition specified: nosuch"),
        ({"job_script_prologue": ["exit 3"]}, "Slurm jobs ended before their worker connected; see the log of job "),
    ):
        Path("jobs.yaml").write_text(json.dumps(settings | change))
        code, said = dvla(*build, "refused", *by_jobs)
        assert code == 2 and said.count("\n") == 2 and message in said, said
        assert not ask("squeue", "--noheader")
    Path("jobs.yaml").write_text(json.dumps(settings))
    with open("log", "w") as file:
        running = subprocess.Popen(["dvla", *build, "jobs", *by_jobs], stdout=file, stderr=file)
    commits = Path("jobs/.commits")
    until(lambda: len(list(commits.rglob("*.json"))) > 3, 120)
    ask("scancel", ask("squeue", "--noheader", "--states=R", "--format=%A").split()[0])
    assert running.wait(240) == 0, Path("log").read_text()
    assert dvla(*build, "inline")[0] == 0
    assert tree(Path("jobs")) == tree(Path("inline"))
    assert not ask("squeue", "--noheader")


def tree(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}
