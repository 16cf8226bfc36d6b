"""The JSON documents of a cache: written with a fixed byte form, read with one message when a cache is incomplete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...common import files


def json_bytes(document: dict[str, Any]) -> bytes:
    """Readable JSON with a fixed byte form. `ValueError` for NaN or infinity."""
    return files.json_bytes(document, allow_nan=False)


def read_json(path: Path) -> dict[str, Any]:
    """One of a cache's JSON files; `UserError` when it cannot be read."""
    return files.read_json(path, "; is this a whole cache? run `dvla cache verify` on it")
