"""Panels while a run trains: they change nothing of it, come when they are due, and cannot stop it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dvla.cache.store.cache import Cache
from dvla.common.documents import read_json
from dvla.common.figures import finish, new_figure
from dvla.errors import UserError
from dvla.stages.policy import checkpoint as ck
from dvla.stages.training.context import Session, open_loader
from dvla.stages.training.panels import schedule as during
from dvla.stages.training.panels.catalogue import PANELS
from dvla.stages.training.panels.collect import collect
from dvla.stages.training.panels.schedule import Panels, panel_steps
from dvla.stages.training.run_log import read_log
from dvla.stages.training.train import policy_net, train

from .test_train import assert_equal_runs, configure, quiet

LOOK = {"every": 2, "share": 1.0, "observations": 12, "draws": 3}


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """All but two panels drawn as an empty figure with a title: test_panels.py has the real ones."""

    def empty(key: str) -> Any:
        return lambda data, style: finish(new_figure(style, 2, 1), f"step {data.step} ({key})", style)

    with pytest.MonkeyPatch.context() as patch:
        for key, panel in PANELS.items():
            if key not in ("A5", "D4"):
                patch.setitem(PANELS, key, dataclasses.replace(panel, draw=empty(key)))
        yield


def session(cache: Path, **changes: Any) -> Session:
    config = configure(cache, cache.parent / "none", panels=LOOK, **changes)
    torch.manual_seed(0)
    return Session(config, Cache.open(cache), policy_net(config, Cache.open(cache)), {})


@pytest.fixture(scope="module")
def drawn(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps with panels after every second one."""
    out = tmp_path_factory.mktemp("drawn") / "run"
    said: list[str] = []
    train(configure(cache, out, panels=LOOK), say=said.append)
    assert not [line for line in said if "panel" in line]
    return out


def test_a_run_with_panels_is_the_run_without(cache: Path, drawn: Path, tmp_path: Path) -> None:
    train(configure(cache, tmp_path / "none", panels={**LOOK, "every": 0}), say=quiet)
    train(configure(cache, tmp_path / "stopped", panels={**LOOK, "every": 1}), say=quiet, stop_after=1)
    train(configure(cache, tmp_path / "stopped", panels=LOOK), say=quiet)
    assert_equal_runs(drawn, tmp_path / "none")
    assert_equal_runs(drawn, tmp_path / "stopped")
    assert not (tmp_path / "none" / "panels").exists()


def test_panels_are_written_when_they_are_due(drawn: Path) -> None:
    found = {step: {p.stem for p in folder.glob("*.png")} for step, folder in panel_steps(drawn)}
    assert list(found) == [1, 2, 3, 4]
    assert found[1] == found[3] == {"A2"} and found[4] == set(PANELS)
    assert found[2] == set(PANELS) - {"B3", "B4", "C2", "C3"}
    for step, folder in panel_steps(drawn):
        findings = json.loads((folder / "findings.json").read_text())
        assert set(findings) == found[step] and all(text.endswith(f"({key})") for key, text in findings.items())
    line = read_log(drawn)[-1]
    assert {"eval/mmd", "eval/lambda/0.02", "eval/lambda/0.2"} <= line.keys() and read_json(
        ck.resolve(drawn) / "state.json"
    )["metrics"]["lambda/0.05"] < 0


def test_a_look_is_the_same_for_any_batch_and_leaves_nothing(cache: Path) -> None:
    looks = [collect(session(cache, batch_size=size), 7) for size in (3, 12)]
    again = collect(session(cache, batch_size=5), 7)
    assert looks[0].draws.shape == (12, 3, 4, 128) and looks[0].drift.shape == (4, 12, 3, 4, 128) and looks[0].held_out
    for other in (looks[1], again):
        for name in ("draws", "target", "active", "dataset"):
            assert np.allclose(getattr(looks[0], name), getattr(other, name), atol=1e-5), name
    assert not looks[0].draws[~np.broadcast_to(looks[0].active[:, None], looks[0].draws.shape)].any()
    mine = session(cache)
    mine.net.train()
    before = torch.get_rng_state()
    collect(mine)
    assert torch.equal(torch.get_rng_state(), before) and mine.net.training


def test_where_nothing_is_held_out_training_episodes_are_looked_at(cache: Path) -> None:
    seen = collect(session(cache, holdout=0.0, eval_every=0))
    assert not seen.held_out and seen.what == "training observations" and len(seen.target) == 12


def test_heads_of_many_passes_get_few_draws(cache: Path) -> None:
    seen = collect(session(cache, loss={"kind": "diffusion", "sample_steps": 2}))
    assert seen.draws.shape[1] == 2 and np.isfinite(seen.draws).all()


def test_a_panel_that_fails_is_said(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no\nink")

    monkeypatch.setitem(PANELS, "B1", dataclasses.replace(PANELS["B1"], draw=broken))
    said: list[str] = []
    report = train(configure(cache, tmp_path / "run", panels=LOOK), say=said.append)
    assert report.step == 4 and [line for line in said if "panel" in line] == [
        f"panel B1 after step {step}: RuntimeError: no ink" for step in (2, 4)
    ]
    assert {p.stem for p in panel_steps(tmp_path / "run")[-1][1].glob("*.png")} == set(PANELS) - {"B1"}

    monkeypatch.setattr(during, "collect", broken)
    said.clear()
    report = train(configure(cache, tmp_path / "blank", panels=LOOK), say=said.append)
    assert report.step == 4 and "no panels after step 4: RuntimeError: no ink" in said and report.eval_mse > 0
    assert "eval/mmd" not in read_log(tmp_path / "blank")[-1] and not (tmp_path / "blank" / "panels").exists()


def test_panels_take_no_more_than_their_share(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(during.time, "perf_counter", lambda: clock[0])
    said: list[str] = []
    mine = session(cache, steps=1000)
    mine.say, config = said.append, dataclasses.replace(mine.config.panels, every=100, share=0.02)
    mine.config = dataclasses.replace(mine.config, panels=config)
    with open_loader(mine, split="train") as loader:
        panels = Panels(mine, loader.order.quotas)
        assert panels.turn(50, False) == [] and said == []  # not due
        clock[0] = 10
        assert panels.turn(100, False) == []  # ten panels are guessed to take 3 s; 0.2 s are allowed
        assert panels.turn(200, False) == [] and len(said) == 1 and "panels.share=1" in said[0]
        clock[0] = 300
        assert len(panels.turn(300, False)) == 9  # of 6 s
        assert len(panels.turn(1000, True)) == 17  # the end always
        assert [p.key for p in panels.turn(340, True)] == ["D1", "D3", "D4"]
        assert panels.turn(90, True) == []  # before the first turn
    short = dataclasses.replace(mine.config, steps=90)
    mine.config = short
    with open_loader(mine, split="train") as loader:
        assert Panels(mine, loader.order.quotas).turn(90, True) == []  # shorter than a turn


@pytest.mark.parametrize(
    "setting, value",
    [("every", -1), ("share", 0), ("share", 1.5), ("observations", 4), ("draws", 1), ("style", "grey")],
)
def test_settings_out_of_range(cache: Path, setting: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"{setting}"):
        configure(cache, cache.parent / "none", panels={setting: value})


def test_wandb_gets_the_images(cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    out = tmp_path / "run"
    train(configure(cache, out, steps=2, panels=LOOK, wandb={"mode": "offline"}), say=quiet)
    media = {p.name.split("_")[0] for p in out.glob("wandb/offline-run-*/files/media/images/panels/*.png")}
    assert media == {f"{key} {panel.name}" for key, panel in PANELS.items()}
