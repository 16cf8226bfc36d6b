"""Where a run's numbers go: RUN/log.jsonl always, one JSON object per logged step; trackers on request."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ...common.files import write_file
from ...errors import UserError
from .config import TrainConfig
from .trackers.base import flat
from .trackers.catalogue import Trackers


class RunLog:
    """The log of one run, opened after `step` steps of it are done. Close it, or use it as a context manager.

    Lines of log.jsonl that belong to later steps are cut off: a run that was killed after its newest checkpoint does
    those steps again, and every step has one line.

    `settings` are the run's, as saved in config.json. Only the first rank makes a log. `UserError` when a tracker
    cannot begin."""

    def __init__(
        self,
        run_folder: Path,
        config: TrainConfig,
        settings: dict[str, Any],
        *,
        step: int,
        say: Callable[[str], None] = print,
    ) -> None:
        self._path = run_folder / "log.jsonl"
        run_folder.mkdir(parents=True, exist_ok=True)
        found = self._path.read_text() if self._path.exists() else ""
        if (kept := kept_lines(found, step)) != found:
            write_file(self._path, kept.encode())
        self._trackers = Trackers(run_folder, config, settings, step, say)
        self._file = open(self._path, "a")

    def log(self, line: dict[str, Any]) -> None:
        """Write one line, which names its "step"; readers see it at once. `UserError` when it cannot be written."""
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"cannot write {self._path}: {error.strerror or error}; the checkpoints are intact. Make room "
                "and rerun the same command"
            ) from None
        self._trackers.log(line["step"], flat(line))

    def images(self, step: int, images: dict[str, tuple[Path, str]]) -> None:
        """name → (PNG file, caption) of `step` for the trackers; without any the files are all there is."""
        self._trackers.images(step, images)

    def close(self, failed: bool = False) -> None:
        """End the log; `failed` marks the run as crashed."""
        with contextlib.suppress(OSError):  # the line that `log` could not write either
            self._file.close()
        self._trackers.close(failed)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)


def read_log(run_folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log.jsonl."""
    return [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]


def evaluations(log: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a log that hold an evaluation on held-out episodes."""
    return [line for line in log if "eval/mse" in line]


def kept_lines(text: str, step: int) -> str:
    """The intact lines of a log.jsonl that belong to steps 1…`step`; a line torn by a crash is dropped."""
    kept = []
    for line in text.splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    return "".join(kept)
