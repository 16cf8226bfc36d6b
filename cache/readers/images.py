"""Images as several formats keep them, encoded or as arrays: sizes, hashes, pixels; and the short names of cameras.

What a camera saw becomes uint8 [H, W, 3] RGB here, whatever way it was stored: turned as EXIF says, gray in three equal
channels, the first frame of an animation, 16 bits scaled to 8, alpha left out (the stored colors are kept, as FFmpeg
and Pillow do). One channel of more than 8 bits, or of floats, is a depth map and no camera.

Stored images travel as (what, value), where `what` is how messages about that image begin and `value` a file's bytes or
uint8 [H, W, 3]. Letters: N images of an array, k of a block of it, H × W image size, C channels.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from ...common.text import first_line
from ...errors import UserError, unknown
from .episode import CorruptEpisode

DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)  # PIL's
MAX_SIDE = 8192  # pixels; an encoder pads an image to a square of its longer side
MAX_ASPECT = 32  # longer side by shorter side
MIN_SIDE = 8  # pixels of an array that is taken for images of 1 or 4 channels
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"GIF8", b"BM")  # how encoded images begin
_TURNED = (b"Exif", b"eXIf", b"tiff:Orientation")  # without one of these an image has no orientation, unless it is TIFF
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


def check_size(height: int, width: int, what: str) -> None:
    """`CorruptEpisode` for a size that no camera has, before anything of that size is made."""
    short, long = sorted((height, width))
    if not 0 < long <= MAX_SIDE or long > MAX_ASPECT * short:
        raise CorruptEpisode(
            f"{what} is {width}x{height} pixels; at most {MAX_SIDE} a side and {MAX_ASPECT}:1 are read"
        )


# --- one encoded image ---


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
            digest.update(np.ascontiguousarray(value))
        else:
            if not count or _may_be_turned(value):
                image = open_image(value, what, formats)
                orientation = _orientation(image)
                turned |= orientation != 1
                if not count:
                    width, height = image.size if orientation < 5 else image.size[::-1]
            digest.update(f"{len(value)};".encode())
            digest.update(value)
        count += 1
    sha256 = digest.hexdigest()
    return count, height, width, renamed("orientation" if turned else "", sha256)


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
    try:
        if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
            image = image.convert("RGBA")  # else PIL warns
        turn = _TURNS.get(_orientation(image)) if _may_be_turned(data) else None
        image = image.convert("RGB")
        return np.asarray(image if turn is None else image.transpose(turn))
    except DAMAGE as error:
        raise CorruptEpisode(f"{what} cannot be decoded ({first_line(error)})", "unreadable-file") from None


def open_image(data: bytes, what: str, formats: tuple[str, ...] | None) -> Image.Image:
    """The image with only its header read; `CorruptEpisode` when that fails, it is too large, or it is no camera's."""
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except DAMAGE:  # whose text can hold an address in memory, which differs from run to run
        allowed = "" if formats is None else f" ({', '.join(formats)})"
        raise CorruptEpisode(f"{what} is not an image{allowed}", "unreadable-file") from None
    check_size(image.height, image.width, what)
    if is_depth(image):
        raise CorruptEpisode(
            f"{what} has one channel of more than 8 bits (PIL mode {image.mode}), so it is not an 8-bit image but a "
            f"depth map; leave that camera out with `views`"
        )
    return image


def is_depth(image: Image.Image) -> bool:
    """Whether an image has one channel of more than 8 bits: a depth map, and never a camera's."""
    return image.mode[0] in "IF"


def is_encoded(value: bytes) -> bool:
    """Whether bytes begin as an image file does."""
    return value.startswith(_SIGNATURES)


def _may_be_turned(data: bytes) -> bool:
    return data[:4] in (b"II*\0", b"MM\0*") or any(mark in data for mark in _TURNED)


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 where there is none, or none that can be read."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # PIL raises many types on damaged EXIF data, without which the image is still good
        return 1
    return found if found in _TURNS else 1


# --- arrays of images ---


