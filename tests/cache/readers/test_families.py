"""The shipped dataset configs: each fits its data, means what the facts say, and loses nothing on the way and back.

Round trips are to 1e-6, relative where a number is above 1: unified vectors and native ones are float32, so a number
comes back with an error of 1.2e-7 times its size, plus 6e-8 of offset / scale.
"""

from __future__ import annotations

import fnmatch
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dvla.cache.actions.action_map import ActionMap
from dvla.cache.actions.rotations import from_rot6d, to_rot6d
from dvla.cache.actions.slots import EMBODIMENTS
from dvla.cache.readers.config import FORMATS, DatasetConfig
from dvla.cache.readers.search import config_names, load_config
from dvla.errors import UserError
from support.family import family_of
from support.repository import ROOT

NAMES = config_names()
FAMILIES = tuple(n for n in NAMES if "/" not in n)
SPAN = 2 * np.pi  # rad, rad/s, m, m/s: no slot of these families goes beyond ±2π


def width(specs) -> int:
    return sum(s.width for s in specs)


# --- round trips ---


def valid_rows(mapping: ActionMap, rng: np.random.Generator, rows: int) -> np.ndarray:
    """Random native vectors [rows, d], each number within its unit's range and often at its end; rotations up to π."""
    parts = []
    for spec in mapping.specs:
        if spec.rotation:
            axis, angle = rng.normal(size=(rows, 3)), rng.uniform(0, np.pi, (rows, 1))
            angle = np.where(rng.random((rows, 1)) < 0.3, rng.choice([0, 1e-6, np.pi - 1e-3], (rows, 1)), angle)
            if spec.rotation == "euler_xyz":
                parts.append(rng.uniform([-np.pi, -1.5, -np.pi], [np.pi, 1.5, np.pi], (rows, 3)))
            else:
                six = to_rot6d("axis_angle", axis / np.linalg.norm(axis, axis=1, keepdims=True) * angle)
                parts.append(from_rot6d(spec.rotation, six))
        elif spec.drop:
            parts.append(np.full((rows, spec.drop), spec.fill))
        else:
            low = np.array([0.0 if n.endswith("gripper_open") else -SPAN for n in spec.names])
            high = np.where(low == 0, 1.0, SPAN)
            unified = rng.uniform(low, high, (rows, spec.width))
            ends = np.where(rng.random(unified.shape) < 0.5, low, high)
            unified = np.where(rng.random(unified.shape) < 0.2, ends, unified)
            parts.append((unified / (mapping.control_hz if spec.delta else 1.0) - spec.offset) / spec.scale)
    return np.concatenate(parts, axis=1).astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", ["action", "state"])
def test_native_unified_native(name, part):
    config = load_config(name)
    mapping = ActionMap(getattr(config, part), config.control_hz or 15.0)

    @given(st.integers(0, 2**32 - 1), st.sampled_from([1, 1, 4]))
    @settings(max_examples=25, deadline=None)
    def check(seed, rows):
        native = valid_rows(mapping, np.random.default_rng(seed), rows)
        mapping.check(native)
        unified = mapping.to_unified(native)
        assert unified.dtype == np.float32 and (unified[:, ~mapping.mask] == 0).all()
        back, start = mapping.to_native(unified), 0
        for spec in mapping.specs:
            span = slice(start, start := start + spec.width)
            allowed = 1e-6 * np.maximum(1, np.abs(native[:, span]))
            if spec.rotation:
                before, after = (to_rot6d(spec.rotation, x[:, span]) for x in (native, back))
                np.testing.assert_allclose(after, before, atol=1e-6)
                if spec.rotation == "euler_xyz":  # its numbers are worth 1 / cos(pitch) of the rotation's
                    allowed = allowed / np.cos(native[:, span][:, 1:2])
            assert (np.abs(back[:, span] - native[:, span]) <= allowed).all(), (spec, native[:, span], back[:, span])

    if mapping.native_dim:
        check()


