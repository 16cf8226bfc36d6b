"""Stages one and three on recordings and a real (tiny) Qwen3-VL: build, kill, resume, verify, fine-tune, act."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dvla.cache.loader.loader import gather
from dvla.cache.readers import open_source
from dvla.cache.store.cache import Cache
from dvla.cache.store.codec import channel_scale
from dvla.cache.store.feature_format import FeatureFormat
from dvla.cache.vlm.load import load_encoder
from dvla.cache.vlm.lora import add_lora, lora_parameters
from dvla.cache.vlm.spec import EncoderSpec, LoraSpec
from dvla.cache.vlm.tiny_qwen3vl import make_tiny_qwen3vl
from dvla.common.config import from_mapping
from dvla.errors import UserError
from dvla.stages.caching import build as build_module
from dvla.stages.caching import pipeline
from dvla.stages.caching.build import build
from dvla.stages.caching.config import BuildConfig
from dvla.stages.caching.upkeep import verify as verify_module
from dvla.stages.caching.upkeep.verify import TOLERANCE, verify
from dvla.stages.policy import checkpoint as ck
from dvla.stages.policy.policy import Policy
from dvla.stages.simulation.envs import Observation
from dvla.stages.training.config import TrainConfig
from dvla.stages.training.stage_three import finetune as finetune_module
from dvla.stages.training.stage_three.finetune import finetune, finetune_config
from dvla.stages.training.train import train
from support.cli_runner import Dvla
from support.corner import tree
from support.finetune_samples import caught_encoders
from support.lerobot_samples import LENGTHS, VIEWS, rewrite, the_file, with_column
from support.run_samples import TINY
from support.tolerances import assert_same_actions, assert_same_features

Recorded = dict[str, Path]  # kind of recording → folder
SHARD, FRAMES = 8, sum(LENGTHS)
LORA = LoraSpec(r=2, alpha=4.0)


def quiet(*_: Any) -> None:
    pass


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3vl(tmp_path_factory.mktemp("vlm") / "tiny", TINY)


def configure(source: Path, vlm: Path, out: Path, **changes: Any) -> BuildConfig:
    resolution = changes.pop("resolution", 64)
    spec = EncoderSpec(str(vlm), resolution=resolution, dtype="float32")
    return BuildConfig(
        **{
            "sources": (str(source),),
            "encoder": spec,
            "out": out,
            "batch_size": 5,
            "shard_frames": SHARD,
            "device": "cpu",
            **changes,
        }
    )


@pytest.fixture(scope="module")
def cache(recorded: Recorded, vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole cache of the h264 recording, built without a stop."""
    out = tmp_path_factory.mktemp("build") / "cache"
    shown: dict[str, list[tuple[int, int]]] = {}
    said: list[str] = []
    report = build(
        configure(recorded["h264"], vlm, out),
        lambda name, done, total: shown.setdefault(name, []).append((done, total)),
        said.append,
    )
    assert (report.frames, report.timing.images, report.quarantined) == (FRAMES, 2 * FRAMES, 0)
    assert said[0] == f"loading Qwen3-VL from {vlm}" and re.fullmatch(r"loaded 2 vision blocks: [\d.]+ KiB", said[1])
    assert len(said) == 2 and not report.complete_before
    cameras = [name for name in shown if name.endswith(": images")]
    assert len(cameras) == 2 and all(name.startswith("h264/") for name in cameras)
    for name in cameras:  # each camera counts its own images, and never backwards
        assert shown[name] == sorted(shown[name]) and shown[name][-1] == (FRAMES, FRAMES)
        assert {total for _, total in shown[name]} == {FRAMES}
    return out


# --- stage one ----------------------------------------------------------------------------------------------------


