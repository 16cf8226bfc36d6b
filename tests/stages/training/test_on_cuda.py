"""What a run does otherwise on a GPU, as far as a CPU can show it: its defaults, and AdamW in one kernel."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dvla.batch import random_batch
from dvla.cache.loader.sample import Draws, Sample
from dvla.drifting.dit import dit_config
from dvla.drifting.policy_net import PolicyNet, PolicyNetConfig
from dvla.stages.policy import compile as compiling
from dvla.stages.training.config import ON_CUDA, TrainConfig, train_config
from dvla.stages.training.context import Session
from dvla.stages.training.loop import train_step
from dvla.stages.training.parallel.replicas import Replicas
from dvla.stages.training.parallel.world import World

GIVEN = {"cache": "cache", "out": ""}
PLAIN = {f.name: f.default for f in dataclasses.fields(TrainConfig) if f.name in ON_CUDA}


def of(config: TrainConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ON_CUDA}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: f"/usr/bin/{name}")
    return monkeypatch


def test_defaults_are_those_of_the_device(gpu: pytest.MonkeyPatch) -> None:
    for device in ("auto", "cuda", "cuda:1"):
        assert of(train_config(None, {**GIVEN, "device": device})) == ON_CUDA
    assert of(train_config(None, {**GIVEN, "device": "cpu"})) == PLAIN
    given = {"batch_size": 4, "threads": 1, "precision": "fp32", "compile": False}
    assert of(train_config(None, {**GIVEN, **given})) == given
    assert of(train_config("base", GIVEN))["batch_size"] == 64  # what a recipe says
    gpu.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    gpu.setattr(compiling.shutil, "which", lambda name: None)
    assert of(train_config(None, GIVEN)) == {**ON_CUDA, "precision": "fp32", "compile": False}


def test_defaults_of_a_cpu_are_as_ever() -> None:
    assert of(train_config(None, {**GIVEN, "device": "cpu"})) == PLAIN
    assert PLAIN == {"batch_size": 16, "threads": 2, "precision": "fp32", "compile": False}


def test_a_run_keeps_the_defaults_it_was_begun_with(tmp_path: Path, gpu: pytest.MonkeyPatch) -> None:
    """On another device, and where an earlier release began it with other defaults; not what was given once."""
    run = tmp_path / "run"
    run.mkdir()
    given = {"cache": "cache", "out": str(run)}
    for begun in (ON_CUDA, PLAIN):
        saved = dataclasses.asdict(TrainConfig("cache", str(run), **begun))
        (run / "config.json").write_text(json.dumps(saved))
        for device in ("cpu", "cuda"):
            assert of(train_config(None, {**given, "device": device})) == begun
    (run / "config.json").write_text(json.dumps({**saved, "batch_size": 12}))
    assert train_config(None, {**given, "device": "cpu"}).batch_size == 16  # which the run will refuse, as ever


def test_one_kernel_resumes_exactly() -> None:
    """The parameters lie on a CPU, where the fused AdamW differs from the plain one by rounding alone."""
    shape = dit_config("tiny", width=32, blocks=1, heads=2, horizon=4)
    batch, none = random_batch(2, 1, 2, 8, 4, words=2), np.zeros(2, np.int64)
    samples = itertools.repeat(Sample(batch, Draws(none, none, none, none, none, none), 0, 0))

    def begun(device: str) -> tuple[Session, Replicas]:
        torch.manual_seed(0)
        config = TrainConfig("", "", batch_size=2, draws=2)
        net = PolicyNet(PolicyNetConfig(feature_width=8, dit=shape))
        session = Session(config, None, net, {})  # type: ignore[arg-type]
        session.world = World(torch.device(device))
        shared = Replicas(session)
        session.world = shared.world = World()
        return session, shared

    found = {}
    for device in ("cpu", "cuda"):
        session, shared = begun(device)
        assert shared.fused == (device == "cuda") == bool(shared.optimizer.defaults["fused"])
        found[device] = [train_step(session, shared, samples, step).loss for step in range(4)]
    assert found["cuda"] == pytest.approx(found["cpu"], rel=1e-5)
    session, shared = begun("cuda")
    for step in range(2):
        train_step(session, shared, samples, step)
    moments = {name: t.clone() for name, t in shared.moments().items()}
    other, again = begun("cuda")
    other.net.load_state_dict(session.net.state_dict())
    again.load_moments(moments)
    assert [train_step(other, again, samples, step).loss for step in (2, 3)] == found["cuda"][2:]
