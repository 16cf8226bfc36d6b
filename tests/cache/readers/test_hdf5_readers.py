"""Episode-HDF5 and robomimic HDF5: values, images, ids; damage gives one clear line and loses nothing else."""

import json
import shutil

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dvla.cache.actions.action_map import ActionMap, FieldSpec
from dvla.cache.actions.rotations import to_rot6d
from dvla.cache.actions.slots import EMBODIMENTS, SLOTS
from dvla.cache.readers import hdf5, open_source
from dvla.cache.readers.config import DatasetConfig
from dvla.cache.readers.episode import CorruptEpisode
from dvla.cache.readers.episode_hdf5 import EpisodeHDF5Source, field_map
from dvla.cache.readers.images import hdf5 as image_files
from dvla.cache.readers.images.arrays import BYTES
from dvla.cache.readers.robomimic import RobomimicSource
from dvla.cache.readers.search import config_names, load_config
from dvla.errors import Failed, UserError
from support.hdf5_samples import (
    ARM,
    CAN,
    HZ,
    IN_BODY_PARTS,
    LENGTHS,
    OSC_POSE,
    QUATERNION,
    edit,
    exchange,
    frames,
    outside,
    pictures,
    serve,
    values,
    write_episode_file,
    write_episode_folder,
    write_robomimic,
)

NAMED = sorted(set(SLOTS.values()))


# --- the field map of masks ------------------------------------------------------------------------------------------


@given(
    st.sets(st.sampled_from(NAMED), min_size=1).map(lambda s: s | ({*range(33, 39)} if 33 in s else set())),
    st.integers(0, 2**32 - 1),
)
def test_field_map_carries_any_slots_unchanged(slots, seed):
    """Whatever the mask, native is the compact vector and comes back in its slots, bit for bit."""
    slots, rng = sorted(slots), np.random.default_rng(seed)
    expected = np.zeros((3, 128), np.float32)
    expected[:, slots] = rng.normal(size=(3, len(slots)))
    for first in (33, 83):
        if set(range(first, first + 6)) <= set(slots):  # then it is a rotation
            expected[:, first : first + 6] = to_rot6d("axis_angle", rng.normal(size=(3, 3)))
    mapping, native = ActionMap(field_map(slots), 20.0), expected[:, slots]
    assert mapping.native_dim == len(slots) and np.flatnonzero(mapping.mask).tolist() == slots
    assert np.array_equal(mapping.to_unified(native), expected)


def test_field_map_knows_whole_rotations():
    whole = field_map([30, 31, 32, *range(33, 39), 60, *range(83, 89)])
    assert [(s.rotation, s.prefix) for s in whole if s.rotation] == [
        ("rot6d", "eef_angle"),
        ("rot6d", "left_eef_angle"),
    ]
    assert field_map(ARM) == (FieldSpec(fields=(*(f"arm_joint_{i}_pos" for i in range(6)), "gripper_open")),)
    assert field_map(QUATERNION)[1] == FieldSpec(fields=tuple(f"eef_angle_{i}" for i in range(4)), legacy=True)
    with pytest.raises(UserError, match="slot 127 is active but has no name"):
        field_map([0, 127])


@pytest.mark.parametrize("name", config_names())
def test_every_family_can_be_exported(name):
    for specs in (load_config(name).action, load_config(name).state):
        mask = ActionMap(specs, 10.0).mask
        assert np.array_equal(ActionMap(field_map(np.flatnonzero(mask).tolist()), 10.0).mask, mask)


# --- Episode-HDF5, as described --------------------------------------------------------------------------------------


