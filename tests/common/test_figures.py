"""What every figure has in common."""

from __future__ import annotations

import pytest

from dvla.common.figures import LIGHT, finish, new_figure


@pytest.mark.parametrize(
    "words", [("a", "b", "c"), ("stage two, training batches", "stage two, held-out episodes (averaged weights)") * 2]
)
def test_a_legend_below_stays_inside_the_figure(words: tuple[str, ...]) -> None:
    figure = new_figure(LIGHT, 7, 3.8)
    axis = figure.subplots()
    for i, word in enumerate(words):
        axis.plot([0, 1], [i, i], label=f"{i} {word}")
    finish(figure, "", LIGHT, "outside")
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and len(legend.get_texts()) == len(words)
