"""Where a run's numbers go: RUN/log.jsonl always, Weights & Biases when it is asked for.

RUN/log.jsonl     one JSON object per logged step; needs nothing and no account
RUN/wandb.json    the id of the W&B run, so that a resumed run continues in it
RUN/wandb/        W&B's own files (offline: `wandb sync RUN/wandb/offline-run-*` uploads them later)
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

from ...common.documents import Field, Form, json_value, read_file, read_json, require_form
from ...common.files import write_file
from ...common.packages import require_package
from ...common.text import public
from ...errors import UserError
from .config import WandbConfig


def require_wandb(config: WandbConfig) -> None:
    """`UserError` when this machine cannot log in the mode that is asked for; call it before a run folder is made."""
    if config.mode == "disabled":
        return
    require_package("wandb", f"W&B mode {config.mode}", "wandb", instead="train with --wandb-mode disabled")
    if config.mode == "online":
        import wandb

        if not wandb.api.api_key:
            raise UserError(
                "W&B mode online needs an account and this machine is not logged in: run `wandb login`, or train with "
                "--wandb-mode offline and `wandb sync` later"
            )


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
    grad_norm: Number = 0.0
    lr: Number = 0.0
    samples_per_second: Annotated[float, Field(gt=0)]
    wait_share: Annotated[float, Field(ge=0)]
    binds: str = "compute"


class WandbForm(Form):
    """wandb.json."""

    id: Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,64}$")]
    project: str


class Tracker:
    """The log of one run, opened after `step` steps of it are done. Close it, or use it as a context manager.

    Lines of log.jsonl that belong to later steps are cut off: a run that was killed after its newest checkpoint does
    those steps again, and every step has one line. W&B keeps the first value, which is the same.

    `settings` are the run's, as saved in config.json; W&B gets them without passwords in addresses, and neither code,
    git remote, host nor command line. Only the first rank makes a Tracker. `UserError` when W&B cannot begin."""

    def __init__(self, run_folder: Path, wandb: WandbConfig, settings: dict[str, Any], *, step: int) -> None:
        self._path = run_folder / "log.jsonl"
        run_folder.mkdir(parents=True, exist_ok=True)
        found = read_file(self._path) if self._path.exists() else b""
        if (kept := kept_lines(found, self._path, step)) != found:
            write_file(self._path, kept)
        self._run = None if wandb.mode == "disabled" else _begin_wandb(run_folder, wandb, settings)
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
        if self._run is not None:
            self._run.log(flat(line), step=line["step"])

    def images(self, step: int, images: dict[str, tuple[Path, str]]) -> None:
        """name → (PNG file, caption) of `step` for W&B; without it the files are all there is."""
        if self._run is not None:
            from wandb import Image

            self._run.log(
                {name: Image(str(path), caption=caption) for name, (path, caption) in images.items()}, step=step
            )

    def close(self, failed: bool = False) -> None:
        """End the log; `failed` marks the W&B run as crashed."""
        with contextlib.suppress(OSError):  # the line that `log` could not write either
            self._file.close()
        if self._run is not None:
            self._run.finish(exit_code=int(failed))
            self._run = None

    def __enter__(self) -> Tracker:
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


def flat(line: dict[str, Any]) -> dict[str, Any]:
    """A log line for W&B's charts: lists become "name/0", "name/1", …; numbers that are not finite are left out."""
    out: dict[str, Any] = {}
    for name, value in line.items():
        for key, number in (
            [(f"{name}/{i}", v) for i, v in enumerate(value)] if isinstance(value, list) else [(name, value)]
        ):
            if not isinstance(number, float) or math.isfinite(number):
                out[key] = number
    return out


def _begin_wandb(run_folder: Path, config: WandbConfig, settings: dict[str, Any]) -> Any:
    """The W&B run of this folder, new or resumed. Prints nothing."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # no crash reports to its developers
    require_wandb(config)
    import wandb

    file = run_folder / "wandb.json"
    if not file.exists():
        write_file(file, (json.dumps({"id": uuid.uuid4().hex[:8], "project": config.project}) + "\n").encode())
    identity = read_json(file, WandbForm, "delete it to start a new W&B run")["id"]
    try:
        return wandb.init(
            project=config.project,
            name=config.name or run_folder.resolve().name,
            id=identity,
            mode=config.mode,
            dir=run_folder,
            resume="allow" if config.mode == "online" else None,
            config=public(settings),
            save_code=False,
            settings=wandb.Settings(
                silent=True,
                console="off",
                show_warnings=False,
                disable_git=True,
                disable_code=True,
                disable_job_creation=True,
                x_disable_meta=True,
                x_save_requirements=False,
            ),
        )
    except wandb.Error as error:
        raise UserError(
            f"W&B did not start ({' '.join(str(error).split())}); train with --wandb-mode offline or disabled"
        ) from None
