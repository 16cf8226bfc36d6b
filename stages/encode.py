"""Turning pictures of recorded episodes into features: batches for the encoder, and a reader of single frames.

Letters: V views, K tokens of one picture, D feature width, B samples, H, W picture size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch

from ..batch import FeatureBatch
from ..cache.encoder import VisionLanguageEncoder
from ..cache.episode import Episode
from ..cache.readers import Source
from ..cache.store import Cache
from ..errors import UserError


def batches(frames: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Group pictures [H, W, 3] into uint8 [n, H, W, 3] with n <= size."""
    while block := list(islice(frames, size)):
        yield np.stack(block)


def to_float16(features: torch.Tensor, what: str) -> np.ndarray:
    """Features [..., K, D] as float16 numpy, rounded once. `UserError` when a value does not fit, naming the largest."""
    largest = features.abs().max().item() if features.numel() else 0.0
    if not np.isfinite(largest) or largest > float(np.finfo(np.float16).max):
        raise UserError(f"{what}: the encoder gave {largest:g}, which float16 cannot hold; check the weights and their dtype")
    return features.detach().to("cpu", torch.float16).numpy()


class LiveFeatures:
    """Features of a cache's samples computed from the source pictures: the batch contract with a live encoder.

    Decoded episodes are kept in memory while they fit in `memory_gib`; beyond it single frames are decoded when needed.
    """

    def __init__(self, encoder: VisionLanguageEncoder, cache: Cache, sources: Sequence[Source],
                 memory_gib: float = 2.0) -> None:
        self.encoder, self._cache = encoder, cache
        self._sources = match_sources(cache, sources)
        self._episodes: dict[tuple[int, int], Episode] = {}
        self._decoded: dict[tuple[int, int, int], np.ndarray] = {}
        self._room = int(memory_gib * 2**30)

    def __call__(self, batch: FeatureBatch, masked: np.ndarray) -> FeatureBatch:
        """`batch` (made without features, tokens [B,0,D]) with live tokens [B,V·K,D].

        `masked` [B] bool: the cache's null image features take the place of these samples' pictures.
        """
        datasets, rows = batch.dataset.tolist(), batch.frame_index.tolist()
        cache, k = self._cache, self._cache.tokens
        views = max(len(d.views) for d in cache.datasets)
        shapes: dict[tuple[int, ...], list[tuple[int, int, np.ndarray]]] = {}
        tokens = torch.zeros(len(rows), views, k, cache.width, dtype=self.encoder.dtype)            # [B,V,K,D]
        for b, (d, row) in enumerate(zip(datasets, rows)):
            source = cache.datasets[d]
            if masked[b]:
                tokens[b, :len(source.views)] = torch.from_numpy(source.null_features).to(tokens.dtype)
                continue
            for v in range(len(source.views)):
                picture = self.frame(d, row, v)
                shapes.setdefault(picture.shape, []).append((b, v, picture))
        tokens = tokens.to(self.encoder.device)
        for items in shapes.values():       # cameras of different sizes cannot share one array
            live = self.encoder.encode_images(np.stack([p for _, _, p in items]))                   # [n,K,D]
            index = torch.tensor([(b, v) for b, v, _ in items], device=live.device)                 # [n,2]
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

    def _load(self, dataset: int, position: int) -> Episode:
        table, source = self._cache.datasets[dataset], self._sources[dataset]
        number = int(table.episode_id[position])
        episode = source.load(number)
        if episode.source_hash != table.attributes["source_hashes"][position]:
            raise UserError(f"{source.path}: episode {number} is not the one that cache {self._cache.path} was built from; "
                            "restore it, or build the cache again")
        return episode


def match_sources(cache: Cache, sources: Sequence[Source]) -> list[Source]:
    """The source of every dataset of the cache, in the cache's order. `UserError` naming a dataset without a source."""
    given = {s.name: s for s in sources}
    missing = [d.name for d in cache.datasets if d.name not in given]
    if missing:
        raise UserError(f"cache {cache.path} holds dataset '{missing[0]}', for which no source was given "
                        f"(given: {', '.join(given) or 'none'}); add its folder")
    return [given[d.name] for d in cache.datasets]
