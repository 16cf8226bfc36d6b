"""Encoded images (PNG, JPEG …) as several formats keep them: sizes, hashes, pixels; and the short names of cameras.

Encoded images travel as (what, bytes), where `what` is how messages about that image begin. Letters: H × W image size.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from PIL import Image

from ...common.text import first_line
from ...errors import UserError, unknown
from .episode import CorruptEpisode

DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)  # PIL's


def survey(encoded: Iterable[tuple[str, bytes]], formats: tuple[str, ...] | None) -> tuple[int, int, int, str]:
    """Number of images, H and W of the first, sha256 hex over the bytes of all. Only the first header is parsed.

    `formats` are PIL's names of those allowed, None for all.
    """
    digest, count, width, height = hashlib.sha256(), 0, 0, 0
    for what, data in encoded:
        if not count:
            width, height = open_image(data, what, formats).size
        digest.update(f"{len(data)};".encode())
        digest.update(data)
        count += 1
    return count, height, width, digest.hexdigest()


def decode_all(
    encoded: Iterable[tuple[str, bytes]], size: tuple[int, int], formats: tuple[str, ...] | None
) -> Iterator[np.ndarray]:
    """Yield uint8 [H, W, 3] RGB of every image; `CorruptEpisode` where one is damaged or not of `size` (H, W)."""
    for what, data in encoded:
        image = decode(data, what, formats)
        if image.shape[:2] != size:
            height, width = image.shape[:2]
            raise CorruptEpisode(f"{what} is {width}x{height}, the first is {size[1]}x{size[0]}")
        yield image


def decode(data: bytes, what: str, formats: tuple[str, ...] | None) -> np.ndarray:
    """uint8 [H, W, 3] RGB of one image; `CorruptEpisode` when it is damaged or has more than 8 bits."""
    image = open_image(data, what, formats)
    try:
        return np.asarray(image.convert("RGB"))
    except DAMAGE as error:
        raise CorruptEpisode(f"{what} cannot be decoded ({first_line(error)})", "unreadable-file") from None


def open_image(data: bytes, what: str, formats: tuple[str, ...] | None) -> Image.Image:
    """The image with only its header read; `CorruptEpisode` when that fails or it has more than 8 bits per channel."""
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except DAMAGE:  # whose text can hold an address in memory, which differs from run to run
        allowed = "" if formats is None else f" ({', '.join(formats)})"
        raise CorruptEpisode(f"{what} is not an image{allowed}", "unreadable-file") from None
    if image.mode[0] in "IF":
        raise CorruptEpisode(f"{what} is not an 8-bit image (PIL mode {image.mode})")
    return image


def choose_cameras(
    keys: Sequence[str], prefix: str, wanted: Sequence[str] | None, where: str, remedy: str
) -> dict[str, str]:
    """Short name → key of the cameras `wanted` (keys or short names, in that order; None for all).

    A short name is the last part of a key; where two cameras share it, all that follows `prefix`, which ends with the
    separator of parts. `UserError` for an unknown camera, or two of one name (`remedy`: what to do then).
    """
    last = {k: k.rpartition(prefix[-1])[2] for k in keys}
    count = Counter(last.values())
    short = {k: re.sub(r"[^\w-]+", "_", v if count[v] == 1 else k.removeprefix(prefix)) for k, v in last.items()}
    if len(set(short.values())) < len(keys):
        raise UserError(f"{where}: two cameras get the same short name: {', '.join(keys)}; {remedy}")
    by_name = {v: k for k, v in short.items()} | {k: k for k in keys}
    for name in wanted or ():
        if name not in by_name:
            raise UserError(f"{where}: {unknown('view', name, by_name)}; see `views` of its dataset config")
    chosen = keys if wanted is None else [by_name[w] for w in wanted]
    return {short[k]: k for k in chosen}
