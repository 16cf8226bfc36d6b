"""The sources behind a cache: opened again as they were built."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...common import fingerprint as fp
from ...common.config import from_mapping
from ...errors import UserError
from ..actions.selection import Choice
from ..readers import Source, open_source
from ..readers.config import DatasetConfig
from ..store.cache import Cache


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
    folder = Path(path).expanduser()
    name = folder.resolve().name if folder.exists() else Path(path).name.split("@")[0]
    by_path = {d.attributes["source"]: d for d in cache.datasets}
    by_name = {d.name: d for d in cache.datasets}
    dataset = by_path.get(str(folder.resolve())) or by_path.get(path) or by_name.get(name)
    return open_source(path, config_of(dataset.attributes) if dataset else None)


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
