"""DexGraspNet 2.0, on files made to its documented layout: poses in the images' frame, views of the cloud, damage in
one line."""

from __future__ import annotations

import ctypes
import dataclasses
import io
import os
import re
import shutil
import struct
import sys
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from dvla.cache.actions.slots import SLOTS
from dvla.cache.readers import detect_format, open_source
from dvla.cache.readers.dexgraspnet import render as point_render
from dvla.cache.readers.dexgraspnet.source import GRASPS_PER_OBJECT
from dvla.cache.readers.episode import CorruptEpisode
from dvla.cache.readers.search import load_config
from dvla.errors import UserError
from support.dex_samples import JOINTS, OBJECTS, balls, grasp_arrays, write_dexgraspnet

pytest.importorskip("scipy")  # writes the samples' camera matrices, as the reader reads them
GRASPS = 50
STORED = ("translation", "rotation", *JOINTS)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Two scenes with the same objects and grasps on the table, whose first cameras stand elsewhere."""
    return write_dexgraspnet(tmp_path_factory.mktemp("dexgraspnet"), scenes=(0, 7), grasps=GRASPS)


@pytest.fixture
def damaged(scenes, tmp_path):
    return shutil.copytree(scenes, tmp_path / "dexgraspnet")


@pytest.fixture
def renderer():
    pytest.importorskip("pyvista")


def first_of(scene, number):
    """Id of the first listed grasp of an object."""
    return (scene * 1000 + number) * GRASPS_PER_OBJECT


def drawn(episode):
    return {view.name: next(view.frames()) for view in episode.views}


def orange(picture):
    """Where the target is [S, S] bool."""
    red, _, blue = np.moveaxis(picture.astype(int), -1, 0)
    return red > blue + 40


# --- poses ---


def test_a_grasp_is_an_episode_of_one_frame(scenes):
    source = open_source(scenes)
    assert source.format == detect_format(scenes) == "dexgraspnet"
    assert (
        source.control_hz == 1
        and source.config.embodiment == "dex_hand"
        and source.view_names == ("front", "side", "top", "wrist")
    )
    assert source.episode_ids == tuple(
        first_of(s, n) + k for s in (0, 7) for n in OBJECTS for k in range(GRASPS_PER_OBJECT)
    )
    episode = source.load(first_of(7, 14))
    assert episode.length == source.length_of(first_of(7, 14)) == 1 and episode.state.shape == (1, 0)
    assert episode.action.shape == (1, 3 + 9 + 16) and np.array_equal(episode.timestamps, [0.0])
    assert episode.instruction == source.instruction_of(first_of(7, 14)) == "grasp the darlie box"
    assert source.instruction_of(first_of(0, 5)) == "grasp the apple"
    assert [v.length for v in episode.views] == [1] * 4 and {(v.height, v.width) for v in episode.views} == {(448, 448)}


def test_stored_poses_come_out_as_they_are_and_evenly_chosen(scenes):
    source = open_source(scenes, dataclasses.replace(load_config("dexgraspnet"), action_columns=STORED))
    with np.load(scenes / "dex_grasps_new/scene_0007/leap_hand/005.npz") as file:
        stored = {name: file[name] for name in file.files}
    chosen = [(2 * k + 1) * GRASPS // (2 * GRASPS_PER_OBJECT) for k in range(GRASPS_PER_OBJECT)]
    assert len(set(chosen)) == GRASPS_PER_OBJECT and chosen[0] > 0 and chosen[-1] < GRASPS - 1
    for k, row in enumerate(chosen):
        action = source.table(first_of(7, 5) + k).action[0]
        assert np.array_equal(
            action,
            np.concatenate(
                [stored["translation"][row], stored["rotation"][row].ravel(), [stored[j][row] for j in JOINTS]]
            ).astype(np.float32),
        )


def test_poses_are_in_the_frame_of_the_cameras_whatever_the_scene_is_seen_from(scenes):
    source, as_stored = (
        open_source(scenes),
        open_source(scenes, dataclasses.replace(load_config("dexgraspnet"), action_columns=STORED)),
    )
    for number in OBJECTS:
        on_table = grasp_arrays(number, GRASPS, np.eye(4))
        centre = (on_table["point"].min(0) + on_table["point"].max(0)) / 2
        for k in range(GRASPS_PER_OBJECT):
            row = (2 * k + 1) * GRASPS // (2 * GRASPS_PER_OBJECT)
            expected = np.concatenate([on_table["translation"][row] - centre, on_table["rotation"][row].ravel()])
            for scene in (0, 7):
                assert np.allclose(source.table(first_of(scene, number) + k).action[0, :12], expected, atol=2e-6)
        stored = [as_stored.table(first_of(scene, number)).action[0, :12] for scene in (0, 7)]
        assert np.abs(stored[0] - stored[1]).max() > 0.05


def test_wrist_and_sixteen_joints_have_their_slots_and_come_back(scenes):
    source = open_source(scenes)
    native = np.concatenate([source.table(e).action for e in source.episode_ids])
    unified = source.action_map.to_unified(native)
    assert np.array_equal(unified[:, 103:119], native[:, 12:]) and source.action_map.mask.sum() == 3 + 6 + 16
    columns = native[:, 3:12].reshape(-1, 3, 3).transpose(0, 2, 1)  # 6D: the first two columns of the matrix
    assert np.allclose(unified[:, SLOTS["eef_angle_0"] :][:, :6], columns[:, :2].reshape(-1, 6), atol=1e-6)
    assert np.abs(source.action_map.to_native(unified) - native).max() < 1e-6


def test_a_file_with_few_grasps_lists_those(tmp_path):
    write_dexgraspnet(tmp_path / "dexgraspnet", grasps=3, views=2)
    source = open_source(tmp_path / "dexgraspnet")
    assert source.episode_ids == tuple(first_of(0, n) + k for n in OBJECTS for k in range(3))
    assert len({source.table(e).action.tobytes() for e in source.episode_ids}) == 6


# --- images ---


def test_views_show_the_target_and_differ(scenes, renderer, capfd):
    source = open_source(scenes)
    for number in OBJECTS:
        pictures = drawn(source.load(first_of(0, number)))
        for name, picture in pictures.items():
            assert picture.shape == (448, 448, 3) and picture.dtype == np.uint8
            where = np.argwhere(orange(picture))
            assert len(where) > 300 and picture.std() > 5, name
            assert (where.min(0) > 0).all() and (where.max(0) < 447).all(), f"{name}: the target leaves the frame"
            if name != "wrist":  # the others look at the target frame's origin
                assert np.abs((where.min(0) + where.max(0)) / 2 - 224).max() < 40, name
        names = list(pictures)
        assert all((pictures[a] != pictures[b]).mean() > 0.05 for i, a in enumerate(names) for b in names[:i])
    assert capfd.readouterr().err == ""  # VTK tries a display first, and must not report it


def test_cameras_see_the_axes_in_which_poses_are_given(renderer):
    def spot(*at):
        points = np.array(at) + np.random.default_rng(0).uniform(-0.004, 0.004, (500, 3))
        pictures = point_render.render(points, np.full((500, 3), 10, np.uint8), 0.002)
        return {
            name: np.argwhere((p < 60).all(-1)).mean(0) - 223.5 for name, p in pictures.items()
        }  # (down, right) of the middle

    forward, left, up = spot(0.03, 0, 0), spot(0, 0.03, 0), spot(0, 0, 0.03)
    assert left["front"][1] > 30 and abs(left["front"][0]) < 3 and up["front"][0] < -20 and abs(up["front"][1]) < 3
    assert forward["side"][1] < -30 and up["side"][0] < -20
    assert forward["top"][0] > 30 and left["top"][1] > 30 and abs(forward["top"][1]) < 3
    expected = 0.03 / np.hypot(0.5, 0.3) * 224 / np.tan(np.radians(15))
    assert np.isclose(left["front"][1], expected, rtol=0.05)


def test_the_same_files_give_the_same_pictures_in_any_thread(scenes, renderer):
    first = drawn(open_source(scenes).load(first_of(0, 5)))
    source = open_source(scenes)
    with ThreadPoolExecutor(3) as pool:
        again = list(pool.map(lambda e: drawn(source.load(e)), [first_of(0, 5), first_of(7, 14), first_of(0, 5) + 1]))
    for got in (again[0], again[2]):
        assert all(np.array_equal(first[name], got[name]) for name in first)
    assert any((first[name] != again[1][name]).any() for name in first)


def test_rendering_leaves_no_window_and_costs_little(scenes, renderer):
    import pyvista

    points = np.random.default_rng(0).uniform(-0.2, 0.2, (50_000, 3))
    colors = point_render.shade(points, np.full((50_000, 3), 200))
    point_render.render(points, colors, 0.002)
    begin = time.process_time()
    pictures = [point_render.render(points, colors, 0.002) for _ in range(3)]
    assert time.process_time() - begin < 12, "four views of 50 000 points take more than 4 s of processor time"
    assert all(np.array_equal(pictures[0][n], p[n]) for p in pictures for n in p)
    assert not getattr(pyvista.plotting.plotter, "_ALL_PLOTTERS", {})


def test_pictures_are_hashed_by_what_they_are_made_of(scenes, damaged):
    def hashes(root):
        source = open_source(root)
        return [source.load(first_of(0, n)).source_hash for n in OBJECTS], [
            source.load(first_of(7, n)).source_hash for n in OBJECTS
        ]

    before = hashes(scenes)
    assert before == hashes(damaged) and len({*before[0], *before[1]}) == 4
    picture = damaged / "scenes/scene_0000/realsense/depth_gt/0001.png"
    depth = np.array(Image.open(picture))
    depth[50, 50] += 1
    Image.fromarray(depth).save(picture)
    after = hashes(damaged)
    assert after[1] == before[1] and not {*after[0]} & {*before[0]}


def test_photographs_colour_the_cloud_and_measured_depth_is_used_where_there_is_no_other(tmp_path, renderer):
    write_dexgraspnet(tmp_path / "dexgraspnet", suffix="", photographs=True)
    picture = drawn(open_source(tmp_path / "dexgraspnet").load(first_of(0, 5)))["front"]
    red, green = (picture == [180, 20, 20]).all(-1), (picture == [20, 120, 40]).all(-1)
    assert red.sum() > 300 and green.sum() > 300 and not orange(picture)[~red].any()


def test_the_networks_input_serves_where_there_is_no_depth(tmp_path, renderer):
    write_dexgraspnet(tmp_path / "dexgraspnet", network_input=True)
    assert orange(drawn(open_source(tmp_path / "dexgraspnet").load(first_of(0, 5)))["top"]).sum() > 300


def test_scenes_without_names_take_the_configs_text(damaged):
    shutil.rmtree(damaged / "scenes/scene_0000/realsense/annotations")
    source = open_source(damaged)
    assert (
        source.load(first_of(0, 5)).instruction == "grasp the object"
        and source.load(first_of(7, 5)).instruction == "grasp the apple"
    )


# --- what is not there ---


def test_rendering_without_pyvista_names_the_extra(scenes, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyvista", None)
    view = open_source(scenes).load(first_of(0, 5)).views[0]
    with pytest.raises(UserError, match=r"pip install 'dvla\[render\]'"):
        next(view.frames())


def test_without_opengl_there_is_a_message_and_no_crash(monkeypatch):
    def absent(name):
        raise OSError(name)

    monkeypatch.setenv("VTK_DEFAULT_OPENGL_WINDOW", "")
    monkeypatch.delenv("VTK_DEFAULT_OPENGL_WINDOW")
    monkeypatch.setattr(ctypes, "CDLL", absent)
    point_render._prefer_egl_without_x()
    assert os.environ["VTK_DEFAULT_OPENGL_WINDOW"] == "vtkEGLRenderWindow"
    point_render._require_opengl("vtkEGLRenderWindow")
    with pytest.raises(UserError, match="no OpenGL to render point clouds with.*apt-get install"):
        point_render._require_opengl("vtkOSOpenGLRenderWindow")


def test_archives_must_be_unpacked(tmp_path):
    (tmp_path / "dex_grasps_new.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match="has no folder dex_grasps_new.*unpack"):
        open_source(tmp_path)
    (tmp_path / "dex_grasps_new").mkdir()
    with pytest.raises(UserError, match="holds no scene_<number>/leap_hand"):
        open_source(tmp_path)
    odd = tmp_path / "dex_grasps_new/scene_0000/leap_hand/banana.npz"
    odd.parent.mkdir(parents=True)
    odd.write_bytes(b"")
    with pytest.raises(UserError, match="banana.npz: grasps are in scene_<number>/leap_hand"):
        open_source(tmp_path)


def test_other_views_are_refused_by_name(scenes):
    with pytest.raises(UserError, match="unknown view 'tops'; did you mean 'top'"):
        open_source(scenes, dataclasses.replace(load_config("dexgraspnet"), views=("tops",)))


# --- damage ---


def grasps_with(path, **changes):
    """Rewrite a grasp file: an array replaced, or left out where None."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files} | changes
    np.savez(path, **{name: values for name, values in arrays.items() if values is not None})


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def pickled(path):
    values = np.empty(GRASPS, object)
    values[:] = Evil()
    grasps_with(path, translation=values)


