"""Episodes with predictions for the Rerun viewer: what is in the file is what was recorded and predicted."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dvla.cache.actions.action_map import ActionMap, FieldSpec
from dvla.cache.actions.history import History
from dvla.cache.readers.config import DatasetConfig
from dvla.cache.readers.episode import Episode, View
from dvla.errors import UserError
from dvla.stages.reports import rerun as rerun_export
from dvla.stages.reports.rerun import _trajectory, _write, write_rerun
from support.cli_runner import Dvla, refused

T, MAP = (
    7,
    ActionMap(
        [
            FieldSpec(fields=("eef_vel_x", "eef_vel_y", "eef_vel_z"), delta=True, scale=0.01),
            FieldSpec(drop=1),
            FieldSpec(rotation="euler_xyz"),
        ],
        10.0,
    ),
)


def images(start: int, stop: int):
    return iter(np.full((4, 6, 3), step, np.uint8) for step in range(start, stop))


@pytest.fixture
def episode() -> Episode:
    rng = np.random.default_rng(0)
    return Episode(
        "cube",
        3,
        "hash",
        "lift <it>",
        10.0,
        T,
        tuple(View(v, 4, 6, T, images) for v in ("top", "wrist")),
        rng.standard_normal((T, 2)).astype(np.float32),
        rng.standard_normal((T, MAP.native_dim)).astype(np.float32),
        np.arange(T) / 10,
    )


class Known:
    """A policy whose chunk at a step is known, and that checks what it is shown."""

    robot = SimpleNamespace(action_map=MAP, views=("wrist",))

    def act_batch(self, observations: list) -> np.ndarray:
        assert all(
            list(o.images) == ["wrist"] and (o.images["wrist"] == o.step).all() and o.instruction == "lift <it>"
            for o in observations
        )
        return np.stack([np.full((3, MAP.native_dim), float(o.step)) for o in observations])


def stored(path: Path) -> tuple[dict[str, dict[int, float]], set[str]]:
    """Its scalars, {entity: {frame: value}}, and the names of all its entities."""
    scalars: dict[str, dict[int, float]] = {}
    names = set()
    try:
        from rerun.experimental import RrdReader
    except ImportError:  # before 0.32
        import rerun as rr

        table = rr.dataframe.load_recording(path).view(index="frame", contents="/**").select().read_all().to_pydict()
        tables = [(name, {"frame": table["frame"], name.partition(":")[2]: table[name]}) for name in table]
    else:
        tables = [(c.entity_path, c.to_record_batch().to_pydict()) for c in RrdReader(path).stream()]
    for entity, rows in tables:
        entity = entity.partition(":")[0]
        names.add(entity)
        for name in [name for name in rows if "Scalars:" in name]:
            values = {frame: v[0] for frame, v in zip(rows["frame"], rows[name]) if v is not None}
            scalars.setdefault(entity, {}).update(values)
    return scalars, names


def test_the_file_holds_what_was_done_and_predicted(
    episode: Episode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rerun")
    monkeypatch.setattr(rerun_export, "BATCH", 2)  # several calls of the policy
    done = _write(Known(), episode, 3, tmp_path / "deep" / "e.rrd", 2, lambda *_: None)
    assert (done.frames, done.predicted) == (T, 4) and [p.name for p in (tmp_path / "deep").iterdir()] == ["e.rrd"]
    expected = [
        np.sqrt(np.mean((((step - episode.action[step]) / episode.action.std(0))[[0, 1, 2, 4, 5, 6]]) ** 2))
        for step in range(0, T, 2)
    ]
    assert done.error == pytest.approx(np.mean(expected), rel=1e-4)
    column, names = stored(done.path)
    expert = column["/action/eef_vel_x/expert"]
    assert sorted(expert) == list(range(T)) and np.allclose([expert[t] for t in range(T)], episode.action[:, 0])
    assert column["/action/eef_vel_x/predicted"] == {0: 0, 2: 2, 4: 4, 6: 6} and sorted(column["/error"]) == [
        0,
        2,
        4,
        6,
    ]
    assert len(column) == 2 * 6 + 1 and not [name for name in column if "dropped" in name]  # these mean nothing
    assert {"/views/top", "/views/wrist", "/way/predicted"} <= names


def test_a_policy_with_a_history_sees_the_frames_before(episode: Episode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those at which nothing is asked."""
    monkeypatch.setattr(rerun_export, "BATCH", 2)
    asked = []

    class Remembering(Known):
        history = History((0, -1, -4), (0, -3))

        def act_batch(self, observations: list) -> np.ndarray:
            for o in observations:
                asked.append(o.step)
                for step, before in zip((o.step, o.step - 1, o.step - 4), o.window.frames, strict=True):
                    assert (before is None) == (step < 0) and (before is None or (before.images["wrist"] == step).all())
                (state,) = o.window.states
                assert state is None if o.step < 3 else (state.state == episode.state[o.step - 3]).all()
            return super().act_batch(observations)

    frames = list(rerun_export._frames(Remembering(), episode, 2))
    assert asked == [0, 2, 4, 6] and [chunk is not None for _, chunk in frames] == [i % 2 == 0 for i in range(T)]


def test_a_trajectory_of_velocities_is_in_meters() -> None:
    actions = np.ones((4, MAP.native_dim))
    assert np.allclose(_trajectory(MAP, actions)[:, 0], 0.01 * np.arange(5))  # 0.01 m a step
    place = ActionMap([FieldSpec(fields=("eef_pos_x", "eef_pos_y", "eef_pos_z"))], 10.0)
    assert np.allclose(_trajectory(place, np.ones((4, 3))), 1)
    assert _trajectory(ActionMap([FieldSpec(field="gripper_open")], 10.0), np.ones((4, 1))) is None


def test_what_is_refused(dvla: Dvla, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, episode_folder: Path) -> None:
    pytest.importorskip("rerun")
    common = ("rerun", tmp_path, "--source", episode_folder)
    refused(dvla(*common, "-o", tmp_path / "e.mp4"), "ends in .rrd")
    (tmp_path / "there.rrd").write_text("mine")
    refused(dvla(*common, "-o", tmp_path / "there.rrd"), "exists; choose another name")
    refused(dvla(*common, "-o", tmp_path / "e.rrd", "--every", "0"), "--every is 0")
    refused(dvla(*common, "-o", tmp_path / "e.rrd", "--episode", "99"), "has no episode 99")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'dvla\[rerun\]'"):
        write_rerun("run", "source", 0, tmp_path / "e.rrd")


def test_a_run_carries_its_own_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dataset is read as it was for the run, though no config is shipped for it or it lies elsewhere now."""
    mine = DatasetConfig("mine", (), "gripper_joint", (FieldSpec(field="gripper_open"),), ())
    stored = json.loads(json.dumps(mine.document()))
    documents = {
        "run": [{"name": "cubes", "config": stored}, {"name": "push"}],
        "one": [{"name": "a", "config": stored}],
    }
    monkeypatch.setattr("dvla.stages.policy.checkpoint.resolve", lambda run, say: run)
    monkeypatch.setattr("dvla.stages.policy.document.read_document", lambda run: {"datasets": documents[run]})
    (tmp_path / "cubes").mkdir()
    assert rerun_export._own_map("run", str(tmp_path / "cubes")) == mine
    assert rerun_export._own_map("run", "owner/cubes@main") == mine
    assert rerun_export._own_map("run", "owner/push") is None  # written by an earlier release
    assert rerun_export._own_map("one", "owner/another") == mine
