"""Weights & Biases.

RUN/wandb.json    the id of the W&B run, so that a resumed run continues in it
RUN/wandb/        W&B's own files (offline: `wandb sync RUN/wandb/offline-run-*` uploads them later)
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ....common.packages import require_package
from ....errors import UserError
from ..config import WandbConfig
from .base import identity


def require_wandb(mode: str) -> None:
    """`UserError` when this machine cannot log in that mode."""
    require_package("wandb", f"W&B mode {mode}", "wandb", instead="train with --wandb-mode disabled")
    if mode == "online":
        import wandb

        if not wandb.api.api_key:
            raise UserError(
                "W&B mode online needs an account and this machine is not logged in: run `wandb login`, or train with "
                "--wandb-mode offline and `wandb sync` later"
            )


class WandbTracker:
    """A W&B run. Of a step that comes twice W&B keeps the first values, which are the same. Prints nothing."""

    def __init__(self, run_folder: Path, config: WandbConfig, settings: dict[str, Any]) -> None:
        """`settings` without passwords; W&B gets neither code, git remote, host nor command line."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # no crash reports to its developers
        require_wandb(config.mode)
        import wandb

        try:
            self._run = wandb.init(
                project=config.project,
                name=config.name or run_folder.resolve().name,
                id=identity(run_folder, "wandb", config.project).id,
                mode=config.mode,
                dir=run_folder,
                resume="allow" if config.mode == "online" else None,
                config=settings,
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

    def log(self, step: int, numbers: dict[str, Any]) -> None:
        self._run.log(numbers, step=step)

    def images(self, step: int, images: dict[str, tuple[Path, str]]) -> None:
        from wandb import Image

        self._run.log({name: Image(str(path), caption=text) for name, (path, text) in images.items()}, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
