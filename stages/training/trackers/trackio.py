"""trackio: in its own folder on this machine (TRACKIO_DIR), or wherever its environment variables say.

RUN/trackio.json    project and id, so that a resumed run continues in its own. `trackio show --project PROJECT` draws.
"""

from __future__ import annotations

import contextlib
import inspect
import io
from pathlib import Path
from typing import Any

from ..config import WandbConfig
from .base import identity


class TrackioTracker:
    """A run of trackio. Steps that it has already, done again after a crash, are left out. Prints nothing."""

    def __init__(self, run_folder: Path, config: WandbConfig, settings: dict[str, Any]) -> None:
        import trackio

        own, known = identity(run_folder, "trackio", config.project), inspect.signature(trackio.init).parameters
        quiet: Any = {name: False for name in ("embed", "auto_log_gpu", "auto_log_cpu") if name in known}
        name = f"{config.name or run_folder.resolve().name}-{own.id}"
        with contextlib.redirect_stdout(io.StringIO()):
            self._run = trackio.init(own.project, name, config=settings, resume="allow", **quiet)
        self._first: int = getattr(self._run, "_next_step", 0)  # that it does not have

    def log(self, step: int, numbers: dict[str, Any]) -> None:
        if step >= self._first:
            self._run.log({name: value for name, value in numbers.items() if name != "step"}, step=step)

    def images(self, step: int, images: dict[str, tuple[Path, str]]) -> None:
        from trackio import Image

        if step >= self._first:
            found = {name: Image(str(path), caption=text) for name, (path, text) in images.items()}
            self._run.log(found, step=step)

    def close(self, failed: bool) -> None:
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()  # not the run's own, after which it would finish once more, and say so, at the exit
