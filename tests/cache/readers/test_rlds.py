"""The RLDS / TFRecord reader: what was written comes back, other layouts are survived or named, the real sample
decodes."""

import dataclasses
import io
import json
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects
from PIL import Image

from dvla.cache.readers import detect_format, open_source
from dvla.cache.readers.episode import CorruptEpisode
from dvla.cache.readers.search import load_config
from dvla.errors import UserError
from support.family import family_of
from support.rlds_samples import (
    EPISODES,
    RT1_WIDTHS,
    VIEWS,
    fields,
    hashes,
    shard,
    toy_config,
    toy_values,
    write_rt1,
    write_toy,
)

# --- what was written ----------------------------------------------------------------------------------------------


def test_every_episode_comes_back(toy):
    source = open_source(toy, toy_config())
    assert source.name == "toy" and source.view_names == tuple(VIEWS) and source.episode_ids == tuple(range(EPISODES))
    assert source.control_hz == source.fps == 4.0
    for number in source.episode_ids:
        episode, expected = source.load(number), toy_values(number)
        length = len(expected["is_first"])
        assert episode.length == source.length_of(number) == length
        move, grip, stop = (expected[f"action/{n}"] for n in ("move", "grip", "stop"))
        np.testing.assert_array_equal(episode.action, np.column_stack([move, grip, stop]).astype(np.float32))
        pose = expected["observation/pose"].reshape(length, 4)
        np.testing.assert_array_equal(
            episode.state, np.column_stack([pose, expected["observation/packed"]]).astype(np.float32)
        )
        np.testing.assert_array_equal(episode.timestamps, np.arange(length) / 4)
        assert episode.instruction == "; ".join(dict.fromkeys(expected["language_instruction"]))
        for view in episode.views:
            kind, height, width = VIEWS[view.name]
            assert (view.height, view.width) == (height, width)
            for got, written in zip(view.frames(), expected[f"observation/{view.name}"], strict=True):
                assert got.dtype == np.uint8 and got.shape == (height, width, 3)
                difference = np.abs(got.astype(int) - written)
                assert difference.max() == 0 if kind == "png" else difference.mean() < 8


def test_parts_of_a_view_equal_the_whole_also_in_threads(toy):
    source = open_source(toy, toy_config())
    view = source.load(2).views[1]
    whole = list(view.frames())
    parts = [(a, b) for a in range(view.length) for b in range(a, view.length + 1)]
    with ThreadPoolExecutor(4) as pool:
        for (a, b), frames in zip(parts, pool.map(lambda p: list(view.frames(*p)), parts), strict=True):
            assert len(frames) == b - a and all(np.array_equal(x, y) for x, y in zip(frames, whole[a:b]))


def test_hashes_tell_episodes_apart_and_follow_the_bytes(toy, tmp_path):
    first = hashes(open_source(toy, toy_config()))
    assert len(set(first.values())) == EPISODES
    other = write_toy(tmp_path, change={4: lambda f: f["steps/observation/wrist"].reverse()})
    second = hashes(open_source(other, toy_config()))
    assert [n for n in first if first[n] != second[n]] == [4]


@pytest.mark.parametrize(
    ("views", "expected"),
    [(None, ("front", "wrist")), (("wrist",), ("wrist",)), (("observation/wrist", "front"), ("wrist", "front"))],
)
def test_views_are_chosen_by_short_or_full_name(toy, views, expected):
    source = open_source(toy, toy_config(views=views))
    assert source.view_names == expected == tuple(v.name for v in source.load(0).views)


def test_instruction_falls_back_to_the_config(tmp_path):
    blank = {1: lambda f: f.update({"steps/language_instruction": [b" "] * 5})}
    source = open_source(write_toy(tmp_path, change=blank), toy_config(instruction="do it"))
    assert source.load(1).instruction == "do it" and source.load(0).instruction != "do it"


# --- folders, splits, descriptions ---------------------------------------------------------------------------------


