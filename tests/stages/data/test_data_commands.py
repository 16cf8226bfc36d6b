"""`dvla data list`, `show`, `stats` and `add`, and the stream of tables below them."""

from __future__ import annotations

import functools
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from dvla.cache.actions.slots import EMBODIMENTS, SLOTS
from dvla.cache.readers import Source, open_source
from dvla.cache.readers.config import DatasetConfig
from dvla.cache.readers.episode import CorruptEpisode
from dvla.cache.readers.lerobot.source import LeRobotSource
from dvla.cache.readers.search import config_names, load_config, registered_folder
from dvla.stages.data import statistics
from dvla.stages.data.add.guesses import guess
from support.cli_runner import Dvla, argv, refused
from support.hdf5_samples import write_replay_buffer, write_robomimic
from support.lerobot_samples import convert_to_v2

HZ = 20
METAWORLD = ("x", "y", "z", "gripper")
CAMERA = "observation.images.front"


def episode_table(number: int, length: int, width: dict[str, int], rng: np.random.Generator) -> pa.Table:
    """The rows of one episode: random vectors of these widths, times and indices."""
    frames = np.arange(length)
    vectors = {
        k: pa.array(list(rng.uniform(0, 1, (length, w)).astype(np.float32)), pa.list_(pa.float32()))
        for k, w in width.items()
    }
    return pa.table(
        {
            **vectors,
            "timestamp": (frames / HZ).astype(np.float32),
            "frame_index": frames,
            "episode_index": np.full(length, number),
            "task_index": np.full(length, number % 2),
        }
    )


