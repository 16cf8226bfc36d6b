"""One dataset of a feature cache: its tables, and its features, read from the shards. Layout: zarr_format.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import UserError, unknown
from ..actions.chunk_frame import ChunkFrame
from ..actions.history import ALONE
from ..actions.normalizer import Normalizer
from ..actions.schemes import Scheme
from ..actions.slots import UNIFIED_DIM
from ..actions.statistics import RunningStatistics, Statistics, statistics_of
from .codec import dequantize, quantize
from .feature_format import FeatureFormat
from .plan import EpisodePlan, array_name, require_names
from .shard_reader import ShardFiles, advise_records, read_records
from .zarr_format import (
    Layout,
    features_folder,
    open_table,
    read_attributes,
    record_compression,
    scales_folder,
    table_layouts,
)

SHARED = ("format", "tokens", "width", "shard_frames", "dtype", "frame_stride", "variants")  # with the manifest
CHUNKS = 1024  # made relative at a time where all are


class CacheDataset:
    """One dataset of a finished cache. E episodes, N frames, n instructions; arrays are read-only memory maps.

    Every `frame_stride`-th frame of an episode is an observation, or those of them that the build kept: only those have
    features.
    """

    attributes: dict[str, Any]  # everything the build recorded, such as the action map
    episode_start: np.ndarray  # [E] int64, first frame on the time axis
    episode_length: np.ndarray  # [E] int64, frames
    episode_id: np.ndarray  # [E] int64, in the source
    episode_instruction: np.ndarray  # [E] int64, row of `text`
    episode_observations: np.ndarray  # [E] int64, frames that have features
    quarantined: np.ndarray  # [E] bool; also those that `select` leaves out
    used: np.ndarray  # [E] bool: episodes that `select` keeps; statistics are of these
    idle: np.ndarray | None = None  # [N] bool: frames that `select` leaves out as observations
    action: np.ndarray  # [N, 128] float32 unified, not normalized
    proprio: np.ndarray  # [N, 128] float32 unified, not normalized
    action_mask: np.ndarray  # [128] bool
    proprio_mask: np.ndarray  # [128] bool
    timestamp: np.ndarray  # [N] float64 s
    text: np.ndarray  # [n, Lt, Dt] float16
    text_length: np.ndarray  # [n] int64
    null_text: np.ndarray  # [Lt0, Dt] float16
    null_features: np.ndarray  # [views, tokens, D] float16
    visible: np.ndarray  # [n] int64: how many tokens of a record, the first, are real with each instruction
    null_visible: int  # and how many of the null features
    channel_scale: np.ndarray | None  # [D] float32, of 8-bit features only
    scheme: Scheme  # of normalization: the dataset config's, or what `normalize` was told
    horizon: int | None = None  # steps of chunks whose actions are relative to the state at their start; None: absolute

    def __init__(self, root: Path, name: str, files: ShardFiles, manifest: Mapping[str, Any]) -> None:
        self.name, self.path, self._files = name, root / name, files
        self._shard_folders: dict[tuple[str, int, Callable[[Path, str, str], Path]], str] = {}
        require_names((name,))  # before it is part of a path
        attributes = read_attributes(root, name, manifest)
        try:
            self._describe(attributes, manifest)
            self._compression = record_compression(self.format)
            channels = None
            if self.format.quantized:
                channels = open_table(root, "channel_scale", ((self.width,), "float32"), manifest)
            self._load(lambda table, layout: open_table(root, f"{name}/{table}", layout, manifest), channels)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"dataset {self.path} of the cache is damaged ({type(error).__name__}: {error}); "
                "run `dvla cache repair` on the cache"
            ) from None

    def _describe(self, attributes: dict[str, Any], manifest: Mapping[str, Any]) -> None:
        self.attributes = a = attributes
        self.views, self.instructions = tuple(a["views"]), tuple(a["instructions"])
        self.tokens, self.width = a["tokens"], a["width"]
        self.frames, self.shard_frames = a["frames"], a["shard_frames"]
        self.frame_stride, self.variants = a["frame_stride"], a["variants"]
        self.format = FeatureFormat(a["dtype"], a["compression"])
        self.embodiment_id, self.control_hz = a["embodiment"], a["control_hz"]
        self.scheme = a.get("config", {}).get("normalize") or "std5"
        self._episodes = len(a["source_hashes"])
        require_names((self.name, *self.views))
        (listed,) = (d for d in manifest["datasets"] if d["name"] == self.name)
        said = {**{key: manifest[key] for key in SHARED}, "views": listed["views"], "frames": listed["frames"]}
        if different := [key for key, value in said.items() if a[key] != value]:
            raise ValueError(f"its {different[0]} are {a[different[0]]}, the manifest has {said[different[0]]}")
        hashes, kept = a.get("view_hashes", {}), a.get("kept")
        counts = [self._episodes, *map(len, filter(None, hashes.values())), *([] if kept is None else [len(kept)])]
        if listed["episodes"] != min(counts) or min(counts) != max(counts) or len(set(self.views)) < len(self.views):
            raise ValueError(f"it lists {sorted(set(counts))} episodes, the manifest {listed['episodes']}")
        if len(set(a["quarantined"])) != listed["quarantined"]:
            raise ValueError(
                f"{len(a['quarantined'])} episodes are quarantined, the manifest has {listed['quarantined']}"
            )

    def _load(self, table: Callable[[str, Layout], np.ndarray], channels: np.ndarray | None) -> None:
        """Take in the tables by name and layout. Large ones stay memory-mapped; taking their rows is cheap."""
        layouts = table_layouts(
            self.frames, self._episodes, len(self.instructions), self.tokens, self.width, self.views
        )
        tables = {name: table(name, layout) for name, layout in layouts.items()}
        for field in ("start", "length", "id", "instruction"):
            setattr(self, f"episode_{field}", np.array(tables[f"episodes/{field}"]))
        for field in ("action", "proprio", "timestamp", "null_text"):
            setattr(self, field, np.asarray(tables[field]))
        self.action_mask, self.proprio_mask = np.array(tables["action_mask"]), np.array(tables["proprio_mask"])
        self.text, self.text_length = np.asarray(tables["text/embedding"]), np.array(tables["text/length"])
        self.channel_scale = None if channels is None else np.array(channels)
        self.null_features = np.stack([tables[f"null/{view}"] for view in self.views])
        count = len(self.instructions)
        self.visible = np.array(self.attributes.get("visible") or [self.tokens] * count, np.int64)
        self.null_visible = self.attributes.get("null_visible") or self.tokens
        self._require_sense()
        self.quarantined = np.isin(self.episode_id, self.attributes["quarantined"])
        self.used = np.ones(len(self.episode_id), bool)
        self.episode_observations = -(-self.episode_length // self.frame_stride)
        self._observed: np.ndarray | None = None  # [observations] int64 frames, where the build kept some only
        if "kept" in self.attributes:
            episodes = zip(self.episode_length.tolist(), self.attributes["kept"], strict=True)
            if any(end > length or first > end for length, kept in episodes for first, end in kept or ()):
                raise ValueError("frames are kept that its episodes do not have")
            frames = [
                EpisodePlan(0, length, "", "", kept=kept).observed(self.frame_stride)
                for length, kept in zip(self.episode_length.tolist(), self.attributes["kept"])
            ]
            self.episode_observations = np.array([len(f) for f in frames], np.int64)
            self._observed = np.concatenate(frames) + np.repeat(self.episode_start, self.episode_observations)
        self.observation_ends = np.cumsum(self.episode_observations)  # [E]
        self._observation_start = self.observation_ends - self.episode_observations

    def _require_sense(self) -> None:
        """`ValueError` unless episodes, texts and their lengths point into the tables."""
        length, text = self.episode_length, self.episode_instruction
        if len(set(self.episode_id.tolist())) < len(length):
            raise ValueError("it lists an episode twice")
        if (
            length.min(initial=1) < 1
            or length.max(initial=1) > self.frames
            or (self.episode_start != np.cumsum(length) - length).any()
        ):
            raise ValueError("its episodes do not follow each other")
        if length.sum() != self.frames:
            raise ValueError(f"its episodes have {length.sum()} frames, its tables {self.frames}")
        if text.min(initial=0) < 0 or text.max(initial=0) >= len(self.text):
            raise ValueError(f"an episode has instruction {text.max()} of {len(self.text)}")
        if self.text_length.min(initial=0) < 0 or self.text_length.max(initial=0) > self.text.shape[1]:
            raise ValueError(f"an instruction has {self.text_length.max()} of {self.text.shape[1]} text tokens")
        if len(self.visible) != len(self.instructions) or max(self.null_visible, *self.visible) > self.tokens:
            raise ValueError(f"of {self.tokens} tokens {self.visible.tolist()[:9]} are visible")
        first, count, layers = self.image_tokens
        if first + count * layers > self.tokens or not layers:
            raise ValueError(f"its image has tokens {first} to {first + count * layers} of {self.tokens}")
        if self.null_text.shape[1] != self.text.shape[2]:
            raise ValueError(f"its empty instruction has width {self.null_text.shape[1]}, text {self.text.shape[2]}")
        for mask in ("action_mask", "proprio_mask"):
            if getattr(self, mask).view(np.uint8).max() > 1:
                raise ValueError(f"{mask} holds something else than true and false")

    @property
    def image_tokens(self) -> tuple[int, int, int]:
        """(first, count, each): where in a record the tokens of the image are, `each` of as many layers in turn."""
        return tuple(self.attributes.get("image_tokens") or (0, self.tokens, 1))  # type: ignore[return-value]

    @cached_property
    def null_records(self) -> tuple[np.ndarray, np.ndarray | None]:
        """The null features as stored: (float16 or codes [views, tokens, D], token scales [views, tokens] or None)."""
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

    def normalize(self, scheme: Scheme, horizon: int | None = None) -> None:
        """Normalize actions and state by `scheme` from now on; loaders that exist keep theirs.

        `horizon`: take actions relative to the state at the start of their chunk, of so many steps, by whose statistics
        they are normalized."""
        self.scheme, self.horizon = scheme, horizon
        for name in ("action_normalizer", "proprio_normalizer", "scale_statistics"):
            self.__dict__.pop(name, None)

    def statistics(self, kind: str) -> Statistics:
        """Of all rows of a table, "action" or "proprio", as stored; with quantiles that an earlier release did not
        store where `scheme` needs them."""
        stats = Statistics.from_dict(self.attributes[f"{kind}_stats"])
        if stats.quantiles is not None or self.scheme != "quantile":
            return stats
        return statistics_of(getattr(self, kind))

    @cached_property
    def scale_statistics(self) -> dict[str, Statistics]:
        """Those that "action" and "proprio" are normalized by: of the tables, or of the actions of all chunks."""
        own = {kind: self.statistics(kind) for kind in ("action", "proprio")}
        return own if self.frame is None else {**own, "action": self._of_chunks()}

    @cached_property
    def _chunk_frame(self) -> ChunkFrame:
        both = set(self.attributes["action_rotation"]) & set(self.attributes["proprio_rotation"])
        rotation = np.isin(np.arange(UNIFIED_DIM), sorted(both))
        return ChunkFrame(self.action_mask & self.proprio_mask, rotation)

    @property
    def frame(self) -> ChunkFrame | None:
        """What makes its actions relative; None where they are absolute, also for lack of a state to compare with."""
        return self._chunk_frame if self.horizon is not None and self._chunk_frame else None

    def chunks(self, rows: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Actions float32 [n, T, 128] of the rows [n, T] of chunks that start at the frames [n]; not normalized."""
        action = self.action[rows]
        return action if self.frame is None else self.frame.encode(action, self.proprio[starts])

    def _of_chunks(self) -> Statistics:
        """Statistics of the actions of the chunks of all observations, before their episode's end."""
        running, step, used = RunningStatistics(), np.arange(self.horizon or 1), np.flatnonzero(self.action_mask)
        frame = self._chunk_frame.on(used)
        for episode in np.flatnonzero(self.used).tolist():
            start, length = int(self.episode_start[episode]), int(self.episode_length[episode])
            action, state = (np.asarray(x[start : start + length])[:, used] for x in (self.action, self.proprio))
            rows = np.arange(0, length, self.frame_stride)
            for first in (rows[i : i + CHUNKS] for i in range(0, len(rows), CHUNKS)):
                row = first[:, None] + step  # [n, T]
                chunks = frame.encode(action[np.minimum(row, length - 1)], state[first])
                running.update(chunks[row < length])
        return running.result().on(self.action_mask)

    def _normalizer(self, kind: str) -> Normalizer:
        rotation = np.isin(np.arange(UNIFIED_DIM), self.attributes[f"{kind}_rotation"])
        return Normalizer(self.scale_statistics[kind], getattr(self, f"{kind}_mask"), rotation, self.scheme)

    def episode_of(self, rows: np.ndarray) -> np.ndarray:
        """Positions in the episode table of rows on the flat time axis, int64; `ValueError` for a row out of range."""
        rows = np.asarray(rows, np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= self.frames):
            raise ValueError(f"{self.name}: rows {rows.min()}…{rows.max()} are not all in 0…{self.frames - 1}")
        return np.searchsorted(self.episode_start, rows, side="right") - 1

    def observation_of(self, rows: np.ndarray) -> np.ndarray:
        """Rows of the feature arrays that belong to frames `rows`, int64; `ValueError` for a frame without features."""
        rows = np.asarray(rows, np.int64)
        if self._observed is not None:
            at = np.searchsorted(self._observed, rows)
            if not (has := self.has_features(rows)).all():
                raise ValueError(f"{self.name}: frame {rows[has.argmin()]} has no features; the build left it out")
            return at
        if self.frame_stride == 1:
            return rows
        episode = self.episode_of(rows)
        step, off = np.divmod(rows - self.episode_start[episode], self.frame_stride)
        if off.any():
            raise ValueError(
                f"{self.name}: frame {rows[off.argmax()]} has no features; the cache holds every {self.frame_stride}th"
            )
        return self._observation_start[episode] + step

    def has_features(self, rows: np.ndarray) -> np.ndarray:
        """bool [n]: which of the frames `rows` [n] are observations."""
        rows = np.asarray(rows, np.int64)
        if self._observed is not None:
            at = np.minimum(np.searchsorted(self._observed, rows), len(self._observed) - 1)
            return self._observed[at] == rows
        return (rows - self.episode_start[self.episode_of(rows)]) % self.frame_stride == 0

    def earlier(
        self, rows: np.ndarray, offsets: tuple[int, ...], features: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """(frames int64 [n, H] at `offsets` [H] ≤ 0 from the frames `rows` [n], bool [n, H]: which of them the episode
        has, with features where these are asked for); in the place of others stand those of `rows`."""
        there = np.ones((len(rows), len(offsets)), bool)
        if offsets == ALONE:
            return rows[:, None], there
        at = rows[:, None] + np.array(offsets)
        there = at >= self.episode_start[self.episode_of(rows)][:, None]
        at = np.where(there, at, rows[:, None])
        if features:
            there &= self.has_features(at.reshape(-1)).reshape(at.shape) | (np.array(offsets) == 0)
        return np.where(there, at, rows[:, None]), there

    def samples(self, episodes: np.ndarray) -> np.ndarray:
        """int64: the observations to train on, as frames, of the episodes at these positions of the table, in order;
        at least one of each."""
        count = self.episode_observations[episodes]
        at = np.arange(count.sum()) + np.repeat(self._observation_start[episodes] - (np.cumsum(count) - count), count)
        frames = self.frame_of(at)
        if self.idle is None:
            return frames
        used = ~self.idle[frames]
        first = np.cumsum(count) - count
        used[first[np.add.reduceat(used, first, dtype=np.int64) == 0] if len(first) else first] = True
        return frames[used]

    @property
    def observations(self) -> int:
        """Rows of the feature arrays."""
        return int(self.episode_observations.sum())

    def frame_of(self, observations: np.ndarray) -> np.ndarray:
        """Inverse of `observation_of`: the frames of rows of the feature arrays, int64."""
        at = np.asarray(observations, np.int64)
        if self._observed is not None:
            return self._observed[at]
        if self.frame_stride == 1:
            return at
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
        """Read the stored features of frames `rows` [n] int64 into `targets`, n buffers of a record each.

        Of an 8-bit cache, their token scales go into `scales`, n buffers of tokens · 4 bytes.
        """
        at, files = self.observation_of(rows), files or self._files
        folder = self._shards(view, variant, features_folder)
        read_records(files, folder, at, targets, self.shard_frames, compression=self._compression)
        if self.format.quantized:
            folder = self._shards(view, variant, scales_folder)
            read_records(files, folder, at, scales, self.shard_frames, tail="0")

    def advise(self, view: str, rows: np.ndarray, files: ShardFiles, variant: int = 0) -> None:
        """Prefetch features of frames `rows` [n] int64, ascending, onto this machine and into its memory."""
        at, record = self.observation_of(rows), self.tokens * self.width * self.format.itemsize
        folder = self._shards(view, variant, features_folder)
        advise_records(files, folder, at, 0 if self._compression else record, self.shard_frames)
        if self.format.quantized:
            folder = self._shards(view, variant, scales_folder)
            advise_records(files, folder, at, 4 * self.tokens, self.shard_frames, tail="0")

    def features(self, view: str, rows: np.ndarray, variant: int = 0) -> np.ndarray:
        """float16 [n, tokens, width] of frames `rows`, dequantized; convenient, not fast."""
        codes, scale = self.records(view, rows, variant)
        if scale is None:
            return codes
        return dequantize(
            torch.from_numpy(codes), torch.from_numpy(scale), torch.from_numpy(self.channel_scale), torch.float16
        ).numpy()

    def records(self, view: str, rows: np.ndarray, variant: int = 0) -> tuple[np.ndarray, np.ndarray | None]:
        """Stored features of frames `rows`: (float16 or codes [n, tokens, width], token scales [n, tokens] or None)."""
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
        """The folder of an array's shards; remembered, since building paths takes longer than a small read."""
        key = view, variant, folder
        if key not in self._shard_folders:
            self._shard_folders[key] = str(self._array(view, variant, folder) / "c")
        return self._shard_folders[key]

    def _array(self, view: str, variant: int, folder: Callable[[Path, str, str], Path]) -> Path:
        if view not in self.views:
            raise unknown(f"view of dataset {self.name}", view, self.views)
        if not 0 <= variant <= self.variants:
            raise UserError(
                f"dataset {self.name} has {self.variants} augmented variants, variant {variant} was requested; "
                "build the cache with --augment"
            )
        return folder(self.path.parent, self.name, array_name(view, variant))
