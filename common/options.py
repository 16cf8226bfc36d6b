"""Command-line options that several rooms share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

VlmPath = Annotated[
    str | None, typer.Option("--vlm-path", help="Checkpoint folder or hub id; default: the model's own.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Json = Annotated[Path | None, typer.Option("--json", help="File to write the same as JSON to.")]


Public = Annotated[bool, typer.Option("--public", help="A new repository is public; default: private.")]