def test_layout_as_described(episode_folder):
    source = open_source(episode_folder)
    assert isinstance(source, EpisodeHDF5Source) and source.name == "sample" and source.episode_ids == (0, 1, 2)
    assert source.control_hz == HZ and source.view_names == ("view_0", "view_1")
    assert source.config.embodiment == EMBODIMENTS[1] and "no proprio_mask" in source.config.note
    for number, length in enumerate(LENGTHS):
        episode = source.load(number)
        assert (episode.length, episode.instruction) == (length, f"task {number}")
        assert (source.length_of(number), source.instruction_of(number)) == (length, f"task {number}")
        assert np.array_equal(episode.action, values(number, length, len(ARM)))
        assert np.array_equal(episode.state, episode.action)
        assert np.array_equal(source.action_map.to_unified(episode.action)[:, ARM], episode.action)
        assert np.array_equal(frames(episode.views[1]), pictures(number + 1, length, 4, 4))
        assert np.array_equal(frames(episode.views[0], 2, 4), pictures(number, length)[2:4])
        assert np.allclose(episode.timestamps, np.arange(length) / HZ)


def test_legacy_quaternion_in_rotation_slots(tmp_path):
    source = open_source(
        write_episode_folder(tmp_path / "old", slots=QUATERNION, proprio_slots=QUATERNION, embodiment_id=3)
    )
    for mapping in (source.action_map, source.state_map):
        assert np.flatnonzero(mapping.mask).tolist() == list(QUATERNION) and not mapping.rotation_slots.any()
    assert np.array_equal(source.load(1).action, values(1, LENGTHS[1], 7))


def test_proprio_slots_come_from_several_episodes(tmp_path):
    """A joint that rests at 0 in the first episode is still there."""
    folder = write_episode_folder(tmp_path / "sample")
    with h5py.File(folder / "ep_000000.hdf5", "r+") as file:
        file["proprio"][:, 3] = 0
    source = open_source(folder)
    assert np.flatnonzero(source.state_map.mask).tolist() == list(ARM)
    assert (source.load(0).state[:, 3] == 0).all()


def test_no_proprio_is_no_state(tmp_path):
    source = open_source(write_episode_folder(tmp_path / "sample", proprio_slots=()))
    assert source.config.state == () and source.load(0).state.shape == (LENGTHS[0], 0)


def test_rate_must_come_from_somewhere(tmp_path):
    folder = write_episode_folder(tmp_path / "sample", control_hz=None)
    with pytest.raises(UserError, match="do not give the number of rows per second.*control_hz"):
        open_source(folder)
    config = DatasetConfig(
        name="mine",
        match=(),
        format="episode_hdf5",
        embodiment="gripper_eef",
        control_hz=7.0,
        action=field_map(ARM),
        state=field_map(ARM),
        action_columns=("actions",),
        state_columns=("proprio",),
    )
    source = open_source(folder, config)
    assert (source.control_hz, source.config.embodiment) == (7.0, "gripper_eef")
    assert np.allclose(source.load(0).timestamps[:3], np.arange(3) / 7)


def test_a_config_that_does_not_fit(episode_folder):
    def config(**changes):
        return DatasetConfig(
            **{
                "name": "mine",
                "match": (),
                "format": "episode_hdf5",
                "embodiment": "gripper_joint",
                "state": (),
                "action": field_map(ARM),
                "action_columns": ("actions",),
                **changes,
            }
        )

    with pytest.raises(UserError, match="'actions' has 7 dimensions, dataset config 'mine' describes 6"):
        open_source(episode_folder, config(action=field_map(ARM[:6])))
    with pytest.raises(UserError, match="unknown column 'action'; did you mean 'actions'"):
        open_source(episode_folder, config(action_columns=("action",)))
    with pytest.raises(UserError, match="unknown view 'view_3'; did you mean 'view_"):
        open_source(episode_folder, config(views=("view_3",)))


