"""A camera's images in an HDF5 file: an array of pixels, or of encoded images. Letters: T frames, H × W image size."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np

from ....common.text import first_line
from ..episode import CorruptEpisode, View
from ..hdf5 import DAMAGE, find_array, opened
from .arrays import form_of, is_camera, range_of
from .encoded import decode_all, is_encoded, renamed, survey

_BLOCK_NBYTES = 8 << 20  # of an image array read at once where its chunks do not say
_FILES = 32  # encoded images read at once
_SAMPLED = 8  # images of one camera looked at for their range


def is_images(node: h5py.Group | h5py.Dataset) -> bool:
    """Whether a member of a file is a camera's images: an array of pixels, or an encoded image for each frame."""
    if not isinstance(node, h5py.Dataset) or not node.shape:
        return False
    return is_camera(node.name.rpartition("/")[2], node.shape, node.dtype) or _holds_files(node)


def range_over(file: h5py.File, names: Sequence[str], where: str) -> tuple[float, float]:
    """The values of black and white of one camera whose images are in several datasets, by some of its images.
    `UserError` when they cannot be told."""
    samples: list[np.ndarray] = []
    spread = [names[int(i)] for i in np.linspace(0, len(names) - 1, min(_SAMPLED, len(names)))]
    for name in spread:
        with contextlib.suppress(CorruptEpisode, *DAMAGE):
            array = find_array(file, name, where)
            if array.dtype == np.uint8 or array.dtype.kind not in "uif":
                return 0.0, 255.0
            rows = np.linspace(0, len(array) - 1, -(-_SAMPLED // len(spread))).astype(int)
            samples += [array[row] for row in np.unique(rows)]
    return range_of(samples, samples[0].dtype if samples else np.dtype(np.uint8), f"{where}: '{names[0]}'")


def view_of(
    file: h5py.File, path: Path, stored: str, name: str, where: str, span: tuple[float, float] = (0.0, 255.0)
) -> View:
    """The images of the dataset `stored` of an open file as the view `name`, hashed but not decoded; `span`: the values
    of black and white in it."""
    array = find_array(file, stored, where)
    if _holds_files(array):
        length, height, width, sha256 = survey(_files(array, where), None)
    else:
        form = form_of(array.shape, array.dtype, span, f"{where}: '{array.name}'")
        length, (height, width) = len(array), form.size(array.shape)
        sha256 = renamed("" if span == (0.0, 255.0) else f"{span}", stored_hash(array))
    opener = functools.partial(read_images, path, stored, (height, width), span, where)
    return View(name, height, width, length, opener, sha256)


def read_images(
    path: Path, name: str, size: tuple[int, int], span: tuple[float, float], where: str, start: int, stop: int
) -> Iterator[np.ndarray]:
    """Yield uint8 [H, W, 3] of frames start..stop-1 of the dataset `name`; `CorruptEpisode` where one cannot be read.
    Each chunk is decoded once; memory holds one block of chunks."""
    with opened(path, where) as file:
        array = find_array(file, name, where)
        if stop > len(array):
            raise CorruptEpisode(f"{where}: '{name}' has {len(array)} images, {stop} were expected", "row-count")
        if _holds_files(array):
            yield from decode_all(_files(array, where, start, stop), size, None)
            return
        form = form_of(array.shape, array.dtype, span, f"{where}: '{name}'")
        for first, last in _blocks(array, start, stop):
            try:
                block = array[first:last]
            except DAMAGE as error:
                reason = f"{where}: images {first} to {last - 1} of '{name}' cannot be decoded ({first_line(error)})"
                raise CorruptEpisode(reason, "unreadable-file") from None
            yield from form.to_rgb(block, f"{where}: '{name}'")


def _holds_files(array: h5py.Dataset) -> bool:
    """Whether each row is an image file's bytes: of any length, or padded to one."""
    if not len(array) or not (array.ndim == 1 and array.dtype.kind in "OSV" or _padded(array)):
        return False
    return is_encoded(_bytes(array[0]))


def _padded(array: h5py.Dataset) -> bool:
    return array.ndim == 2 and array.dtype == np.uint8


def _files(array: h5py.Dataset, where: str, start: int = 0, stop: int | None = None) -> Iterator[tuple[str, bytes]]:
    """The image files of rows start..stop-1."""
    stop = len(array) if stop is None else stop
    for first in range(start, stop, _FILES):
        for index, value in enumerate(array[first : min(stop, first + _FILES)], first):
            yield f"{where}: image {index} of '{array.name}'", _bytes(value)


def _bytes(value: object) -> bytes:
    """The encoded bytes of an image: an array of bytes, or one opaque, text or variable-length value."""
    return value if isinstance(value, bytes) else np.asarray(value).tobytes()


def stored_hash(array: h5py.Dataset) -> str:
    """sha256 hex over shape, type and the bytes of `array` as stored (compressed chunks are not decoded)."""
    digest = hashlib.sha256(f"{array.shape}{array.dtype.str}{array.chunks};".encode())
    if array.chunks:
        for corner in itertools.product(*(range(0, n, c) for n, c in zip(array.shape, array.chunks))):
            digest.update(array.id.read_direct_chunk(corner)[1])
    else:
        for start, stop in _blocks(array, 0, len(array)):
            digest.update(array[start:stop].tobytes())
    return digest.hexdigest()


def write_images(group: h5py.Group, name: str, view: View, compression: str | None, where: str) -> None:
    """Store the frames of `view` one by one as the dataset `name`, uint8 [T, H, W, 3] with one frame per chunk.
    `CorruptEpisode` when one cannot be decoded, or their number or size is not what the view says."""
    size, count = (view.height, view.width, 3), 0
    array = group.create_dataset(name, (view.length, *size), np.uint8, chunks=(1, *size), compression=compression)
    for frame in view.frames():
        if count == view.length or frame.shape != size:
            raise CorruptEpisode(
                f"{where}: image {count} of '{view.name}' is {list(frame.shape)}, expected {view.length} of "
                f"{list(size)}"
            )
        array[count] = frame
        count += 1
    if count < view.length:
        raise CorruptEpisode(f"{where}: {count} images of '{view.name}' for {view.length} rows", "row-count")


def _blocks(array: h5py.Dataset, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Consecutive row ranges that cover start..stop-1, cut only where chunks end."""
    row_nbytes = max(1, math.prod(array.shape[1:]) * array.dtype.itemsize)
    chunk = array.chunks[0] if array.chunks else 1
    rows = chunk * max(1, _BLOCK_NBYTES // (row_nbytes * chunk))
    while start < stop:
        end = min(stop, (start // rows + 1) * rows)
        yield start, end
        start = end
