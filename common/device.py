"""The device that a setting such as `auto`, `cpu` or `cuda:1` means."""

from __future__ import annotations

import re

import torch

from ..errors import UserError


def pick_device(name: str) -> torch.device:
    """The device of a `--device` setting; `UserError` for CUDA where there is none."""
    if name not in ("auto", "cpu", "cuda") and not re.fullmatch(r"cuda:\d+", name):
        raise UserError(f"device '{name}' is not one of auto, cpu, cuda, cuda:N")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device '{name}': torch finds no CUDA device on this machine; run `dvla doctor`, or use cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
