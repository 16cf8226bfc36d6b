"""The dataset index that is built before decoding: the plan, the tables, and how sources are opened again later.

Letters: N frames of a dataset, D feature width.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...cache.actions.extremes import extremes
from ...cache.actions.idle import bands, idle_frames
from ...cache.actions.normalizer import Normalizer
from ...cache.actions.selection import Choice, Selection
from ...cache.actions.statistics import Statistics, statistics_of
from ...cache.loader.provenance import as_cached, with_own_map
from ...cache.loader.select import not_kept
from ...cache.readers import Source, open_source
from ...cache.readers.episode import Episode
from ...cache.readers.search import load_config
from ...cache.store.cache import Cache
from ...cache.store.plan import DatasetPlan, DatasetTables, EpisodePlan
from ...cache.vlm.encoder import VisionLanguageEncoder
from ...cache.vlm.observations import to_float16
from ...cache.vlm.spec import EncoderSpec
from ...common.progress import Progress
from ...errors import Failed, UserError, unknown


@dataclass
class Corpus:
    """One source, read once: its plan and its tables."""

    source: Source
    plan: DatasetPlan
    action: np.ndarray  # [N,128] float32 unified
    proprio: np.ndarray  # [N,128] float32 unified
    timestamp: np.ndarray  # [N] float64
    view_sizes: dict[str, list[int]] = field(default_factory=dict)
    idle: float | None = None  # share of idle frames, where these are dropped
    failed: tuple[int, ...] = ()  # episodes whose demonstration is marked as failed

    @functools.cached_property
    def statistics(self) -> tuple[Statistics, Statistics]:
        """Of action and proprio."""
        return statistics_of(self.action), statistics_of(self.proprio)

    def remarks(self) -> list[str]:
        """What to know about the dataset, one line each."""
        source, texts = self.source, self.plan.episodes
        lines = [note.text for note in source.notes()]
        if source.choice:
            idle = "" if self.idle is None else f", {self.idle:.0%} of frames idle"
            left, listed = len(source.left_out), len(source.left_out) + len(source.episode_ids)
            lines.append(f"{left} of {listed} episodes left out by {source.choice}{idle}")
        if self.failed:
            count, shown = len(self.failed), ", ".join(map(str, self.failed[:6])) + ", …" * (len(self.failed) > 6)
            marked = f"{count} of {len(texts)} demonstrations marked as failed ({shown})"
            lines.append(f"{marked}; --success-only leaves them out")
        empty = sum(not e.instruction.strip() for e in texts)
        if empty:
            share = f"{empty} of {len(texts)} episodes ({empty / len(texts):.0%}) have no instruction"
            lines.append(f"{share}; where all share one, give `instruction` in the dataset config")
        return [f"{self.plan.name}: {line}" for line in (*lines, *self._extremes())]

    def _extremes(self) -> list[str]:
        """What to say of values far from all others, or cut off by the normalization that the dataset config asks."""
        lines, source = [], self.source
        maps, scheme = (source.action_map, source.state_map), source.config.normalize or "std5"
        tables = zip(("action", "state"), maps, (self.action, self.proprio), self.statistics)
        for table, fields, values, stats in tables:
            ends = zip(self.plan.episodes, self.plan.starts.tolist())
            rows = ((e.episode_id, values[start : start + e.length]) for e, start in ends)
            normalizer = Normalizer(stats, fields.mask, fields.rotation_slots, scheme)
            lines += extremes(table, stats, normalizer, rows).lines(self.plan.name)
        return lines


def open_sources(
    paths: Sequence[str],
    dataset_config: str | None = None,
    views: Sequence[str] = (),
    earlier: Cache | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[Source]:
    """Open every source, with only `views` of its cameras when some are named; without `dataset_config`, a dataset of
    the cache `earlier` keeps its map. `UserError` when two have one name, since a cache names its datasets after them,
    or when a source has none of the views."""
    config = load_config(dataset_config) if dataset_config else None
    sources = [open_source(path, config) if config else with_own_map(earlier, path, say) for path in paths]
    names = [s.name for s in sources]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two sources are named '{name}'; rename one of the folders")
    if not views:
        return sources
    everywhere = {v for s in sources for v in s.view_names}
    for view in views:
        if view not in everywhere:
            raise unknown("view", view, everywhere)
    return [_with_views(path, source, views) for path, source in zip(paths, sources)]


def sources_to_append(cache: Cache, given: Sequence[Source]) -> list[Source]:
    """The cache's own sources, in its order, each replaced by one of its name in `given`, and the rest of `given`."""
    by_name = {s.name: s for s in given}
    own = [
        by_name.pop(d.name) if d.name in by_name else as_cached(cache, d.attributes["source"]) for d in cache.datasets
    ]
    return own + list(by_name.values())