@dataclass(frozen=True)
class ArrayForm:
    """How an array [N, …] holds images."""

    channels: Literal["last", "first", "none"]  # [N, H, W, C], [N, C, H, W] or [N, H, W]
    black: float = 0.0  # the value of no light
    white: float = 255.0  # the value of full brightness

    def size(self, shape: Sequence[int]) -> tuple[int, int]:
        """H and W of an array of this shape."""
        return (shape[2], shape[3]) if self.channels == "first" else (shape[1], shape[2])

    def to_rgb(self, block: np.ndarray, what: str) -> np.ndarray:
        """Images as stored → uint8 [k, H, W, 3], rounded; `CorruptEpisode` for NaN or a value beyond black or white."""
        if self.channels == "first":
            block = np.moveaxis(block, 1, 3)
        elif self.channels == "none":
            block = block[..., None]
        if block.shape[3] == 4:
            block = block[..., :3]
        if block.dtype != np.uint8:
            low, high = block.min(), block.max()
            if not (low >= self.black and high <= self.white):  # False for NaN too
                raise CorruptEpisode(f"{what} holds {low} to {high}, its images range {self._span}")
            scaled = (block - self.black) * (255.0 / (self.white - self.black))
            block = np.rint(scaled).astype(np.uint8)
        if block.shape[3] == 1:
            block = np.repeat(block, 3, axis=3)
        return np.ascontiguousarray(block)

    @property
    def _span(self) -> str:
        return f"from {self.black:g} to {self.white:g}" if self.black else f"to {self.white:g}"


def channels_of(shape: Sequence[int], dtype: np.dtype) -> Literal["last", "first", "none", "both"] | None:
    """Where an array of this shape and type has its channels, were it images: in the last axis, behind the first, or
    (8-bit gray) nowhere; "both" where that cannot be told; None for what is no camera's images.

    3 or 4 channels are a camera's in any numbers, 1 only in 8 bits: more of them are a depth map. Where both axes fit,
    the one counts that leaves an image of at least 8 pixels a side.
    """
    if dtype.kind not in "uif" or 0 in shape[1:]:
        return None
    few = (1, 3, 4) if dtype == np.uint8 else (3, 4)
    if len(shape) == 3:
        return "none" if dtype == np.uint8 and min(shape[1:]) >= MIN_SIDE else None
    if len(shape) != 4:
        return None
    sides: dict[Literal["last", "first"], Sequence[int]] = {"last": shape[1:3], "first": shape[2:]}
    fitting = [at for at, size in (("last", shape[3]), ("first", shape[1])) if size in few]
    large = [at for at in fitting if min(sides[at]) >= MIN_SIDE]
    if len(fitting) == 1 and (large or shape[3 if fitting[0] == "last" else 1] == 3):
        return fitting[0]
    return large[0] if len(large) == 1 else "both" if len(fitting) == 2 else None


def form_of(shape: Sequence[int], dtype: np.dtype, samples: Iterable[np.ndarray], what: str) -> ArrayForm:
    """How an array of this shape and type holds images, its range by `samples` of it that are spread over the whole
    data (not looked at for uint8). `UserError` where the axis of the channels or the range cannot be told."""
    channels = channels_of(shape, dtype)
    if channels == "both":
        raise UserError(f"{what} {list(shape)} has its colors first or last; store it as [N, H, W, 3]")
    if channels is None:
        raise UserError(f"{what} is {dtype} {list(shape)}; images have 3 or 4 channels, or 1 of 8 bits")
    black, white = (0.0, 255.0) if dtype == np.uint8 else _range(samples, dtype, what)
    return ArrayForm(channels, black, white)


def _range(samples: Iterable[np.ndarray], dtype: np.dtype, what: str) -> tuple[float, float]:
    """The values of black and white. `UserError` when they cannot be told, which is so for most samples not finite.

    Floats range to 255 where one sample exceeds 2 (not 1: resampling overshoots), else from -1 to 1 where one is
    negative, else to 1 where one holds fractions. Integers range to 255 where no sample exceeds it, to 65535 where one
    exceeds 4095: between these, 10, 12 and 16 bits look alike.
    """
    seen = [v.astype(np.float64) for v in samples]
    low, high = (np.array([f(v) for v in seen]) for f in (np.min, np.max))  # [samples]
    remedy = "store it as uint8, or leave it out with `views` in a dataset config"
    if dtype.kind != "f":
        if len(seen) and low.min() >= 0 and (high.max() <= 255 or 4095 < high.max() <= 65535):
            return 0.0, 255.0 if high.max() <= 255 else 65535.0
        held = f"{low.min():g} to {high.max():g}" if len(seen) else "nothing that can be read"
        raise UserError(f"{what} is {dtype} and holds {held}, by which its range cannot be told; {remedy}")
    bytes_, signed = (low >= 0) & (high > 2), (low < 0) & (low >= -1) & (high <= 1)
    unit = (low >= 0) & (high <= 1) & np.array([(v % 1 > 0).any() for v in seen], bool)
    others = ~(bytes_ | signed | unit) & ~(low == high)  # a sample of one value says nothing
    if not (bytes_.any() and signed.any()) and 2 * others.sum() <= len(seen) and (bytes_ | signed | unit).any():
        return (0.0, 255.0) if bytes_.any() else (-1.0, 1.0) if signed.any() else (0.0, 1.0)
    raise UserError(f"{what} is {dtype} and may range to 1 or to 255, or is no image; {remedy}")


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
