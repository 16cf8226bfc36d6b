"""`dvla data video`: an episode as an mp4 with all views, instruction, time, and curves of the native action.

The fixed parts are drawn once; each frame pastes the images and paints cursors and values. Letters: T frames of the
episode, d native action dimensions, H × W size of the canvas.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ...cache.readers import open_source
from ...cache.readers.episode import CorruptEpisode, Episode, View
from ...common.mp4 import mp4_writer
from ...common.progress import Progress
from ...errors import UserError
from .summary import column_names

WIDTH = 1280  # pixels of the canvas
VIEWS_HEIGHT = 420  # pixels, at most, of an image
ENLARGED = 4  # factor, at most, by which a small image is enlarged
PANEL_HEIGHT = 152  # pixels of a panel of curves; there are two columns of them
GAP, TEXT, SMALL = 12, 16, 12  # pixels: between things, font sizes
GUTTER, LEGEND, VALUE = 64, 132, 66  # pixels of a panel: left of its curves, right of them, of that for values
MOST_CURVES = 8  # in one panel
BACK, PLOT, GRID, DIM, BRIGHT = (22, 24, 28), (34, 37, 43), (70, 74, 82), (160, 166, 176), (238, 240, 243)
# fmt: off
COLORS = (
    (86, 180, 233), (230, 159, 0), (0, 190, 140), (240, 228, 66),
    (230, 100, 60), (214, 130, 190), (130, 140, 255), (205, 205, 205),
)
# fmt: on

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class VideoReport:
    """What was written."""

    path: Path
    frames: int
    fps: float
    width: int
    height: int


def write_episode(
    source: str,
    episode_id: int,
    out: Path,
    fps: float | None = None,
    dataset_config: str | None = None,
    progress: Progress = lambda *_: None,
) -> VideoReport:
    """Write one episode of a dataset as `out` (h264, yuv420p) with `fps` frames per second (None: as recorded).

    `UserError`, and no file, for a dataset, episode or name that cannot be used, a file that exists, or damaged data.
    """
    if out.suffix.lower() != ".mp4":
        raise UserError(f"{out}: give a name that ends in .mp4")
    if out.exists():
        raise UserError(f"{out} exists; choose another name")
    if fps is not None and not 0 < fps <= 1000:
        raise UserError(f"--fps {fps:g}: give a number above 0, at most 1000")
    opened = open_source(source, dataset_config, unmapped=True)
    names = opened.action_map.field_names if opened.config.mapped else column_names(opened)["action"]
    rate = fps or opened.fps
    if not opened.view_names:
        raise UserError(f"{opened.name} has no camera; a video needs one")
    try:
        episode = opened.load(episode_id)
        scene = Scene(episode, names)
        with contextlib.ExitStack() as closing, mp4_writer(out, rate) as write:
            streams = [view.frames() for view in episode.views]
            for stream in streams:
                if isinstance(stream, Generator):  # when closed, it releases what it reads
                    closing.callback(stream.close)
            for index, images in enumerate(zip(*streams, strict=True)):
                write(scene.frame(index, images))
                progress(f"{opened.name} episode {episode_id}: frames", index + 1, episode.length)
            if out.exists():
                raise UserError(f"{out} was created meanwhile; choose another name")
    except CorruptEpisode as error:
        raise UserError(f"{error}; `dvla data check` gives details") from None
    return VideoReport(out, episode.length, rate, scene.width, scene.height)


class Scene:
    """The canvas around an episode: everything that does not move, and where the rest goes."""

    def __init__(self, episode: Episode, names: Sequence[str]) -> None:
        """`names` [d] of the native action dimensions."""
        self._episode = episode
        groups = group_names(names)
        lines = wrap(episode.instruction or "(no instruction)", font(TEXT), WIDTH - 2 * GAP, 2)
        top = GAP + len(lines) * (TEXT + 6) + SMALL + 10
        self._text_at = (GAP, top - SMALL - 8)
        self._views, bottom, right = place_views(episode.views, top)
        beside = right <= WIDTH // 2
        panels = place_panels(
            len(groups), (right if beside else GAP, top if beside else bottom + GAP), 1 if beside else 2
        )
        self.width, self.height = WIDTH, even(max([bottom, *(box[3] for box in panels)]) + GAP)
        self._still = Image.new("RGB", (self.width, self.height), BACK)
        draw = ImageDraw.Draw(self._still)
        for i, line in enumerate(lines):
            draw.text((GAP, GAP + i * (TEXT + 6)), line, BRIGHT, font(TEXT))
        for view, box in zip(episode.views, self._views):
            draw.text(
                (box[0], box[1] - SMALL - 5),
                fit(f"{view.name}  {view.width}x{view.height}", font(SMALL), box[2] - box[0]),
                DIM,
                font(SMALL),
            )
        self._panels = [
            Panel(self._still, box, title, rows, episode.action, episode.timestamps)
            for box, (title, rows) in zip(panels, groups)
        ]

    def frame(self, index: int, images: Sequence[np.ndarray]) -> np.ndarray:
        """uint8 [H, W, 3] of frame `index`; `images` are its uint8 [h, w, 3], one per view."""
        episode, canvas = self._episode, self._still.copy()
        draw = ImageDraw.Draw(canvas)
        for image, (left, top, right, bottom) in zip(images, self._views):
            size = (right - left, bottom - top)
            how = Image.Resampling.BICUBIC if size[0] > image.shape[1] else Image.Resampling.BOX
            canvas.paste(Image.fromarray(image).resize(size, how), (left, top))
        times = episode.timestamps - episode.timestamps[0]
        draw.text(
            self._text_at,
            f"{episode.dataset}   episode {episode.episode_id}   frame {index} of 0-{episode.length - 1}   "
            f"{times[index]:.2f} s of {times[-1]:.2f} s",
            DIM,
            font(SMALL),
        )
        for panel in self._panels:
            panel.mark(draw, index)
        return np.asarray(canvas)


class Panel:
    """Curves of a few action dimensions over time, drawn once; `mark` paints the cursor and the values of one frame."""

    def __init__(
        self,
        canvas: Image.Image,
        box: Box,
        title: str,
        rows: Sequence[tuple[int, str]],
        action: np.ndarray,
        times: np.ndarray,
    ) -> None:
        """`rows`: (dimension, short name) of each curve; `action` [T, d] native; `times` [T] seconds."""
        left, top, right, bottom = box
        self._plot = (left + GUTTER, top + SMALL + 6, right - LEGEND, bottom - SMALL - 4)
        self._rows, self._values = rows, action[:, [d for d, _ in rows]].astype(np.float64)  # [T, curves]
        low, high = float(self._values.min()), float(self._values.max())
        if low == high:
            low, high = low - 0.5, high + 0.5
        self._x = self._plot[0] + (times - times[0]) / max(float(times[-1] - times[0]), 1e-9) * (
            self._plot[2] - self._plot[0] - 1
        )
        draw, small = ImageDraw.Draw(canvas), font(SMALL)
        draw.text((left, top), fit(title, small, right - left), BRIGHT, small)
        x0, y0, x1, y1 = self._plot
        for text, y in ((f"{high:.3g}", y0), (f"{low:.3g}", y1 - SMALL - 3)):
            draw.text((x0 - 6, y), text, DIM, small, anchor="ra")
        draw.text((x0, y1 + 1), "0 s", DIM, small)
        draw.text((x1, y1 + 1), f"{times[-1] - times[0]:.1f} s", DIM, small, anchor="ra")
        canvas.paste(self._curves((x1 - x0, y1 - y0), low, high), (x0, y0))
        self._lines = [y0 + i * min(SMALL + 3, (y1 - y0 + SMALL) // max(1, len(rows))) for i in range(len(rows))]
        for (_, name), color, y in zip(rows, COLORS, self._lines):
            draw.rectangle((x1 + 8, y + 4, x1 + 16, y + 9), color)
            draw.text((x1 + 20, y), fit(name, small, LEGEND - 20 - VALUE), DIM, small)

    def _curves(self, size: tuple[int, int], low: float, high: float) -> Image.Image:
        """The curves at twice the size, then halved: smooth lines."""
        drawn = Image.new("RGB", (2 * size[0], 2 * size[1]), PLOT)
        draw, pad = ImageDraw.Draw(drawn), 8
        y = 2 * size[1] - pad - (self._values - low) / (high - low) * (2 * size[1] - 2 * pad)  # [T, curves]
        x = 2 * (self._x - self._plot[0])
        if low < 0 < high:
            zero = 2 * size[1] - pad + low / (high - low) * (2 * size[1] - 2 * pad)
            draw.line((0, zero, 2 * size[0], zero), GRID, 2)
        for i in reversed(range(y.shape[1])):
            if len(x) == 1:
                draw.line((0, y[0, i], 2 * size[0], y[0, i]), COLORS[i], 3)
            draw.line(np.stack([x, y[:, i]], 1).ravel().tolist(), COLORS[i], 3)
        return drawn.resize(size, Image.Resampling.BOX)

    def mark(self, draw: ImageDraw.ImageDraw, index: int) -> None:
        """Paint frame `index`."""
        _, y0, x1, y1 = self._plot
        draw.line((self._x[index], y0, self._x[index], y1 - 1), BRIGHT, 1)
        for value, color, y in zip(self._values[index], COLORS, self._lines):
            draw.text((x1 + LEGEND - 2, y), number(value), color, font(SMALL), anchor="ra")


# --- layout -----------------------------------------------------------------------------------------------------------


def group_names(names: Sequence[str]) -> list[tuple[str, list[tuple[int, str]]]]:
    """Neighboring dimensions that differ in an index or axis only: (title, [(dimension, what differs)]), in order."""
    groups: list[tuple[str, list[tuple[int, str]]]] = []
    for i, name in enumerate(names):
        found = re.fullmatch(r"(.*_)(roll|pitch|yaw|[xyz])()", name) or re.fullmatch(r"(.*?)(\d+)(\D*)", name)
        title, short = (f"{found[1]}#{found[3]}", found[2]) if found else (name, str(i))
        if groups and groups[-1][0] == title and len(groups[-1][1]) < MOST_CURVES:
            groups[-1][1].append((i, short))
        else:
            groups.append((title, [(i, short)]))
    return [(f"{titled(title, rows, names)}   action {span(rows)}", rows) for title, rows in groups]


def titled(title: str, rows: Sequence[tuple[int, str]], names: Sequence[str]) -> str:
    """A group of one goes by its own name."""
    return names[rows[0][0]] if len(rows) == 1 else title


def span(rows: Sequence[tuple[int, str]]) -> str:
    return str(rows[0][0]) if len(rows) == 1 else f"{rows[0][0]}-{rows[-1][0]}"


def place_views(views: Sequence[View], top: int) -> tuple[list[Box], int, int]:
    """(box of each image, lower end, right end of all): up to three side by side at one height, below their labels."""
    boxes: list[Box] = []
    y, right = top, GAP
    columns = min(len(views), 3 if len(views) != 4 else 2)
    for first in range(0, len(views), columns):
        row = views[first : first + columns]
        y += SMALL + 6
        room = (WIDTH - GAP * (len(row) + 1)) / sum(v.width / v.height for v in row)
        height = int(
            min(room, VIEWS_HEIGHT if len(views) <= 3 else VIEWS_HEIGHT * 0.75, ENLARGED * min(v.height for v in row))
        )
        x = GAP
        for view in row:
            width = max(1, round(height * view.width / view.height))
            boxes.append((x, y, x + width, y + height))
            x += width + GAP
        y, right = y + height + GAP, max(right, x)
    return boxes, y - GAP, right


def place_panels(count: int, start: tuple[int, int], columns: int) -> list[Box]:
    """Boxes of `count` panels from `start` (left, top) to the right edge of the canvas, row by row."""
    left, top = start
    columns = min(columns, count)
    width = (WIDTH - left - GAP * columns) // max(1, columns)
    return [
        (
            left + (i % columns) * (width + GAP),
            top + (i // columns) * (PANEL_HEIGHT + GAP),
            left + (i % columns) * (width + GAP) + width,
            top + (i // columns) * (PANEL_HEIGHT + GAP) + PANEL_HEIGHT,
        )
        for i in range(count)
    ]


# --- text -------------------------------------------------------------------------------------------------------------


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib; PIL's own font where that is missing."""
    spec = importlib.util.find_spec("matplotlib")
    folder = spec.submodule_search_locations[0] if spec and spec.submodule_search_locations else ""
    path = Path(folder) / "mpl-data/fonts/ttf/DejaVuSans.ttf"
    if path.is_file():
        return ImageFont.truetype(str(path), size)
    return ImageFont.load_default(size)  # type: ignore[return-value]


def fit(text: str, face: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, cut with "…" where it is wider than `width` pixels."""
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def wrap(text: str, face: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """At most `most` lines of `width` pixels, broken between words; the last is cut with "…" where there is more."""
    lines, words = [""], text.split()
    for i, word in enumerate(words):
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or face.getlength(longer) <= width:
            lines[-1] = longer
        elif len(lines) < most:
            lines.append(word)
        else:
            lines[-1] = " ".join([lines[-1], *words[i:]])
            break
    return [fit(line, face, width) for line in lines]


def number(value: float) -> str:
    """A number in about eight characters."""
    size = abs(value)
    return f"{value:.2e}" if size >= 1000 or 0 < size < 1e-3 else f"{value:.5f}" if size < 0.1 else f"{value:.3f}"


def even(pixels: int) -> int:
    return pixels + pixels % 2
