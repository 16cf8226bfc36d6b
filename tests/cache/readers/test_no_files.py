"""A pipe, socket, device, folder or link in the place of a file of a dataset: never waited for, one line or one
episode."""

import os
import signal
import stat

import h5py
import pytest

from dvla.cache.readers import open_source
from dvla.cache.readers.archive import open_archive
from dvla.cache.readers.config import UNMAPPED
from dvla.errors import Failed, UserError
from support import hdf5_samples, lerobot_written, rlbench_samples
from support.dex_samples import write_dexgraspnet

PLACES = {
    "a pipe": os.mkfifo,
    "a socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a folder": lambda path: path.mkdir(),
}


@pytest.fixture(autouse=True)
def no_waiting():
    def late(*_):
        raise AssertionError("waited for a pipe")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def in_place(path, what):
    path.unlink()
    PLACES[what](path)


def outcome(root):
    """Why the dataset is refused, or the reasons of the episodes that are, and the number of the others."""
    try:
        source = open_source(root)
    except UserError as error:
        assert "\n" not in str(error)
        return str(error), [], 0
    found = [source.attempt(lambda e: [list(v.frames()) for v in source.load(e).views], e) for e in source.episode_ids]
    reasons = [f.reason for f in found if isinstance(f, Failed)]
    return "", reasons, len(found) - len(reasons)


SAMPLES = {
    "v2": lambda root: lerobot_written.write_v2(root / "x"),
    "v3": lambda root: lerobot_written.write_v3(root / "x"),
    "robomimic": lambda root: hdf5_samples.write_robomimic(root / "x" / "image.hdf5").parent,
    "episodes": lambda root: hdf5_samples.write_episode_folder(root / "x"),
    "buffer": lambda root: hdf5_samples.write_replay_buffer(root / "x") or root / "x",
    "rlbench": lambda root: (
        rlbench_samples.write_task(root / "rlbench", "close_jar", 2) and root / "rlbench" / "close_jar"
    ),
    "grasps": lambda root: write_dexgraspnet(root / "x", (0, 1), views=2, size=(96, 54), grasps=2) or root / "x",
}
CASES = [
    ("v2", "meta/info.json", 0),
    ("v2", "meta/tasks.jsonl", 0),
    ("v2", "meta/episodes.jsonl", 0),
    ("v2", "data/chunk-000/episode_000001.parquet", 2),
    ("v3", "meta/tasks.parquet", 0),
    ("v3", "meta/episodes/chunk-000/file-000.parquet", 0),
    ("v3", "data/chunk-000/file-000.parquet", 0),
    ("robomimic", "image.hdf5", 0),
    ("episodes", "ep_000001.hdf5", None),
    ("buffer", "data/action/.zarray", 0),
    ("buffer", "data/action/0.0", None),
    ("buffer", "meta/episode_ends/.zarray", 0),
    ("rlbench", "all_variations/episodes/episode0/low_dim_obs.pkl", 1),
    ("rlbench", "all_variations/episodes/episode0/front_rgb/0.png", 1),
    ("grasps", "scenes/scene_0000/realsense/camera_poses.npy", None),
    ("grasps", "scenes/scene_0000/realsense/depth_gt/0000.png", None),
    ("grasps", "dex_grasps_new/scene_0000/leap_hand/005.npz", None),
]


@pytest.mark.parametrize("what", ["a pipe", "a link to itself"])
@pytest.mark.parametrize(("sample", "file", "left"), CASES)
def test_no_file_is_waited_for(tmp_path, sample, file, left, what):
    root = SAMPLES[sample](tmp_path)
    in_place(root / file, what)
    refused, reasons, good = outcome(root)
    assert refused or reasons, good
    assert left in (None, good), (refused, reasons)


@pytest.mark.parametrize("what", PLACES)
def test_one_image_of_an_episode_names_what_it_is(tmp_path, what):
    root = SAMPLES["rlbench"](tmp_path)
    in_place(root / "all_variations/episodes/episode0/front_rgb/0.png", what)
    _, reasons, good = outcome(root)
    assert len(reasons) == good == 1 and (what.split()[1] in reasons[0] or "link" in what or "image" in reasons[0])


@pytest.mark.parametrize("what", ["a pipe", "a socket", "a device"])
def test_the_dataset_itself(tmp_path, what):
    PLACES[what](tmp_path / "data")
    with pytest.raises(UserError, match=f"data is {what}; give a dataset folder or file"):
        open_source(tmp_path / "data")


@pytest.mark.parametrize("given", ["x" * 5000, "~nobody-of-this-name/data"])
def test_a_path_that_cannot_be_looked_at(given):
    with pytest.raises(UserError, match="cannot be opened"):
        open_source(given)


def test_a_link_to_a_folder_around_it_is_followed_nowhere(tmp_path):
    root = SAMPLES["rlbench"](tmp_path)
    (root / "all_variations" / "again").symlink_to("..")
    assert len(open_source(root).episode_ids) == 2
    assert open_archive(root / "all_variations").entries() == ("again", "episodes/")
    (tmp_path / "rlbench_2").mkdir()
    (tmp_path / "rlbench_2" / "close_jar").symlink_to(root)
    assert len(open_source(tmp_path / "rlbench_2" / "close_jar").episode_ids) == 2


@pytest.mark.parametrize("form", ["a link", "values"])
def test_other_files_that_an_hdf5_file_names_are_not_opened(tmp_path, form):
    """As a link to one, or as where the values of a dataset are."""
    path = hdf5_samples.write_robomimic(tmp_path / "image.hdf5")
    os.mkfifo(tmp_path / "pipe")
    with h5py.File(path, "a") as file:
        for name in ("more",) if form == "a link" else ("obs/more_image", "more"):
            for demo in file["data"].values():
                if form == "a link":
                    demo[name] = h5py.ExternalLink("pipe", "/")
                else:
                    demo.create_dataset(name, (4,), "S4", external=[(str(tmp_path / "pipe"), 0, 16)])
    source = open_source(path, unmapped=True)
    assert not [e for e in source.episode_ids if isinstance(source.attempt(source.load, e), Failed)]
    assert source.notes() == () and [source.success_of(e) for e in source.episode_ids] == [None] * 3
    assert all(open_source(path, UNMAPPED).columns_of(e) for e in source.episode_ids)
