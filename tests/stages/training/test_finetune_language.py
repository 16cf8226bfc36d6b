"""Stage three for features of the language model: live, on a split cache inside it, and back into a cache."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dvla.batch import FeatureBatch
from dvla.cache.loader.dropout import ConditionDropout
from dvla.cache.loader.live import LiveFeatures
from dvla.cache.loader.loader import Loader, gather
from dvla.cache.loader.provenance import sources_of
from dvla.cache.readers import open_source
from dvla.cache.store.cache import Cache
from dvla.cache.vlm.load import load_encoder
from dvla.cache.vlm.lora import add_lora, lora_parameters
from dvla.cache.vlm.spec import EncoderSpec, LoraSpec
from dvla.cache.vlm.tiny_paligemma2 import TinyPaliGemmaSpec, make_tiny_paligemma2
from dvla.cache.vlm.tiny_qwen3vl import TinySpec, make_tiny_qwen3vl
from dvla.common.config import from_mapping
from dvla.errors import UserError
from dvla.stages.caching.build import build
from dvla.stages.caching.config import BuildConfig
from dvla.stages.caching.upkeep.verify import TOLERANCE, verify
from dvla.stages.policy import checkpoint as ck
from dvla.stages.policy.export import export_policy
from dvla.stages.policy.load import adapted_spec
from dvla.stages.policy.policy import Policy
from dvla.stages.training.config import TrainConfig
from dvla.stages.training.stage_three import finetune as finetune_module
from dvla.stages.training.stage_three.finetune import finetune, finetune_config
from dvla.stages.training.stage_three.split import SplitFeatures
from dvla.stages.training.step import batch_loss, noise_generator
from dvla.stages.training.train import policy_net, train
from support.cli_runner import Dvla, argv, refused
from support.corner import other_instruction
from support.finetune_samples import caught_encoders
from support.tolerances import assert_same_actions, assert_same_features

LAYER, BOUNDARY = 4, 2
TINY = TinySpec(vision_depth=2, vision_width=32, vision_heads=2, out_width=64, text_layers=5, init_std=0.1)
LANGUAGE: dict[str, Any] = {"resolution": 64, "dtype": "float32", "depth": "language", "layers": (LAYER,)}
LORA = LoraSpec(r=2, alpha=4.0, targets="all-linear")
DIT = {"width": 32, "blocks": 1, "heads": 2, "horizon": 4}
TRAINING = {
    "model_size": "tiny",
    "dit": DIT,
    "steps": 2,
    "batch_size": 4,
    "draws": 2,
    "holdout": 0.0,
    "eval_every": 0,
    "log_every": 1,
    "threads": 1,
    "device": "cpu",
    "optimizer": {"lr": 1e-2, "vlm_lr_scale": 1.0, "warmup": 1, "ema": 0.5},
}


def quiet(*_: Any) -> None:
    pass


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3vl(tmp_path_factory.mktemp("vlm") / "tiny", TINY)


@pytest.fixture(scope="module")
def source(recorded: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Episodes of two instructions, of two lengths in tokens, and images of two sizes."""
    folder = shutil.copytree(recorded["image"], tmp_path_factory.mktemp("source") / "image")
    other_instruction(folder)
    return str(folder)


def spec_of(vlm: Path, **changes: Any) -> EncoderSpec:
    return EncoderSpec(str(vlm), **{**LANGUAGE, **changes})


def made(source: str, spec: EncoderSpec, out: Path, **changes: Any) -> Path:
    build(BuildConfig((source,), spec, out, **{"batch_size": 6, "shard_frames": 16, "device": "cpu", **changes}))
    return out


def trained(cache: Path, out: Path, **changes: Any) -> Path:
    train(from_mapping(TrainConfig, {"cache": str(cache), "out": str(out), **TRAINING, **changes}), say=quiet)
    return out


