"""`--depth language` end to end: one pass of PaliGemma 2 encodes all views of an observation and its instruction."""

from __future__ import annotations

import functools
import json
import shutil
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
from dvla.cache.store.checksums import verify_checksums
from dvla.cache.store.feature_format import FeatureFormat
from dvla.cache.store.plan import BuildPlan, ShardTask, Unit, units
from dvla.cache.vlm.load import load_encoder
from dvla.cache.vlm.observations import encode_observations, encoder_calls
from dvla.cache.vlm.paligemma2.encoder import PaliGemma2Encoder
from dvla.cache.vlm.spec import EncoderSpec
from dvla.cache.vlm.tiny_paligemma2 import TinyPaliGemmaSpec, make_tiny_paligemma2
from dvla.errors import UserError
from dvla.stages.caching.build import BuildReport, build
from dvla.stages.caching.config import BuildConfig, PilotConfig
from dvla.stages.caching.planning.pilot import plan_build
from dvla.stages.caching.upkeep.repair import repair
from dvla.stages.caching.upkeep.verify import TOLERANCE, verify
from dvla.stages.policy import checkpoint as ck
from dvla.stages.simulation.envs import Observation
from support.cli_runner import Dvla, argv, refused
from support.corner import SHARD, Corner, other_instruction, other_pictures, tree
from support.lerobot_samples import LENGTHS, TASKS, VIEWS, rewrite, the_file, with_column
from support.tolerances import assert_same_actions, assert_same_features

FRAMES, V = sum(LENGTHS), len(VIEWS)
TINY = TinyPaliGemmaSpec(
    vision_depth=1, vision_width=32, vision_heads=2, image_size=56, out_width=64, text_layers=1, vocabulary=600
)
LANGUAGE: dict[str, Any] = {"vlm": "paligemma2", "resolution": 56, "tokens": 4, "dtype": "float32", "depth": "language"}


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_paligemma2(tmp_path_factory.mktemp("vlm") / "tiny", TINY)


def configure(source: Path, vlm: Path, out: Path, **changes: Any) -> BuildConfig:
    """Batches of three observations, shards of eight, and a variant of every picture."""
    settings = {"batch_size": 3 * V, "shard_frames": SHARD, "device": "cpu", "augment": 1, **changes}
    return BuildConfig((str(source),), EncoderSpec(str(vlm), **LANGUAGE), out, **settings)


