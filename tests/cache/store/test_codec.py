"""Quantization, lossless compression, and what training sees of strides and augmented variants."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dvla.cache.loader.assembler import decoded
from dvla.cache.loader.dropout import ConditionDropout
from dvla.cache.loader.loader import Loader, gather
from dvla.cache.store.cache import Cache
from dvla.cache.store.codec import CHANNEL_FLOOR, Compression, channel_scale, dequantize, quantize, relative_error
from dvla.cache.store.feature_format import QUANTIZED, FeatureFormat, feature_format
from dvla.cache.vlm.augment import augment, frame_keys
from dvla.cache.vlm.pooling import average_pool, check_pooling
from dvla.common.config import from_mapping
from dvla.errors import UserError
from dvla.stages.training.config import TrainConfig
from dvla.stages.training.context import open_loader
from dvla.stages.training.parallel.world import ALONE
from support import synthetic_cache as synthetic


@pytest.fixture(autouse=True, scope="module")
def unsynced() -> Iterator[None]:
    """No waiting for the disk: what these tests show does not depend on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


def like_a_vlm(decades: float, seed: int = 0) -> torch.Tensor:
    """float32 [64,49,256]: channels whose sizes spread over `decades` powers of ten, tokens over one."""
    rng = torch.Generator().manual_seed(seed)
    loud = torch.logspace(-decades / 2, decades / 2, 256)[torch.randperm(256, generator=rng)]
    return torch.randn(64, 49, 256, generator=rng) * loud * (0.1 + torch.rand(64, 49, 1, generator=rng))


# --- 8-bit codes ---


@pytest.mark.parametrize(
    ("dtype", "overall", "worst"), [("int8", 0.008, 0.0085), ("float8_e4m3fn", 0.0275, 0.029), ("float16", 3e-4, 3e-4)]
)
@pytest.mark.parametrize("decades", [0.0, 2.0, 4.0])
def test_the_error_is_small_in_every_channel(dtype: str, overall: float, worst: float, decades: float) -> None:
    x = like_a_vlm(decades)
    found = relative_error(x, FeatureFormat(dtype), channel_scale(x))
    assert 0.3 * overall < found[0] < overall and found[1] < worst


def test_token_scales_alone_lose_the_quiet_channels() -> None:
    x, ones = like_a_vlm(4.0), np.ones(256, np.float32)
    alone, both = (relative_error(x, FeatureFormat("int8"), scale) for scale in (ones, channel_scale(x)))
    assert alone[0] > 1.7 * both[0] and alone[1] == pytest.approx(
        1.0, abs=1e-3
    )  # some channels become zeros altogether
    x = like_a_vlm(8.0)  # the exponent of float8 holds out for four decades, but not for eight
    alone, both = (relative_error(x, FeatureFormat("float8_e4m3fn"), scale) for scale in (ones, channel_scale(x)))
    assert alone[1] > 0.5 and both[1] < 0.029


def test_the_reported_error_is_the_error() -> None:
    x = like_a_vlm(2.0)
    for dtype in QUANTIZED:
        scales = torch.from_numpy(channel_scale(x))
        difference = (dequantize(*quantize(x, scales, dtype), scales, torch.float32) - x).double()
        overall = float(difference.square().mean().sqrt() / x.double().square().mean().sqrt())
        worst = float((difference.square().mean((0, 1)) / x.double().square().mean((0, 1))).sqrt().max())
        assert relative_error(x, FeatureFormat(dtype), scales.numpy()) == pytest.approx((overall, worst), rel=1e-4)


