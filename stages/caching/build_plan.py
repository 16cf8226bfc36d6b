"""What a build makes: its plan, its fingerprint, and what it reuses of the previous generation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...cache.actions.slots import ACTION_SCHEMA_VERSION
from ...cache.readers import Source
from ...cache.store.cache import Cache
from ...cache.store.plan import BuildPlan, DatasetPlan
from ...cache.vlm.augment import AUGMENTATION_VERSION
from ...cache.vlm.encoder import VisionLanguageEncoder
from ...cache.vlm.load import load_encoder
from ...common import fingerprint as fp
from ...common.device import pick_device
from ...common.progress import Progress
from .config import SHARD_NBYTES, SHARD_ROWS, BuildConfig
from .generations import Earlier, require_only_new, same_features
from .sources import Corpus, choose_episodes, open_sources, read_corpus, sources_to_append

TRANSFORM_VERSION = 2  # raised when the build writes other content from the same inputs


@dataclass(frozen=True)
class Decision:
    """What a build has to make of its sources, and what it may reuse of the previous generation."""

    corpora: dict[str, Corpus]  # dataset → its plan and tables
    plan: BuildPlan
    fingerprint: dict[str, Any]  # without the plan
    unchanged: bool  # the finished cache is what was asked for
    reused: Earlier


def open_all(
    config: BuildConfig, earlier: Cache | None, say: Callable[[str], None]
) -> tuple[list[Source], VisionLanguageEncoder]:
    """The sources and the encoder of `config`; with `--append` also the sources of the finished cache `earlier`."""
    device = pick_device(config.device)  # refuses before anything is read
    sources = open_sources(config.sources, config.dataset_config, config.views, earlier, say)
    if earlier is not None and config.mode == "append":
        sources = sources_to_append(earlier, sources)
    choose_episodes(sources, config.select, None if earlier is None else earlier.fingerprint)
    return sources, load_encoder(config.encoder, device, say=say)


def decide(
    config: BuildConfig,
    sources: Sequence[Source],
    encoder: VisionLanguageEncoder,
    earlier: Cache | None,
    progress: Progress,
) -> Decision:
    """Read the sources' tables and hashes, and compare them with the finished cache `earlier` (None: a new one).

    `UserError` for changes that the mode of building refuses, and for observations longer than the encoder's context.
    """
    corpora = [read_corpus(source, encoder.reads, progress) for source in sources]
    plan = make_plan(config, [c.plan for c in corpora], encoder)
    fingerprint = make_fingerprint(encoder, corpora, config)
    unchanged = earlier is not None and not fp.diff(earlier.fingerprint, {**fingerprint, "store": plan.document()})
    if earlier is not None and unchanged and config.mode == "update":
        unchanged = not _readable_again(earlier, sources)
    if earlier is not None and not unchanged and config.mode == "append":
        require_only_new(earlier, fingerprint, plan)
    same = earlier is not None and not unchanged and same_features(earlier, fingerprint, plan)
    return Decision({c.plan.name: c for c in corpora}, plan, fingerprint, unchanged, Earlier(earlier if same else None))


def _readable_again(earlier: Cache, sources: Sequence[Source]) -> bool:
    """Whether an episode that could not be decoded when `earlier` was built, and has zeros in it, can be now."""
    opened = {source.name: source for source in sources}

    def decode(source: Source, episode: int) -> bool:
        return all(frame.size for view in source.load(episode).views for frame in view.frames())

    lost = [(opened[d.name], e) for d in earlier.datasets for e in d.episode_id[d.quarantined].tolist()]
    return any(source.attempt(functools.partial(decode, source), e) is True for source, e in lost)


def make_plan(config: BuildConfig, datasets: Sequence[DatasetPlan], encoder: VisionLanguageEncoder) -> BuildPlan:
    """What the cache will hold. `UserError` for observations longer than the encoder's context."""
    for dataset in datasets:
        encoder.require_fits(len(dataset.views), dataset.instructions)
    record = config.format.record_nbytes(encoder.tokens, encoder.width)
    return BuildPlan(
        tuple(datasets),
        encoder.tokens,
        encoder.width,
        config.shard_frames or max(1, min(SHARD_ROWS, SHARD_NBYTES // record)),
        config.format,
        config.frame_stride,
        config.augment,
    )


def make_fingerprint(encoder: VisionLanguageEncoder, corpora: Sequence[Corpus], config: BuildConfig) -> dict[str, Any]:
    """Everything the bytes depend on besides the plan (which the writer adds)."""
    return {
        "encoder": encoder.fingerprint(),
        "batch_size": config.batch_size,
        "transform_version": TRANSFORM_VERSION,
        "action_schema": ACTION_SCHEMA_VERSION,
        "augmentation": AUGMENTATION_VERSION if config.augment else None,
        "sources": {
            c.plan.name: {
                "revision": c.source.revision_hash,
                "config": c.source.config.name,
                "embodiment": c.source.config.embodiment,
                "action_map": c.source.action_map.to_dict(),
                "state_map": c.source.state_map.to_dict(),
                **({"normalize": c.source.config.normalize} if c.source.config.normalize else {}),
                **({"selection": c.source.choice.document()} if c.source.choice else {}),
            }
            for c in corpora
        },
    }
