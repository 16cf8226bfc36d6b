"""Launch scripts: what they say, that a shell can read them, and what they start, as far as two processes on a CPU
reach."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from dvla.errors import UserError
from dvla.stages.experiments.launch import read_script, render, scripts, settings_of
from dvla.stages.training.parallel.world import ENVIRONMENT
from support import synthetic_cache as synthetic
from support.cli_runner import Dvla, refused, until

TRAIN = ("train", "--from-cache", "my cache", "--out", "run")
BUILD = ("cache", "build", "data/push", "--out", "cache")


def command_of(name: str) -> tuple[str, ...]:
    return BUILD if name == "slurm-cache" else TRAIN


def test_what_is_shipped() -> None:
    assert scripts() == (
        "accelerate-fsdp2",
        "accelerate-zero2",
        "slurm-cache",
        "slurm-train",
        "torchrun",
        "torchrun-nodes",
    )


@pytest.mark.parametrize("name", scripts())
def test_every_script_is_one_a_shell_reads(name: str, dvla: Dvla) -> None:
    shown = dvla("launch", name, "--print", "--set", "processes=2", "--", *command_of(name))
    assert shown.code == 0 and "{{" not in shown.out and "#:" not in shown.out
    assert shown.out == render(read_script(name), command_of(name), {"processes": "2"})
    done = subprocess.run(["bash", "-n"], input=shown.out, text=True, capture_output=True)
    assert done.returncode == 0 and not done.stderr
    assert shlex.join(command_of(name)) in shown.out
    listed = dvla("launch", name, "--settings")
    assert all(
        setting.meaning and f"{n}={setting.default}" in listed.out
        for n, setting in settings_of(read_script(name)).items()
    )


def test_refusals(dvla: Dvla, tmp_path: Path) -> None:
    refused(dvla("launch", "torchrnu", "--", *TRAIN), "unknown launch script 'torchrnu'; did you mean 'torchrun'?")
    os.mkfifo(tmp_path / "pipe.sh")
    refused(dvla("launch", tmp_path / "pipe.sh", "--settings"), "it is a pipe, expected a file")
    (tmp_path / "latin.sh").write_bytes(b"#: a=1 caf\xe9\n")
    refused(dvla("launch", tmp_path / "latin.sh", "--settings"), "it is not text in UTF-8")
    refused(dvla("launch", "torchrun", "--print", "--", *TRAIN, "--port=\x1b[2J"), "holds control characters")
    refused(dvla("launch", "torchrun", "--set", "procesess=2", "--", *TRAIN), "did you mean 'processes'?")
    refused(dvla("launch", "torchrun", "--set", "processes=two", "--", *TRAIN), "give a whole number")
    refused(dvla("launch", "torchrun-nodes", "--set", "head=a; rm -rf /", "--", *TRAIN), "use only letters, digits and")
    refused(dvla("launch", "torchrun", "--set", "processes", "--", *TRAIN), "give NAME=VALUE")
    refused(dvla("launch", "torchrun"), "no command to launch")
    refused(dvla("launch", "torchrun", "--", "eval", "run"), "'eval' cannot run on several processes")
    refused(dvla("launch", "torchrun", "--", *BUILD), "--workers N, or the script slurm-cache")
    refused(dvla("launch", "slurm-cache", "--", *TRAIN), "begin the command with cache build")
    refused(dvla("launch", "slurm-cache", "--", *BUILD, "--workers=3"), "--workers is set by this script")
    refused(dvla("launch", "accelerate-fsdp2", "--", *TRAIN, "--strategy", "ddp"), "--strategy is set by this script")
    refused(dvla("launch", str(tmp_path / "none.sh"), "--", *TRAIN), "cannot read")
    (tmp_path / "mine.sh").write_text("echo {{command}} {{nodes}}\n")
    with pytest.raises(UserError, match="uses {{nodes}} but has no line '#: nodes=…'"):
        render(read_script(str(tmp_path / "mine.sh")), TRAIN, {})


def test_shell_code_that_a_template_engine_would_read_stays(tmp_path: Path) -> None:
    (tmp_path / "mine.sh").write_text("gpus=(0 1)\necho ${#gpus[@]} ${PATH%%:*} {%\necho {{command}}\n")
    rendered = render(read_script(str(tmp_path / "mine.sh")), TRAIN, {})
    assert rendered == f"gpus=(0 1)\necho ${{#gpus[@]}} ${{PATH%%:*}} {{%\necho {shlex.join(TRAIN)}\n"


def test_slurm_needs_slurm(dvla: Dvla, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(dvla("launch", "slurm-train", "--", *TRAIN), "sbatch is not installed; show the script with --print")


def test_what_slurm_refuses_is_one_line(dvla: Dvla, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = "sbatch: error: invalid partition specified: gpus\nsbatch: error: Batch job submission failed: Invalid"
    program(tmp_path, "sbatch", f"printf '{said}' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    message = "error: Slurm refused the job: invalid partition specified: gpus; Batch job submission failed: Invalid"
    refused(dvla("launch", "slurm-train", "--", *TRAIN), message)
    program(tmp_path, "sbatch", "echo Submitted; echo note >&2")
    assert dvla("launch", "slurm-train", "--", *TRAIN) == (0, "", "note\n")  # its own output goes to the terminal


@pytest.mark.parametrize("walltime", ["4", "5:00", "00:05:00", "0-0:5", "0-00:04:59"])
def test_a_walltime_that_leaves_no_time_to_work_is_refused(dvla: Dvla, walltime: str) -> None:
    given = ("launch", "slurm-train", "--print", "--set", f"walltime={walltime}")
    refused(dvla(*given, "--", *TRAIN), f"walltime={walltime} is ", "told to stop 300 s before it ends")
    assert dvla(*given, "--set", "notice=30", "--", *TRAIN).code == 0


@pytest.mark.parametrize("walltime", ["6", "5:01", "00:05:01", "1-0", "0-1:00", "UNLIMITED"])
def test_other_walltimes_are_left_to_slurm(walltime: str) -> None:
    assert f"--time={walltime}\n" in render(read_script("slurm-train"), TRAIN, {"walltime": walltime})


def test_a_job_has_a_port_of_its_own() -> None:
    assert "20000 + SLURM_JOB_ID % 10000" in render(read_script("slurm-train"), TRAIN, {})


def program(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("name", ["slurm-train", "slurm-cache"])
@pytest.mark.parametrize("how", ["finished", "failed", "walltime", "loading", "cancelled"])
def test_a_slurm_job_is_queued_again_after_its_walltime(tmp_path: Path, name: str, how: str) -> None:
    """Against stand-ins for Slurm's programs. Before the walltime Slurm tells the step alone, which ends as dvla does
    after SIGTERM, with 130, or with 143 while it still loads; a job that somebody cancelled is told as a whole,
    and must not come back."""
    programs = tmp_path / "bin"
    program(
        programs,
        "srun",
        'echo "$@" > asked; echo up > up; '
        + dict(finished="exit 0", failed="exit 2", walltime="exit 130", loading="exit 143", cancelled="exec sleep 60")[
            how
        ],
    )
    program(programs, "scontrol", 'if [ "$1" = requeue ]; then echo "$2" > requeued; else echo node7; fi')
    script = render(read_script(name), command_of(name), {"processes": "2"})
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "node[7-8]",
    }
    job = subprocess.Popen(["bash", "-c", script], cwd=tmp_path, env=environment, start_new_session=True)
    if how == "cancelled":
        until((tmp_path / "up").exists)
        os.killpg(job.pid, signal.SIGTERM)
    code = job.wait(timeout=60)
    assert (code, (tmp_path / "requeued").exists()) == {
        "finished": (0, False),
        "failed": (2, False),
        "walltime": (0, True),
        "loading": (0, True),
        "cancelled": (-15, False),
    }[how]
    if how in ("walltime", "loading"):
        assert (tmp_path / "requeued").read_text() == "42\n"
    words = (tmp_path / "asked").read_text()
    assert words.rstrip().endswith(
        "dvla train --from-cache my cache --out run"
        if name == "slurm-train"
        else "dvla cache build data/push --out cache --workers 2"
    )


def test_the_processes_of_a_slurm_step_find_each_other(tmp_path: Path) -> None:
    """What the job's srun starts: here each in turn, with the variables Slurm sets for it."""
    program(
        tmp_path / "bin",
        "srun",
        'while [[ "$1" == --* ]]; do shift; done; '
        'for i in 0 1; do SLURM_PROCID=$((2 + i)) SLURM_LOCALID=$i SLURM_NTASKS=4 "$@"; done',
    )
    program(tmp_path / "bin", "scontrol", "printf 'node7\nnode8\n'")
    program(
        tmp_path / "bin",
        "dvla",
        f'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $@" >> {tmp_path}/said',
    )
    script = render(read_script("slurm-train"), TRAIN, {"nodes": "2", "processes": "2", "port": "29511"})
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "node[7-8]",
    }
    assert subprocess.run(["bash", "-c", script], env=environment, timeout=60).returncode == 0
    said = (tmp_path / "said").read_text().splitlines()
    assert said == [
        f"{rank} {local} 4 node7 29511 train --from-cache my cache --out run" for rank, local in ((2, 0), (3, 1))
    ]
    assert set(ENVIRONMENT) == {
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
    }  # what `join` asks for