@pytest.mark.parametrize("dtype", QUANTIZED)
@settings(deadline=None, max_examples=40)
@given(values=st.lists(st.floats(-6e4, 6e4, width=16), min_size=12, max_size=12), loud=st.floats(1e-3, 1e3))
def test_codes_are_a_fixed_point(dtype: str, values: list[float], loud: float) -> None:
    """Any finite features: finite scales, codes of the format, and encoding what was decoded changes no code."""
    x = torch.tensor(values).reshape(1, 3, 4)
    channels = torch.tensor([1.0, loud, 1 / loud, 1.0])
    codes, scale = quantize(x, channels, dtype)
    assert (
        codes.dtype == (torch.int8 if dtype == "int8" else torch.uint8)
        and scale.dtype == torch.float32
        and scale.shape == (1, 3)
    )
    assert (scale > 0).all() and torch.isfinite(scale).all()
    back = dequantize(codes, scale, channels, torch.float32)
    numbers = codes.float() if dtype == "int8" else codes.view(torch.float8_e4m3fn).float()
    assert torch.isfinite(back).all() and numbers.abs().max() <= QUANTIZED[dtype][0]
    assert (
        ((x / channels).abs().amax(-1) > 1e-30).eq(numbers.abs().amax(-1) == QUANTIZED[dtype][0]).all()
    )  # the range is used
    step = 0.5 if dtype == "int8" else 16.0  # half a step of int8, and of float8 in its top binade
    assert ((back - x).abs() <= 1.001 * step * scale[..., None] * channels + 1e-30).all()
    again, _ = quantize(back, channels, dtype)
    same = again.eq(codes) | (numbers == 0)  # -0 may become 0
    assert same.all()


def test_zeros_and_silent_channels() -> None:
    x = like_a_vlm(2.0)[:2]
    x[0, 3], x[:, :, 7] = 0.0, 0.0
    scales = channel_scale(x)
    assert scales.dtype == np.float32 and scales[7] == np.float32(CHANNEL_FLOOR)
    np.testing.assert_allclose(scales[:7], x[..., :7].double().square().mean((0, 1)).sqrt(), rtol=1e-6)
    for dtype in QUANTIZED:
        codes, scale = quantize(x, torch.from_numpy(scales), dtype)
        back = dequantize(codes, scale, torch.from_numpy(scales), torch.float16)
        assert back.dtype == torch.float16 and not back[0, 3].any() and not back[..., 7].any() and scale[0, 3] == 1
    loud = x.clone()
    loud[..., 7] = 0.5  # a channel that was silent in the frames looked at and is not later
    codes, scale = quantize(loud, torch.from_numpy(scales), "int8")
    assert torch.isfinite(dequantize(codes, scale, torch.from_numpy(scales), torch.float32)).all()


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_codes_do_not_depend_on_the_batch(dtype: str) -> None:
    x = like_a_vlm(2.0)[:6]
    scales = torch.from_numpy(channel_scale(x))
    whole, one = quantize(x, scales, dtype), [quantize(x[i : i + 1], scales, dtype) for i in range(6)]
    assert torch.equal(whole[0], torch.cat([c for c, _ in one])) and torch.equal(
        whole[1], torch.cat([s for _, s in one])
    )


def test_formats() -> None:
    assert feature_format() == FeatureFormat() and feature_format("fp8", "lz4") == FeatureFormat("float8_e4m3fn", "lz4")
    assert [feature_format(d).record_nbytes(49, 2048) for d in ("fp16", "int8", "fp8")] == [200704, 100548, 100548]
    for given_dtype, compression, said in (
        ("fp61", "none", "did you mean 'fp16'"),
        ("int4", "none", "did you mean 'int8'"),
        ("fp16", "zst", "did you mean 'zstd'"),
        ("fp16", "gzip", "allowed: lz4, none, zstd"),
    ):
        with pytest.raises(UserError, match=said):
            feature_format(given_dtype, compression)
    with pytest.raises(UserError, match="float16"):
        FeatureFormat("float32")  # type: ignore[arg-type]


def test_pooling() -> None:
    x = torch.randn(2, 36, 5)
    assert average_pool(x, 36) is x
    grid = x.reshape(2, 3, 2, 3, 2, 5)  # rows, in a cell, columns, in a cell
    torch.testing.assert_close(average_pool(x, 9), grid.mean((2, 4)).reshape(2, 9, 5))
    torch.testing.assert_close(average_pool(x, 1), x.mean(1, keepdim=True))
    assert average_pool(x, 16).shape == (2, 16, 5)
    check_pooling(16, 36)
    for bad in (0, 8, 49, -1):
        with pytest.raises(UserError, match="choose one of 1, 4, 9, 16, 25, 36"):
            check_pooling(bad, 36)


