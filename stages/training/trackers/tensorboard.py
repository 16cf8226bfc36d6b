"""TensorBoard: event files in RUN/tensorboard, on this machine only. `tensorboard --logdir runs` shows many runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np


class TensorboardTracker:
    """Event files of a run, one for each call of the training, complete up to the latest logged step."""

    def __init__(self, run_folder: Path, settings: dict[str, Any], step: int) -> None:
        """After `step` steps: what earlier files say of later ones, done again now, the new one declares void."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(run_folder / "tensorboard", purge_step=step + 1)
        if not step:
            text = json.dumps(settings, indent=1, ensure_ascii=False)
            self._writer.add_text("settings", f"```\n{text}\n```")

    def log(self, step: int, numbers: dict[str, Any]) -> None:
        for name, value in numbers.items():
            if isinstance(value, (int, float)) and name != "step":
                self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a killed run has what is before its checkpoint

    def images(self, step: int, images: dict[str, tuple[Path, str]]) -> None:
        from PIL import Image

        for name, (path, _) in images.items():
            pixels = np.asarray(Image.open(path).convert("RGB"))
            self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self, failed: bool) -> None:
        self._writer.close()
