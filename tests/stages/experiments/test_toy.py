"""The toys: distances and mode measures on sets whose answer is known, training as a pure function of its seed, and the
command."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from dvla.drifting.metrics import ModeMetrics, mode_metrics, sliced_wasserstein
from dvla.stages.experiments.toy import data
from dvla.stages.experiments.toy import toy as toys
from dvla.stages.experiments.toy.tables import action_rows
from dvla.stages.experiments.toy.train import ActionRun, PlaneRun, curve_steps, train_actions, train_plane
from support.cli_runner import Dvla, refused


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the command trains: networks this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- sliced Wasserstein -----------------------------------------------------------------------------------------------


def test_distance_is_zero_on_itself_and_symmetric() -> None:
    x, y = torch.randn(500, 2, generator=random()), torch.rand(500, 2, generator=random(1))
    assert sliced_wasserstein(x, x[torch.randperm(500, generator=random(2))]) == 0
    assert sliced_wasserstein(x, y) == sliced_wasserstein(y, x) > 0


def test_distance_of_known_sets() -> None:
    """A shift by v: each direction u sees |v·u|, whose mean square over the circle is |v|²/2.

    A scaling of N(0, 1) by s: |s − 1|.
    """
    x = torch.randn(4000, 2, generator=random())
    assert sliced_wasserstein(x, x + torch.tensor([0.3, -0.4])) == pytest.approx(0.5 / math.sqrt(2), rel=1e-4)
    assert sliced_wasserstein(x, 3 * torch.randn(4000, 2, generator=random(1))) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("shapes", [((5, 2), (6, 2)), ((5, 3), (5, 3)), ((5,), (5,))])
def test_distance_refuses_other_shapes(shapes: tuple) -> None:
    with pytest.raises(ValueError, match=r"two sets \[n,2\]"):
        sliced_wasserstein(*(torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize("target", data.TARGETS)
def test_targets(target: str) -> None:
    points = data.TARGETS[target](4000, random())
    assert points.shape == (4000, 2) and points.abs().max() < 1.2
    assert torch.equal(points, data.TARGETS[target](4000, random()))
    if target == "checkerboard":  # only squares whose row and column are both even or both odd, all eight of them
        row, column = ((points + 1) * 2).floor().long().T
        assert ((row + column) % 2 == 0).all() and len(set(zip(row.tolist(), column.tolist()))) == 8


# --- two ways around an obstacle ---

OBSERVATION = torch.tensor([[-0.5, 0.3], [0.5, -0.8]])  # 70/30 and 50/50
CENTRE = data.modes(OBSERVATION)  # [2,2,D]


def measured(chunks: torch.Tensor, observation: torch.Tensor) -> ModeMetrics:
    return mode_metrics(chunks, data.modes(observation), data.shares(observation))


def draws(right: list[int], of: int = 10) -> torch.Tensor:
    """[2,of,D] exactly on the modes, right[i] of them on the right."""
    return torch.stack([CENTRE[i, (torch.arange(of) < n).long()] for i, n in enumerate(right)])


def test_metrics_of_the_perfect_answer() -> None:
    found = measured(draws([7, 5]), OBSERVATION)
    assert found.share_error == pytest.approx(0, abs=1e-6)
    assert (found.coverage, found.between) == (1, 0) and found.distance == pytest.approx(0, abs=1e-3)


def test_metrics_of_one_mode() -> None:
    found = measured(draws([10, 10]), OBSERVATION)
    assert found.share_error == pytest.approx((0.3 + 0.5) / 2)
    assert (found.coverage, found.between) == (0, 0)
    assert measured(draws([9, 10]), OBSERVATION).coverage == 0.5  # one draw of ten is enough


def test_metrics_of_the_middle() -> None:
    middle = CENTRE.mean(1, keepdim=True)  # [2,1,D]
    found = measured(middle.expand(-1, 10, -1), OBSERVATION)
    apart = (CENTRE[:, 0] - CENTRE[:, 1]).norm(dim=1) / 2 / math.sqrt(CENTRE.shape[2])
    assert (found.coverage, found.between) == (0, 1) and found.distance == pytest.approx(apart.mean().item(), rel=1e-4)
    tenth = torch.cat([draws([5, 5], 9), middle], dim=1)  # one of ten in the middle
    assert measured(tenth, OBSERVATION).between == pytest.approx(0.1)


def test_the_expert_is_what_it_says() -> None:
    observation = OBSERVATION.repeat_interleave(4000, 0)
    chunk = data.expert(observation, random()).unflatten(0, (2, 4000))
    found = measured(chunk, OBSERVATION)
    assert found.share_error < 0.02 and found.coverage == 1 and found.between < 1e-3
    assert found.distance == pytest.approx(data.NOISE, rel=0.05)
    spread = data.expert(data.observations(4000, random(1)), random(2)).std()
    assert spread == pytest.approx(0.2, abs=0.03)  # like normalised robot actions


def test_neighbors_begin_with_oneself() -> None:
    observation = torch.tensor([[0.0, 0.0], [0.1, 0.0], [0.9, 0.9], [0.0, 0.0]])
    near = data.neighbors(observation, 3)
    assert near[:, 0].tolist() == [0, 1, 2, 3] and set(near[0].tolist()) == {0, 3, 1}
    assert data.neighbors(observation, 1).flatten().tolist() == [0, 1, 2, 3]


# --- training ---------------------------------------------------------------------------------------------------------


def equal(a: dict, b: dict) -> bool:
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a.keys() | b.keys())


def test_a_short_run_in_the_plane_approaches_the_data_and_repeats_itself() -> None:
    run = PlaneRun("swiss roll", temperatures=(0.05,), floor=None, batch=128)
    first, ticks = train_plane(run, 40, 3, lambda step: None, measured=256), []
    assert first["distance"] < 0.4 * first["start"] and first["ratio"] == first["distance"] / first["data_to_data"]
    assert [point["step"] for point in first["curve"]] == curve_steps(40) and curve_steps(40)[-1] == 40
    assert equal(first, train_plane(run, 40, 3, ticks.append, measured=256)) and ticks == list(range(1, 41))
    assert not equal(first, train_plane(run, 40, 4, lambda step: None, measured=256))


def test_the_released_floor_holds_a_large_collapsed_set_back() -> None:
    """Among 512 samples the floor is half of each one's affinities: see docs/toy.md."""
    held, free = (
        train_plane(PlaneRun("checkerboard", floor=floor), 40, 0, lambda step: None, measured=256)
        for floor in (1e-6, 1e-12)
    )
    assert held["distance"] > 2 * free["distance"] and held["start"] == free["start"]