# --- lossless compression ---


@pytest.mark.parametrize("name", ["zstd", "lz4"])
@pytest.mark.parametrize("dtype", ["float16", "int8", "uint8"])
def test_compression_and_damage(name: str, dtype: str) -> None:
    record = np.repeat(np.random.default_rng(0).integers(-5, 5, (49, 8)), 8, axis=1).astype(dtype)
    compression, plain = Compression(name, record.itemsize), record.tobytes()
    data = compression.encode(record)
    assert len(data) < 0.8 * len(plain) and data == compression.encode(record.copy())
    out = bytearray(len(plain))
    compression.decode(data, memoryview(out))
    assert out == plain
    for cut in (0, 1, 10, len(data) // 2, len(data) - 1):
        with pytest.raises(ValueError):
            compression.decode(data[:cut], memoryview(bytearray(len(plain))))
    for size in (len(plain) - 1, len(plain) + 1, 0):
        with pytest.raises(ValueError, match="bytes"):
            compression.decode(data, memoryview(bytearray(size)))
    with pytest.raises(ValueError):
        compression.decode(b"\x00" * len(data), memoryview(bytearray(len(plain))))


@pytest.mark.parametrize("name", ["zstd", "lz4"])
def test_a_damaged_record_names_its_shard(tmp_path: Path, name: str) -> None:
    synthetic.build(tmp_path / "c", plan=synthetic.make_plan(format=FeatureFormat("float16", name)))
    beta = Cache.open(tmp_path / "c").named("beta")
    shard = beta.shard_path("top", 1)
    shard.write_bytes(b"\xff" * 40 + shard.read_bytes()[40:])
    with pytest.raises(UserError, match="top/c/1/0/0 is damaged"):
        beta.feature("top", 16)
    np.testing.assert_array_equal(
        beta.feature("top", 25), synthetic.feature("beta", "top", 25)
    )  # records stand for themselves


# --- what training sees ---


@pytest.fixture(scope="module", params=["int8-variants", "int8-zstd-stride2-variant", "fp8", "fp16-lz4-stride3"])
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    path = tmp_path_factory.mktemp("codec") / "cache"
    synthetic.build(path, plan=synthetic.make_plan(**synthetic.SETTINGS[request.param]))
    return Cache.open(path)


def test_batches_decode_to_the_features(cache: Cache) -> None:
    """Codes and scales of a batch, decoded on the device, are `CacheDataset.features`, of the sample's own variant."""
    with Loader(cache, batch_size=8, seed=4, augment=cache.variants > 0) as loader:
        for sample in itertools.islice(loader, 6):
            batch, variants = sample.batch, sample.drawn.variant
            assert batch.token_scale is None and batch.tokens.dtype == torch.float16
            plain = decoded(batch)
            assert plain.tokens.dtype == torch.float16 and plain.token_scale is None and plain.channel_scale is None
            tokens = plain.tokens.reshape(8, 2, cache.tokens, cache.width)  # [B,V,K,D]
            for b, (d, row) in enumerate(zip(batch.dataset.tolist(), batch.frame_index.tolist())):
                dataset = cache.datasets[d]
                for v, view in enumerate(dataset.views):
                    np.testing.assert_array_equal(
                        tokens[b, v].numpy(), dataset.features(view, np.array([row]), int(variants[b]))[0]
                    )
                assert not tokens[b, len(dataset.views) :].any()


def test_masked_images_are_the_null_features(cache: Cache) -> None:
    beta, rows = cache.named("beta"), np.array([0, 6])
    none = np.zeros(2, bool)
    batch = decoded(gather(cache, np.array([1, 1]), rows, 2, dropped=(none, np.array([True, False]), none)))
    exact = beta.null_features[0].astype(np.float32)
    bound = {"float16": 0.0, "int8": 0.005, "float8_e4m3fn": 0.04}[cache.format.dtype] * np.abs(
        exact / synthetic.CHANNELS
    ).max()
    assert (
        np.abs(batch.tokens[0, : cache.tokens].float().numpy() - exact)
        <= bound * synthetic.CHANNELS + 1e-3 * np.abs(exact)
    ).all()
    np.testing.assert_array_equal(batch.tokens[1, : cache.tokens].numpy(), beta.features("top", rows[1:])[0])


def test_an_epoch_visits_exactly_the_observations(cache: Cache) -> None:
    with Loader(cache, batch_size=16, seed=1, features=False) as loader:
        drawn: list[list[int]] = [[], []]
        while any(len(rows) < 2 * size for rows, size in zip(drawn, loader.sizes)):
            batch = next(loader).batch
            for d, row in zip(batch.dataset.tolist(), batch.frame_index.tolist()):
                drawn[d].append(row)
    for dataset, rows, size in zip(cache.datasets, drawn, loader.sizes):
        observations = [
            start + t
            for start, length, bad in zip(dataset.episode_start, dataset.episode_length, dataset.quarantined)
            for t in range(0, 0 if bad else length, dataset.frame_stride)
        ]
        assert size == len(observations) and sorted(rows[:size]) == sorted(rows[size : 2 * size]) == observations
        np.testing.assert_array_equal(dataset.frame_of(dataset.observation_of(np.array(observations))), observations)


def test_actions_keep_every_frame(cache: Cache) -> None:
    """A stride thins the images, not the action chunk."""
    beta = cache.named("beta")
    row = int(beta.episode_start[1]) + 2 * cache.datasets[0].frame_stride
    batch = gather(cache, np.array([1]), np.array([row]), 5)
    expected = beta.action_normalizer.normalize(beta.action[row : row + 5])
    np.testing.assert_array_equal(batch.action[0].numpy(), expected)
    assert batch.step_mask.all()


def test_variants_are_drawn_by_position_alone(cache: Cache) -> None:
    if not cache.variants:
        with pytest.raises(UserError, match="build it with --augment"):
            Loader(cache, batch_size=4, augment=True)
        return
    draws, rows = {}, {}
    for batch_size, world, threads in ((12, 1, 2), (4, 3, 1), (6, 2, 2)):
        parts = []
        for rank in range(world):
            with Loader(
                cache, batch_size=batch_size, world_size=world, rank=rank, threads=threads, seed=9, augment=True
            ) as loader:
                parts.append([loader.draws(12 * step) for step in range(40)])
        draws[world] = np.concatenate([p[step].variant for step in range(40) for p in parts])
        rows[world] = np.concatenate([p[step].row for step in range(40) for p in parts])
    assert all(np.array_equal(draws[1], d) for d in draws.values()) and all(
        np.array_equal(rows[1], r) for r in rows.values()
    )
    share = np.bincount(draws[1], minlength=cache.variants + 1) / draws[1].size
    assert (
        len(share) == cache.variants + 1
        and abs(share[0] - 0.5) < 0.08
        and (np.abs(share[1:] - 0.5 / cache.variants) < 0.08).all()
    )
    with Loader(cache, batch_size=12, seed=10, augment=True) as other, Loader(cache, batch_size=12, seed=9) as plain:
        assert not np.array_equal(other.draws(0).variant, draws[1][:12])
        assert not any(plain.draws(12 * step).variant.any() for step in range(40))
        np.testing.assert_array_equal(plain.draws(0).row, rows[1][:12])  # augmentation does not move the order


def test_held_out_images_are_never_augmented(cache: Cache) -> None:
    config = from_mapping(
        TrainConfig,
        {
            "cache": str(cache.path),
            "out": "unused",
            "batch_size": 6,
            "holdout": 0.4,
            "seed": 3,
            "image_aug": cache.variants > 0,
            "threads": 1,
            "masking": {"text": 1.0, "images": 0.5, "proprio": 0.0},
        },
    )
    session = SimpleNamespace(
        config=config,
        cache=cache,
        live=False,
        decode=None,
        world=ALONE,
        net=SimpleNamespace(config=SimpleNamespace(dit=SimpleNamespace(horizon=4))),
    )
    used = {}
    for split in ("train", "eval"):
        with open_loader(session, split) as loader:
            used[split] = set(np.concatenate([loader.draws(6 * step).variant for step in range(50)]).tolist())
            drawn = loader.draws(300)
            # What training always drops is dropped when it is evaluated, too.
            assert drawn.no_text.all() and drawn.no_images.any() == (split == "train") and not drawn.no_proprio.any()
            if split == "eval":
                batch = decoded(next(loader).batch)
                for b, (d, row) in enumerate(zip(batch.dataset.tolist(), batch.frame_index.tolist())):
                    expected = cache.datasets[d].features(cache.datasets[d].views[0], np.array([row]))[0]
                    np.testing.assert_array_equal(batch.tokens[b, : cache.tokens].numpy(), expected)
    assert used == {"train": set(range(cache.variants + 1)), "eval": {0}}


def test_masking_and_variants_are_independent(cache: Cache) -> None:
    if not cache.variants:
        pytest.skip("this cache has no variants")
    with Loader(
        cache, batch_size=500, seed=0, dropout=ConditionDropout(0.5, 0.5, 0.5), augment=True, features=True
    ) as loader:
        drawn = loader.draws(0)
    for condition in (drawn.no_text, drawn.no_images, drawn.no_proprio):
        shares = [condition[drawn.variant == k].mean() for k in range(cache.variants + 1)]
        assert max(abs(s - 0.5) for s in shares) < 0.15


# --- augmented images ---


def test_augment_is_a_function_of_its_key() -> None:
    rng = np.random.default_rng(0)
    smooth = np.kron(rng.integers(40, 215, (4, 6, 8, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8)  # [4,48,64,3]
    images, keys = torch.from_numpy(smooth), frame_keys("d", "front", 3, np.arange(4), 1)
    first = augment(images, keys)
    assert first.shape == images.shape and first.dtype == torch.uint8 and torch.equal(images, torch.from_numpy(smooth))
    assert torch.equal(first, augment(images, keys))
    for i in range(4):  # neither neighbours in the batch nor their order matter
        assert torch.equal(augment(images[i : i + 1], keys[i : i + 1])[0], first[i])
    order = [2, 0, 3, 1]
    assert torch.equal(augment(images[order], keys[order]), first[order])
    other = augment(images, frame_keys("d", "front", 3, np.arange(4), 2))
    for a, b in zip(first, other):
        assert (a.float() - b.float()).abs().mean() > 2
    assert ((first.float() - images.float()).abs().mean((1, 2, 3)) > 2).all()


def test_augment_keeps_the_image_recognizable() -> None:
    """A crop of at most 10 % a side and mild colors: correlated with the original; black stays black."""
    gray = torch.linspace(30, 220, 64).expand(48, 64)
    images = torch.stack([gray, gray.flip(1), gray], -1)[None].repeat(32, 1, 1, 1).to(torch.uint8)
    out = augment(images, frame_keys("d", "v", 0, np.arange(32), 1)).float()
    for image in out:
        a, b = image.flatten() - image.mean(), images[0].float().flatten() - images[0].float().mean()
        assert float((a @ b) / (a.norm() * b.norm())) > 0.85
    assert not augment(torch.zeros(3, 20, 20, 3, dtype=torch.uint8), frame_keys("d", "v", 0, np.arange(3), 1)).any()


def test_keys_differ_by_dataset_view_episode_frame_and_variant() -> None:
    keys = [
        int(k)
        for dataset in ("alpha", "beta")
        for view in ("front", "wrist")
        for episode in (0, 1, 10**6)
        for variant in (1, 2, 3)
        for k in frame_keys(dataset, view, episode, np.arange(50), variant)
    ]
    assert len(set(keys)) == len(keys) == 2 * 2 * 3 * 3 * 50
    np.testing.assert_array_equal(
        frame_keys("alpha", "front", 1, np.arange(50), 2)[[4, 9]], frame_keys("alpha", "front", 1, np.array([4, 9]), 2)
    )
