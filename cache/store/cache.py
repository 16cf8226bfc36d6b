"""A finished feature cache: `Cache` reads it, `verify_checksums` looks for damage. Layout: layout.py; writer: writer.py

Any Zarr library opens the same folder; this reader goes to the bytes itself, because that is several times faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...common.files import crc32c
from ...common.text import public, size
from ...errors import UserError, unknown
from ..actions.normalizer import Normalizer
from ..actions.slots import UNIFIED_DIM
from ..actions.statistics import Statistics
from .codec import dequantize, quantize
from .feature_format import FeatureFormat
from .manifest import json_bytes, read_attributes, read_fingerprint, read_manifest
from .mirror import Mirror, is_remote
from .plan import array_name
from .samples import CacheSamples
from .shard_reader import Folder, ShardFiles, advise_records, read_records
from .zarr_format import features_folder, open_table, record_compression, scales_folder


class CacheDataset:
    """One dataset of a finished cache. E episodes, N frames, n instructions; arrays are read-only memory maps.

    Every `frame_stride`-th frame of an episode is an observation: only those have features.
    """

    attributes: dict[str, Any]  # all that the build recorded, such as the action map
    episode_start: np.ndarray  # [E] int64, first frame on the time axis
    episode_length: np.ndarray  # [E] int64, frames
    episode_id: np.ndarray  # [E] int64, in the source
    episode_instruction: np.ndarray  # [E] int64, row of `text`
    episode_observations: np.ndarray  # [E] int64, frames that have features
    quarantined: np.ndarray  # [E] bool
    action: np.ndarray  # [N, 128] float32 unified, not normalised
    proprio: np.ndarray  # [N, 128] float32 unified, not normalised
    action_mask: np.ndarray  # [128] bool
    proprio_mask: np.ndarray  # [128] bool
    timestamp: np.ndarray  # [N] float64 s
    text: np.ndarray  # [n, Lt, Dt] float16
    text_length: np.ndarray  # [n] int64
    null_text: np.ndarray  # [Lt0, Dt] float16
    null_features: np.ndarray  # [views, tokens, D] float16
    channel_scale: np.ndarray | None  # [D] float32, of 8-bit features only

    def __init__(self, root: Path, name: str, files: ShardFiles) -> None:
        self.name, self.path, self._files = name, root / name, files
        self._shard_folders: dict[tuple[str, int, Callable[[Path, str, str], Path]], str] = {}
        self.attributes = read_attributes(root, name)
        a = self.attributes
        self.views, self.instructions = tuple(a["views"]), tuple(a["instructions"])
        self.tokens, self.width = a["tokens"], a["width"]
        self.frames, self.shard_frames = a["frames"], a["shard_frames"]
        self.frame_stride, self.variants = a["frame_stride"], a["variants"]
        self.format = FeatureFormat(a["dtype"], a["compression"])
        self._compression = record_compression(self.format)
        self.embodiment_id, self.control_hz = a["embodiment"], a["control_hz"]
        for field in ("start", "length", "id", "instruction"):
            setattr(self, f"episode_{field}", np.array(open_table(self.path / "episodes" / field)))
        for field in ("action", "proprio", "timestamp", "null_text"):
            setattr(
                self, field, np.asarray(open_table(self.path / field))
            )  # still mapped, but an array whose rows are cheap to take
        self.action_mask = np.array(open_table(self.path / "action_mask"))
        self.proprio_mask = np.array(open_table(self.path / "proprio_mask"))
        self.text = np.asarray(open_table(self.path / "text" / "embedding"))
        self.text_length = np.array(open_table(self.path / "text" / "length"))
        self.channel_scale = np.array(open_table(root / "channel_scale")) if self.format.quantized else None
        self.null_features = np.stack([open_table(self.path / "null" / view) for view in self.views])
        self.quarantined = np.isin(self.episode_id, a["quarantined"])
        self.episode_observations = -(-self.episode_length // self.frame_stride)
        self._observation_start = np.cumsum(self.episode_observations) - self.episode_observations

    @cached_property
    def null_records(self) -> tuple[np.ndarray, np.ndarray | None]:
        """The null features as they would be stored: (float16 or codes [views, tokens, D], token scales [views, tokens])."""
        if not self.format.quantized:
            return self.null_features, None
        codes, scale = quantize(
            torch.from_numpy(self.null_features), torch.from_numpy(self.channel_scale), self.format.dtype
        )
        return codes.numpy(), scale.numpy()

    @cached_property
    def action_normalizer(self) -> Normalizer:
        """Unified actions ↔ the [-1, 1] the model sees."""
        return self._normalizer("action")

    @cached_property
    def proprio_normalizer(self) -> Normalizer:
        """Unified state ↔ the [-1, 1] the model sees."""
        return self._normalizer("proprio")

    def _normalizer(self, kind: str) -> Normalizer:
        rotation = np.isin(np.arange(UNIFIED_DIM), self.attributes[f"{kind}_rotation"])
        stats = Statistics.from_dict(self.attributes[f"{kind}_stats"])
        return Normalizer(stats, getattr(self, f"{kind}_mask"), rotation)

    def episode_of(self, rows: np.ndarray) -> np.ndarray:
        """Positions in the episode table of rows on the flat time axis, int64; `ValueError` for a row out of range."""
        rows = np.asarray(rows, np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= self.frames):
            raise ValueError(f"{self.name}: rows {rows.min()}…{rows.max()} are not all in 0…{self.frames - 1}")
        return np.searchsorted(self.episode_start, rows, side="right") - 1

    def observation_of(self, rows: np.ndarray) -> np.ndarray:
        """Rows of the feature arrays that belong to frames `rows`, int64; `ValueError` for a frame without features."""
        rows = np.asarray(rows, np.int64)
        if self.frame_stride == 1:
            return rows
        episode = self.episode_of(rows)
        step, off = np.divmod(rows - self.episode_start[episode], self.frame_stride)
        if off.any():
            raise ValueError(
                f"{self.name}: frame {rows[off.argmax()]} has no features; the cache holds every {self.frame_stride}th"
            )
        return self._observation_start[episode] + step

    @property
    def observations(self) -> int:
        """Rows of the feature arrays."""
        return int(self.episode_observations.sum())

    def frame_of(self, observations: np.ndarray) -> np.ndarray:
        """Inverse of `observation_of`: the frames of rows of the feature arrays, int64."""
        at = np.asarray(observations, np.int64)
        episode = np.searchsorted(self._observation_start, at, side="right") - 1
        return self.episode_start[episode] + (at - self._observation_start[episode]) * self.frame_stride

    def shard_path(self, view: str, index: int, variant: int = 0) -> Path:
        """The file of shard `index` of a view's features, or of an augmented variant of them."""
        return self._array(view, variant, features_folder) / "c" / str(index) / "0" / "0"

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
        """Read the stored features of frames `rows` [n] int64 into `targets`, n writable buffers of tokens · width · itemsize bytes,
        and, of an 8-bit cache, their token scales into `scales`, n buffers of tokens · 4 bytes."""
        at, files = self.observation_of(rows), files or self._files
        read_records(
            files,
            self._shards(view, variant, features_folder),
            at,
            targets,
            self.shard_frames,
            compression=self._compression,
        )
        if self.format.quantized:
            read_records(files, self._shards(view, variant, scales_folder), at, scales, self.shard_frames, tail="0")

    def advise(self, view: str, rows: np.ndarray, files: ShardFiles, variant: int = 0) -> None:
        """Features of frames `rows` [n] int64, ascending, will be read soon: they are brought onto this machine and, in the background,
        into its memory."""
        at, record = self.observation_of(rows), self.tokens * self.width * self.format.itemsize
        advise_records(
            files,
            self._shards(view, variant, features_folder),
            at,
            0 if self._compression else record,
            self.shard_frames,
        )
        if self.format.quantized:
            advise_records(
                files, self._shards(view, variant, scales_folder), at, 4 * self.tokens, self.shard_frames, tail="0"
            )

    def features(self, view: str, rows: np.ndarray, variant: int = 0) -> np.ndarray:
        """float16 [n, tokens, width] of frames `rows`, 8-bit ones decoded; convenient, not fast."""
        codes, scale = self.records(view, rows, variant)
        if scale is None:
            return codes
        return dequantize(
            torch.from_numpy(codes), torch.from_numpy(scale), torch.from_numpy(self.channel_scale), torch.float16
        ).numpy()

    def records(self, view: str, rows: np.ndarray, variant: int = 0) -> tuple[np.ndarray, np.ndarray | None]:
        """As stored, of frames `rows`: (float16 or codes [n, tokens, width], token scales float32 [n, tokens] or None)."""
        n, format = len(rows), self.format
        codes = np.empty((n, self.tokens, self.width), format.zarr_dtype)
        scale = np.empty((n, self.tokens), np.float32) if format.quantized else None
        self.read_features(
            view,
            rows,
            [memoryview(c).cast("B") for c in codes],
            variant=variant,
            scales=() if scale is None else [memoryview(x).cast("B") for x in scale],
        )
        return codes, scale

    def feature(self, view: str, row: int) -> np.ndarray:
        """`[tokens, width]` float16 of one frame."""
        return self.features(view, np.array([row], np.int64))[0]

    def _shards(self, view: str, variant: int, folder: Callable[[Path, str, str], Path]) -> str:
        """Where the shards of an array lie; remembered, since building paths takes longer than a small read."""
        key = view, variant, folder
        if key not in self._shard_folders:
            self._shard_folders[key] = str(self._array(view, variant, folder) / "c")
        return self._shard_folders[key]

    def _array(self, view: str, variant: int, folder: Callable[[Path, str, str], Path]) -> Path:
        if view not in self.views:
            raise unknown(f"view of dataset {self.name}", view, self.views)
        if not 0 <= variant <= self.variants:
            raise UserError(
                f"dataset {self.name} of the cache has {self.variants} augmented variants, asked for number {variant}; "
                "build it with --augment"
            )
        return folder(self.path.parent, self.name, array_name(view, variant))