EPISODE_DAMAGE = {  # name: (change to ep_000001.hdf5, message)
    "actions missing": (lambda f: f.pop("actions"), "'actions' is missing"),
    "language missing": (lambda f: f.pop("language"), "'language' is missing"),
    "view missing": (lambda f: f.pop("images/view_1"), r"images holds \['view_0'\], n_views says 2"),
    "no embodiment": (lambda f: f.attrs.pop("embodiment_id"), "attribute embodiment_id is missing"),
    "impossible embodiment": (lambda f: f.attrs.update(embodiment_id=9), "embodiment_id is 9, allowed are 0 to 6"),
    "another dataset": (
        lambda f: f.attrs.update(dataset_name="other"),
        "its dataset_name is other, the dataset's sample",
    ),
    "another mask": (
        lambda f: f["action_mask"].__setitem__(11, True),
        "its action_mask is .*keep one dataset per folder",
    ),
    "another rate": (lambda f: f.attrs.update(control_hz=21.0), "its control_hz is 21.0, the dataset's 20.0"),
    "value outside the mask": (
        lambda f: f["actions"].__setitem__((2, 40), 1.5),
        "'actions' is 1.5 at frame 2 in slot 40, which is not",
    ),
    "NaN action": (
        lambda f: f["actions"].__setitem__((3, 1), np.nan),
        "column 'actions' is nan at frame 3, dimension 1",
    ),
    "rows missing": (
        exchange("actions", np.zeros((3, 128), np.float32)),
        "'actions' has 3 rows, episode_length says 5",
    ),
    "proprio shorter": (exchange("proprio", np.zeros((3, 128), np.float32)), "5 rows of action, 3 of state"),
    "too narrow": (exchange("actions", np.zeros((5, 64), np.float32)), r"'actions' is \[5, 64\], expected \[T, 128\]"),
    "too few images": (exchange("images/view_0", pictures(0, 4)), "4 images of 'view_0' for 5 rows"),
    "images of floats": (
        exchange("images/view_0", np.zeros((5, 4, 4, 3))),
        r"is float64 \[5, 4, 4, 3\], images are uint8",
    ),
    "text for numbers": (exchange("actions", np.array([b"a", b"b"])), "'actions' is not numeric"),
    "link into another file": (
        outside("actions", ("/etc/passwd", "actions")),
        r"link into another file \(/etc/passwd\)",
    ),
    "link to nowhere": (
        lambda f: (f.pop("actions"), f.__setitem__("actions", h5py.SoftLink("/nowhere"))),
        "'actions' is missing",
    ),
    "link in a circle": (
        lambda f: (f.pop("actions"), f.__setitem__("actions", h5py.SoftLink("/actions"))),
        "leads in a circle",
    ),
    "group for a table": (
        lambda f: (f.pop("actions"), f.create_group("actions")),
        "'actions' is a group, not a dataset",
    ),
}


@pytest.mark.parametrize("name", EPISODE_DAMAGE)
def test_damaged_episode_is_one_clear_line(episode_folder, name):
    change, message = EPISODE_DAMAGE[name]
    before = {n: open_source(episode_folder).load(n).source_hash for n in (0, 2)}
    edit(episode_folder / "ep_000001.hdf5", change)
    source = open_source(episode_folder)
    with pytest.raises(CorruptEpisode, match=message) as caught:
        source.load(1)
    assert str(caught.value).startswith("sample episode 1") and "\n" not in str(caught.value)
    assert {n: source.load(n).source_hash for n in (0, 2)} == before


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("data", [b"", b"not a file of this kind" * 50, "half"])
def test_file_that_is_no_hdf5(episode_folder, data, first):
    path = episode_folder / f"ep_00000{0 if first else 1}.hdf5"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if data == "half" else data)
    source = open_source(episode_folder)
    with pytest.raises(CorruptEpisode, match=f"{path.name} cannot be read as HDF5"):
        source.load(0 if first else 1)
    assert source.load(2).length == LENGTHS[2]


def test_an_odd_first_file_does_not_speak_for_the_others(episode_folder):
    before = {n: open_source(episode_folder).load(n).source_hash for n in (1, 2)}
    edit(episode_folder / "ep_000000.hdf5", lambda f: f.attrs.update(embodiment_id=2))
    source = open_source(episode_folder)
    assert {n: source.load(n).source_hash for n in (1, 2)} == before
    with pytest.raises(CorruptEpisode, match="its embodiment_id is 2, the dataset's 1"):
        source.load(0)


def test_no_file_can_be_read(episode_folder):
    for path in episode_folder.iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(UserError, match="none of the 3 ep_.*can be read: ep_000000.hdf5: .*cannot be read as HDF5"):
        open_source(episode_folder)


