"""Learning-rate schedules, and runs whose number of steps changes when they resume: bit for bit the uninterrupted run
as far as the schedule allows, and otherwise said."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dvla.common.config import from_mapping
from dvla.common.documents import read_json
from dvla.errors import UserError
from dvla.stages.policy import checkpoint as ck
from dvla.stages.training.config import TrainConfig
from dvla.stages.training.step import learning_rate
from dvla.stages.training.train import train
from support.run_samples import FOUR_STEPS


def configure(cache: Path, out: Path, schedule: str, steps: int, **changes: Any) -> TrainConfig:
    optimizer = {"lr": 1e-3, "warmup": 3, "schedule": schedule, **changes.pop("optimizer", {})}
    settings = {**FOUR_STEPS, "save_every": 100, "steps": steps, "optimizer": optimizer, **changes}
    return from_mapping(TrainConfig, {"cache": str(cache), "out": str(out), **settings})


def learn(*given: Any, stop_after: int | None = None, **changes: Any) -> list[str]:
    """Train; the lines about the plan."""
    said: list[str] = []
    train(configure(*given, **changes), say=said.append, stop_after=stop_after)
    return [line for line in said if "planned" in line]


def weights(run: Path) -> dict[str, torch.Tensor]:
    stems = ("model", "ema", "optimizer")
    return {f"{s}/{n}": t for s in stems for n, t in load_file(ck.resolve(run) / f"{s}.safetensors").items()}


def assert_same(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_rates(tmp_path: Path) -> None:
    rates = {
        name: [learning_rate(step, configure(tmp_path, tmp_path, name, 20)) for step in range(21)]
        for name in ("cosine", "constant", "wsd")
    }
    assert all(rate[:2] == pytest.approx([1e-3 / 3, 2e-3 / 3], rel=0.01) for rate in rates.values())
    assert rates["constant"][2:] == [1e-3] * 19
    assert rates["wsd"][2:17] == [1e-3] * 15  # decays over the last fifth
    assert rates["wsd"][17:] == pytest.approx([0.75e-3, 0.5e-3, 0.25e-3, 0])
    assert all(a > b for a, b in itertools.pairwise(rates["cosine"][2:])) and rates["cosine"][20] < 1e-12
    half = configure(tmp_path, tmp_path, "wsd", 20, optimizer={"decay": 0.5, "warmup": 0})
    assert [learning_rate(step, half) for step in (0, 10, 15)] == pytest.approx([1e-3, 1e-3, 0.5e-3])
    long = configure(tmp_path, tmp_path, "constant", 10**6)  # its first steps do not know how many follow
    assert [learning_rate(step, long) for step in range(20)] == rates["constant"][:20]


@pytest.mark.parametrize("decay", [0.0, 1.01, float("nan")])
def test_decay_out_of_range(tmp_path: Path, decay: float) -> None:
    with pytest.raises(UserError, match=r"optimizer.decay is .*; it must be"):
        configure(tmp_path, tmp_path, "wsd", 4, optimizer={"decay": decay})


def test_a_constant_run_extended_is_the_uninterrupted_one(cache: Path, tmp_path: Path) -> None:
    straight, extended = tmp_path / "straight", tmp_path / "extended"
    assert learn(cache, straight, "constant", 40) == []
    assert learn(cache, extended, "constant", 20) == []
    (line,) = learn(cache, extended, "constant", 40)
    assert line == "planned for 20 steps (constant), now 40 (constant): the learning rate of step 21 stays 0.001"
    assert_same(extended, straight)
    assert read_json(extended / "config.json")["steps"] == 40
    assert learn(cache, extended, "constant", 40) == []  # the plan is the run's own now


def test_a_wsd_run_extended_before_its_decay_is_the_uninterrupted_one(cache: Path, tmp_path: Path) -> None:
    straight, extended = tmp_path / "straight", tmp_path / "extended"
    learn(cache, straight, "wsd", 20)
    learn(cache, extended, "constant", 10, stop_after=8)  # what is not planned yet may be decided later
    (line,) = learn(cache, extended, "wsd", 20)
    assert line == "planned for 10 steps (constant), now 20 (wsd): the learning rate of step 9 stays 0.001"
    assert_same(extended, straight)
    (line,) = learn(cache, extended, "wsd", 30, stop_after=21)  # after it
    assert line.endswith("the learning rate of step 21 goes from 0 to 0.001")


def test_an_extended_cosine_says_what_becomes_of_the_rate(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    learn(cache, out, "cosine", 4)
    (line,) = learn(cache, out, "cosine", 8)
    assert line == "planned for 4 steps (cosine), now 8 (cosine): the learning rate of step 5 goes from 0 to 0.0005"
    log = (out / "log.jsonl").read_text().splitlines()
    assert len(log) == 8 and '"lr": 0.0005,' in log[4]


def test_fewer_steps_than_are_done_and_another_schedule_are_one_line(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    learn(cache, out, "cosine", 6, stop_after=4)
    before = (out / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"has done 4 steps; give --steps 4 or more, not 3$"):
        learn(cache, out, "cosine", 3)
    with pytest.raises(UserError, match=r"optimizer.schedule: run has cosine, you requested constant or wsd"):
        learn(cache, out, "constant", 6)
    assert (out / "config.json").read_bytes() == before
    assert len(learn(cache, out, "cosine", 4)) == 1  # nothing left to do


def test_config_json_names_the_moved_cache(cache: Path, tmp_path: Path) -> None:
    copy, out = shutil.copytree(cache, tmp_path / "cache"), tmp_path / "run"
    learn(copy, out, "cosine", 2, stop_after=1)
    copy.rename(tmp_path / "moved")
    assert learn(tmp_path / "moved", out, "cosine", 2) == []
    assert read_json(out / "config.json")["cache"] == str(tmp_path / "moved")
