"""This version reads, resumes and acts with what earlier ones wrote, committed as it was. See fixtures/*/README.md."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dvla.stages.policy import Policy
from fixtures.make_landing import BUILDS, POLICIES, RUNS, SHAPE, TRAIN, losses, observation
from support.cli_runner import Dvla, Result
from support.repository import ROOT

FIXTURES = ROOT / "tests" / "fixtures"
LANDINGS = sorted(p.name for p in (FIXTURES).iterdir() if p.name.startswith("landing_"))
ACTIONS = 1e-4  # of the range of the expected actions; other instruction sets differ by 2e-7
LOSSES = 1e-4  # relative; other instruction sets and thread counts differ by 9e-7


@pytest.fixture(params=LANDINGS)
def landing(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a landing, which is the working folder: the paths in it are relative."""
    folder = shutil.copytree(FIXTURES / request.param, tmp_path / "landing")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


def succeeded(result: Result) -> None:
    assert result.code == 0, result


def expected(landing: Path) -> dict[str, Any]:
    return json.loads((landing / "expected.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


@pytest.mark.parametrize("name", BUILDS)
def test_a_cache_verifies_and_the_same_build_reuses_it(landing: Path, dvla: Dvla, name: str) -> None:
    before = contents(landing / name)
    succeeded(dvla("cache", "verify", name, "--live", 4, "--source", "data", "--vlm-path", "vlm", "--device", "cpu"))
    for command in ("status", "inspect"):
        succeeded(dvla("cache", command, name))
    succeeded(dvla(*BUILDS[name]))  # refused if the fingerprint were another
    assert contents(landing / name) == before


@pytest.mark.parametrize("source", [*BUILDS, "tars"])
def test_training_from_a_cache_or_its_export(landing: Path, dvla: Dvla, source: str) -> None:
    succeeded(dvla("train", "--from-cache", source, "--out", "new", *TRAIN, *SHAPE, "--steps", 2, "--eval-every", 0))
    assert list(losses(landing / "new")) == ["1", "2"]


def test_an_export_is_imported_to_the_same_bytes(landing: Path, dvla: Dvla) -> None:
    succeeded(dvla("cache", "import", "tars", "--out", "again"))
    first, second = contents(landing / "cache_int8"), contents(landing / "again")
    files = json.loads(first["manifest.json"])["files"]
    assert len(files) > 20
    for name in [*files, "manifest.json"]:
        assert second[name] == first[name], name


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_resumed_with_the_same_losses(landing: Path, dvla: Dvla, name: str) -> None:
    stopped, command = RUNS[name]
    before = losses(landing / name)
    assert max(map(int, before)) == stopped
    succeeded(dvla(*command))
    after, all_of_it = losses(landing / name), expected(landing)["losses"][name]
    assert after.keys() == all_of_it.keys() and {step: after[step] for step in before} == before
    assert after == pytest.approx(all_of_it, rel=LOSSES)


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_acts_as_it_did(landing: Path, name: str) -> None:
    wanted = np.array(expected(landing)["actions"][name])
    found = Policy.from_pretrained(landing / name, vlm_path="vlm").act(*observation())
    np.testing.assert_allclose(found, wanted, rtol=0, atol=ACTIONS * np.ptp(wanted))


def test_an_old_checkpoint_is_exported_as_it_was(landing: Path, dvla: Dvla) -> None:
    for run, policy in (("stage_two", "policy"), ("stage_three", "policy_lora")):
        succeeded(dvla("export", run, "--out", f"new_{policy}", "--vlm-path", "vlm"))
        assert (landing / f"new_{policy}" / "model.safetensors").read_bytes() == (
            landing / policy / "ema.safetensors"
        ).read_bytes()
        again = [
            Policy.from_pretrained(landing / folder, vlm_path="vlm").act(*observation())
            for folder in (policy, f"new_{policy}")
        ]
        np.testing.assert_allclose(again[0], again[1], rtol=0, atol=ACTIONS * np.ptp(again[0]))
