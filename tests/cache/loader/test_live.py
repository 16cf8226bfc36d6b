"""Live features: images decoded ahead by the loader's threads, null features copied once."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from dvla.cache.loader.dropout import ConditionDropout
from dvla.cache.loader.live import LiveFeatures
from dvla.cache.loader.loader import Loader
from dvla.cache.loader.provenance import sources_of
from dvla.cache.store.cache import Cache
from dvla.cache.vlm.encoder import VisionLanguageEncoder
from dvla.cache.vlm.load import load_encoder
from dvla.cache.vlm.spec import EncoderSpec
from dvla.cache.vlm.tiny_qwen3vl import make_tiny_qwen3vl
from dvla.errors import UserError
from dvla.stages.caching.build import build
from dvla.stages.caching.config import BuildConfig
from support import vlm_samples

DROPOUT = ConditionDropout(images=0.3)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageEncoder:
    vlm = make_tiny_qwen3vl(tmp_path_factory.mktemp("vlm") / "tiny", vlm_samples.TINY)
    return load_encoder(EncoderSpec(str(vlm), resolution=64, dtype="float32"))


@pytest.fixture(scope="module")
def cache(recorded: dict[str, Path], encoder: VisionLanguageEncoder, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    out = tmp_path_factory.mktemp("cache") / "cache"
    build(BuildConfig((str(recorded["h264"]),), encoder.spec, out, batch_size=8, device="cpu"))
    return Cache.open(out)


def live_features(encoder: VisionLanguageEncoder, cache: Cache, memory_gib: float) -> LiveFeatures:
    return LiveFeatures(encoder, cache, sources_of(cache), memory_gib=memory_gib)


@pytest.mark.parametrize("memory_gib", [0.0, 1.0])
def test_images_decoded_ahead_give_the_same_features(
    encoder: VisionLanguageEncoder, cache: Cache, memory_gib: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, ahead, readers = live_features(encoder, cache, memory_gib), live_features(encoder, cache, memory_gib), set()
    frame = LiveFeatures.frame

    def noted(self: LiveFeatures, *place: int) -> np.ndarray:
        if self is ahead:
            readers.add(threading.current_thread().name.rpartition("_")[0])
        return frame(self, *place)

    monkeypatch.setattr(LiveFeatures, "frame", noted)
    given = {"cache": cache, "batch_size": 4, "features": False, "dropout": DROPOUT, "seed": 3}
    with torch.no_grad(), Loader(**given) as here, Loader(**given, threads=3, ahead=ahead.decode) as there:
        for _ in range(4):
            one, other = next(here), next(there)
            dropped = one.drawn.no_images
            shown = {row for row, gone in zip(one.drawn.row.tolist(), dropped.tolist()) if not gone}
            assert {row for _, row, _ in other.ahead} == shown and one.ahead is None
            wanted = plain(one.batch, dropped, one.drawn.variant)
            found = ahead(other.batch, other.drawn.no_images, other.drawn.variant, other.ahead)
            assert torch.equal(wanted.tokens, found.tokens) and torch.equal(wanted.token_mask, found.token_mask)
    assert readers == {"dvla-loader"}  # none in the training thread


def test_what_fails_ahead_is_raised_where_the_batch_is_taken(encoder: VisionLanguageEncoder, cache: Cache) -> None:
    live = live_features(encoder, cache, 0.0)
    live._sources = tuple(dataclasses.make_dataclass("Gone", ["path"])(Path("gone")) for _ in live._sources)
    with (
        Loader(cache, batch_size=2, features=False, ahead=live.decode) as loader,
        pytest.raises(UserError, match="gone"),
    ):
        next(loader)


def test_null_features_are_copied_once(encoder: VisionLanguageEncoder, cache: Cache) -> None:
    live = live_features(encoder, cache, 0.0)
    with torch.inference_mode():
        first = live._null_features(0)
    assert live._null_features(0) is first and not first.is_inference()
    assert torch.equal(first, torch.from_numpy(cache.datasets[0].null_features).to(encoder.dtype))
