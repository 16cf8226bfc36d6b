"""Stage three on a split cache (`dvla cache build --boundary n`): of the vision tower, or with depth language of the
language layers, only the last n run.

What enters them does not depend on what is learned in them, so features and gradients are those of the fully live
VLM, up to the float16 of the cache. No image is read; condition dropout and augmented variants are the loader's, as in
stage two.

Letters: B samples, H frames of a sample, V views, S tokens of a record of hidden states, C their width, K tokens of a
view's features, D feature width, P records of one call.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import torch

from ....batch import FeatureBatch
from ....cache.actions.history import NO_HISTORY, History
from ....cache.loader.live import Images, LiveFeatures, with_tokens
from ....cache.loader.loader import gather, require_variants
from ....cache.loader.provenance import sources_of
from ....cache.store.cache import Cache
from ....cache.store.dataset import CacheDataset
from ....cache.vlm.encoder import VisionLanguageEncoder
from ....cache.vlm.load import require_encoder
from ....common import fingerprint as fp
from ....errors import UserError
from ...policy import checkpoint as ck
from ..checks import open_cache
from ..config import FinetuneConfig, read_settings


class SplitFeatures:
    """Features of the samples of a split cache: the last n blocks and the projection of `encoder`.

    Make it before LoRA is put into `encoder`: dropped images get the features of black frames as the tower gave them
    then, as in a cache of features.
    """

    @torch.no_grad()
    def __init__(self, encoder: VisionLanguageEncoder, cache: Cache, history: History = NO_HISTORY) -> None:
        assert cache.boundary is not None
        self.encoder, self._cache, self._n, self.history = encoder, cache, cache.boundary, history
        self._null = [
            encoder.encode_upper(
                torch.from_numpy(d.null_features).to(encoder.device),
                self._n,
                torch.full((len(d.views),), d.null_visible, device=encoder.device),
            )
            .half()
            .to(encoder.dtype)
            for d in cache.datasets
        ]  # [V,K,D] each

    def __call__(
        self,
        batch: FeatureBatch,
        no_images: np.ndarray | None = None,
        variant: np.ndarray | None = None,
        images: Images | None = None,
    ) -> FeatureBatch:
        """`batch` of hidden states, tokens [B,H·V·S,C], with live tokens [B,H·V·K,D].

        `no_images` [B] bool (None: none): the null features take the place of these images. `variant` and
        `images` are unused: the loader has read the variants it drew."""
        encoder, device = self.encoder, batch.tokens.device
        dropped = np.zeros(len(batch), bool) if no_images is None else no_images
        parts = -1, max(len(d.views) for d in self._cache.datasets), self._cache.tokens
        hidden, mask = (x.unflatten(1, parts) for x in (batch.tokens, batch.token_mask))  # [B,H,V,S,C], [B,H,V,S]
        there, lengths = mask[..., 0], mask.sum(-1)  # [B,H,V]: whether there is such an image, its real tokens
        seen = there & ~torch.from_numpy(dropped).to(device)[:, None, None]
        shape = (*seen.shape, encoder.tokens, encoder.width)
        tokens = torch.zeros(shape, dtype=encoder.dtype, device=device)  # [B,H,V,K,D]
        for i in np.flatnonzero(dropped).tolist():
            null = self._null[int(batch.dataset[i])]
            tokens[i, there[i, :, 0], : len(null)] = null
        if bool(seen.any()):
            tokens[seen] = encoder.encode_upper(hidden[seen], self._n, lengths[seen])  # [P,K,D]
        visible = [encoder.visible("" if gone else text) for text, gone in zip(self._instructions(batch), dropped)]
        return with_tokens(batch, tokens, self._cache, visible, there[..., 0].cpu().numpy())

    def _instructions(self, batch: FeatureBatch) -> list[str]:
        """Of each sample's episode."""
        found = []
        for d, row in zip(batch.dataset.tolist(), batch.frame_index.tolist()):
            table = self._cache.datasets[d]
            found.append(table.instructions[int(table.episode_instruction[table.episode_of(np.array([row]))[0]])])
        return found


def split_features(config: FinetuneConfig, cache: Cache, encoder: VisionLanguageEncoder) -> SplitFeatures:
    """Features of the policy's `encoder` on the split cache. `UserError` when the two do not belong together, or for
    augmentation without augmented variants in the cache."""
    assert cache.boundary is not None  # a split cache
    _require_settings(config, cache, encoder)
    require_encoder(encoder.at_boundary(cache.boundary), cache.fingerprint["encoder"], f"cache {cache.path}")
    if config.train.image_aug:
        require_variants(cache)
    return SplitFeatures(encoder, cache, config.train.past)