def choose_episodes(sources: Sequence[Source], selection: Selection, earlier: Mapping[str, Any] | None = None) -> None:
    """List only the chosen episodes of each source. `UserError` where no demonstration says whether it succeeded.

    `earlier`: the fingerprint of the cache that is built further, whose selection stays; `UserError` for another one.
    """
    given = selection.by_dataset([s.name for s in sources])
    if earlier is not None:
        for source in sources:
            entry = earlier["sources"].get(source.name)
            if entry is None:
                continue
            asked, stored = given[source.name], entry.get("selection", {})
            keys = functools.partial(source.attempt, source.key_of)
            if asked and asked.numbered(source.episode_ids, source.name, keys).document() != stored:
                raise UserError(
                    f"{source.name} was built with {Choice.from_document(stored) or 'all episodes'}, and the cache "
                    f"keeps that: leave {asked} out, or build another cache"
                )
            given[source.name] = Choice.from_document(stored)
    for source in sources:
        source.choose(given[source.name])
    if selection.success_only and not any(
        isinstance(s.attempt(s.success_of, number), bool) for s in sources for number in (*s.left_out, *s.episode_ids)
    ):
        raise UserError("--success-only: no demonstration says whether it succeeded; leave it out")


def read_corpus(source: Source, reads: str, progress: Progress) -> Corpus:
    """Tables and plan of a source. What cannot be loaded is quarantined by name, and nothing else is lost.
    `reads`: the encoder's; what a view's features depend on, and so when they have to be made again."""
    episodes: list[EpisodePlan] = []
    failed: list[Failed] = []
    unsuccessful: list[int] = []
    actions, states, times, sizes = [], [], [], {}
    for i, number in enumerate(source.episode_ids):
        episode = source.attempt(source.load, number)
        if isinstance(episode, Failed):
            failed.append(episode)
        else:
            hashes = _view_hashes(episode, reads)
            source.choice.require_frames(number, episode.length, source.name)
            episodes.append(EpisodePlan(number, episode.length, episode.instruction, episode.source_hash, hashes))
            actions.append(source.action_map.to_unified(episode.action))
            states.append(source.state_map.to_unified(episode.state))
            times.append(episode.timestamps)
            sizes = {v.name: [v.height, v.width] for v in episode.views}
            unsuccessful += [number] if source.attempt(source.success_of, number) is False else []
        progress(f"{source.name}: tables", i + 1, len(source.episode_ids))
    if not episodes:
        raise source.no_usable_episode(failed, "run on a complete copy of the dataset")
    quarantined = tuple((f.episode, str(f)) for f in failed)
    entries, idle = _with_kept(source, episodes, actions, states)
    plan = DatasetPlan(source.name, source.view_names, tuple(entries), quarantined)
    action, proprio, timestamp = (np.concatenate(values) for values in (actions, states, times))
    return Corpus(source, plan, action, proprio, timestamp, sizes, idle, tuple(unsuccessful))


def _with_kept(
    source: Source, episodes: list[EpisodePlan], actions: list[np.ndarray], states: list[np.ndarray]
) -> tuple[list[EpisodePlan], float | None]:
    """The episodes with the frames that are kept of each, and the share of idle frames where these are dropped."""
    choice = source.choice
    if not choice.drop_idle and choice.frames is None:
        return episodes, None
    out = [not_kept(choice, e.episode_id, e.length) for e in episodes]
    share = None
    if choice.drop_idle:
        tables = ((actions, source.action_map), (states, source.state_map))
        spread = [bands(statistics_of(*parts), fields.mask) for parts, fields in tables]
        idle = [idle_frames(list(zip(pair, spread)), source.control_hz) for pair in zip(actions, states)]
        share, out = float(np.concatenate(idle).mean()), [a | b for a, b in zip(out, idle)]
    return [dataclasses.replace(e, kept=_ranges(~left)) for e, left in zip(episodes, out)], share


