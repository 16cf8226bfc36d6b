"""A camera's images in an HDF5 file: an array of pixels, or of encoded images. Letters: T frames, H × W image size."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np

from ....common.text import first_line
from ....errors import Note, UserError
from ..episode import CorruptEpisode, View
from ..hdf5 import DAMAGE, find_array, members, opened
from .arrays import BYTES, form_of, is_camera, left_out, range_of
from .encoded import decode_all, is_encoded, renamed, survey

Spans = Mapping[np.dtype, tuple[float, float]]  # type of numbers → the values of black and white
_BLOCK_NBYTES = 8 << 20  # of an image array read at once where its chunks do not say
_FILES = 32  # encoded images read at once
_SAMPLED = 8  # images of one camera looked at for their range


def is_images(node: h5py.Group | h5py.Dataset) -> bool:
    """Whether a member of a file is a camera's images: an array of pixels, or an encoded image for each frame."""
    if not isinstance(node, h5py.Dataset) or not node.shape:
        return False
    return is_camera(node.name.rpartition("/")[2], node.shape, node.dtype) or _holds_files(node)


def left_out_of(group: h5py.Group | h5py.Dataset) -> Iterator[Note]:
    """What to say about members of a group that look like images and are no camera's."""
    found = members(group) if isinstance(group, h5py.Group) else {}
    arrays = ((name, node) for name, node in found.items() if isinstance(node, h5py.Dataset) and node.shape)
    return (note for name, node in arrays if (note := left_out(name, node.shape, node.dtype)))


def spans_over(file: h5py.File, names: Sequence[str], where: str) -> Spans:
    """The values of black and white in the datasets `names` of one camera, by some of their images; those of a type by
    which they cannot be told are left out."""
    samples: dict[np.dtype, list[np.ndarray]] = {}
    spread = [names[int(i)] for i in np.linspace(0, len(names) - 1, min(_SAMPLED, len(names)))]
    for name in spread:
        with contextlib.suppress(CorruptEpisode, *DAMAGE):
            array = find_array(file, name, where)
            if array.dtype.kind in "uif" and array.dtype not in BYTES:
                rows = np.linspace(0, len(array) - 1, -(-_SAMPLED // len(spread))).astype(int)
                samples.setdefault(array.dtype, []).extend(array[row] for row in np.unique(rows))
    found = dict(BYTES)
    for dtype, images in samples.items():
        with contextlib.suppress(UserError):
            found[dtype] = range_of(images, dtype, where)
    return found


def view_of(file: h5py.File, path: Path, stored: str, name: str, where: str, spans: Spans = BYTES) -> View:
    """The images of the dataset `stored` of an open file as the view `name`, hashed but not decoded; `spans`: by the
    type of its numbers, the values of black and white."""
    array = find_array(file, stored, where)
    if _holds_files(array):
        length, height, width, sha256 = survey(_files(array, where), None)
    else:
        span = spans.get(array.dtype)
        form = form_of(array.shape, array.dtype, span, f"{where}: '{array.name}'")
        length, (height, width) = len(array), form.size(array.shape)
        sha256 = renamed("" if array.dtype in BYTES else f"{span}", stored_hash(array))
    opener = functools.partial(read_images, path, stored, (height, width), spans, where)
    return View(name, height, width, length, opener, sha256)


def read_images(
    path: Path, name: str, size: tuple[int, int], spans: Spans, where: str, start: int, stop: int
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
        form = form_of(array.shape, array.dtype, spans.get(array.dtype), f"{where}: '{name}'")
        for first, last in _blocks(array, start, stop):
            try:
                block = array[first:last]
            except DAMAGE as error:
                reason = f"{where}: images {first} to {last - 1} of '{name}' cannot be decoded ({first_line(error)})"
                raise CorruptEpisode(reason, "unreadable-file") from None
            yield from form.to_rgb(block, f"{where}: '{name}'")


def _holds_files(array: h5py.Dataset) -> bool:
    """Whether each row is an image file's bytes: of any length, or padded to one."""
    if (
        array.external
        or array.is_virtual
        or not len(array)
        or not (array.ndim == 1 and array.dtype.kind in "OSV" or _padded(array))
    ):
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
