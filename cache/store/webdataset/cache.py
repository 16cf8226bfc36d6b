"""An export in WebDataset tars with the interface of `Cache`, so that one contract holds for both. Format: see webdataset_io.py

Letters: E episodes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ....errors import UserError
from ..cache import Cache, CacheDataset
from ..feature_format import FeatureFormat
from ..locations import Folder, Place, fetch
from ..manifest import FINGERPRINT, MANIFEST
from ..plan import FORMAT
from ..shard_reader import ShardFiles
from ..zarr_format import features_folder
from .tars import EXPORT_FORMAT, INDEX, META, Entry, Tars, field_name, open_place, sample_key


class WebDatasetCache(Cache):
    """An export, read as a `Cache`: the same tables, features and errors. Make it with `open`.

    Reads single records out of tars that are on this machine as fast as the cache itself; keeps the position of every member of the
    tars it has open, so it is meant for reading in order, or for exports of moderate size.
    """

    def __init__(self, place: Place, scratch: Path, check: bool) -> None:
        self.place, self.path = place, place.path if isinstance(place, Folder) else Path(place.where)
        index = read_index(place, scratch)
        self.index = index["dvla"]
        self.shards, quarantine = index["shardlist"], self.index["quarantine"]
        self.tars = Tars(place, [self.index["meta"], *self.shards, *quarantine], scratch, check)
        self.fingerprint, self.manifest = (
            self.tars.json(META, f"cache/store.{name}") for name in (FINGERPRINT, MANIFEST)
        )
        if self.manifest["format"] != FORMAT:
            raise UserError(
                f"{place.where} holds a cache of format {self.manifest['format']}, this version reads {FORMAT}; "
                "import it with the version that exported it"
            )
        quantized = FeatureFormat(self.manifest["dtype"]).quantized
        channels = np.array(self.tars.array(META, "cache/store.channel_scale.npy")) if quantized else None
        self.datasets = tuple(
            WebDatasetDataset(
                self.path,
                d["name"],
                self.tars,
                self.index["views"][d["name"]],
                channels,
                *([e for e in tars if e["dataset"] == d["name"]] for tars in (self.shards, quarantine)),
            )
            for d in self.manifest["datasets"]
        )
        self.tokens, self.width, self.frames = self.manifest["tokens"], self.manifest["width"], self.manifest["frames"]
        self.variants, self.format = self.manifest["variants"], self.datasets[0].format
        self.text_width = self.datasets[0].text.shape[2]

    @classmethod
    def open(cls, path: Path | str, scratch: Path | str = ".", check: bool = False) -> WebDatasetCache:  # type: ignore[override]  # what to do with tars, not with shards
        """An export at a folder, fsspec URL or pipe. `scratch`: where tars are copied that are not local; `check`: compare every tar
        with its checksum before using it. `UserError` when there is none, or it does not make sense."""
        try:
            cache = cls(open_place(str(path)), Path(scratch), check)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise UserError(
                f"{path} is not an export this version can read ({type(error).__name__}: {error}); export it again"
            ) from None
        cache.opened = (path, scratch, check)
        return cache


class WebDatasetDataset(CacheDataset):
    """One dataset of an export: a `CacheDataset` whose tables and features come out of tars. It has no shard files."""

    def __init__(
        self,
        root: Path,
        name: str,
        tars: Tars,
        views: Mapping[str, str],
        channels: np.ndarray | None,
        shards: Sequence[Entry],
        quarantine: Sequence[Entry],
    ) -> None:
        def table(field: str) -> np.ndarray:
            return tars.array(META, f"{name}/tables.{field}.npy")

        self.name, self.path, self._tars, self._labels = name, root / name, tars, views
        self.attributes = a = tars.json(META, f"{name}/tables.json")
        self.views, self.instructions = tuple(a["views"]), tuple(a["instructions"])
        self.tokens, self.width, self.frames, self.shard_frames = (
            a["tokens"],
            a["width"],
            a["frames"],
            a["shard_frames"],
        )
        self.frame_stride, self.variants = a["frame_stride"], a["variants"]
        self.format, self.channel_scale = FeatureFormat(a["dtype"], a["compression"]), channels
        self.embodiment_id, self.control_hz = a["embodiment"], a["control_hz"]
        for field in ("start", "length", "id", "instruction"):
            setattr(self, f"episode_{field}", np.array(table(f"episodes.{field}")))
        for field in ("action", "proprio", "timestamp", "null_text"):
            setattr(self, field, table(field))
        self.action_mask, self.proprio_mask = np.array(table("action_mask")), np.array(table("proprio_mask"))
        self.text, self.text_length = table("text.embedding"), table("text.length")
        self.null_features = np.stack([table(f"null.{views[view]}") for view in self.views])
        self.quarantined = np.isin(self.episode_id, a["quarantined"])  # [E]
        self.episode_observations = -(-self.episode_length // self.frame_stride)  # [E]
        self._observation_start = np.cumsum(self.episode_observations) - self.episode_observations
        self._kinds = []  # (usable, quarantined): (names of the tars, samples up to the end of each, samples before each episode)
        for entries, mine in ((shards, ~self.quarantined), (quarantine, self.quarantined)):
            count = self.episode_observations * mine
            ends = np.cumsum([e["nsamples"] for e in entries], dtype=np.int64)
            if int(count.sum()) != (int(ends[-1]) if len(ends) else 0):
                raise ValueError(
                    f"the tars of {name} hold {int(ends[-1]) if len(ends) else 0} samples, its tables {int(count.sum())}"
                )
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
        self._array(view, variant, features_folder)  # refuses a view or variant that is not there
        label, dtype = self._labels[view], self.format.zarr_dtype
        for i, (tar, key) in enumerate(self.places(rows)):
            self._tars.read(
                tar, f"{key}.{field_name('features', label, variant)}", dtype, (self.tokens, self.width), targets[i]
            )
            if self.format.quantized:
                self._tars.read(
                    tar, f"{key}.{field_name('scales', label, variant)}", "float32", (self.tokens,), scales[i]
                )

    def advise(self, view: str, rows: np.ndarray, files: ShardFiles, variant: int = 0) -> None:
        """As `CacheDataset.advise`: tars that are not on this machine are fetched."""
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
        try:
            index = json.loads(file.read())
            version = index["dvla"]["export"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{place.url(INDEX)} is not the index of a dvla export; export the cache again") from None
    if version != EXPORT_FORMAT:
        raise UserError(f"{place.url(INDEX)} is of export format {version}, this version reads {EXPORT_FORMAT}")
    return index
