"""Images of HDF5 files and Zarr buffers in every form they are kept in: right, or refused with the reason."""

import io

import h5py
import numpy as np
import pytest
import zarr
from PIL import Image

from dvla.cache.actions.action_map import FieldSpec
from dvla.cache.readers import open_source
from dvla.cache.readers.config import DatasetConfig
from dvla.cache.readers.episode import CorruptEpisode
from support.hdf5_samples import CAN, LENGTHS, edit, pictures, write_replay_buffer, write_robomimic

DEMOS = dict(zip((0, 2, 10), LENGTHS, strict=True))
PLAIN = DatasetConfig(
    name="t",
    match=(),
    format="replay_buffer",
    embodiment="gripper_delta_eef",
    control_hz=10,
    action=(FieldSpec(drop=2),),
    state=(),
)


def images(number, length):
    return pictures(number, length, 16, 24)


def gray(rgb):
    return rgb.mean(3, keepdims=True).astype(np.uint8)


def files(rgb, kind="PNG", **options):
    found = []
    for image in rgb:
        file = io.BytesIO()
        Image.fromarray(image).save(file, kind, **options)
        found.append(np.frombuffer(file.getvalue(), np.uint8))
    return found


def ragged(rgb):
    out = np.empty(len(rgb), dtype=h5py.vlen_dtype(np.uint8))
    out[:] = files(rgb)
    return out


def padded(rgb):
    found = files(rgb)
    return np.stack([np.pad(f, (0, max(map(len, found)) + 40 - len(f))) for f in found])


def opaque(rgb):
    return np.array([f.tobytes() for f in files(rgb)], dtype="S4000")


def three(rgb):
    return np.repeat(gray(rgb), 3, 3)


FORMS = {  # how a camera is stored → and what it shows
    "gray": (gray, three),
    "gray without an axis": (lambda rgb: gray(rgb)[..., 0], three),
    "channels first": (lambda rgb: rgb.transpose(0, 3, 1, 2), lambda rgb: rgb),
    "rgba": (lambda rgb: np.concatenate([rgb, np.full_like(gray(rgb), 255)], 3), lambda rgb: rgb),
    "to 1": (lambda rgb: (rgb / 255).astype(np.float32), lambda rgb: rgb),
    "to 255": (lambda rgb: rgb.astype(np.float64), lambda rgb: rgb),
    "signed": (lambda rgb: (rgb / 127.5 - 1).astype(np.float32), lambda rgb: rgb),
    "16 bits": (lambda rgb: rgb.astype(np.uint16) * 257, lambda rgb: rgb),
}
ENCODED = {"ragged": ragged, "padded": padded, "opaque": opaque}


def robomimic(tmp_path, store, key="agentview_image", only=None):
    path = write_robomimic(tmp_path / "can" / "image.hdf5")

    def change(file):
        for number, length in DEMOS.items():
            if only in (None, number):
                obs = file[f"data/demo_{number}/obs"]
                if key in obs:
                    del obs[key]
                data = store(images(number, length))
                obs.create_dataset(key, data=data, dtype=data.dtype)

    edit(path, change)
    return path


@pytest.mark.parametrize("form", [*FORMS, *ENCODED])
def test_robomimic(tmp_path, form):
    store, shown = FORMS.get(form) or (ENCODED[form], lambda rgb: rgb)
    source = open_source(robomimic(tmp_path, store), CAN)
    assert source.view_names == ("agentview", "robot0_eye_in_hand")
    for number, length in DEMOS.items():
        view = source.load(number).views[0]
        wanted = shown(images(number, length))
        assert (view.height, view.width, view.length) == (16, 24, length)
        assert np.array_equal(np.stack(list(view.frames())), wanted)
        assert np.array_equal(np.stack(list(view.frames(1, 3))), wanted[1:3])


def test_a_demo_of_another_type_is_not_scaled_like_the_others(tmp_path):
    """Fractions up to 1 among bytes would be black."""
    path = robomimic(tmp_path, lambda rgb: np.zeros((len(rgb), 16, 24, 3), np.float32), only=2)
    source = open_source(path, CAN)
    with pytest.raises(CorruptEpisode, match=r"agentview_image' is float32 \[5, 16, 24, 3\], images are uint8"):
        source.load(2)
    assert source.load(10).length == DEMOS[10]


def test_depth_and_masks_of_robomimic_are_named(tmp_path):
    path = robomimic(tmp_path, lambda rgb: rgb[..., 0].astype(np.float32)[..., None], "agentview_depth")
    edit(
        path,
        lambda f: [
            f[f"data/demo_{n}/obs"].create_dataset("robot0_mask", data=images(n, k)[..., :1]) for n, k in DEMOS.items()
        ],
    )
    source = open_source(path, CAN)
    assert source.view_names == ("agentview", "robot0_eye_in_hand")
    texts = [n.text for n in source.notes() if n.rule == "depth-map"]
    assert texts == [
        "'agentview_depth' (float32, one channel) is a depth map or mask and not read as a camera",
        "'robot0_mask' (uint8, one channel) is a depth map or mask and not read as a camera",
    ]


def test_orientation_shows_in_size_pixels_and_hash(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    turned = files(images(2, DEMOS[2]), exif=exif)

    def change(file):
        del file["data/demo_2/obs/agentview_image"]
        stored = file.create_dataset("data/demo_2/obs/agentview_image", (len(turned),), h5py.vlen_dtype(np.uint8))
        stored[:] = turned

    path = write_robomimic(tmp_path / "can" / "image.hdf5")
    edit(path, change)
    view = open_source(path, CAN).load(2).views[0]
    wanted = images(2, DEMOS[2]).transpose(0, 2, 1, 3)[:, :, ::-1]
    assert (view.height, view.width) == (24, 16) and np.array_equal(np.stack(list(view.frames())), wanted)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_replay_buffer(tmp_path, zarr_format, form):
    zarr.config.set({"array.write_empty_chunks": True})
    store, shown = FORMS[form]
    rgb = np.concatenate([images(e, n) for e, n in enumerate(LENGTHS)])
    source = open_source(write_replay_buffer(tmp_path / "x.zarr", zarr_format=zarr_format, pixels=store(rgb)), PLAIN)
    assert source.view_names == ("img",)
    for episode, wanted in enumerate(np.split(shown(rgb), np.cumsum(LENGTHS)[:-1])):
        view = source.load(episode).views[0]
        assert (view.height, view.width) == (16, 24) and np.array_equal(np.stack(list(view.frames())), wanted)


def test_depth_of_a_replay_buffer_is_named(tmp_path):
    path = write_replay_buffer(tmp_path / "x.zarr")
    rows = sum(LENGTHS)
    group = zarr.open_group(path, mode="a")
    group.create_array("data/depth", data=np.full((rows, 16, 24), 1.5, np.float32), chunks=(4, 16, 24))
    source = open_source(path, PLAIN)
    assert source.view_names == ("img",)
    assert [n.rule for n in source.notes()] == ["depth-map"] and "'depth' (float32, one" in source.notes()[0].text
