"""Features of a batch from the live VLM instead of the cache."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ...batch import FeatureBatch, places
from ...errors import UserError
from ..actions.history import NO_HISTORY, History
from ..readers import Source
from ..readers.episode import Episode
from ..readers.faults import whole_dataset
from ..store.cache import Cache
from ..vlm.augment import frame_keys
from ..vlm.encoder import VisionLanguageEncoder
from ..vlm.observations import encode_observations
from .sample import Draws

Images = dict[tuple[int, int, int], np.ndarray]  # uint8 [H,W,3] by (dataset, row, view)


def with_tokens(
    batch: FeatureBatch, tokens: torch.Tensor, cache: Cache, visible: Sequence[int], frames: np.ndarray
) -> FeatureBatch:
    """The batch with tokens [B,H,V,K,D] of samples of `cache`, zeros where a dataset has fewer than V cameras or an
    episode has no such frame (`frames` [B,H] bool); of each record the first `visible` [B] tokens are real."""
    counts = torch.tensor([len(cache.datasets[d].views) for d in batch.dataset.tolist()], device=tokens.device)
    _, h, v, k, _ = tokens.shape
    frame_id, view_id = places(h, v, k, tokens.device)  # [L]
    place = torch.arange(k, device=tokens.device).repeat(h * v)  # [L], in its record
    there = torch.from_numpy(frames).to(tokens.device)[:, frame_id] & (view_id < counts[:, None])  # [B,L]
    return batch.replace(
        tokens=tokens.flatten(1, 3),
        text=batch.text.to(tokens.dtype),
        view_id=view_id.repeat(len(tokens), 1),
        frame_id=frame_id.repeat(len(tokens), 1),
        token_mask=there & (place < torch.tensor(visible, device=tokens.device)[:, None]),
    )


def frames_of(cache: Cache, dataset: np.ndarray, row: np.ndarray, history: History) -> tuple[np.ndarray, np.ndarray]:
    """(rows int64 [B,H], bool [B,H]) of the frames of samples (`dataset`, `row` int64 [B]), as `CacheDataset.earlier`
    gives them."""
    shape = len(row), len(history.frames)
    rows, there = np.empty(shape, np.int64), np.empty(shape, bool)
    for d in np.unique(dataset).tolist():
        rows[dataset == d], there[dataset == d] = cache.datasets[d].earlier(row[dataset == d], history.frames)
    return rows, there


class LiveFeatures:
    """Features of a cache's samples computed from the source images: the batch contract with a live encoder.

    `sources` are the cache's, in its order (`provenance.sources_of`). Decoded episodes are kept in memory while they
    fit in `memory_gib`; beyond it single frames are decoded when needed, or ahead by a loader's threads (`decode`).
    """

    def __init__(
        self,
        encoder: VisionLanguageEncoder,
        cache: Cache,
        sources: Sequence[Source],
        memory_gib: float = 2.0,
        history: History = NO_HISTORY,
    ) -> None:
        self.encoder, self._cache, self._history = encoder, cache, history
        self._sources = tuple(sources)
        self._episodes: dict[tuple[int, int], Episode] = {}
        self._decoded: dict[tuple[int, int, int], np.ndarray] = {}
        self._room = int(memory_gib * 2**30)
        self._reading = threading.Lock()  # of what is kept; single frames are decoded in many threads at once
        self._null: dict[int, torch.Tensor] = {}  # [V,K,D] on the encoder's device, by dataset

    def __call__(
        self,
        batch: FeatureBatch,
        no_images: np.ndarray | None = None,
        variant: np.ndarray | None = None,
        images: Images | None = None,
    ) -> FeatureBatch:
        """`batch` (made without features, tokens [B,0,D]) with live tokens [B,H·V·K,D].

        `no_images` [B] bool (None: none): the cache's null image features take the place of these images. `variant` [B]
        int64 (None: zeros): the augmented variant of each image, 0 = the image itself. `images`: what `decode` gave for
        this batch; others are decoded here. Features that depend on the instruction do so whether or not the text is
        dropped, as in the cache.
        """
        cache, encoder, b = self._cache, self.encoder, len(batch)
        hidden = np.zeros(b, bool) if no_images is None else no_images
        variants = np.zeros(b, np.int64) if variant is None else variant
        ids, row = batch.dataset.cpu().numpy(), batch.frame_index.cpu().numpy()
        rows, there = frames_of(cache, ids, row, self._history)  # [B,H]
        drawn = list(zip(ids.tolist(), rows.tolist(), there.tolist(), hidden.tolist(), variants.tolist()))
        seen = [
            (d, row, range(len(cache.datasets[d].views)), k)
            for d, frames, exist, dropped, k in drawn
            for row, exists in zip(frames, exist)
            if exists and not dropped
        ]
        ready = images or {}
        live = iter(
            encode_observations(
                encoder,
                [
                    [ready[d, row, v] if (d, row, v) in ready else self.frame(d, row, v) for v in views]
                    for d, row, views, _ in seen
                ],
                [self._instruction(d, row) for d, row, _, _ in seen],
                [[self._key(d, row, v, k) for v in views] for d, row, views, k in seen],
            )
        )
        most = max(len(d.views) for d in cache.datasets)
        tokens, none = [], torch.zeros(most, encoder.tokens, encoder.width, dtype=encoder.dtype, device=encoder.device)
        for d, _, exist, dropped, _ in drawn:
            null = self._null_features(d) if dropped else None
            for exists in exist:
                own = none if not exists else next(live) if null is None else null  # [v,K,D]
                tokens.append(F.pad(own, (0, 0, 0, 0, 0, most - len(own))))  # [V,K,D], zeros where there is no camera
        visible = [encoder.visible("" if gone else self._instruction(d, row[0])) for d, row, _, gone, _ in drawn]
        return with_tokens(batch, torch.stack(tokens).unflatten(0, there.shape), cache, visible, there)

    def decode(self, drawn: Draws) -> Images:
        """The images of a batch to come, for `__call__`. Safe in any thread."""
        rows, there = frames_of(self._cache, drawn.dataset, drawn.row, self._history)  # [B,H]
        there &= ~drawn.no_images[:, None]
        keys = {
            (d, row, v)
            for d, frames, exist in zip(drawn.dataset.tolist(), rows.tolist(), there.tolist())
            for row, exists in zip(frames, exist)
            for v in (range(len(self._cache.datasets[d].views)) if exists else ())
        }
        return {key: self.frame(*key) for key in sorted(keys)}

    def frame(self, dataset: int, row: int, view: int) -> np.ndarray:
        """uint8 [H, W, 3]: the source image behind one row of the cache. Safe in any thread."""
        position, step = self._place(dataset, row)
        key = (dataset, position)
        with whole_dataset(self._sources[dataset].path):  # it was sound when the cache was built
            with self._reading:
                if key not in self._episodes:
                    self._episodes[key] = self._load(dataset, position)
                stream = self._episodes[key].views[view]
                size = stream.length * stream.height * stream.width * 3
                if (*key, view) not in self._decoded and size <= self._room:
                    self._room -= size
                    self._decoded[*key, view] = np.stack(list(stream.frames()))
                if (*key, view) in self._decoded:
                    return self._decoded[*key, view][step]
            return next(stream.frames(step, step + 1))

    def _null_features(self, dataset: int) -> torch.Tensor:
        """[V,K,D] as the encoder gives features, copied to its device once."""
        if dataset not in self._null:
            stored = torch.from_numpy(self._cache.datasets[dataset].null_features)
            with torch.inference_mode(False):  # an evaluation may be the first to ask
                self._null[dataset] = stored.to(self.encoder.device, self.encoder.dtype)
        return self._null[dataset]

    def _place(self, dataset: int, row: int) -> tuple[int, int]:
        """(position of the row's episode in the dataset, step in the episode)."""
        table = self._cache.datasets[dataset]
        position = int(table.episode_of(np.array([row]))[0])
        return position, row - int(table.episode_start[position])

    def _instruction(self, dataset: int, row: int) -> str:
        """The episode's own, also where its text is dropped."""
        table = self._cache.datasets[dataset]
        return table.instructions[int(table.episode_instruction[self._place(dataset, row)[0]])]

    def _key(self, dataset: int, row: int, view: int, variant: int) -> int:
        """As the build keys the image's variant; 0 for the image itself."""
        if not variant:
            return 0
        table, (position, step) = self._cache.datasets[dataset], self._place(dataset, row)
        name, episode = table.views[view], int(table.episode_id[position])
        return int(frame_keys(table.name, name, episode, np.array([step]), variant)[0])

    def _load(self, dataset: int, position: int) -> Episode:
        table, source = self._cache.datasets[dataset], self._sources[dataset]
        number = int(table.episode_id[position])
        episode = source.load(number)
        if episode.source_hash != table.attributes["source_hashes"][position]:
            raise UserError(
                f"{source.path}: episode {number} is not the one that cache {self._cache.path} was built from; "
                "restore it, or rebuild the cache"
            )
        return episode
