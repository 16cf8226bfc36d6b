"""`dvla eval`: policies on the same starts beside their baselines, in tasks that need no simulator."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dvla.common.console import markdown_table
from dvla.errors import UserError
from dvla.stages.simulation import evaluate as module
from dvla.stages.simulation.config import EvalConfig
from dvla.stages.simulation.evaluate import evaluate_policies, label
from dvla.stages.simulation.tables import success_cells
from support.cli_runner import Dvla, refused
from support.toy_environment import install


class Pusher:
    """A policy that moves by `speed`; a blind one stands still."""

    made: list[dict[str, Any]] = []

    def __init__(self, speed: float, blind: bool) -> None:
        self.speed, self.needs_images = 0.0 if blind else speed, not blind

    @classmethod
    def from_pretrained(cls, path: str, **given: Any) -> Pusher:
        cls.made.append({"path": path, **given})
        return cls({"runs/fast": 0.1, "runs/slow": 0.03}.get(path, 0.0), given["blind"])

    def act_batch(self, observations: Any) -> np.ndarray:
        assert all(bool(o.images) == self.needs_images for o in observations)
        return np.full((len(observations), 4, 1), self.speed, np.float32)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The toy tasks and policies that need no checkpoint; the list fills with how they were loaded."""
    install(monkeypatch)
    Pusher.made = []
    monkeypatch.setattr(module, "Policy", Pusher)
    monkeypatch.setattr(module, "_robot", lambda policy, environment: SimpleNamespace(starts=[[0.5]]))
    return Pusher.made


def test_every_policy_stands_beside_the_baselines(world: list[dict[str, Any]], tmp_path: Path) -> None:
    seen: list[str] = []
    config = EvalConfig(
        ("runs/fast", "runs/slow"), ("toy/near", "toy/far"), 6, tmp_path / "out", videos=2, image_size=32
    )
    found = evaluate_policies(config, lambda name, done, total: seen.append(name))
    assert list(found) == ["fast", "slow"] and set(found["fast"]["tasks"]) == {"toy/near", "toy/far"}
    fast, slow = (found[name]["tasks"] for name in found)
    assert (
        fast["toy/near"]["success"] == fast["toy/far"]["success"] == slow["toy/near"]["success"] == 1
        and slow["toy/far"]["success"] == 0
    )
    assert (
        slow["toy/far"]["successes"] == [0] * 6 and slow["toy/far"]["ci95"][0] == 0 < slow["toy/far"]["ci95"][1] < 0.5
    )
    for tasks in (fast, slow):
        for row in tasks.values():
            assert (row["expert"], row["blind"]) == (1, 0) and 0 <= row["random"] <= 1 and row["episodes"] == 6
            assert row["ms_per_chunk"] > 0 and row["ms_per_action"] > 0
    assert fast["toy/far"]["mean_return"] != slow["toy/far"]["mean_return"]
    # Expert and random are rolled out once per task for both; without --blind each policy has a blind self.
    assert seen.count("toy/near: expert") == seen.count("toy/near: random") == 6 and seen.count("toy/far: blind") == 12
    assert sorted((m["path"], m["blind"]) for m in world if m["environment"] == "toy/near") == [
        ("runs/fast", False),
        ("runs/fast", True),
        ("runs/slow", False),
        ("runs/slow", True),
    ]
    # One table, and a folder for each that holds what a single evaluation writes.
    for name in found:
        assert json.loads((tmp_path / "out" / name / "summary.json").read_text())["tasks"] == found[name]["tasks"]
        assert {p.name for p in (tmp_path / "out" / name / "videos").iterdir()} == {
            f"toy_{t}.{e}" for t in ("near", "far") for e in ("mp4", "png")
        }
    table = (tmp_path / "out" / "table.md").read_text()
    assert table == markdown_table(*success_cells(found)) and "| toy/far | slow | 0% of 6 | 0% – 39% | 100% |" in table