def test_the_cache_is_what_was_recorded(recorded: Recorded, vlm: Path, cache: Path) -> None:
    opened, source = Cache.open(cache), open_source(str(recorded["h264"]))
    dataset = opened.datasets[0]
    assert (opened.frames, opened.tokens, opened.width) == (FRAMES, 4, 32)
    assert dataset.episode_length.tolist() == list(LENGTHS) and dataset.views == tuple(VIEWS)
    encoder = load_encoder(EncoderSpec(str(vlm), resolution=64, dtype="float32"))
    for i, number in enumerate(source.episode_ids):
        episode, start = source.load(number), int(dataset.episode_start[i])
        rows = slice(start, start + episode.length)
        np.testing.assert_allclose(source.action_map.to_native(dataset.action[rows]), episode.action, atol=1e-6)
        np.testing.assert_allclose(source.state_map.to_native(dataset.proprio[rows]), episode.state, atol=1e-6)
        assert dataset.instructions[dataset.episode_instruction[i]] == episode.instruction
        for view in episode.views:
            live = encoder.encode_images(np.stack(list(view.frames()))).detach().numpy()
            stored = np.stack([dataset.feature(view.name, row) for row in range(rows.start, rows.stop)])
            assert_same_features(stored, live)


def test_verify_compares_with_the_live_encoder(cache: Path) -> None:
    problems, check = verify(cache, live=12, device="cpu")
    assert problems == [] and check.count == 12
    assert 0 < check.relative <= TOLERANCE["float16"] and check.scale > 0.01


