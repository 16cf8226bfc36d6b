"""Training on chunk-relative actions: what the network sees, what a policy gives back, and that it is worth it."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dvla.cache.actions.action_map import ActionMap, FieldSpec
from dvla.cache.actions.chunk_frame import ChunkFrame
from dvla.cache.actions.normalizer import Normalizer
from dvla.cache.actions.schemes import SCHEMES, Scheme
from dvla.cache.actions.statistics import statistics_of
from dvla.cache.loader.loader import gather
from dvla.cache.store.cache import Cache
from dvla.common.config import from_mapping
from dvla.common.documents import read_json
from dvla.errors import UserError
from dvla.stages.policy import checkpoint as ck
from dvla.stages.policy.robot import RobotInterface, describe_dataset
from dvla.stages.reports.compare import compare
from dvla.stages.training.checks import open_cache, remarks
from dvla.stages.training.config import TrainConfig
from dvla.stages.training.stage_three.finetune import finetune_config
from dvla.stages.training.train import train
from dvla.stages.training.warm_start import settings_of_start
from support import synthetic_cache as synthetic
from support.run_samples import FOUR_STEPS

T = 4
SETTINGS: dict[str, Any] = {**FOUR_STEPS, "dit": {**FOUR_STEPS["dit"], "horizon": T}, "action_frame": "chunk"}


def configure(cache: Path, **changes: Any) -> TrainConfig:
    return from_mapping(TrainConfig, {"cache": str(cache), "out": "", **SETTINGS, **changes})


def trained(cache: Path, out: Path, stop_after: int | None = None, **changes: Any) -> dict[str, Any]:
    """The policy.json of the run."""
    train(configure(cache, out=str(out), **changes), say=lambda _: None, stop_after=stop_after)
    return read_json(ck.resolve(out) / "policy.json")


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def windows(dataset: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(unified actions of all chunks [N, T, 128], which of their steps are inside [N, T], states [N, 128])."""
    actions, inside, states = [], [], []
    for start, length in zip(dataset.episode_start.tolist(), dataset.episode_length.tolist()):
        for row in range(start, start + length):
            step = row + np.arange(T)
            inside.append(step < start + length)
            actions.append(np.asarray(dataset.action)[np.minimum(step, start + length - 1)])
            states.append(dataset.proprio[row])
    return np.stack(actions), np.stack(inside), np.stack(states)


