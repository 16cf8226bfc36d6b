"""How a run normalizes actions and state: chosen per dataset, kept by its checkpoints and by what starts from it."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dvla.cache.actions.action_map import ActionMap, FieldSpec
from dvla.cache.actions.schemes import SCHEMES
from dvla.cache.actions.slots import SLOTS
from dvla.cache.actions.statistics import statistics_of
from dvla.cache.loader.loader import gather
from dvla.common.config import from_mapping
from dvla.common.documents import read_json
from dvla.errors import UserError
from dvla.stages.policy import checkpoint as ck
from dvla.stages.policy.robot import RobotInterface, describe_dataset
from dvla.stages.training.checks import open_cache, remarks
from dvla.stages.training.config import TrainConfig
from dvla.stages.training.train import train
from dvla.stages.training.warm_start import settings_of_start
from support import synthetic_cache as synthetic
from support.run_samples import FOUR_STEPS


def configure(cache: Path, **changes: Any) -> TrainConfig:
    return from_mapping(TrainConfig, {"cache": str(cache), "out": "", **FOUR_STEPS, **changes})


def trained(cache: Path, out: Path, stop_after: int | None = None, **changes: Any) -> dict[str, Any]:
    """The policy.json of the run."""
    train(configure(cache, out=str(out), **changes), say=lambda _: None, stop_after=stop_after)
    return read_json(ck.resolve(out) / "policy.json")


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def schemes(document: dict[str, Any]) -> dict[str, str | None]:
    return {d["name"]: d.get("normalize") for d in document["datasets"]}


@pytest.fixture
def own(cache: Path, tmp_path: Path) -> Path:
    """A copy of the cache whose dataset beta asks for quantiles in its config."""
    path = shutil.copytree(cache, tmp_path / "own")
    attributes(path / "beta", config={"normalize": "quantile"})
    return path


def attributes(folder: Path, **changes: Any) -> None:
    group = json.loads((folder / "zarr.json").read_text())
    group["attributes"] |= changes
    (folder / "zarr.json").write_text(json.dumps(group))
    synthetic.seal(folder.parent)


def test_a_scheme_for_all_or_for_one_dataset(own: Path) -> None:
    for given, expected in (
        ({}, ("std5", "quantile")),
        ({"*": "minmax"}, ("minmax", "minmax")),
        ({"*": "minmax", "beta": "meanstd"}, ("minmax", "meanstd")),
    ):
        cache = open_cache(configure(own, normalize=given))
        assert tuple(d.scheme for d in cache.datasets) == expected
        for d in cache.datasets:
            assert d.action_normalizer.scheme == d.proprio_normalizer.scheme == d.scheme
    for given, message in (
        ({"betta": "minmax"}, "unknown dataset 'betta'; did you mean 'beta'"),
        ({"beta": "minimax"}, "unknown value 'minimax'; did you mean 'minmax'"),
    ):
        with pytest.raises(UserError, match=message):
            open_cache(configure(own, normalize=given))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_batches_and_samples_are_normalized_alike(cache: Path, scheme: str) -> None:
    opened = open_cache(configure(cache, normalize={"*": scheme}))
    alpha = opened.named("alpha")
    batch = gather(opened, np.array([0]), np.array([7]), 4)
    np.testing.assert_array_equal(batch.action[0], alpha.action_normalizer.normalize(alpha.action[7:11]))
    np.testing.assert_array_equal(batch.proprio[0], alpha.proprio_normalizer.normalize(alpha.proprio[7]))
    sample = opened.dataset(horizon=4)[7]
    np.testing.assert_array_equal(sample["action"], batch.action[0])
    again = pickle.loads(pickle.dumps(opened))  # as for the worker processes of a DataLoader
    assert [d.scheme for d in again.datasets] == [d.scheme for d in opened.datasets]


def test_the_policy_says_how(own: Path, tmp_path: Path) -> None:
    document = trained(own, tmp_path / "run", normalize={"alpha": "minmax"})
    assert schemes(document) == {"alpha": "minmax", "beta": "quantile"} and document["format"] == 2
    assert read_json(tmp_path / "run" / "config.json")["normalize"] == {"alpha": "minmax"}
    with pytest.raises(UserError, match="run has other settings: normalize.alpha: run has minmax"):
        trained(own, tmp_path / "run")


def test_runs_of_earlier_releases_keep_their_numbers(cache: Path, tmp_path: Path) -> None:
    earlier = trained(cache, tmp_path / "whole", normalize={"*": "std5-clipped"})
    assert schemes(earlier) == {"alpha": None, "beta": None} and earlier["format"] == 1
    trained(cache, tmp_path / "run", stop_after=2, normalize={"*": "std5-clipped"})
    saved = tmp_path / "run" / "config.json"
    settings = read_json(saved)
    del settings["normalize"]  # which did not exist
    saved.write_text(json.dumps(settings))
    assert trained(cache, tmp_path / "run") == earlier  # the same command goes on
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_caches_of_earlier_releases_have_no_quantiles(cache: Path, tmp_path: Path) -> None:
    path = shutil.copytree(cache, tmp_path / "cache")
    whole, stored = open_cache(configure(cache, normalize={"*": "quantile"})), {}
    for d in whole.datasets:
        for kind in ("action", "proprio"):
            stored[f"{kind}_stats"] = {k: v for k, v in d.attributes[f"{kind}_stats"].items() if k != "quantiles"}
        attributes(path / d.name, **stored)
    for d, was in zip(open_cache(configure(path, normalize={"*": "quantile"})).datasets, whole.datasets):
        np.testing.assert_array_equal(d.action_normalizer.half_range, was.action_normalizer.half_range)
        assert describe_dataset(d) == describe_dataset(was)
    for d in open_cache(configure(path)).datasets:  # not needed, so not computed
        assert "quantiles" not in describe_dataset(d)["action_stats"]


def test_what_starts_from_a_policy_keeps_its_normalization(cache: Path, tmp_path: Path) -> None:
    trained(cache, tmp_path / "first", normalize={"*": "meanstd"})
    kept = settings_of_start(tmp_path / "first")
    assert kept["normalize"] == {"*": "meanstd"} and kept["dit"] == FOUR_STEPS["dit"]
    start = {"init": str(tmp_path / "first")}
    with pytest.raises(UserError, match="train without --init: normalize of dataset alpha .* is not what"):
        trained(cache, tmp_path / "second", **start, normalize={"*": "minmax"})
    assert schemes(trained(cache, tmp_path / "second", **start, **kept)) == {"alpha": "meanstd", "beta": "meanstd"}
    trained(cache, tmp_path / "mixed", normalize={"alpha": "minmax", "beta": "meanstd"})
    assert settings_of_start(tmp_path / "mixed")["normalize"] == {"alpha": "minmax", "beta": "meanstd"}


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s != "std5-clipped"])
def test_a_rarely_closed_gripper_is_closed_by_the_policy(scheme: str) -> None:
    fields = ActionMap([FieldSpec(field="arm_joint_0_pos"), FieldSpec(field="gripper_open", scale=-1, offset=1)], 10)
    native = np.zeros((1000, 2))
    native[:, 0] = np.linspace(-0.3, 0.1, 1000)
    native[500:505, 1] = 1  # closed
    unified = fields.to_unified(native)
    stats = statistics_of(unified).to_dict()
    robot = RobotInterface(
        {
            **{"name": "x", "views": [], "environment": None, "starts": [], "embodiment": 0, "control_hz": 10},
            **{"action_map": fields.to_dict(), "state_map": fields.to_dict()},
            **{"action_stats": stats, "proprio_stats": stats, "normalize": scheme},
        }
    )
    normalized = robot.proprio(native)  # the state has the same map and statistics as the action
    assert np.abs(normalized[:, SLOTS["gripper_open"]]).max() <= (1 if scheme != "meanstd" else 20)
    np.testing.assert_allclose(robot.actions(normalized[None])[0], native, rtol=0, atol=1e-3)


def test_glitches_are_said_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tables = synthetic.make_tables

    def glitching(plan: Any, name: str) -> Any:
        tables = make_tables(plan, name)
        action = tables.action.copy()
        action[8 + 5, 40] = 1e5  # of the second episode
        return dataclasses.replace(tables, action=action, action_stats=statistics_of(action))

    monkeypatch.setattr(synthetic, "make_tables", glitching)
    synthetic.build(tmp_path / "cache")
    said: list[str] = []
    train(configure(tmp_path / "cache", out=str(tmp_path / "run"), steps=1), say=said.append)
    assert any(line.startswith("beta: action eef_vel_y is 1e+05 at episode 11 row 5, ") for line in said), said
    assert sum("far out" in line for line in said) == 2  # and alpha's


def test_what_an_earlier_run_cuts_off_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tables = synthetic.make_tables

    def rarely_closed(plan: Any, name: str) -> Any:
        tables = make_tables(plan, name)
        proprio = tables.proprio.copy()
        proprio[:, 45], proprio[20, 45] = 1.0, 0.0
        return dataclasses.replace(tables, proprio=proprio, proprio_stats=statistics_of(proprio))

    monkeypatch.setattr(synthetic, "make_tables", rarely_closed)
    synthetic.build(tmp_path / "cache")
    for scheme, count in (("std5", 0), ("std5-clipped", 2)):
        lines = remarks(open_cache(configure(tmp_path / "cache", normalize={"*": scheme})))
        assert len(lines) == count and all("% of state head_joint_0 is beyond the range of" in line for line in lines)
