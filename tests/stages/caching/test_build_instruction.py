"""`--depth language` of Qwen3-VL end to end: each view is read with the instruction by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dvla.cache.loader.live import LiveFeatures
from dvla.cache.loader.loader import gather
from dvla.cache.loader.provenance import sources_of
from dvla.cache.readers import open_source
from dvla.cache.store.cache import Cache
from dvla.cache.vlm.load import load_encoder
from dvla.cache.vlm.spec import EncoderSpec
from dvla.cache.vlm.tiny_paligemma2 import TinyPaliGemmaSpec, make_tiny_paligemma2
from dvla.cache.vlm.tiny_qwen3vl import TinySpec, make_tiny_qwen3vl
from dvla.errors import UserError
from dvla.stages.caching.build import build
from dvla.stages.caching.config import BuildConfig
from dvla.stages.caching.upkeep.verify import verify
from dvla.stages.policy.graph import require_formats
from dvla.stages.training.config import TrainConfig
from dvla.stages.training.run_log import read_log
from dvla.stages.training.train import train
from support.cli_runner import Dvla, argv, refused
from support.corner import Corner, other_instruction
from support.lerobot_samples import LENGTHS, VIEWS
from support.tolerances import assert_same_features

FRAMES, V = sum(LENGTHS), len(VIEWS)
TINY = TinySpec(vision_depth=2, vision_width=32, vision_heads=2, out_width=64, text_layers=4)
LANGUAGE: dict[str, Any] = {"vlm": "qwen3vl", "resolution": 64, "dtype": "float32", "depth": "language"}


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3vl(tmp_path_factory.mktemp("vlm") / "tiny", TINY)


@pytest.fixture(scope="module")
def cache(recorded: dict[str, Path], vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("instruction") / "cache"
    build(BuildConfig((str(recorded["image"]),), EncoderSpec(str(vlm), **LANGUAGE), out, batch_size=4, device="cpu"))
    return out


def test_the_cache_holds_what_the_encoder_gives(recorded: dict[str, Path], cache: Path, vlm: Path) -> None:
    dataset, source = Cache.open(cache).datasets[0], open_source(str(recorded["image"]))
    encoder = load_encoder(EncoderSpec(str(vlm), **LANGUAGE))
    assert dataset.visible.tolist() == [encoder.visible(text) for text in dataset.instructions]
    assert dataset.null_visible == encoder.visible("") < dataset.visible.min() < dataset.tokens == 4 + 32
    for i, number in enumerate(source.episode_ids):
        episode, rows = source.load(number), dataset.episode_start[i] + np.arange(LENGTHS[i])
        for v, view in enumerate(dataset.views):
            live = encoder.encode_images(np.stack(list(episode.views[v].frames())), episode.instruction)
            assert_same_features(dataset.features(view, rows), live)
    problems, check = verify(cache, live=6, device="cpu")
    assert problems == [] and check is not None


def test_batches_mask_what_is_no_token(cache: Path, vlm: Path) -> None:
    opened, encoder = Cache.open(cache), load_encoder(EncoderSpec(str(vlm), **LANGUAGE))
    dataset, rows, hidden = opened.datasets[0], np.array([0, LENGTHS[0], 3]), np.array([False, False, True])
    none = np.zeros(3, bool)
    batch = gather(opened, none.astype(int), rows, 4, dropped=(none, hidden, none))
    count = dataset.visible[dataset.episode_instruction[dataset.episode_of(rows)]]
    wanted = np.arange(dataset.tokens) < np.where(hidden, dataset.null_visible, count)[:, None]  # [B,P]
    assert dataset.null_visible < count[0] and batch.token_mask.tolist() == np.tile(wanted, V).tolist()
    assert not batch.tokens[~batch.token_mask].any()
    with torch.inference_mode():
        live = LiveFeatures(encoder, opened, sources_of(opened))(
            gather(opened, none.astype(int), rows, 4, features=False, dropped=(none, hidden, none)), hidden
        )
    assert torch.equal(live.token_mask, batch.token_mask)
    assert_same_features(batch.tokens, live.tokens)
    samples = opened.dataset(horizon=4)
    assert torch.equal(samples[0]["token_mask"], batch.token_mask[0])


def test_another_instruction_costs_other_features(recorded: dict[str, Path], vlm: Path, tmp_path: Path) -> None:
    corner = Corner(tmp_path, recorded["image"], vlm, **LANGUAGE)
    corner.record(2).build()
    corner.record(2, other_instruction)
    report = corner.build("update")
    assert report.timing.images == V * LENGTHS[1] and report.adopted_shards == V  # the first of each view


def test_from_the_command_line_to_a_policy(dvla: Dvla, recorded: dict[str, Path], vlm: Path, tmp_path: Path) -> None:
    from dvla.stages.policy.policy import Policy

    source, out = recorded["image"], tmp_path / "cache"
    options = argv(f"{source} --vlm-path {vlm} --depth language --resolution 64 --device cpu --frame-stride 2")
    for given, words in (
        ("--layer 5", ("--layers 5", "1 to 4")),
        ("--layers two", ("--layers two", "16 or 8,16,24")),
        ("--layers 3,2", ("layers [3, 2]",)),
        ("--pool mean:3", ("--pool mean:3", "queries:64")),
        ("--prompt-tokens 7", ("tokens", "--prompt-tokens")),
    ):
        refused(dvla("cache", "build", *options, *argv(given), "--out", out), *words)
    refused(dvla("cache", "build", *argv(f"{source} --vlm-path {vlm} --keep all --out"), out), "keep", "depth language")
    assert not out.exists()
    more = argv("--layers 2,4 --tokens 1 --dtype int8")
    for step in (
        ("plan", *options, *more, "--out", out, "--pilot", 6),
        ("build", *options, *more, "--out", out),
        ("verify", out, "--live", 6),
    ):
        result = dvla("cache", *step)
        assert result.code == 0 and result.err == "", result
    refused(
        dvla("cache", "build", *options, *argv("--layers 2,3 --tokens 1 --dtype int8"), "--out", out),
        "encoder.layers[1]: cache has 4, you requested 3",
    )
    small = ("--set", "dit={width: 32, blocks: 1, heads: 2, horizon: 4}", *argv("--set eval_every=0"))
    small += ("--optimizer.warmup=1",)
    trained = dvla(*argv(f"train --from-cache {out} --out {tmp_path / 'run'} --recipe tiny --steps 3"), *small)
    assert trained.code == 0, trained
    net = json.loads((tmp_path / "run/checkpoints/step-00000003/policy.json").read_text())["net"]
    assert (net["layers"], net["layers_as"], net["feature_width"]) == (2, "width", 128)
    shares = read_log(tmp_path / "run")[-1]["layer_weights"]
    assert len(shares) == 2 and sum(shares) == pytest.approx(1) and shares[0] != shares[1]
    other = dvla("cache", "build", *options, *argv(f"--layers 2,3 --tokens 1 --dtype int8 --out {tmp_path / 'other'}"))
    assert other.code == 0, other
    refused(
        dvla(*argv(f"train --from-cache {tmp_path / 'other'} --out {tmp_path / 'again'} --init {tmp_path / 'run'}")),
        "layers[1]: the cache has 3, the policy saw 4",
    )
    policy = Policy.from_pretrained(tmp_path / "run")
    episode = open_source(str(source)).load(0)
    images = {view.name: next(view.frames(0, 1)) for view in episode.views}
    chunk = policy.act(images, episode.instruction, episode.state[0])
    assert chunk.shape[0] == 4 and np.isfinite(chunk).all()
    blind = Policy.from_pretrained(tmp_path / "run", blind=True)
    assert np.isfinite(blind.act(images, episode.instruction, episode.state[0])).all()
    with pytest.raises(UserError, match="prompt-tokens"):
        policy.act(images, "push the puck " * 20, episode.state[0])


@pytest.mark.parametrize(
    "settings",
    [
        {"vlm": "paligemma2", "depth": "language", "keep": "all", "layers": (1, 2), "tokens": 4, "prompt_tokens": 16},
        {"vlm": "paligemma2", "depth": "language", "layers": (1, 2), "layers_as": "tokens", "tokens": 4},
        {"vlm": "qwen3vl", "deepstack": True, "layers_as": "tokens", "tokens": 1},
    ],
)
def test_layers_through_a_cache_a_policy_and_an_export(
    recorded: dict[str, Path], vlm: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    from dvla.stages.policy.export import export_policy
    from dvla.stages.policy.policy import Policy

    folder, side = vlm, 64
    if settings["vlm"] == "paligemma2":
        folder, side = make_tiny_paligemma2(tmp_path / "vlm", TinyPaliGemmaSpec(image_size=56, vocabulary=600)), 56
    spec = EncoderSpec(str(folder), resolution=side, dtype="float32", **settings)
    source, out = str(recorded["image"]), tmp_path / "cache"
    build(BuildConfig((source,), spec, out, batch_size=8, device="cpu", frame_stride=2))
    problems, check = verify(out, live=4, device="cpu")
    assert problems == [] and check is not None
    dit = {"width": 32, "blocks": 1, "heads": 2, "horizon": 4}
    config = TrainConfig(
        str(out), str(tmp_path / "run"), steps=2, batch_size=4, model_size="tiny", dit=dit, eval_every=0, device="cpu"
    )
    train(config, say=print)
    policy = Policy.from_pretrained(tmp_path / "run", device="cpu")
    assert policy.net.config.layers == policy.encoder.parts > 1
    exported = export_policy(tmp_path / "run", tmp_path / "export", formats(), say=print)
    assert all(difference < 1e-3 for difference in exported.differences.values())
    episode = open_source(source).load(0)
    images = {view.name: next(view.frames(0, 1)) for view in episode.views}
    first, second = (
        p.act(images, episode.instruction, episode.state[0])
        for p in (policy, Policy.from_pretrained(tmp_path / "export", device="cpu"))
    )
    assert np.array_equal(first, second)


def formats() -> tuple[str, ...]:
    """The graphs whose libraries are here."""
    try:
        require_formats(["onnx"], "hybrid")
    except UserError:
        return ("torch-export",)
    return "torch-export", "onnx"
