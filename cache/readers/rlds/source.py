"""RLDS datasets as tfds writes them (TFRecord shards of tf.train.Example, one record per episode), without TensorFlow.

A record holds the steps of an episode as flat lists under the path of each feature: `steps/action` has T·7 floats,
`steps/observation/image_0` T encoded images. Columns and views are named by the path below `steps`: "action",
"action/world_vector", "observation/state"; a view also by its last part. Letters: T frames of an episode.
"""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ....errors import Note, UserError
from ..base import Source
from ..config import DatasetConfig
from ..episode import CorruptEpisode, View
from ..images import ArrayForm, Stored, channels_of, choose_cameras, decode, decode_all, survey
from ..search import Files, choose_config
from ..tables import EpisodeTable, Rows
from .labels import read_text, success_features, success_in, text_features
from .metadata import Feature, Metadata, is_rlds
from .tfrecord import index_records, parse_example, read_record, values_of

_DTYPES = {
    "bool",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    "float16",
    "float32",
    "float64",
}
_MASK = re.compile(r"depth|mask|seg[^/]*$", re.IGNORECASE)  # of a tensor that is no camera's image
_FORMATS = ("JPEG", "PNG", "BMP", "GIF")  # what tfds writes; PIL would try many more


class RldsSource(Source):
    """One version of one RLDS dataset. Episode ids number the records of all splits and shards as dataset_info.json
    lists them, so they do not move when a shard is missing. The files do not give the rate: `control_hz` does."""

    format = "rlds"

    def __init__(self, path_or_repo: str, config: DatasetConfig | None = None) -> None:
        """A version's folder, one above it, or a hub id of either; `config` None finds the shipped one that fits.

        `UserError` when there is none or the config does not describe it.
        """
        self._meta = meta = Metadata(path_or_repo)
        config = choose_config(config, self.format, Files(meta.names, meta.root, lambda: _columns(meta.features)))
        self._cameras = _cameras(meta.features, config, meta.name)  # short name → path below `steps`
        self._texts, self._marks = text_features(meta.every), success_features(meta.every)
        self._succeeded: dict[int, bool | None] = {}  # by the records read so far
        super().__init__(
            meta.root,
            meta.name,
            config,
            view_names=tuple(self._cameras),
            episode_ids=meta.episodes,
            widths=_widths(meta.features, config, meta.name),
        )

    @classmethod
    def matches(cls, names: Sequence[str], root: Path | None) -> bool:
        """By dataset_info.json and features.json in one folder."""
        return is_rlds(names)

    @functools.cached_property
    def revision_hash(self) -> str:
        """sha256 hex over dataset_info.json and features.json."""
        return self._meta.revision_hash

    def notes(self) -> tuple[Note, ...]:
        """As in `Source`: how many episodes are here."""
        return self._meta.notes()

    def length_of(self, episode_id: int) -> int:
        """Number of frames T, counted in the record itself: the metadata does not list it."""
        where = self.where(episode_id)
        return len(self._column(self._example(episode_id, where), self.config.action_columns[0], where))

    def key_of(self, episode_id: int) -> str | None:
        """As openpi names DROID's recordings: "<recording folder>--<file>"."""
        example = self._example(episode_id, self.where(episode_id))
        paths = [f"episode_metadata/{name}" for name in ("recording_folderpath", "file_path")]
        found = [values_of(example, p, "bytes", self.where(episode_id)) for p in paths if p in example]
        return "--".join(values[0].decode(errors="replace") for values in found) if len(found) == len(paths) else None

    def _rows(self, episode_id: int, columns: Sequence[str], where: str) -> Rows:
        example = self._example(episode_id, where)
        found = {name: self._column(example, name, where) for name in columns}
        self._succeeded[episode_id] = success_in(example, self._marks)
        lengths = {len(v) for v in found.values()}
        if len(lengths) == 1:
            self._check_bounds(example, min(lengths), where)
        return Rows(found, read_text(example, self._texts, lengths, where), notes=self._shard_notes(episode_id, where))

    def _shard_notes(self, episode_id: int, where: str) -> tuple[Note, ...]:
        """Records of the episode's shard that are not there, so that others stand in their places."""
        shard, _ = self._meta.find(episode_id)
        index = index_records(self._meta.locate(shard, where), where)
        if index.damage or len(index) == shard.length:
            return ()
        text = f"{shard.path} holds {len(index)} records, dataset_info.json lists {shard.length}: which ones are not "
        return (Note("records-missing", f"{text}there cannot be told, episodes may have the numbers of others"),)

    def _check_bounds(self, example: Mapping[str, Any], length: int, where: str) -> None:
        """`CorruptEpisode` when is_first or is_last marks a step inside the record: it holds two episodes, or parts."""
        for name in ("is_first", "is_last"):
            if name not in self._meta.features or f"steps/{name}" not in example:
                continue
            flags = self._column(example, name, where).astype(bool).reshape(-1)
            if len(flags) != length:
                raise CorruptEpisode(f"{where}: {len(flags)} flags of '{name}' for {length} rows", "row-count")
            inside = (
                np.flatnonzero(flags[1:] > flags[:-1]) + 1
                if name == "is_first"
                else np.flatnonzero(flags[:-1] > flags[1:])
            )  # several in a row at the expected end do no harm
            if len(inside):
                raise CorruptEpisode(f"{where}: {name} marks step {inside[0]} of {length}: it is not one episode")

    def _files(self, episode_id: int, view: str, where: str) -> Sequence[Path]:
        return (self._meta.locate(self._meta.find(episode_id)[0], where),)

    def _views(self, episode_id: int, names: Sequence[str], table: EpisodeTable, where: str) -> Iterator[View]:
        example = self._example(episode_id, where)
        for name in names:
            images = self._stored(example, name, where)
            count, height, width, sha256 = survey(_named(images, name, where), _FORMATS)
            if count and isinstance(images, list):
                self._refuse_placeholder(example, name, images, where)
            opener = functools.partial(self._decode, episode_id, name, (height, width), where)
            yield View(name, height, width, count, opener, sha256)

    def _decode(
        self, episode_id: int, view: str, size: tuple[int, int], where: str, start: int, stop: int
    ) -> Iterator[np.ndarray]:
        """Yield uint8 [H, W, 3] of frames start..stop-1. The record is read again: a source keeps no images."""
        images = self._stored(self._example(episode_id, where), view, where)
        if stop > len(images):
            raise CorruptEpisode(f"{where}: {len(images)} images of '{view}', expected {stop}", "row-count")
        return decode_all(islice(_named(images, view, where), start, stop), size, _FORMATS)

    def _stored(self, example: Mapping[str, Any], view: str, where: str) -> list[bytes] | np.ndarray:
        """The images of a view: files, or uint8 [T, H, W, 3] of a tensor."""
        path = self._cameras[view]
        feature = self._meta.features[path]
        if feature.kind == "image":
            return values_of(example, f"steps/{path}", "bytes", where)
        values = self._column(example, path, where)
        if values.size and not 0 <= values.min() <= values.max() <= 255:
            raise CorruptEpisode(f"{where}: '{path}' holds {values.min()} to {values.max()}, its images range to 255")
        pixels = values.astype(np.uint8).reshape(-1, *map(int, filter(None, feature.shape)))
        return ArrayForm(_channels(feature) or "last").to_rgb(pixels, f"{where}: '{path}'")

    def _refuse_placeholder(self, example: Mapping[str, Any], view: str, images: Sequence[bytes], where: str) -> None:
        """Refuse a camera that was not there: Bridge fills it with black images and sets `has_<view>` false. The flag
        alone proves nothing (the published Bridge files have it false for every camera, by a slip of their converter),
        so where it is false the pixels decide, by the image of fewest bytes: a single color is always among those."""
        flag = f"episode_metadata/has_{self._cameras[view].rpartition('/')[2]}"
        if flag not in example or any(values_of(example, flag, "int64", where)):
            return
        index = min(range(len(images)), key=lambda i: len(images[i]))
        image = decode(images[index], f"{where}: image {index} of '{view}'", _FORMATS)
        if (image == image[0, 0]).all():
            raise CorruptEpisode(
                f"{where}: view '{view}' was not recorded ({flag} is false, image {index} is one color); "
                "leave it out by naming the others in the dataset config's `views`"
            )

    def _example(self, episode_id: int, where: str) -> Mapping[str, Any]:
        """The episode's record, checked and parsed."""
        shard, number = self._meta.find(episode_id)
        path = self._meta.locate(shard, where)
        found = len(index_records(path, where))
        if found > shard.length:
            raise CorruptEpisode(
                f"{where}: {shard.path} holds {found} records, dataset_info.json lists {shard.length}: they "
                "are not of one dataset"
            )
        return parse_example(read_record(path, number, where), where)

    def _column(self, example: Mapping[str, Any], name: str, where: str) -> np.ndarray:
        """A numeric feature of all steps as [T, …]: float32 or int64 as stored in a flat list, else its own type."""
        feature = self._meta.features[name]
        width = feature.width or 1
        if feature.encoding != "none":
            parts = values_of(example, f"steps/{name}", "bytes", where)
            return np.array([_unpacked(p, feature, f"{where}: step {i} of '{name}'") for i, p in enumerate(parts)])
        kind = "float" if np.dtype(feature.dtype).kind == "f" else "int64"
        values = values_of(example, f"steps/{name}", kind, where)
        if len(values) % width:
            raise CorruptEpisode(
                f"{where}: '{name}' has {len(values)} numbers, which is no multiple of the {width} of one step"
            )
        return values.reshape(-1, width)

    @functools.cached_property
    def text_from(self) -> str:  # type: ignore[override]
        """The features that may hold the task text."""
        return ", else ".join(self._texts)

    def success_of(self, episode_id: int) -> bool | None:
        """As `success_in` its record, which is not read again for it once its rows were."""
        where = self.where(episode_id)
        if self._marks and episode_id not in self._succeeded:
            self._succeeded[episode_id] = success_in(self._example(episode_id, where), self._marks)
        return self._succeeded.get(episode_id)


