"""`dvla doctor`: what is installed, what each missing piece costs, how to get it."""

from __future__ import annotations

import importlib.util
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ...errors import UserError
from ..console import console, table
from ..packages import version_of


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    found: str | None  # version or description; None = missing
    costs: str = ""  # what does not work without it
    install: str = ""  # how to get it
    required: bool = False  # without it nothing works


REQUIRED = ("torch", "transformers", "peft", "av", "pyarrow", "google-crc32c", "distributed", "webdataset")
OPTIONAL = (  # package, what does not work without it, how to get it
    ("flash-attn", "nothing: torch's own attention is used", "pip install 'dvla[gpu]' on a CUDA machine"),
    (
        "lerobot",
        "`dvla data record` cannot write datasets (reading needs only av and pyarrow)",
        "pip install 'dvla[lerobot]'",
    ),
    ("metaworld", "`dvla demo` cannot run; no Meta-World tasks", "pip install 'dvla[sim]'"),
    ("mani-skill", "no ManiSkill tasks", "pip install 'dvla[maniskill]'; see docs/simulators.md"),
    ("gym-aloha", "no bimanual ALOHA tasks", "pip install 'dvla[aloha]'"),
    ("robosuite", "no dexterous-hand tasks", "pip install 'dvla[robosuite]'"),
    ("wandb", "no --wandb-mode; RUN/log.jsonl holds the same numbers", "pip install 'dvla[wandb]'"),
    ("rerun-sdk", "no `dvla rerun`; reports need nothing", "pip install 'dvla[rerun]'"),
    ("onnxruntime", "no `dvla export --format onnx`; torch-export works", "pip install 'dvla[onnx]'"),
    ("websockets", "no `dvla serve`", "pip install 'dvla[serve]'"),
    ("deepspeed", "no strategy zero2; ddp and fsdp2 work", "pip install 'dvla[deepspeed]'"),
    ("pyvista", "DexGraspNet scenes cannot be rendered", "pip install 'dvla[render]'"),
    ("dask-jobqueue", "no --slurm; --workers and --scheduler work", "pip install 'dvla[slurm]'"),
)


def examine() -> list[Finding]:
    """Look at this machine. Imports nothing but torch."""
    return [
        Finding("python", platform.python_version(), required=True),
        *(Finding(name, version_of(name), "nothing runs", "pip install dvla", required=True) for name in REQUIRED),
        Finding(
            "CUDA",
            _cuda(),
            "the 2 B VLM and the base model are slow on a CPU; the tiny sizes run",
            "a CUDA GPU with its driver, and a torch build for it",
        ),
        Finding("ffmpeg", _ffmpeg(), "no video can be decoded", "pip install av"),
        Finding(
            "headless OpenGL", _opengl(), "simulators cannot render images", "apt-get install libosmesa6 (or libegl1)"
        ),
        *(Finding(name, version_of(name), costs, install) for name, costs, install in OPTIONAL),
    ]


def _ffmpeg() -> str | None:
    return shutil.which("ffmpeg") or (f"libraries inside av {version}" if (version := version_of("av")) else None)


def _cuda() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return f"{torch.version.cuda}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else None


def _opengl() -> str | None:
    import ctypes.util

    return next((f"{name} ({found})" for name in ("OSMesa", "EGL") if (found := ctypes.util.find_library(name))), None)


def doctor_table(findings: list[Finding]) -> Table:
    """One row per piece: version, or what its absence costs and how to get it."""
    rows = [(f.name, f.found or "missing", *(("", "") if f.found else (f.costs, f.install))) for f in findings]
    return table(("piece", "found", "without it", "to get it"), rows)


def doctor_command(
    report: Annotated[
        bool, typer.Option("--report", help="Write what a bug report needs, as Markdown, without secrets.")
    ] = False,
    file: Annotated[
        Path | None,
        typer.Argument(help="With --report: file to write; default: standard output.", show_default=False),
    ] = None,
) -> None:
    """Show what is installed, what each missing piece costs and how to get it.

    Exit code 1 when a required one is missing.

    Example: dvla doctor

    Example: dvla doctor --report bug.md
    """
    if report:
        from .report import report as reported

        text = reported()
        if file is None:
            print(text, end="")
            return
        from ..files import write_output

        write_output(file, text.encode(), "file")
        console.print(f"{file}: written; read it once more, then attach it to the issue", markup=False)
        return
    if file is not None:
        raise UserError(f"{file}: a file is written with --report alone")
    findings = examine()
    console.print(doctor_table(findings))
    if any(f.required and f.found is None for f in findings):
        raise typer.Exit(1)
