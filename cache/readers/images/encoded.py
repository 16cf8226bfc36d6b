"""Image files (PNG, JPEG …), by whatever format they are kept: sizes, hashes, pixels.

They travel as (what, value), where `what` is how messages about that image begin and `value` a file's bytes, or uint8
[H, W, 3] where a format keeps some images so. Letters: H × W image size.
"""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image

from ....common.text import first_line
from ..episode import CorruptEpisode

DAMAGE = (  # what PIL raises
    *(OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, ArithmeticError, MemoryError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
MAX_SIDE = 8192  # pixels; an encoder pads an image to a square of its longer side
MAX_PIXELS = 1 << 24  # a batch of such images takes 2 GB
MAX_ASPECT = 32  # longer side by shorter side
# What is read where a format allows any: no program is run for them, as for EPS, nor other files opened.
_PICTURES = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "TGA", "JPEG2000", "AVIF")
_SCAN, _MOST_SCANS = b"\xff\xda", 64  # of a progressive JPEG: each passes over all of the image, and may be a few bytes
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_SIGNATURES = (_JPEG, _PNG, b"RIFF", b"GIF8", b"BM")  # how encoded images begin
_JPEG_ENDS = (b"", b"\xda", b"\xe1")  # the pixels begin, or EXIF or XMP
_PNG_METADATA = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")  # chunks that may hold EXIF data or XMP
_ORIENTATION = 274  # EXIF's number of it
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
Stored = bytes | np.ndarray
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `check_size` is stricter


def check_size(height: int, width: int, what: str) -> None:
    """`CorruptEpisode` for a size that no camera has, before anything of that size is made."""
    short, long = sorted((height, width))
    if not 0 < long <= MAX_SIDE or long > MAX_ASPECT * short or long * short > MAX_PIXELS:
        most = f"{MAX_SIDE} a side and {MAX_ASPECT}:1, {MAX_PIXELS >> 20} megapixels in all,"
        raise CorruptEpisode(f"{what} is {width}x{height} pixels; at most {most} are read")


def survey(stored: Iterable[tuple[str, Stored]], formats: tuple[str, ...] | None) -> tuple[int, int, int, str]:
    """Number of images, H and W of the first, sha256 hex over what is stored of all and how it is turned. Parsed are
    the first header and those that may hold an orientation.

    `formats` are PIL's names of those allowed, None for all.
    """
    digest, count, width, height, turned = hashlib.sha256(), 0, 0, 0, False
    for what, value in stored:
        if isinstance(value, np.ndarray):
            height, width = (height, width) if count else value.shape[:2]
            check_size(height, width, what)
            digest.update(f"{value.shape};".encode())
            digest.update(value.tobytes())
        else:
            if not count or _may_be_turned(value):
                image = open_image(value, what, formats)
                orientation = _orientation(image)
                turned |= orientation != 1
                if not count:
                    width, height = image.size if orientation < 5 else image.size[::-1]
            _require_sums(value, what)
            digest.update(f"{len(value)};".encode())
            digest.update(value)
        count += 1
    sha256 = digest.hexdigest()
    return count, height, width, renamed("orientation" if turned else "", sha256)


def _require_sums(data: bytes, what: str) -> None:
    """`CorruptEpisode` for a PNG whose pixels are not what their checksums say: Pillow decodes it to other ones."""
    at = 8 if data[:8] == b"\x89PNG\r\n\x1a\n" else len(data)
    while (stop := at + 12 + int.from_bytes(data[at : at + 4], "big")) <= len(data):
        found, written = memoryview(data)[at + 4 : stop - 4], data[stop - 4 : stop]
        if found[:4] == b"IDAT" and zlib.crc32(found) != int.from_bytes(written, "big"):
            raise CorruptEpisode(f"{what} is damaged: its checksum differs", "unreadable-file")
        at = stop


def renamed(conversion: str, sha256: str) -> str:
    """The hash of images that are converted in a way that began after others were cached: another one, so that
    `dvla cache build --update` encodes them again. The hash itself where `conversion` is empty."""
    return hashlib.sha256(f"{conversion}:{sha256}".encode()).hexdigest() if conversion else sha256


def decode_all(
    stored: Iterable[tuple[str, Stored]], size: tuple[int, int], formats: tuple[str, ...] | None
) -> Iterator[np.ndarray]:
    """Yield uint8 [H, W, 3] RGB of every image; `CorruptEpisode` where one is damaged or not of `size` (H, W)."""
    for what, value in stored:
        image = value if isinstance(value, np.ndarray) else decode(value, what, formats)
        if image.shape[:2] != size:
            height, width = image.shape[:2]
            raise CorruptEpisode(f"{what} is {width}x{height}, the first is {size[1]}x{size[0]}")
        yield image


def decode(data: bytes, what: str, formats: tuple[str, ...] | None) -> np.ndarray:
    """uint8 [H, W, 3] RGB of one image, as it is to be seen; `CorruptEpisode` when it is damaged, too large, or has one
    channel of more than 8 bits."""
    image = open_image(data, what, formats)
    if image.info.get("progressive") and (scans := data.count(_SCAN)) > _MOST_SCANS:
        raise CorruptEpisode(f"{what} is made of {scans} scans; at most {_MOST_SCANS} are read", "unreadable-file")
    try:
        if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
            image = image.convert("RGBA")  # else PIL warns
        turn = _TURNS.get(_orientation(image)) if _may_be_turned(data) else None
        image.load()
        image = image if image.mode == "RGB" else image.convert("RGB")
        return np.asarray(image if turn is None else image.transpose(turn))
    except DAMAGE as error:
        raise CorruptEpisode(f"{what} cannot be decoded ({first_line(error)})", "unreadable-file") from None


def open_image(data: bytes, what: str, formats: tuple[str, ...] | None) -> Image.Image:
    """The image with only its header read; `CorruptEpisode` when that fails, it is too large, or it is no camera's."""
    try:
        image = Image.open(io.BytesIO(data), formats=formats or _PICTURES)
    except DAMAGE:  # whose text can hold an address in memory, which differs from run to run
        allowed = "" if formats is None else f" ({', '.join(formats)})"
        raise CorruptEpisode(f"{what} is not an image{allowed}", "unreadable-file") from None
    check_size(image.height, image.width, what)
    if _is_deep(image):
        raise CorruptEpisode(
            f"{what} has one channel of more than 8 bits (PIL mode {image.mode}), so it is not an 8-bit image but a "
            f"depth map; leave that camera out with `views`"
        )
    return image


def is_depth_map(data: bytes) -> bool:
    """Whether an image has one channel of more than 8 bits, and so is no camera's."""
    try:
        return _is_deep(Image.open(io.BytesIO(data), formats=_PICTURES))
    except DAMAGE:
        return False


def _is_deep(image: Image.Image) -> bool:
    return image.mode[0] in "IF"


def is_encoded(value: bytes) -> bool:
    """Whether bytes begin as an image file does."""
    return value.startswith(_SIGNATURES)


def is_turned(data: bytes, what: str, formats: tuple[str, ...] | None) -> bool:
    """Whether an image is stored otherwise than it is to be seen."""
    return _may_be_turned(data) and _orientation(open_image(data, what, formats)) != 1


def _may_be_turned(data: bytes) -> bool:
    """Whether an image has metadata that can hold an orientation: found chunk by chunk, for the pixels are long."""
    at = 8
    if data.startswith(_PNG):
        while (kind := data[at + 4 : at + 8]) and kind not in _PNG_METADATA:
            at += 12 + int.from_bytes(data[at : at + 4], "big")
        return bool(kind)
    at = 2
    if data.startswith(_JPEG):
        while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] not in _JPEG_ENDS:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        return data[at : at + 2] == b"\xff\xe1"
    return any(mark in data for mark in (b"EXIF", b"Exif", b"tiff:Orientation"))


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 where there is none, or none that can be read, and of TIFF, which PIL turns."""
    if image.format == "TIFF":
        return 1
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # PIL raises many types on damaged EXIF data, without which the image is still good
        return 1
    return found if found in _TURNS else 1