def _readable(feature: Feature) -> bool:
    return feature.encoding in ("none", "bytes", "zlib") and feature.dtype in _DTYPES and bool(feature.width)


def _columns(features: Mapping[str, Feature]) -> dict[str, int]:
    """Numbers per step of each numeric feature that can be read."""
    return {n: f.width or 0 for n, f in features.items() if f.kind == "tensor" and _readable(f)}


def _widths(features: Mapping[str, Feature], config: DatasetConfig, dataset: str) -> dict[str, int]:
    """Numbers per step of each numeric feature; `UserError` for one that the config wants and that cannot be read."""
    numeric = {n: f for n, f in features.items() if f.kind == "tensor"}
    for name in (n for n in config.columns if n in numeric):
        feature = numeric[name]
        if not _readable(feature):
            raise UserError(
                f"{dataset}: column '{name}' is {feature.dtype} {list(feature.shape)} with encoding "
                f"'{feature.encoding}', which cannot be read; dataset config '{config.name}' asks for it"
            )
    return {name: feature.width or 0 for name, feature in numeric.items()}


def _cameras(features: Mapping[str, Feature], config: DatasetConfig, dataset: str) -> dict[str, str]:
    """Short view name → path below `steps`, of the 8-bit images under `observation` that are no depth maps; where there
    is none, and for `views` of the config that are none, of the tensors of such a shape."""
    under = {k: f for k, f in features.items() if k.startswith("observation/")}
    keys = [
        k
        for k, f in under.items()
        if f.kind == "image" and f.dtype == "uint8" and "depth" not in k.rpartition("/")[2].lower()
    ]
    wanted = {w.rpartition("/")[2] for w in config.views or ()} - {k.rpartition("/")[2] for k in keys}
    keys += [
        k
        for k, f in under.items()
        if _channels(f) and (k.rpartition("/")[2] in wanted if keys else not _MASK.search(k))
    ]
    return choose_cameras(keys, "observation/", config.views, dataset, "name the ones to use in `views`")