class Cache:
    """A finished cache, opened for reading; thread-safe; the folder may be read-only. Make it with `Cache.open`."""

    folder: Folder | None = None  # so that a reader stays with its generation when the next one takes its place
    mirror: Mirror | None = None  # of a remote cache: fetches what is not in `path` yet
    opened: tuple[Any, ...]  # arguments of `open`

    def __init__(
        self,
        path: Path,
        fingerprint: dict[str, Any],
        manifest: dict[str, Any],
        folder: Folder | None = None,
        mirror: Mirror | None = None,
    ) -> None:
        self.path, self.fingerprint, self.manifest, self.folder, self.mirror = (
            path,
            fingerprint,
            manifest,
            folder,
            mirror,
        )
        files = self.shard_files()
        self.datasets = tuple(CacheDataset(path, d["name"], files) for d in manifest["datasets"])
        self.tokens, self.width, self.frames = manifest["tokens"], manifest["width"], manifest["frames"]
        self.variants, self.format = manifest["variants"], self.datasets[0].format
        self.text_width = self.datasets[0].text.shape[2]  # one encoder made all of them

    @property
    def boundary(self) -> int | None:
        """n of a cache of the hidden states that enter the last n blocks of the vision tower; None: it holds features."""
        return self.fingerprint.get("encoder", {}).get("boundary")

    @classmethod
    def open(cls, path: Path | str, local: Path | str | None = None, local_nbytes: int | None = None) -> Cache:
        """`UserError` when there is no cache, or an incomplete one, at `path`: a folder, or a URL that fsspec knows.

        Of a URL, `local` is a folder for copies (shards are fetched when first touched), and `local_nbytes` bounds its shards."""
        if is_remote(path):
            if local is None:
                raise UserError(
                    f"{path} is not on this machine: give a local folder for copies of what is read, as in "
                    "Cache.open(URL, local=FOLDER)"
                )
            mirror = Mirror(str(path), local, local_nbytes)
            manifest = read_manifest(mirror.folder)
            cache = cls(mirror.folder, read_fingerprint(mirror.folder), manifest, None, mirror)
            cache.opened = (str(path), Path(local).absolute(), local_nbytes)
            return cache
        path = Path(str(path).removeprefix("file://"))
        for attempt in range(21):
            try:
                manifest = read_manifest(path)
                folder = Folder(path)
                cache = cls(path, read_fingerprint(path), manifest, folder)
                cache.opened = (path.absolute(),)
                if folder.is_at(path) and read_manifest(path) == manifest:
                    return cache
            except (UserError, OSError):  # no folder, or half of this and half of the next generation
                # Where both are on their way at the moment of asking, neither is there: that is asked again.
                if attempt == 20 or attempt > 2 and not beside(path, "next").exists():
                    raise
            time.sleep(0.01)  # generations are changing places
        raise UserError(f"cache {path} changes faster than it can be opened; wait until its builds have ended")

    def shard_files(self) -> ShardFiles:
        """Files of this generation's shards, to be closed by whoever asks for them."""
        return ShardFiles(folder=self.folder, fetch=self.mirror.ensure if self.mirror else None)

    def __len__(self) -> int:
        return int(self.frames)

    def __repr__(self) -> str:
        episodes = sum(len(d.episode_id) for d in self.datasets)
        return (
            f"Cache('{public(str(self.path))}': datasets {len(self.datasets)}, episodes {episodes}, frames {self.frames}, "
            f"tokens {self.tokens} × {self.width} per view, {self.format.dtype}, {size(self.manifest['bytes'])})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """For worker processes, which open it again."""
        return _reopen, (type(self), self.opened, crc32c(json_bytes(self.manifest)))

    def dataset(self, *, horizon: int = 16) -> CacheSamples:
        """Its observations as a map-style dataset for `torch.utils.data.DataLoader`: convenient, and slow beside `dvla.Loader`."""
        return CacheSamples(self, horizon)

    def named(self, name: str) -> CacheDataset:
        """The dataset of that name; `UserError` with the nearest name otherwise."""
        for dataset in self.datasets:
            if dataset.name == name:
                return dataset
        raise unknown("dataset", name, [d.name for d in self.datasets])


def _reopen(kind: type[Cache], opened: tuple[Any, ...], digest: int) -> Cache:
    """In a worker process, the cache that was opened with these arguments. `UserError` when it is another one by now."""
    cache = kind.open(*opened)
    if crc32c(json_bytes(cache.manifest)) != digest:
        raise UserError(f"cache {cache.path} was replaced since it was opened; open it again")
    return cache


def beside(path: Path, suffix: str) -> Path:
    """The folder of another generation of the cache at `path`, which may be "."."""
    whole = Path(path).absolute()
    return whole.with_name(f"{whole.name}.{suffix}")