def test_values_kept_in_other_files_are_refused(episode_folder, tmp_path):
    """A virtual dataset, and one with external storage, can name any file of the reader's machine."""
    (tmp_path / "secret").write_bytes(bytes(range(256)) * 20)
    layout = h5py.VirtualLayout((LENGTHS[1], 128), np.float32)
    layout[:] = h5py.VirtualSource(tmp_path / "elsewhere.hdf5", "x", (LENGTHS[1], 128))
    for change in (
        lambda f: (f.pop("actions"), f.create_virtual_dataset("actions", layout)),
        exchange("actions", None, shape=(LENGTHS[1], 128), dtype="f4", external=[(str(tmp_path / "secret"), 0, 2560)]),
    ):
        edit(episode_folder / "ep_000001.hdf5", change)
        with pytest.raises(CorruptEpisode, match="values of 'actions' are in other files"):
            open_source(episode_folder).load(1)


@pytest.mark.parametrize("how", [{"chunks": (1, 4, 4, 3)}, {}])
def test_pictures_never_written_are_refused(episode_folder, how):
    """HDF5 would show them black."""

    def change(file):
        del file["images/view_1"]
        array = file.create_dataset("images/view_1", (5, 4, 4, 3), np.uint8, **how)
        if how:
            array[:3] = 7

    edit(episode_folder / "ep_000001.hdf5", change)
    with pytest.raises(CorruptEpisode, match="2 of 5 chunks of .*never written" if how else "were never written"):
        open_source(episode_folder).load(1)


def test_unknown_compression_is_named(tmp_path):
    path = tmp_path / "x.hdf5"
    with h5py.File(path, "w") as file:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((4,))
        plist.set_filter(32001, h5py.h5z.FLAG_OPTIONAL, (0,))  # blosc; optional, so that it can be written without
        h5py.h5d.create(file.id, b"x", h5py.h5t.NATIVE_FLOAT, h5py.h5s.create_simple((4,)), plist)
        file["x"][:] = 1
    with (
        h5py.File(path) as file,
        pytest.raises(UserError, match="e: 'x' is compressed with .*(filter 32001|blosc).*h5repack"),
    ):
        hdf5.find_array(file, "x", "e")


def test_another_layout_is_named(tmp_path):
    """As ACT and ALOHA write it."""
    with h5py.File(tmp_path / "episode_0.hdf5", "w") as file:
        file["observations/qpos"] = file["action"] = np.zeros((5, 14))
    for place in (tmp_path, tmp_path / "episode_0.hdf5"):
        with pytest.raises(UserError, match="episode_0.hdf5 has another layout than .* such as ALOHA's, to LeRobot"):
            open_source(place)


def test_two_files_of_one_number(episode_folder):
    shutil.copy(episode_folder / "ep_000001.hdf5", episode_folder / "ep_1.hdf5")
    with pytest.raises(UserError, match="ep_000001.hdf5 and ep_1.hdf5 are both episode 1"):
        open_source(episode_folder)


def test_soft_links_inside_a_file_are_followed(episode_folder):
    before = open_source(episode_folder).load(1)
    edit(
        episode_folder / "ep_000001.hdf5",
        lambda f: (f.move("images", "store/images"), f.__setitem__("images", h5py.SoftLink("/store/images"))),
    )
    assert open_source(episode_folder).load(1).source_hash == before.source_hash


