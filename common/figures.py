"""The look of every figure: one palette (Okabe and Ito's, which color-blind people can tell apart), light and dark.

Figures are made with matplotlib's objects alone, without pyplot's global state, so they may be drawn in any thread.
"""

from __future__ import annotations

import io
import itertools
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import unknown
from .files import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#999999"
SKY, AMBER, YELLOW = "#56B4E9", "#E69F00", "#F0E442"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, GREY, YELLOW)
"""Ordered so that neighbors differ in lightness too."""
MARKERS = "osD^vPX*"
DPI = 100  # of the PNGs


@dataclass(frozen=True)
class Style:
    """Colors by what they stand for."""

    name: str
    back: str  # of the figure
    text: str
    faint: str  # grids, spines
    expert: str = BLUE  # demonstrated actions
    predicted: str = ORANGE  # the policy's actions
    cycle: tuple[str, ...] = CYCLE  # of everything else
    map: str = "cividis"  # of heat maps: dark is low


LIGHT = Style("light", "#ffffff", "#1c1e22", "#c8ccd2")
DARK = Style(
    "dark",
    "#16181c",
    "#e8eaed",
    "#4a4f58",
    expert=SKY,
    predicted=AMBER,
    cycle=(SKY, AMBER, GREEN, PURPLE, YELLOW, ORANGE, GREY, BLUE),
)
STYLES = {style.name: style for style in (LIGHT, DARK)}


def style_named(name: str) -> Style:
    """The style of that name. `UserError` for an unknown one."""
    if name not in STYLES:
        raise unknown("style", name, STYLES)
    return STYLES[name]


def new_figure(style: Style, width: float = 8.0, height: float = 4.5) -> Figure:
    """An empty figure, `width` × `height` inches; draw on it, then `finish` it."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor=style.back)


def grid(figure: Figure, count: int, columns: int, **how: Any) -> Iterator[Axes]:
    """`count` axes in rows of `columns`."""
    columns = min(columns, count)
    axes = figure.subplots(-(-count // columns), columns, squeeze=False, **how).flat
    for i, axis in enumerate(axes):
        if i < count:
            axis.locator_params(nbins=4)
            yield axis
        else:
            axis.remove()


def label_bars(axis: Axes, values: Iterable[float], missing: str) -> None:
    """Write the value of each horizontal bar beside it; `missing` where it is NaN."""
    for row, value in enumerate(values):
        known = value == value
        axis.text(value if known else 0, row, f" {value:.3g}" if known else f" {missing}", va="center", fontsize=7)


def finish(
    figure: Figure, finding: str, style: Style, legend: Literal["upper right", "lower left", "outside"] = "upper right"
) -> Figure:
    """Title, legends and colors of a finished drawing; returns the figure.

    Args:
        finding: the title, one or two lines that say what the figure shows; may be empty.
        legend: where each axes with labels has its legend; "outside": one legend below all axes.
    """
    width = int(figure.get_figwidth() * 11)
    if finding:
        title = "\n".join(textwrap.wrap(finding, width))
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=style.text)
    for axis in figure.axes:
        axis.set_facecolor(style.back)
        axis.tick_params(which="both", colors=style.text, labelsize=8)
        for text in (axis.title, axis.xaxis.label, axis.yaxis.label):
            text.set_color(style.text)
        axis.title.set_fontsize(min(axis.title.get_fontsize(), 9))
        for label in (axis.xaxis.label, axis.yaxis.label, axis.xaxis.get_offset_text(), axis.yaxis.get_offset_text()):
            label.set_fontsize(8)
            label.set_color(style.text)
        for name, spine in axis.spines.items():
            spine.set_color(style.faint)
            spine.set_visible(name in ("left", "bottom", "outline"))
        for text in axis.texts:
            text.set_color(style.text)
        if legend != "outside" and axis.get_legend_handles_labels()[0]:
            axis.legend(  # never at "best": searching for it takes longer than drawing
                loc=legend, fontsize=8, labelcolor=style.text, facecolor=style.back, edgecolor="none", framealpha=0.8
            )
    if legend == "outside":
        named = {name: handle for axis in figure.axes for handle, name in zip(*axis.get_legend_handles_labels())}
        columns = _legend_columns(list(named), figure.get_figwidth())
        look = {"fontsize": 8, "frameon": False, "labelcolor": style.text}
        figure.legend(named.values(), named, loc="outside lower left", ncols=columns, **look)
    return figure


def _legend_columns(names: list[str], inches: float) -> int:
    """The most columns, five at most, in which names of a legend fit into a figure."""
    for columns in range(min(5, len(names)), 1, -1):
        rows, longer = divmod(len(names), columns)  # the first `longer` columns have one name more
        ends = list(itertools.accumulate([rows + 1] * longer + [rows] * (columns - longer), initial=0))
        widest = [max(map(len, names[a:b])) for a, b in itertools.pairwise(ends)]
        if sum(widest) + 6 * columns <= 15.6 * inches:  # characters; six for the line in front of a name
            return columns
    return 1


def say_nothing(figure: Figure, why: str, style: Style) -> Figure:
    """An empty figure whose title gives the reason why nothing can be shown."""
    figure.set_size_inches(8, 0.8)
    return finish(figure, why, style)


def save(figure: Figure, path: Path, dpi: int) -> None:
    """Write the figure as a PNG file, whole or not at all."""
    out = io.BytesIO()
    figure.savefig(out, dpi=dpi)
    write_file(path, out.getvalue())


def png(figure: Figure) -> bytes:
    """The figure as a PNG file of at most 256 colors, a third of the size that matplotlib writes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas, out = FigureCanvasAgg(figure), io.BytesIO()
    figure.set_dpi(DPI)
    canvas.draw()
    image = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba(), "raw", "RGBA", 0, 1)
    image.convert("RGB").quantize(256).save(out, "png", optimize=True)
    return out.getvalue()