def _ranges(kept: np.ndarray) -> tuple[tuple[int, int], ...]:
    """The stretches [first, end) of a bool [T] that are set."""
    edges = np.flatnonzero(np.diff(kept.astype(np.int8), prepend=0, append=0)).tolist()
    return tuple(zip(edges[::2], edges[1::2]))


def _view_hashes(episode: Episode, reads: str) -> tuple[str, ...]:
    """sha256 hex of each view over what its features depend on, `VisionLanguageEncoder.reads`: its images, also the
    instruction, also the other views in their order."""
    if reads == "image":
        return tuple(view.sha256 for view in episode.views)
    views = [[view.name, view.sha256] for view in episode.views]
    seen: list[object] = [views] * len(views) if reads == "observation" else list(views)
    return tuple(hashlib.sha256(json.dumps([each, episode.instruction]).encode()).hexdigest() for each in seen)


def located(spec: EncoderSpec) -> EncoderSpec:
    """The spec with a folder by its absolute path, so that training, evaluation and workers find it from anywhere."""
    folder = Path(spec.path).expanduser()
    return dataclasses.replace(spec, path=str(folder.resolve()) if folder.is_dir() else spec.path)


def make_tables(corpus: Corpus, encoder: VisionLanguageEncoder) -> DatasetTables:
    """All of a dataset that is not vision features."""
    source, plan, what = corpus.source, corpus.plan, f"{corpus.plan.name}: text"
    text, length = encoder.encode_text(plan.instructions)  # [n,Lt,D], [n]
    null_text, _ = encoder.encode_text([""])  # [1,1,D]
    null_image = to_float16(encoder.null_image_features(len(plan.views)), f"{plan.name}: black frame")  # [V,K,D]
    stats = corpus.statistics
    starts = source.starts or {}
    attributes = {
        "dataset_config": source.config.name,
        "config": source.config.document(),
        "embodiment_name": source.config.embodiment,
        "license": source.config.license,
        "view_sizes": corpus.view_sizes,
        "sampling_weight": source.config.sampling_weight,
        "action_map": source.action_map.to_dict(),
        "state_map": source.state_map.to_dict(),
        "environment": source.environment,
        "source": source.location,
        "encoder": dataclasses.asdict(located(encoder.spec)),
        "starts": [starts[e.episode_id] for e in plan.episodes if e.episode_id in starts],
        **({"failed": list(corpus.failed)} if corpus.failed else {}),
        **_visible(encoder, plan.instructions),
        **({} if encoder.image_span == (0, encoder.tokens, 1) else {"image_tokens": list(encoder.image_span)}),
    }
    return DatasetTables(
        action=corpus.action,
        action_mask=source.action_map.mask,
        action_rotation=source.action_map.rotation_slots,
        action_stats=stats[0],
        proprio=corpus.proprio,
        proprio_mask=source.state_map.mask,
        proprio_rotation=source.state_map.rotation_slots,
        proprio_stats=stats[1],
        timestamp=corpus.timestamp,
        text=to_float16(text, what),
        text_length=length.cpu().numpy(),
        null_text=to_float16(null_text, what)[0],
        null_features=dict(zip(plan.views, null_image)),
        embodiment=source.config.embodiment_id,
        control_hz=source.control_hz,
        attributes=attributes,
    )


def _visible(encoder: VisionLanguageEncoder, instructions: Sequence[str]) -> dict[str, Any]:
    """How many tokens of a record are real for each instruction and for none, where some are not."""
    found, none = [encoder.visible(text) for text in instructions], encoder.visible("")
    return {} if {*found, none} == {encoder.tokens} else {"visible": found, "null_visible": none}


def _with_views(path: str, source: Source, views: Sequence[str]) -> Source:
    mine = tuple(v for v in views if v in source.view_names)
    if not mine:
        raise UserError(f"{path} has none of the views {', '.join(views)}; it has {', '.join(source.view_names)}")
    return open_source(path, dataclasses.replace(source.config, views=mine))
