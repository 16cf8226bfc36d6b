"""What every tracker is, and what several need."""

from __future__ import annotations

import math
import uuid
from pathlib import Path
from typing import Any, Protocol

from ....common.documents import Form, json_bytes, read_json
from ....common.files import write_file


class Tracker(Protocol):
    """One run in one tracker, resumed where the run folder has been tracked by it before."""

    def log(self, step: int, numbers: dict[str, Any]) -> None:
        """Numbers, and a few words, of a step."""

    def images(self, step: int, images: dict[str, tuple[Path, str]]) -> None:
        """Name → (PNG file, caption) of a step."""

    def close(self, failed: bool) -> None:
        """End it; `failed`: an error ended the training."""


class Identity(Form):
    """RUN/<tracker>.json: what the run is called there."""

    id: str
    project: str


def identity(run_folder: Path, tracker: str, project: str) -> Identity:
    """The run's own in a tracker: as in its file, which is made if needed. `UserError` for a damaged one."""
    file = run_folder / f"{tracker}.json"
    if not file.exists():
        write_file(file, json_bytes({"id": uuid.uuid4().hex[:8], "project": project}, indent=0))
    return Identity(**read_json(file, Identity, f"delete it to start a new {tracker} run"))


def flat(line: dict[str, Any]) -> dict[str, Any]:
    """A log line for charts: lists become "name/0", "name/1", …; numbers that are not finite are left out."""
    out: dict[str, Any] = {}
    for name, value in line.items():
        for key, number in (
            [(f"{name}/{i}", v) for i, v in enumerate(value)] if isinstance(value, list) else [(name, value)]
        ):
            if not isinstance(number, float) or math.isfinite(number):
                out[key] = number
    return out
