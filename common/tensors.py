"""The one gate of every safetensors file: its header is compared with what is expected before a tensor is loaded.

safetensors itself refuses a header that does not fit the file's bytes, so no shape asks for memory the file lacks.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from .documents import open_regular, shown
from .text import first_line, printable

MOST_TENSORS = 100_000  # of a file; the largest vision-language models have a few thousand
_BLOCK = 1 << 24  # values that are looked at together
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
}


class TensorFile:
    """An open file: `header` holds its tensors by name, on the meta device (shape and type, no memory)."""

    def __init__(self, path: Path, file: Any) -> None:
        self.path, self._file = path, file
        names = list(file.keys())
        if len(names) > MOST_TENSORS:
            raise UserError(f"{path} is damaged: it holds {len(names)} tensors, expected at most {MOST_TENSORS}")
        self.header = {name: self._meta(name) for name in names}

    def _meta(self, name: str) -> torch.Tensor:
        part = self._file.get_slice(name)
        if (dtype := _DTYPES.get(part.get_dtype())) is None:
            raise UserError(f"{self.path} is damaged: {shown(name)} is of type {part.get_dtype()}, which is never used")
        return torch.empty(part.get_shape(), dtype=dtype, device="meta")

    def load(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The tensors of these names; `UserError` naming the first that is not finite."""
        tensors = {}
        for name in names:
            tensors[name] = self._file.get_tensor(name)
            if not _finite(tensors[name]):
                raise UserError(f"{self.path} is damaged: {shown(name)} is not finite")
        return tensors


def _finite(tensor: torch.Tensor) -> bool:
    parts = tensor.flatten().split(_BLOCK) if tensor.is_floating_point() else ()
    return all(bool(part.isfinite().all()) for part in parts)


@contextlib.contextmanager
def open_tensors(path: Path, remedy: str = "copy it again") -> Iterator[TensorFile]:
    """A safetensors file. `UserError`, which ends with `remedy`, for one that cannot be read or is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        os.close(open_regular(path))  # safetensors would wait for a pipe
        with safe_open(path, framework="pt") as file:
            yield TensorFile(Path(path), file)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or first_line(error)}; {remedy}") from None
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({printable(first_line(error))[:120]}); {remedy}") from None


def require_tensors(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], where: Path | str, what: str
) -> None:
    """`UserError` unless `found` has the names, shapes and types of `expected`. Both may be on the meta device.

    `what`: whose tensors these are, in the message.
    """
    wrong = [f"{name} is missing" for name in expected if name not in found]
    wrong += [f"{shown(name)} belongs to no part of it" for name in found if name not in expected]
    wrong += [
        f"{name} is {form_of(found[name])}, expected {form_of(tensor)}"
        for name, tensor in expected.items()
        if name in found and (found[name].shape, found[name].dtype) != (tensor.shape, tensor.dtype)
    ]
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(f"{where} does not hold {what}: {wrong[0]}{more}")


def form_of(tensor: torch.Tensor) -> str:
    """Type and shape in a message."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