@pytest.mark.parametrize("name", ["torchrun", "accelerate-fsdp2"])
def test_two_processes_train(tmp_path: Path, name: str) -> None:
    if name.startswith("accelerate") and find_spec("accelerate") is None:
        pytest.skip("needs accelerate, which comes with lerobot")
    synthetic.build(tmp_path / "cache")
    command = [
        "train",
        "--from-cache",
        str(tmp_path / "cache"),
        "--out",
        str(tmp_path / "run"),
        "--model-size",
        "tiny",
        "--steps",
        "1",
        "--batch-size",
        "2",
        "--draws",
        "2",
        "--device",
        "cpu",
        "--eval-every",
        "0",
        "--set",
        "dit.width=32",
        "--set",
        "dit.blocks=1",
        "--set",
        "dit.heads=2",
        "--set",
        "dit.horizon=2",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "dvla.cli",
            "launch",
            name,
            "--set",
            "processes=2",
            *(["--set", "port=29541"] if name != "torchrun" else []),
            "--",
            *command,
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Batch: 2/process × 1 accum × 2 processes = 4 global" in done.stdout
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])["step"] == 1
    if name != "torchrun":
        assert json.loads((tmp_path / "run" / "config.json").read_text())["strategy"] == "fsdp2"


def test_sigterm_reaches_what_was_launched(tmp_path: Path) -> None:
    program(
        tmp_path / "bin",
        "torchrun",
        f"trap 'echo saved > {tmp_path}/saved; exit 130' TERM; echo up > {tmp_path}/up; while :; do sleep 0.05; done",
    )
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    job = subprocess.Popen([sys.executable, "-m", "dvla.cli", "launch", "torchrun", "--", *TRAIN], env=environment)
    until((tmp_path / "up").exists)
    job.terminate()
    assert job.wait(timeout=60) == 130 and (tmp_path / "saved").exists()
