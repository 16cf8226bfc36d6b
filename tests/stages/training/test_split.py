"""Split caches: hidden states inside the vision tower, and fine-tuning that runs only the blocks above them."""

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

from dvla.batch import FeatureBatch
from dvla.cache.loader.dropout import ConditionDropout
from dvla.cache.loader.live import LiveFeatures
from dvla.cache.loader.loader import Loader, gather
from dvla.cache.loader.provenance import sources_of
from dvla.cache.store.cache import Cache
from dvla.cache.vlm.encoder import VisionLanguageEncoder
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
from dvla.stages.policy.load import adapted_spec
from dvla.stages.policy.policy import Policy
from dvla.stages.training.config import TrainConfig
from dvla.stages.training.run_log import read_log
from dvla.stages.training.stage_three.finetune import finetune, finetune_config
from dvla.stages.training.stage_three.split import SplitFeatures
from dvla.stages.training.step import batch_loss, noise_generator
from dvla.stages.training.train import policy_net, train
from support.cli_runner import Dvla, refused
from support.distributed_runs import in_two_processes
from support.vlm_samples import smooth_images

BLOCKS, BOUNDARY = 3, 2
LORA = LoraSpec(r=2, alpha=4.0, targets="all-linear", last_n_blocks=BOUNDARY)


def quiet(*_: Any) -> None:
    pass


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vlm")
    return {
        "qwen3vl": make_tiny_qwen3vl(
            folder / "qwen",
            TinySpec(
                vision_depth=BLOCKS,
                vision_width=32,
                vision_heads=2,
                out_width=64,
                text_layers=1,
                vocabulary=512,
                init_std=0.1,
            ),
        ),
        "paligemma2": make_tiny_paligemma2(
            folder / "pali",
            TinyPaliGemmaSpec(
                vision_depth=BLOCKS, vision_width=32, vision_heads=2, image_size=56, out_width=64, vocabulary=600
            ),
        ),
    }


def spec_of(checkpoints: dict[str, Path], vlm: str = "qwen3vl", **changes: Any) -> EncoderSpec:
    return EncoderSpec(
        str(checkpoints[vlm]), vlm, resolution=64 if vlm == "qwen3vl" else 56, dtype="float32", **changes
    )


def learn_apart(encoder: VisionLanguageEncoder) -> dict[str, torch.nn.Parameter]:
    """The adapter's matrices, none of them zero, as after some training."""
    found = dict(lora_parameters(encoder))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in found.values():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return found


# --- the encoder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vlm", ["qwen3vl", "paligemma2"])
@pytest.mark.parametrize("kind", [{}, {"tokens": 4}, {"features": "patch"}])
def test_lower_then_upper_is_the_encoder(checkpoints: dict[str, Path], vlm: str, kind: dict[str, Any]) -> None:
    encoder, pictures = load_encoder(spec_of(checkpoints, vlm, **kind)), smooth_images(3, 40, 56)
    wanted = encoder.encode_images(pictures)
    lower = []
    for n in range(1, BLOCKS + 1):
        hidden = encoder.at_boundary(n).encode_images(pictures)
        assert hidden.shape == (3, 16, 32)
        assert torch.equal(encoder.encode_upper(hidden, n), wanted)
        at = load_encoder(spec_of(checkpoints, vlm, boundary=n))
        assert (at.tokens, at.width, at.native_tokens) == (16, 32, 16) and torch.equal(
            at.encode_images(pictures), hidden
        )
        assert at.fingerprint() == encoder.at_boundary(n).fingerprint()
        lower.append(hidden)
    assert not torch.equal(lower[0], lower[1])
    left = torch.full_like(pictures, 128)
    left[:, :, 20:] = 0
    parts = [
        encoder.at_boundary(BLOCKS).encode_images(p).unflatten(1, (4, 4)) for p in (left, torch.zeros_like(left))
    ]  # no block has mixed the patches
    changed = (parts[0] - parts[1]).abs().amax((0, 3)) > 1e-6  # [4,4]
    assert changed[1:3, 0].all() and not changed[:, 3].any()  # hidden states lie row by row


