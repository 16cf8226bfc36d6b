"""An export in WebDataset tars with the interface of `Cache`, so that one contract holds for both. Format: tars.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ....common.documents import MOST_BYTES
from ....errors import UserError
from ..cache import Cache
from ..dataset import CacheDataset
from ..feature_format import FeatureFormat
from ..locations import Folder, Place, fetch
from ..manifest import FINGERPRINT, MANIFEST, Keys, parse_fingerprint, parse_manifest
from ..plan import require_names
from ..shard_reader import ShardFiles
from ..zarr_format import Attributes, Layout, features_folder, require_layout
from .tars import INDEX, META, Entry, Tars, field_name, open_place, parse_index, sample_key


class WebDatasetCache(Cache):
    """An export, read as a `Cache` with the same tables, features and errors. Make it with `open`.

    Reading single records of local tars is as fast as reading the cache. It keeps the position of every member of its
    open tars, so it is meant for reading in order, or for exports of moderate size.
    """

    def __init__(self, place: Place, scratch: Path, check: bool) -> None:
        self.place, self.path = place, place.path if isinstance(place, Folder) else Path(place.where)
        index = read_index(place, scratch)
        self.index = index["dvla"]
        self.shards, quarantine = index["shardlist"], self.index["quarantine"]
        self.tars = Tars(place, [self.index["meta"], *self.shards, *quarantine], scratch, check)
        where = f"{place.url(META)}: cache/store"
        self.fingerprint = parse_fingerprint(self.tars.document(META, f"cache/store.{FINGERPRINT}"), where)
        self.manifest = parse_manifest(self.tars.document(META, f"cache/store.{MANIFEST}"), where)
        quantized = FeatureFormat(self.manifest["dtype"]).quantized
        channels = self.tars.array(META, "cache/store.channel_scale.npy") if quantized else None
        datasets = []
        require_names(names := [d["name"] for d in self.manifest["datasets"]])
        for name in names:
            shards, apart = ([e for e in tars if e["dataset"] == name] for tars in (self.shards, quarantine))
            views = self.index["views"][name]
            datasets.append(WebDatasetDataset(self, name, views, channels, shards, apart))
        self._summarize(tuple(datasets))

    @classmethod
    def open(  # type: ignore[override]  # its options are those of tars, not of shards
        cls, path: Path | str, scratch: Path | str = ".", check: bool = False
    ) -> WebDatasetCache:
        """An export at a folder, fsspec URL or pipe. `UserError` when there is none, or it is damaged.

        `scratch`: where remote tars are copied; `check`: compare every tar with its checksum before using it.
        """
        try:
            cache = cls(open_place(str(path)), Path(scratch), check)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise UserError(
                f"{path} is not an export this version can read ({type(error).__name__}: {error}); export it again"
            ) from None
        cache.opened = (path, scratch, check)
        return cache


class WebDatasetDataset(CacheDataset):
    """One dataset of an export: a `CacheDataset` whose tables and features are in tars. It has no shard files."""

    def __init__(
        self,
        cache: WebDatasetCache,
        name: str,
        views: Mapping[str, str],
        channels: np.ndarray | None,
        shards: Sequence[Entry],
        quarantine: Sequence[Entry],
    ) -> None:
        tars = cache.tars

        def table(path: str, layout: Layout) -> np.ndarray:
            group, _, view = path.partition("/")
            field = f"null.{views[view]}" if group == "null" else path.replace("/", ".")
            found = tars.array(META, f"{name}/tables.{field}.npy")
            require_layout(found.shape, found.dtype.name, layout)
            return found

        self.name, self.path, self._tars, self._labels = name, cache.path / name, tars, views
        attributes = tars.json(META, f"{name}/tables.json", Attributes)
        self._describe(Keys(attributes, f"{cache.place.url(META)}: {name}/tables.json"), cache.manifest)
        if views.keys() != set(self.views) or len(set(views.values())) < len(views):
            raise ValueError(f"the index has the views {sorted(views)} of {name}, its tables {sorted(self.views)}")
        self._load(table, channels)
        # Of usable and quarantined episodes: tars, samples up to the end of each, samples before each episode
        self._kinds = []
        for entries, mine in ((shards, ~self.quarantined), (quarantine, self.quarantined)):
            count = self.episode_observations * mine
            ends = np.cumsum([e["nsamples"] for e in entries], dtype=np.int64)
            held = int(ends[-1]) if len(ends) else 0
            if count.sum() != held:
                raise ValueError(f"the tars of {name} hold {held} samples, its tables {count.sum()}")
            self._kinds.append(([e["url"] for e in entries], ends, np.cumsum(count) - count))

    def places(self, rows: np.ndarray) -> list[tuple[str, str]]:
        """(tar, key of the sample) of frames `rows` [n]; `ValueError` for a frame without features."""
        observation, episode, out = self.observation_of(rows), self.episode_of(rows), []
        steps = np.asarray(rows, np.int64) - self.episode_start[episode]
        within = observation - self._observation_start[episode]
        for e, step, i in zip(episode.tolist(), steps.tolist(), within.tolist()):
            names, ends, before = self._kinds[int(self.quarantined[e])]
            out.append((names[int(np.searchsorted(ends, before[e] + i, side="right"))], sample_key(self.name, e, step)))
        return out

    def read_features(
        self,
        view: str,
        rows: np.ndarray,
        targets: Sequence[memoryview],
        files: ShardFiles | None = None,
        *,
        scales: Sequence[memoryview] = (),
        variant: int = 0,
    ) -> None:
        """As `CacheDataset.read_features`; `files` is not needed."""
        self._array(view, variant, features_folder)  # refuses an unknown view or variant
        label, dtype = self._labels[view], self.format.zarr_dtype
        features, scale = (field_name(kind, label, variant) for kind in ("features", "scales"))
        for i, (tar, key) in enumerate(self.places(rows)):
            self._tars.read(tar, f"{key}.{features}", dtype, (self.tokens, self.width), targets[i])
            if self.format.quantized:
                self._tars.read(tar, f"{key}.{scale}", "float32", (self.tokens,), scales[i])

    def advise(self, view: str, rows: np.ndarray, files: ShardFiles, variant: int = 0) -> None:
        """As `CacheDataset.advise`: remote tars are downloaded."""
        for tar in dict.fromkeys(tar for tar, _ in self.places(rows)):
            self._tars.fetch(tar)


def read_index(place: Place, scratch: Path) -> dict[str, Any]:
    """The index of an export; `UserError` when there is none, or one of another format."""
    file, _, _ = fetch(
        place,
        INDEX,
        scratch,
        missing=f"no export at {place.where}: it has no {INDEX}, which an export writes last; "
        "finish the export, or give its folder or URL",
    )
    with file:
        return parse_index(file.read(MOST_BYTES + 1), place.url(INDEX))
