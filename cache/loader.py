"""From cache to FeatureBatch: threads `preadv` features straight into reused batch buffers, in a fixed global order.

Ownership of buffers: each batch lives in one storage, and a storage goes back to the pool only when no tensor shares
it any more. So a batch, or any view of one of its fields, may be kept as long as one likes and is never overwritten;
a loop that drops each batch runs in `prefetch` + 2 storages. (With CUDA the storages are pinned, and an event recorded
when a batch is dropped is awaited before refilling: copy with `non_blocking=True` on the stream that is current then.)

Letters: B batch, V views, P tokens per view, L = V·P, D width, Lt text tokens, Dt their width, T horizon, E episodes.
"""

from __future__ import annotations

import queue
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from ..batch import UNIFIED_DIM, FeatureBatch
from ..errors import UserError
from .sampling import SampleOrder, held_out, mixture, override, uniform
from .store import Cache, CacheDataset

LIVE_VARIANTS = 1 << 16     # a live encoder makes any variant; so many differ
_DTYPES = {torch.float16: np.float16, torch.float32: np.float32, torch.int64: np.int64, torch.bool: np.bool_, torch.int8: np.int8,
           torch.uint8: np.uint8}


@dataclass(frozen=True)
class ConditionMasking:
    """How often a condition is replaced by its null, for classifier-free guidance; each drawn on its own.

    Null text and images are the cache's features of an empty instruction and of black frames; null proprio is zeros.
    """

    text: float = 0.1       # probability
    images: float = 0.1     # probability, all views of a sample together; 1.0 trains a blind policy
    proprio: float = 0.1    # probability

    def __post_init__(self) -> None:
        for name in ("text", "images", "proprio"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"condition masking of {name} is {getattr(self, name)}; a probability lies in 0…1")

    def draw(self, seed: int, position: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(text, images, proprio) bool [n]: what is masked at these global sample positions."""
        p = (self.text, self.images, self.proprio)
        text, images, proprio = (uniform(seed, 4, stream, position) < p[stream] for stream in range(3))
        return text, images, proprio


class _Storage:
    """One batch's memory: a flat buffer, seen as numpy arrays to fill and handed out as tensors.

    `arrays`: the fields by name; `records`, `scales` [B·V]: where each frame's features of each view, and their token scales, go.
    """

    def __init__(self, fields: Mapping[str, tuple[tuple[int, ...], torch.dtype]], slots: int, pinned: bool) -> None:
        self._fields, self._offsets, size = fields, {}, 0
        for name, (shape, dtype) in fields.items():
            self._offsets[name] = size, size + int(np.prod(shape)) * dtype.itemsize
            size = -(-self._offsets[name][1] // 64) * 64
        self._memory = torch.zeros(size, dtype=torch.uint8, pin_memory=pinned).numpy()
        self._event = torch.cuda.Event() if pinned else None
        self.arrays = {n: self._memory[slice(*self._offsets[n])].view(_DTYPES[dtype]).reshape(shape)
                       for n, (shape, dtype) in fields.items()}
        self.records = self._parts("tokens", slots)
        self.scales = self._parts("token_scale", slots) if "token_scale" in fields else []

    def _parts(self, name: str, slots: int) -> list[memoryview]:
        begin, end = self._offsets[name]
        step = (end - begin) // max(slots, 1)
        return [memoryview(self._memory[at:at + step]) for at in range(begin, end, step)] if step else []

    def lease(self, pool: queue.SimpleQueue[_Storage]) -> FeatureBatch:
        """The filled batch. When the last tensor that shares its memory is gone, this storage returns to `pool`."""
        memory = self._memory[:]        # a new array object, which torch keeps alive exactly as long as the tensors
        weakref.finalize(memory, self._released, pool).atexit = False
        flat = torch.from_numpy(memory)
        return FeatureBatch(**{n: flat[slice(*self._offsets[n])].view(dtype).view(shape)
                               for n, (shape, dtype) in self._fields.items()})

    def wait(self) -> None:
        """Block until copies to the device that read this storage are over."""
        if self._event is not None:
            self._event.synchronize()

    def _released(self, pool: queue.SimpleQueue[_Storage]) -> None:
        if self._event is not None:
            self._event.record()
        pool.put(self)      # reentrant, so safe in a finaliser


class _Assembler:
    """Fills storages of one geometry from the cache; shared by the loader's threads."""

    def __init__(self, cache: Cache, batch_size: int, horizon: int, features: bool, pinned: bool) -> None:
        self.cache, self.horizon, self.pinned = cache, horizon, pinned
        self.views = max(len(d.views) for d in cache.datasets) if features else 0
        b, length, width = batch_size, self.views * cache.tokens, cache.width
        text = max(max(d.text.shape[1], len(d.null_text)) for d in cache.datasets), cache.text_width
        half, real, integer, boolean = torch.float16, torch.float32, torch.int64, torch.bool
        stored = getattr(torch, cache.format.zarr_dtype) if features else half
        self.slots, self.quantised = b * self.views, features and cache.format.quantised
        self.fields = {
            "tokens": ((b, length, width), stored), "token_mask": ((b, length), boolean),
            "view_id": ((b, length), integer), "frame_id": ((b, length), integer),
            "text": ((b, *text), half), "text_mask": ((b, text[0]), boolean),
            "proprio": ((b, UNIFIED_DIM), real), "action": ((b, horizon, UNIFIED_DIM), real),
            "action_mask": ((b, UNIFIED_DIM), boolean), "step_mask": ((b, horizon), boolean),
            "embodiment": ((b,), integer), "control_hz": ((b,), real),
            "dataset": ((b,), integer), "frame_index": ((b,), integer)}
        if self.quantised:
            self.fields |= {"token_scale": ((b, length), real), "channel_scale": ((width,), real)}
        self.pool: queue.SimpleQueue[_Storage] = queue.SimpleQueue()
        self.files = cache.shard_files()

    def __call__(self, dataset: np.ndarray, row: np.ndarray, masked: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
                 variant: np.ndarray | None = None) -> FeatureBatch:
        """The batch of the samples (dataset [B], row [B]) with the conditions `masked` ([B] bool each) replaced, each seen in its
        augmented `variant` [B] (0: as it is)."""
        try:
            storage = self.pool.get_nowait()
            storage.wait()
        except queue.Empty:
            storage = _Storage(self.fields, self.slots, self.pinned)
            if self.quantised:
                storage.arrays["channel_scale"][:] = self.cache.datasets[0].channel_scale
        none, variant = np.zeros(len(row), bool), np.zeros(len(row), np.int64) if variant is None else variant
        storage.arrays["dataset"][:], storage.arrays["frame_index"][:] = dataset, row
        for d in np.unique(dataset):
            where = np.flatnonzero(dataset == d)
            self._fill(storage, self.cache.datasets[d], where, row[where], variant[where], *(m[where] for m in masked or (none,) * 3))
        return storage.lease(self.pool).check()

    def _fill(self, storage: _Storage, source: CacheDataset, where: np.ndarray, row: np.ndarray, variant: np.ndarray,
              no_text: np.ndarray, no_images: np.ndarray, no_proprio: np.ndarray) -> None:
        out = storage.arrays
        episode = source.episode_of(row)
        if source.quarantined[episode].any():
            raise ValueError(f"{source.name}: rows {row[source.quarantined[episode]]} belong to quarantined episodes")
        out["embodiment"][where], out["control_hz"][where] = source.embodiment_id, source.control_hz
        out["action_mask"][where] = source.action_mask

        end = source.episode_start[episode] + source.episode_length[episode]
        step = row[:, None] + np.arange(self.horizon)                           # [n, T] rows of the window
        inside = step < end[:, None]                                            # [n, T]
        window = source.action[np.minimum(step, end[:, None] - 1)]              # [n, T, 128]
        out["action"][where] = source.action_normalizer.normalize(window) * inside[..., None]
        out["step_mask"][where] = inside
        proprio = source.proprio_normalizer.normalize(source.proprio[row])      # [n, 128]
        out["proprio"][where] = proprio * ~no_proprio[:, None]

        instruction = source.episode_instruction[episode]
        length = np.where(no_text, len(source.null_text), source.text_length[instruction])
        out["text_mask"][where] = np.arange(out["text"].shape[1]) < length[:, None]
        text = np.zeros((len(row), *out["text"].shape[1:]), np.float16)         # [n, Lt, Dt]
        text[:, :source.text.shape[1]] = source.text[instruction]
        text[no_text] = 0
        text[no_text, :len(source.null_text)] = source.null_text
        out["text"][where] = text
        if self.views:
            self._fill_tokens(storage, source, where, row, variant, no_images)

    def _fill_tokens(self, storage: _Storage, source: CacheDataset, where: np.ndarray, row: np.ndarray, variant: np.ndarray,
                     no_images: np.ndarray) -> None:
        views, p = self.views, self.cache.tokens
        view_of_token = np.repeat(np.arange(views), p)                                          # [L]
        storage.arrays["view_id"][where], storage.arrays["frame_id"][where] = view_of_token, 0
        storage.arrays["token_mask"][where] = view_of_token < len(source.views)
        null, null_scale = source.null_records if no_images.any() else (None, None)
        fields = [(storage.arrays["tokens"].reshape(-1, views, p, self.cache.width), null)]    # [B, V, P, D]
        if self.quantised:
            fields.append((storage.arrays["token_scale"].reshape(-1, views, p), null_scale))    # [B, V, P]
        for array, nulls in fields:
            if len(source.views) < views:
                array[where, len(source.views):] = 0    # padding, masked: but no remains of another batch
            if nulls is not None:
                array[where[no_images], :len(source.views)] = nulls
        for k in np.unique(variant[~no_images]).tolist():
            mine = ~no_images & (variant == k)
            for v, view in enumerate(source.views):
                at = (where[mine] * views + v).tolist()
                source.read_features(view, row[mine], [storage.records[i] for i in at], self.files,
                                     scales=[storage.scales[i] for i in at] if self.quantised else (), variant=k)


def gather(cache: Cache, dataset_ids: np.ndarray, frame_rows: np.ndarray, horizon: int = 16, *,
           masked: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None, features: bool = True) -> FeatureBatch:
    """The batch of chosen frames, made by the loader's own code: `dataset_ids`, `frame_rows` int64 [B].

    `masked`: (text, images, proprio) bool [B] to replace by their nulls. `ValueError` for rows out of range or of
    quarantined episodes; `UserError` naming the shard for a damaged cache.
    """
    dataset, row = np.asarray(dataset_ids, np.int64), np.asarray(frame_rows, np.int64)
    assembler = _Assembler(cache, len(row), horizon, features, pinned=False)
    try:
        return assembler(dataset, row, masked)
    finally:
        assembler.files.close()


class Loader:
    """An endless iterator of this rank's batches, [batch_size] samples each. Close it, or use it as a context manager.

    Sample position s of the run is the same sample for every `world_size`, `batch_size` and `threads`; the global batch
    is `world_size · batch_size` consecutive positions, of which rank r takes the r-th part. To resume, pass
    `start=state_dict()["offset"]`, on any number of ranks.

    Only observations are sampled: every `frame_stride`-th frame of an episode. `augment` draws each sample's pictures among
    themselves and the cache's augmented variants (`UserError` when it has none; without `features` any variant goes).

    `split` "train" or "eval" leaves out or keeps the `holdout` fraction of each dataset's episodes, chosen by
    (`holdout_seed`, episode id); "all" takes every one. Quarantined episodes are never sampled. `temperature` and
    `weights` (dataset → share, in place of what its `sampling_weight` gives): see sampling.py. `features=False` gives
    tokens [B, 0, D], for a live encoder.
    """

    def __init__(self, cache: Cache, *, batch_size: int, horizon: int = 16, seed: int = 0, threads: int = 2,
                 rank: int = 0, world_size: int = 1, start: int = 0, prefetch: int = 3,
                 masking: ConditionMasking | None = None, split: Literal["train", "eval", "all"] = "train",
                 holdout: float = 0.0, holdout_seed: int = 0, temperature: float = 0.5,
                 weights: Mapping[str, float] | None = None, features: bool = True,
                 pinned: bool | None = None, augment: bool = False) -> None:
        if min(batch_size, horizon, threads, prefetch, world_size) < 1 or not 0 <= rank < world_size or start < 0:
            raise UserError(f"batch size {batch_size}, horizon {horizon}, threads {threads}, prefetch {prefetch} must "
                            f"be at least 1, rank {rank} below world size {world_size}, start {start} at least 0")
        if augment and features:
            require_variants(cache)
        self.cache, self.masking, self.seed, self.wait_seconds = cache, masking, seed, 0.0
        self._variants = 1 + (0 if not augment else cache.variants if features else LIVE_VARIANTS)
        self._batch_size, self._global_batch, self._rank = batch_size, batch_size * world_size, rank
        self._episodes = [_episodes(d, split, holdout, holdout_seed) for d in cache.datasets]
        self._ends = [np.cumsum(d.episode_observations[e]) for d, e in zip(cache.datasets, self._episodes)]
        self.sizes = [int(ends[-1]) if len(ends) else 0 for ends in self._ends]     # samples of each dataset
        if not any(self.sizes):
            raise UserError(f"no episode of {cache.path} is in split {split} with holdout {holdout}; change it")
        factors = [float(d.attributes.get("sampling_weight", 1.0)) for d in cache.datasets]    # absent in older caches
        shares = override(mixture(self.sizes, temperature, factors), [d.name for d in cache.datasets], weights or {})
        self.order = SampleOrder(self.sizes, shares, seed)
        pinned = torch.cuda.is_available() if pinned is None else pinned
        self._assemble = _Assembler(cache, batch_size, horizon, features, pinned)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="dvla-loader")
        self._delivered = self._submitted = start
        self._coming: deque[Future[FeatureBatch]] = deque()
        for _ in range(max(prefetch, threads)):
            self._submit()

    def __iter__(self) -> Iterator[FeatureBatch]:
        return self

    def __next__(self) -> FeatureBatch:
        began = time.perf_counter()
        batch = self._coming[0].result()
        self._coming.popleft()
        self.wait_seconds += time.perf_counter() - began
        self._delivered += self._global_batch
        self._submit()
        return batch

    def state_dict(self) -> dict[str, int]:
        """{"offset": global position of the first sample not yet delivered}."""
        return {"offset": self._delivered}

    def samples(self, offset: int) -> tuple[np.ndarray, np.ndarray]:
        """(dataset, frame row) int64 [batch_size] of this rank's batch whose global batch begins at `offset`."""
        dataset, index = self.order.batch(offset + self._rank * self._batch_size, self._batch_size)
        row = np.empty_like(index)
        for d in np.unique(dataset):
            here, source = dataset == d, self.cache.datasets[d]
            k = np.searchsorted(self._ends[d], index[here], side="right")       # which of the split's episodes
            episode = self._episodes[d][k]
            step = index[here] - (self._ends[d][k] - source.episode_observations[episode])
            row[here] = source.episode_start[episode] + step * source.frame_stride
        return dataset, row

    def masked(self, offset: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(text, images, proprio) bool [batch_size]: the conditions replaced by nulls in this rank's batch at `offset`."""
        position = offset + self._rank * self._batch_size + np.arange(self._batch_size)
        return (self.masking or ConditionMasking(0.0, 0.0, 0.0)).draw(self.seed, position)

    def variants(self, offset: int) -> np.ndarray:
        """int64 [batch_size]: the augmented variant of each sample of this rank's batch at `offset`; 0 is the picture itself."""
        position = offset + self._rank * self._batch_size + np.arange(self._batch_size)
        return (uniform(self.seed, 7, position) * self._variants).astype(np.int64)

    def close(self) -> None:
        """Stop the threads and close the files. Batches already handed out stay valid."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._coming.clear()
        self._assemble.files.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _submit(self) -> None:
        self._coming.append(self._threads.submit(self._make, self._submitted))
        self._submitted += self._global_batch

    def _make(self, offset: int) -> FeatureBatch:
        return self._assemble(*self.samples(offset), self.masked(offset), self.variants(offset))


def require_variants(cache: Cache) -> None:
    """`UserError` for a cache that cannot honour training on augmented pictures."""
    if not cache.variants:
        raise UserError(f"cache {cache.path} holds no augmented pictures; build it with --augment 4, or train without augmentation")


def _episodes(source: CacheDataset, split: str, holdout: float, seed: int) -> np.ndarray:
    """Positions int64 of the dataset's usable episodes in a split."""
    usable = np.flatnonzero(~source.quarantined)
    out = held_out(source.name, source.episode_id[usable], holdout, seed)
    chosen = {"train": ~out, "eval": out, "all": np.ones_like(out)}
    if split not in chosen:
        raise UserError(f"split '{split}' is not one of {', '.join(chosen)}")
    return usable[chosen[split]]
