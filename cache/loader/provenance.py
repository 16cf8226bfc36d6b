"""The sources behind a cache: opened again as they were built."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...common import fingerprint as fp
from ...common.config import from_mapping
from ...errors import UserError
from ..readers import Source, open_source
from ..readers.config import DatasetConfig
from ..store.cache import Cache


def sources_of(cache: Cache, paths: Sequence[str] = ()) -> list[Source]:
    """The sources a cache was built from, opened as they were then, at `paths` or where they were; in the cache's order.

    `UserError` naming a dataset of the cache for which there is no source."""
    found = {}
    for path in paths or [d.attributes["source"] for d in cache.datasets]:
        source = _as_cached(cache, path)
        found[source.name] = source
    missing = [d.name for d in cache.datasets if d.name not in found]
    if missing:
        raise UserError(
            f"cache {cache.path} holds dataset '{missing[0]}', for which no source was given "
            f"(given: {', '.join(found) or 'none'}); add its folder"
        )
    return [found[d.name] for d in cache.datasets]


def _as_cached(cache: Cache, path: str) -> Source:
    """Open `path` as the cached dataset that lies, or is called, like it was opened; as any dataset when there is none."""
    folder = Path(path).expanduser()
    name = folder.resolve().name if folder.exists() else Path(path).name.split("@")[0]
    by_place = {d.attributes["source"]: d for d in cache.datasets}
    by_name = {d.name: d for d in cache.datasets}
    dataset = by_place.get(str(folder.resolve())) or by_place.get(path) or by_name.get(name)
    return open_source(path, config_of(dataset.attributes) if dataset else None)


def config_of(attributes: dict[str, Any]) -> DatasetConfig:
    """The dataset config a cached dataset was read with, its views among it."""
    config = from_mapping(DatasetConfig, attributes["config"], "cache")
    return dataclasses.replace(config, views=tuple(attributes["views"]))


def require_sources(cache: Cache, sources: list[Any]) -> None:
    """`UserError` naming what differs when a source's `meta/` or field map is not the one the cache was built from."""
    for source in sources:
        entry = cache.fingerprint["sources"].get(source.name)
        if entry is not None and entry["revision"] != source.revision_hash:
            lines = fp.diff({"revision": entry["revision"]}, {"revision": source.revision_hash})
            raise UserError(f"source {source.path} is not the one cache {cache.path} was built from ({lines[0]})")
