"""The device that a setting such as `auto`, `cpu` or `cuda:1` means."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import torch

from ..errors import UserError
from .text import size


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


def peak_memory() -> int:
    """Bytes of memory that this process has held at most, libraries included."""
    status = Path("/proc/self/status")  # getrusage counts what the parent had before it
    found = re.search(r"VmHWM:\s*(\d+)", status.read_text()) if status.exists() else None
    return 1024 * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def peak_line() -> str:
    """The memory that this process has held at most, on its GPU too, for people."""
    on_gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    return f"peak memory of this process: {size(peak_memory())}" + (f", {size(on_gpu)} on its GPU" if on_gpu else "")
