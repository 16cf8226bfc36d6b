"""What the benchmarks share: alternating turns, medians with their range, the machine in a line, the tiny tower.

torch is imported only where it is used, so that a benchmark of memory does not measure it.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from dvla.cache.vlm.tiny_qwen3vl import TinySpec


def tower(depth: int = 6, width: int = 256, heads: int = 4, out_width: int = 512, **more: int) -> TinySpec:
    """A vision tower of Qwen3-VL's architecture with little text around it, for random weights."""
    from dvla.cache.vlm.tiny_qwen3vl import TinySpec

    shape = {"vision_depth": depth, "vision_width": width, "vision_heads": heads, "out_width": out_width}
    return TinySpec(**{**shape, "text_layers": 1, "vocabulary": 512, **more})


QWEN3VL_2B = {"depth": 24, "width": 1024, "heads": 16, "position_grid": 48, "out_width": 2048}  # its real vision tower


def turns(names: Iterable[str], repeats: int) -> Iterator[tuple[int, str]]:
    """(repeat, name): every name once per repeat, in the opposite order in every other repeat."""
    names = list(names)
    for repeat in range(repeats):
        for name in names[:: 1 if repeat % 2 else -1]:
            yield repeat, name


def ratios(top: Iterable[float], bottom: Iterable[float]) -> list[float]:
    """Of two measurements, within the same repeat."""
    return [a / b for a, b in zip(top, bottom)]


def spread(values: list[float], form: str = ".3g") -> str:
    """Median (minimum – maximum)."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} – {max(values):{form}})"


def machine(device: str = "cpu") -> str:
    """Processor or GPU, load, and torch's version and threads."""
    import torch

    name = f"{torch.cuda.get_device_name(device)}, " if device.startswith("cuda") else ""
    return (
        f"{name}{os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}; torch {torch.__version__}, "
        f"threads: {torch.get_num_threads()}"
    )


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