def test_a_folder_above_the_version_gives_the_highest(tmp_path):
    for version in ("9.0.0", "10.0.0"):
        write_toy(tmp_path, version=version)
    (tmp_path / "toy" / "11.0.0.incomplete7").mkdir()
    shutil.copy(tmp_path / "toy/9.0.0/features.json", tmp_path / "toy/11.0.0.incomplete7")
    shutil.copy(tmp_path / "toy/9.0.0/dataset_info.json", tmp_path / "toy/11.0.0.incomplete7")
    for given in (tmp_path, tmp_path / "toy", tmp_path / "toy/10.0.0"):
        assert detect_format(given) == "rlds"
        assert open_source(given, toy_config()).path == tmp_path / "toy/10.0.0"
    assert open_source(tmp_path / "toy/9.0.0", toy_config()).path.name == "9.0.0"
    write_toy(tmp_path, name="other")
    with pytest.raises(UserError, match=r"3 RLDS datasets; give one of them: other/1.0.0, toy/10.0.0, toy/9.0.0"):
        open_source(tmp_path, toy_config())


@pytest.mark.parametrize("template", [None, "{SPLIT}/{DATASET}.{FILEFORMAT}-{SHARD_INDEX}-{NUM_SHARDS}"])
def test_other_file_templates(tmp_path, toy, template):
    source = open_source(write_toy(tmp_path, template=template), toy_config())
    assert hashes(source) == hashes(open_source(toy, toy_config()))


def test_empty_shards_and_splits_take_no_number(tmp_path, toy):
    folder = write_toy(tmp_path, splits={"none": (), "train": (0, 3, 0, 0, 2), "empty": (0,), "val": (2, 0)})
    assert hashes(open_source(folder, toy_config())) == hashes(open_source(toy, toy_config()))


def test_a_hub_dataset_fetches_a_shard_when_it_is_needed(toy, tmp_path, monkeypatch):
    """The hub replaced by a folder: opening takes the two JSON files of each version, loading the episode's shard."""
    repo, fetched = toy.parents[1], []

    def snapshot(name, revision, patterns):
        names = [p.relative_to(repo).as_posix() for p in repo.rglob("*") if p.is_file()]
        for name in filter_repo_objects(names, allow_patterns=patterns):
            take(None, None, name, None)
        return tmp_path / "0a1b2c"

    def take(name, commit, relative, where):
        fetched.append(relative)
        (tmp_path / "0a1b2c" / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(repo / relative, tmp_path / "0a1b2c" / relative)

    monkeypatch.setattr("dvla.cache.readers.location.snapshot", snapshot)
    monkeypatch.setattr("dvla.cache.readers.location._fetch", take)
    for given in ("someone/data/toy/1.0.0", "someone/data/toy", "someone/data@v1"):
        fetched.clear()
        shutil.rmtree(tmp_path / "0a1b2c", ignore_errors=True)
        source = open_source(given, toy_config())
        assert sorted(fetched) == ["toy/1.0.0/dataset_info.json", "toy/1.0.0/features.json"]
        assert source.load(5).source_hash == open_source(toy, toy_config()).load(5).source_hash
        assert fetched[2:] == ["toy/1.0.0/toy-val.tfrecord-00000-of-00001"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"action_columns": ("action/mov",)}, "unknown column 'action/mov'; did you mean 'action/move'"),
        ({"action_columns": ("action",)}, "unknown column 'action'"),
        ({"state_columns": ("observation/waypoints",)}, "unknown column 'observation/waypoints'"),
        (
            {"state_columns": ("observation/open_end",)},
            "'observation/open_end' is float32 .None. with encoding 'none', which cannot",
        ),
        ({"action_columns": ("action/move",)}, "'action/move' has 3 dimensions, dataset config 't' describes 6"),
        ({"views": ("fornt",)}, "unknown view 'fornt'; did you mean 'front'"),
        ({"views": ("front_depth",)}, "unknown view 'front_depth'"),
        ({"views": ("range",)}, "unknown view 'range'"),
        ({"control_hz": None}, "add control_hz to dataset config 't'"),
    ],
)
def test_a_config_that_does_not_fit_is_one_line(toy, changes, message):
    with pytest.raises(UserError, match=message):
        open_source(toy, toy_config(**changes))