def test_verify_sees_other_features_and_damage(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = shutil.copytree(cache, tmp_path / "cache")
    for view in VIEWS:
        for shard in copy.glob(f"*/features/{view}/c/*/0/0"):
            content = bytearray(shard.read_bytes())
            nbytes = min(SHARD, FRAMES - SHARD * int(shard.parts[-3])) * 256
            content[:nbytes] = content[256:nbytes] + content[:256]  # every frame shows its successor
            shard.write_bytes(content)
    problems, check = verify(copy, live=4, device="cpu")
    assert len(problems) == 2 * -(-FRAMES // SHARD) and all("altered" in line for line in problems) and check is None
    monkeypatch.setattr(verify_module, "verify_checksums", lambda *_: [])  # as if it had been built like that
    problems, check = verify(copy, live=12, device="cpu")
    assert check.relative > TOLERANCE["float16"] and "live features of 12 frames differ" in problems[0]


def test_verify_allows_what_storing_these_features_costs(
    recorded: Recorded, vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scales were measured where a channel was almost still: it uses up the range of the others."""
    still = np.where(np.arange(32) == 3, 0.03, 1.0).astype(np.float32)
    monkeypatch.setattr(build_module, "channel_scale", lambda features: channel_scale(features) * still)
    build(configure(recorded["image"], vlm, tmp_path / "cache", format=FeatureFormat("int8")))
    problems, check = verify(tmp_path / "cache", live=8, device="cpu")
    assert problems == [] and check is not None and check.relative > TOLERANCE["int8"]


def test_verify_allows_bfloat16_its_rounding_and_no_more(
    recorded: Recorded, vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bfloat16 encoder that sums otherwise, here one in float32, is fine; another normalization of images is not."""
    config = configure(recorded["image"], vlm, tmp_path / "cache")
    build(dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, dtype="bfloat16")))
    load = verify_module.load_encoder
    monkeypatch.setattr(
        verify_module, "load_encoder", lambda *args, **kwargs: load(*args, dtype=torch.float32, **kwargs)
    )
    problems, check = verify(tmp_path / "cache", live=8, device="cpu")
    assert problems == [] and check is not None and check.relative > TOLERANCE["float16"]

    def other_statistics(*args: Any, **kwargs: Any) -> Any:
        encoder = load(*args, **kwargs)
        encoder.image = dataclasses.replace(encoder.image, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
        return encoder

    monkeypatch.setattr(verify_module, "load_encoder", other_statistics)
    monkeypatch.setattr(verify_module, "require_encoder", lambda *_: None)
    problems, _ = verify(tmp_path / "cache", live=8, device="cpu")
    assert "live features of 8 frames differ" in problems[0] and "bfloat16" in problems[0]


def test_verify_refuses_another_vlm_or_source(recorded: Recorded, cache: Path, tmp_path: Path) -> None:
    other = make_tiny_qwen3vl(tmp_path / "other", dataclasses.replace(TINY, seed=1))
    with pytest.raises(UserError, match="belongs to another VLM than .*other: .*weights"):
        verify(cache, live=2, vlm_path=str(other), device="cpu")
    with pytest.raises(UserError, match="no source was given for dataset 'h264'"):
        verify(cache, live=2, sources=(str(recorded["hevc"]),), device="cpu")


def test_running_a_finished_build_again_changes_nothing(recorded: Recorded, vlm: Path, cache: Path) -> None:
    before = tree(cache)
    report = build(configure(recorded["h264"], vlm, cache))
    assert (report.timing.images, report.resumed_shards) == (0, 2 * -(-FRAMES // SHARD)) and tree(cache) == before
    assert report.complete_before


KILL_SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import peft, pyarrow.parquet, av, transformers.models.qwen3_vl.modeling_qwen3_vl
from transformers import AutoConfig, AutoTokenizer
from dvla.cache.vlm.spec import EncoderSpec
from dvla.stages.caching import build as build_module
from dvla.stages.caching.build import build
from dvla.stages.caching.config import BuildConfig

source, vlm, moments = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
for out, target, when in moments:
    pid = os.fork()
    if pid == 0:
        replace = os.replace
        def killing(a, b, *rest, **kw):
            hit = str(b).endswith(target)
            if hit and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            replace(a, b, *rest, **kw)
            if hit:
                os.kill(os.getpid(), signal.SIGKILL)
        os.replace = killing
        spec = EncoderSpec(vlm, resolution=64, dtype="float32")
        build(BuildConfig((source,), spec, Path(out), 5, 8, "cpu"))
        os._exit(0)
    print(os.WTERMSIG(os.waitpid(pid, 0)[1]))
"""


def test_killed_and_resumed_equals_uninterrupted(recorded: Recorded, vlm: Path, cache: Path, tmp_path: Path) -> None:
    moments = [
        (str(tmp_path / "tables"), "/proprio/zarr.json", "before"),  # among the tables
        (str(tmp_path / "shard"), "/features/front/c/2/0/0", "before"),  # a shard written, not renamed
        (str(tmp_path / "record"), "/features/wrist/c/1/0/0", "after"),  # renamed, not committed
        (str(tmp_path / "manifest"), "/manifest.json", "before"),
    ]  # all but the manifest
    done = subprocess.run(
        [sys.executable, "-c", KILL_SCRIPT, str(recorded["h264"]), str(vlm), json.dumps(moments)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.stdout.split() == [str(int(signal.SIGKILL))] * 4, done.stderr
    expected, shards = tree(cache), {"tables": 0, "shard": 2, "record": 6, "manifest": 10}
    for name, finished in shards.items():
        out = tmp_path / name
        with pytest.raises(UserError, match=rf"is incomplete \({finished} shards are finished\); rerun the same"):
            Cache.open(out)
        assert build(configure(recorded["h264"], vlm, out)).resumed_shards == finished
        assert tree(out) == expected


@pytest.mark.parametrize("late", [0, 2])
def test_corrupt_episodes_are_quarantined_and_nothing_else_is_lost(
    recorded: Recorded, copy_of: Any, vlm: Path, tmp_path: Path, late: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`late`: batches whose features are fetched later, as a GPU's are."""
    root = copy_of("image")
    monkeypatch.setitem(pipeline.LATE, "cpu", late)

    def change(table: Any) -> Any:
        pictures = table["observation.images.front"].to_pylist()
        pictures[15]["bytes"] = pictures[15]["bytes"][:60]  # frame 5 of episode 1: header intact, data cut
        actions = table["action"].to_pylist()
        actions[LENGTHS[0] + LENGTHS[1] + 3][1] = float("nan")  # in episode 2
        return with_column(with_column(table, "observation.images.front", pictures), "action", actions)

    rewrite(the_file(root, "data/*/*.parquet"), change)
    report = build(configure(root, vlm, tmp_path / "damaged", max_quarantine="2"))
    ledger = [json.loads(line) for line in (tmp_path / "damaged" / "quarantine.jsonl").read_text().splitlines()]
    assert report.quarantined == 2 and [(x["dataset"], x["episode_id"]) for x in ledger] == [("image", 1), ("image", 2)]
    assert "image 5 of 'observation.images.front'" in ledger[0]["reason"]
    assert "column 'action' is nan" in ledger[1]["reason"]

    monkeypatch.setitem(pipeline.LATE, "cpu", 0)
    build(configure(recorded["image"], vlm, tmp_path / "whole"))
    damaged, whole = (Cache.open(tmp_path / name).datasets[0] for name in ("damaged", "whole"))
    assert damaged.episode_id.tolist() == [0, 1] and damaged.quarantined.tolist() == [False, True]
    for row in range(LENGTHS[0]):  # the first episode: in the same batches, so the same bits
        for view in VIEWS:
            np.testing.assert_array_equal(damaged.feature(view, row), whole.feature(view, row))
    np.testing.assert_array_equal(damaged.action[: LENGTHS[0]], whole.action[: LENGTHS[0]])
    assert not damaged.feature("front", LENGTHS[0] + 5).any() and whole.feature("front", LENGTHS[0] + 5).any()
    with pytest.raises(ValueError, match="quarantined"):
        gather(Cache.open(tmp_path / "damaged"), [0], [LENGTHS[0] + 1], 4)
    problems, check = verify(tmp_path / "damaged", live=8, device="cpu")
    assert problems == [] and 0 < check.count < 8  # rows in quarantine are not compared


def test_a_dataset_without_a_usable_episode(copy_of: Any, vlm: Path, tmp_path: Path) -> None:
    root = copy_of("hevc")
    for video in root.glob("videos/*front*/*/*.mp4"):
        video.write_bytes(b"")
    with pytest.raises(UserError, match="has no usable episode .*run on a complete copy"):
        build(configure(root, vlm, tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_a_build_that_lost_every_episode_says_so_first(copy_of: Any, vlm: Path, tmp_path: Path, dvla: Dvla) -> None:
    """Their rows and headers are intact: what is damaged shows only when the images are decoded."""

    def cut(table: Any) -> Any:
        pictures = table["observation.images.front"].to_pylist()
        return with_column(table, "observation.images.front", [{**p, "bytes": p["bytes"][:60]} for p in pictures])

    rewrite(the_file(copy_of("image"), "data/*/*.parquet"), cut)
    where = ("--vlm", "tiny_qwen3vl", "--vlm-path", vlm, "--device", "cpu", "--out", tmp_path / "cache")
    for _ in range(2):  # a second time it is complete, and still without anything
        done = dvla("cache", "build", tmp_path / "image", *where, "--allow-quarantine")
        lines = [line for line in done.out.splitlines() if not line.startswith(("loading ", "loaded ", "image/"))]
        assert done.code == 1 and lines[0].startswith("no episode of image could be read"), done
        assert not any(line.startswith("next:") for line in lines) and "quarantine.jsonl" in done.out


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"resolution": 96}, "resolution: cache has 64, you requested 96"),
        ({"shard_frames": 4}, "shard_frames: cache has 8, you requested 4"),
        ({"batch_size": 6}, "batch_size: cache has 5, you requested 6"),
    ],
)
def test_other_settings_are_refused(
    recorded: Recorded, vlm: Path, cache: Path, changes: dict[str, Any], field: str
) -> None:
    before = tree(cache)
    with pytest.raises(UserError, match=f"built from other settings: .*{field}"):
        build(configure(recorded["h264"], vlm, cache, **changes))
    assert tree(cache) == before


def test_two_sources_of_one_name_are_refused(recorded: Recorded, copy_of: Any, vlm: Path, tmp_path: Path) -> None:
    sources = (str(recorded["h264"]), str(copy_of("h264")))
    with pytest.raises(UserError, match="two sources are named 'h264'; rename one"):
        build(configure(recorded["h264"], vlm, tmp_path / "cache", sources=sources))
    assert not (tmp_path / "cache").exists()


def test_features_beyond_float16_are_refused(recorded: Recorded, vlm: Path, tmp_path: Path) -> None:
    loud = shutil.copytree(vlm, tmp_path / "loud")
    name = "model.visual.merger.linear_fc2.weight"
    file = loud / json.loads((loud / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name] * 1e7}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="which float16 cannot hold; check the weights"):
        build(configure(recorded["h264"], loud, tmp_path / "cache"))
    with pytest.raises(UserError, match="is incomplete"):
        Cache.open(tmp_path / "cache")


def test_real_robot_recordings_go_the_whole_way(shared_dir: Path, vlm: Path, tmp_path: Path) -> None:
    """LeRobot v2.1 with AV1 video of a Unitree G1; 5 of the 100 listed episodes are present."""
    source = str(shared_dir / "data" / "unitree_g1_inspire_v21")
    report = build(
        configure(Path(source), vlm, tmp_path / "cache", batch_size=64, shard_frames=1024, max_quarantine="95%")
    )
    assert report.quarantined == 95 and report.timing.images == report.frames > 1000
    problems, check = verify(tmp_path / "cache", live=4, device="cpu")
    assert not problems and check is not None and check.relative < TOLERANCE["float16"]
    settings = {
        "cache": str(tmp_path / "cache"),
        "out": str(tmp_path / "run"),
        "model_size": "tiny",
        "steps": 2,
        "batch_size": 4,
        "draws": 2,
        "eval_every": 0,
        "dit": {"width": 32, "blocks": 1, "heads": 2, "horizon": 4},
        "device": "cpu",
    }
    assert train(from_mapping(TrainConfig, settings), say=lambda _: None).step == 2
    config = finetune_config(tmp_path / "run", (source,), LoraSpec(r=2), {"out": str(tmp_path / "lora"), "steps": 1})
    done, continuity = finetune(config, say=lambda _: None)
    assert done.step == 1 and continuity.jump < 1e-3
    chunk = Policy.from_pretrained(tmp_path / "lora").act(
        {"cam_high": np.zeros((480, 640, 3), np.uint8)}, "pick", np.zeros(26, np.float32)
    )
    assert chunk.shape == (4, 26) and np.isfinite(chunk).all()


# --- stage three --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stage_two(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two") / "run"
    train(
        from_mapping(
            TrainConfig,
            {
                "cache": str(cache),
                "out": str(out),
                "model_size": "tiny",
                "dit": {"width": 32, "blocks": 1, "heads": 2, "horizon": 4},
                "steps": 3,
                "batch_size": 4,
                "draws": 2,
                "holdout": 0.0,
                "eval_every": 0,
                "save_every": 2,
                "log_every": 1,
                "threads": 1,
                "device": "cpu",
                "optimizer": {"lr": 1e-2, "vlm_lr_scale": 1.0, "warmup": 1, "ema": 0.5},
            },
        ),
        say=quiet,
    )
    return out


@dataclasses.dataclass
class StageThree:
    run: Path
    continuity: Any
    encoder: Any  # as training left it
    said: list[str]


@pytest.fixture(scope="module")
def stage_three(recorded: Recorded, stage_two: Path, tmp_path_factory: pytest.TempPathFactory) -> StageThree:
    """Four steps with LoRA without a stop."""
    out, said = tmp_path_factory.mktemp("three") / "run", []
    with caught_encoders() as encoders:
        report, continuity = finetune(again(recorded, stage_two, out), say=said.append)
    assert report.step == 4
    return StageThree(out, continuity, encoders[0], said)


def again(recorded: Recorded, start: Path, out: Path, lora: LoraSpec | None = LORA, **overrides: Any) -> Any:
    return finetune_config(start, (str(recorded["h264"]),), lora, {"out": str(out), "steps": 4, **overrides})


def all_tensors(run: Path) -> dict[str, torch.Tensor]:
    return {
        f"{p.relative_to(ck.resolve(run))}/{n}": t
        for p in sorted(ck.resolve(run).rglob("*.safetensors"))
        for n, t in load_file(p).items()
    }


def observation(recorded: Recorded, step: int = 2) -> Observation:
    episode = open_source(str(recorded["h264"])).load(1)
    images = {view.name: next(view.frames(step, step + 1)) for view in episode.views}
    return Observation(images, episode.instruction, episode.state[step])


def test_fine_tuning_starts_at_the_same_loss(stage_three: StageThree) -> None:
    c = stage_three.continuity
    assert c.jump < 1e-3 and 0 < c.difference <= TOLERANCE["float16"] and 0 < c.feature_error < 2e-2 * c.feature_scale
    assert c.cached_loss > 0 and "loss on one batch before the first step" in stage_three.said[0]


def test_lora_learns_and_the_base_does_not(vlm: Path, stage_three: StageThree) -> None:
    stored = load_file(ck.resolve(stage_three.run) / "model.safetensors")
    adapter = {n: t for n, t in stored.items() if n.startswith("adapter.")}
    assert len(adapter) == 2 * 2 * TINY.vision_depth and all("lora_" in n for n in adapter)
    assert all(t.abs().max() > 0 for t in adapter.values())  # B began at zero
    tower = stage_three.encoder.vision
    trained = {n for n, p in tower.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in lora_parameters(stage_three.encoder)}
    base = {n.replace(".base_layer", ""): t for n, t in tower.state_dict().items() if "lora_" not in n}
    fresh = load_encoder(EncoderSpec(str(vlm), resolution=64, dtype="float32")).vision.state_dict()
    assert base.keys() == fresh.keys() and all(torch.equal(base[n], fresh[n]) for n in fresh)


def test_fine_tuning_resumes_exactly(
    recorded: Recorded, stage_two: Path, stage_three: StageThree, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    config = again(recorded, stage_two, out)
    assert finetune(config, say=quiet, stop_after=2)[0].step == 2
    assert finetune(config, say=quiet)[0].step == 4
    first, second = all_tensors(out), all_tensors(stage_three.run)
    assert first.keys() == second.keys() and any(n.startswith("adapter/") for n in first)
    assert [n for n in first if not torch.equal(first[n], second[n])] == []


@pytest.mark.parametrize("lora, field", [(LoraSpec(r=4, alpha=4.0), "stage_three.lora.r"), (None, "stage_three.lora")])
def test_another_adapter_is_refused(
    recorded: Recorded, stage_two: Path, stage_three: StageThree, lora: LoraSpec | None, field: str
) -> None:
    with pytest.raises(UserError, match=f"has other settings: {field}"):
        finetune(again(recorded, stage_two, stage_three.run, lora), say=quiet)


def test_fine_tuning_does_not_start_from_what_it_cannot(
    recorded: Recorded, cache: Path, stage_two: Path, stage_three: StageThree, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="is a stage-three run; start from its stage-two run"):
        again(recorded, stage_three.run, tmp_path / "run")
    with pytest.raises(UserError, match="no source was given for dataset 'h264'"):
        config = again(recorded, stage_two, tmp_path / "run")
        finetune(dataclasses.replace(config, sources=(str(recorded["hevc"]),)), say=quiet)
    blind = dataclasses.replace(again(recorded, stage_two, tmp_path / "blind").train, blind=True, steps=1)
    train(blind, say=quiet)
    with pytest.raises(UserError, match="is a blind policy"):
        finetune(again(recorded, tmp_path / "blind", tmp_path / "run"), say=quiet)
    assert not (tmp_path / "run").exists()


def test_a_jump_of_the_loss_stops_before_training(
    recorded: Recorded, stage_two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = finetune_module.load_policy_encoder

    def wrong(*arguments: Any) -> Any:
        encoder = load(*arguments)
        encode = encoder.encode_images
        monkeypatch.setattr(encoder, "encode_images", lambda *given: 0.8 * encode(*given))
        return encoder

    monkeypatch.setattr(finetune_module, "load_policy_encoder", wrong)
    with pytest.raises(UserError, match="the loss would jump from .* features differ by 0.2 of their RMS"):
        finetune(again(recorded, stage_two, tmp_path / "run"), say=quiet)
    assert not (tmp_path / "run").exists()


# --- the policy ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["two", "three"])
def test_policy_acts_the_same_after_loading(
    recorded: Recorded, stage_two: Path, stage_three: StageThree, tmp_path: Path, stage: str
) -> None:
    run, seen = stage_two if stage == "two" else stage_three.run, observation(recorded)
    first = Policy.from_pretrained(run).act(seen.images, seen.instruction, seen.state)
    assert first.shape == (4, 4) and first.dtype == np.float32 and np.isfinite(first).all()
    copy = shutil.copytree(ck.resolve(run), tmp_path / "policy")
    np.testing.assert_array_equal(Policy.from_pretrained(copy).act(seen.images, seen.instruction, seen.state), first)
    blind = Policy.from_pretrained(run, blind=True).act({}, seen.instruction, seen.state)
    assert blind.shape == first.shape and not np.array_equal(blind, first)
    other = observation(recorded, 9)
    both = Policy.from_pretrained(run).act_batch([other, seen])
    assert_same_actions(both[1], first)
    with pytest.raises(AssertionError, match="of their spread"):
        assert_same_actions(both[0], both[1])


def test_the_saved_adapter_is_the_averaged_one(recorded: Recorded, vlm: Path, stage_three: StageThree) -> None:
    """A policy assembled by hand from `ema.safetensors` acts as the loaded one; without the adapter it does not."""
    loaded, seen = Policy.from_pretrained(stage_three.run), observation(recorded)
    bare = load_encoder(EncoderSpec(str(vlm), resolution=64, dtype="float32"))
    without = Policy(loaded.net, bare, loaded.robot).act_batch([seen])
    encoder = load_encoder(EncoderSpec(str(vlm), resolution=64, dtype="float32"))
    add_lora(encoder, LORA)
    average = load_file(ck.resolve(stage_three.run) / "ema.safetensors")
    with torch.no_grad():
        for name, parameter in lora_parameters(encoder):
            parameter.copy_(average[f"adapter.{name}"])
    by_hand = Policy(loaded.net, encoder, loaded.robot).act_batch([seen])
    np.testing.assert_array_equal(by_hand, loaded.act_batch([seen]))
    assert not np.array_equal(without, by_hand)


def test_the_policy_sees_what_training_saw(recorded: Recorded, cache: Path, stage_two: Path) -> None:
    """The batch of one recorded frame at inference equals the loader's, but for actions that are not known then."""
    policy, step = Policy.from_pretrained(stage_two), 2
    live = policy._batch([observation(recorded, step)])
    cached = gather(Cache.open(cache), [0], [LENGTHS[0] + step], 4)
    for name in ("token_mask", "view_id", "frame_id", "action_mask", "step_mask", "embodiment", "control_hz"):
        assert torch.equal(getattr(live, name), getattr(cached, name)), name
    assert_same_features(live.tokens, cached.tokens)
    torch.testing.assert_close(live.proprio, cached.proprio)
    words = int(cached.text_mask.sum())
    assert int(live.text_mask.sum()) == words
    torch.testing.assert_close(live.text[:, :words], cached.text[:, :words].float())


def test_policy_refusals(recorded: Recorded, stage_two: Path, tmp_path: Path) -> None:
    seen = observation(recorded)
    with pytest.raises(UserError, match="unknown view 'front'"):
        Policy.from_pretrained(stage_two).act({"wrist": seen.images["wrist"]}, seen.instruction, seen.state)
    with pytest.raises(UserError, match="no run or checkpoint at"):
        Policy.from_pretrained(tmp_path / "none")
    with pytest.raises(UserError, match="unknown dataset of this policy 'h265'; did you mean 'h264'"):
        Policy.from_pretrained(stage_two, dataset="h265")
    other = make_tiny_qwen3vl(tmp_path / "other", dataclasses.replace(TINY, seed=1))
    with pytest.raises(UserError, match="belongs to another VLM than .*weights"):
        Policy.from_pretrained(stage_two, vlm_path=str(other))
    damaged = shutil.copytree(ck.resolve(stage_two), tmp_path / "damaged")
    (damaged / "ema.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="ema.safetensors is damaged"):
        Policy.from_pretrained(damaged)
