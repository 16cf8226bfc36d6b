"""Stage three's choices: what of the VLM is trained, augmentation, gradient checkpointing, and the way back into a
cache."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dvla.cache.loader.live import LiveFeatures
from dvla.cache.loader.loader import gather
from dvla.cache.loader.provenance import sources_of
from dvla.cache.store.cache import Cache
from dvla.cache.vlm.adapter import load_adapter, save_adapter, tower_parameters
from dvla.cache.vlm.augment import PROBABILITY, draw_variants
from dvla.cache.vlm.load import load_encoder
from dvla.cache.vlm.lora import add_lora
from dvla.cache.vlm.spec import EncoderSpec, LoraSpec
from dvla.cache.vlm.tiny_paligemma2 import TinyPaliGemmaSpec, make_tiny_paligemma2
from dvla.cache.vlm.tiny_qwen3vl import make_tiny_qwen3vl
from dvla.common import fingerprint as fp
from dvla.common.config import from_mapping
from dvla.common.documents import read_json
from dvla.errors import UserError
from dvla.stages.caching.build import build
from dvla.stages.caching.config import BuildConfig
from dvla.stages.caching.upkeep.diff import diff
from dvla.stages.caching.upkeep.verify import TOLERANCE, verify
from dvla.stages.policy import checkpoint as ck
from dvla.stages.policy.load import adapted_spec
from dvla.stages.policy.policy import Policy
from dvla.stages.training.config import TrainConfig
from dvla.stages.training.stage_three.finetune import finetune, finetune_config
from dvla.stages.training.train import train
from support import vlm_samples
from support.finetune_samples import caught_encoders
from support.tolerances import assert_same_features

Recorded = dict[str, Path]
TINY = dataclasses.replace(vlm_samples.TINY, vision_depth=3)
LORA = LoraSpec(r=2, alpha=4.0)
TRAINING = {
    "model_size": "tiny",
    "dit": {"width": 32, "blocks": 1, "heads": 2, "horizon": 4},
    "steps": 2,
    "batch_size": 4,
    "draws": 2,
    "holdout": 0.0,
    "eval_every": 0,
    "save_every": 2,
    "log_every": 1,
    "threads": 1,
    "device": "cpu",
    "optimizer": {"lr": 1e-2, "vlm_lr_scale": 0.1, "warmup": 1, "ema": 0.5},
}


def quiet(*_: Any) -> None:
    pass


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3vl(tmp_path_factory.mktemp("vlm") / "tiny", TINY)


def spec_of(vlm: Path, **changes: Any) -> EncoderSpec:
    return EncoderSpec(str(vlm), **{"resolution": 64, "dtype": "float32", **changes})


@pytest.fixture(scope="module")
def cache(recorded: Recorded, vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cache") / "cache"
    build(BuildConfig((str(recorded["h264"]),), spec_of(vlm), out, batch_size=8, shard_frames=32, device="cpu"))
    return out


@pytest.fixture(scope="module")
def stage_two(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two") / "run"
    train(from_mapping(TrainConfig, {"cache": str(cache), "out": str(out), **TRAINING}), say=quiet)
    return out


def configure(
    recorded: Recorded, start: Path, out: Path, lora: LoraSpec | None = None, full: bool = False, **changes: Any
) -> Any:
    return finetune_config(start, (str(recorded["h264"]),), lora, {"out": str(out), "steps": 4, **changes}, None, full)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    folder = ck.resolve(run)
    return {
        f"{p.relative_to(folder)}/{n}": t
        for p in sorted(folder.rglob("*.safetensors"))
        for n, t in load_file(p).items()
    }


def pictures(count: int, size: int = 64) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(count)
    )


# --- the whole tower ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Full:
    run: Path
    encoder: Any  # as training left it
    said: list[str]


@pytest.fixture(scope="module")
def full(recorded: Recorded, stage_two: Path, tmp_path_factory: pytest.TempPathFactory) -> Full:
    """Four steps without a stop."""
    out, said = tmp_path_factory.mktemp("full") / "run", []
    with caught_encoders() as encoders:
        assert finetune(configure(recorded, stage_two, out, full=True), say=said.append)[0].step == 4
    return Full(out, encoders[0], said)


def test_full_trains_saves_and_loads_the_tower(vlm: Path, full: Full) -> None:
    stored = load_file(ck.resolve(full.run) / "adapter" / "tower.safetensors")
    average = load_file(ck.resolve(full.run) / "ema.safetensors")
    fresh = load_encoder(spec_of(vlm))
    before = {n: p.detach().clone() for n, p in tower_parameters(fresh)}
    assert stored.keys() == before.keys() == {n.removeprefix("adapter.") for n in average if n.startswith("adapter.")}
    assert all(torch.equal(stored[n], average[f"adapter.{n}"]) for n in stored)
    moved = [n for n in stored if not torch.equal(stored[n], before[n])]
    assert len(moved) > 0.9 * len(stored) and "patch_embed.proj.weight" in moved and "merger.linear_fc2.weight" in moved
    load_adapter(fresh, ck.resolve(full.run) / "adapter")
    assert all(torch.equal(p, stored[n]) for n, p in tower_parameters(fresh))
    assert not any(p.requires_grad for p in fresh.parameters())
    policy = Policy.from_pretrained(full.run)
    assert torch.equal(policy.encoder.encode_images(pictures(2)), fresh.encode_images(pictures(2)))
    assert policy.encoder.fingerprint() == fresh.fingerprint() != load_encoder(spec_of(vlm)).fingerprint()


def test_the_tower_learns_at_its_own_rate(recorded: Recorded, stage_two: Path, tmp_path: Path, vlm: Path) -> None:
    """AdamW's first step moves a weight by its rate: the VLM's is lr × vlm_lr_scale."""
    finetune(configure(recorded, stage_two, tmp_path / "run", full=True, steps=1, **{"optimizer.ema": 0.0}), say=quiet)
    stored, before = (
        load_file(ck.resolve(tmp_path / "run") / "model.safetensors"),
        dict(tower_parameters(load_encoder(spec_of(vlm)))),
    )
    steps = torch.cat([(stored[f"adapter.{n}"] - p).abs().flatten() for n, p in before.items()])
    assert steps.median() == pytest.approx(1e-3, rel=1e-2) and steps.max() < 1.01e-3


def test_full_resumes_exactly(recorded: Recorded, stage_two: Path, full: Full, tmp_path: Path) -> None:
    config = configure(recorded, stage_two, tmp_path / "run", full=True)
    assert finetune(config, say=quiet, stop_after=2)[0].step == 2
    assert finetune(config, say=quiet)[0].step == 4
    first, second = tensors(tmp_path / "run"), tensors(full.run)
    assert first.keys() == second.keys() and [n for n in first if not torch.equal(first[n], second[n])] == []
    with pytest.raises(UserError, match="has other settings: stage_three.full"):
        finetune(configure(recorded, stage_two, full.run), say=quiet)


def test_a_moved_vlm_is_found_when_a_run_resumes(
    recorded: Recorded, stage_two: Path, full: Full, vlm: Path, tmp_path: Path
) -> None:
    """By its fingerprint; another VLM is refused with what differs."""
    moved, out = shutil.copytree(vlm, tmp_path / "moved"), tmp_path / "run"
    finetune(configure(recorded, stage_two, out, full=True), say=quiet, stop_after=2)
    config = configure(recorded, stage_two, out, full=True)
    other = make_tiny_qwen3vl(tmp_path / "other", dataclasses.replace(TINY, seed=1))
    with pytest.raises(
        UserError, match=r"weights_sha256: it has \w+…, this VLM has \w+…; give that VLM's folder"
    ) as error:
        finetune(dataclasses.replace(config, vlm_path=str(other)), say=quiet)
    assert "\n" not in str(error.value)
    assert finetune(dataclasses.replace(config, vlm_path=str(moved)), say=quiet)[0].step == 4
    first, second = tensors(out), tensors(full.run)
    assert all(torch.equal(first[n], second[n]) for n in second)
    assert read_json(ck.resolve(out) / "policy.json")["encoder"]["spec"]["path"] == str(moved)


def test_only_what_is_trained_has_optimizer_state(
    recorded: Recorded, stage_two: Path, full: Full, tmp_path: Path
) -> None:
    config = configure(recorded, stage_two, tmp_path / "run", LORA, steps=2, unfreeze={"adapter.": 2}, save_every=1)
    finetune(config, say=quiet)
    held = {n.rsplit(":", 1)[0] for n in load_file(ck.resolve(tmp_path / "run") / "optimizer.safetensors")}
    weights = load_file(ck.resolve(tmp_path / "run") / "model.safetensors")
    assert held == {n for n in weights if not n.startswith("adapter.")}  # LoRA would be trained from step 2 on
    whole = {n.rsplit(":", 1)[0] for n in load_file(ck.resolve(full.run) / "optimizer.safetensors")}
    assert {n for n in whole if n.startswith("adapter.")} == {f"adapter.{n}" for n, _ in tower_parameters(full.encoder)}


def test_memory_is_said_before_the_run(full: Full) -> None:
    said = [line for line in full.said if line.startswith("Memory: ")]
    assert len(said) == 1 and all(
        word in said[0] for word in ("weights", "gradients", "AdamW", "EMA", "activations about", "are trained")
    )


def test_a_tower_fits_its_own_weights_only(vlm: Path, tmp_path: Path) -> None:
    encoder = load_encoder(spec_of(vlm))
    save_adapter(encoder, tmp_path / "tower")
    other = make_tiny_qwen3vl(tmp_path / "other", dataclasses.replace(TINY, seed=1))
    with pytest.raises(UserError, match="was trained on another VLM than .*weights_sha256"):
        load_adapter(load_encoder(spec_of(other)), tmp_path / "tower")
    with pytest.raises(UserError, match="exists already"):
        save_adapter(encoder, tmp_path / "tower")
    (tmp_path / "tower" / "tower.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="tower.safetensors is damaged"):
        load_adapter(encoder, tmp_path / "tower")


# --- gradient checkpointing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3vl", "paligemma2", "paligemma2 language"])
def test_gradients_are_the_same_with_checkpointing(vlm: Path, tmp_path: Path, family: str) -> None:
    if family == "qwen3vl":
        spec = spec_of(vlm)
    else:
        folder = make_tiny_paligemma2(tmp_path / "vlm", TinyPaliGemmaSpec())
        spec = EncoderSpec(
            str(folder),
            vlm="paligemma2",
            resolution=56,
            dtype="float32",
            depth="language" if "language" in family else "vision",
        )
    encoder = load_encoder(spec)
    add_lora(encoder, LORA)
    with torch.no_grad():
        for name, p in encoder.vision.named_parameters():
            if "lora_B" in name:
                p.add_(0.1)
    found, kept = [], []
    for recompute in (False, True):
        encoder.vision.recompute, total = recompute, []
        encoder.zero_grad(set_to_none=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: total.append(x.nbytes) or x, lambda x: x):
            features = encoder.encode_observation([pictures(2, 56)], "push")
        features.square().mean().backward()
        found.append({n: p.grad.clone() for n, p in encoder.vision.named_parameters() if p.grad is not None})
        kept.append(sum(total))
    assert found[0].keys() == found[1].keys() and found[0]
    assert all(torch.equal(found[0][n], found[1][n]) and found[0][n].abs().max() > 0 for n in found[0])
    assert kept[1] < 0.7 * kept[0]


def test_checkpointing_does_not_change_the_run(recorded: Recorded, stage_two: Path, full: Full, tmp_path: Path) -> None:
    finetune(configure(recorded, stage_two, tmp_path / "run", full=True, gradient_checkpointing=True), say=quiet)
    first, second = tensors(tmp_path / "run"), tensors(full.run)
    assert [n for n in first if not torch.equal(first[n], second[n])] == []


# --- augmentation and condition masking -----------------------------------------------------------------------------


def test_live_pictures_are_augmented_as_cached_ones(recorded: Recorded, vlm: Path, tmp_path: Path) -> None:
    build(
        BuildConfig(
            (str(recorded["h264"]),),
            spec_of(vlm),
            tmp_path / "cache",
            batch_size=8,
            shard_frames=32,
            device="cpu",
            augment=2,
        )
    )
    cache = Cache.open(tmp_path / "cache")
    live, rows = LiveFeatures(load_encoder(spec_of(vlm)), cache, sources_of(cache)), np.array([0, 3, 9])
    batch = gather(cache, np.zeros(3, np.int64), rows, 4, features=False)
    for variant in (0, 1, 2):
        found = live(batch, np.zeros(3, bool), np.full(3, variant)).tokens.unflatten(1, (-1, cache.tokens))  # [B,V,K,D]
        for v, view in enumerate(cache.datasets[0].views):
            assert_same_features(found[:, v], cache.datasets[0].features(view, rows, variant))
    plain, other = (live(batch, np.zeros(3, bool), np.full(3, k)).tokens for k in (0, 1))
    assert (plain - other).square().mean() > 1e-2 * plain.square().mean()


def test_augmented_and_masked_fine_tuning_resumes_exactly(
    recorded: Recorded, stage_two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[tuple[list[int], list[bool]]]] = {}
    settings = {"image_aug": True, "masking.images": 0.4, "masking.text": 0.4, "masking.proprio": 0.4}
    call = LiveFeatures.__call__

    def noted(
        self: Any, batch: Any, dropped: np.ndarray | None = None, variant: np.ndarray | None = None, *images: Any
    ) -> Any:
        if variant is not None and len(batch) == 4:
            seen.setdefault(run, []).append((variant.tolist(), dropped.tolist()))
        return call(self, batch, dropped, variant, *images)

    monkeypatch.setattr(LiveFeatures, "__call__", noted)
    for run, stops in (("straight", (None,)), ("resumed", (2, None)), ("plain", (None,))):
        changes = settings if run != "plain" else {name: settings[name] for name in settings if name != "image_aug"}
        for stop in stops:
            finetune(configure(recorded, stage_two, tmp_path / run, LORA, **changes), say=quiet, stop_after=stop)
    assert seen["straight"] == seen["resumed"] and seen["straight"] != seen["plain"]
    variants = sum((v for v, _ in seen["straight"]), [])
    assert 0 < sum(v > 0 for v in variants) < len(variants) and any(any(m) for _, m in seen["straight"])
    first, second, plain = (tensors(tmp_path / run) for run in seen)
    assert [n for n in first if not torch.equal(first[n], second[n])] == [] and any(
        not torch.equal(first[n], plain[n]) for n in first
    )


def test_dropout_is_that_of_the_position(recorded: Recorded, stage_two: Path, tmp_path: Path) -> None:
    """Resumed, and with blocks computed twice, a run draws the same masks; held-out samples are seen without."""
    lora, found = dataclasses.replace(LORA, dropout=0.5, targets="qv"), {}
    held = {"holdout": 0.34, "eval_every": 4, "eval_batches": 2}
    for run, spec, stops, changes in (
        ("straight", lora, (None,), {}),
        ("resumed", lora, (2, None), {}),
        ("checkpointed", lora, (None,), {"gradient_checkpointing": True}),
        ("plain", dataclasses.replace(lora, dropout=0.0), (None,), {}),
    ):
        for stop in stops:
            report, _ = finetune(
                configure(recorded, stage_two, tmp_path / run, spec, accumulate=2, **held, **changes),
                say=quiet,
                stop_after=stop,
            )
        found[run] = tensors(tmp_path / run), report.eval_mse
    first, error = found["straight"]
    for run in ("resumed", "checkpointed"):
        assert [n for n in first if not torch.equal(first[n], found[run][0][n])] == [] and found[run][1] == error
    assert any(not torch.equal(first[n], found["plain"][0][n]) for n in first)
    keys = [
        t.chunk(3)[1] for n, t in first.items() if n.endswith("qkv.lora_B.default.weight") and n.startswith("model")
    ]
    assert len(keys) == 3 and not any(k.any() for k in keys)


def test_half_of_the_samples_are_augmented() -> None:
    drawn = draw_variants(3, np.arange(20000), 7)
    shares = np.bincount(drawn, minlength=8) / len(drawn)
    assert abs(shares[0] - PROBABILITY) < 0.02 and (np.abs(shares[1:] - PROBABILITY / 7) < 0.01).all()
    assert np.array_equal(draw_variants(3, np.arange(100, 200), 7), drawn[100:200])
    assert not draw_variants(3, np.arange(100), 0).any() and not np.array_equal(
        draw_variants(4, np.arange(100), 7), drawn[:100]
    )


# --- back into a cache ----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Loop:
    """Stage three with LoRA, the cache of its features, and training that goes on from there."""

    three: Path
    cache: Path
    two: Path


@pytest.fixture(scope="module")
def loop(recorded: Recorded, stage_two: Path, tmp_path_factory: pytest.TempPathFactory) -> Loop:
    folder = tmp_path_factory.mktemp("loop")
    finetune(configure(recorded, stage_two, folder / "three", LORA, **{"optimizer.vlm_lr_scale": 1.0}), say=quiet)
    build(again(recorded, folder / "three", folder / "cache"))
    train(going_on(folder / "cache", folder / "two", folder / "three"), say=quiet)
    return Loop(folder / "three", folder / "cache", folder / "two")


def again(recorded: Recorded, run: Path, out: Path, **overrides: Any) -> BuildConfig:
    return BuildConfig(
        (str(recorded["h264"]),), adapted_spec(run, **overrides), out, batch_size=8, shard_frames=32, device="cpu"
    )


def going_on(cache: Path, out: Path, init: Path, **changes: Any) -> TrainConfig:
    return from_mapping(TrainConfig, {"cache": str(cache), "out": str(out), **TRAINING, "init": str(init), **changes})


def test_the_cache_holds_what_the_fine_tuned_policy_sees(recorded: Recorded, cache: Path, loop: Loop) -> None:
    policy, new = Policy.from_pretrained(loop.three), Cache.open(loop.cache)
    rows = np.array([0, 5, 11])
    live = LiveFeatures(policy.encoder, new, sources_of(new))(
        gather(new, np.zeros(3, np.int64), rows, 4, features=False), np.zeros(3, bool)
    )
    cached = gather(new, np.zeros(3, np.int64), rows, 4)
    assert_same_features(cached.tokens, live.tokens)
    assert new.fingerprint["encoder"] == policy.encoder.fingerprint()
    assert fp.diff(Cache.open(cache).fingerprint["encoder"], new.fingerprint["encoder"])[0].startswith(
        "adapter: cache has null"
    )
    problems, check = verify(loop.cache, live=6, device="cpu")  # the live encoder finds its adapter
    assert not problems and check is not None and check.relative <= TOLERANCE["float16"]


def test_drift_of_features(cache: Path, loop: Loop, dvla: Any) -> None:
    found = diff(cache, loop.cache, samples=8)
    [drift] = found.drifts
    old, new = (Cache.open(path).datasets[0] for path in (cache, loop.cache))
    rows = np.arange(old.frames)
    every = diff(cache, loop.cache, samples=old.frames).drifts[0]
    a, b = (np.concatenate([d.features(v, rows).astype(np.float64) for v in old.views]) for d in (old, new))
    assert every.frames == old.frames and every.relative == pytest.approx(
        np.sqrt(np.square(a - b).sum() / np.square(a).sum()), rel=1e-5
    )
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert every.cosine == pytest.approx(cosine.mean(), rel=1e-5) and every.cosine < 0.99999
    assert (drift.dataset, drift.frames) == ("h264", 8) and drift.relative > 1e-3
    shown = dvla("cache", "diff", cache, loop.cache, "--samples", 8)
    words = " ".join(shown.out.split())  # the console breaks long lines
    assert shown.code == 1
    assert f"feature drift of h264, 8 frames: relative RMS {drift.relative:.3g}, cosine {drift.cosine:.5f}" in words
    same = diff(cache, cache, samples=8)
    assert same.same and (same.drifts[0].relative, same.drifts[0].cosine) == (0.0, pytest.approx(1.0, abs=1e-6))


def test_training_goes_on_from_stage_three(recorded: Recorded, loop: Loop, tmp_path: Path) -> None:
    start = load_file(ck.resolve(loop.three) / "ema.safetensors")
    start = {name: tensor for name, tensor in start.items() if not name.startswith("adapter.")}
    said: list[str] = []
    train(going_on(loop.cache, tmp_path / "still", loop.three, steps=1, optimizer={"lr": 0.0}), say=said.append)
    still = load_file(ck.resolve(tmp_path / "still") / "model.safetensors")
    assert all(torch.equal(still[n], start[n]) for n in start) and said[0].startswith(
        "starting from the averaged weights of "
    )
    for stop in (1, None):
        train(going_on(loop.cache, tmp_path / "stopped", loop.three), say=quiet, stop_after=stop)
    first, second = tensors(tmp_path / "stopped"), tensors(loop.two)
    assert [n for n in first if not torch.equal(first[n], second[n])] == [] and any(
        not torch.equal(second[f"model.safetensors/{n}"], start[n]) for n in start
    )
    policy = Policy.from_pretrained(loop.two)
    assert policy.encoder.fingerprint() == Cache.open(loop.cache).fingerprint["encoder"]
    second_round = finetune(configure(recorded, loop.two, tmp_path / "again", LORA, steps=1), say=quiet)
    assert second_round[1].jump < 1e-3  # the merged encoder gives what its cache holds
    build(again(recorded, tmp_path / "again", tmp_path / "third"))  # two adapters, one on the other
    adapter = Cache.open(tmp_path / "third").fingerprint["encoder"]["adapter"]
    assert adapter["on"] == Cache.open(loop.cache).fingerprint["encoder"]["adapter"]


def test_full_towers_go_back_as_well(recorded: Recorded, full: Full, tmp_path: Path) -> None:
    build(again(recorded, full.run, tmp_path / "cache"))
    assert train(going_on(tmp_path / "cache", tmp_path / "run", full.run, steps=1), say=quiet).step == 1


def test_what_does_not_go_on(
    recorded: Recorded, cache: Path, stage_two: Path, loop: Loop, vlm: Path, tmp_path: Path, dvla: Any
) -> None:
    for from_cache, init, message in (
        (
            cache,
            loop.three,
            r"saw other features than cache .* holds: adapter: the cache has null, the policy saw .*sha256",
        ),
        (loop.cache, stage_two, "saw other features"),
    ):
        with pytest.raises(UserError, match=message):
            train(going_on(from_cache, tmp_path / "run", init), say=quiet)
    with pytest.raises(
        UserError, match="leave out --model-size, dit and .*: dit.width: you requested 64, the policy has 32"
    ):
        train(
            going_on(
                loop.cache, tmp_path / "run", loop.three, dit={"width": 64, "blocks": 1, "heads": 2, "horizon": 4}
            ),
            say=quiet,
        )
    with pytest.raises(UserError, match="leave out --model-size, dit and .* differs: dit"):
        train(going_on(loop.cache, tmp_path / "run", loop.three, loss={"kind": "flow"}), say=quiet)
    with pytest.raises(UserError, match="blind is true, but .* was trained with blind false"):
        train(going_on(loop.cache, tmp_path / "run", loop.three, blind=True), say=quiet)
    with pytest.raises(UserError, match="no run or checkpoint at .*none"):
        train(going_on(loop.cache, tmp_path / "run", tmp_path / "none"), say=quiet)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="holds no adapter"):
        adapted_spec(stage_two)
    refused = dvla(
        "cache", "build", recorded["h264"], "--adapter", loop.three, "--vlm", "qwen3vl", "--out", tmp_path / "cache"
    )
    assert refused.code == 2 and "leave --vlm out" in refused.err
    spec = dataclasses.replace(adapted_spec(loop.three), adapters=(str(tmp_path / "gone"),))
    with pytest.raises(UserError, match="adapter .*gone, which these features .* need, is missing"):
        load_encoder(spec)


def test_the_loop_by_hand(recorded: Recorded, loop: Loop, tmp_path: Path, dvla: Any) -> None:
    """The commands: the network's shape and the VLM need not be named again."""
    built = dvla(
        "cache", "build", recorded["h264"], "--adapter", loop.three, "--batch-size", 8, "--out", tmp_path / "cache"
    )
    assert built.code == 0, built.err
    trained = dvla(
        "train",
        "--from-cache",
        tmp_path / "cache",
        "--init",
        loop.three,
        "--out",
        tmp_path / "run",
        *shlex.split("--steps 1 --batch-size 4 --draws 2 --set holdout=0 --set eval_every=0 --device cpu"),
    )
    assert trained.code == 0, trained.err
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["init"] == str(loop.three) and settings["dit"]["width"] == 32 and settings["model_size"] == "tiny"