@pytest.fixture(scope="module")
def features(source: str, vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(source, spec_of(vlm, tokens=1), tmp_path_factory.mktemp("features") / "cache")


@pytest.fixture(scope="module")
def split(source: str, vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(source, spec_of(vlm, boundary=BOUNDARY), tmp_path_factory.mktemp("split") / "cache", augment=1)


@pytest.fixture(scope="module")
def stage_two(features: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(features, tmp_path_factory.mktemp("two") / "run")


def configure(start: Path, out: Path, lora: LoraSpec | None = LORA, full: bool = False, **changes: Any) -> Any:
    return finetune_config(start, (), lora, {"out": str(out), "steps": 4, **changes}, None, full)


def tensors(run: Path, stem: str = "model") -> dict[str, torch.Tensor]:
    return load_file(ck.resolve(run) / f"{stem}.safetensors")


def same_tensors(first: Path, second: Path) -> bool:
    a, b = tensors(first), tensors(second)
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def adapted(run: Path) -> set[str]:
    """Parts of the VLM that a run's adapter is in."""
    names = [n.removeprefix("adapter.") for n in tensors(run) if n.startswith("adapter.")]
    return {".".join(n.split(".")[:3] if n.startswith("language") else n.split(".")[:2]) for n in names}


# --- a split cache ----------------------------------------------------------------------------------------------------


def test_it_is_built_and_verified_as_any(split: Path, vlm: Path) -> None:
    cache, encoder = Cache.open(split), load_encoder(spec_of(vlm))
    lower = encoder.at_boundary(BOUNDARY)
    assert (cache.boundary, cache.tokens, cache.width) == (BOUNDARY, lower.tokens, 64)
    [dataset] = cache.datasets
    assert dataset.visible.tolist() == [lower.visible(text) for text in dataset.instructions]
    assert len(set(dataset.visible.tolist())) == 2  # so that a batch holds sequences of several lengths
    problems, check = verify(split, live=8, device="cpu")
    assert problems == [] and check is not None and check.relative <= TOLERANCE["float16"]


@pytest.mark.parametrize("kept", [{"tokens": 1}, {"queries": 4}, {"keep": "image"}])
def test_features_and_gradients_are_those_of_the_live_layers(
    source: str, vlm: Path, features: Path, split: Path, tmp_path: Path, kept: dict[str, Any]
) -> None:
    """Of one batch with both instructions, dropped conditions and augmented images."""
    whole, lower = features, split
    if "tokens" not in kept:
        whole = made(source, spec_of(vlm, **kept), tmp_path / "features")
    if "queries" in kept:
        lower = made(source, spec_of(vlm, boundary=BOUNDARY, **kept), tmp_path / "split", augment=1)
    cache, opened, encoder = Cache.open(lower), Cache.open(whole), load_encoder(spec_of(vlm, **kept))
    above, live = SplitFeatures(encoder, cache), LiveFeatures(encoder, opened, sources_of(opened))
    add_lora(encoder, dataclasses.replace(LORA, last_n_blocks=BOUNDARY))
    adapter = dict(lora_parameters(encoder))
    with torch.no_grad():
        for i, p in enumerate(adapter.values()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.1)
    with Loader(cache, batch_size=12, horizon=4, dropout=ConditionDropout(0.3, 0.3, 0.3), augment=True) as loader:
        sample = next(loader)
    drawn = sample.drawn
    dropped = (drawn.no_text, drawn.no_images, drawn.no_proprio)
    [table] = cache.datasets
    kinds = table.episode_instruction[table.episode_of(drawn.row)][~drawn.no_images]
    assert 0 < drawn.no_images.sum() < 12 and 0 < drawn.variant.sum() < 12 and len(set(kinds.tolist())) == 2
    bare = gather(opened, drawn.dataset, drawn.row, 4, dropped=dropped, features=False)
    config = from_mapping(TrainConfig, {"cache": "", "out": "", "model_size": "tiny", "dit": DIT, "draws": 2})
    torch.manual_seed(0)
    net = policy_net(config, opened)
    with torch.no_grad():  # an untrained one begins with gates that are shut
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    losses, gradients = [], []
    batches = live(bare, drawn.no_images, drawn.variant), above(sample.batch, drawn.no_images)
    for batch in batches:
        loss = batch_loss(net, batch, config, noise_generator(0, 0, 0)).total
        found = torch.autograd.grad(loss, list(adapter.values()))
        assert all(g.abs().max() > 0 for g in found)
        losses.append(loss.item())
        gradients.append(torch.cat([g.flatten() for g in found]))
    for name in (f.name for f in dataclasses.fields(FeatureBatch)):
        if name != "tokens" and getattr(bare, name) is not None:
            torch.testing.assert_close(getattr(batches[0], name), getattr(batches[1], name), rtol=0, atol=0)
    first, second = (batch.tokens.masked_fill(~batch.token_mask[..., None], 0) for batch in batches)
    assert torch.equal(first, batches[0].tokens) and torch.equal(second, batches[1].tokens)  # zeros beyond the prompt
    assert (first - second).square().mean().sqrt() < TOLERANCE["float16"] * first.square().mean().sqrt()
    assert abs(losses[0] - losses[1]) < 1e-3 * abs(losses[0])
    assert (gradients[0] - gradients[1]).norm() < 2e-3 * gradients[0].norm()


def test_it_learns_what_the_live_layers_learn(source: str, stage_two: Path, split: Path, tmp_path: Path) -> None:
    """Four steps each way, resumed in between; then the policies act."""
    changes = {"masking.images": 0.3, "holdout": 0.34, "eval_every": 2, "eval_batches": 2}
    config = configure(stage_two, tmp_path / "split", cache=str(split), **changes)
    assert finetune(config, say=quiet, stop_after=2)[0].step == 2
    report, continuity = finetune(config, say=quiet)
    assert report.step == 4 and continuity is not None and continuity.jump < 1e-3
    assert 0 < continuity.difference <= TOLERANCE["float16"]
    settings = json.loads((tmp_path / "split" / "config.json").read_text())
    assert settings["stage_three"]["lora"]["last_n_blocks"] == BOUNDARY
    above = dataclasses.replace(LORA, last_n_blocks=BOUNDARY)
    live = finetune(configure(stage_two, tmp_path / "live", above, **changes), say=quiet)[0]
    assert live.eval_mse == pytest.approx(report.eval_mse, rel=1e-2)
    start, ours, theirs = (tensors(run) for run in (stage_two, tmp_path / "split", tmp_path / "live"))
    assert ours.keys() == theirs.keys() and adapted(tmp_path / "split") == {"language.layers.2", "language.layers.3"}
    moved = torch.cat([(theirs[n] - start.get(n, torch.zeros(()))).flatten() for n in theirs])
    apart = torch.cat([(theirs[n] - ours[n]).flatten() for n in theirs])
    assert apart.norm() < 0.1 * moved.norm()
    episode = open_source(source).load(1)
    images = {view.name: next(view.frames(2, 3)) for view in episode.views}
    chunks = [
        Policy.from_pretrained(tmp_path / way).act(images, episode.instruction, episode.state[2])
        for way in ("split", "live")
    ]
    np.testing.assert_allclose(*chunks, atol=0.1 * float(np.abs(chunks[1]).max()))


def test_without_the_runs_own_cache(source: str, vlm: Path, split: Path, tmp_path: Path) -> None:
    """The first loss comes from the sources, or is not compared."""
    cache = made(source, spec_of(vlm, tokens=1), tmp_path / "cache")
    two = trained(cache, tmp_path / "two")
    settings = json.loads((two / "config.json").read_text())
    (two / "config.json").write_text(json.dumps(settings | {"cache": str(tmp_path / "gone")}))
    given = {"cache": str(split), "steps": 1}
    assert finetune(configure(two, tmp_path / "a", **given), say=quiet)[1] is None
    config = dataclasses.replace(configure(two, tmp_path / "b", **given), sources=(source,))
    continuity = finetune(config, say=quiet)[1]
    assert continuity is not None and 0 < continuity.difference <= TOLERANCE["float16"] and continuity.jump < 1e-3


# --- live -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Tuned:
    run: Path
    encoder: Any  # as training left it
    said: list[str]


@pytest.fixture(scope="module")
def tuned(stage_two: Path, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """Four steps without a stop."""
    out, said = tmp_path_factory.mktemp("three") / "run", []
    with caught_encoders() as encoders:
        assert finetune(configure(stage_two, out), say=said.append)[0].step == 4
    return Tuned(out, encoders[0], said)


def test_by_default_lora_is_in_the_language_layers(tuned: Tuned) -> None:
    assert adapted(tuned.run) == {f"language.layers.{i}" for i in range(LAYER)}
    settings = json.loads((tuned.run / "config.json").read_text())
    assert settings["stage_three"]["lora"]["last_n_blocks"] == LAYER
    assert any("in a vision tower and language layers of" in line for line in tuned.said)


def test_it_resumes_exactly(stage_two: Path, tuned: Tuned, tmp_path: Path) -> None:
    config = configure(stage_two, tmp_path / "run", gradient_checkpointing=True)
    assert finetune(config, say=quiet, stop_after=2)[0].step == 2
    assert finetune(config, say=quiet)[0].step == 4
    assert same_tensors(tmp_path / "run", tuned.run)


def test_a_run_keeps_the_layers_it_was_begun_with(stage_two: Path, tmp_path: Path) -> None:
    """Earlier releases had LoRA in the vision tower, and wrote no number of blocks."""
    config, out = configure(stage_two, tmp_path / "run"), tmp_path / "run"
    vision = dataclasses.replace(config, lora=dataclasses.replace(LORA, last_n_blocks=LAYER + 2))
    assert finetune(vision, say=quiet, stop_after=1)[0].step == 1
    assert finetune(config, say=quiet, stop_after=2)[0].step == 2
    assert adapted(out) >= {"blocks.0", "blocks.1", "merger.linear_fc1", "language.layers.0"}
    with pytest.raises(UserError, match="stage_three.lora.last_n_blocks: run has 6, you requested 3"):
        finetune(dataclasses.replace(config, lora=dataclasses.replace(LORA, last_n_blocks=3)), say=quiet)


def test_dropout_is_that_of_the_position(stage_two: Path, tuned: Tuned, split: Path, tmp_path: Path) -> None:
    lora = dataclasses.replace(LORA, dropout=0.5)
    for name, given in (("live", {}), ("split", {"cache": str(split)})):
        for run, stops in ((f"{name}-straight", (None,)), (f"{name}-resumed", (2, None))):
            for stop in stops:
                config = configure(stage_two, tmp_path / run, lora, **given, gradient_checkpointing=stop is None)
                finetune(config, say=quiet, stop_after=stop)
        assert same_tensors(tmp_path / f"{name}-straight", tmp_path / f"{name}-resumed")
    assert not same_tensors(tmp_path / "live-straight", tuned.run)


@pytest.mark.parametrize(
    "kept", [{"queries": 4}, {"layers": (2, LAYER)}, {"layers": (2, LAYER), "layers_as": "tokens"}]
)
def test_queries_and_several_layers(source: str, vlm: Path, tmp_path: Path, kept: dict[str, Any]) -> None:
    """From a cache to a fine-tuned policy, whose features a second cache holds."""
    two = trained(made(source, spec_of(vlm, **kept), tmp_path / "cache"), tmp_path / "two")
    report, continuity = finetune(configure(two, tmp_path / "three", steps=2), say=quiet)
    assert report.step == 2 and continuity is not None and continuity.difference <= TOLERANCE["float16"]
    build_again(source, tmp_path / "three", tmp_path / "again")
    same_as_live(tmp_path / "three", tmp_path / "again")


# --- back into a cache ------------------------------------------------------------------------------------------------


def build_again(source: str, run: Path, out: Path, **changes: Any) -> Path:
    return made(source, adapted_spec(run, **changes), out)


def same_as_live(run: Path, cache: Path) -> None:
    """The cache holds what the fine-tuned policy sees."""
    policy, new = Policy.from_pretrained(run), Cache.open(cache)
    none, rows = np.zeros(3, np.int64), np.array([0, 5, new.datasets[0].frames - 1])
    with torch.inference_mode():
        live = LiveFeatures(policy.encoder, new, sources_of(new))(gather(new, none, rows, 4, features=False))
    cached = gather(new, none, rows, 4)
    assert_same_features(cached.tokens, live.tokens)
    assert torch.equal(cached.token_mask, live.token_mask)
    assert new.fingerprint["encoder"] == policy.encoder.fingerprint()
    problems, check = verify(cache, live=6, device="cpu")  # the live encoder finds its adapter
    assert problems == [] and check is not None and check.relative <= TOLERANCE["float16"]


@pytest.fixture(scope="module")
def loop(source: str, tuned: Tuned, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_again(source, tuned.run, tmp_path_factory.mktemp("loop") / "cache")


def test_the_loop(source: str, features: Path, tuned: Tuned, loop: Path, tmp_path: Path, dvla: Dvla) -> None:
    same_as_live(tuned.run, loop)
    drift = dvla("cache", "diff", features, loop, "--samples", 8)
    assert drift.code == 1 and "feature drift of image" in " ".join(drift.out.split())
    two = trained(loop, tmp_path / "two", init=str(tuned.run), steps=1)
    continuity = finetune(configure(two, tmp_path / "three", steps=1), say=quiet)[1]
    assert continuity is not None and continuity.jump < 1e-3  # the merged encoder gives what its cache holds
    split = build_again(source, tmp_path / "three", tmp_path / "split", boundary=BOUNDARY)  # two adapters, one merged
    assert Cache.open(split).fingerprint["encoder"]["adapter"]["on"]  # on the other
    problems, _ = verify(split, live=6, device="cpu")
    assert problems == []
    with pytest.raises(UserError, match="belongs to another VLM than .*: adapter"):
        finetune(configure(two, tmp_path / "wrong", cache=str(split)), say=quiet)


def test_a_split_cache_of_a_fine_tuned_vlm(source: str, tuned: Tuned, loop: Path, tmp_path: Path) -> None:
    two = trained(loop, tmp_path / "two", init=str(tuned.run), steps=1)
    lower = build_again(source, tuned.run, tmp_path / "split", boundary=1)
    report, continuity = finetune(configure(two, tmp_path / "three", cache=str(lower), steps=2), say=quiet)
    assert report.step == 2 and continuity is not None and continuity.difference <= TOLERANCE["float16"]
    assert adapted(tmp_path / "three") == {"language.layers.3"}


def acted(policy: Policy, source: str) -> np.ndarray:
    episode = open_source(source).load(1)
    images = {view.name: next(view.frames(2, 3)) for view in episode.views}
    return policy.act(images, episode.instruction, episode.state[2])


def test_an_export_acts_as_its_run(source: str, tuned: Tuned, vlm: Path, tmp_path: Path) -> None:
    """LoRA is merged into vision.safetensors; LeRobot's files lie beside."""
    done = export_policy(tuned.run, tmp_path / "policy", say=quiet)
    stored = load_file(tmp_path / "policy" / "vision.safetensors")
    assert {n.split(".")[0] for n in stored} == {"language"} and done.merged == len(stored) == 7 * LAYER
    policy, run = Policy.from_pretrained(tmp_path / "policy"), Policy.from_pretrained(tuned.run)
    assert policy.encoder.fingerprint() == run.encoder.fingerprint()
    assert_same_actions(acted(policy, source), acted(run, source))
    assert (tmp_path / "policy" / "policy_preprocessor.json").is_file()


def test_all_of_the_vlm(source: str, stage_two: Path, vlm: Path, tmp_path: Path) -> None:
    """Trained, resumed, exported and brought into a cache."""
    out = tmp_path / "run"
    config = configure(stage_two, out, None, full=True)
    assert finetune(config, say=quiet, stop_after=2)[0].step == 2
    assert finetune(config, say=quiet)[0].step == 4
    straight = dataclasses.replace(config, train=dataclasses.replace(config.train, out=str(tmp_path / "straight")))
    finetune(straight, say=quiet)
    assert same_tensors(out, tmp_path / "straight")
    before = dict(load_encoder(spec_of(vlm)).vision.named_parameters())
    stored = load_file(ck.resolve(out) / "adapter" / "tower.safetensors")
    moved = [n for n in stored if not torch.equal(stored[n], before[n])]
    assert stored.keys() == before.keys() and len(moved) > 0.9 * len(stored)
    assert "language.layers.3.mlp.down_proj.weight" in moved and "patch_embed.proj.weight" in moved
    same_as_live(out, build_again(source, out, tmp_path / "cache"))
    export_policy(out, tmp_path / "policy", say=quiet)
    assert_same_actions(*(acted(Policy.from_pretrained(p), source) for p in (tmp_path / "policy", out)))


# --- PaliGemma 2 ------------------------------------------------------------------------------------------------------

GEMMA = TinyPaliGemmaSpec(
    vision_depth=2, vision_width=32, vision_heads=2, image_size=56, out_width=64, text_layers=2, vocabulary=600
)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> EncoderSpec:
    folder = make_tiny_paligemma2(tmp_path_factory.mktemp("vlm") / "gemma", GEMMA)
    return EncoderSpec(str(folder), vlm="paligemma2", resolution=56, dtype="float32", depth="language")


@pytest.fixture(scope="module")
def gemma_two(source: str, gemma: EncoderSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage two on features of all views together."""
    folder = tmp_path_factory.mktemp("gemma")
    return trained(made(source, dataclasses.replace(gemma, tokens=4), folder / "cache"), folder / "two")


def test_gemmas_layers_learn(source: str, gemma_two: Path, tmp_path: Path) -> None:
    """And return in a cache and an export."""
    run = tmp_path / "three"
    for stop in (2, None):
        continuity = finetune(configure(gemma_two, run), say=quiet, stop_after=stop)[1]
        assert continuity is not None and continuity.difference <= TOLERANCE["float16"]
    assert adapted(run) == {"language.layers.0", "language.layers.1"}
    finetune(configure(gemma_two, tmp_path / "straight"), say=quiet)
    assert same_tensors(run, tmp_path / "straight")
    same_as_live(run, build_again(source, run, tmp_path / "again"))
    export_policy(run, tmp_path / "policy", say=quiet)
    assert_same_actions(*(acted(Policy.from_pretrained(p), source) for p in (tmp_path / "policy", run)))


def test_features_of_gemma_with_the_prompts_tokens(source: str, gemma: EncoderSpec, tmp_path: Path) -> None:
    spec = dataclasses.replace(gemma, keep="all", layers=(1, 2))
    two = trained(made(source, spec, tmp_path / "cache"), tmp_path / "two")
    finetune(configure(two, tmp_path / "three", steps=2), say=quiet)
    same_as_live(tmp_path / "three", build_again(source, tmp_path / "three", tmp_path / "again"))
    with pytest.raises(UserError, match="its boundary needs .* has depth language, layers"):
        finetune(configure(two, tmp_path / "no", cache=str(lower_of(source, gemma, tmp_path))), say=quiet)


def lower_of(source: str, gemma: EncoderSpec, folder: Path) -> Path:
    """A split cache of PaliGemma's tower."""
    return made(source, dataclasses.replace(gemma, depth="vision", boundary=1), folder / "split")


@pytest.mark.parametrize("full", [False, True])
def test_runs_of_earlier_releases_resume_as_they_were(
    source: str, gemma_two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """With LoRA in SigLIP alone, or all of SigLIP trained, under an unchanged Gemma."""

    def config(name: str) -> Any:
        return configure(gemma_two, tmp_path / name, None if full else LORA, full)

    with monkeypatch.context() as patch:
        patch.setattr(finetune_module, "_adapted_layers", lambda config, encoder: (config, False))
        finetune(config("straight"), say=quiet)
        finetune(config("resumed"), say=quiet, stop_after=2)
    begun = json.loads((tmp_path / "resumed" / "config.json").read_text())["stage_three"]
    assert "language" not in begun and (full or begun["lora"]["last_n_blocks"] is None)
    finetune(config("resumed"), say=quiet)
    assert same_tensors(tmp_path / "straight", tmp_path / "resumed")
    assert not any("language" in part for part in adapted(tmp_path / "resumed"))
    stored = [ck.resolve(tmp_path / name) / "adapter" / "identity.json" for name in ("straight", "resumed")]
    assert stored[0].read_bytes() == stored[1].read_bytes()
    same_as_live(tmp_path / "resumed", build_again(source, tmp_path / "resumed", tmp_path / "again"))


# --- refusals and commands --------------------------------------------------------------------------------------------


def test_refused(source: str, vlm: Path, stage_two: Path, split: Path, tmp_path: Path, dvla: Dvla) -> None:
    vision = made(source, spec_of(vlm, depth="vision", layers=(), boundary=1), tmp_path / "vision")
    other = made(source, spec_of(vlm, layers=(3,), boundary=1), tmp_path / "other")
    roomy = made(source, spec_of(vlm, boundary=1, prompt_tokens=40), tmp_path / "roomy")
    for cache, words in (
        (vision, "build a split cache with the settings of .*depth: cache has vision, policy has language"),
        (other, r"settings of .*layers\[0\]: cache has 3, policy has 4"),
        (roomy, "settings of .*prompt_tokens: cache has 40, policy has 32"),
    ):
        with pytest.raises(UserError, match=words) as error:
            finetune(configure(stage_two, tmp_path / "run", cache=str(cache)), say=quiet)
        assert "\n" not in str(error.value) and "no such field" not in str(error.value)
    flat = trained(made(source, spec_of(vlm, depth="vision", layers=()), tmp_path / "flat"), tmp_path / "two")
    with pytest.raises(UserError, match="depth: cache has language, policy has vision"):
        finetune(configure(flat, tmp_path / "run", cache=str(split)), say=quiet)
    for kind, words in (
        ({"layers": (2, LAYER)}, r"depth language, layers \[2, 4\]"),
        ({"depth": "vision", "layers": (), "deepstack": True}, "depth vision, layers deepstack"),
    ):
        wide = trained(made(source, spec_of(vlm, **kind), tmp_path / words), tmp_path / f"run {words}")
        with pytest.raises(UserError, match=f"leave --from-cache .* out: its boundary needs .*{words}"):
            finetune(configure(wide, tmp_path / "run", cache=str(split)), say=quiet)
    below = dataclasses.replace(LORA, last_n_blocks=3)
    with pytest.raises(UserError, match="LoRA is in the last 3 blocks; give at most 2, or .*--boundary 3"):
        finetune(configure(stage_two, tmp_path / "run", below, cache=str(split)), say=quiet)
    with pytest.raises(UserError, match="--vlm-mode full trains all blocks"):
        finetune(configure(stage_two, tmp_path / "run", None, True, cache=str(split)), say=quiet)
    with pytest.raises(UserError, match="give 1 to 6"):
        finetune(configure(stage_two, tmp_path / "run", dataclasses.replace(LORA, last_n_blocks=7)), say=quiet)
    assert not (tmp_path / "run").exists()
    options = argv(f"{source} --vlm-path {vlm} --depth language --layer {LAYER} --resolution 64 --device cpu")
    refused(dvla("cache", "build", *options, "--boundary", 4, "--out", tmp_path / "c"), "--boundary 4", "1 to 3")


def test_from_the_shell(source: str, vlm: Path, tmp_path: Path, dvla: Dvla) -> None:
    model = argv(f"{source} --vlm-path {vlm} --depth language --layer {LAYER} --resolution 64 --device cpu")
    small = ("--set", "dit={width: 32, blocks: 1, heads: 2, horizon: 4}", "--set", "eval_every=0")
    for command in (
        ("cache", "build", *model, "--tokens", 1, "--out", tmp_path / "cache"),
        ("cache", "plan", *model, "--boundary", 2, "--pilot", 4, "--out", tmp_path / "split"),
        ("cache", "build", *model, "--boundary", 2, "--out", tmp_path / "split"),
        ("cache", "inspect", tmp_path / "split"),
        ("train", *argv(f"--from-cache {tmp_path / 'cache'} --out {tmp_path / 'two'} --recipe tiny --steps 2"), *small),
        (
            "finetune",
            "--lora",
            *argv(f"{tmp_path / 'two'} --from-cache {tmp_path / 'split'} --steps 2 --out"),
            tmp_path / "three",
        ),
        ("cache", "build", source, "--adapter", tmp_path / "three", "--out", tmp_path / "again"),
        ("cache", "build", source, "--adapter", tmp_path / "three", "--boundary", 1, "--out", tmp_path / "lower"),
        ("cache", "verify", tmp_path / "again", "--live", 6),
        ("cache", "verify", tmp_path / "lower", "--live", 6),
        ("export", tmp_path / "three", "--out", tmp_path / "policy"),
    ):
        result = dvla(*command)
        assert result.code == 0 and result.err == "", (command, result)
    assert (tmp_path / "policy" / "vision.safetensors").is_file()
