"""Reading a finished feature cache. Layout: zarr_format.py.

Any Zarr library opens the same folder; this reader goes to the bytes itself, which is several times faster.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ...common.files import crc32c
from ...common.text import public, size
from ...errors import UserError, unknown
from ..actions.history import ALONE, History
from ..actions.schemes import Scheme
from .dataset import CacheDataset
from .manifest import json_bytes, manifest_bytes, parse_manifest, read_fingerprint, read_manifest
from .mirror import Mirror, is_remote
from .samples import CacheSamples
from .shard_reader import Folder, ShardFiles


class Cache:
    """A finished cache, opened for reading; thread-safe; the folder may be read-only. Make it with `Cache.open`."""

    folder: Folder | None = None  # keeps a reader with its generation when the next one replaces it
    mirror: Mirror | None = None  # of a remote cache: downloads what is not in `path` yet
    opened: tuple[Any, ...]  # arguments of `open`

    def __init__(
        self,
        path: Path,
        fingerprint: dict[str, Any],
        manifest: dict[str, Any],
        folder: Folder | None = None,
        mirror: Mirror | None = None,
    ) -> None:
        self.path, self.fingerprint, self.manifest = path, fingerprint, manifest
        self.folder, self.mirror = folder, mirror
        files = self.shard_files()
        self._summarize(tuple(CacheDataset(path, d["name"], files, manifest) for d in manifest["datasets"]))

    def _summarize(self, datasets: tuple[CacheDataset, ...]) -> None:
        self.datasets, manifest = datasets, self.manifest
        if len({d.name for d in datasets}) < len(datasets) or len({d.text.shape[2] for d in datasets}) > 1:
            raise UserError(f"{self.path} is damaged: its datasets do not belong together; rebuild the cache")
        self.tokens, self.width, self.frames = manifest["tokens"], manifest["width"], manifest["frames"]
        self.variants, self.format = manifest["variants"], datasets[0].format
        self.text_width = datasets[0].text.shape[2]  # the same in all: one encoder made them

    @property
    def boundary(self) -> int | None:
        """n of a cache of hidden states that enter the last n blocks of the vision tower; None: it holds features."""
        return self.fingerprint.get("encoder", {}).get("boundary")

    @classmethod
    def open(cls, path: Path | str, local: Path | str | None = None, local_nbytes: int | None = None) -> Cache:
        """Open the cache at `path`, a folder or an fsspec URL. `UserError` when there is none or it is incomplete.

        For a URL, `local` is a folder for copies (shards are downloaded when first used), `local_nbytes` their limit.
        """
        if is_remote(path):
            if local is None:
                raise UserError(
                    f"{path} is remote: give a local folder for copies of what is read, as in "
                    "Cache.open(URL, local=FOLDER)"
                )
            mirror = Mirror(str(path), local, local_nbytes)
            manifest = read_manifest(mirror.folder)
            cache = cls(mirror.folder, read_fingerprint(mirror.folder, manifest), manifest, None, mirror)
            cache.opened = (str(path), Path(local).absolute(), local_nbytes)
            return cache
        path = Path(str(path).removeprefix("file://"))
        for attempt in range(21):
            try:
                data = manifest_bytes(path)
                manifest, folder = parse_manifest(data, path), Folder(path)
                cache = cls(path, read_fingerprint(path, manifest), manifest, folder)
                cache.opened = (path.absolute(),)
                if folder.is_at(path) and manifest_bytes(path) == data:
                    return cache
            except (UserError, OSError):  # no folder, or half of this and half of the next generation
                # During the exchange of generations, neither may be at its place for a moment: try again.
                if attempt == 20 or attempt > 2 and not beside(path, "next").exists():
                    raise
            time.sleep(0.01)
        raise UserError(f"cache {path} changes faster than it can be opened; wait until its builds have finished")

    def shard_files(self) -> ShardFiles:
        """Files of this generation's shards, for the caller to close."""
        return ShardFiles(folder=self.folder, fetch=self.mirror.ensure if self.mirror else None)

    def __len__(self) -> int:
        return int(self.frames)

    def __repr__(self) -> str:
        episodes = sum(len(d.episode_id) for d in self.datasets)
        return (
            f"Cache('{public(str(self.path))}': datasets {len(self.datasets)}, episodes {episodes}, "
            f"frames {self.frames}, tokens {self.tokens} × {self.width} per view, {self.format.dtype}, "
            f"{size(self.manifest['bytes'])})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """For worker processes, which open it again."""
        schemes = tuple((d.scheme, d.horizon) for d in self.datasets)
        return _reopen, (type(self), self.opened, crc32c(json_bytes(self.manifest)), schemes)

    def dataset(
        self, *, horizon: int = 16, history: tuple[int, ...] = ALONE, proprio_history: tuple[int, ...] = ALONE
    ) -> CacheSamples:
        """Its observations as a map-style dataset for `torch.utils.data.DataLoader`; `dvla.Loader` is much faster."""
        return CacheSamples(self, horizon, History(tuple(history), tuple(proprio_history)))

    def named(self, name: str) -> CacheDataset:
        """The dataset of that name; `UserError` with the nearest name otherwise."""
        for dataset in self.datasets:
            if dataset.name == name:
                return dataset
        raise unknown("dataset", name, [d.name for d in self.datasets])


def _reopen(
    kind: type[Cache], opened: tuple[Any, ...], digest: int, schemes: tuple[tuple[Scheme, int | None], ...]
) -> Cache:
    """In a worker process, the cache opened with these arguments. `UserError` when it was replaced since."""
    cache = kind.open(*opened)
    if crc32c(json_bytes(cache.manifest)) != digest:
        raise UserError(f"cache {cache.path} was replaced since it was opened; open it again")
    for dataset, scheme in zip(cache.datasets, schemes):
        dataset.normalize(*scheme)
    return cache


def beside(path: Path, suffix: str) -> Path:
    """The folder of another generation of the cache at `path`, which may be "."."""
    absolute = Path(path).absolute()
    return absolute.with_name(f"{absolute.name}.{suffix}")
