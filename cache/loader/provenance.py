"""The sources behind a cache: opened again as they were built."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...common import fingerprint as fp
from ...common.config import from_mapping
from ...errors import UserError
from ..actions.selection import Choice
from ..readers import Source, open_source
from ..readers.config import DatasetConfig
from ..readers.search import NoConfig
from ..store.cache import Cache
from ..store.dataset import CacheDataset


def sources_of(cache: Cache, paths: Sequence[str] = ()) -> list[Source]:
    """The sources a cache was built from, in its order, opened with the same settings: at `paths`, or where they were.

    `UserError` naming a dataset of the cache for which there is no source."""
    found = {}
    for path in paths or [d.attributes["source"] for d in cache.datasets]:
        source = as_cached(cache, path)
        found[source.name] = source
    missing = [d.name for d in cache.datasets if d.name not in found]
    if missing:
        raise UserError(
            f"no source was given for dataset '{missing[0]}' of cache {cache.path} "
            f"(given: {', '.join(found) or 'none'}); add its folder"
        )
    return [found[d.name] for d in cache.datasets]


def as_cached(cache: Cache, path: str) -> Source:
    """Open `path` with the settings of the cached dataset of the same path or name; as a new dataset without one."""
    dataset = cached_at(cache, path)
    return open_source(path, config_of(dataset.attributes) if dataset else None)


def cached_at(cache: Cache, path: str) -> CacheDataset | None:
    """The dataset that was read from `path`, else the one of its name."""
    folder = Path(path).expanduser()
    by_path = {d.attributes["source"]: d for d in cache.datasets}
    by_name = {d.name: d for d in cache.datasets}
    return by_path.get(str(folder.resolve())) or by_path.get(path) or by_name.get(name_at(path))


def name_at(path: str) -> str:
    """What a dataset at `path` is called in a cache and a policy."""
    folder = Path(path).expanduser()
    return folder.resolve().name if folder.exists() else Path(path).name.split("@")[0]


def with_own_map(cache: Cache | None, path: str, say: Callable[[str], None]) -> Source:
    """Open `path` with the dataset config that is found for it; with that of the cached dataset where none is found, or
    one of another name."""
    dataset, found = cached_at(cache, path) if cache else None, None
    try:
        found = open_source(path)
    except NoConfig:
        if dataset is None:
            raise
    own = dataset.attributes["dataset_config"] if dataset else None
    if dataset is None or found is not None and found.config.name == own:
        assert found is not None
        return found
    say(f"{path}: read with the map '{own}' of the cache; --dataset-config takes another")
    return open_source(path, config_of(dataset.attributes))


def config_of(attributes: dict[str, Any]) -> DatasetConfig:
    """The dataset config that a cached dataset was read with, including its views."""
    config = from_mapping(DatasetConfig, attributes["config"], "cache")
    return dataclasses.replace(config, views=tuple(attributes["views"]))


def choice_of(cache: Cache, name: str) -> Choice:
    """Which of a source's demonstrations the cache was built from."""
    return Choice.from_document(cache.fingerprint.get("sources", {}).get(name, {}).get("selection", {}))


def require_sources(cache: Cache, sources: list[Any]) -> None:
    """`UserError` naming what differs when a source's metadata or field map is not what the cache was built from."""
    for source in sources:
        entry = cache.fingerprint["sources"].get(source.name)
        if entry is not None and entry["revision"] != source.revision_hash:
            lines = fp.diff({"revision": entry["revision"]}, {"revision": source.revision_hash}, now="it has")
            raise UserError(f"source {source.path} is not the one cache {cache.path} was built from ({lines[0]})")