def promising(path):
    """A header of 80 TB."""
    table = path.parents[3] / "scenes/scene_0000/realsense/cam0_wrt_table.npy"
    np.save(table, np.eye(4))
    table.write_bytes(re.sub(rb"\(4, 4\), }.{11}", b"(10000000000000,), }", table.read_bytes()))


def bombed(path):
    """An array of 800 GB in an .npz."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (10**11,)})
    grasps_with(path)
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in {**members, "point.npy": file.getvalue()}.items():
            new.writestr(name, data)


def towering(path):
    """A header of 96 x 2^20 pixels."""
    image = path.parents[3] / "scenes/scene_0000/realsense/depth_gt/0000.png"
    head = image.read_bytes()
    size = b"IHDR" + struct.pack(">II", 96, 2**20) + head[24:29]
    image.write_bytes(head[:12] + size + struct.pack(">I", zlib.crc32(size)) + head[33:])


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: p.write_bytes(p.read_bytes()[:400]), "005.npz cannot be read"),
        (lambda p: p.write_bytes(p.read_bytes()[:-400]), "005.npz cannot be read"),
        (lambda p: p.write_bytes(b""), "005.npz cannot be read"),
        (lambda p: np.save(p.open("wb"), np.zeros(3)), "005.npz cannot be read"),
        (pickled, "005.npz cannot be read .*allow_pickle=False"),
        (lambda p: grasps_with(p, j7=None), "column 'j7' is missing"),
        (lambda p: grasps_with(p, rotation=None), "has no array 'rotation'"),
        (lambda p: grasps_with(p, point=None), "has no array 'point'"),
        (lambda p: grasps_with(p, j3=np.zeros(GRASPS - 1)), "'j3' is float64 \\[49\\] for 50 grasps"),
        (lambda p: grasps_with(p, j3=np.float64(1)), "'j3' is float64 \\[\\] for 50 grasps"),
        (lambda p: grasps_with(p, rotation=np.zeros((GRASPS, 9))), "'rotation' is float64 \\[50, 9\\] for 50 grasps"),
        (
            lambda p: grasps_with(p, translation=np.full((GRASPS, 3), "x")),
            "'translation' is <U1 \\[50, 3\\] for 50 grasps",
        ),
        (lambda p: grasps_with(p, j3=np.full(GRASPS, np.nan)), "column 'j3' is nan"),
        (lambda p: grasps_with(p, point=np.full((GRASPS, 3), np.inf)), "a 'point' is not finite"),
        (lambda p: grasps_with(p, rotation=np.zeros((GRASPS, 3, 3))), "rotation"),
        (lambda p: shutil.rmtree(p.parents[3] / "scenes/scene_0000"), "cannot be read"),
        (
            lambda p: np.save(p.parents[3] / "scenes/scene_0000/realsense/cam0_wrt_table.npy", np.eye(4) * 2),
            "not a rotation and shift",
        ),
        (
            lambda p: np.save(p.parents[3] / "scenes/scene_0000/realsense/cam0_wrt_table.npy", np.eye(3)),
            "cam0_wrt_table.npy is \\[3, 3\\]",
        ),
        (
            lambda p: np.save(p.parents[3] / "scenes/scene_0000/realsense/cam0_wrt_table.npy", np.array([Evil()])),
            "Python objects",
        ),
        (
            lambda p: shutil.copy(p, p.parents[3] / "scenes/scene_0000/realsense/cam0_wrt_table.npy"),
            "cam0_wrt_table.npy cannot be read",
        ),
        (lambda p: shutil.rmtree(p.parents[3] / "scenes/scene_0000/realsense/depth_gt"), "has neither depth"),
        (
            lambda p: (p.parents[3] / "scenes/scene_0000/realsense/camera_poses.npy").unlink(),
            "camera_poses.npy cannot be read",
        ),
        (promising, "cam0_wrt_table.npy cannot be read .*mmap length"),
        (bombed, r"005.npz cannot be read \('point.npy' claims 800,000,000,000 bytes\)"),
    ],
)
def test_a_damaged_file_is_one_line_and_costs_only_its_grasps(damaged, damage, message):
    damage(damaged / "dex_grasps_new/scene_0000/leap_hand/005.npz")
    source = open_source(damaged)
    with pytest.raises(CorruptEpisode, match=f"^dexgraspnet episode {first_of(0, 5)}: .*{message}") as error:
        source.action_map.to_unified(source.load(first_of(0, 5)).action)
    assert "\n" not in str(error.value)
    assert source.load(first_of(7, 5)).length == 1  # nothing else is lost


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda f: (f / "depth_gt/0002.png").write_bytes((f / "depth_gt/0002.png").read_bytes()[:200]),
            "depth_gt/0002.png cannot be decoded",
        ),
        (lambda f: (f / "label_gt/0002.png").write_bytes(b""), "label_gt/0002.png cannot be decoded"),
        (
            lambda f: Image.new("L", (8, 8)).save(f / "label_gt/0002.png"),
            "depth, label and photograph 0002 differ in size",
        ),
        (lambda f: Image.new("RGB", (8, 8)).save(f / "depth_gt/0002.png"), "depth_gt/0002.png is uint8 \\[8, 8, 3\\]"),
        (
            lambda f: (f / "meta/0002.mat").write_bytes((f / "meta/0002.mat").read_bytes()[:200]),
            "meta/0002.mat cannot be read",
        ),
        (
            lambda f: np.save(f / "camera_poses.npy", np.tile(np.eye(4), (2, 1, 1))),
            "depth image 0002 has none of the 2 camera poses",
        ),
        (
            lambda f: np.save(f / "camera_poses.npy", np.load(f / "camera_poses.npy") + np.array([0, 0, 0, 0.3])),
            "show no object where its points are",
        ),
        (lambda f: np.save(f / "camera_poses.npy", np.load(f / "camera_poses.npy") * 1e300), "m away"),
        (lambda f: [Image.new("I;16", (320, 180)).save(p) for p in (f / "depth_gt").glob("*.png")], "hold no point"),
    ],
)
def test_damaged_pictures_are_refused_when_a_view_is_drawn(damaged, damage, message):
    damage(damaged / "scenes/scene_0000/realsense")
    source = open_source(damaged)
    with pytest.raises(CorruptEpisode, match=f"^dexgraspnet episode {first_of(0, 5)}: .*{message}") as error:
        next(source.load(first_of(0, 5)).views[0].frames())
    assert "\n" not in str(error.value)


def test_an_annotation_that_is_a_folder_names_nothing(damaged):
    for path in (damaged / "scenes/scene_0000").rglob("annotations/*.xml"):
        path.unlink()
        path.mkdir()
    assert open_source(damaged).load(first_of(0, 5)).length


def test_grasps_of_another_scene_are_noticed(damaged):
    folder = damaged / "dex_grasps_new"
    shutil.copy(folder / "scene_0007/leap_hand/005.npz", folder / "scene_0000/leap_hand/005.npz")
    with pytest.raises(CorruptEpisode, match="not of one scene, or not in one frame"):
        next(open_source(damaged).load(first_of(0, 5)).views[0].frames())


def test_the_samples_balls_are_where_the_target_frame_says(scenes):
    """The origin of the target frame is the middle of the object, up to what the grasp points cover of it."""
    centre, radius = balls(14)[0]
    pose = open_source(scenes).table(first_of(0, 14)).action[0, :3]
    assert abs(np.linalg.norm(pose) - (radius + 0.1)) < 0.01


def test_a_huge_header_of_a_depth_image_allocates_nothing(damaged):
    towering(damaged / "dex_grasps_new/scene_0000/leap_hand/005.npz")
    episode = open_source(damaged).load(first_of(0, 5))
    with pytest.raises(CorruptEpisode, match="depth_gt/0000.png is 96x1048576 pixels"):
        list(episode.views[0].frames())
