"""What the cache's tools say of features that have read the instruction: plan, status, inspect, diff, card, export."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dvla.cache.store.cache import Cache
from dvla.cache.store.webdataset.cache import WebDatasetCache
from dvla.cache.vlm.load import load_encoder
from dvla.cache.vlm.spec import EncoderSpec, features_in_words
from dvla.cache.vlm.tiny_qwen3vl import TinySpec, make_tiny_qwen3vl
from dvla.errors import UserError
from dvla.stages.caching.build import build
from dvla.stages.caching.config import BuildConfig
from dvla.stages.caching.planning.pilot import plan_build
from dvla.stages.caching.transfer.card import cache_card
from dvla.stages.caching.transfer.webdataset import export, import_cache
from dvla.stages.caching.upkeep.diff import diff
from dvla.stages.caching.upkeep.inspect import CELL, GAP, norm_strip, shown_rows
from support.cli_runner import Dvla, argv, refused
from support.corner import Corner, other_instruction, tree
from support.lerobot_samples import LENGTHS, TASKS, VIEWS

FRAMES, V = sum(LENGTHS), len(VIEWS)
TINY = TinySpec(vision_depth=2, vision_width=32, vision_heads=2, out_width=64, text_layers=4)
LANGUAGE: dict[str, Any] = {"vlm": "qwen3vl", "resolution": 64, "dtype": "float32", "depth": "language"}
K, ROOM = 4, 40


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3vl(tmp_path_factory.mktemp("vlm") / "tiny", TINY)


def configure(source: Path, vlm: Path, out: Path, **settings: Any) -> BuildConfig:
    spec = EncoderSpec(str(vlm), **LANGUAGE | {"prompt_tokens": ROOM} | settings)
    return BuildConfig((str(source),), spec, out, batch_size=8, device="cpu", frame_stride=2)


@pytest.fixture(scope="module")
def cache(recorded: dict[str, Path], vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tools") / "cache"
    build(configure(recorded["image"], vlm, out, layers=(2, 3), layers_as="tokens"))
    return out


def longest(vlm: Path) -> int:
    encoder: Any = load_encoder(EncoderSpec(str(vlm), **LANGUAGE))
    return max(len(encoder.prompt.suffix(text)) for text in TASKS)


def test_plan_says_what_is_encoded(dvla: Dvla, recorded: dict[str, Path], vlm: Path, tmp_path: Path) -> None:
    said: list[str] = []
    found = plan_build(configure(recorded["image"], vlm, tmp_path / "cache"), say=said.append)
    assert re.fullmatch(r"loaded 2 of 4 language layers, 2 vision blocks: [\d.]+ KiB", said[1])
    assert found.tokens == (K + ROOM, 64) and found.prompt == (longest(vlm), ROOM) and found.reads == "instruction"
    assert found.bytes_per_sample == pytest.approx(V * (K + ROOM) * 64 * 2, rel=0.2)
    image = plan_build(configure(recorded["image"], vlm, tmp_path / "cache", keep="image", prompt_tokens=32))
    assert (image.tokens, image.prompt, image.reads) == ((K, 64), None, "image")
    queries = plan_build(configure(recorded["image"], vlm, tmp_path / "cache", queries=3))
    assert (queries.tokens, queries.prompt, queries.reads) == ((3, 64), None, "instruction")
    both = argv(f"{recorded['image']} --vlm-path {vlm} --depth language --resolution 64 --device cpu --pilot 6 --out")
    shown = dvla("cache", "plan", *both, tmp_path / "c", *argv(f"--layers 2,4 --prompt-tokens {ROOM}"))
    assert shown.code == 0 and "language layers 2, 4 side by side, image and prompt tokens" in shown.out
    assert f"room for {ROOM} tokens after the image's; the longest prompt here has {longest(vlm)}" in shown.out
    assert "another instruction means encoding an episode again" in shown.out
    plain = dvla("cache", "plan", *argv(f"{recorded['image']} --vlm-path {vlm} --resolution 64 --pilot 6 --out"), "c")
    assert "merged tokens: 4 tokens of 64 a view" in plain.out and "instruction" not in plain.out
    refused(dvla("cache", "plan", *both, tmp_path / "c", "--prompt-tokens", 7), "--prompt-tokens", str(longest(vlm)))


def test_plan_counts_what_another_instruction_costs(recorded: dict[str, Path], vlm: Path, tmp_path: Path) -> None:
    for depth, again in (("language", V * LENGTHS[1]), ("vision", 0)):
        corner = Corner(tmp_path / depth, recorded["image"], vlm, **LANGUAGE | {"depth": depth})
        corner.record(2).build()
        corner.record(3, other_instruction)
        shares = {share.kind: share.pictures for share in plan_build(corner.config("update")).shares}
        assert shares["again"] == again and shares["new"] == V * LENGTHS[2]
        report = corner.build("update")
        assert report.timing.images == shares["again"] + shares["new"]


def test_status_inspect_and_card_name_the_settings(dvla: Dvla, cache: Path, tmp_path: Path) -> None:
    words = "depth language", "layers [2, 3]", "layers as tokens", "keep all"
    for command in (("status", cache), ("inspect", cache), ("inspect", cache, "--html", tmp_path / "page.html")):
        result = dvla("cache", *command)
        page = tmp_path / "page.html"
        text = " ".join((page.read_text() if page.exists() else result.out).split())
        assert result.code == 0 and (page.exists() or all(word in text for word in words)), text
    assert "layers_as" in page.read_text() and "language" in page.read_text()
    assert "language layers 2, 3 as tokens, image and prompt tokens, 88 of width 64" in cache_card(
        Cache.open(cache), "me/cache"
    )


def test_norms_are_drawn_of_the_image_alone(cache: Path, recorded: dict[str, Path], vlm: Path, tmp_path: Path) -> None:
    d = Cache.open(cache).datasets[0]
    rows = shown_rows(d, 3)
    assert d.image_tokens == (0, K, 2) and d.tokens == 2 * (K + ROOM)
    strip, (low, high) = norm_strip(d, "front", rows)
    assert strip.shape == (2 * 2 * CELL, 3 * 2 * CELL + 2 * GAP, 3)  # two layers of 2 × 2 below each other
    norms = np.linalg.norm(d.features("front", rows).astype(np.float32), axis=-1)[:, : 2 * K]
    assert low > 0 and low == pytest.approx(norms.min()) and high == pytest.approx(norms.max())
    first = norms[0].reshape(K, 2)  # the layers of a token beside each other
    order = np.argsort(np.concatenate([first[:, 0], first[:, 1]]))
    cells = strip[CELL // 2 :: CELL, CELL // 2 : 2 * CELL : CELL].astype(int).reshape(2 * K, 3)
    assert (np.diff(cells[order, 1]) >= 0).all() and cells[:, 1].min() < cells[:, 1].max()  # green grows with the norm
    build(configure(recorded["image"], vlm, tmp_path / "queries", queries=5))
    queries = Cache.open(tmp_path / "queries").datasets[0]
    assert queries.image_tokens == (0, 0, 1)
    assert norm_strip(queries, "front", rows)[0].shape == (CELL, 3 * 5 * CELL + 2 * GAP, 3)
    below = configure(recorded["image"], vlm, tmp_path / "below", layers=(3,), boundary=1)
    build(below)
    hidden = Cache.open(tmp_path / "below").datasets[0]
    first_token, count, _ = hidden.image_tokens
    assert first_token > 0 and count == K
    assert norm_strip(hidden, "front", rows)[0].shape == (2 * CELL, 3 * 2 * CELL + 2 * GAP, 3)
    plain = dataclasses.replace(below, out=tmp_path / "vision", encoder=EncoderSpec(str(vlm), resolution=64))
    build(plain)
    assert "image_tokens" not in Cache.open(plain.out).datasets[0].attributes


def test_diff_leaves_empty_room_out(
    dvla: Dvla, cache: Path, recorded: dict[str, Path], vlm: Path, tmp_path: Path
) -> None:
    other = configure(recorded["image"], vlm, tmp_path / "other", layers=(2, 4), layers_as="tokens")
    build(other)
    found = diff(cache, other.out, samples=6)
    assert any("encoder.layers[1]" in line for line in found.fingerprint)
    mine, theirs = (Cache.open(path).datasets[0] for path in (cache, other.out))
    rows = shown_rows(mine, 6)
    one, two = (d.features("front", rows).astype(np.float64) for d in (mine, theirs))
    real = np.arange(mine.tokens) < mine.visible[mine.episode_instruction[mine.episode_of(rows)]][:, None]
    cosine = (one * two).sum(-1)[real] / np.linalg.norm(one, axis=-1)[real] / np.linalg.norm(two, axis=-1)[real]
    assert not real.all() and found.drifts[0].cosine == pytest.approx(cosine.mean(), abs=0.02)
    assert diff(cache, cache).same


def test_visible_survives_a_webdataset(cache: Path, tmp_path: Path) -> None:
    export(cache, str(tmp_path / "tars"))
    mine = Cache.open(cache).datasets[0]
    tars = WebDatasetCache.open(tmp_path / "tars", tmp_path).datasets[0]
    assert tars.visible.tolist() == mine.visible.tolist() != [mine.tokens] * len(mine.visible)
    assert (tars.null_visible, tars.image_tokens) == (mine.null_visible, mine.image_tokens)
    with tarfile.open(next((tmp_path / "tars").glob("image-*.tar"))) as tar:
        name = next(n for n in tar.getnames() if n.endswith(".json"))
        sample = json.load(io.TextIOWrapper(tar.extractfile(name)))  # type: ignore[arg-type]
    assert sample["visible"] == mine.visible[mine.instructions.index(sample["instruction"])]
    import_cache(str(tmp_path / "tars"), tmp_path / "back")
    back = Cache.open(tmp_path / "back").datasets[0]
    assert back.visible.tolist() == mine.visible.tolist() and tree(tmp_path / "back") == tree(cache)


def test_a_prompt_beyond_its_room_ends_before_anything_is_written(
    recorded: dict[str, Path], vlm: Path, tmp_path: Path
) -> None:
    config = configure(recorded["image"], vlm, tmp_path / "cache", prompt_tokens=7)
    for run in (build, plan_build):
        with pytest.raises(UserError, match="--prompt-tokens"):
            run(config)
    assert list(tmp_path.iterdir()) == []


def test_words() -> None:
    language = {"features": "merged", "depth": "language", "layers": [16], "keep": "all", "layers_as": "width"}
    assert features_in_words({"features": "patch"}) == "patch tokens"
    assert features_in_words({"features": "merged", "layers": "deepstack", "layers_as": "width"}) == (
        "merged tokens and DeepStack's side by side"
    )
    assert features_in_words(language) == "language layer 16, image and prompt tokens"
    assert features_in_words(language | {"queries": 64}) == "language layer 16, 64 query tokens"
    assert features_in_words({"features": "merged", "depth": "language"}) == "language layer last, image tokens"
    boundary = {"features": "hidden", "boundary": 4, "depth": "language", "layers": [16]}
    assert features_in_words(boundary) == "hidden states below the last 4 layers up to language layer 16"
    assert features_in_words({"features": "hidden", "boundary": 2}) == "hidden states"
