"""Images of an observation as they travel: as taken, or as a policy's encoder sees them, uncompressed or compressed.

What an encoder sees is the image in the middle of a black square (an odd row or column goes to the bottom or right),
resized to its side by antialiased bicubic interpolation, as the server does. Pillow's interpolation differs from the
server's by one of 255 in less than 1 % of the values (`benchmarks/wire.py`). A smaller image is left to the server.

Letters: H, W image size, R side of what the encoder sees.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from .errors import ClientError

FORMS = ("native", "raw", "jpeg", "webp")  # as taken; resized; resized and compressed
PADDING_RULE = "square-black-centred"  # of the server's metadata
OVERSHOOT = 0.1  # by which resampling may leave [0, 1]


def to_bytes(image: Any, name: str) -> np.ndarray:
    """uint8 [H, W, 3] of an image that is so, or uint8 [3, H, W], or floating [3, H, W] in [0, 1] as LeRobot's tensors.

    `ClientError` for other values."""
    if image.dtype.kind == "f":
        low, high = image.min(), image.max()
        if not (low >= -OVERSHOOT and high <= 1 + OVERSHOOT):  # neither holds for NaN
            raise ClientError(f"image '{name}' has values from {low:g} to {high:g}; scale images of float to [0, 1]")
        image = np.rint(image * 255).clip(0, 255).astype(np.uint8)
    if image.shape[0] == 3 and image.shape[2] != 3:
        image = image.transpose(1, 2, 0)
    return np.ascontiguousarray(image)


def fit(image: np.ndarray, side: int) -> np.ndarray:
    """uint8 [H, W, 3] → [R, R, 3]; an image whose longer side is at most R is returned as it is."""
    height, width = image.shape[:2]
    square = max(height, width)
    if square <= side:
        return image
    if height != width:
        top, left = (square - height) // 2, (square - width) // 2
        padded = np.zeros((square, square, 3), np.uint8)
        padded[top : top + height, left : left + width] = image
        image = padded
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))


def encode(image: np.ndarray, form: str, quality: int) -> Any:
    """uint8 [H, W, 3] → the bytes of a JPEG or WebP file; the array itself for other forms."""
    if form not in ("jpeg", "webp"):
        return image
    file = io.BytesIO()
    # 4:4:4 keeps the colors of small things; WebP's fastest method takes a third of the time for a tenth more bytes
    options = {"subsampling": 0 if quality >= 90 else 2} if form == "jpeg" else {"method": 0}
    Image.fromarray(image).save(file, form.upper(), quality=quality, **options)
    return file.getvalue()


def each_image(observation: Mapping[Any, Any], change: Callable[[np.ndarray], Any], path: str = "") -> dict[Any, Any]:
    """The observation, nested or not, with `change` of each image in it, whatever its name; tensors become arrays."""
    out: dict[Any, Any] = {}
    for key, value in observation.items():
        name = f"{path}/{key}" if path else str(key)
        if hasattr(value, "detach"):  # of torch
            value = value.detach().cpu().numpy()
        if isinstance(value, Mapping):
            value = each_image(value, change, name)
        elif isinstance(value, np.ndarray) and value.ndim == 3 and value.size and _is_image(value):
            value = change(to_bytes(value, name))
        out[key] = value
    return out


def _is_image(value: np.ndarray) -> bool:
    first, last = value.shape[0] == 3, value.shape[2] == 3
    return value.dtype == np.uint8 and (first or last) or value.dtype.kind == "f" and first
