"""Which trackers a run has asked for, and opening them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ....common.packages import require_package
from ....common.text import first_line, public
from ....errors import UserError
from ..config import TrainConfig, WandbConfig
from .base import Tracker
from .tensorboard import TensorboardTracker
from .trackio import TrackioTracker
from .weights_and_biases import WandbTracker, require_wandb

Say = Callable[[str], None]


def _wandb(config: TrainConfig) -> WandbConfig | None:
    """How W&B is used: --tracker wandb means online where --wandb-mode says nothing else."""
    if config.wandb.mode != "disabled":
        return config.wandb
    return dataclasses.replace(config.wandb, mode="online") if "wandb" in config.trackers else None


def require_trackers(config: TrainConfig) -> None:
    """`UserError` when this machine lacks what a tracker needs; call it before a run folder is made."""
    if (wandb := _wandb(config)) is not None:
        require_wandb(wandb.mode)
    for name in ("tensorboard", "trackio"):
        if name in config.trackers:
            require_package(name, f"--tracker {name}", name)


class Trackers:
    """All trackers of a run. One that fails while it trains is closed with a line; the training goes on."""

    def __init__(self, run_folder: Path, config: TrainConfig, settings: dict[str, Any], step: int, say: Say) -> None:
        """After `step` steps; `settings` as saved in config.json. `UserError` for one that cannot begin."""
        settings, wandb = public(settings), _wandb(config)
        self._open: dict[str, Tracker] = {}
        self._say = say
        makers: dict[str, Callable[[], Tracker]] = {
            "tensorboard": lambda: TensorboardTracker(run_folder, settings, step),
            "trackio": lambda: TrackioTracker(run_folder, config.wandb, settings),
        }
        chosen = {name: make for name, make in makers.items() if name in config.trackers}
        if wandb is not None:
            chosen["wandb"] = lambda: WandbTracker(run_folder, wandb, settings)
        for name, make in chosen.items():
            try:
                self._open[name] = make()
            except Exception as error:  # each package has its own
                self.close(failed=True)
                if isinstance(error, UserError):
                    raise
                raise UserError(f"{name} did not start ({first_line(error)}); train without --tracker {name}") from None

    def __bool__(self) -> bool:
        return bool(self._open)

    def log(self, step: int, numbers: dict[str, Any]) -> None:
        self._each(lambda tracker: tracker.log(step, numbers))

    def images(self, step: int, images: dict[str, tuple[Path, str]]) -> None:
        self._each(lambda tracker: tracker.images(step, images))

    def close(self, failed: bool) -> None:
        self._each(lambda tracker: tracker.close(failed))
        self._open = {}

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                do(tracker)
            except Exception as error:  # whatever it is, the run is worth more, and log.jsonl has its numbers
                del self._open[name]
                self._say(
                    f"{name} failed and gets nothing more of this run: {type(error).__name__}: {first_line(error)}"
                )
                with contextlib.suppress(Exception):
                    tracker.close(failed=True)