def test_revision_follows_the_description(toy_copy):
    before = open_source(toy_copy, toy_config()).revision_hash
    shard(toy_copy).unlink()
    assert open_source(toy_copy, toy_config()).revision_hash == before
    (toy_copy / "features.json").write_text((toy_copy / "features.json").read_text() + " ")
    assert open_source(toy_copy, toy_config()).revision_hash != before


# --- shipped configs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("bridge_dataset", "bridge_v2"),
        ("bridge_orig", "bridge_v2"),
        ("bridge", "bridge_v2"),
        ("bridge_data_v2", "bridge_v2"),
        ("fractal20220817_data", "rt1"),
        ("rt_1", "rt1"),
        ("RT-1", "rt1"),
        ("rt1", "rt1"),
        ("rt_1_paper_release", "rt1"),
    ],
)
def test_folder_names_find_their_family(name, family):
    assert family_of("rlds", ["1.0.0", name]).name == family


@pytest.mark.parametrize("family", ["bridge_v2", "rt1"])
def test_shipped_configs_are_complete(family):
    config = load_config(family)
    assert config.control_hz and config.source and config.license == "CC-BY-4.0" and config.note and config.views


def test_rt1_layout_opens_with_the_shipped_config(tmp_path):
    """Files made to the catalog's layout: every number lands in its slot with its unit and sign, and comes back."""
    folder, written = write_rt1(tmp_path)
    source = open_source(folder.parent)
    assert source.config.name == "rt1" and source.control_hz == 3 and source.view_names == ("image",)
    for number, values in enumerate(written):
        episode = source.load(number)
        assert episode.instruction == "pick coke can"
        np.testing.assert_array_equal(episode.action, np.hstack([values[p] for p in list(RT1_WIDTHS)[:5]]))
        np.testing.assert_array_equal(episode.state, np.hstack([values[p] for p in list(RT1_WIDTHS)[5:]]))
        action, state = source.action_map.to_unified(episode.action), source.state_map.to_unified(episode.state)
        np.testing.assert_allclose(action[:, 39:45], 3 * episode.action[:, :6], rtol=1e-6)
        np.testing.assert_allclose(action[:, 25], -3 * episode.action[:, 6], rtol=1e-6)
        np.testing.assert_allclose(action[:, 100:103], 3 * episode.action[:, 7:], rtol=1e-6)
        np.testing.assert_allclose(state[:, 10], 1 - episode.state[:, 7], atol=1e-6)
        np.testing.assert_allclose(source.action_map.to_native(action), episode.action, atol=1e-6)
        np.testing.assert_allclose(source.state_map.to_native(state), episode.state, atol=1e-6)


def test_the_old_copy_of_bridge_is_refused_by_name(tmp_path):
    folder, _ = write_rt1(tmp_path, "bridge")
    with pytest.raises(UserError, match="bridge: unknown view 'image_0'; .*see `views` of its dataset config"):
        open_source(folder)


# --- the real sample -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bridge(shared_dir):
    path = shared_dir / "data" / "octo_bridge_debug_rlds"
    if not path.is_dir():
        pytest.skip("no real Bridge sample beside the repository")
    return path


