"""`dvla cache inspect --html`: what the page says of a cache is so, with and without the sources."""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np
import pytest

from dvla.cache.actions.normalizer import Normalizer
from dvla.cache.actions.schemes import Scheme
from dvla.cache.actions.slots import SLOTS
from dvla.cache.actions.statistics import RunningStatistics
from dvla.cache.store.cache import Cache
from dvla.stages.caching.upkeep.inspect import norm_strip, shown_rows
from dvla.stages.caching.upkeep.page import mask_figure, range_figure
from support import synthetic_cache as synthetic
from support.cli_runner import Dvla, refused
from support.html_links import Links


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "cache"
    synthetic.build(path)
    return path


def test_the_page(dvla: Dvla, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache.html"
    result = dvla("cache", "inspect", whole, "--html", out)
    assert result.code == 0 and "needs no network" in result.out
    page = out.read_text()
    found = Links(page)
    text = html.unescape(" ".join(found.text.split()))
    assert all(a.startswith(("data:image/", "#")) for a in found.addresses) and "<script" not in page
    for words in (
        "7 episodes of 1 to 30 frames",
        "alpha task 0",
        "3 instructions",
        "wrist",
        "eef_vel_x",
        "No images: the source of this cache is not on this machine",
        f"{Cache.open(whole).manifest['bytes'] / 1024:.1f} KiB",
    ):
        assert words in text, words
    refused(dvla("cache", "inspect", whole, "--html", tmp_path / "page.txt"), "ends in .html")
    refused(dvla("cache", "inspect", tmp_path, "--html", tmp_path / "page.html"), "is not a dvla cache")
    assert not (tmp_path / "page.html").exists()


def test_ranges_say_what_is_clipped() -> None:
    rng, places = np.random.default_rng(0), sorted([SLOTS["eef_vel_x"], SLOTS["gripper_open"]])
    values = np.zeros((4000, 128))
    values[:, places] = rng.standard_normal((4000, 2)).clip(-3, 3)

    def stats():
        running = RunningStatistics()
        running.update(values)
        return running.result()

    def figure_of(scheme: Scheme):
        normalizer = Normalizer(stats(), np.isin(np.arange(128), places), np.zeros(128, bool), scheme)
        return range_figure("cube", stats(), normalizer)

    figure = figure_of("std5-clipped")
    assert figure.get_suptitle() == "cube: nothing is clipped"
    x, _ = figure.axes[0].lines[0].get_data()
    assert np.allclose(x, (-0.6, 0.6), atol=0.02) and [t.get_text() for t in figure.axes[0].get_yticklabels()] == [
        "gripper_open",
        "eef_vel_x",
    ]
    values[0, places[0]] = 50
    assert "1 of 2 dimensions reach beyond ±1" in figure_of("std5-clipped").get_suptitle()
    assert figure_of("std5").get_suptitle() == "cube: nothing is clipped"


def test_masks_and_norms(whole: Path) -> None:
    cache = Cache.open(whole)
    figure = mask_figure(cache.datasets)
    assert figure.get_suptitle() == "Actions fill 15 of 128 slots; 15 of them in every dataset"
    picture = figure.axes[0].images[0].get_array()
    assert (
        picture.shape == (2, 20) and (picture[:, :15] == 3).all() and (picture[:, 15:] == 1).all()
    )  # the state has five more
    alpha = cache.named("alpha")
    rows = shown_rows(alpha, 4)
    assert len(rows) == 4 and not alpha.quarantined[alpha.episode_of(rows)].any()
    strip, (low, high) = norm_strip(alpha, "front", rows)
    norms = np.linalg.norm(alpha.features("front", rows).astype(np.float32), axis=-1)
    assert (low, high) == (norms.min(), norms.max()) and strip.dtype == np.uint8
