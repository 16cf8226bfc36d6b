"""The device that a setting such as `auto`, `cpu` or `cuda:1` means."""

from __future__ import annotations

import re

import torch

from ..errors import UserError


def pick_device(name: str) -> torch.device:
    """The device of a `--device` setting; `UserError` for CUDA where there is none.

    On CUDA it switches cuDNN's attention off, which torch prefers on Hopper from 2.11 on: with a mask its gradient can
    be NaN at lengths of 64 modulo 128 (pytorch/pytorch#196678). Torch's flash and memory-efficient kernels remain."""
    if name not in ("auto", "cpu", "cuda") and not re.fullmatch(r"cuda:\d+", name):
        raise UserError(f"device '{name}' is not one of auto, cpu, cuda, cuda:N")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device '{name}': torch finds no CUDA device on this machine; run `dvla doctor`, or use cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        count = torch.cuda.device_count()
        if int(name.partition(":")[2] or 0) >= count:
            raise UserError(f"device '{name}': this machine has {count} CUDA devices, cuda:0 to cuda:{count - 1}")
        torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device(name)
