"""The observations of a cache as a map-style dataset, for `torch.utils.data.DataLoader`.

Letters: H frames of a sample, L vision tokens of all frames and views, D their width, Lt text tokens, Dt their width,
T action steps, Hp past states, E episodes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ...batch import places
from ...errors import UserError
from ..actions.history import NO_HISTORY, History
from ..actions.slots import UNIFIED_DIM


class CacheSamples(Dataset[dict[str, torch.Tensor]]):
    """Every observation of a cache that is not quarantined, in order of datasets and episodes; made by `Cache.dataset`.

    A sample is a dict of the fields of `FeatureBatch` without their batch dimension, all of one shape, so that the
    default collate function stacks them and `FeatureBatch(**batch)` is a batch for the model. Reading single samples is
    slow beside `dvla.Loader`, which fills whole batches in place.

    `episode_ends` [E] int64: episode e is samples `episode_ends[e - 1]` to `episode_ends[e] - 1`, for splits by
    episode.
    """

    def __init__(self, cache: Any, horizon: int = 16, history: History = NO_HISTORY) -> None:
        """`cache`: a `Cache`, which builds on this file."""
        if horizon < 1:
            raise UserError(f"horizon {horizon}: give at least 1 action step")
        require_history(cache, history)
        self.cache, self.horizon, self.history = cache, horizon, history
        usable = [np.flatnonzero(~d.quarantined) for d in cache.datasets]
        self._dataset = np.repeat(np.arange(len(usable)), [len(e) for e in usable])  # [E]
        self._episode = np.concatenate(usable)  # [E], position in its dataset's table
        counts = [d.episode_observations[e] for d, e in zip(cache.datasets, usable)]
        self.episode_ends: np.ndarray = np.cumsum(np.concatenate(counts)).astype(np.int64)
        self._views = max(len(d.views) for d in cache.datasets)
        self._text = max(max(d.text.shape[1], len(d.null_text)) for d in cache.datasets)  # Lt

    def __len__(self) -> int:
        return int(self.episode_ends[-1]) if len(self.episode_ends) else 0

    def __repr__(self) -> str:
        return f"CacheSamples(samples {len(self)}, episodes {len(self.episode_ends)}, horizon {self.horizon})"

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Sample `index`; `IndexError` beyond the last one, `UserError` naming the shard for a damaged cache."""
        at = index + len(self) if index < 0 else index
        if not 0 <= at < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        k = int(np.searchsorted(self.episode_ends, at, side="right"))
        number, episode = int(self._dataset[k]), int(self._episode[k])
        source = self.cache.datasets[number]
        observation = at - int(self.episode_ends[k]) + int(source.observation_ends[episode])
        row = int(source.frame_of(np.array([observation]))[0])
        return {
            **self._vision(source, row, int(source.episode_instruction[episode])),
            **self._language(source, int(source.episode_instruction[episode])),
            **self._motion(source, row, int(source.episode_start[episode] + source.episode_length[episode])),
            **self._past(source, row),
            "embodiment": torch.tensor(source.embodiment_id),
            "control_hz": torch.tensor(source.control_hz, dtype=torch.float32),
            "dataset": torch.tensor(number),
            "frame_index": torch.tensor(row),
        }

    def _vision(self, source: Any, row: int, instruction: int) -> dict[str, torch.Tensor]:
        """Features of all frames and views, 8-bit ones decoded; frames that the episode and views that this dataset
        lacks are zeros, masked."""
        (rows,), (there,) = source.earlier(np.array([row]), self.history.frames)  # [H] each
        p = source.tokens
        frame_id, view_id = places(len(rows), self._views, p)  # [L]
        tokens = np.zeros((len(rows), self._views, p, source.width), np.float16)  # [H, V, P, D]
        for v, view in enumerate(source.views):
            tokens[there, v] = source.features(view, rows[there])
        return {
            "tokens": torch.from_numpy(tokens.reshape(len(view_id), -1)),
            "token_mask": torch.from_numpy(there)[frame_id]
            & (view_id < len(source.views))
            & (torch.arange(len(view_id)) % p < int(source.visible[instruction])),
            "view_id": view_id,
            "frame_id": frame_id,
        }

    def _language(self, source: Any, instruction: int) -> dict[str, torch.Tensor]:
        """The instruction's embedding, padded to the longest of the cache."""
        text = np.zeros((self._text, source.text.shape[2]), np.float16)  # [Lt, Dt]
        text[: source.text.shape[1]] = source.text[instruction]
        return {
            "text": torch.from_numpy(text),
            "text_mask": torch.arange(self._text) < int(source.text_length[instruction]),
        }

    def _motion(self, source: Any, row: int, end: int) -> dict[str, torch.Tensor]:
        """Normalized state, and the coming window of normalized actions: zero and masked from the episode's `end`
        on."""
        stop = min(row + self.horizon, end)
        action = np.zeros((self.horizon, UNIFIED_DIM), np.float32)  # [T, 128]
        chunk = source.chunks(np.arange(row, stop)[None], np.array([row]))[0]  # [≤T, 128]
        action[: stop - row] = source.action_normalizer.normalize(chunk)
        return {
            "proprio": torch.from_numpy(source.proprio_normalizer.normalize(source.proprio[row])),
            "action": torch.from_numpy(action),
            "action_mask": torch.from_numpy(source.action_mask.copy()),
            "step_mask": torch.arange(self.horizon) < stop - row,
        }

    def _past(self, source: Any, row: int) -> dict[str, torch.Tensor]:
        """Normalized earlier states, where the history has some."""
        if not self.history.states:
            return {}
        (rows,), (there,) = source.earlier(np.array([row]), self.history.states, features=False)  # [Hp] each
        states = source.proprio_normalizer.normalize(source.proprio[rows]) * there[:, None]
        return {"past_proprio": torch.from_numpy(states), "past_mask": torch.from_numpy(there)}


def require_history(cache: Any, history: History) -> None:
    """`UserError` for frames that a cache cannot hold: it has every so many of an episode."""
    stride = max(d.frame_stride for d in cache.datasets)
    if wrong := [offset for offset in history.frames if offset % stride]:
        raise UserError(
            f"history reaches {-wrong[0]} frames back, and cache {cache.path} holds every {stride}th frame "
            f"(--frame-stride); give multiples of {stride}"
        )