@pytest.mark.parametrize("name", NAMES)
def test_description_round_trip(name):
    mapping = ActionMap(load_config(name).action, 30.0)
    again = ActionMap.from_dict(json.loads(json.dumps(mapping.to_dict())))
    assert again.specs == mapping.specs and again.to_dict() == mapping.to_dict()
    x = valid_rows(mapping, np.random.default_rng(0), 4)
    np.testing.assert_array_equal(again.to_unified(x), mapping.to_unified(x))


# --- facts ---


@pytest.fixture(scope="module")
def facts(shared_dir) -> dict[str, dict]:
    return {f["family"].split()[0]: f for f in json.loads((shared_dir / "facts" / "datasets.json").read_text())}


def hub_ids(text: str) -> list[str]:
    """ "a/x-{i:04d} (also b/y)" → a/x-0000, a/x-0049, b/y; "a/{x,y}_z" → a/x_z, a/y_z."""
    found = []
    for part in re.findall(r"[\w.-]+/[\w.{},:-]+", text):
        choices = re.search(r"\{([^}]*)\}", part)
        options = ["0000", "0049"] if choices and ":04d" in choices[1] else choices[1].split(",") if choices else [""]
        found += [part.replace(choices[0], o) for o in options] if choices else [part]
    return found


def lies_in(source: str, hub_id: str) -> bool:
    return f"{source.lower()}/".startswith(f"{hub_id.lower()}/")


def test_exactly_one_family_fits_every_hub_id_of_the_facts(facts):
    configs = [load_config(n) for n in FAMILIES]
    assert len(facts) == 13
    for family, fact in facts.items():
        ids = hub_ids(fact["hf_repo"])
        assert ids, family
        for hub_id in ids:
            listed = {s for c in configs for s in c.source if lies_in(s, hub_id)}
            for wanted in listed or {hub_id}:  # the root of a repository may hold several datasets
                name = wanted.rsplit("/", 1)[-1].lower()
                fitting = [c.name for c in configs if any(fnmatch.fnmatchcase(name, p.lower()) for p in c.match)]
                assert fitting == [family], wanted
        assert {c.name for c in configs for s in c.source if lies_in(s, ids[0])} == {family}


def test_widths_are_those_of_the_facts(facts):
    for family, fact in facts.items():
        config = load_config(family)
        if config.format != "lerobot":
            continue
        assert config.action_width == fact["action_dim"] and width(config.state) == fact["state_dim"], family
        assert len(config.views or fact["cameras"]) == len(fact["cameras"]), family
        if isinstance(fact["hz"], (int, float)):
            assert config.control_hz in (None, fact["hz"]), family
    assert load_config("cmu_stretch").control_hz == 10  # the hub's 5 is a converter's default


def test_every_embodiment_has_a_family():
    used = {load_config(n).embodiment for n in FAMILIES}
    assert used == set(EMBODIMENTS)
    assert {load_config(n).format for n in NAMES} <= set(FORMATS)


def test_every_family_says_where_it_is_from():
    for name in NAMES:
        config = load_config(name)
        assert config.license and config.note and config.sampling_weight == 1.0, name
        assert config.source or name in ("metaworld", "maniskill", "robosuite", "robosuite_two", "rlbench_panda"), (
            name
        )  # recorded here


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_in_the_table_of_the_documentation(name):
    assert re.search(rf"\n\| [^|]*`{name}`[^|]* \|", (ROOT / "docs" / "datasets.md").read_text())


# --- what the layouts of single families must get right ---


def unified(name: str, part: str, native: np.ndarray, hz: float = 10.0) -> np.ndarray:
    return ActionMap(getattr(load_config(name), part), load_config(name).control_hz or hz).to_unified(native)


