"""How features are stored, as settings. Without torch, since the command line's help is made from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...errors import unknown

# stored dtype → (largest code, Zarr data type). float8 has no Zarr core type: its bytes are stored as uint8.
QUANTIZED = {"int8": (127.0, "int8"), "float8_e4m3fn": (448.0, "uint8")}
SHORT_NAMES = {"fp16": "float16", "int8": "int8", "fp8": "float8_e4m3fn"}  # as typed on the command line
COMPRESSIONS = ("none", "zstd", "lz4")


@dataclass(frozen=True)
class FeatureFormat:
    """How features are stored. Part of the fingerprint."""

    dtype: Literal["float16", "int8", "float8_e4m3fn"] = "float16"
    compression: Literal["none", "zstd", "lz4"] = "none"  # lossless, per record; for slow disks

    def __post_init__(self) -> None:
        if self.dtype != "float16" and self.dtype not in QUANTIZED:
            raise unknown("feature dtype", self.dtype, ["float16", *QUANTIZED])
        if self.compression not in COMPRESSIONS:
            raise unknown("compression", self.compression, COMPRESSIONS)

    @property
    def quantized(self) -> bool:
        """Whether records are codes with scales."""
        return self.dtype in QUANTIZED

    @property
    def zarr_dtype(self) -> str:
        """Data type of the stored array."""
        return QUANTIZED[self.dtype][1] if self.quantized else self.dtype

    @property
    def itemsize(self) -> int:
        """Bytes of one stored number."""
        return 1 if self.quantized else 2

    def record_nbytes(self, tokens: int, width: int) -> int:
        """Uncompressed bytes of one image's features [tokens, width], scales included."""
        return tokens * (width * self.itemsize + 4 * self.quantized)


def feature_format(dtype: str = "fp16", compression: str = "none") -> FeatureFormat:
    """The format of command-line names; `UserError` for others."""
    if dtype not in SHORT_NAMES:
        raise unknown("--dtype", dtype, SHORT_NAMES)
    return FeatureFormat(SHORT_NAMES[dtype], compression)  # type: ignore[arg-type]