def test_the_network_sees_relative_chunks_scaled_by_their_own_statistics(cache: Path) -> None:
    alpha = open_cache(configure(cache)).named("alpha")
    actions, inside, states = windows(alpha)
    rotation = np.isin(np.arange(128), range(33, 39))
    frame = ChunkFrame(alpha.action_mask & alpha.proprio_mask, rotation)
    assert frame.plain.tolist() == [30, 31, 32] and frame.rotations == [33]
    relative = frame.encode(actions, states)
    stats = statistics_of(relative[inside])
    for name in ("mean", "std", "min", "max"):
        found, wanted = getattr(alpha.scale_statistics["action"], name), getattr(stats, name) * alpha.action_mask
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)
    scaled = Normalizer(stats, alpha.action_mask, rotation).normalize(relative)
    assert np.abs(scaled[inside][:, ~rotation]).max() <= 1
    opened = open_cache(configure(cache))
    rows = np.array([0, 7, 24, 60])
    batch = gather(opened, np.zeros(4, np.int64), rows, T)
    np.testing.assert_allclose(batch.action, scaled[rows] * inside[rows][..., None], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(batch.proprio, alpha.proprio_normalizer.normalize(alpha.proprio[rows]))
    for reader in (opened, pickle.loads(pickle.dumps(opened))):  # the latter as in worker processes
        np.testing.assert_array_equal(reader.dataset(horizon=T)[24]["action"], batch.action[2])


def test_absolute_is_the_default_and_unchanged(cache: Path) -> None:
    plain = Cache.open(cache)
    opened = open_cache(configure(cache, action_frame="absolute"))
    for d, was in zip(opened.datasets, plain.datasets):
        assert d.frame is None and describe_dataset(d) == describe_dataset(was)
        assert "action_frame" not in describe_dataset(d)


def test_the_run_and_its_policy_say_so(cache: Path, tmp_path: Path) -> None:
    whole = trained(cache, tmp_path / "whole")
    assert whole["format"] == 2 and [d["action_frame"] for d in whole["datasets"]] == ["chunk", "chunk"]
    assert read_json(tmp_path / "whole" / "config.json")["action_frame"] == "chunk"
    trained(cache, tmp_path / "run", stop_after=2)
    assert trained(cache, tmp_path / "run") == whole
    assert [x["loss"] for x in log(tmp_path / "run")] == [x["loss"] for x in log(tmp_path / "whole")]
    with pytest.raises(UserError, match="action_frame: run has chunk, you requested absolute"):
        trained(cache, tmp_path / "run", action_frame="absolute")


def test_what_starts_from_it_stays_relative(cache: Path, tmp_path: Path) -> None:
    trained(cache, tmp_path / "first")
    assert settings_of_start(tmp_path / "first")["action_frame"] == "chunk"
    with pytest.raises(UserError, match="train without --init: action_frame of dataset alpha"):
        trained(cache, tmp_path / "second", init=str(tmp_path / "first"), action_frame="absolute")
    assert finetune_config(tmp_path / "first", (), None, {}).train.action_frame == "chunk"
    with pytest.raises(UserError, match="action_frame is absolute, but fine-tuning keeps"):
        finetune_config(tmp_path / "first", (), None, {"action_frame": "absolute"})


def test_datasets_without_a_state_to_compare_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tables, without = synthetic.make_tables, {"beta"}

    def stateless(plan: Any, name: str) -> Any:
        tables = make_tables(plan, name)
        mask = tables.proprio_mask & (np.arange(128) >= 39)  # velocities alone
        return dataclasses.replace(tables, proprio_mask=mask) if name in without else tables

    monkeypatch.setattr(synthetic, "make_tables", stateless)
    synthetic.build(tmp_path / "one")
    opened = open_cache(configure(tmp_path / "one"))
    assert [d.frame is None for d in opened.datasets] == [False, True]
    assert remarks(opened)[-1].startswith("beta: its actions stay absolute")
    assert [d.get("action_frame") for d in map(describe_dataset, opened.datasets)] == ["chunk", None]
    without.add("alpha")
    synthetic.build(tmp_path / "none")
    with pytest.raises(UserError, match="train with --action-frame absolute: no dataset of .* has a joint or a pose"):
        open_cache(configure(tmp_path / "none"))


FIELDS = [
    FieldSpec(fields=("arm_joint_{0..2}_pos",), scale=np.pi / 180),  # native degrees
    FieldSpec(fields=("eef_pos_x", "eef_pos_y", "eef_pos_z")),
    FieldSpec(rotation="quat_xyzw"),
    FieldSpec(field="gripper_open", scale=-1, offset=1),
]


def robot_of(action: np.ndarray, state: np.ndarray, scheme: Scheme = "std5") -> tuple[RobotInterface, np.ndarray]:
    """(the robot of native chunks [N, T, d] from native states [N, d], what a perfect network gives for them)."""
    fields = ActionMap(FIELDS, 10.0)
    relative = ChunkFrame(fields.mask, fields.rotation_slots).encode(
        fields.to_unified(action), fields.to_unified(state)
    )
    stats = statistics_of(relative.reshape(-1, 128)), statistics_of(fields.to_unified(state))
    described = {
        **{"name": "x", "views": [], "environment": None, "starts": [], "embodiment": 0, "control_hz": 10.0},
        **{"action_map": fields.to_dict(), "state_map": fields.to_dict(), "normalize": scheme, "action_frame": "chunk"},
        **{"action_stats": stats[0].to_dict(), "proprio_stats": stats[1].to_dict()},
    }
    normalizer = Normalizer(stats[0], fields.mask, fields.rotation_slots, scheme)
    return RobotInterface(described), normalizer.normalize(relative)


def native_motion(seed: int, n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """(chunks [n, T, 11], states [n, 11]) of a robot that moves a little from wherever it is."""
    rng = np.random.default_rng(seed)
    state = np.concatenate([rng.uniform(-150, 150, (n, 3)), rng.uniform(-1, 1, (n, 3)), rng.normal(size=(n, 4))], 1)
    step = np.concatenate(
        [rng.normal(0, 3, (n, T, 3)), rng.normal(0, 0.02, (n, T, 3)), rng.normal(0, 0.1, (n, T, 4))], 2
    )
    chunk = state[:, None] + step.cumsum(1)
    for x in (state, chunk):
        x[..., 6:] /= np.linalg.norm(x[..., 6:], axis=-1, keepdims=True)
        x[..., 6:] *= np.where(x[..., 9:] < 0, -1, 1)
    grip = rng.random((n, 1)) < 0.1
    return np.concatenate([chunk, np.broadcast_to(grip[:, None], (n, T, 1))], 2), np.concatenate([state, grip], 1)


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s != "std5-clipped"])
def test_a_policy_gives_native_actions_back(scheme: Scheme) -> None:
    chunk, state = native_motion(0)
    robot, perfect = robot_of(chunk, state, scheme)
    found = robot.actions(perfect, state)
    np.testing.assert_allclose(found, chunk, rtol=0, atol=1e-3)
    elsewhere = state.copy()
    elsewhere[:, :3] += 10.0  # the same prediction from another posture: as much further
    np.testing.assert_allclose(robot.actions(perfect, elsewhere)[..., :3], chunk[..., :3] + 10.0, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="relative to the state at the chunk's start; give it"):
        robot.actions(perfect)


