"""Arrays of images, by whatever format they are kept: which are a camera's, and their pixels.

Letters: N images of an array, k of a block of it, H × W image size, C channels.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ....errors import Note, UserError
from ..episode import CorruptEpisode
from .encoded import check_size

BYTES = {np.dtype(np.uint8): (0.0, 255.0)}  # black and white of numbers that say it themselves
DEPTH = "depth-map"  # id of the finding
MIN_SIDE = 8  # pixels; an array of gray or four channels with shorter sides is something else
_NO_CAMERA = re.compile("depth|disparity|segm|mask|label", re.IGNORECASE)  # in the name of an array of one channel


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
    (8-bit gray) nowhere; "both" where that cannot be told; None for what is no images.

    3 or 4 channels may be any numbers, 1 only 8 bits: more of them are a depth map. Where both axes fit, the one counts
    that leaves images of at least 8 pixels a side.
    """
    if dtype.kind not in "uif" or 0 in shape[1:]:
        return None
    few = (1, 3, 4) if dtype == np.uint8 else (3, 4)
    if len(shape) == 3:
        return "none" if dtype == np.uint8 and min(shape[1:]) >= MIN_SIDE else None
    if len(shape) != 4:
        return None
    last, first = shape[3] in few, shape[1] in few
    large_last, large_first = last and min(shape[1:3]) >= MIN_SIDE, first and min(shape[2:]) >= MIN_SIDE
    if large_last != large_first:
        return "last" if large_last else "first"
    if last and first and (shape[1] == shape[3] == 3 or dtype != np.uint8):
        return "both" if shape[1] == shape[3] else None
    return "last" if last and shape[3] == 3 else "first" if first and shape[1] == 3 else None


def is_camera(name: str, shape: Sequence[int], dtype: np.dtype) -> bool:
    """Whether an array is a camera's images, by its shape and type, and where it has one channel by its name."""
    single = len(shape) == 3 or 1 in (*shape[1:2], *shape[3:4])
    return channels_of(shape, dtype) is not None and not (single and _NO_CAMERA.search(name))


def left_out(name: str, shape: Sequence[int], dtype: np.dtype) -> Note | None:
    """What to say about an array that has the shape of images and is no camera's; None for every other."""
    shaped = len(shape) in (3, 4) and min(shape[2:], default=0) >= MIN_SIDE or (len(shape) == 4 and shape[3] == 1)
    single = len(shape) == 3 or 1 in (*shape[1:2], *shape[3:4])
    if not shaped or not single or is_camera(name, shape, dtype):
        return None
    return Note(DEPTH, f"'{name}' ({dtype}, one channel) is a depth map or mask and not read as a camera")


def form_of(shape: Sequence[int], dtype: np.dtype, span: tuple[float, float] | None, what: str) -> ArrayForm:
    """How an array of this shape and type holds images; `span`: its black and white, None where these are not known.
    `CorruptEpisode` where the axis of the channels cannot be told, or it is no images."""
    channels = channels_of(shape, dtype)
    if channels == "both":
        raise CorruptEpisode(f"{what} {list(shape)} has its colors first or last; store it as [N, H, W, 3]")
    if channels is None or span is None:
        raise CorruptEpisode(f"{what} is {dtype} {list(shape)}, images are uint8 [N, H, W, 3] or alike")
    form = ArrayForm(channels, *span)
    check_size(*form.size(shape), what)
    return form


def range_of(samples: Iterable[np.ndarray], dtype: np.dtype, what: str) -> tuple[float, float]:
    """The values of black and white in an array of images, by samples that are spread over all of the data (not looked
    at for uint8). `UserError` when they cannot be told.

    Floats range to 255 where one sample exceeds 2 (not 1: resampling overshoots), else from -1 to 1 where one is
    negative, else to 1 where one holds fractions. Integers range to 255 where no sample exceeds it, to 65535 where one
    exceeds 4095: between these, 10, 12 and 16 bits look alike.
    """
    if dtype in BYTES:
        return BYTES[dtype]
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