def test_behavior1k_state_picks_the_documented_indices():
    state = np.arange(256.0)
    state[[189, 190, 191, 192]], state[[228, 229, 230, 231]] = (0, 0, 0, 1), (0, 0, 0, 1)
    u = unified("behavior1k", "state", state)
    for slots, columns in (
        ((50, 57), (158, 165)),
        ((0, 7), (197, 204)),
        ((80, 83), (186, 189)),
        ((30, 33), (225, 228)),
        ((95, 99), (236, 240)),
        ((100, 103), (253, 256)),
    ):
        np.testing.assert_array_equal(u[slice(*slots)], state[slice(*columns)])
    assert u[60] == 20 * 193 and u[10] == 20 * 232
    np.testing.assert_array_equal(u[[*range(83, 89), *range(33, 39)]], [1, 0, 0, 0, 1, 0] * 2)
    u = unified("behavior1k", "action", np.arange(23.0))
    for slots, columns in (((100, 103), (0, 3)), ((95, 99), (3, 7)), ((50, 57), (7, 14)), ((0, 7), (15, 22))):
        np.testing.assert_array_equal(u[slice(*slots)], np.arange(*columns))
    assert unified("behavior1k", "action", np.full(23, -1.0))[[60, 10]].tolist() == [0, 0]  # -1 is closed


def test_one_franka_not_two_and_terminate_is_no_motion():
    mapping = ActionMap(load_config("nyu_franka").action, 3.0)
    u = mapping.to_unified(np.array([*range(7), 1, 2, 3, 4, 5, 6, -1.0, 1.0]))
    assert mapping.mask.nonzero()[0].tolist() == [10, *range(15, 22), *range(39, 45)] and u[10] == 0
    np.testing.assert_allclose(u[15:22], range(7))
    np.testing.assert_allclose(u[39:45], 3.0 * np.arange(1, 7))
    assert mapping.to_native(u)[14] == 0
    stretch = ActionMap(load_config("cmu_stretch").action, 10.0)
    assert stretch.to_native(stretch.to_unified(np.ones(8))).tolist() == pytest.approx([1] * 7 + [0], abs=1e-6)


def test_dexora_left_before_right():
    u = unified("dexora", "action", np.arange(39.0))
    for slots, columns in (
        ((50, 56), (0, 6)),
        ((0, 6), (6, 12)),
        ((115, 127), (12, 24)),
        ((103, 115), (24, 36)),
        ((45, 48), (36, 39)),
    ):
        np.testing.assert_array_equal(u[slice(*slots)], np.arange(*columns))


def test_grippers_are_1_open():
    def gripper(name, part, column, value):
        specs = getattr(load_config(name), part)
        native = np.concatenate([np.full(s.width, 0.5 if s.rotation == "quat_xyzw" else 0.0) for s in specs])
        native[column] = value
        return unified(name, part, native)[10]

    for name, part, column, closed, opened in (
        ("droid", "action", 7, 1, 0),
        ("droid", "state", 7, 1, 0),
        ("bc_z", "action", 6, 0, 1),
        ("bc_z", "state", 7, 1, 0),
        ("taco_play", "action", 6, 0, 1),
        ("stanford_hydra", "action", 6, 0, 1),
        ("utaustin_mutex", "action", 6, 0, 1),
        ("nyu_franka", "action", 13, -1, 1),
        ("metaworld", "action", 3, 1, -1),
        ("aloha", "action", 13, 0, 1),
        ("behavior1k", "action", 22, -1, 1),
        ("utaustin_mutex", "state", 7, 0, 1 / 13.21),
        ("stanford_hydra", "state", 7, 0, 1 / 12.324),
    ):
        assert gripper(name, part, column, closed) == pytest.approx(0, abs=1e-6), (name, part)
        assert gripper(name, part, column, opened) == pytest.approx(1, abs=1e-6), (name, part)


def test_displacements_are_velocities_in_their_slots():
    """Full deflection per step: taco 0.02 m and 0.05 rad at 15 Hz, MUTEX 0.05 m and 1 rad at 20 Hz, the others as
    stored."""
    for name, hz, metres, radians in (
        ("taco_play", 15, 0.3, 0.75),
        ("utaustin_mutex", 20, 1, 20),
        ("bc_z", 5, 5, 5),
        ("stanford_hydra", 10, 10, 10),
        ("cmu_stretch", 10, 10, 10),
    ):
        config = load_config(name)
        u = ActionMap(config.action, config.control_hz or hz).to_unified(np.ones(config.action_width))
        np.testing.assert_allclose(u[39:45], [metres] * 3 + [radians] * 3, rtol=1e-6)


