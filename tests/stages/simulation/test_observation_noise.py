"""Noise on what a recording shows: of the asked size, reproducible, apart from the actions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dvla.errors import UserError
from dvla.stages.simulation.config import RecordConfig
from dvla.stages.simulation.envs import make_environment
from dvla.stages.simulation.record import Demonstration, record, with_observation_noise

T = 400
REACH = "metaworld/reach-v3"


def demonstration(start: int = 3) -> Demonstration:
    rng = np.random.default_rng(start)
    state = np.column_stack([rng.normal(0, 2.0, T), rng.normal(0, 0.01, T), np.full(T, 7.0)]).astype(np.float32)
    return Demonstration(
        start, (0.0,), True, "do it", {"front": np.full((T, 8, 8, 3), 128, np.uint8)}, state, state[:, :2] * 3
    )


def noisy(**sizes) -> Demonstration:
    return with_observation_noise(demonstration(), RecordConfig(REACH, 1, Path("out"), **sizes))


def test_states_get_noise_in_proportion_to_their_spread():
    clean, changed = demonstration(), noisy(observation_noise=0.1)
    difference = changed.state - clean.state
    np.testing.assert_allclose(difference[:, :2].std(0), 0.1 * clean.state[:, :2].std(0), rtol=0.15)
    assert (difference[:, 2] == 0).all() and changed.state.dtype == np.float32  # what never changes stays
    np.testing.assert_array_equal(changed.action, clean.action)
    np.testing.assert_array_equal(changed.images["front"], clean.images["front"])


def test_images_get_noise_in_gray_levels_and_stay_images():
    clean, changed = demonstration(), noisy(pixel_noise=5.0)
    image = changed.images["front"]
    assert image.dtype == np.uint8 and abs(image.astype(float).std() - 5.0) < 0.1 and abs(image.mean() - 128) < 0.1
    np.testing.assert_array_equal(changed.state, clean.state)
    assert {
        int(v) for v in (noisy(pixel_noise=500.0).images["front"].min(), noisy(pixel_noise=500.0).images["front"].max())
    } == {0, 255}


def test_noise_is_a_function_of_seed_and_start():
    same = [noisy(observation_noise=0.1, pixel_noise=2.0) for _ in range(2)]
    np.testing.assert_array_equal(same[0].state, same[1].state)
    np.testing.assert_array_equal(same[0].images["front"], same[1].images["front"])
    assert not np.array_equal(same[0].state, noisy(observation_noise=0.1, seed=1).state)
    assert (
        with_observation_noise(demonstration(), RecordConfig(REACH, 1, Path("out"))).state.tolist()
        == demonstration().state.tolist()
    )


@pytest.mark.slow
def test_a_recording_has_noise_on_observations_alone_and_says_so(tmp_path):
    pytest.importorskip("lerobot", reason="lerobot is not installed (pip install 'dvla[lerobot]')")
    try:
        make_environment(REACH, image_size=32).close()
    except UserError as error:
        pytest.skip(str(error))
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    rows = {}
    for name, size in (("clean", 0.0), ("noisy", 0.2), ("again", 0.2)):
        config = RecordConfig(
            REACH, 1, tmp_path / name, image_size=32, max_steps=100, extra_steps=0, noise=0.1, observation_noise=size
        )
        record(config)
        table = LeRobotDataset(f"dvla/{name}", root=tmp_path / name, video_backend="pyav").hf_dataset
        rows[name] = {key: np.stack([np.asarray(row) for row in table[key]]) for key in ("observation.state", "action")}
        assert json.loads((tmp_path / name / "meta/dvla.json").read_text())["observation_noise"] == size
    for name in ("noisy", "again"):
        np.testing.assert_array_equal(rows[name]["action"], rows["clean"]["action"])
    np.testing.assert_array_equal(rows["noisy"]["observation.state"], rows["again"]["observation.state"])
    assert (rows["noisy"]["observation.state"] != rows["clean"]["observation.state"]).any()
    with pytest.raises(UserError, match="observation_noise is -1; it must be at least 0"):
        record(RecordConfig(REACH, 1, tmp_path / "bad", observation_noise=-1))
