"""Streams and images of one DexWild episode, brought onto one clock (layout: see source.py).

Letters: T frames of the episode, N rows of a stream, d its values, H × W image size. Times are nanoseconds.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import h5py
import numpy as np

from ..episode import CorruptEpisode, View
from ..hdf5 import find, find_array, numbers
from ..images import decode, is_turned, renamed
from ..images.arrays import BYTES, channels_of, form_of
from ..images.hdf5 import stored_hash

MAX_TRIM_S = 0.5  # seconds of images that may lack a row at either end of an episode; more is a stream cut short
_IMAGE = re.compile(r"(\d+)\.(?:jpe?g|png)", re.IGNORECASE)
_FORMATS = ("JPEG", "PNG")
Opener = Callable[[tuple[int, int], int, int], Iterator[np.ndarray]]  # (size, start, stop)


@dataclass(frozen=True)
class Alignment:
    """What makes the T frames of an episode."""

    times: np.ndarray  # [T] float64 seconds since the first frame
    columns: dict[str, np.ndarray]  # column → [T, d] float64
    images: dict[str, list[str]]  # view → T names, relative to the episode's group


def align(group: h5py.Group, views: Sequence[str], columns: Sequence[str], tolerance_s: float, where: str) -> Alignment:
    """For each image of the first view the nearest row of each column and image of each other view, at most
    `tolerance_s` away. At either end up to MAX_TRIM_S of images without one are left out; others are a
    `CorruptEpisode`."""
    names = {view: _image_names(group, view, where) for view in views}
    streams = {column: read_stream(group, column, where) for column in columns}
    clock = np.array([time for time, _ in names[views[0]]])  # int64, one entry an image
    stamps = {f"image of '{v}'": np.array([time for time, _ in n]) for v, n in names.items()}
    stamps |= {f"row of '{c}'": values[:, 0] for c, values in streams.items()}
    nearest, good = {}, np.ones(len(clock), bool)
    for what, times in stamps.items():
        nearest[what], distance = _nearest(clock, times)
        good &= distance <= tolerance_s * 1e9
        lost = _unexplained(clock, good)
        if lost is not None:
            raise CorruptEpisode(
                f"{where}: no {what} within {tolerance_s * 1e3:.0f} ms of the image at {clock[lost]} (number "
                f"{lost} of the {len(clock)} of '{views[0]}')"
            )
    kept = np.flatnonzero(good)
    return Alignment(
        (clock[kept] - clock[kept[0]]) / 1e9,
        {c: values[nearest[f"row of '{c}'"][kept], 1:] for c, values in streams.items()},
        {v: [n[i][1] for i in nearest[f"image of '{v}'"][kept]] for v, n in names.items()},
    )


def read_stream(group: h5py.Group, column: str, where: str) -> np.ndarray:
    """A stream [N, 1 + d] float64: time, values. `CorruptEpisode` when there is none of that shape."""
    name = f"{column}/{column}" if isinstance(find(group, column, where), h5py.Group) else column
    values = numbers(group, name, where)
    if values.ndim != 2 or values.shape[1] < 2 or not len(values):
        raise CorruptEpisode(f"{where}: '{name}' is {list(values.shape)}, a stream has rows of a time and values")
    if not np.isfinite(values[:, 0]).all():
        raise CorruptEpisode(f"{where}: a time of '{name}' is not finite", "not-finite")
    return values.astype(np.float64)


def is_camera(group: h5py.Group, name: str) -> bool:
    """Whether a member of an episode holds images named by their time (and not, say, plots of a trajectory)."""
    if not isinstance(group.get(name, getlink=True), h5py.HardLink) or not isinstance(group[name], h5py.Group):
        return False
    return _IMAGE.fullmatch(next(iter(group[name]), "")) is not None


def view_of(group: h5py.Group, view: str, names: list[str], opener: Opener, where: str) -> View:
    """The images `names` of an open episode as a view, hashed; only the first is decoded, for its size."""
    digest, turned = hashlib.sha256(), False
    for name in names:
        array = find_array(group, name, where)
        digest.update((stored_hash(array) if array.ndim else hashlib.sha256(_bytes(array)).hexdigest()).encode())
        turned |= array.ndim < 2 and is_turned(_bytes(array), f"{where}: '{name}'", _FORMATS)
    height, width, _ = _decode(group, names[0], where).shape
    sha256 = renamed("orientation" if turned else "", digest.hexdigest())
    return View(view, height, width, len(names), functools.partial(opener, (height, width)), sha256)


def read_images(group: h5py.Group, names: list[str], size: tuple[int, int], where: str) -> Iterator[np.ndarray]:
    """Yield uint8 [H, W, 3] RGB of the images `names`; `CorruptEpisode` where one cannot be decoded."""
    for name in names:
        image = _decode(group, name, where)
        if image.shape[:2] != size:
            raise CorruptEpisode(
                f"{where}: '{name}' is {image.shape[1]}x{image.shape[0]}, the first image is {size[1]}x{size[0]}"
            )
        yield image


def _image_names(group: h5py.Group, view: str, where: str) -> list[tuple[int, str]]:
    """(time in ns, name relative to the episode) of a view's images, in order of time."""
    member = find(group, view, where)
    if not isinstance(member, h5py.Group) or not len(member):
        raise CorruptEpisode(f"{where}: '{view}' holds no images")
    found = []
    for name in member:
        match = _IMAGE.fullmatch(name)
        if not match or int(match[1]) >= 2**63:
            raise CorruptEpisode(
                f"{where}: image '{name}' of '{view}' is not named by its time in ns, like 1744428163583061504.jpg"
            )
        found.append((int(match[1]), f"{view}/{name}"))
    return sorted(found)