# --- by name only ---

LEGACY = {
    "bc_z": [*range(6), 10],
    "taco_play": [*range(6), 10],
    "droid": [*range(6), 10],
    "stanford_hydra": [10, *range(30, 36)],
    "utaustin_mutex": [10, *range(30, 36)],
    "cmu_stretch": [10, *range(30, 36)],
    "nyu_franka": [*range(6), 10, *range(50, 56), 60],
    "behavior1k": [*range(7), 10, *range(50, 57), 60, 100, 101, 102],
    "dexwild": [*range(30, 37), *range(103, 119)],
    "dexgraspnet": [*range(30, 37), *range(103, 119)],
    "rlbench": [10, *range(30, 37)],
}  # slots of the first description; aloha and dexora are unchanged


@pytest.mark.parametrize("name", sorted(n.removeprefix("legacy/") for n in NAMES if n.startswith("legacy/")))
def test_legacy_layouts(name):
    legacy, family = load_config(f"legacy/{name}"), load_config(name)
    mapping = ActionMap(legacy.action, 10.0)
    assert mapping.mask.nonzero()[0].tolist() == LEGACY[name] and not mapping.rotation_slots.any()
    assert legacy.name == f"legacy/{name}" and legacy.match == () and legacy.action_width == family.action_width
    for field in (
        "format",
        "source",
        "license",
        "control_hz",
        "views",
        "state",
        "action_columns",
        "state_columns",
        "action_shift",
    ):
        assert getattr(legacy, field) == getattr(family, field), field


def test_what_lies_in_a_folder_is_never_found_by_name_of_the_data():
    folders = [n for n in NAMES if "/" in n]
    assert "legacy/droid" in folders and "absolute/taco_play" in folders
    assert all(load_config(n).match == () for n in folders)
    assert family_of("lerobot", ("droid_1.0.1",)).name == "droid"
    assert load_config("legacy/droid").name == "legacy/droid"
    with pytest.raises(UserError, match="did you mean 'legacy/droid'"):
        load_config("legacy/droide")


# --- finding a config ---


@pytest.mark.parametrize(
    ("robot", "repo", "expected"),
    [
        ("Unitree_G1_Inspire", "anything", "unitree_g1_inspire"),
        ("metaworld_sawyer", "push", "metaworld"),
        ("unknown", "lerobot/aloha_sim_transfer_cube_human_image", "aloha"),
        ("unknown", "lerobot/droid_1.0.1", "droid"),
        (None, "berkeley_autolab_ur5", "bc_z"),
        ("R1Pro", "lerobot/behavior1k-task0017", "behavior1k"),
        ("airbot_dexterous", "airbot_assemble", "dexora"),
    ],
)
def test_config_detection(robot, repo, expected):
    assert family_of("lerobot", (robot, repo)).name == expected


def test_config_errors(tmp_path):
    with pytest.raises(UserError, match="no dataset config fits y or x; run `dvla data add SOURCE`"):
        family_of("lerobot", ("y", "x"))
    with pytest.raises(UserError, match="did you mean 'metaworld'"):
        load_config("metawrld")
    path = tmp_path / "mine.yaml"
    path.write_text("match: [a]\nembodiment: bimanul\naction: [{field: gripper_open}]\nstate: []\n")
    with pytest.raises(UserError, match="mine.yaml: .*did you mean 'bimanual'"):
        load_config(path)
    path.write_text(path.read_text().replace("bimanul", "bimanual").replace("gripper_open", "gripper_opn"))
    with pytest.raises(UserError, match="mine.yaml: .*did you mean 'gripper_open'"):
        load_config(path)
    path.write_text(path.read_text().replace("gripper_opn", "gripper_open"))
    config = load_config(path)
    assert isinstance(config, DatasetConfig) and config.name == "mine" and config.embodiment_id == 2