# --- robomimic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("controller", [OSC_POSE, IN_BODY_PARTS, None])
def test_robomimic(tmp_path, controller):
    path = write_robomimic(tmp_path / "can" / "image.hdf5", controller=controller)
    source = open_source(path)
    assert (
        isinstance(source, RobomimicSource)
        and source.config.name == "robomimic"
        and source.name == "PickPlaceCan_image"
    )
    assert (
        source.episode_ids == (0, 2, 10)
        and source.view_names == ("agentview", "robot0_eye_in_hand")
        and source.control_hz == HZ
    )
    assert open_source(path.parent).revision_hash == source.revision_hash
    episode = source.load(10)
    with h5py.File(path) as file:
        demo = file["data/demo_10"]
        native = demo["actions"][()]
        assert (
            np.array_equal(episode.action, native.astype(np.float32))
            and source.length_of(10) == len(native) == LENGTHS[2]
        )
        state = np.concatenate(
            [demo[f"obs/{k}"] for k in ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")], axis=1
        )
        assert np.array_equal(episode.state, state.astype(np.float32))
        assert np.array_equal(frames(episode.views[1], 3, 8), demo["obs/robot0_eye_in_hand_image"][3:8])
    unified = source.action_map.to_unified(episode.action)
    assert np.allclose(unified[:, 39:42], native[:, :3] * 0.05 * HZ) and np.allclose(
        unified[:, 42:45], native[:, 3:6] * 0.5 * HZ
    )
    assert np.allclose(source.action_map.to_unified([0] * 6 + [-1])[10], 1) and np.allclose(
        source.action_map.to_unified([0] * 6 + [1])[10], 0
    )
    state = source.state_map.to_unified(episode.state)
    assert np.allclose(state[:, 10], episode.state[:, 7] * 25) and (state[:, 10] <= 1).all()
    assert np.abs(source.action_map.to_native(unified) - episode.action).max() <= 1e-6


def test_robomimic_task_texts(demos):
    edit(demos, lambda f: f["data/demo_2"].attrs.update(ep_meta=json.dumps({"lang": "pick the can"})))
    edit(
        demos,
        lambda f: f["data"].attrs.update(problem_info=json.dumps({"language_instruction": list('"put it down"')})),
    )
    source = open_source(demos, CAN)
    assert [source.instruction_of(n) for n in source.episode_ids] == ["put it down", "pick the can", "put it down"]
    assert source.load(2).instruction == "pick the can"


def test_robomimic_refuses_what_its_config_does_not_say(tmp_path):
    def opened(name, **how):
        return open_source(write_robomimic(tmp_path / name / "image.hdf5", **how), None if name == "f" else CAN)

    with pytest.raises(UserError, match="has no camera, only low-dimensional.*dataset_states_to_obs.py"):
        opened("a", images=False)
    with pytest.raises(UserError, match="do not give the number of rows.*control_hz"):
        opened("b", control_freq=None)
    with pytest.raises(UserError, match="moves by .0.1, .*at full action, dataset config 'robomimic' scales by .0.05"):
        wide = [0.1, 0.1, 0.1, 0.5, 0.5, 0.5]
        opened("c", controller={**OSC_POSE, "output_max": wide, "output_min": [-v for v in wide]})
    with pytest.raises(UserError, match="moves by .0.1, .*at full action"):  # half of the input is the same movement
        opened("c2", controller={**OSC_POSE, "input_max": 0.5, "input_min": -0.5})
    with pytest.raises(
        UserError, match="OSC_POSE actions are absolute poses, dataset config 'robomimic' describes displacements"
    ):
        opened("d", controller={**OSC_POSE, "control_delta": False})
    with pytest.raises(UserError, match="OSC_POSE actions are absolute poses"):
        opened(
            "d2", controller={"type": "BASIC", "body_parts": {"right": {"type": "OSC_POSE", "input_type": "absolute"}}}
        )
    with pytest.raises(UserError, match="its controller is JOINT_VELOCITY"):
        opened("e", controller={"type": "JOINT_VELOCITY"})
    with pytest.raises(UserError, match="no dataset config fits twoarmtransport or image; run `dvla data add "):
        opened("f", env_name="TwoArmTransport")
    path = write_robomimic(tmp_path / "g" / "image.hdf5")
    for number in (0, 2, 10):
        edit(path, exchange(f"data/demo_{number}/actions", np.zeros((5, 14))))
    with pytest.raises(UserError, match="'actions' has 14 dimensions, dataset config 'robomimic' describes 7"):
        open_source(path, CAN)
    edit(path, lambda f: f["data"].attrs.update(env_args="{"))
    with pytest.raises(UserError, match="attribute env_args is not JSON"):
        open_source(path, CAN)
    write_robomimic(tmp_path / "g" / "low_dim.hdf5", images=False)
    with pytest.raises(UserError, match="holds 2 HDF5 files .image.hdf5, low_dim.hdf5.; give one of them"):
        open_source(tmp_path / "g")


ROBOMIMIC_DAMAGE = {  # name: (change, message about demo 2)
    "actions missing": (lambda f: f["data/demo_2"].pop("actions"), "'actions' is missing"),
    "demo missing": (lambda f: f["data/demo_2"].pop("obs"), "'obs/robot0_eef_pos' is missing"),
    "image missing": (lambda f: f["data/demo_2/obs"].pop("agentview_image"), "agentview_image' is missing"),
    "NaN action": (
        lambda f: f["data/demo_2/actions"].__setitem__((4, 6), np.nan),
        "column 'actions' is nan at frame 4, dimension 6",
    ),
    "another num_samples": (
        lambda f: f["data/demo_2"].attrs.update(num_samples=6),
        "'actions' has 5 rows, num_samples says 6",
    ),
    "state shorter": (
        exchange("data/demo_2/obs/robot0_eef_pos", np.zeros((4, 3))),
        "columns differ in length .*eef_pos 4",
    ),
    "action narrower": (
        exchange("data/demo_2/actions", np.zeros((5, 6))),
        "its action has 6 dimensions, dataset config 'robomimic' describes 7",
    ),
    "quaternion of zeros": (
        exchange("data/demo_2/obs/robot0_eef_quat", np.zeros((5, 4))),
        "is not a rotation as quat_xyzw",
    ),
    "too many images": (
        exchange("data/demo_2/obs/agentview_image", pictures(0, 6)),
        "6 images of 'agentview' for 5 rows",
    ),
    "grey images": (exchange("data/demo_2/obs/agentview_image", pictures(0, 5)[..., :2]), "images are uint8"),
    "link into another file": (
        outside("data/demo_2/obs/agentview_image", ("other.hdf5", "x")),
        r"link into another file \(other.hdf5\)",
    ),
    "demo in another file": (
        outside("data/demo_2", ("other.hdf5", "data/demo_2")),
        r"link into another file \(other.hdf5\)",
    ),
    "no JSON": (lambda f: f["data/demo_2"].attrs.update(ep_meta="{lang"), "attribute ep_meta is not JSON"),
}


@pytest.mark.parametrize("name", ROBOMIMIC_DAMAGE)
def test_damaged_demo_is_one_clear_line(demos, name):
    change, message = ROBOMIMIC_DAMAGE[name]
    before = {n: open_source(demos, CAN).load(n).source_hash for n in (0, 10)}
    edit(demos, change)
    source = open_source(demos, CAN)
    with pytest.raises(CorruptEpisode, match=message) as caught:
        source.load(2)
    assert str(caught.value).startswith("PickPlaceCan_image episode 2: ") and "\n" not in str(caught.value)
    assert {n: source.load(n).source_hash for n in (0, 10)} == before


def test_damaged_first_demo_loses_nothing_else(demos):
    edit(demos, lambda f: f["data/demo_0"].pop("actions"))
    assert open_source(demos, CAN).load(2).length == LENGTHS[1]


@pytest.mark.parametrize("damage", ["half", "garbage", "no demo"])
def test_damaged_file_is_one_clear_line(demos, damage):
    if damage in ("half", "garbage"):
        demos.write_bytes(demos.read_bytes()[: demos.stat().st_size // 2] if damage == "half" else b"no HDF5" * 99)
    else:
        edit(demos, lambda f: [f["data"].pop(n) for n in list(f["data"])])
    message = {
        "half": "image.hdf5 cannot be read as HDF5",
        "garbage": "image.hdf5 cannot be read as HDF5",
        "no demo": "data holds nothing",
    }[damage]
    with pytest.raises(UserError, match=message):
        open_source(demos, CAN)
    if damage in ("half", "garbage"):
        with pytest.raises(UserError, match=message):
            open_source(demos)


def test_pictures_are_decoded_chunk_by_chunk(tmp_path, monkeypatch):
    """However the chunks lie, any span of frames is right, and no block ends inside a chunk."""
    path, whole = tmp_path / "x.hdf5", pictures(0, 23)
    for chunks in ((1, 6, 8, 3), (4, 6, 8, 3), (7, 3, 5, 2), (23, 6, 8, 3), None):
        with h5py.File(path, "w") as file:
            file.create_dataset("a/x", data=whole, chunks=chunks)
        for nbytes in (1, 1000, 8 << 20):
            monkeypatch.setattr(image_files, "_BLOCK_NBYTES", nbytes)
            for start, stop in ((0, 23), (3, 4), (5, 17), (22, 23)):
                read = np.stack(list(image_files.read_images(path, "a/x", (6, 8), BYTES, "e", start, stop)))
                assert np.array_equal(read, whole[start:stop])
                with h5py.File(path) as file:
                    ends = [last for _, last in image_files._blocks(file["a/x"], start, stop)]
                    assert ends[-1] == stop and all(last % (chunks or (1,))[0] == 0 for last in ends[:-1])


def test_single_file_is_a_source_of_one_episode(episode_folder):
    write_episode_file(episode_folder / "ep_000007.hdf5", 7, 4, control_hz=5.0)
    source = open_source(episode_folder / "ep_000007.hdf5")
    assert source.episode_ids == (7,) and source.load(7).length == 4 and source.control_hz == 5
    assert len(source.revision_hash) == 64


def test_rotation_slots_that_hold_no_rotation(tmp_path):
    """Six active slots of a rotation are 6D; anything else there would be a wrong frame."""
    folder = write_episode_folder(tmp_path / "sample", slots=(*ARM, *range(33, 39)))
    with pytest.raises(CorruptEpisode, match="sample episode 1: .*is not a rotation as rot6d"):
        open_source(folder).load(1)


def test_files_on_the_hub_are_fetched_when_needed(tmp_path, monkeypatch):
    remote = tmp_path / "remote"
    write_episode_folder(remote / "mine")
    write_robomimic(remote / "can" / "ph" / "image_v15.hdf5")
    write_robomimic(remote / "can" / "ph" / "low_dim_v15.hdf5", images=False)
    asked = serve(monkeypatch, remote, tmp_path / "0123abcd")
    source = open_source("owner/name/mine")
    assert source.name == "mine" and source.episode_ids == (0, 1, 2)
    assert source.load(2).length == LENGTHS[2] and len(source.revision_hash) == 64
    asked.clear()
    with pytest.raises(
        UserError,
        match="owner/name/can/ph holds 2 HDF5 files .*give one of them, e.g. owner/name/can/ph/low_dim_v15.hdf5",
    ):
        open_source("owner/name/can/ph")
    source = open_source("owner/name/can/ph/image_v15.hdf5@v1.5", CAN)
    assert (
        asked == ["can/ph/image_v15.hdf5"]
        and source.name == "PickPlaceCan_image_v15"
        and source.load(10).length == LENGTHS[2]
    )
    with pytest.raises(UserError, match="other.hdf5"):
        open_source("owner/name/can/ph/other.hdf5", CAN)
    with pytest.raises(UserError, match="no/such.hdf5 does not exist|holds no HDF5"):
        open_source("no/such.hdf5", CAN)


def test_one_odd_value_does_not_make_a_slot_of_the_state(episode_folder):
    """Without a proprio_mask the values say which slots are used: one of them, in a rotation, cost every episode."""

    def spoil(file):
        file["proprio"][2, 33] = 0.7

    edit(episode_folder / "ep_000001.hdf5", spoil)
    source = open_source(episode_folder)
    found = [source.attempt(source.load, number) for number in source.episode_ids]
    assert [isinstance(each, Failed) for each in found] == [False, True, False]
    assert "in slot 33, which is not active" in found[1].reason


def test_an_episode_with_values_in_slots_that_mean_nothing_costs_itself(episode_folder):
    """Its values, in slots without a name, said which slots of the state are used: the dataset was refused."""

    def spoil(file):
        file["proprio"][:, 40:60] = 1e3

    edit(episode_folder / "ep_000001.hdf5", spoil)
    source = open_source(episode_folder)
    assert [isinstance(source.attempt(source.load, n), Failed) for n in source.episode_ids] == [False, True, False]