def write_dataset(
    root: Path, lengths=(10, 13, 16), action=METAWORLD, state=METAWORLD, robot="metaworld_sawyer", group=None, seed=0
) -> Path:
    """A LeRobot v3.0 dataset without its video files, all rows in one parquet file.

    `action`, `state`: names of the dimensions, or a width. Row groups have one episode each, or `group` rows.
    """
    rng, width = np.random.default_rng(seed), {}
    features = {CAMERA: {"dtype": "video", "shape": [48, 64, 3], "names": ["height", "width", "channels"]}}
    for key, names in (("action", action), ("observation.state", state)):
        width[key] = names if isinstance(names, int) else len(names)
        features[key] = {
            "dtype": "float32",
            "shape": [width[key]],
            "names": None if isinstance(names, int) else list(names),
        }
    for folder in ("meta/episodes/chunk-000", "data/chunk-000"):
        (root / folder).mkdir(parents=True)
    info = {
        "codebase_version": "v3.0",
        "robot_type": robot,
        "fps": HZ,
        "features": features,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    (root / "meta/info.json").write_text(json.dumps(info))
    pq.write_table(
        pa.table({"task_index": [0, 1], "__index_level_0__": ["push the puck", "open the drawer"]}),
        root / "meta/tasks.parquet",
    )
    n = len(lengths)
    tasks = [["push the puck", "open the drawer"][i % 2] for i in range(n)]
    zeros = [0] * n
    pq.write_table(
        pa.table(
            {
                "episode_index": range(n),
                "length": lengths,
                "tasks": [[t] for t in tasks],
                "data/chunk_index": zeros,
                "data/file_index": zeros,
                f"videos/{CAMERA}/chunk_index": zeros,
                f"videos/{CAMERA}/file_index": zeros,
                f"videos/{CAMERA}/from_timestamp": [0.0] * n,
            }
        ),
        root / "meta/episodes/chunk-000/file-000.parquet",
    )
    parts = [episode_table(i, length, width, rng) for i, length in enumerate(lengths)]
    with pq.ParquetWriter(data_file(root), parts[0].schema) as writer:
        for part in parts if group is None else [pa.concat_tables(parts)]:
            writer.write_table(part, row_group_size=group)
    return root


def data_file(root: Path) -> Path:
    return root / "data/chunk-000/file-000.parquet"


def change(root: Path, how: Callable[[pa.Table], pa.Table]) -> None:
    """Replace the rows by `how(rows)`, in row groups that do not follow the episodes."""
    pq.write_table(how(pq.read_table(data_file(root))), data_file(root), row_group_size=11)


def replaced(name: str, row: int, value: object) -> Callable[[Path], None]:
    def how(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        values[row] = value
        return table.set_column(table.column_names.index(name), name, pa.array(values, table.schema.field(name).type))

    return lambda root: change(root, how)


# --- the stream of tables --------------------------------------------------------------------------------------------


def one_by_one(source: Source) -> tuple[dict[int, tuple], dict[int, str]]:
    """(tables, refusals) by `table`."""
    tables, refused = {}, {}
    for number in source.episode_ids:
        try:
            table = source.table(number)
            tables[number] = (table.state, table.action)
        except CorruptEpisode as error:
            refused[number] = str(error)
    return tables, refused


def assert_stream_equals_tables(source: Source, batch_rows: int) -> None:
    tables, refused = one_by_one(source)
    found, found_refused = {}, []
    for block in source.tables(batch_rows):
        assert block.state.dtype == block.action.dtype == np.float32
        assert len(block.episode_ids) == len(block.state) == len(block.action)
        assert (
            block.state.shape[1] == source.state_map.native_dim
            and block.action.shape[1] == source.action_map.native_dim
        )
        longest = max((len(t[1]) for t in tables.values()), default=0)
        assert len(block.action) < batch_rows + longest  # bounded: a block and an episode
        for number in np.unique(block.episode_ids).tolist():
            assert number not in found  # whole episodes only
            found[number] = (block.state[block.episode_ids == number], block.action[block.episode_ids == number])
        found_refused += block.refused
    assert {f.episode: str(f) for f in found_refused} == refused and len(found_refused) == len(refused)
    assert found.keys() == tables.keys()
    for number, (state, action) in tables.items():
        np.testing.assert_array_equal(found[number][0], state)
        np.testing.assert_array_equal(found[number][1], action)


def interleave(root: Path) -> None:
    """Rows of episodes 0 and 1 in turn: still in frame order each, so every episode is whole."""
    change(
        root, lambda t: t.take([*(i for pair in zip(range(10), range(10, 20)) for i in pair), *range(20, t.num_rows)])
    )


def cut_in_the_middle(root: Path) -> None:
    data = bytearray(data_file(root).read_bytes())
    place = pq.ParquetFile(data_file(root)).metadata.row_group(1).column(0).dictionary_page_offset
    data[place : place + 40] = b"\xff" * 40  # the header of the page of row group 1 (episode 1)
    data_file(root).write_bytes(data)


DAMAGE = {  # what was done to rows 0-9 (episode 0), 10-22 (1), 23-38 (2) → episodes refused, not settled
    "nothing": (lambda r: None, []),
    "rows interleaved": (interleave, []),
    "NaN": (replaced("action", 13, [0.0, float("nan"), 0.0, 0.0]), [1]),
    "beyond float32 in the state": (replaced("observation.state", 2, [0.0, 0.0, float("inf"), 0.0]), [0]),
    "null": (replaced("action", 38, None), [2]),
    "another width": (replaced("action", 38, [0.0, 1.0]), [2]),
    "row missing": (lambda r: change(r, lambda t: pa.concat_tables([t.slice(0, 15), t.slice(16)])), [1]),
    "row twice": (lambda r: change(r, lambda t: pa.concat_tables([t, t.slice(4, 1)])), [0]),
    "rows swapped": (lambda r: change(r, lambda t: t.take([*range(11), 12, 11, *range(13, t.num_rows)])), []),  # sorted
    "no rows": (lambda r: change(r, lambda t: t.slice(10)), [0]),
    "an episode that is not listed": (replaced("episode_index", 38, 7), []),  # index, frame_index and length outvote it
    "row without episode": (replaced("episode_index", 0, None), [0]),
    "time repeated": (replaced("timestamp", 14, 0.15), []),
    "time missing": (replaced("timestamp", 0, None), []),
    "task that is not listed": (replaced("task_index", 30, 9), []),
    "another task": (replaced("task_index", 30, 1), []),
    "page damaged": (cut_in_the_middle, [1]),
    "column missing": (lambda r: change(r, lambda t: t.drop_columns(["action"])), [0, 1, 2]),
    "episode column missing": (lambda r: change(r, lambda t: t.drop_columns(["episode_index"])), [0, 1, 2]),
    "no footer": (lambda r: data_file(r).write_bytes(data_file(r).read_bytes()[:-20]), [0, 1, 2]),
    "file missing": (lambda r: data_file(r).unlink(), [0, 1, 2]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_stream_equals_tables(tmp_path: Path, name: str) -> None:
    """The same rows and the same refusals in the same words, however the rows are cut into batches."""
    harm, lost = DAMAGE[name]
    root = write_dataset(tmp_path / "d")
    harm(root)
    source = open_source(root)
    assert sorted(one_by_one(source)[1]) == lost
    for batch_rows in (1, 7, 65536):
        assert_stream_equals_tables(source, batch_rows)


def test_stream_with_shift_and_without_state(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d", group=1000)
    config = load_config("metaworld")
    for changes in ({"action_shift": 2}, {"state": ()}):
        assert_stream_equals_tables(open_source(root, DatasetConfig(**{**vars(config), **changes})), 12)


@pytest.mark.parametrize("kind", ["h264", "hevc", "image", "v2.1"])
def test_stream_of_what_lerobot_wrote(request, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("lerobot", reason="lerobot is an optional dependency: pip install 'dvla[lerobot]'")
    recorded = request.getfixturevalue("recorded")
    root = convert_to_v2(recorded["hevc"], tmp_path / "v2") if kind == "v2.1" else recorded[kind]
    for batch_rows in (5, 65536):
        assert_stream_equals_tables(open_source(root), batch_rows)


def test_a_file_of_many_episodes_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_dataset(tmp_path / "d", lengths=(50,) * 40, group=700)
    source, opened, real = open_source(root), [], pq.ParquetFile
    monkeypatch.setattr(pq, "ParquetFile", lambda *a, **k: opened.append(a) or real(*a, **k))
    assert [len(b.action) for b in source.tables(64)] == [100] * 20
    assert len(opened) == 1


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def dvla(dvla: Dvla) -> Dvla:
    """`dvla(*arguments)` runs one `dvla data` command."""
    return functools.partial(dvla, "data")


def squeezed(text: str) -> str:
    return " ".join(text.split())


def test_list_of_families(dvla: Dvla) -> None:
    result = dvla("list")
    assert result.code == 0 and result.err == ""
    rows = {line.split()[0]: line.split() for line in result.out.splitlines() if line.strip()}
    for name in config_names():
        config = load_config(name)
        assert rows[name][1:3] == [config.format, config.embodiment]
        assert f"{config.action_width}/" in rows[name][4]


def test_list_of_folders(dvla: Dvla, tmp_path: Path) -> None:
    """Datasets at any depth; a broken one gets its reason and the others are listed."""
    write_dataset(tmp_path / "a/b/good")
    write_dataset(tmp_path / "a/toaster", robot="toaster")
    (write_dataset(tmp_path / "a/json") / "meta/info.json").write_text("{")
    (write_dataset(tmp_path / "nothing") / "meta/info.json").unlink()
    (write_dataset(tmp_path / "narrow", action=("x", "y", "z")))
    result = dvla("list", tmp_path / "a", tmp_path / "nothing", tmp_path / "narrow")
    out = squeezed(result.out)
    assert result.code == 0 and "5 datasets, 3 of which cannot be opened" in out
    assert f"{tmp_path}/a/b/good lerobot v3.0 3 39 20 front 48×64 metaworld" in out
    assert f"{tmp_path}/a/toaster lerobot v3.0 3 39 20 front 48×64 none" in out
    lines = result.err.splitlines()
    for name, reason in (
        ("a/json", "cannot be read as JSON"),
        ("nothing", "meta/info.json"),
        ("narrow", "has 3 dimensions"),
    ):
        assert sum(line.startswith(f"{tmp_path / name}: ") and reason in line for line in lines) == 1
    assert len(lines) == 3
    (tmp_path / "empty").mkdir()
    refused(dvla("list", tmp_path / "empty"), "holds no dataset")
    refused(dvla("list", tmp_path / "none"), "does not exist")


def test_a_broken_dataset_among_others_is_named(dvla: Dvla, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever opening it raises, and a folder that cannot be listed."""
    for name in ("good", "odd", "shut"):
        write_dataset(tmp_path / name)
    opened, listed = LeRobotSource.__init__, Path.iterdir

    def odd(self: LeRobotSource, path: str, *more: Any) -> None:
        if path.endswith("odd"):
            raise RecursionError("too deep")
        opened(self, path, *more)

    def shut(self: Path) -> Any:
        if self.name == "shut":
            raise PermissionError(13, "Permission denied")
        return listed(self)

    monkeypatch.setattr(LeRobotSource, "__init__", odd)
    monkeypatch.setattr(Path, "iterdir", shut)
    done = dvla("list", tmp_path)
    assert done.code == 0 and "3 datasets, 2 of which cannot be opened" in done.out, done
    assert "RecursionError: too deep" in done.err and "Permission denied" in done.err and "Traceback" not in done.err


def test_list_of_a_folder_of_several_formats(dvla: Dvla, tmp_path: Path) -> None:
    """Names three levels down must not make one dataset of a folder that holds several."""
    write_dataset(tmp_path / "z/inner/push")
    write_replay_buffer(tmp_path / "z/pusht.zarr")
    (tmp_path / "z/rm").mkdir()
    write_robomimic(tmp_path / "z/rm/demo.hdf5")
    result = dvla("list", tmp_path / "z")
    out = squeezed(result.out)
    assert result.code == 0 and result.err == "" and out.endswith("3 datasets")
    for name, format in (("inner/push", "lerobot v3.0"), ("pusht.zarr", "replay_buffer"), ("rm", "robomimic")):
        assert f"{tmp_path}/z/{name} {format} 3 " in out
    assert "agentview 6×8" in out


def test_show(dvla: Dvla, tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d")
    result = dvla("show", root)
    out = squeezed(result.out)
    assert result.code == 0 and result.err == ""
    for words in (
        "config metaworld",
        "embodiment gripper_delta_eef",
        "license MIT",
        "rate 20 Hz",
        "episodes 3, 39 frames",
        "cameras front 48×64",
        "instructions 2 different",
        "2 × 'push the puck'",
        "1 × 'open the drawer'",
        "2 z eef_vel_z 41 m/s × 0.01 × 20 Hz",
        "3 gripper gripper_open 10 1 open × -0.5 +0.5",
        "0 x eef_pos_x 30 m unchanged",
    ):
        assert words in out, words
    refused(dvla("show", root, "--dataset-config", "droid"), "describes 8")
    refused(dvla("show", root, "--dataset-config", "metawrld"), "did you mean 'metaworld'")
    refused(dvla("show", tmp_path / "none"), "does not exist")
    refused(dvla("show", root, "--episode", 3), "no episode 3")
    refused(dvla("show", root, "--episode", 1), "file-000.mp4 is missing")


def test_show_an_episode(dvla: Dvla, recorded: dict[str, Path]) -> None:
    pytest.importorskip("lerobot", reason="lerobot is an optional dependency: pip install 'dvla[lerobot]'")
    episode = open_source(recorded["h264"]).load(1)
    out = squeezed(dvla("show", recorded["h264"], "--episode", 1).out)
    assert "episode 1: 13 frames, 0.60 s instruction 'open the drawer' cameras front 64×64, wrist 48×80" in out
    first, last = (f"{episode.action[i, 0]:.4g}" for i in (0, -1))
    unified = [
        f"{open_source(recorded['h264']).action_map.to_unified(episode.action)[i, SLOTS['eef_vel_x']]:.4g}"
        for i in (0, -1)
    ]
    assert f"0 x eef_vel_x {first} {last} {unified[0]} {unified[1]}" in out


def test_show_without_a_config(dvla: Dvla, tmp_path: Path) -> None:
    """Every number with its name and range, and how to write a config."""
    root = write_dataset(tmp_path / "d", robot="toaster", state=("left_lever", "right_lever"))
    result = dvla("show", root)
    assert result.code == 0
    state = np.concatenate([open_source(root, unmapped=True).table(i).state for i in range(3)])
    for i, name in enumerate(("left_lever", "right_lever")):
        low, high = state[:, i].min(), state[:, i].max()
        assert f"observation.state {i} {name} {low:.4g} {high:.4g}" in squeezed(result.out)
    assert result.err == f"no dataset config fits d or toaster; run `dvla data add {root}`\n"


# --- statistics ------------------------------------------------------------------------------------------------------


def report_of(root: Path) -> dict:
    return statistics.measure(open_source(root), lambda *_: None)


def assert_statistics(entry: dict, values: np.ndarray, rank: float) -> None:
    """`entry` describes `values [n]`: moments to rounding, quantiles within `rank` of their own."""
    values = np.asarray(values, np.float64)
    assert entry["count"] == len(values) and (entry["min"], entry["max"]) == (values.min(), values.max())
    np.testing.assert_allclose([entry["mean"], entry["std"]], [values.mean(), values.std()], rtol=1e-9, atol=1e-12)
    for level, value in (*entry["quantiles"].items(), *zip(statistics.GRID, entry["grid"])):
        below, up_to = np.mean(values < value - 1e-6), np.mean(values <= value + 1e-6)
        assert below - rank <= float(level) <= up_to + rank, (level, value)


def test_statistics_are_those_of_all_rows(dvla: Dvla, tmp_path: Path) -> None:
    """Unified and native, of the rows that can be used, without any video; the rest is named."""
    root = write_dataset(tmp_path / "d", lengths=(400, 300, 900))
    replaced("action", 450, [0.0, float("nan"), 0.0, 0.0])(root)
    out = tmp_path / "deep/stats.json"
    result = dvla("stats", root, "--out", out, "--native")
    assert result.code == 0 and f"{out}: 1300 rows of 2 episodes, 1 quarantined (1)" in result.out
    assert result.err == "d episode 1: column 'action' is nan at frame 50, dimension 1\n"
    report, source = json.loads(out.read_text()), open_source(root)
    assert report["datasets"] == [
        {
            "name": "d",
            "config": "metaworld",
            "control_hz": HZ,
            "episodes": 2,
            "rows": 1300,
            "quarantined": [{"episode": 1, "reason": "d episode 1: column 'action' is nan at frame 50, dimension 1"}],
        }
    ]
    for what, mapping in (("action", source.action_map), ("state", source.state_map)):
        native = np.concatenate([getattr(source.table(i), what) for i in (0, 2)])
        unified = mapping.to_unified(native)
        assert {e["slot"] for e in report[what]["unified"].values()} == set(np.flatnonzero(mapping.mask).tolist())
        for name, entry in report[what]["unified"].items():
            assert entry["slot"] == SLOTS[name]
            assert_statistics(entry, unified[:, SLOTS[name]], 1e-3)
        for i, entry in enumerate(report[what]["native"].values()):
            assert_statistics(entry, native[:, i], 1e-3)
    assert report["action"]["unified"]["eef_vel_x"]["unit"] == "m/s"


def test_merged_statistics_are_those_of_all_rows(dvla: Dvla, tmp_path: Path) -> None:
    roots = [write_dataset(tmp_path / f"d{i}", lengths=(400 * (i + 1),), seed=i) for i in range(3)]
    values = [open_source(r).table(0).action * (i + 1) for i, r in enumerate(roots)]
    for root, changed in zip(roots, values):  # of different spread
        change(
            root, lambda t, changed=changed: t.set_column(0, "action", pa.array(list(changed), pa.list_(pa.float32())))
        )
    files = [tmp_path / f"{i}.json" for i in range(3)]
    for root, file in zip(roots[:2], files):
        assert dvla("stats", root, "--out", file).code == 0
    result = dvla("stats", roots[2], "--merge", files[0], "--merge", files[1], "--out", files[2])
    assert result.code == 0 and "2400 rows of 3 episodes, 0 quarantined" in result.out
    merged = json.loads(files[2].read_text())
    everything = np.concatenate(values)
    unified = open_source(roots[0]).action_map.to_unified(everything)
    for i, entry in enumerate(merged["action"]["native"].values()):
        assert_statistics(entry, everything[:, i], 1 / (2 * statistics.PARTS) + 2e-3)
    for name, entry in merged["action"]["unified"].items():
        assert_statistics(entry, unified[:, SLOTS[name]], 1 / (2 * statistics.PARTS) + 2e-3)


def test_merge_of_different_robots(tmp_path: Path) -> None:
    """By slot, also where the two families call it by other names; native dimensions of two families are not mixed."""
    hand = report_of(write_dataset(tmp_path / "hand"))
    arms = statistics.measure(
        open_source(write_dataset(tmp_path / "arms", action=14, state=14), load_config("aloha")), lambda *_: None
    )
    assert statistics.merge_reports([hand]) == hand
    both = statistics.merge_reports([hand, arms])
    assert (
        "native" not in both["action"]
        and both["action"]["unified"].keys() == hand["action"]["unified"].keys() | arms["action"]["unified"].keys()
    )
    assert both["action"]["unified"]["eef_vel_x"] == hand["action"]["unified"]["eef_vel_x"]
    assert both["action"]["unified"]["gripper_open"]["count"] == 78
    one = {
        "slot": 0,
        "count": 2,
        "mean": 0.0,
        "std": 0.0,
        "min": 0.0,
        "max": 0.0,
        "quantiles": {"0.5": 0.0},
        "grid": [0.0] * statistics.PARTS,
    }
    fields = statistics._merge_fields([{"arm_joint_0_pos": one}, {"right_arm_joint_0_pos": one}])
    assert list(fields) == ["arm_joint_0_pos"] and fields["arm_joint_0_pos"]["count"] == 4


def test_statistics_refusals(dvla: Dvla, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, out = write_dataset(tmp_path / "d"), tmp_path / "s.json"
    refused(dvla("stats"), "give a dataset to measure, or reports to --merge")
    refused(dvla("stats", "--merge", tmp_path / "none.json"), "cannot read", "none.json")
    (tmp_path / "odd.json").write_text("[1]")
    refused(dvla("stats", "--merge", tmp_path / "odd.json"), "odd.json is not a report")
    assert dvla("stats", root, "--out", out).code == 0
    before = out.read_bytes()
    for change, place in (
        (lambda r: r["action"]["unified"]["eef_vel_x"].update(slot=500), r"action.unified.eef_vel_x.slot"),
        (lambda r: r["action"]["unified"]["eef_vel_x"]["grid"].pop(), r"action.unified.eef_vel_x.grid"),
        (lambda r: r["state"]["native"].update(a=[]), "state.native.a"),
        (lambda r: r.update(datasets=[]), "'datasets' is [], "),
        (lambda r: r.update(more=1), "'more' is no key of it"),
    ):
        report = json.loads(before)
        change(report)
        (tmp_path / "odd.json").write_text(json.dumps(report))
        refused(dvla("stats", "--merge", tmp_path / "odd.json"), "odd.json is damaged", place, "measure the dataset")
    refused(dvla("stats", root, "--out", out), f"{out} exists")
    refused(dvla("stats", root, "--merge", out), "dataset d is in more than one")
    assert out.read_bytes() == before
    data_file(root).unlink()
    refused(dvla("stats", root), "none of 3 episodes can be used", "file-000.parquet is missing")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(statistics.RunningStatistics, "update", interrupted)
    result = dvla("stats", write_dataset(tmp_path / "e"), "--out", tmp_path / "t.json")
    assert result.code == 130 and not (tmp_path / "t.json").exists()


# --- add -------------------------------------------------------------------------------------------------------------

SO100 = [f"main_{j}" for j in ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")]
ALOHA = [
    f"{s}_{j}"
    for s in ("left", "right")
    for j in ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
]
HAND = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
ARM6 = [f"arm_joint_{i}_pos" for i in range(6)]


@pytest.mark.parametrize(
    "names, expected",
    [
        (SO100, [*ARM6[:5], "gripper_open"]),
        ([n.removeprefix("main_") + ".pos" for n in SO100], [*ARM6[:5], "gripper_open"]),
        (ALOHA, [*(f"left_{n}" for n in ARM6), "left_gripper_open", *ARM6, "gripper_open"]),
        (["joint_1", "joint_2", "joint_3", "gripper_position"], [*ARM6[:3], "gripper_open"]),
        (
            ["kLeftShoulderPitch", "kLeftElbow", "kRightWristYaw", "kLeftHandThumb0"],
            ["left_arm_joint_0_pos", "left_arm_joint_1_pos", "arm_joint_0_pos", "left_dex_finger_joint_0_pos"],
        ),
        (
            ["arm_elbow_flex.pos", "x.vel", "y.vel", "theta.vel"],
            ["arm_joint_0_pos", "base_vel_x", "base_vel_y", "base_angular_vel"],
        ),
        (HAND, ["eef_pos_x", "eef_pos_y", "eef_pos_z", "rotation::3", "gripper_open"]),
        (["ee.x", "delta_y", "dz", "rx", "ry", "rz"], ["eef_pos_x", "eef_pos_y", "eef_pos_z", "rotation::3"]),
        (["qx", "qy", "qz", "qw"], ["rotation:quat_xyzw:4"]),
        (["qw", "qx", "qy", "qz"], ["unknown"] * 4),  # another order is not guessed
        (["roll", "yaw", "pitch"], ["unknown"] * 3),
        (["joint_0", "joint_2"], ["arm_joint_0_pos", "unknown"]),  # a gap
        (["motor_0", "motor_1"], ["unknown"] * 2),  # a motor may be anything
        (["joint_0_vel", "eef_vel_x", "gripper_l", "base_x", "hand_joint_0"], ["unknown"] * 5),
        (["gripper_a", "gripper", "gripper"], ["unknown", "gripper_open", "unknown"]),  # an arm has one
        (["joint_7", "joint_8"], ["unknown"] * 2),
        (
            ["waist_yaw", "left_elbow", "head_pan", "head_tilt", "head_roll"],
            ["torso_joint_0_pos", "left_arm_joint_0_pos", "head_joint_0", "head_joint_1", "unknown"],
        ),
        (["terminate_episode", "x"], ["drop", "eef_pos_x"]),
    ],
)
def test_guesses(names: list[str], expected: list[str]) -> None:
    targets = guess(names)
    assert [n for t in targets for n in t.native] == names  # every dimension once, in order
    assert [f"rotation:{t.form}:{t.width}" if t.kind == "rotation" else t.slot or t.kind for t in targets] == expected


def entries(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.startswith("  - ")]


def test_add_joints_in_degrees(dvla: Dvla, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = write_dataset(tmp_path / "cubes", action=SO100, state=SO100, robot="so100")
    command = argv(f"add {root} --embodiment gripper_joint --action-kind absolute --joint-unit deg --gripper 100,0")
    result = dvla(*command)
    path = registered_folder() / "cubes.yaml"
    assert result.code == 0 and f"{path}: written" in result.out and path.read_text() in result.out
    config = load_config(path)
    assert (config.name, config.match, config.embodiment, config.views) == (
        "cubes",
        ("cubes",),
        "gripper_joint",
        ("front",),
    )
    assert len(entries(path)) == 12
    for line, name in zip(entries(path), SO100 * 2):
        assert line.endswith(f'# guessed from "{name}"')
    unified = open_source(root, config).action_map.to_unified(np.array([180, -90, 0, 0, 45, 25.0]))
    np.testing.assert_allclose(unified[[0, 1, 2, 3, 4, 10]], [np.pi, -np.pi / 2, 0, 0, np.pi / 4, 0.25], rtol=1e-6)
    for option in ((), ("--dataset-config", path), ("--dataset-config", "cubes")):  # registered, so found by itself
        assert f"config cubes ({path})" in squeezed(dvla("show", root, *option).out)
    assert open_source(root).action_map.native_names == tuple(SO100)
    before = path.read_bytes()
    refused(dvla(*command), "cubes.yaml exists", "choose another --name")
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["cubes"]
    refused(dvla(*command, "--name", "droid"), "'droid' is a shipped family")


def test_add_displacements_of_the_hand(dvla: Dvla, tmp_path: Path) -> None:
    names = [*HAND, "terminate_episode"]
    root = write_dataset(tmp_path / "d", action=names, state=HAND, robot="new")
    out = tmp_path / "new.yaml"
    result = dvla(
        *argv(
            f"add {root} --out {out} --name kitchen --license MIT --embodiment gripper_delta_eef "
            "--action-kind delta --delta-scale 0.02,deg --position-unit mm --gripper=-1,1 --state-gripper 1,0 "
            "--rotation euler_xyz"
        )
    )
    assert result.code == 0, result
    config = load_config(out)
    assert (config.name, config.license) == ("kitchen", "MIT")
    source = open_source(root, config)
    action = source.action_map.to_unified(np.array([1, 0, -1, 90, 0, 0, -1, 1.0]))
    np.testing.assert_allclose(action[[39, 41, 42, 10]], [0.02 * HZ, -0.02 * HZ, np.pi / 2 * HZ, 1], rtol=1e-6)
    assert source.action_map.mask.sum() == 7 and (config.action[-1].drop, config.action[-1].scale) == (1, 1.0)
    state = source.state_map.to_unified(np.array([500, 0, 0, 0, 0, np.pi / 2, 0.25]))
    np.testing.assert_allclose(state[[30, 10, 33, 34, 35]], [0.5, 0.25, 0, 1, 0], atol=1e-6)
    assert source.state_map.rotation_slots.sum() == 6


def test_add_keeps_to_what_fields_say(dvla: Dvla, tmp_path: Path) -> None:
    """An absolute position in a displacement action keeps its unit; a rotation given with its form is not asked for."""
    root = write_dataset(tmp_path / "d", action=9, state=("lever",), robot='new"\nembodiment: bimanual')
    out = tmp_path / "o.yaml"
    result = dvla(
        *argv(
            f"add {root} --out {out} --embodiment gripper_eef --action-kind delta --delta-scale 0.5,1 "
            "--position-unit cm --gripper 1,0 "
            "--field action.0-8=eef_pos_z,eef_vel_x,rotation:quat_xyzw:left_eef_angle,left_gripper_open,drop:2 "
            "--field state.0=drop"
        )
    )
    assert result.code == 0, result
    config = load_config(out)
    assert [s.width for s in config.action] == [1, 1, 4, 1, 2] and config.embodiment == "gripper_eef"
    unified = open_source(root, config).action_map.to_unified(np.array([50, 1, 0, 0, 0, 1, 0.5, 9, 9.0]))
    np.testing.assert_allclose(unified[[32, 39, 83, 87, 60]], [0.5, 0.5 * HZ, 1, 1, 0.5], atol=1e-6)


def test_add_says_what_is_missing(dvla: Dvla, tmp_path: Path) -> None:
    """Off a terminal each missing option is named, with what is proposed for it; no file appears."""
    root, out = (
        write_dataset(tmp_path / "d", action=HAND, state=("motor_0", "motor_1"), robot="new"),
        tmp_path / "o.yaml",
    )
    refused(
        dvla("add", root, "--out", out),
        "--action-kind: ",
        "--embodiment gripper_eef (proposed); ",
        "--gripper 1,0 (proposed)",
        "--field state.0-1=…: ",
        "(--yes takes what is proposed)",
    )
    known = argv(
        f"add {root} --out {out} --embodiment gripper_eef --action-kind absolute --position-unit m --gripper 1,0"
    )
    refused(dvla(*known, "--rotation", "axis_angle"), "--field state.0-1=…: meaning of motor_0 … motor_1")
    assert dvla(*known, "--rotation", "axis_angle", "--field", "state.0-1=eef_pos_z,drop").code == 0
    assert any(line.endswith('# "motor_0", by --field') for line in entries(out))
    assert load_config(out).state_columns == ("observation.state",)


@pytest.mark.parametrize(
    "options, words",
    [
        (
            ("--embodiment", "griper_eef"),
            ("--embodiment: unknown embodiment 'griper_eef'", "did you mean 'gripper_eef'"),
        ),
        (("--action-kind", "sideways"), ("unknown kind of action 'sideways'",)),
        (("--position-unit", "inch"), ("--position-unit: 'inch' is no number and none of m, cm, mm",)),
        (("--position-unit", "0"), ("a unit of 0",)),
        (("--gripper", "1"), ("--gripper: '1': give two values",)),
        (("--gripper", "1,1"), ("open and closed are the same number",)),
        (("--rotation", "euler_zyx"), ("did you mean 'euler_xyz'",)),
        (("--field", "action.6=gripper_opne"), ("unknown action field 'gripper_opne'", "did you mean 'gripper_open'")),
        (("--field", "action.6-7=drop"), ("the action has dimensions 0 to 6",)),
        (("--field", "action.3-5=rotation:quat_xyzw"), ("describes 4 dimensions, but action.3-5 has 3",)),
        (("--field", "action.6=drop", "--field", "action.6=drop"), ("action.6 is given twice",)),
        (("--field", "6=drop"), ("expected e.g. action.6=gripper_open",)),
        (("--field", "action.0=eef_pos_y"), ("fill 'eef_pos_y'",)),
        (("--action-column", "actoin"), ("unknown column 'actoin'", "did you mean 'action'")),
        (("--out", "config.txt"), ("a dataset config is a .yaml file",)),
    ],
)
def test_add_refusals(
    dvla: Dvla, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    root = write_dataset(tmp_path / "d", action=HAND, state=HAND, robot="new")
    given = {
        "--embodiment": "gripper_eef",
        "--action-kind": "absolute",
        "--position-unit": "m",
        "--gripper": "1,0",
        "--rotation": "euler_xyz",
    }
    given.pop(options[0], None)
    refused(dvla("add", root, *(x for pair in given.items() for x in pair), *options), *words)
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_add_of_another_format(dvla: Dvla, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    refused(dvla("add", tmp_path / "x"), "holds none of the formats that can be read")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_add_asks_on_a_terminal(dvla: Dvla, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One question after another, a wrong answer asked again; the result is that of the same answers as options."""
    root = write_dataset(
        tmp_path / "d", action=("joint_0", "motor", "gripper"), state=("joint_0", "motor", "gripper"), robot="new"
    )
    answers = ["absolute", "bimanul", "bimanual", "arm_joint_1_po", "arm_joint_1_pos", "arm_joint_1_pos", "deg", "2,0"]
    monkeypatch.setattr(sys, "stdin", Terminal("".join(a + "\n" for a in answers)))
    asked = dvla("add", root, "--out", tmp_path / "asked.yaml")
    assert asked.code == 0, asked
    assert (
        len(asked.err.splitlines()) == 2
        and "did you mean 'bimanual'" in asked.err
        and "did you mean 'arm_joint_1_pos'" in asked.err
    )
    given = dvla(
        *argv(
            f"add {root} --out {tmp_path / 'given.yaml'} --embodiment bimanual --action-kind absolute "
            "--joint-unit deg --gripper 2,0 --field action.1=arm_joint_1_pos --field state.1=arm_joint_1_pos"
        )
    )
    assert given.code == 0 and (tmp_path / "given.yaml").read_text() == (tmp_path / "asked.yaml").read_text()
    monkeypatch.setattr(sys, "stdin", Terminal("absolute\nbimanual\n"))
    assert dvla("add", root, "--out", tmp_path / "half.yaml").code == 130 and not (tmp_path / "half.yaml").exists()


def test_every_embodiment_can_be_chosen(dvla: Dvla, tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d", action=SO100, state=SO100, robot="so100")
    for name in EMBODIMENTS:
        out = tmp_path / f"{name}.yaml"
        assert (
            dvla(
                *argv(
                    f"add {root} --out {out} --embodiment {name} --action-kind absolute --joint-unit percent "
                    "--gripper 100,0"
                )
            ).code
            == 0
        )
        assert yaml.safe_load(out.read_text())["embodiment"] == name
    shutil.rmtree(root)
