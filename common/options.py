"""Command-line options that several rooms share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

VlmPath = Annotated[Optional[str], typer.Option("--vlm-path", help="Checkpoint folder or hub id; default: the model's own.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Json = Annotated[Optional[Path], typer.Option("--json", help="File to write the same as JSON to.")]


Public = Annotated[bool, typer.Option("--public", help="A new repository is public; default: private.")]
