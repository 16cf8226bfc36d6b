"""Twenty steps of training give the losses that were committed: the batches, the noise, the losses and the optimizer
are what they were.

Numbers: golden/losses.json. To replace them on purpose: DVLA_WRITE_GOLDEN=1 python -m pytest -n 0
tests/stages/training/test_golden_losses.py"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest

from fixtures.make_landing import RUNS, SHAPE, losses
from support.cli_runner import Dvla
from support.repository import ROOT

HERE = ROOT / "tests"
GOLDEN = HERE / "golden" / "losses.json"
LANDING = HERE / "fixtures" / "landing_16"
REGENERATE = (
    "if the change is intended, regenerate them: "
    "DVLA_WRITE_GOLDEN=1 python -m pytest -n 0 tests/stages/training/test_golden_losses.py"
)
STEPS = 20
# Relative; another instruction set (ATen default, oneDNN SSE4.1, MKL compatible) differs by 2.1e-6 at most, another
# number of threads not at all.
TOLERANCE = 3e-5
COMMON = (
    "--steps",
    STEPS,
    *shlex.split("--batch-size 8 --draws 3 --lr 3e-3 --cond-mask-prob 0.2 --log-every 1 --eval-every 0 --save-every"),
    STEPS,
    *shlex.split("--num-workers 1 --device cpu --set optimizer.warmup=5 --set panels.every=0 --set cpu_threads=1"),
)
KINDS = {
    "hybrid": (),  # the default
    "pure_drift": ("--loss-type", "pure_drift"),
    "guided": ("--set", "alpha_max=2.0", "--set", "negatives=4", "--grad-accumulation", 2),
    "queue": ("--set", "loss.queue=task"),
    "mse": ("--loss-type", "mse"),
    "flow": ("--loss-type", "flow"),
    "diffusion": ("--loss-type", "diffusion"),
    "blind": ("--blind", "--order", "block", "--temperature", 1.0),
}


def compare(name: str, run: Path) -> None:
    found = losses(run)
    assert len(found) == STEPS
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("DVLA_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps({**golden, name: list(found.values())}, indent=1, sort_keys=True) + "\n")
        return
    wanted = golden[name]
    for step, (loss, was) in enumerate(zip(found.values(), wanted, strict=True), 1):
        assert loss == pytest.approx(was, rel=TOLERANCE), (
            f"{name}: the loss of step {step} is {loss}, golden/losses.json has {was}; {REGENERATE}"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_losses(cache: Path, tmp_path: Path, dvla: Dvla, kind: str) -> None:
    """On random features (`synthetic_cache`), two datasets of different embodiments."""
    result = dvla("train", "--from-cache", cache, "--out", tmp_path / "run", *SHAPE, *COMMON, *KINDS[kind])
    assert result.code == 0, result
    compare(kind, tmp_path / "run")


def test_losses_with_the_live_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dvla: Dvla) -> None:
    """Stage three: LoRA in the vision tower of the committed tiny VLM."""
    shutil.copytree(LANDING, tmp_path / "landing")
    monkeypatch.chdir(tmp_path / "landing")
    _, command = RUNS["stage_three"]
    result = dvla(
        *command, "--out", "golden", "--steps", STEPS, "--save-every", STEPS, "--lora-dropout", 0.1, "--lr", "3e-3"
    )
    assert result.code == 0, result
    compare("lora", tmp_path / "landing" / "golden")