def _nearest(clock: np.ndarray, stamps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each time of `clock` [T] int64 ns the index of the nearest of `stamps` [N], in any order, and how far away it
    is.

    Stamps kept as float64 are exact to 256 ns only; both are rounded the same way before they are compared.
    """
    here, there = clock.astype(np.float64) - float(clock[0]), stamps.astype(np.float64) - float(clock[0])
    order = np.argsort(there, kind="stable")
    ranked = there[order]
    after = np.minimum(np.searchsorted(ranked, here), len(ranked) - 1)
    before = np.maximum(after - 1, 0)
    best = np.where(np.abs(ranked[before] - here) <= np.abs(ranked[after] - here), before, after)
    return order[best], np.abs(ranked[best] - here)


def _unexplained(clock: np.ndarray, good: np.ndarray) -> int | None:
    """A frame without a counterpart that is not at the start or end of the recording; None without such a frame."""
    kept = np.flatnonzero(good)
    if not len(kept) or clock[kept[0]] - clock[0] > MAX_TRIM_S * 1e9:
        return 0
    if clock[-1] - clock[kept[-1]] > MAX_TRIM_S * 1e9:
        return len(clock) - 1
    inside = good[kept[0] : kept[-1] + 1]
    return None if inside.all() else int(kept[0] + inside.argmin())


def _decode(group: h5py.Group, name: str, where: str) -> np.ndarray:
    """A stored image as uint8 [H, W, 3] RGB."""
    array = find_array(group, name, where)
    if array.ndim < 2:
        return decode(_bytes(array), f"{where}: '{name}'", _FORMATS)
    shape = (1, *array.shape)
    if array.dtype != np.uint8 or channels_of(shape, array.dtype) is None:
        raise CorruptEpisode(
            f"{where}: '{name}' is {array.dtype} {list(array.shape)}; an image is uint8 [H, W, 3], or a JPEG "
            f"file's bytes"
        )
    form = form_of(shape, array.dtype, BYTES[array.dtype], f"{where}: '{name}'")
    return form.to_rgb(array[()][None], f"{where}: '{name}'")[0]


def _bytes(array: h5py.Dataset) -> bytes:
    """The encoded bytes of an image: an array of bytes, or one opaque, text or variable-length value."""
    value = array[()]
    return value if isinstance(value, bytes) else np.asarray(value).tobytes()
