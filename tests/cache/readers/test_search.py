"""Where a dataset config is looked for: beside the data, in the current folder, registered, shipped; the nearest
wins."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from dvla.cache.readers import open_source
from dvla.cache.readers.search import NoConfig, load_config, registered_folder
from dvla.errors import UserError
from support.robot_samples import ramp, write_robot

NAMES = ["lever", "knob"]
VALUES = ramp([(0.0, 1.0), (5.0, 6.0)])


def config(scale: float, match: str = "bench", **entries: str) -> str:
    more = "".join(f"{key}: {value}\n" for key, value in entries.items())
    vector = f"[{{fields: [arm_joint_0_pos, arm_joint_1_pos], scale: {scale}}}]"
    return f"match: [{match}]\nembodiment: gripper_joint\n{more}action: {vector}\nstate: {vector}\n"


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset that no shipped config describes; the current folder is another one."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return write_robot(tmp_path / "data/bench", "toaster", NAMES, VALUES)


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def scale_of(root: Path, config: str | None = None) -> tuple[float, str]:
    found = open_source(root, config).config
    return found.action[0].scale, found.origin


def test_the_nearest_config_wins(bench: Path) -> None:
    with pytest.raises(NoConfig, match=f"no dataset config fits bench or toaster; run `dvla data add {bench}`"):
        open_source(bench)
    registered = put(registered_folder() / "mine.yaml", config(2))
    assert scale_of(bench) == (2, str(registered)) and scale_of(bench, "mine") == (2, str(registered))
    here = put(Path("bench.yaml"), config(3))
    assert scale_of(bench) == (3, str(here))
    inside = put(bench / "meta/dvla.yaml", config(4, match="nothing"))
    assert scale_of(bench) == (4, str(inside))
    beside = put(bench / "dvla.yaml", config(5))
    assert scale_of(bench) == (5, str(beside)) and open_source(bench).config.name == "bench"
    given = put(Path("other.txt.yaml"), config(6))
    assert scale_of(bench, str(given)) == (6, str(given)) and scale_of(bench, "mine")[0] == 2


def test_by_robot_type_and_before_what_is_shipped(bench: Path, tmp_path: Path) -> None:
    put(registered_folder() / "toast.yaml", config(2, match="toaster"))
    assert scale_of(bench)[0] == 2
    robot = write_robot(tmp_path / "cubes", "so100", 6, ramp([(-120.0, 110.0)] * 5 + [(0.0, 100.0)]))
    assert open_source(robot).config.name == "so100"
    six = config(3, match="so100").replace("[arm_joint_0_pos, arm_joint_1_pos]", '["arm_joint_{0..5}_pos"]')
    put(registered_folder() / "ours.yaml", six)
    assert open_source(robot).config.name == "ours"
    assert open_source(robot, "so100").config.name == "so100"


def test_a_config_of_another_width_does_not_stand_in_the_way(tmp_path: Path) -> None:
    put(registered_folder() / "two.yaml", config(2, match="so100"))
    robot = write_robot(tmp_path / "cubes", "so100", 6, ramp([(-120.0, 110.0)] * 5 + [(0.0, 100.0)]))
    assert open_source(robot).config.name == "so100"


def test_two_that_fit_are_named(bench: Path) -> None:
    for name in ("one", "two"):
        put(registered_folder() / f"{name}.yaml", config(2))
    with pytest.raises(
        NoConfig, match="2 dataset configs fit bench or toaster: one, two; choose one with --dataset-co"
    ):
        open_source(bench)
    assert open_source(bench, "two").config.name == "two"


def test_other_files_are_left_alone(bench: Path) -> None:
    """A recipe, a damaged file, one of another dataset, a huge one: none is a config of this dataset."""
    put(Path("recipe.yaml"), "optimizer: {lr: 1e-3}\n")
    put(Path("bench.yml"), "not: [a\n")
    put(Path("latin.yaml"), "").write_bytes(config(2, match="elsewhere").encode() + b"note: caf\xe9\n")
    put(Path("big.yaml"), config(2) + "# " + "x" * (1 << 18))
    put(registered_folder() / "broken.yaml", config(2, match="elsewhere").replace("arm_joint_0_pos", "arm_joint_0_po"))
    with pytest.raises(NoConfig, match="no dataset config fits"):
        open_source(bench)


def test_a_config_that_fits_and_cannot_be_used_is_named(bench: Path) -> None:
    wrong = config(2).replace("arm_joint_0_pos", "arm_joint_0_po")
    path = put(registered_folder() / "mine.yaml", wrong)
    with pytest.raises(UserError, match="mine.yaml: .*did you mean 'arm_joint_0_pos'"):
        open_source(bench)
    path.write_bytes(config(2).encode() + b"note: caf\xe9\n")
    with pytest.raises(UserError, match="mine.yaml is not valid YAML"):
        open_source(bench, "mine")
    path.unlink()
    put(bench / "dvla.yaml", config(2, format="rlds"))
    with pytest.raises(UserError, match="dvla.yaml is for rlds files, these are lerobot"):
        open_source(bench)


def test_beside_a_file(demos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    shutil.copy(demos, folder / "toast.hdf5")
    shipped = load_config("robomimic")
    text = (Path(shipped.origin)).read_text().replace("match: [lift", "name: ours\nmatch: [lift")
    put(folder / "toast.yaml", text)
    assert open_source(folder / "toast.hdf5").config.name == "ours"


def test_its_place_is_no_part_of_what_is_built(bench: Path) -> None:
    """Neither the file nor its place changes the dataset's revision or what a cache stores of the config."""
    before = open_source(bench, unmapped=True).revision_hash
    put(bench / "meta/dvla.yaml", config(2))
    assert open_source(bench).revision_hash == before
    one = open_source(bench).config
    two = open_source(bench, str(put(Path("bench.yaml"), config(2)))).config
    assert one.document() == two.document() and one.origin != two.origin


def test_no_map_maps_nothing(bench: Path) -> None:
    source = open_source(bench, unmapped=True)
    assert not source.config.mapped and "no dataset config fits" in str(source.problem)
    assert not source.action_map.mask.any() and source.config.action_columns == ("action",)
    np.testing.assert_array_equal(source.load(1).action, VALUES)
    assert source.dimension_names(("action",)) == NAMES
