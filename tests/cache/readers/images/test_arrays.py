"""Arrays of images: one rule for axes, channels and ranges; what is ambiguous or deep is refused or no camera."""

import numpy as np
import pytest

from dvla.cache.readers.episode import CorruptEpisode
from dvla.cache.readers.images.arrays import ArrayForm, channels_of, form_of, is_camera, left_out, range_of
from dvla.errors import UserError

RGB = np.random.default_rng(0).integers(0, 256, (5, 16, 24, 3), np.uint8)
GRAY = RGB[..., :1]


def read(array):
    form = form_of(array.shape, array.dtype, range_of(array[::2], array.dtype, "x"), "x")
    found = form.to_rgb(array, "x")
    assert found.dtype == np.uint8 and found.flags.c_contiguous and found.shape[1:3] == form.size(array.shape)
    return found


@pytest.mark.parametrize(
    "array",
    [
        RGB,
        RGB.transpose(0, 3, 1, 2),
        np.concatenate([RGB, 255 - GRAY], 3),
        np.concatenate([RGB, 255 - GRAY], 3).transpose(0, 3, 1, 2),
        RGB.astype(np.float32),
        RGB.astype(np.float64) / 255,
        (RGB / 127.5 - 1).astype(np.float32),
        (RGB / 255).astype(np.float16),
        RGB.astype(np.uint16) * 257,
        RGB.astype(np.int64),
        (RGB / 127.5 - 1).astype(np.float32).transpose(0, 3, 1, 2),
    ],
    ids=["last", "first", "rgba", "rgba first", "to 255", "to 1", "signed", "half", "16 bits", "int64", "signed first"],
)
def test_color(array):
    assert np.array_equal(read(array), RGB)


@pytest.mark.parametrize("array", [GRAY, GRAY[..., 0], GRAY.transpose(0, 3, 1, 2)], ids=["last", "none", "first"])
def test_gray(array):
    assert np.array_equal(read(array), np.repeat(GRAY, 3, 3))


def test_sixteen_bits_are_scaled_by_257():
    values = np.random.default_rng(1).integers(0, 65536, (4, 16, 16, 3)).astype(np.uint16)
    assert np.array_equal(read(values), np.rint(values / 257))


@pytest.mark.parametrize(
    "shape, dtype, channels",
    [
        ((9, 64, 64, 3), "uint8", "last"),
        ((9, 3, 64, 64), "uint8", "first"),
        ((9, 3, 64, 3), "uint8", "both"),
        ((9, 3, 3, 64), "uint8", "first"),
        ((9, 4, 4, 3), "uint8", "last"),
        ((9, 64, 64, 1), "uint8", "last"),
        ((9, 64, 64), "uint8", "none"),
        ((9, 64, 64, 1), "float32", None),
        ((9, 64, 64), "uint16", None),
        ((9, 1, 64, 64), "float32", None),
        ((9, 3, 4, 4), "float32", None),
        ((9, 2, 4, 4), "float32", None),
        ((9, 512, 3), "uint8", None),
        ((9, 64, 64, 2), "uint8", None),
        ((9, 64, 64, 3), "bool", None),
        ((9, 0, 64, 3), "uint8", None),
        ((9, 8, 4, 64, 64), "uint8", None),
    ],
)
def test_axis_of_the_channels(shape, dtype, channels):
    assert channels_of(shape, np.dtype(dtype)) == channels


def test_two_meanings_and_none_are_refused():
    with pytest.raises(CorruptEpisode, match=r"x \[9, 3, 64, 3\] has its colors first or last"):
        form_of((9, 3, 64, 3), np.dtype(np.uint8), (0, 255), "x")
    with pytest.raises(CorruptEpisode, match=r"x is float32 \[9, 64, 64\], images are uint8"):
        form_of((9, 64, 64), np.dtype(np.float32), (0, 1), "x")
    with pytest.raises(CorruptEpisode, match=r"x is 9000x64 pixels"):
        form_of((9, 64, 9000, 3), np.dtype(np.uint8), (0, 255), "x")


@pytest.mark.parametrize(
    "array, span",
    [
        (RGB / 255, (0, 1)),
        (np.concatenate([RGB[:4] * 0.0, RGB[4:] / 255]), (0, 1)),  # black at first
        (np.concatenate([RGB[:4] / 255, RGB[4:] * 1.0]), (0, 255)),  # dark at first
        (np.concatenate([RGB[:4] / 255, RGB[4:] / 127.5 - 1]), (-1, 1)),
        (np.concatenate([RGB[:4] * 1.0, RGB[4:] * np.nan]), (0, 255)),  # a glitch
        (RGB.astype(np.uint16), (0, 255)),
        (RGB.astype(np.uint16) * 257, (0, 65535)),
    ],
)
def test_range_by_the_data_as_a_whole(array, span):
    assert range_of(array, array.dtype, "x") == span


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 16, 16, 3)),
        np.ones((4, 16, 16, 3)),
        RGB / 127.5,  # to 2
        RGB / 58 - 2.1,  # normalized by mean and deviation
        RGB * np.nan,
        np.concatenate([RGB[:2] * 1.0, RGB[2:] / 127.5 - 1]),
        RGB.astype(np.uint16) * 16,  # 12 bits, or dark ones of 16
        RGB.astype(np.int32) - 128,
        RGB.astype(np.int32) * 1000,
        RGB[:0].astype(np.uint16),
    ],
)
def test_a_range_that_cannot_be_told(array):
    with pytest.raises(UserError, match="x is .*(range|may range).* store it as uint8, or leave it out with `views`"):
        range_of(array, array.dtype, "x")


@pytest.mark.parametrize("value", [-0.1, 1.1, np.nan, np.inf])
def test_a_value_beyond_the_range_costs_the_episode(value):
    images = RGB / 255
    images[2, 3, 4, 1] = value
    with pytest.raises(CorruptEpisode, match="x holds .*, its images range to 1"):
        ArrayForm("last", 0.0, 1.0).to_rgb(images, "x")


@pytest.mark.parametrize(
    "name, shape, dtype, camera",
    [
        ("agentview_image", (9, 64, 64, 3), "uint8", True),
        ("wrist", (9, 64, 64, 1), "uint8", True),
        ("agentview_depth", (9, 64, 64, 1), "uint8", False),
        ("wrist_segmentation_instance", (9, 64, 64), "uint8", False),
        ("front", (9, 64, 64, 1), "float32", False),
        ("front", (9, 64, 64), "uint16", False),
    ],
)
def test_depth_maps_and_masks_are_named_and_no_camera(name, shape, dtype, camera):
    assert is_camera(name, shape, np.dtype(dtype)) == camera
    note = left_out(name, shape, np.dtype(dtype))
    assert (note is None) == camera and (camera or note.text.startswith(f"'{name}' ({dtype}, one channel) is a depth"))


@pytest.mark.parametrize("shape", [(9,), (9, 7), (9, 3, 4), (9, 512, 3), (9, 2, 4, 4)])
def test_tables_are_not_named(shape):
    assert left_out("x", shape, np.dtype(np.float32)) is None