def test_named_policies_and_chosen_baselines(world: list[dict[str, Any]], tmp_path: Path) -> None:
    found = evaluate_policies(
        EvalConfig(("expert", "random", "runs/fast"), ("toy/near",), 3, tmp_path / "a", baselines=(), videos=0)
    )
    rows = {name: summary["tasks"]["toy/near"] for name, summary in found.items()}
    assert (
        rows["expert"]["success"] == 1
        and rows["expert"]["ms_per_chunk"] is None
        and not {"expert", "random", "blind"} & rows["fast"].keys()
    )
    assert not (tmp_path / "a" / "fast" / "videos").exists() and len(world) == 1
    head, cells = success_cells(found)
    assert [c[head.index("blind")] for c in cells] == ["–"] * 3 and cells[0][-1] == "–"
    # The expert is not run again for its own column.
    seen: list[str] = []
    found = evaluate_policies(EvalConfig(("expert",), ("toy/near",), 3), lambda name, done, total: seen.append(name))
    assert (
        found["expert"]["tasks"]["toy/near"]["expert"] == 1
        and seen.count("toy/near: expert") == 3
        and not any("blind" in name for name in seen)
    )
    # A run trained blind is run once for all policies, with its own number of passes.
    world.clear()
    found = evaluate_policies(
        EvalConfig(("runs/fast", "runs/slow"), ("toy/near",), 3, blind="runs/none", sample_steps=1)
    )
    assert [(m["path"], m["blind"], m["steps"]) for m in world] == [
        ("runs/fast", False, 1),
        ("runs/slow", False, 1),
        ("runs/none", True, None),
    ]
    assert found["slow"]["blind_is"] == "runs/none"


def test_one_policy_keeps_its_files_together(world: list[dict[str, Any]], tmp_path: Path) -> None:
    config = EvalConfig(
        ("runs/fast",), ("toy/near",), 3, tmp_path / "one", baselines=("expert",), videos=1, image_size=32
    )
    found = evaluate_policies(config)
    assert {p.name for p in (tmp_path / "one").iterdir()} == {"summary.json", "table.md", "videos"} and len(found) == 1
    with pytest.raises(UserError, match="exists; choose another --out"):
        EvalConfig(("runs/fast",), ("toy/near",), 3, tmp_path / "one")


def test_starts_that_were_trained_on_are_refused(
    world: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = evaluate_policies(EvalConfig(("expert",), ("toy/near",), 2, tmp_path / "e", baselines=()))
    assert known
    from dvla.stages.simulation.envs import make_environment

    env = make_environment("toy/near", "eval")
    env.reset(1)
    monkeypatch.setattr(module, "_robot", lambda policy, environment: SimpleNamespace(starts=[list(env.start_vector)]))
    with pytest.raises(UserError, match="also trained on"):
        evaluate_policies(EvalConfig(("runs/fast",), ("toy/near",), 2, tmp_path / "x"))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "paths, names",
    [
        (("runs/a",), ["a"]),
        (("runs/a", "runs/b"), ["a", "b"]),
        (("s0/a", "s1/a"), ["s0-a", "s1-a"]),
        (("/x/a/", "../a", "expert"), ["x-a", "a", "expert"]),
        (("r/checkpoints/best", "r/checkpoints/step-00000400"), ["r-best", "step-00000400"]),
        (("a", "./a"), ["0-a", "1-a"]),
    ],
)
def test_labels_tell_policies_apart(paths: tuple[str, ...], names: list[str]) -> None:
    assert label(paths) == names


def test_the_command(world: list[dict[str, Any]], dvla: Dvla, tmp_path: Path) -> None:
    done = dvla(
        "eval", "expert", "--compare", "runs/slow", "--env", "toy/near", "--episodes", "2", "--out", tmp_path / "out"
    )
    assert done.code == 0 and "The same 2 initial states for all" in done.out and "100% of 2" in done.out
    assert (tmp_path / "out" / "slow" / "summary.json").exists()
    refused(dvla("eval", "expert", "--env", "toy/near", "--baselines", "expret"), "expret", "did you mean 'expert'")
    refused(
        dvla("eval", "expert", "--env", "toy/near", "--baselines", "none", "--blind", "runs/b"),
        "--blind runs/b",
        "add blind",
    )
    refused(dvla("eval", "expert", "--env", "toy/nea"), "did you mean 'toy/near'")
    refused(dvla("eval", "expert", "--compare", "expert", "--env", "toy/near"), "policy expert is given twice")
    refused(dvla("eval", "expert", "--env", "toy/near", "--env", "toy/near"), "environment toy/near is given twice")
    near = ("eval", "expert", "--env", "toy/near")
    refused(dvla(*near, "--episodes", "0"), "episodes is 0; it must be at least 1 (--episodes)")
    refused(dvla(*near, "--sample-steps", "0"), "sample_steps is 0; it must be at least 1", "--sample-steps")
    refused(dvla("eval", "expert", "--env", "toy/near", "--out", tmp_path / "out"), "exists")


def test_a_folder_that_is_no_policy(monkeypatch: pytest.MonkeyPatch, dvla: Dvla, tmp_path: Path) -> None:
    install(monkeypatch)
    assert dvla("eval", tmp_path, "--env", "toy/near").code == 2
    refused(dvla("eval", "expert", "--env", "toy/near", "--blind", str(tmp_path / "none")), "none")
