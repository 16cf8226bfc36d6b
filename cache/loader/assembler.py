"""A batch's memory, and how it is filled from a cache.

Ownership of buffers: each batch lives in one storage, and a storage goes back to the pool only when no tensor shares it
any more. So a batch, or any view of one of its fields, may be kept for any time and is never overwritten; a loop that
drops each batch runs in a few storages. All fields lie in one flat buffer, so that one copy takes a batch to a device.

Letters: B batch, H frames of a sample, V views, P tokens per view, L = H·V·P, D width, Lt text tokens, Dt their width,
T horizon, Hp past states, n samples of one dataset.
"""

from __future__ import annotations

import queue
import weakref

import numpy as np
import torch

from ...batch import UNIFIED_DIM, FeatureBatch, Layout, layout, places
from ..actions.chunk_frame import ChunkFrame
from ..actions.history import NO_HISTORY, History
from ..actions.normalizer import Normalizer
from ..store.cache import Cache
from ..store.codec import dequantize
from ..store.dataset import CacheDataset
from .sample import Draws

ALIGN = 64  # bytes: fields begin at multiples of it; `preadv` to addresses that are not takes nearly twice as long


class Fields:
    """The fields of batches of one geometry, one after another in a flat buffer of `nbytes`."""

    def __init__(self, shapes: Layout) -> None:
        self.shapes, self.parts, self.nbytes = shapes, {}, 0
        for name, (shape, dtype) in shapes.items():
            end = self.nbytes + int(np.prod(shape)) * dtype.itemsize
            self.parts[name] = slice(self.nbytes, end)
            self.nbytes = -(-end // ALIGN) * ALIGN

    def batch(self, flat: torch.Tensor) -> FeatureBatch:
        """The batch in `flat` uint8 [nbytes], wherever that is, as views of it."""
        fields = {n: flat[self.parts[n]].view(dtype).view(shape) for n, (shape, dtype) in self.shapes.items()}
        return FeatureBatch(**fields)

    def arrays(self, memory: np.ndarray) -> dict[str, np.ndarray]:
        """The same fields of `memory` uint8 [nbytes], to be filled."""
        return {n: x.numpy() for n, x in vars(self.batch(torch.from_numpy(memory))).items() if x is not None}


class Storage:
    """One batch's memory.

    `arrays`: the fields by name; `records`, `scales` [B·H·V]: where each frame's features of each view, and their token
    scales, go. `awaited`: whoever copies it to a device keeps it until that is over."""

    def __init__(self, fields: Fields, slots: int, pinned: bool, awaited: bool) -> None:
        self._memory = torch.zeros(fields.nbytes, dtype=torch.uint8, pin_memory=pinned).numpy()
        self._event = torch.cuda.Event() if pinned and not awaited else None
        self.arrays = fields.arrays(self._memory)
        self.records, self.scales = (
            _pieces(self._memory[fields.parts[name]], slots) if name in fields.parts else []
            for name in ("tokens", "token_scale")
        )

    def lease(self, pool: queue.SimpleQueue[Storage]) -> torch.Tensor:
        """The filled buffer. When the last tensor that shares its memory is gone, this storage returns to `pool`."""
        memory = self._memory[:]  # a new array object, which torch keeps alive exactly as long as the tensors
        weakref.finalize(memory, self._released, pool).atexit = False
        return torch.from_numpy(memory)

    def wait(self) -> None:
        """Block until copies to the device that read this storage are over."""
        if self._event is not None:
            self._event.synchronize()

    def _released(self, pool: queue.SimpleQueue[Storage]) -> None:
        if self._event is not None:
            self._event.record()  # on the stream where the last tensor was dropped: the one that copied
        pool.put(self)  # reentrant, so safe in a finalizer


def _pieces(memory: np.ndarray, count: int) -> list[memoryview]:
    """`memory` [nbytes] in `count` equal parts."""
    step = len(memory) // max(count, 1)
    return [memory[at : at + step].data for at in range(0, len(memory), step)] if step else []


def _values(numbers: np.ndarray) -> list[int]:
    """The distinct ones of small `numbers` [n] ≥ 0 (much faster than `np.unique`)."""
    return np.flatnonzero(np.bincount(numbers)).tolist()


class _Table:
    """Rows of a unified table [N, 128] as `Normalizer.normalize` gives them, computed for active slots alone."""

    def __init__(
        self,
        values: np.ndarray,
        normalizer: Normalizer,
        frame: ChunkFrame | None = None,
        state: np.ndarray | None = None,
    ) -> None:
        """`frame`: rows [n, T] are chunks, relative to the `state` [N, 128] of their first row."""
        self._values, self._state, self._slots = values, state, np.flatnonzero(normalizer.mask)
        self._frame = None if frame is None else frame.on(self._slots)
        self._center, self._half_range = normalizer.center[self._slots], normalizer.half_range[self._slots]
        self._rotation, self._limit = normalizer.rotation_slots[self._slots], normalizer.limit

    def write(self, out: np.ndarray, where: np.ndarray, rows: np.ndarray, wanted: np.ndarray) -> None:
        """out[where] = rows [n] or [n, T] of the table, 0 where not `wanted` (of the shape of `rows`)."""
        x = self._values[rows][..., self._slots]  # [n, (T,) active]
        if self._frame is not None and self._state is not None:
            x = self._frame.encode(x, self._state[rows[:, 0]][:, self._slots])
        scaled = np.clip((x - self._center) / self._half_range, -self._limit, self._limit)
        values = np.zeros((*rows.shape, UNIFIED_DIM), np.float32)  # [n, (T,) 128]
        values[..., self._slots] = np.where(self._rotation, x, scaled) * wanted[..., None]
        out[where] = values


class Assembler:
    """Fills storages of one geometry from the cache; shared by the loader's threads."""

    def __init__(
        self,
        cache: Cache,
        batch_size: int,
        horizon: int,
        features: bool,
        pinned: bool,
        awaited: bool = False,
        history: History = NO_HISTORY,
    ) -> None:
        self.cache, self.horizon, self.history, self._memory = cache, horizon, history, (pinned, awaited)
        self.views = max(len(d.views) for d in cache.datasets) if features else 0
        frames = len(history.frames)
        self._frame_id, self._view_id = (x.numpy() for x in places(frames, self.views, cache.tokens))  # [L]
        b, length, width = batch_size, len(self._view_id), cache.width
        text = max(max(d.text.shape[1], len(d.null_text)) for d in cache.datasets), cache.text_width
        stored = getattr(torch, cache.format.zarr_dtype) if features else torch.float16
        self.slots, self.quantized = b * frames * self.views, features and cache.format.quantized
        self.fields = Fields(layout(b, length, width, text, horizon, stored, self.quantized, len(history.states)))
        self._tables = [
            (_Table(d.action, d.action_normalizer, d.frame, d.proprio), _Table(d.proprio, d.proprio_normalizer))
            for d in cache.datasets
        ]
        self.pool: queue.SimpleQueue[Storage] = queue.SimpleQueue()
        self.files = cache.shard_files()

    def __call__(self, draws: Draws) -> torch.Tensor:
        """The flat buffer (see `Fields.batch`) of what was drawn."""
        try:
            storage = self.pool.get_nowait()
            storage.wait()
        except queue.Empty:
            storage = Storage(self.fields, self.slots, *self._memory)
        out = storage.arrays
        out["dataset"][:], out["frame_index"][:] = draws.dataset, draws.row
        out["view_id"][:], out["frame_id"][:] = self._view_id, self._frame_id
        if self.quantized:
            out["channel_scale"][:] = self.cache.datasets[0].channel_scale
        for d in _values(draws.dataset):
            where = np.flatnonzero(draws.dataset == d)
            self._fill(storage, self.cache.datasets[d], self._tables[d], where, draws[where])
        return storage.lease(self.pool)

    def _fill(
        self, storage: Storage, source: CacheDataset, tables: tuple[_Table, _Table], where: np.ndarray, draws: Draws
    ) -> None:
        out, row = storage.arrays, draws.row
        episode = source.episode_of(row)
        if source.quarantined[episode].any():
            raise ValueError(f"{source.name}: rows {row[source.quarantined[episode]]} belong to quarantined episodes")
        out["embodiment"][where], out["control_hz"][where] = source.embodiment_id, source.control_hz
        out["action_mask"][where] = source.action_mask

        end = source.episode_start[episode] + source.episode_length[episode]
        step = row[:, None] + np.arange(self.horizon)  # [n, T] rows of the window
        inside = step < end[:, None]  # [n, T]
        tables[0].write(out["action"], where, np.minimum(step, end[:, None] - 1), inside)
        tables[1].write(out["proprio"], where, row, ~draws.no_proprio)
        out["step_mask"][where] = inside
        if past := self.history.states:
            rows, there = source.earlier(row, past, features=False)  # [n, Hp]
            there &= ~draws.no_proprio[:, None]
            tables[1].write(out["past_proprio"], where, rows, there)
            out["past_mask"][where] = there

        instruction, text = source.episode_instruction[episode], out["text"]
        length = np.where(draws.no_text, len(source.null_text), source.text_length[instruction])
        out["text_mask"][where] = np.arange(text.shape[1]) < length[:, None]
        for at, i, hidden in zip(where.tolist(), instruction.tolist(), draws.no_text.tolist()):
            values = source.null_text if hidden else source.text[i]  # [≤Lt, Dt]
            text[at, : len(values)], text[at, len(values) :] = values, 0
        if self.views:
            self._fill_tokens(storage, source, where, draws, episode)

    def _fill_tokens(
        self, storage: Storage, source: CacheDataset, where: np.ndarray, draws: Draws, episode: np.ndarray
    ) -> None:
        views, p, hidden, frames = self.views, self.cache.tokens, draws.no_images, len(self.history.frames)
        rows, there = source.earlier(draws.row, self.history.frames)  # [n, H]
        visible = np.where(hidden, source.null_visible, source.visible[source.episode_instruction[episode]])  # [n]
        real = np.arange(p) < visible[:, None]  # [n, P]
        real = real[:, None] & (np.arange(views) < len(source.views))[:, None]  # [n, V, P]
        real = there[:, :, None, None] & real[:, None]  # [n, H, V, P]
        storage.arrays["token_mask"][where] = real.reshape(len(where), -1)  # [n, L]
        null, null_scale = source.null_records if hidden.any() else (None, None)
        fields: list[tuple[np.ndarray, np.ndarray | None]] = []
        # [B·H, V, P, D]
        fields.append((storage.arrays["tokens"].reshape(-1, views, p, self.cache.width), null))
        if self.quantized:
            fields.append((storage.arrays["token_scale"].reshape(-1, views, p), null_scale))  # [B·H, V, P]
        slot = where[:, None] * frames + np.arange(frames)  # [n, H] in B·H
        for array, nulls in fields:  # padding and what is missing are masked: but no remains of another batch
            if len(source.views) < views:
                array[slot, len(source.views) :] = 0
            if not there.all():
                array[slot[~there]] = 0
            if nulls is not None:
                array[slot[there & hidden[:, None]], : len(source.views)] = nulls
        for k in _values(draws.variant[~hidden]):
            mine = there & (~hidden & (draws.variant == k))[:, None]  # [n, H]
            read, slots = rows[mine], slot[mine] * views
            for v, view in enumerate(source.views):
                at = (slots + v).tolist()
                source.read_features(
                    view,
                    read,
                    [storage.records[i] for i in at],
                    self.files,
                    scales=[storage.scales[i] for i in at] if self.quantized else (),
                    variant=k,
                )


def decoded(batch: FeatureBatch) -> FeatureBatch:
    """The batch with 8-bit tokens decoded on its device to the dtype of its text; others unchanged. Checked."""
    if batch.token_scale is None or batch.channel_scale is None:
        return batch.check()
    tokens = dequantize(batch.tokens, batch.token_scale, batch.channel_scale, batch.text.dtype)  # [B, L, D]
    return batch.replace(tokens=tokens, token_scale=None, channel_scale=None)