@pytest.mark.parametrize("kind", ["mse", "flow", "diffusion", "pure_drift", "hybrid"])
def test_action_runs_repeat_themselves(kind: str) -> None:
    run, few = (
        ActionRun(kind, positives=4, observations=128, horizon=6, longer=2),
        {"batch": 8, "tested": 4, "draws": 64},
    )
    ticks: list[int] = []
    first = train_actions(run, 3, 5, ticks.append, **few)
    assert equal(first, train_actions(run, 3, 5, lambda step: None, **few))
    assert tuple(first["metrics"]) == run.passes and first["shown"].shape == (64, 12)
    assert first["steps"] == 6 and ticks == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(value) for row in first["metrics"].values() for value in row.values())
    if kind == "mse":
        assert (first["shown"] == first["shown"][0]).all()  # no noise, one answer
    else:
        assert first["shown"].std(0).min() > 0


def test_rows_are_mean_and_sample_std() -> None:
    results = [
        {
            "kind": "flow",
            "seed": s,
            "metrics": {"10": {"share_error": 0.1 * s, "coverage": 1.0, "between": 0.0, "distance": 0.5}},
        }
        for s in (1, 2, 3)
    ]
    (row,) = action_rows({"flow": results})
    assert (
        row["share_error"] == pytest.approx([0.2, 0.1])
        and row["coverage"] == [1, 0]
        and (row["passes"], row["seeds"]) == (10, [1, 2, 3])
    )


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole command on a handful of steps."""
    monkeypatch.setattr(toys, "QUICK", toys.ToyScale(plane_steps=2, action_steps=2, seeds=1))
    monkeypatch.setattr(toys, "RECIPES", dict(list(toys.RECIPES.items())[:2]))
    monkeypatch.setattr(toys, "METHODS", {k: v for k, v in toys.METHODS.items() if k != "diffusion"})
    monkeypatch.setattr(toys, "SWEEPS", {"drifting, G 2": ActionRun("pure_drift", draws=2, horizon=6, longer=2)})


@pytest.mark.slow
def test_command_resumes_and_refuses(small, dvla: Dvla, tmp_path, monkeypatch) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    threads = torch.get_num_threads()
    result = dvla("toy", "--quick", "--out", whole)
    assert result.code == 0, result
    assert "drifting" in result.out and "quick" in result.out and torch.get_num_threads() == threads
    summary = json.loads((whole / "summary.json").read_text())
    assert {"distance", "data_to_data", "ratio", "seconds", "seed"} <= summary["plane"][
        "swiss roll, Algorithm 2, τ 0.05"
    ].keys()
    assert [row["name"] for row in summary["actions"]].count("flow") == 2  # 1 and 10 steps
    for name in ("plane.png", "plane.gif", "plane_curves.png", "actions.png", "action_samples.png", "tables.md"):
        assert (whole / name).stat().st_size > 500

    # Interrupted in the middle of a run, then run again: the same results.
    real, calls = toys.train_actions, []

    def interrupted(run, steps, seed, tick, **rest):
        calls.append(run)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(run, steps, seed, tick, **rest)

    monkeypatch.setattr(toys, "train_actions", interrupted)
    assert dvla("toy", "--quick", "--out", broken).code == 130
    assert not (broken / "summary.json").exists() and len(list((broken / "runs").glob("*.json"))) == 4 + 2
    assert dvla("toy", "--quick", "--out", broken).code == 0
    assert len(calls) == 3 + len(toys.METHODS) + len(toys.SWEEPS) - 2  # finished runs are not repeated
    for file in (whole / "runs").glob("*.npz"):
        with np.load(file) as a, np.load(broken / "runs" / file.name) as b:
            assert all(np.array_equal(a[k], b[k]) for k in a.files)
        mine, theirs = (
            json.loads((folder / "runs" / file.with_suffix(".json").name).read_text()) for folder in (whole, broken)
        )
        assert mine.pop("seconds") > 0 < theirs.pop("seconds") and mine == theirs

    # A damaged result is named, other settings and foreign folders are refused; nothing is overwritten.
    refused(dvla("toy", "--quick", "--seed", "1", "--out", whole), "other settings", "--out")
    next((broken / "runs").glob("*.npz")).write_bytes(b"PK")
    refused(dvla("toy", "--quick", "--out", broken), "delete", "rerun the command")


def test_foreign_folder_is_refused(dvla: Dvla, tmp_path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    refused(dvla("toy", "--quick", "--out", tmp_path), "holds other files", "--out")
    refused(dvla("toy", "--quick", "--out", tmp_path / "mine.txt"), "holds other files")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"] and (tmp_path / "mine.txt").read_text() == "precious"


def test_runs_have_files_of_their_own() -> None:
    import re

    names = [*toys._plane(), *toys.METHODS, *toys.SWEEPS]
    assert len({re.sub(r"[^\w.]+", "_", name) for name in names}) == len(names)
    assert len({json.dumps(dataclasses.asdict(run)) for run in (toys.METHODS | toys.SWEEPS).values()}) == len(
        toys.METHODS | toys.SWEEPS
    )
