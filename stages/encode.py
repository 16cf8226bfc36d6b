"""Turning pictures of recorded episodes into features: batches for the encoder, and a reader of single frames.

Letters: V views, K tokens of one picture, D feature width, B samples, H, W picture size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..batch import FeatureBatch
from ..cache.augment import augment, frame_keys
from ..cache.codec import dequantise
from ..cache.encoder import VisionLanguageEncoder
from ..cache.episode import Episode
from ..cache.readers import Source
from ..cache.store import Cache
from ..errors import UserError


def to_float16(features: torch.Tensor, what: str) -> np.ndarray:
    """Features [..., K, D] as float16 numpy, rounded once. `UserError` when a value does not fit, naming the largest."""
    largest = features.abs().max().item() if features.numel() else 0.0
    if not np.isfinite(largest) or largest > float(np.finfo(np.float16).max):
        raise UserError(f"{what}: the encoder gave {largest:g}, which float16 cannot hold; check the weights and their dtype")
    return features.detach().to("cpu", torch.float16).numpy()


def decoded(batch: FeatureBatch) -> FeatureBatch:
    """The batch with 8-bit tokens decoded, on the device it is on, to the dtype of its text; others as they are."""
    if batch.token_scale is None:
        return batch
    tokens = dequantise(batch.tokens, batch.token_scale, batch.channel_scale, batch.text.dtype)     # [B,L,D]
    return batch.replace(tokens=tokens, token_scale=None, channel_scale=None)


class LiveFeatures:
    """Features of a cache's samples computed from the source pictures: the batch contract with a live encoder.

    `sources` are the cache's, in its order (`corpus.sources_of`). Decoded episodes are kept in memory while they fit in
    `memory_gib`; beyond it single frames are decoded when needed.
    """

    def __init__(self, encoder: VisionLanguageEncoder, cache: Cache, sources: Sequence[Source],
                 memory_gib: float = 2.0) -> None:
        self.encoder, self._cache = encoder, cache
        self._sources = tuple(sources)
        self._episodes: dict[tuple[int, int], Episode] = {}
        self._decoded: dict[tuple[int, int, int], np.ndarray] = {}
        self._room = int(memory_gib * 2**30)

    def __call__(self, batch: FeatureBatch, masked: np.ndarray, variant: np.ndarray | None = None) -> FeatureBatch:
        """`batch` (made without features, tokens [B,0,D]) with live tokens [B,V·K,D].

        `masked` [B] bool: the cache's null image features take the place of these samples' pictures. `variant` [B] int64: the
        augmented variant of each sample's pictures, 0 = as they are.
        """
        datasets, rows = batch.dataset.tolist(), batch.frame_index.tolist()
        cache, k = self._cache, self._cache.tokens
        views = max(len(d.views) for d in cache.datasets)
        shapes: dict[tuple[int, ...], list[tuple[int, int, np.ndarray, int]]] = {}    # (b, v, picture, key of its variant)
        tokens = torch.zeros(len(rows), views, k, cache.width, dtype=self.encoder.dtype)            # [B,V,K,D]
        for b, (d, row) in enumerate(zip(datasets, rows)):
            source = cache.datasets[d]
            if masked[b]:
                tokens[b, :len(source.views)] = torch.from_numpy(source.null_features).to(tokens.dtype)
                continue
            for v in range(len(source.views)):
                picture = self.frame(d, row, v)
                key = self._key(d, row, v, int(variant[b])) if variant is not None and variant[b] else 0
                shapes.setdefault(picture.shape, []).append((b, v, picture, key))
        tokens = tokens.to(self.encoder.device)
        for items in shapes.values():       # cameras of different sizes cannot share one array
            pictures = torch.from_numpy(np.stack([p for _, _, p, _ in items])).to(self.encoder.device)  # [n,H,W,3]
            keys = np.array([k for *_, k in items], np.uint64)
            if keys.any():
                pictures[keys > 0] = augment(pictures[keys > 0], keys[keys > 0])
            live = self.encoder.encode_images(pictures)                                             # [n,K,D]
            index = torch.tensor([(b, v) for b, v, _, _ in items], device=live.device)              # [n,2]
            tokens = tokens.index_put((index[:, 0], index[:, 1]), live)
        counts = torch.tensor([len(cache.datasets[d].views) for d in datasets], device=batch.tokens.device)
        view_id = torch.arange(views, device=counts.device).repeat_interleave(k).expand(len(rows), -1)  # [B,V·K]
        return batch.replace(tokens=tokens.flatten(1, 2), text=batch.text.to(tokens.dtype), view_id=view_id.contiguous(),
                             frame_id=torch.zeros_like(view_id), token_mask=view_id < counts[:, None])

    def frame(self, dataset: int, row: int, view: int) -> np.ndarray:
        """uint8 [H, W, 3]: the source picture behind one row of the cache."""
        table = self._cache.datasets[dataset]
        position = int(table.episode_of(np.array([row]))[0])
        step, key = row - int(table.episode_start[position]), (dataset, position)
        if key not in self._episodes:
            self._episodes[key] = self._load(dataset, position)
        stream = self._episodes[key].views[view]
        if (*key, view) in self._decoded:
            return self._decoded[*key, view][step]
        size = stream.length * stream.height * stream.width * 3
        if size > self._room:
            return next(stream.frames(step, step + 1))
        self._room -= size
        self._decoded[*key, view] = np.stack(list(stream.frames()))
        return self._decoded[*key, view][step]

    def _key(self, dataset: int, row: int, view: int, variant: int) -> int:
        """As the build keys the picture's variant."""
        table = self._cache.datasets[dataset]
        position = int(table.episode_of(np.array([row]))[0])
        frame = np.array([row - int(table.episode_start[position])])
        return int(frame_keys(table.name, table.views[view], int(table.episode_id[position]), frame, variant)[0])

    def _load(self, dataset: int, position: int) -> Episode:
        table, source = self._cache.datasets[dataset], self._sources[dataset]
        number = int(table.episode_id[position])
        episode = source.load(number)
        if episode.source_hash != table.attributes["source_hashes"][position]:
            raise UserError(f"{source.path}: episode {number} is not the one that cache {self._cache.path} was built from; "
                            "restore it, or build the cache again")
        return episode
