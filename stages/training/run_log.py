"""Where a run's numbers go: RUN/log.jsonl always, one JSON object per logged step; trackers on request."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

from ...common.documents import Field, Form, json_value, read_file, require_form
from ...common.files import write_file
from ...errors import UserError
from .config import TrainConfig
from .trackers.base import flat
from .trackers.catalogue import Trackers

Number = Annotated[float, Field(allow_inf_nan=True)]


class StepForm(Form, extra="allow", allow_inf_nan=True):
    """What of a line a training that resumes must know."""

    step: Annotated[int, Field(ge=1, le=10**12)]


class LineForm(StepForm):
    """A line of log.jsonl; it may have further numbers, e.g. of an evaluation."""

    __pydantic_extra__: dict[str, Number]

    loss: Number
    mse: Number
    drift: Number = 0.0
    scale: Number = 0.0
    mean_square: list[Number] = []  # one for each temperature
    layer_weights: list[Number] = []  # one for each layer of the VLM, where the policy mixes several
    grad_norm: Number = 0.0
    lr: Number = 0.0
    samples_per_second: Annotated[float, Field(gt=0)]
    wait_share: Annotated[float, Field(ge=0)]
    binds: str = "compute"


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
        found = read_file(self._path) if self._path.exists() else b""
        if (kept := kept_lines(found, self._path, step)) != found:
            write_file(self._path, kept)
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
    """The lines of a run's log.jsonl, but a last one that is being written. `UserError` for a damaged one."""
    path = run_folder / "log.jsonl"
    lines = [line for _, line in parsed_lines(read_file(path), path, LineForm)]
    if len({len(line["mean_square"]) for line in lines if line.get("mean_square")}) > 1:
        raise UserError(f"{path} is damaged: its lines have mean_square of several lengths; restore it from a copy")
    return lines


def parsed_lines(data: bytes, path: Path, form: type[Form]) -> list[tuple[bytes, dict[str, Any]]]:
    """(text, value) of the lines of a log.jsonl; a last line without its end, torn by a crash, is left out.

    `UserError` naming the first other line that is damaged, or whose step does not follow the one before."""
    *lines, _ = data.split(b"\n")
    found: list[tuple[bytes, dict[str, Any]]] = []
    for n, line in enumerate(lines, 1):
        where, remedy = f"{path} line {n}", "remove that line from the log; the checkpoints are not affected"
        try:
            value = json_value(line.decode(), nan=True)  # a metric may be NaN
        except ValueError as error:
            raise UserError(f"{where} is damaged: {error}; {remedy}") from None
        require_form(value, where, form, remedy)
        if found and value["step"] <= found[-1][1]["step"]:
            raise UserError(
                f"{where} is damaged: its step {value['step']} comes after {found[-1][1]['step']}; {remedy}"
            )
        found.append((line, value))
    return found


def evaluations(log: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a log that hold an evaluation on held-out episodes."""
    return [line for line in log if "eval/mse" in line]


def kept_lines(data: bytes, path: Path, step: int) -> bytes:
    """The lines of a log.jsonl that belong to steps 1…`step`; `UserError` as `parsed_lines`."""
    return b"".join(text + b"\n" for text, line in parsed_lines(data, path, StepForm) if line["step"] <= step)
