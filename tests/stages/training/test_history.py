"""Training with earlier frames and states: resumed, continued live and on split caches, and refused where it cannot
be."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dvla.cache.actions.history import History, history_of
from dvla.cache.loader.live import LiveFeatures
from dvla.cache.loader.loader import gather
from dvla.cache.loader.provenance import sources_of
from dvla.cache.store.cache import Cache
from dvla.cache.vlm.load import load_encoder
from dvla.cache.vlm.spec import EncoderSpec, LoraSpec
from dvla.cache.vlm.tiny_qwen3vl import make_tiny_qwen3vl
from dvla.common.config import from_mapping
from dvla.common.documents import read_json
from dvla.errors import UserError
from dvla.stages.caching.build import build
from dvla.stages.caching.config import BuildConfig
from dvla.stages.caching.upkeep.verify import TOLERANCE
from dvla.stages.policy import checkpoint as ck
from dvla.stages.policy.document import read_document
from dvla.stages.policy.history import Past
from dvla.stages.policy.observation import Observation
from dvla.stages.policy.policy import Policy
from dvla.stages.training.config import TrainConfig, train_config
from dvla.stages.training.stage_three.finetune import finetune, finetune_config
from dvla.stages.training.stage_three.split import SplitFeatures
from dvla.stages.training.train import train
from support import synthetic_cache as synthetic
from support import vlm_samples
from support.cli_runner import Dvla, refused
from support.run_samples import EVALUATED

PAST = {"history": [0, -2, -5], "proprio_history": [0, -1]}
HISTORY = History((0, -2, -5), (0, -1))


def quiet(*_: Any) -> None:
    pass


def configure(cache: Path | str, out: Path, **changes: Any) -> TrainConfig:
    return from_mapping(TrainConfig, {"cache": str(cache), "out": str(out), **EVALUATED, **changes})


def tensors(run: Path) -> dict[str, torch.Tensor]:
    folder = ck.resolve(run)
    return {f"{p.name}/{n}": t for p in sorted(folder.rglob("*.safetensors")) for n, t in load_file(p).items()}


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("history") / "run"
    train(configure(cache, out, **PAST, panels={"every": 2, "share": 1.0}), say=quiet)
    return out


def test_a_resumed_run_is_the_uninterrupted_one(cache: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(configure(cache, out, **PAST), say=quiet, stop_after=2)
    train(configure(cache, out, **PAST, threads=2), say=quiet)
    first, second = tensors(run), tensors(out)
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    with pytest.raises(UserError, match=r"history\[2\]|history: run has"):
        train(configure(cache, out, **PAST | {"history": [0, -2, -6]}), say=quiet)


def test_the_policy_knows_its_history(cache: Path, run: Path, tmp_path: Path) -> None:
    document = read_document(ck.resolve(run))
    assert document["format"] == 3 and history_of(document) == HISTORY
    assert document["net"]["past_states"] == 1 and (run / "panels").is_dir()
    train(configure(cache, tmp_path / "plain", steps=2, eval_every=0), say=quiet)
    plain = read_document(ck.resolve(tmp_path / "plain"))
    assert {"history", "proprio_history"} & plain.keys() == set() and "past_states" not in plain["net"]
    assert plain["format"] == 2 and history_of(plain) == History()


def test_a_run_of_one_frame_is_the_run_without(cache: Path, tmp_path: Path) -> None:
    for name, past in (("a", {}), ("b", {"history": [0], "proprio_history": [0]})):
        train(configure(cache, tmp_path / name, steps=2, eval_every=0, **past), say=quiet)
    first, second = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_earlier_frames_change_what_is_learned(cache: Path, run: Path, tmp_path: Path) -> None:
    train(configure(cache, tmp_path / "plain"), say=quiet)
    assert losses(run) != losses(tmp_path / "plain")


def test_another_run_begins_with_its_weights_and_its_history(
    cache: Path, run: Path, tmp_path: Path, dvla: Dvla
) -> None:
    common = (
        "--from-cache",
        cache,
        "--init",
        run,
        "--steps",
        1,
        "--batch-size",
        4,
        "--eval-every",
        0,
        "--device",
        "cpu",
    )
    assert dvla("train", *common, "--out", tmp_path / "a").code == 0
    assert read_json(tmp_path / "a" / "config.json")["history"] == [0, -2, -5]
    other = dvla("train", *common, "--out", tmp_path / "b", "--history", "0,-1")
    assert other.code == 0 and "frames at offsets [0, -1] take the place of those the policy saw" in other.out
    refused(dvla("train", *common, "--out", tmp_path / "c", "--proprio-history", "0"), "past_states")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--history", "0,4"), "history[1] is 4; it must be at least -10000 and at most 0 (--history)"),
        (("--history", "0,-4,-4"), "history is 0,-4,-4; give at most 8 offsets"),
        (("--history", "-4"), "history is -4; give at most 8 offsets"),
        (("--history", "0;-4"), "history is '0;-4'; give offsets in frames"),
        (("--set", "proprio_history=[1]"), "proprio_history[0] is 1"),
        (("--set", "history=0.5"), "training settings.history: expected a list"),
        (("--history", ",".join(map(str, range(0, -9, -1)))), "at most 8 offsets"),
        (("--history", "0,-40"), "history reaches 40 frames back and the longest episode of"),
        (("--proprio-history", "0,-4000"), "proprio_history reaches 4000 frames back"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    cache: Path, tmp_path: Path, dvla: Dvla, options: tuple[str, ...], words: str
) -> None:
    refused(dvla("train", "--from-cache", cache, "--out", tmp_path / "run", *options), words)
    assert not (tmp_path / "run").exists()


def test_a_frame_stride_is_kept(tmp_path: Path, dvla: Dvla) -> None:
    synthetic.build(tmp_path / "cache", plan=synthetic.make_plan(frame_stride=3))
    refused(
        dvla("train", "--from-cache", tmp_path / "cache", "--out", tmp_path / "run", "--history", "0,-4"),
        "history reaches 4 frames back, and cache",
    )


def test_recipes_give_offsets_as_lists_or_text(tmp_path: Path) -> None:
    for text in ("history: [0, -4]", "history: 0,-4"):
        (tmp_path / "recipe.yaml").write_text(text + "\n")
        assert train_config(str(tmp_path / "recipe.yaml"), {"cache": "c", "out": "o"}).history == (0, -4)


# --- with a live VLM -------------------------------------------------------------------------------------------------

TINY: dict[str, Any] = {"resolution": 64, "dtype": "float32"}
SPECS: dict[str, dict[str, Any]] = {
    "plain": TINY,
    "split": {**TINY, "boundary": 1},
    "language": {**TINY, "depth": "language"},
}


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3vl(
        tmp_path_factory.mktemp("vlm") / "tiny", dataclasses.replace(vlm_samples.TINY, text_layers=2)
    )


@pytest.fixture(scope="module")
def caches(recorded: dict[str, Path], vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, made = tmp_path_factory.mktemp("caches"), {}
    for name, settings in SPECS.items():
        made[name], spec = folder / name, EncoderSpec(str(vlm), **settings)
        build(BuildConfig((str(recorded["h264"]),), spec, made[name], batch_size=8, shard_frames=32, device="cpu"))
    return made


@pytest.fixture(scope="module")
def stage_two(caches: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, made = tmp_path_factory.mktemp("two"), {}
    for name in ("plain", "language"):
        made[name] = folder / name
        train(configure(caches[name], made[name], **PAST, holdout=0.0, eval_every=0, steps=2), say=quiet)
    return made


def assert_close(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor) -> None:
    difference = (a.float() - b.float())[mask]
    assert difference.square().mean().sqrt() <= TOLERANCE["float16"] * a.float()[mask].square().mean().sqrt()


@pytest.mark.parametrize("kind", ["plain", "language"])
def test_live_features_are_the_cached_ones(
    caches: dict[str, Path], recorded: dict[str, Path], vlm: Path, kind: str
) -> None:
    """Also where images are dropped, where tokens after the instruction are none, and above a boundary."""
    encoder, cache = load_encoder(EncoderSpec(str(vlm), **SPECS[kind])), Cache.open(caches[kind])
    rows, ids, none = np.array([0, 1, 3, 9, 20]), np.zeros(5, np.int64), np.zeros(5, bool)
    dropped = np.array([False, False, True, False, True])
    how: dict[str, Any] = {"dropped": (none, dropped, none), "history": HISTORY}
    cached = gather(cache, ids, rows, 4, **how)
    with torch.inference_mode():
        given = gather(cache, ids, rows, 4, features=False, history=HISTORY)
        sources = sources_of(cache, (str(recorded["h264"]),))
        found = [LiveFeatures(encoder, cache, sources, history=HISTORY)(given, dropped)]
        if kind == "plain":
            split = Cache.open(caches["split"])
            found.append(SplitFeatures(encoder, split, HISTORY)(gather(split, ids, rows, 4, **how), dropped))
    frames = cached.token_mask.unflatten(1, (3, -1)).any(-1)
    assert frames.tolist() == [[True, False, False]] * 2 + [[True, True, False]] + [[True] * 3] * 2
    assert cached.token_mask[3:].all() == (kind == "plain")
    for other in found:
        for name in ("token_mask", "view_id", "frame_id", "past_proprio", "past_mask"):
            assert torch.equal(getattr(cached, name), getattr(other, name)), name
        assert_close(cached.tokens, other.tokens, cached.token_mask)
        assert not other.tokens[~cached.token_mask].any()


@pytest.mark.parametrize("kind", ["plain", "language"])
def test_a_policy_acts_on_what_it_was_trained_on(
    caches: dict[str, Path], stage_two: dict[str, Path], recorded: dict[str, Path], kind: str
) -> None:
    """Shown an episode step by step, its batch is the loader's."""
    policy, cache = Policy.from_pretrained(stage_two[kind], device="cpu"), Cache.open(caches[kind])
    (source,) = sources_of(cache, (str(recorded["h264"]),))
    live, table = LiveFeatures(policy.encoder, cache, [source]), cache.datasets[0]
    episode, past = source.load(int(table.episode_id[0])), Past(policy.history)
    for step in range(7):
        images = {view: live.frame(0, step, v) for v, view in enumerate(table.views)}
        seen = past.push(Observation(images, episode.instruction, episode.state[step], step=step))
        if step not in (0, 1, 4, 6):
            continue
        expected = gather(cache, np.array([0]), np.array([step]), 4, history=HISTORY)
        with torch.inference_mode():
            found = policy._batch([seen])
        for name in ("token_mask", "view_id", "frame_id", "past_mask"):
            assert torch.equal(getattr(expected, name), getattr(found, name)), (step, name)
        for name in ("proprio", "past_proprio"):
            torch.testing.assert_close(getattr(expected, name), getattr(found, name), atol=1e-6, rtol=0)
        assert_close(expected.tokens, found.tokens, expected.token_mask)


@pytest.mark.parametrize("kind", ["plain", "split"])
def test_fine_tuning_keeps_the_history(
    caches: dict[str, Path], stage_two: dict[str, Path], recorded: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """It starts at the loss where stage two ended, LoRA learns, and the policy it writes has the same history."""
    changes = {"out": str(tmp_path / "lora"), "steps": 4, "cache": str(caches[kind])}
    start = stage_two["plain"]
    config = finetune_config(start, (str(recorded["h264"]),), LoraSpec(r=2, alpha=4.0), changes)
    assert config.train.past == HISTORY
    report, continuity = finetune(config, say=quiet)
    assert report.step == 4 and continuity is not None and continuity.jump < 1e-3
    assert history_of(read_document(ck.resolve(tmp_path / "lora"))) == HISTORY
    for other in ("0", "0,-1"):
        with pytest.raises(UserError, match="history is .* whose history is .*: leave history out"):
            finetune_config(start, (), None, {**changes, "history": other})
    assert finetune_config(start, (), None, {**changes, "history": "0,-2,-5"}).train.past == HISTORY