def _channels(feature: Feature) -> Literal["last", "first"] | None:
    """Where a tensor of one step has its colors, were it an image; None for what is none."""
    if feature.kind != "tensor" or feature.dtype != "uint8" or len(feature.shape) != 3 or not feature.width:
        return None
    found = channels_of((1, *map(int, filter(None, feature.shape))), np.dtype(np.uint8))
    return found if found in ("last", "first") else None


def _named(images: Iterable[Stored], view: str, where: str) -> Iterator[tuple[str, Stored]]:
    return ((f"{where}: image {i} of '{view}'", data) for i, data in enumerate(images))


def _unpacked(data: bytes, feature: Feature, where: str) -> np.ndarray:
    """The numbers of one step from their raw or zlib-compressed bytes."""
    dtype = np.dtype(feature.dtype).newbyteorder("<")
    expected = (feature.width or 1) * dtype.itemsize
    if feature.encoding == "zlib":
        try:
            data = zlib.decompressobj().decompress(data, expected + 1)  # never more than can be right
        except zlib.error as error:
            raise CorruptEpisode(f"{where} cannot be decompressed ({error})", "unreadable-file") from None
    if len(data) != expected:
        raise CorruptEpisode(f"{where} is not the {expected} bytes of {feature.dtype} {list(feature.shape)}")
    return np.frombuffer(data, dtype).reshape(-1)