def test_the_fingerprint_carries_the_boundary(checkpoints: dict[str, Path]) -> None:
    prints = [load_encoder(spec_of(checkpoints, boundary=n)).fingerprint() for n in (None, 1, 2)]
    assert [p.get("boundary") for p in prints] == [None, 1, 2] and [p["features"] for p in prints] == [
        "merged",
        "hidden",
        "hidden",
    ]
    assert "boundary" not in prints[0]  # caches of features keep the fingerprint they had


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"boundary": 0}, "--boundary 0: give the number of last blocks to leave out, 1 to 3"),
        ({"boundary": 4}, "--boundary 4: give the number of last blocks to leave out, 1 to 3"),
        ({"boundary": 1, "tokens": 4}, "leave out tokens"),
        ({"boundary": 1, "features": "patch"}, "leave out tokens, features patch"),
        ({"boundary": 1, "vlm": "paligemma2", "depth": "language"}, "depth language"),
    ],
)
def test_boundaries_that_cannot_be(checkpoints: dict[str, Path], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_encoder(spec_of(checkpoints, **changes))


# --- the cache -------------------------------------------------------------------------------------------------------


def configure(source: Path, spec: EncoderSpec, out: Path, **changes: Any) -> BuildConfig:
    return BuildConfig((str(source),), spec, out, **{"batch_size": 6, "shard_frames": 16, "device": "cpu", **changes})


@pytest.fixture(scope="module")
def split(
    recorded: dict[str, Path], checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A split cache of each model, with one augmented variant."""
    folder = tmp_path_factory.mktemp("split")
    for vlm in checkpoints:
        build(configure(recorded["h264"], spec_of(checkpoints, vlm, boundary=BOUNDARY), folder / vlm, augment=1))
    return {vlm: folder / vlm for vlm in checkpoints}


@pytest.fixture(scope="module")
def features(
    recorded: dict[str, Path], checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A cache of features of each model, as stage two is trained on."""
    folder = tmp_path_factory.mktemp("features")
    for vlm in checkpoints:
        build(configure(recorded["h264"], spec_of(checkpoints, vlm, tokens=4), folder / vlm))
    return {vlm: folder / vlm for vlm in checkpoints}


def test_a_split_cache_is_built_and_verified_as_any(
    recorded: dict[str, Path], split: dict[str, Path], features: dict[str, Path]
) -> None:
    cache, whole = Cache.open(split["qwen3vl"]), Cache.open(features["qwen3vl"])
    assert (cache.boundary, cache.tokens, cache.width, cache.text_width) == (
        BOUNDARY,
        16,
        32,
        64,
    ) and whole.boundary is None
    record, wanted = 2 * cache.tokens * cache.width, 2 * whole.tokens * whole.width
    assert record == 2 * wanted  # four times the tokens of half the width
    problems, check = verify(split["qwen3vl"], live=8, device="cpu")
    assert problems == [] and 0 < check.relative <= TOLERANCE["float16"]


def test_resumed_the_bytes_are_the_same(
    recorded: dict[str, Path], checkpoints: dict[str, Path], split: dict[str, Path], tmp_path: Path
) -> None:
    config = configure(recorded["h264"], spec_of(checkpoints, boundary=BOUNDARY), tmp_path / "cache", augment=1)

    class Cut(Exception):
        pass

    def cut(what: str, done: int, total: int) -> None:
        if "tables" not in what and done > total // 2:
            raise Cut

    with pytest.raises(Cut):
        build(config, cut)
    report = build(config)
    assert report.resumed_shards > 0
    assert Cache.open(tmp_path / "cache").manifest["files"] == Cache.open(split["qwen3vl"]).manifest["files"]
    with pytest.raises(UserError, match="encoder.boundary: cache has 2, you requested 1"):
        build(dataclasses.replace(config, encoder=spec_of(checkpoints, boundary=1)))


# --- features and gradients ------------------------------------------------------------------------------------------

DIT = {"width": 32, "blocks": 1, "heads": 2, "horizon": 4}


@pytest.mark.parametrize("vlm", ["qwen3vl", "paligemma2"])
def test_features_and_gradients_are_those_of_the_live_tower(
    recorded: dict[str, Path], checkpoints: dict[str, Path], split: dict[str, Path], features: dict[str, Path], vlm: str
) -> None:
    """Of one batch with masked conditions and augmented pictures: the loss of a policy, and its gradient in every
    matrix of the adapter."""
    cache, whole, encoder = (
        Cache.open(split[vlm]),
        Cache.open(features[vlm]),
        load_encoder(spec_of(checkpoints, vlm, tokens=4)),
    )
    above = SplitFeatures(encoder, cache)
    live = LiveFeatures(encoder, whole, sources_of(whole, (str(recorded["h264"]),)))
    add_lora(encoder, LORA)
    adapter = learn_apart(encoder)
    with Loader(cache, batch_size=12, horizon=4, dropout=ConditionDropout(0.3, 0.3, 0.3), augment=True) as loader:
        sample = next(loader)
    drawn = sample.drawn
    dropped = (drawn.no_text, drawn.no_images, drawn.no_proprio)
    assert 0 < drawn.no_images.sum() < 12 and 0 < drawn.variant.sum() < 12
    bare = gather(whole, drawn.dataset, drawn.row, 4, dropped=dropped, features=False)
    config = from_mapping(TrainConfig, {"cache": "", "out": "", "model_size": "tiny", "dit": DIT, "draws": 2})
    torch.manual_seed(0)
    net = policy_net(config, whole)
    with torch.no_grad():  # an untrained one begins with gates that are shut
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    losses, gradients, batches = (
        [],
        [],
        (live(bare, drawn.no_images, drawn.variant), above(sample.batch, drawn.no_images)),
    )
    for batch in batches:
        loss = batch_loss(net, batch, config, noise_generator(0, 0, 0)).total
        found = torch.autograd.grad(loss, list(adapter.values()))
        assert all(g.abs().max() > 0 for g in found)
        losses.append(loss.item())
        gradients.append(torch.cat([g.flatten() for g in found]))
    for name in (f.name for f in dataclasses.fields(FeatureBatch)):
        if name != "tokens" and getattr(bare, name) is not None:
            torch.testing.assert_close(getattr(batches[0], name), getattr(batches[1], name), rtol=0, atol=0)
    scale = batches[0].tokens.square().mean().sqrt()
    assert (batches[0].tokens - batches[1].tokens).square().mean().sqrt() < TOLERANCE["float16"] * scale
    assert abs(losses[0] - losses[1]) < 1e-3 * abs(losses[0])
    assert (gradients[0] - gradients[1]).norm() < 2e-3 * gradients[0].norm()


# --- fine-tuning -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stage_two(features: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two") / "run"
    train(
        from_mapping(
            TrainConfig,
            {
                "cache": str(features["qwen3vl"]),
                "out": str(out),
                "model_size": "tiny",
                "dit": DIT,
                "steps": 3,
                "batch_size": 4,
                "draws": 2,
                "eval_every": 0,
                "log_every": 1,
                "threads": 1,
                "device": "cpu",
                "optimizer": {"lr": 1e-2, "vlm_lr_scale": 1.0, "warmup": 1, "ema": 0.5},
            },
        ),
        say=quiet,
    )
    return out


def on_split(
    start: Path,
    split: dict[str, Path],
    out: Path,
    lora: LoraSpec | None = LORA,
    sources: tuple[str, ...] = (),
    **overrides: Any,
) -> Any:
    return finetune_config(
        start, sources, lora, {"cache": str(split["qwen3vl"]), "out": str(out), "steps": 4, **overrides}
    )


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(ck.resolve(run) / "model.safetensors")


def test_it_learns_what_the_live_tower_learns(
    recorded: dict[str, Path], stage_two: Path, split: dict[str, Path], tmp_path: Path
) -> None:
    """Four steps each way, resumed in between; then the policy sees pictures again."""
    masking = {"masking.images": 0.3, "holdout": 0.34, "eval_every": 2, "eval_batches": 2}
    config = on_split(stage_two, split, tmp_path / "split", dataclasses.replace(LORA, last_n_blocks=None), **masking)
    assert finetune(config, say=quiet, stop_after=2)[0].step == 2
    report, continuity = finetune(config, say=quiet)
    assert (
        report.step == 4
        and report.eval_mse is not None
        and continuity.jump < 1e-3
        and 0 < continuity.difference <= TOLERANCE["float16"]
    )
    lines = read_log(tmp_path / "split")  # the first says what was compared, also of a resumed run
    assert (lines[0]["switch/cached_loss"], lines[0]["switch/live_loss"]) == (
        continuity.cached_loss,
        continuity.live_loss,
    )
    assert not any("switch/live_loss" in line for line in lines[1:])
    live = finetune_config(
        stage_two, (str(recorded["h264"]),), LORA, {"out": str(tmp_path / "live"), "steps": 4, **masking}
    )
    assert finetune(live, say=quiet)[0].eval_mse == pytest.approx(report.eval_mse, rel=1e-2)
    start, ours, theirs = (tensors(run) for run in (stage_two, tmp_path / "split", tmp_path / "live"))
    adapter = [name for name in theirs if name.startswith("adapter.")]
    assert (
        ours.keys() == theirs.keys()
        and len(adapter) == 2 * (4 * BOUNDARY + 2)
        and not any("blocks.0." in name for name in adapter)
    )
    moved = torch.cat([(theirs[name] - start.get(name, torch.zeros(()))).flatten() for name in theirs])
    apart = torch.cat([(theirs[name] - ours[name]).flatten() for name in theirs])
    assert apart.norm() < 0.1 * moved.norm()
    assert all(ours[name].abs().max() > 0 for name in adapter)
    policies = [Policy.from_pretrained(tmp_path / way) for way in ("split", "live")]
    assert policies[0].encoder.spec.boundary is None
    again = load_encoder(adapted_spec(tmp_path / "split", boundary=1))  # what it learned lies in part below this one
    assert again.tokens == 16 and again.fingerprint()["adapter"] and again.fingerprint()["boundary"] == 1
    episode = sources_of(Cache.open(split["qwen3vl"]), (str(recorded["h264"]),))[0].load(1)
    images = {view.name: next(view.frames(2, 3)) for view in episode.views}
    chunks = [policy.act(images, episode.instruction, episode.state[2]) for policy in policies]
    np.testing.assert_allclose(chunks[0], chunks[1], atol=0.1 * float(np.abs(chunks[1]).max()))


def test_two_processes_learn_what_one_does(
    recorded: dict[str, Path], stage_two: Path, split: dict[str, Path], tmp_path: Path
) -> None:
    """On a split cache and live, with the doubled batch of one process."""
    ways = {
        "split": on_split(stage_two, split, tmp_path / "split"),
        "live": finetune_config(stage_two, (str(recorded["h264"]),), LORA, {"out": str(tmp_path / "live"), "steps": 4}),
    }
    jobs = []
    for config in ways.values():
        document = dataclasses.asdict(config)
        jobs.append({**document.pop("train"), "out": config.train.out + "-two", "batch_size": 2, "finetune": document})
    in_two_processes(jobs)
    for name, config in ways.items():
        answers = json.loads((tmp_path / f"{name}-two.report").read_text())
        assert [answer.get("step") for answer in answers] == [4, 4], answers
        finetune(config, say=quiet)
        ours, theirs = tensors(tmp_path / f"{name}-two"), tensors(tmp_path / name)
        assert ours.keys() == theirs.keys() and any(n.startswith("adapter.") for n in ours)
        start = tensors(stage_two)
        moved, apart = (
            torch.cat([(a[n] - b.get(n, torch.zeros(()))).flatten() for n in theirs])
            for a, b in ((theirs, start), (ours, theirs))
        )
        assert apart.norm() <= 1e-2 * moved.norm()  # of all together: Adam magnifies rounding where a gradient is tiny


def test_frozen_and_without_the_runs_own_cache(
    recorded: dict[str, Path], stage_two: Path, split: dict[str, Path], tmp_path: Path
) -> None:
    moved = shutil.copytree(stage_two, tmp_path / "two")
    settings = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(settings | {"cache": str(tmp_path / "gone")}))
    said: list[str] = []
    report, continuity = finetune(on_split(moved, split, tmp_path / "a", None, steps=1), say=said.append)
    assert report.step == 1 and continuity is None and any("was not compared" in line for line in said)
    _, continuity = finetune(
        on_split(moved, split, tmp_path / "b", sources=(str(recorded["h264"]),), steps=1), say=quiet
    )
    assert continuity is not None and continuity.jump < 1e-3 and 0 < continuity.difference <= TOLERANCE["float16"]


def test_refusals(
    recorded: dict[str, Path],
    checkpoints: dict[str, Path],
    stage_two: Path,
    split: dict[str, Path],
    tmp_path: Path,
    dvla: Dvla,
) -> None:
    with pytest.raises(
        UserError, match="LoRA is in the last 3 blocks; give at most 2, or .*--boundary 3: only the last 2 run"
    ):
        finetune(on_split(stage_two, split, tmp_path / "run", dataclasses.replace(LORA, last_n_blocks=3)), say=quiet)
    with pytest.raises(UserError, match="belongs to another VLM than .*vision_config"):
        finetune(on_split(stage_two, {"qwen3vl": split["paligemma2"]}, tmp_path / "run"), say=quiet)
    plain = tmp_path / "plain"
    build(configure(recorded["h264"], spec_of(checkpoints, boundary=BOUNDARY), plain))
    with pytest.raises(UserError, match="holds no augmented images"):
        finetune(on_split(stage_two, {"qwen3vl": plain}, tmp_path / "run", image_aug=True), say=quiet)
    refused(
        dvla("train", "--from-cache", plain, "--out", tmp_path / "run"),
        "holds no features but what enters the last 2 blocks",
        "without --boundary",
    )
    refused(dvla("train", "--from-cache", plain, "--dry-run"), "holds no features")
    assert not (tmp_path / "run").exists()
    model = ("--vlm", "tiny_qwen3vl", "--vlm-path", checkpoints["qwen3vl"], "--resolution", 64)
    refused(
        dvla("cache", "build", recorded["h264"], *model, "--boundary", 4, "--out", tmp_path / "c"),
        "--boundary 4",
        "1 to 3",
    )
    refused(
        dvla("cache", "build", recorded["h264"], *model, "--boundary", 1, "--tokens", 4, "--out", tmp_path / "c"),
        "leave out tokens",
    )
    refused(
        dvla(
            "cache",
            "plan",
            recorded["h264"],
            *model,
            "--boundary",
            1,
            "--train-samples-per-second",
            9,
            "--out",
            tmp_path / "c",
        ),
        "leave out --train-samples-per-second",
    )


def test_from_the_shell(
    recorded: dict[str, Path],
    checkpoints: dict[str, Path],
    stage_two: Path,
    split: dict[str, Path],
    tmp_path: Path,
    dvla: Dvla,
) -> None:
    model = (
        "--vlm",
        "tiny_qwen3vl",
        "--vlm-path",
        checkpoints["qwen3vl"],
        *shlex.split("--resolution 64 --device cpu --boundary 1"),
    )
    planned = dvla(
        "cache",
        "plan",
        recorded["h264"],
        *model,
        "--out",
        tmp_path / "cache",
        "--pilot",
        4,
        "--json",
        tmp_path / "plan.json",
    )
    assert planned.code == 0
    assert "each step runs 1 blocks of the VLM and the policy" in " ".join(planned.out.split())
    found = json.loads((tmp_path / "plan.json").read_text())
    assert dvla("cache", "build", recorded["h264"], *model, "--out", tmp_path / "cache").code == 0
    assert found["bytes_per_sample"] == 2 * 16 * 32 * 2  # two cameras
    assert abs(Cache.open(tmp_path / "cache").manifest["bytes"] - found["bytes"]) < 0.2 * found["bytes"]
    shown = dvla("cache", "inspect", tmp_path / "cache")
    assert shown.code == 0 and "features hidden, boundary 1" in " ".join(shown.out.split())
    done = dvla(
        "finetune", "--lora", stage_two, "--from-cache", tmp_path / "cache", "--steps", 1, "--out", tmp_path / "run"
    )
    assert done.code == 0, done
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["stage_three"]["lora"]["last_n_blocks"] == 1