def test_real_bridge(bridge):
    """NOTICE: 25 + 25 episodes of 10 steps, 7-d actions and states, four JPEG cameras, language."""
    features = json.loads((bridge / "1.0.0/features.json").read_text())
    steps = features["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]
    shape = steps["observation"]["featuresDict"]["features"]["image_0"]["image"]["shape"]["dimensions"]
    source = open_source(bridge, dataclasses.replace(load_config("bridge_v2"), views=("image_0", "image_1", "image_2")))
    assert len(source.episode_ids) == 50 and source.control_hz == 5 and source.name == "bridge_dataset"
    actions, states, texts = [], [], set()
    for number in source.episode_ids:
        episode = source.load(number)
        assert episode.length == source.length_of(number) == 10
        assert episode.action.shape == episode.state.shape == (10, 7) and episode.instruction
        for view in episode.views:
            frames = np.stack(list(view.frames()))
            assert list(map(str, frames.shape[1:])) == shape and len(frames) == 10 and frames.std() > 20
        actions.append(episode.action)
        states.append(episode.state)
        texts.add(episode.instruction)
    assert "put carrot on plate" in texts and len(texts) == 4
    action, state = np.stack(actions), np.stack(states)
    # units and signs: what is commanded is what the hand then does, at about its size; the limits of the robot hold
    moved, asked = np.diff(state, axis=1)[..., :6].reshape(-1, 6), action[:, :-1, :6].reshape(-1, 6)
    for d in range(6):
        assert np.corrcoef(asked[:, d], moved[:, d])[0, 1] > 0.7
        assert 0.6 < np.polyfit(asked[:, d], moved[:, d], 1)[0] < 1.1
    assert np.abs(action[..., :3]).max() <= 0.05 and np.abs(action[..., 3:6]).max() <= 0.26
    assert action[..., 6].min() >= 0 and action[..., 6].max() <= 1 and np.abs(action[:, 0, :6]).max() < 1e-6
    open_now, before = action[:, :-2, 6].ravel(), state[:, 2:, 6].ravel()
    assert np.corrcoef(open_now, before)[0, 1] > 0.7  # the gripper follows its command with the same sign
    unified = source.action_map.to_unified(action)
    np.testing.assert_allclose(unified[..., 39:42], action[..., :3] * 5, rtol=1e-5)
    np.testing.assert_allclose(source.action_map.to_native(unified), action, atol=1e-6)
    np.testing.assert_allclose(source.state_map.to_native(source.state_map.to_unified(state)), state, atol=1e-6)


def test_real_bridge_against_an_independent_parse(bridge):
    """The second record of the second split, unpacked by hand, equals episode 26."""
    data = next((bridge / "1.0.0").glob("*-val.tfrecord-*")).read_bytes()
    (first,) = struct.unpack_from("<Q", data)
    (size,) = struct.unpack_from("<Q", data, first + 16)
    record = data[first + 28 : first + 28 + size]
    found = {}
    for _, entry in fields(dict(fields(record))[1]):
        parts = dict(fields(entry))
        kind, content = next(iter(fields(parts[2])))
        found[parts[1].decode()] = (kind, [v for _, v in fields(content)])
    episode = open_source(bridge).load(26)
    for path, got in (("action", episode.action), ("observation/state", episode.state)):
        kind, (packed,) = found[f"steps/{path}"]
        assert kind == 2
        np.testing.assert_array_equal(np.frombuffer(packed, "<f4").reshape(10, 7), got)
    kind, texts = found["steps/language_instruction"]
    assert kind == 1 and {t.decode() for t in texts} == {episode.instruction}
    _, pictures = found["steps/observation/image_0"]
    for encoded_picture, got in zip(pictures, episode.views[0].frames(), strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encoded_picture))), got)


def test_real_bridge_has_no_wrist_camera(bridge):
    """Every has_image flag of the sample is false, but only image_3 is black: that one is refused, the others are
    kept."""
    source = open_source(bridge, dataclasses.replace(load_config("bridge_v2"), views=("image_0", "image_3")))
    for number in source.episode_ids:
        with pytest.raises(
            CorruptEpisode, match="view 'image_3' was not recorded .episode_metadata/has_image_3 is false"
        ):
            source.load(number)
    assert open_source(bridge).view_names == ("image_0",)
