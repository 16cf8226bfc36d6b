"""Turning observations (pictures of each view, and an instruction) into features: calls of the encoder, and a reader of single frames.

Letters: n observations of one call, V views, K tokens of one picture, D feature width, B samples, H, W picture size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ..batch import FeatureBatch
from ..cache.augment import augment, frame_keys
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


@dataclass(frozen=True)
class EncoderCall:
    """What goes through the encoder at once: the same views of n observations, with one instruction."""

    views: tuple[np.ndarray, ...]           # pictures uint8 [n,H,W,3] of each view
    instruction: str                        # "" where features do not depend on it
    members: tuple[tuple[int, int], ...]    # n times (number of the observation, number of the first of its views)


def encoder_calls(encoder: VisionLanguageEncoder, pictures: Sequence[Sequence[np.ndarray]], instructions: Sequence[str],
                  most: int | None = None) -> list[EncoderCall]:
    """Pictures uint8 [H,W,3] of each view of observations, and their instructions → as few calls as hold them all, of at most `most`
    pictures (None: any number). Pictures of one size share a call; where an observation is encoded as a whole, observations do whose
    pictures have the same sizes and whose instruction is the same."""
    groups: dict[tuple[str, tuple[tuple[int, ...], ...]], list[tuple[int, int]]] = {}
    for i, (views, instruction) in enumerate(zip(pictures, instructions)):
        if encoder.by_observation:
            groups.setdefault((instruction, tuple(p.shape for p in views)), []).append((i, 0))
            continue
        for v, picture in enumerate(views):
            groups.setdefault(("", (picture.shape,)), []).append((i, v))
    calls = []
    for (instruction, sizes), members in groups.items():
        step = len(members) if most is None else max(1, most // len(sizes))
        for at in range(0, len(members), step):
            part = members[at:at + step]
            views = tuple(np.stack([pictures[i][first + v] for i, first in part]) for v in range(len(sizes)))
            calls.append(EncoderCall(views, instruction, tuple(part)))
    return calls


def encode_observations(encoder: VisionLanguageEncoder, pictures: Sequence[Sequence[np.ndarray]], instructions: Sequence[str],
                        keys: Sequence[Sequence[int]] | None = None) -> list[torch.Tensor]:
    """Pictures uint8 [H,W,3] of each view of each observation, and their instructions → features [V,K,D] of each, with a graph where the
    encoder learns. `keys`: of each picture's augmented variant, 0 = as it is."""
    found: list[list[torch.Tensor]] = [[torch.empty(0)] * len(views) for views in pictures]
    for call in encoder_calls(encoder, pictures, instructions):
        views = []
        for v, images in enumerate(call.views):
            chosen = [0 if keys is None else keys[i][first + v] for i, first in call.members]
            views.append(augmented(images, np.array(chosen, np.uint64), encoder.device))                # [n,H,W,3]
        for (i, first), features in zip(call.members, encoder.encode_observation(views, call.instruction)):
            found[i][first:first + len(views)] = features.unbind()                                      # [K,D] each
    return [torch.stack(views) for views in found]


def augmented(images: np.ndarray, keys: np.ndarray, device: torch.device) -> torch.Tensor:
    """uint8 [n,H,W,3] on the device; pictures with a key (uint64 [n], 0 = none) in the augmented variant that it stands for."""
    pictures = torch.from_numpy(images).to(device)
    if not keys.any():
        return pictures
    pictures = pictures.clone()     # on the CPU it shares memory with `images`
    pictures[keys > 0] = augment(pictures[keys > 0], keys[keys > 0])
    return pictures


def with_tokens(batch: FeatureBatch, tokens: torch.Tensor, cache: Cache) -> FeatureBatch:
    """The batch with tokens [B,V,K,D] of samples of `cache`, zeros where a dataset has fewer than V cameras."""
    counts = torch.tensor([len(cache.datasets[d].views) for d in batch.dataset.tolist()], device=tokens.device)
    view_id = torch.arange(tokens.shape[1], device=counts.device).repeat_interleave(tokens.shape[2]).expand(len(tokens), -1)    # [B,V·K]
    return batch.replace(tokens=tokens.flatten(1, 2), text=batch.text.to(tokens.dtype), view_id=view_id.contiguous(),
                         frame_id=torch.zeros_like(view_id), token_mask=view_id < counts[:, None])


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
        augmented variant of each sample's pictures, 0 = as they are. Features that depend on the instruction do so whether or not the
        sample's text is masked, as in the cache.
        """
        datasets, rows = batch.dataset.tolist(), batch.frame_index.tolist()
        cache, encoder = self._cache, self.encoder
        views = max(len(d.views) for d in cache.datasets)
        variants = np.zeros(len(rows), np.int64) if variant is None else variant
        seen = [(d, row, range(len(cache.datasets[d].views)), int(j)) for d, row, hidden, j in zip(datasets, rows, masked, variants) if not hidden]
        live = iter(encode_observations(encoder, [[self.frame(d, row, v) for v in each] for d, row, each, _ in seen],
                                        [self._instruction(d, row) for d, row, _, _ in seen],
                                        [[self._key(d, row, v, j) for v in each] for d, row, each, j in seen]))
        tokens = torch.stack([self._padded(torch.from_numpy(cache.datasets[d].null_features).to(encoder.device, encoder.dtype) if hidden
                                           else next(live), views) for d, hidden in zip(datasets, masked)])      # [B,V,K,D]
        return with_tokens(batch, tokens, cache)

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

    @staticmethod
    def _padded(features: torch.Tensor, views: int) -> torch.Tensor:
        """[v,K,D] → [views,K,D], zeros where there is no camera."""
        return F.pad(features, (0, 0, 0, 0, 0, views - len(features)))

    def _instruction(self, dataset: int, row: int) -> str:
        """The episode's own, also where its text is masked."""
        table = self._cache.datasets[dataset]
        return table.instructions[int(table.episode_instruction[table.episode_of(np.array([row]))[0]])]

    def _key(self, dataset: int, row: int, view: int, variant: int) -> int:
        """As the build keys the picture's variant; 0 for the picture as it is."""
        if not variant:
            return 0
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