def test_other_frames_are_refused() -> None:
    described = {**vars(TrainConfig("", "")), "action_frame": "wrist"}
    with pytest.raises(UserError, match="unknown value 'wrist'"):
        from_mapping(TrainConfig, described)


def test_relative_is_better_where_small_motions_start_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out errors are compared in m, since normalized units differ."""
    make_tables = synthetic.make_tables

    def small_motions(plan: Any, name: str) -> Any:
        tables, rng = make_tables(plan, name), np.random.default_rng(len(name))
        proprio, moving = tables.proprio.copy(), slice(30, 33)
        proprio[:, moving] = rng.uniform(-2, 2, (len(proprio), 3))
        action = tables.action * 0
        action[:, 33], action[:, 37] = 1, 1
        action[:, moving] = proprio[:, moving] + 0.01 * rng.normal(size=(len(action), 3))
        stats = {"action_stats": statistics_of(action), "proprio_stats": statistics_of(proprio)}
        return dataclasses.replace(tables, action=action, proprio=proprio, **stats)

    monkeypatch.setattr(synthetic, "make_tables", small_motions)
    synthetic.build(tmp_path / "cache")
    errors = {}
    for frame in ("absolute", "chunk"):
        train(
            configure(
                *(tmp_path / "cache",),
                **{
                    "out": str(tmp_path / frame),
                    "action_frame": frame,
                    "steps": 30,
                    "eval_every": 30,
                    "eval_batches": 4,
                },
                **{"dit": {**SETTINGS["dit"], "horizon": 1}, "optimizer": {"lr": 3e-3, "warmup": 5, "ema": 0.5}},
            ),
            say=lambda _: None,
        )
        errors[frame] = log(tmp_path / frame)[-1]["eval/native/m"]
    assert errors["chunk"] < 0.5 * errors["absolute"], errors
    rows = {row.name: row for row in compare([tmp_path / frame for frame in errors]).results}
    assert rows["RMSE, m"].values == tuple(errors.values()) and rows["RMSE, m"].best == (1,)