@pytest.fixture(scope="module")
def cache(recorded: dict[str, Path], vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("language") / "cache"
    report = build(configure(recorded["image"], vlm, out))
    assert (report.timing.images, report.quarantined) == (2 * V * FRAMES, 0)  # each picture and its variant once
    return out


@pytest.fixture
def encoder(vlm: Path) -> Any:
    return load_encoder(EncoderSpec(str(vlm), **LANGUAGE))


@pytest.fixture
def corner(recorded: dict[str, Path], vlm: Path, tmp_path: Path) -> Corner:
    return Corner(tmp_path, recorded["image"], vlm, **LANGUAGE)


def observation(source: Path, number: int, frame: int) -> Observation:
    episode = open_source(str(source)).load(number)
    return Observation(
        {v.name: next(v.frames(frame, frame + 1)) for v in episode.views}, episode.instruction, episode.state[frame]
    )


# --- the cache --------------------------------------------------------------------------------------------------------


def test_the_cache_holds_what_the_encoder_gives(recorded: dict[str, Path], cache: Path, encoder: Any) -> None:
    dataset, source = Cache.open(cache).datasets[0], open_source(str(recorded["image"]))
    assert dataset.views == tuple(VIEWS) and len(dataset.instructions) == len(set(TASKS)) == 2
    for i, number in enumerate(source.episode_ids):
        episode, rows = source.load(number), dataset.episode_start[i] + np.arange(LENGTHS[i])
        views = [np.stack(list(view.frames())) for view in episode.views]  # of two sizes
        live = encoder.encode_observation(views, episode.instruction)  # [T,V,K,D]
        other = encoder.encode_observation(views, "something else")
        assert live.shape == (LENGTHS[i], V, 4, 64) and (live - other).abs().amax((0, 2, 3)).min() > 0.05
        for v, view in enumerate(dataset.views):
            assert_same_features(dataset.features(view, rows), live[:, v])
    black = [np.zeros((1, *size, 3), np.uint8) for size in VIEWS.values()]
    assert_same_features(dataset.null_features, encoder.encode_observation(black, "")[0])
    assert not np.array_equal(*dataset.null_features)  # each view's own: their places in the prompt differ


def test_a_unit_of_work_is_all_views_of_the_same_observations(cache: Path) -> None:
    plan = BuildPlan.from_document(Cache.open(cache).fingerprint["store"])
    together, apart = (units(plan.tasks(), by_observation=b) for b in (True, False))
    assert [t for u in together for t in u.tasks if u.tasks[0].view == "front" == t.view] == [
        t for t in plan.tasks() if t.view == "front"
    ]
    assert all(
        [t.view for t in u.tasks] == list(VIEWS) and len({(t.variant, t.index, t.start, t.stop) for t in u.tasks}) == 1
        for u in together
    )
    assert [u.tasks for u in apart] == [(t,) for t in plan.tasks()] and V * len(together) == len(apart)
    assert sum(u.records for u in together) == sum(u.records for u in apart) == 2 * V * FRAMES
    two = Unit((ShardTask("d", "a", 0, 0, 8, 1), ShardTask("d", "b", 0, 0, 8, 1)))
    assert (two.name, two.dataset, two.records) == ("d/a.aug1+b.aug1", "d", 16)


def without(cache: Path, folder: Path, *arrays: str) -> Path:
    """A copy that was stopped before shard 1 of these arrays was committed."""
    out = shutil.copytree(cache, folder)
    (out / "manifest.json").unlink()
    for array in arrays:
        shutil.rmtree(out / f"image/features/{array}/c/1")
        (out / f".commits/image/{array}/1.json").unlink()
    return out


def test_only_the_missing_shard_of_a_unit_is_written(
    recorded: dict[str, Path], vlm: Path, cache: Path, tmp_path: Path
) -> None:
    out = without(cache, tmp_path / "cache", "wrist", "front.aug1", "wrist.aug1")
    there = out / "image/features/front/c/1/0/0"
    before = there.stat()
    report = build(configure(recorded["image"], vlm, out))
    assert (
        report.timing.images == 2 * V * SHARD
    )  # whole observations, for one shard of them and for two of their variants
    assert (there.stat().st_mtime_ns, there.stat().st_ino) == (before.st_mtime_ns, before.st_ino) and tree(out) == tree(
        cache
    )


def test_a_unit_that_fails_commits_nothing_half(
    recorded: dict[str, Path], vlm: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third batch of the whole build cannot be encoded, so neither view's shard is there, nor a remainder of it."""
    encode, calls = PaliGemma2Encoder.encode_observation, 0

    def failing(self: Any, views: Any, instruction: str) -> torch.Tensor:
        nonlocal calls
        calls += len(views[0]) == 3
        return encode(self, views, instruction) * (float("inf") if calls == 2 else 1)

    monkeypatch.setattr(PaliGemma2Encoder, "encode_observation", failing)
    with pytest.raises(UserError, match=r"image/front\+wrist: the encoder returned inf"):
        build(configure(recorded["image"], vlm, tmp_path / "cache"))
    assert not list((tmp_path / "cache").glob("**/.*.tmp-*")) and not list(
        (tmp_path / "cache").glob(".commits/image/*/*.json")
    )
    monkeypatch.undo()
    build(configure(recorded["image"], vlm, tmp_path / "cache"))
    assert tree(tmp_path / "cache") == tree(cache)


def test_one_broken_camera_takes_the_observation_out(copy_of: Any, vlm: Path, cache: Path, tmp_path: Path) -> None:
    root = copy_of("image")

    def cut(table: Any) -> Any:
        pictures = table["observation.images.wrist"].to_pylist()
        pictures[LENGTHS[0] + 7]["bytes"] = pictures[LENGTHS[0] + 7]["bytes"][
            :60
        ]  # frame 7 of episode 1: header intact
        return with_column(table, "observation.images.wrist", pictures)

    rewrite(the_file(root, "data/*/*.parquet"), cut)
    report = build(configure(root, vlm, tmp_path / "cache", max_quarantine="1"))
    ledger = [json.loads(line) for line in (tmp_path / "cache/quarantine.jsonl").read_text().splitlines()]
    assert (
        report.quarantined == 1
        and [x["episode_id"] for x in ledger] == [1]
        and "image 7 of 'observation.images.wrist'" in ledger[0]["reason"]
    )
    damaged, whole = (Cache.open(p).datasets[0] for p in (tmp_path / "cache", cache))
    # shard 1 ends before episode 1's frame 6; in shard 2 the batch of frames 6 to 8 cannot be made, nor what follows
    lost, kept = LENGTHS[0] + np.arange(6, LENGTHS[1]), np.r_[0 : LENGTHS[0] + 6, LENGTHS[0] + LENGTHS[1] : FRAMES]
    for view in VIEWS:
        for variant in (0, 1):
            assert (
                not damaged.features(view, lost, variant).any()
                and whole.features(view, lost, variant).any(axis=(1, 2)).all()
            )
            np.testing.assert_array_equal(damaged.features(view, kept, variant), whole.features(view, kept, variant))
    with pytest.raises(ValueError, match="quarantined"):
        gather(Cache.open(tmp_path / "cache"), [0], [LENGTHS[0] + 1], 4)
    problems, check = verify(tmp_path / "cache", live=8, device="cpu")
    assert problems == [] and 0 < check.count < 8


def test_too_many_tokens_are_refused_before_anything_is_written(
    recorded: dict[str, Path], vlm: Path, tmp_path: Path
) -> None:
    small = shutil.copytree(vlm, tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 34  # two views of 16 and a prompt
    (small / "config.json").write_text(json.dumps(config))
    for call in (build, functools.partial(plan_build, pilot=PilotConfig(images=4))):
        with pytest.raises(
            UserError,
            match="32 image tokens and a prompt of .* are more than the 34 tokens of this language model's context",
        ):
            call(configure(recorded["image"], small, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# --- what changed -----------------------------------------------------------------------------------------------------


def counted(report: BuildReport) -> tuple[int, int, int]:
    """Pictures encoded, pictures copied, shards taken whole."""
    return report.timing.images, report.timing.reused, report.adopted_shards


def test_an_instruction_redoes_its_episode_and_nothing_else(corner: Corner) -> None:
    corner.record(3).build()
    report = corner.record(3, other_instruction).build("update")
    before, after = (
        LENGTHS[0] // SHARD * SHARD,
        FRAMES - LENGTHS[1],
    )  # rows in shards before episode 1; rows of the other episodes
    assert counted(report) == (V * LENGTHS[1], V * (after - before), V * LENGTHS[0] // SHARD)
    old, new = (Cache.open(p).datasets[0] for p in (report.previous, corner.out))
    rows = LENGTHS[0] + np.arange(LENGTHS[1])
    for view in VIEWS:
        a, b = old.features(view, np.arange(FRAMES)), new.features(view, np.arange(FRAMES))
        np.testing.assert_array_equal(np.delete(a, rows, 0), np.delete(b, rows, 0))
        assert (a[rows] != b[rows]).any(axis=(1, 2)).all()
    corner.build(out=corner.folder / "fresh")
    for view in VIEWS:
        assert_same_features(
            new.features(view, rows), Cache.open(corner.folder / "fresh").datasets[0].features(view, rows)
        )


def test_at_depth_vision_an_instruction_redoes_no_picture(corner: Corner) -> None:
    corner.encoder["depth"] = "vision"
    corner.record(2).build()
    shards = V * -(-sum(LENGTHS[:2]) // SHARD)
    assert counted(corner.record(2, other_instruction).build("update")) == (0, 0, shards)


def test_a_picture_redoes_all_views_of_its_episode(corner: Corner) -> None:
    corner.record(2).build()
    assert corner.record(2, other_pictures("wrist", 1)).build("update").timing.images == V * LENGTHS[1]
    corner.record(2, lambda root: (other_pictures("wrist", 1)(root), other_instruction(root)))
    with pytest.raises(UserError, match="--append adds new episodes only, but episode 1 of data changed or is gone"):
        corner.build("append")
    report = corner.build("update", views=("wrist",))  # seen alone, its features are others
    assert counted(report) == (sum(LENGTHS[:2]), 0, 0) and Cache.open(corner.out).datasets[0].views == ("wrist",)


@pytest.mark.parametrize("changes", [{}, {"format": FeatureFormat("int8"), "frame_stride": 3, "augment": 1}])
def test_append_encodes_new_episodes_as_the_plan_said(corner: Corner, changes: dict[str, Any]) -> None:
    corner.record(2).build(**changes)
    corner.record(3)
    config = corner.config("append", **changes)
    planned = plan_build(config, PilotConfig(images=8))
    shares = {share.kind: share for share in planned.shares}
    report = corner.build("append", **changes)
    versions, rows = 1 + changes.get("augment", 0), [-(-n // changes.get("frame_stride", 1)) for n in LENGTHS]
    record = planned.bytes_per_sample // V
    assert (
        shares["new"].pictures == planned.pictures == report.timing.images == versions * V * rows[2]
        and shares["again"].pictures == 0
    )
    assert (
        shares["copied"].pictures == report.timing.reused
        and shares["adopted"].pictures == SHARD * report.adopted_shards
    )
    assert all(share.bytes == share.pictures * record for share in planned.shares)
    assert shares["new"].hours > shares["copied"].hours > shares["adopted"].hours == 0 == shares["again"].hours
    assert (
        planned.bytes_to_write == planned.bytes - shares["adopted"].bytes
        and planned.fits
        and verify_checksums(corner.out) == []
    )
    problems, check = verify(corner.out, live=6, device="cpu")
    assert problems == [] and check.relative <= (3e-2 if changes else TOLERANCE["float16"])
    again = plan_build(config, PilotConfig(images=4))
    assert again.pictures == 0 and {s.kind: s.pictures for s in again.shares}["adopted"] == versions * V * sum(rows)


def test_repair_makes_one_view_of_a_unit_again(recorded: dict[str, Path], cache: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(cache, tmp_path / "cache")
    for name in ("wrist.aug1/c/2", "front/c/0"):
        shard = copy / f"image/features/{name}/0/0"
        shard.write_bytes(shard.read_bytes()[:-3] + b"abc")
    report = repair(copy, device="cpu", say=lambda _: None)
    assert (report.shards, report.other_bytes) == (2, ()) and tree(copy) == tree(cache)


# --- live -------------------------------------------------------------------------------------------------------------


def test_live_features_are_the_cached_ones_whatever_is_mixed(cache: Path, encoder: Any) -> None:
    """Both instructions, pictures and variants, masked text and masked pictures in one batch."""
    opened = Cache.open(cache)
    rows = np.array([0, LENGTHS[0] + 2, LENGTHS[0] + 3, 5, FRAMES - 1])
    ids, variants, masked = (
        np.zeros(5, np.int64),
        np.array([0, 1, 0, 1, 0]),
        np.array([False, False, False, False, True]),
    )
    no_text = np.array([True, False, True, False, False])
    live = LiveFeatures(encoder, opened, sources_of(opened), memory_gib=0.0)
    with torch.inference_mode():
        found = live(gather(opened, ids, rows, 4, features=False, dropped=(no_text, masked, masked)), masked, variants)
    dataset = opened.datasets[0]
    for b in range(len(rows)):
        for v, view in enumerate(dataset.views):
            wanted = (
                dataset.null_features[v] if masked[b] else dataset.features(view, rows[b : b + 1], int(variants[b]))[0]
            )
            assert_same_features(found.tokens[b].unflatten(0, (V, -1))[v], wanted)
    assert found.token_mask.all() and found.view_id[0].tolist() == [0] * 4 + [1] * 4


def test_equal_instructions_and_sizes_share_a_call(encoder: Any, vlm: Path) -> None:
    generator = np.random.default_rng(0)
    pictures = [
        [generator.integers(0, 255, (h, w, 3), np.uint8) for h, w in sizes]
        for sizes in (
            [(64, 64), (48, 80)],
            [(64, 64), (48, 80)],
            [(64, 64), (48, 80)],
            [(64, 64)],
            [(48, 80), (64, 64)],
        )
    ]
    texts = ["push", "open", "push", "push", "open"]
    calls = encoder_calls(encoder, pictures, texts)
    assert [(c.instruction, [i for i, _ in c.members]) for c in calls] == [
        ("push", [0, 2]),
        ("open", [1]),
        ("push", [3]),
        ("open", [4]),
    ]
    assert [len(c.members) for c in encoder_calls(encoder, pictures, texts, most=3)] == [1] * 5
    vision = load_encoder(EncoderSpec(str(vlm), **{**LANGUAGE, "depth": "vision"}))
    assert [(c.instruction, len(c.members)) for c in encoder_calls(vision, pictures, texts)] == [("", 5), ("", 4)]
    for model in (encoder, vision):
        together = encode_observations(model, pictures, texts)
        for views, text, found in zip(pictures, texts, together):
            assert_same_features(found, model.encode_observation([p[None] for p in views], text)[0])
    plain, keyed = (encode_observations(encoder, pictures[:2], texts, keys) for keys in (None, [[0, 7], [0, 0]]))
    assert (
        torch.equal(plain[1], keyed[1]) and (plain[0] - keyed[0]).abs().amax((1, 2)).min() > 0.05
    )  # also in the view without a key


def test_from_the_command_line_to_a_policy(dvla: Dvla, recorded: dict[str, Path], vlm: Path, tmp_path: Path) -> None:
    from dvla.stages.policy.policy import Policy

    source, out = recorded["h264"], tmp_path / "cache"
    options = argv(
        f"{source} --vlm tiny_paligemma2 --vlm-path {vlm} --depth language --resolution 56 --tokens 4 "
        "--device cpu --frame-stride 2"
    )
    refused(
        dvla("cache", "build", *options, "--features", "patch", "--out", out),
        "depth language needs features merged",
    )
    refused(
        dvla("cache", "build", *options, "--pool", "queries:4", "--out", out),
        "pool queries:N",
    )
    refused(dvla("cache", "build", *options, "--depth", "deep", "--out", out), "unknown value 'deep'")
    assert not out.exists()
    for step in (
        ("plan", *options, "--out", out, "--pilot", 6),
        ("build", *options, "--out", out),
        ("verify", out, "--live", 6),
        ("plan", *options, "--out", out, "--pilot", 6, "--update"),
    ):
        result = dvla("cache", *step)
        assert result.code == 0 and result.err == "", result
    assert "against the finished cache, encoded again: 0 images" in result.out
    refused(dvla("cache", "plan", *options, "--out", out, "--append", "--update"), "exclude each other")
    refused(
        dvla("cache", "build", *options, "--depth", "vision", "--out", out),
        "encoder.depth: cache has language, you requested vision",
    )
    small = ("--set", "dit={width: 32, blocks: 1, heads: 2, horizon: 4}", "--set", "eval_every=0")
    assert (
        dvla(
            *argv(f"train --from-cache {out} --out {tmp_path / 'two'} --recipe tiny --steps 2 --batch-size 4"), *small
        ).code
        == 0
    )
    done = dvla("finetune", "--lora", tmp_path / "two", "--source", source, "--steps", 2, "--out", tmp_path / "three")
    assert done.code == 0 and done.err == "", done

    policy, seen = Policy.from_pretrained(tmp_path / "two"), [observation(source, 1, 4), observation(source, 0, 2)]
    cached = gather(Cache.open(out), np.zeros(2, np.int64), np.array([LENGTHS[0] + 4, 2]), 4)
    live = policy._batch(seen)
    assert_same_features(live.tokens, cached.tokens)
    noise = torch.zeros(2, 1, policy.net.config.dit.horizon, policy.net.config.dit.noise_dim)
    with torch.no_grad():
        assert_same_actions(
            *(
                policy.net(b.replace(tokens=b.tokens.float(), text=b.text.float()), noise, torch.ones(2)).numpy()
                for b in (live, cached)
            )
        )
    adapted = ck.resolve(tmp_path / "three")
    assert (adapted / "adapter").is_dir() and np.isfinite(Policy.from_pretrained(adapted).act_batch(seen)).all()
    blind = Policy.from_pretrained(tmp_path / "two", blind=True)._batch(seen)
    assert_same_features(blind.tokens[0].unflatten(0, (V, -1)), Cache.open(out).datasets[0].null_features)
