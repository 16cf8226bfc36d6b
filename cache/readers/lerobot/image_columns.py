"""Images in a parquet column, in the ways it holds them: bytes, bytes with a path, a path alone, lists of pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..episode import CorruptEpisode
from ..images import Stored, decode_all, survey
from ..images.arrays import BYTES, form_of
from ..images.encoded import is_depth_map
from ..location import Location
from .parquet import RowsAt, column_batches, first_value

Fetch = Callable[[str], bytes]  # the content of the image file that a row names


@dataclass(frozen=True, slots=True)
class ImageRows:
    """The images of one camera and one episode, in the rows of a parquet file or named by them."""

    at: RowsAt
    column: str
    height: int  # H of the first image; all others must agree
    width: int  # W
    length: int  # rows with an image
    sha256: str  # hex, over what is stored of every image


def find_images(at: RowsAt, column: str, fetch: Fetch, where: str) -> ImageRows:
    """Check that each of the episode's rows holds an image, without decoding more than the first header."""
    count, height, width, sha256 = survey(_named(at, column, fetch, where), None)
    return ImageRows(at, column, height, width, count, sha256)


def decode_images(rows: ImageRows, fetch: Fetch, where: str, start: int, stop: int) -> Iterator[np.ndarray]:
    """Yield uint8 [H, W, 3] RGB of frames start..stop-1; `CorruptEpisode` where an image cannot be decoded."""
    named = _named(rows.at, rows.column, fetch, where)
    return decode_all(islice(named, start, stop), (rows.height, rows.width), None)


def holds_depth(path: Path, column: str, fetch: Fetch, where: str) -> bool:
    """Whether the first image of a file is a depth map; `CorruptEpisode` when it cannot be read."""
    image = next(stored_images(first_value(path, column, where), fetch, where))
    return isinstance(image, bytes) and is_depth_map(image)


def _named(at: RowsAt, column: str, fetch: Fetch, where: str) -> Iterator[tuple[str, Stored]]:
    values = column_batches(at, column, where)
    images = (image for some in values for image in stored_images(some, fetch, f"{where}: '{column}'"))
    return ((f"{where}: image {index} of '{column}'", image) for index, image in enumerate(images))


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
                raise CorruptEpisode(f"{what} holds no image bytes and no path in a row")
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


def image_file(files: Location, column: str, episode_id: int, where: str, path: str) -> bytes:
    """The image file that a row of an episode names: where its path leads from the dataset's folder, or, since many are
    those of the machine that recorded it, where LeRobot puts it (`images/…`)."""
    given = PurePosixPath(path.replace("\\", "/"))
    names = [given] if not given.is_absolute() else []
    if "images" in given.parts:
        names.append(PurePosixPath(*given.parts[given.parts.index("images") :]))
    names.append(PurePosixPath("images", column, f"episode_{episode_id:06d}", given.name))
    for name in dict.fromkeys(n for n in names if ".." not in n.parts):
        try:
            return files.locate(str(name), where).read_bytes()
        except (CorruptEpisode, OSError):
            continue
    raise CorruptEpisode(f"{where}: image file '{path}' of '{column}' is missing", "missing-file")
