"""Rollouts as one mp4 grid that plays all episodes side by side, and as a png of their first and last frames.

Letters: E episodes, F frames of one episode, H, W frame size. A green border means success, a red one failure.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ...common.files import write_file
from ...common.mp4 import mp4_writer
from ...errors import UserError

SUCCESS, FAILURE, EMPTY = (46, 160, 67), (207, 34, 46), (32, 32, 32)
BORDER = 4  # pixels
LABEL_HEIGHT = 14  # pixels, above a cell when labels are given


def write_grid(
    episodes: Sequence[np.ndarray],
    successes: Sequence[bool],
    path: Path,
    labels: Sequence[str] | None = None,
    columns: int = 5,
    fps: float = 20.0,
) -> None:
    """Write E episodes as one mp4 (h264, yuv420p), `columns` side by side; ended episodes hold their last frame.

    Args:
        episodes: E arrays uint8 `[F, H, W, 3]` of equal H and W; the border is colored on an episode's last frame.

    Raises:
        UserError: when there are no episodes.
    """
    _check(episodes, successes, labels)
    with mp4_writer(path, round(fps)) as write:
        for t in range(max(len(frames) for frames in episodes)):
            cells, colors = [], []
            for frames, won in zip(episodes, successes):
                cells.append(frames[min(t, len(frames) - 1)])
                colors.append(EMPTY if t < len(frames) - 1 else SUCCESS if won else FAILURE)
            write(_grid(cells, colors, labels, columns))


def write_grid_image(
    episodes: Sequence[np.ndarray],
    successes: Sequence[bool],
    path: Path,
    labels: Sequence[str] | None = None,
    columns: int = 5,
) -> None:
    """Write a png with the first and the last frame of each of E episodes next to each other."""
    _check(episodes, successes, labels)
    pairs = [np.concatenate([frames[0], frames[-1]], axis=1) for frames in episodes]
    grid = _grid(pairs, [SUCCESS if won else FAILURE for won in successes], labels, columns)
    encoded = io.BytesIO()
    Image.fromarray(grid).save(encoded, format="png")
    write_file(Path(path), encoded.getvalue())


def _check(episodes: Sequence[np.ndarray], successes: Sequence[bool], labels: Sequence[str] | None) -> None:
    if not episodes:
        raise UserError("no episode was recorded; request at least one (record_video)")
    if len(successes) != len(episodes) or (labels is not None and len(labels) != len(episodes)):
        raise ValueError(
            f"{len(episodes)} episodes, {len(successes)} successes, {'no' if labels is None else len(labels)} labels"
        )
    if len({frames.shape[1:] for frames in episodes}) != 1 or any(not len(frames) for frames in episodes):
        raise ValueError(f"episodes of different frame sizes or without frames: {[f.shape for f in episodes]}")


def _grid(
    cells: Sequence[np.ndarray], colors: Sequence[tuple[int, int, int]], labels: Sequence[str] | None, columns: int
) -> np.ndarray:
    """uint8 image of the cells, row by row, with colored borders and labels; even sides, as h264 requires."""
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    height, width = cells[0].shape[:2]
    top = LABEL_HEIGHT if labels is not None else 0
    step_y, step_x = height + 2 * BORDER + top, width + 2 * BORDER
    full_h, full_w = rows * step_y, columns * step_x
    canvas = Image.new("RGB", (full_w + full_w % 2, full_h + full_h % 2), EMPTY)
    draw = ImageDraw.Draw(canvas)
    for i, cell in enumerate(cells):
        y, x = (i // columns) * step_y, (i % columns) * step_x
        draw.rectangle((x, y + top, x + step_x - 1, y + step_y - 1), fill=colors[i])
        canvas.paste(Image.fromarray(cell), (x + BORDER, y + top + BORDER))
        if labels is not None:
            draw.text((x + BORDER, y + 1), labels[i][: step_x // 6], fill=(230, 230, 230))
    return np.asarray(canvas)
