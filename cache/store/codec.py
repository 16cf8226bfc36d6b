"""Feature quantization and compression: 16- or 8-bit features with scales, and lossless compression of records.

An 8-bit feature is code · token_scale · channel_scale. Channels of a VLM differ by orders of magnitude, and the largest
would use up the range of a token: so each channel is first divided by its RMS (`channel_scale`, measured once per
cache), and then each token gets its own scale. On Qwen3-VL features that leaves a relative error of about 0.008 with
int8 and 0.022 with fp8; per-token scales alone leave 0.06 to 0.18. Letters: K tokens, D width, n images.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from ...errors import UserError
from .feature_format import QUANTIZED, FeatureFormat

CHANNEL_FLOOR = 1e-6  # scale of a channel that is zero in the measured frames


def channel_scale(features: torch.Tensor) -> np.ndarray:
    """RMS of each channel over `features` [..., D], never 0: float32 [D]."""
    flat = features.detach().flatten(0, -2).double()
    return flat.square().mean(0).sqrt().clamp(min=CHANNEL_FLOOR).float().cpu().numpy()


def quantize(features: torch.Tensor, channels: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """features [n,K,D] (finite), channel scales [D] → (codes int8 or uint8 [n,K,D], token scales float32 [n,K])."""
    largest, _ = QUANTIZED[dtype]
    x = features.float() / channels  # [n,K,D]
    scale = x.abs().amax(-1) / largest  # [n,K]
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # a token of zeros
    x = x / scale[..., None]
    codes = x.round().to(torch.int8) if dtype == "int8" else x.to(torch.float8_e4m3fn).view(torch.uint8)
    return codes, scale


def dequantize(codes: torch.Tensor, scale: torch.Tensor, channels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Undo `quantize` up to rounding: codes [...,K,D], token scales [...,K], channel scales [D] → `dtype` [...,K,D]."""
    x = codes.float() if codes.dtype == torch.int8 else codes.view(torch.float8_e4m3fn).float()
    return (x * scale[..., None] * channels).to(dtype)


def relative_error(features: torch.Tensor, format: FeatureFormat, channels: np.ndarray) -> tuple[float, float]:
    """(overall, worst channel): RMS of the storage error over the RMS of `features` [n,K,D]."""
    exact = features.detach().float()
    stored = features.half().float()
    if format.quantized:
        scales = torch.from_numpy(channels).to(exact.device)
        stored = dequantize(*quantize(exact, scales, format.dtype), scales, torch.float32)
    difference, size = (stored - exact).square().flatten(0, -2).mean(0), exact.square().flatten(0, -2).mean(0)  # [D]
    overall = (difference.mean() / size.mean().clamp(min=1e-30)).sqrt()
    worst = (difference / size.clamp(min=CHANNEL_FLOOR**2)).max().sqrt()
    return float(overall), float(worst)


class Compression:
    """A lossless compression for records of `itemsize`-byte numbers: a Zarr core codec, by numcodecs."""

    def __init__(self, name: Literal["zstd", "lz4"], itemsize: int) -> None:
        try:
            from numcodecs import Blosc, Zstd
        except ImportError as error:
            raise UserError(f"compression {name} needs numcodecs ({error}); pip install numcodecs") from None
        self.name, self._itemsize = name, itemsize
        self._codec: Any = Zstd(level=3) if name == "zstd" else Blosc("lz4", clevel=5, shuffle=Blosc.SHUFFLE)

    def document(self) -> list[dict[str, Any]]:
        """The Zarr v3 codecs that follow `bytes`."""
        if self.name == "zstd":
            return [{"name": "zstd", "configuration": {"level": 3, "checksum": False}}]
        settings = {"cname": "lz4", "clevel": 5, "shuffle": "shuffle", "typesize": self._itemsize, "blocksize": 0}
        return [{"name": "blosc", "configuration": settings}]

    def encode(self, record: np.ndarray) -> bytes:
        """One record, C-contiguous, of the array's dtype."""
        return bytes(self._codec.encode(record))

    def decode(self, data: bytes, target: memoryview) -> None:
        """Fill `target`, one record. `ValueError` for data that is not a record of that size."""
        if self.name == "lz4":  # Blosc trusts its header and would read past the end of a truncated record
            sizes = tuple(int.from_bytes(data[at : at + 4], "little") for at in (4, 12))
            if sizes != (len(target), len(data)):
                raise ValueError(f"its header says {sizes} bytes, plain and compressed, not {len(target), len(data)}")
        elif (size := _zstd_nbytes(data)) != len(target):  # before as much is allocated
            raise ValueError(f"its header says {size} bytes, not {len(target)}")
        try:
            plain = self._codec.decode(data)
        except Exception as error:  # numcodecs raises RuntimeError, ValueError and its own, by codec
            raise ValueError(str(error)) from None
        view = memoryview(plain).cast("B")
        if len(view) != len(target):
            raise ValueError(f"{len(view)} bytes, {len(target)} expected")
        target[:] = view


def _zstd_nbytes(data: bytes) -> int | None:
    """The size that the header of a Zstandard frame says it has decompressed (RFC 8878); None where it says none."""
    if len(data) < 6:
        return None
    single, kind = data[4] >> 5 & 1, data[4] >> 6
    begin, length = 5 + (not single) + (0, 1, 2, 4)[data[4] & 3], (single, 2, 4, 8)[kind]
    return int.from_bytes(data[begin : begin + length], "little") + 256 * (length == 2) if length else None
