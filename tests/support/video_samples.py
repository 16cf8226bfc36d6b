"""Tiny videos with the traits that cameras, phones and converters give them: color tags, orientation, covers."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import av
import numpy as np
from PIL import Image

FPS = 10
COLORS = np.array([(220, 30, 30), (30, 200, 30), (30, 30, 210), (128, 128, 128), (250, 240, 20), (10, 90, 160)])
WEIGHTS = {1: (0.2126, 0.0722), 2: (0.299, 0.114), 4: (0.3, 0.11), 5: (0.299, 0.114), 6: (0.299, 0.114)}
WEIGHTS |= {7: (0.212, 0.087), 9: (0.2627, 0.0593)}  # H.273's matrix → weights of red and blue in luma


def patches(height: int = 48, width: int = 96, shift: int = 0) -> np.ndarray:
    """uint8 [H, W, 3]: six patches of COLORS, one beside the other, cyclically by `shift`."""
    columns = np.arange(width) * len(COLORS) // width
    return np.broadcast_to(COLORS[(columns + shift) % len(COLORS)], (height, width, 3)).astype(np.uint8)


def to_yuv(rgb: np.ndarray, matrix: int, full: bool, bits: int = 8, subsampled: bool = True) -> np.ndarray:
    """Planes of the YUV image one below the other, as PyAV takes them, by the formulas of H.273."""
    red, blue = WEIGHTS[matrix]
    r, g, b = (rgb[..., k] / 255 for k in range(3))
    y = red * r + (1 - red - blue) * g + blue * b
    u, v = (b - y) / (2 * (1 - blue)), (r - y) / (2 * (1 - red))
    top, unit = 2**bits - 1, 2 ** (bits - 8)
    if full:
        y, u, v = y * top, u * top + 128 * unit, v * top + 128 * unit
    else:
        y, u, v = (16 + 219 * y) * unit, (128 + 224 * u) * unit, (128 + 224 * v) * unit
    if subsampled:
        u, v = (c.reshape(c.shape[0] // 2, 2, c.shape[1] // 2, 2).mean((1, 3)) for c in (u, v))
    flat = np.concatenate([p.reshape(-1) for p in (y, u, v)])
    return np.clip(np.rint(flat), 0, top).astype(np.uint8 if bits == 8 else np.uint16)


def write_video(
    path: Path,
    planes: list[np.ndarray],
    pix_fmt: str,
    size: tuple[int, int],
    codec: str = "ffv1",
    matrix: int = 2,
    color_range: int = 0,
    options: dict[str, str] | None = None,
    transfer: int = 2,
) -> Path:
    """A video whose frames are `planes`, of `size` (H, W), with these tags in the stream and in each frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=FPS, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *size, pix_fmt
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, color_range
        stream.codec_context.color_trc = transfer
        stream.codec_context.gop_size = 4
        for number, values in enumerate(planes):
            frame = av.VideoFrame(size[1], size[0], pix_fmt)
            at = 0
            for plane in frame.planes:
                rows = values[at : at + plane.width * plane.height].reshape(plane.height, plane.width)
                padded = np.zeros((plane.height, plane.line_size // values.itemsize), values.dtype)
                padded[:, : plane.width] = rows
                plane.update(padded)
                at += rows.size
            frame.colorspace, frame.color_range, frame.pts = matrix, color_range, number
            for packet in stream.encode(frame):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)
    return path


def write_h264(path: Path, images: list[np.ndarray], matrix: int = 2, color_range: int = 0) -> Path:
    """An ordinary H.264 mp4 of uint8 [H, W, 3] images, almost lossless."""
    planes = [to_yuv(image, matrix, color_range == 2) for image in images]
    return write_video(path, planes, "yuv420p", images[0].shape[:2], "libx264", matrix, color_range, {"crf": "4"})


def turn(path: Path, a: float, b: float, c: float, d: float) -> Path:
    """Write a display matrix into the track header of an mp4: a point (x, y) is shown at (a·x + c·y, b·x + d·y)."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44  # of a header of version 0
    numbers = [round(v * 65536) for v in (a, b, 0, c, d, 0, 0, 0)] + [1 << 30]
    data[at : at + 36] = struct.pack(">9i", *numbers)
    path.write_bytes(data)
    return path


def add_cover(path: Path, color: tuple[int, int, int] = (200, 0, 200)) -> Path:
    """Put a cover image in front of the track of an mp4, so that it is the first video stream."""

    def box(kind: bytes, *parts: bytes) -> bytes:
        return struct.pack(">I4s", 8 + sum(map(len, parts)), kind) + b"".join(parts)

    picture = io.BytesIO()
    Image.new("RGB", (320, 240), color).save(picture, "JPEG")
    data = path.read_bytes()
    at = data.index(b"moov") - 4
    size = int.from_bytes(data[at : at + 4], "big")
    moov = data[at : at + size]
    handler = box(b"hdlr", bytes(8), b"mdir", b"appl", bytes(9))
    cover = box(b"covr", box(b"data", struct.pack(">II", 13, 0), picture.getvalue()))
    extra = box(b"udta", box(b"meta", bytes(4), handler, box(b"ilst", cover)))
    end = 8 + int.from_bytes(moov[8:12], "big")  # behind mvhd
    path.write_bytes(data[:at] + box(b"moov", moov[8:end], extra, moov[end:]) + data[at + size :])
    return path
