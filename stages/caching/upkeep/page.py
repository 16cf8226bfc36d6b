"""`dvla cache inspect --html`: what is in a cache as one page, with thumbnails of sources that are on this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .... import __version__
from ....cache.actions.normalizer import Normalizer
from ....cache.actions.slots import slots
from ....cache.actions.statistics import Statistics
from ....cache.loader.provenance import config_of, sources_of
from ....cache.readers import Source, open_source
from ....cache.readers.episode import CorruptEpisode
from ....cache.store.cache import Cache
from ....cache.store.dataset import CacheDataset
from ....common.figures import LIGHT, Style, finish, new_figure
from ....common.progress import Progress
from ....common.text import public, size
from ....errors import UserError
from ...reports.html import image_uri, picture, require_page, write_page
from .inspect import DatasetFacts, inspect, norm_strip, shown_rows
from .status import one_status

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 4  # frames of each view
HEIGHT = 120  # pixels of a thumbnail
TEXTS = 12  # instructions listed


def range_figure(name: str, stats: Statistics, normalizer: Normalizer, style: Style = LIGHT) -> Figure:
    """Range of every active dimension in normalized units: all of it (thin), 1 to 99 % (thick), and the median."""
    active = np.flatnonzero(normalizer.mask).tolist()
    figure = new_figure(style, 8, 0.22 * len(active) + 1.3)
    axis, outside = figure.subplots(), int(normalizer.clips(stats).sum())
    for n, i in enumerate(active):
        center, half = normalizer.center[i], normalizer.half_range[i]
        low, high = ((x[i] - center) / half for x in (stats.min, stats.max))
        axis.plot((low, high), (n, n), color=style.expert, linewidth=1)
        if stats.quantiles is not None and {0.01, 0.5, 0.99} <= set(stats.quantiles):
            first, middle, last = ((stats.quantiles[q][i] - center) / half for q in (0.01, 0.5, 0.99))
            axis.plot((first, last), (n, n), color=style.expert, linewidth=5, solid_capstyle="butt", alpha=0.6)
            axis.plot(middle, n, "|", color=style.predicted, markersize=9)
    for edge in (-1, 1):
        axis.axvline(edge, color=style.text, linewidth=0.8, linestyle="--")
    axis.set_yticks(range(len(active)), [slots()[i].name for i in active])
    axis.invert_yaxis()
    axis.set_xlabel(f"normalized ({normalizer.scheme}); thin: all, thick: 1 to 99 %, mark: median; dashed: ±1")
    verdict = "nothing is clipped"
    if outside:
        verdict = f"{outside} of {len(active)} dimensions reach beyond ±1 and are clipped there"
    return finish(figure, f"{name}: {verdict}", style)


def mask_figure(datasets: Sequence[CacheDataset], style: Style = LIGHT) -> Figure:
    """Which of the 128 slots each dataset fills, in its actions and in its state."""
    from matplotlib.colors import ListedColormap

    used = np.flatnonzero(np.any([d.action_mask | d.proprio_mask for d in datasets], 0))
    table = np.stack([d.action_mask[used] * 2 + d.proprio_mask[used] for d in datasets]).astype(
        float
    )  # [datasets,slots]
    figure = new_figure(style, max(6.0, 0.24 * len(used) + 2), 0.3 * len(datasets) + 2.6)
    axis, colors = figure.subplots(), (style.faint, style.cycle[2], style.predicted, style.expert)
    axis.imshow(table, aspect="auto", cmap=ListedColormap(colors), vmin=-0.5, vmax=3.5, interpolation="nearest")
    for n, label in ((3, "action and state"), (2, "action alone"), (1, "state alone"), (0, "neither")):
        axis.plot([], [], "s", color=colors[n], label=label)
    axis.set_xticks(range(len(used)), [slots()[i].name for i in used], rotation=90)
    axis.set_yticks(range(len(datasets)), [d.name for d in datasets])
    shared = int(np.all([d.action_mask for d in datasets], 0).sum())
    filled = int(np.any([d.action_mask for d in datasets], 0).sum())
    return finish(figure, f"Actions fill {filled} of 128 slots; {shared} of them in every dataset", style, "outside")


def write_cache_page(path: Path, out: Path, given: Sequence[str] = (), progress: Progress = lambda *_: None) -> int:
    """Write the page of the cache at `path`; returns its bytes.

    `given`: sources that moved. `UserError` as `Cache.open` and `write_page`.
    """
    require_page(out)
    facts, cache = inspect(path), Cache.open(path)
    moved = dict(zip((d.name for d in cache.datasets), sources_of(cache, given))) if given else {}
    arrays = one_status(path).arrays
    shown: list[dict[str, Any]] = []
    for i, (d, fact) in enumerate(zip(cache.datasets, facts.datasets)):
        mine = [(a.array, a.shards, a.bytes) for a in arrays if a.dataset == d.name]
        shown.append(_dataset(d, fact, moved.get(d.name), mine))
        progress("datasets", i + 1, len(cache.datasets))
    tiles = [
        ("datasets", len(facts.datasets)),
        ("episodes", sum(d.episodes for d in facts.datasets)),
        ("frames", sum(d.frames for d in facts.datasets)),
        ("observations", sum(d.observations for d in facts.datasets)),
        ("quarantined", sum(d.quarantined for d in facts.datasets)),
        ("total", size(facts.bytes)),
        ("files", facts.files),
        ("tokens × width", f"{cache.tokens} × {cache.width}"),
    ]
    return write_page(
        out,
        "cache.html",
        version=__version__,
        made=time.strftime("%Y-%m-%d %H:%M"),
        name=Path(path).resolve().name,
        tiles=tiles,
        datasets=shown,
        masks=picture(lambda style: mask_figure(cache.datasets, style)),
        encoder=public(facts.encoder),
        fingerprint=public(facts.fingerprint),
    )


def _dataset(
    d: CacheDataset, fact: DatasetFacts, source: Source | None, arrays: list[tuple[str, int, int]]
) -> dict[str, Any]:
    """One dataset for the template."""
    rows = shown_rows(d, SHOWN)
    photos, said = _photos(d, rows, source)
    views = []
    for view in d.views:
        strip, (low, high) = norm_strip(d, view, rows)
        norms = image_uri(Image.fromarray(strip), "png")
        views.append({"name": view, "photos": photos.get(view, []), "norms": norms, "low": low, "high": high})
    actions = d.statistics("action"), d.action_normalizer
    return {
        "name": fact.name,
        "fact": fact,
        "views": views,
        "said": said,
        "texts": fact.instructions[:TEXTS],
        "more": len(fact.instructions) - TEXTS,
        "range": picture(lambda style: range_figure(f"Actions of {fact.name}", *actions, style)),
        "arrays": [(array, shards, size(n)) for array, shards, n in arrays],
        "steps": ", ".join(map(str, rows.tolist())),
        "source": public(fact.source),
    }


def _photos(d: CacheDataset, rows: np.ndarray, source: Source | None) -> tuple[dict[str, list[str]], str]:
    """(view → data URIs of the frames `rows`, why there are none). A remote source is not fetched for this."""
    where = d.attributes.get("source", "")
    try:
        if source is None:
            if not where or not Path(where).exists():
                missing = public(where) or "of this cache"
                return {}, f"No images: the source {missing} is not on this machine; give --source."
            source = open_source(where, config_of(d.attributes))
        found: dict[str, list[str]] = {view: [] for view in d.views}
        for row, position in zip(rows.tolist(), d.episode_of(rows).tolist()):
            episode = source.load(int(d.episode_id[position]))
            for view in episode.views:
                if view.name in found:
                    step = row - int(d.episode_start[position])
                    found[view.name].append(_thumbnail(next(view.frames(step, step + 1))))
        return found, ""
    except (UserError, CorruptEpisode, OSError, KeyError) as error:
        return {}, f"No images: {public(' '.join(str(error).split()))}"


def _thumbnail(frame: np.ndarray) -> str:
    picture = Image.fromarray(frame)
    picture.thumbnail((3 * HEIGHT, HEIGHT))
    return image_uri(picture, "jpeg", quality=85)