def _require_settings(config: FinetuneConfig, cache: Cache, encoder: VisionLanguageEncoder) -> None:
    """`UserError` naming the settings that differ between the split cache and the policy's features, or those for which
    there is no boundary."""
    spec = encoder.spec
    if encoder.parts > 1 or spec.depth == "language" and spec.vlm != "qwen3vl":
        several = f"layers {'deepstack' if spec.deepstack else list(spec.layers)}" if encoder.parts > 1 else spec.vlm
        raise UserError(
            f"leave --from-cache {cache.path} out: its boundary needs features of one layer, in the language model of "
            f"qwen3vl's; {config.start} has depth {spec.depth}, {several}"
        )
    names = ["depth", "layers", "queries", "prompt_tokens", "resolution"]
    has, wants = (
        {name: found[name] for name in names if name in found}
        for found in ({"depth": "vision"} | cache.fingerprint["encoder"], {"depth": "vision"} | encoder.fingerprint())
    )
    lines = fp.diff(has, wants, was="cache has", now="policy has")
    if lines and cache.fingerprint["encoder"]["vlm"] == spec.vlm:
        shown = "; ".join(lines[:1] if has["depth"] != wants["depth"] else lines)  # the others follow from it
        raise UserError(f"build a split cache with the settings of {config.start} ({cache.path}: {shown})")


def above_boundary(config: FinetuneConfig, cache: Cache) -> FinetuneConfig:
    """On a split cache LoRA goes into the last n blocks, or fewer when the config says so. `UserError` for more."""
    n, lora = cache.boundary, config.lora
    if n is None or lora is None:
        return config
    if lora.last_n_blocks is not None and lora.last_n_blocks > n:
        raise UserError(
            f"LoRA is in the last {lora.last_n_blocks} blocks; give at most {n}, or build the cache with --boundary "
            f"{lora.last_n_blocks}: only the last {n} run on cache {cache.path}"
        )
    return dataclasses.replace(config, lora=dataclasses.replace(lora, last_n_blocks=lora.last_n_blocks or n))


def same_samples(
    config: FinetuneConfig, cache: Cache, features: SplitFeatures, ids: np.ndarray, rows: np.ndarray, horizon: int
) -> tuple[FeatureBatch, FeatureBatch] | None:
    """Samples (dataset, frame row int64 [B]) of the split cache, as stage two saw them and as fine-tuning will: (with
    cached features, with those of the last n blocks).

    Of those samples that the run's own cache holds too; where it is gone or has none of them, the features come from
    the full tower and the given sources; None without these."""
    encoder, device = features.encoder, features.encoder.device
    found = _run_cache(config)
    if found is not None:
        pairs = itertools.product(enumerate(cache.datasets), enumerate(found.datasets))
        same = {d: other for (d, ours), (other, theirs) in pairs if _same_frames(ours, theirs)}
        kept = [d in same and _has(found.datasets[same[d]], row) for d, row in zip(ids.tolist(), rows.tolist())]
        if any(kept):
            ids, rows = ids[kept], rows[kept]
            other = np.array([same[d] for d in ids.tolist()])
            cached = gather(found, other, rows, horizon, history=features.history).to(device)
            return cached, _split(cache, features, ids, rows, horizon)
    if not config.sources:
        return None
    live = LiveFeatures(encoder, cache, sources_of(cache, config.sources), config.memory_gib, features.history)
    cached = live(gather(cache, ids, rows, horizon, features=False, history=features.history).to(device))
    return cached, _split(cache, features, ids, rows, horizon)


def _split(cache: Cache, features: SplitFeatures, ids: np.ndarray, rows: np.ndarray, horizon: int) -> FeatureBatch:
    return features(gather(cache, ids, rows, horizon, history=features.history).to(features.encoder.device))


def _run_cache(config: FinetuneConfig) -> Cache | None:
    """The cache of features that the run was trained on; None where it is gone."""
    settings = read_settings(ck.resolve(config.start).parent.parent)
    try:
        found = open_cache(dataclasses.replace(config.train, cache=settings["cache"]))
    except UserError:
        return None
    return found if found.boundary is None else None


def _same_frames(a: CacheDataset, b: CacheDataset) -> bool:
    """Whether two caches hold the same frames of the same cameras under the same rows."""
    return (
        a.name == b.name
        and a.views == b.views
        and all(a.attributes[key] == b.attributes[key] for key in ("source_hashes", "action_map", "state_map"))
    )


def _has(dataset: CacheDataset, row: int) -> bool:
    """Whether frame `row` has features."""
    episode = int(dataset.episode_of(np.array([row]))[0])
    return not dataset.quarantined[episode] and bool(dataset.has_features(np.array([row]))[0])
