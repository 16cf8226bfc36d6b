"""A frame's way into a shard: each video is looked through and hashed once per build, and never decoded in vain."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dvla.cache.readers.lerobot import source, spans
from dvla.cache.vlm.spec import EncoderSpec
from dvla.cache.vlm.tiny_qwen3vl import TinySpec, make_tiny_qwen3vl
from dvla.errors import UserError
from dvla.stages.caching.build import build
from dvla.stages.caching.config import BuildConfig
from support.lerobot_samples import LENGTHS, VIEWS

TINY = TinySpec(
    vision_depth=1, vision_width=32, vision_heads=2, vision_mlp=2, out_width=32, text_layers=1, vocabulary=512
)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3vl(tmp_path_factory.mktemp("vlm") / "tiny", TINY)


def configure(source: Path, vlm: Path, out: Path) -> BuildConfig:
    spec = EncoderSpec(str(vlm), resolution=64, dtype="float32")
    return BuildConfig((str(source),), spec, out, batch_size=5, shard_frames=8, device="cpu")


@pytest.mark.parametrize(("kind", "finder"), [("h264", (spans, "find_extent")), ("image", (source, "find_images"))])
def test_each_view_of_an_episode_is_hashed_once(
    recorded: dict[str, Path],
    vlm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    finder: tuple[Any, str],
) -> None:
    real: Callable[..., Any] = getattr(*finder)
    counted: Counter[str] = Counter()

    def find(*args: Any) -> Any:
        counted[str((args[0], args[1:]))] += 1  # the file, and the times or the episode and camera
        return real(*args)

    monkeypatch.setattr(*finder, find)
    report = build(configure(recorded[kind], vlm, tmp_path / "cache"))
    assert report.timing.images == len(VIEWS) * sum(LENGTHS)
    assert sum(counted.values()) == len(VIEWS) * len(LENGTHS) and set(counted.values()) == {1}


def test_a_dataset_that_changes_during_the_build(recorded: dict[str, Path], vlm: Path, tmp_path: Path) -> None:
    root = shutil.copytree(recorded["hevc"], tmp_path / "hevc")
    last = sorted(root.glob("videos/*front/*/*.mp4"))[-1]
    raw = last.read_bytes()

    def change(name: str, done: int, total: int) -> None:
        if name.endswith("images") and last.read_bytes() == raw:
            shutil.copy(sorted(root.glob("videos/*wrist/*/*.mp4"))[-1], last)

    with pytest.raises(UserError, match="episode 2 changed during the build; rerun the same command"):
        build(configure(root, vlm, tmp_path / "cache"), change)
