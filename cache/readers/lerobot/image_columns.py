"""The ways in which a parquet column holds images: bytes, bytes with a path, a path alone, nested lists of pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..episode import CorruptEpisode
from ..images import Stored
from ..images.arrays import BYTES, form_of

Fetch = Callable[[str], bytes]  # the content of the image file that a row names


def stored_images(column: pa.Array, fetch: Fetch, what: str) -> Iterator[Stored]:
    """Each row's image: a file's bytes, or uint8 [H, W, 3]. `CorruptEpisode`, beginning with `what`, for another kind
    of column and for a row without an image."""
    column = column.storage if isinstance(column, pa.ExtensionArray) else column
    column = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    if not pa.types.is_struct(column.type):
        parts = {"bytes": column}
    else:
        parts = dict(zip((field.name for field in column.type), column.flatten()))
    nothing = pa.nulls(len(column))
    for content, path in zip(parts.get("bytes", nothing), parts.get("path", nothing)):
        image = _image(content, fetch, what)
        if not len(image):
            if not path.as_py():
                raise CorruptEpisode(f"{what}: a row holds no image bytes, and no path of an image file")
            image = fetch(str(path))
        yield image


def _image(value: pa.Scalar, fetch: Fetch, what: str) -> Stored:
    """One image by its value in a column; nothing where there is none."""
    is_ = pa.types
    if not value.is_valid:
        return b""
    if is_.is_binary(value.type) or is_.is_large_binary(value.type) or is_.is_fixed_size_binary(value.type):
        return value.as_py()
    if is_.is_string(value.type) or is_.is_large_string(value.type):
        return fetch(value.as_py())
    if not is_.is_nested(value.type) or is_.is_struct(value.type) or is_.is_map(value.type):
        raise CorruptEpisode(f"{what} is a column of {value.type}; images are bytes, paths or nested lists of pixels")
    pixels = _pixels(value.values, what)
    if pixels.ndim == 1:  # a file's bytes as numbers
        return pixels.tobytes()
    return form_of((1, *pixels.shape), pixels.dtype, BYTES[pixels.dtype], what).to_rgb(pixels[None], what)[0]


def _pixels(values: pa.Array, what: str) -> np.ndarray:
    """Nested lists of whole numbers up to 255 as uint8 of their shape."""
    shape = [len(values)]
    while pa.types.is_nested(values.type) and not pa.types.is_struct(values.type):
        lengths = pc.unique(pc.list_value_length(values)).to_pylist()
        if len(lengths) != 1 or lengths[0] is None:
            raise CorruptEpisode(f"{what}: rows of an image differ in length")
        shape, values = [*shape, lengths[0]], values.flatten()
    numbers = values.to_numpy(zero_copy_only=False) if pa.types.is_integer(values.type) else np.zeros(0)
    if values.null_count or not numbers.size or numbers.min() < 0 or numbers.max() > 255:
        raise CorruptEpisode(f"{what}: its lists hold {values.type} that are no whole numbers from 0 to 255")
    return numbers.astype(np.uint8).reshape(shape)


def file_reader(locate: Callable[[str, str], Path], column: str, episode_id: int, where: str) -> Fetch:
    """What reads the image file that a row of an episode names: where its path leads from the dataset's folder, or,
    since many are those of the machine that recorded it, where LeRobot puts it (`images/…`)."""

    def fetch(path: str) -> bytes:
        given = PurePosixPath(path.replace("\\", "/"))
        names = [given] if not given.is_absolute() and ".." not in given.parts else []
        if "images" in given.parts:
            names.append(PurePosixPath(*given.parts[given.parts.index("images") :]))
        names.append(PurePosixPath("images", column, f"episode_{episode_id:06d}", given.name))
        for name in dict.fromkeys(n for n in names if ".." not in n.parts):
            try:
                return locate(str(name), where).read_bytes()
            except (CorruptEpisode, OSError):
                continue
        raise CorruptEpisode(f"{where}: image file '{path}' of '{column}' is missing", "missing-file")

    return fetch
