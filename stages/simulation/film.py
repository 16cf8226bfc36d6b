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

SUCCESS, FAILURE, EMPTY = (46, 160, 67), (207, 34, 46), (32, 32, 32)
COLUMNS, FPS = 5, 20
BORDER, LABEL_HEIGHT = 4, 14  # pixels


def write_grids(
    episodes: Sequence[np.ndarray], successes: Sequence[bool], labels: Sequence[str], path: Path, columns: int = COLUMNS
) -> None:
    """Write `path`.mp4 (h264, yuv420p), all episodes side by side, and `path`.png, first and last frame of each.

    Args:
        episodes: E ≥ 1 arrays uint8 `[F, H, W, 3]` of equal H and W. In the video, ended episodes hold their last
            frame, on which the border takes its color.
    """
    ends = [SUCCESS if won else FAILURE for won in successes]
    with mp4_writer(path.with_suffix(".mp4"), FPS) as write:
        for t in range(max(len(frames) for frames in episodes)):
            last = [t >= len(frames) - 1 for frames in episodes]
            cells = [frames[min(t, len(frames) - 1)] for frames in episodes]
            write(_grid(cells, [end if ended else EMPTY for end, ended in zip(ends, last)], labels, columns))
    pairs = [np.concatenate([frames[0], frames[-1]], axis=1) for frames in episodes]
    png = io.BytesIO()
    Image.fromarray(_grid(pairs, ends, labels, columns)).save(png, format="png")
    write_file(path.with_suffix(".png"), png.getvalue())


def _grid(
    cells: Sequence[np.ndarray], colors: Sequence[tuple[int, int, int]], labels: Sequence[str], columns: int
) -> np.ndarray:
    """uint8 image of the cells, row by row, with colored borders and labels; even sides, as h264 requires."""
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    height, width = cells[0].shape[:2]
    step_y, step_x = height + 2 * BORDER + LABEL_HEIGHT, width + 2 * BORDER
    full_h, full_w = rows * step_y, columns * step_x
    canvas = Image.new("RGB", (full_w + full_w % 2, full_h + full_h % 2), EMPTY)
    draw = ImageDraw.Draw(canvas)
    for i, (cell, color, label) in enumerate(zip(cells, colors, labels, strict=True)):
        y, x = (i // columns) * step_y, (i % columns) * step_x
        draw.rectangle((x, y + LABEL_HEIGHT, x + step_x - 1, y + step_y - 1), fill=color)
        canvas.paste(Image.fromarray(cell), (x + BORDER, y + LABEL_HEIGHT + BORDER))
        draw.text((x + BORDER, y + 1), label[: step_x // 6], fill=(230, 230, 230))
    return np.asarray(canvas)
