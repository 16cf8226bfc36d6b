"""DeepStack's outputs of Qwen3-VL's vision tower beside the merged ones, against transformers' own forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dvla.cache.vlm.load import load_encoder
from dvla.cache.vlm.spec import EncoderSpec
from dvla.cache.vlm.tiny_qwen3vl import TinySpec, make_tiny_qwen3vl
from dvla.errors import UserError
from support.vlm_samples import smooth_images

R, K, D = 128, 16, 64
TINY = TinySpec(vision_depth=4, vision_width=64, vision_heads=2, out_width=D, text_layers=4, init_std=0.1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3vl(tmp_path_factory.mktemp("vlm") / "tiny", TINY)


def load(checkpoint: Path, **settings: Any) -> Any:
    return load_encoder(EncoderSpec(str(checkpoint), resolution=R, dtype="float32", deepstack=True, **settings))


@pytest.fixture(scope="module")
def official(checkpoint: Path) -> list[torch.Tensor]:
    """[2,K,D] of the merger and of each DeepStack merger, from transformers, row by row."""
    from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

    model = Qwen3VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    images = [x.numpy() for x in smooth_images(2, R, R, 0)]
    inputs = processor(text=["<|image_pad|>"] * 2, images=images, return_tensors="pt")
    with torch.no_grad():
        out = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    merged, inner = out if isinstance(out, tuple) else (out.pooler_output, out.deepstack_features)
    assert len(inner) == len(model.config.vision_config.deepstack_visual_indexes) > 1
    return [x.reshape(2, K, D) for x in (merged, *inner)]


@pytest.mark.parametrize("pooled", [None, 4])
def test_features_are_those_of_transformers(checkpoint: Path, official: list[torch.Tensor], pooled: int | None) -> None:
    images, count = smooth_images(2, R, R, 0), len(official)
    wanted = official
    if pooled:  # averaged on the 4 x 4 grid of each layer
        wanted = [x.reshape(2, 2, 2, 2, 2, D).mean((2, 4)).flatten(1, 2) for x in official]
    wide, long = load(checkpoint, tokens=pooled), load(checkpoint, tokens=pooled, layers_as="tokens")
    features = wide.encode_images(images)
    assert features.shape == (2, wide.tokens, wide.width) == (2, pooled or K, count * D)
    torch.testing.assert_close(features, torch.cat(wanted, -1), rtol=1e-3, atol=1e-4)
    features = long.encode_images(images)
    assert features.shape == (2, long.tokens, long.width) == (2, count * (pooled or K), D)
    assert long.visible("push") == long.tokens and long.image_span == (0, pooled or K, count)
    for i, layer in enumerate(wanted):
        torch.testing.assert_close(features[:, i::count], layer, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(long.of_image(features), wide.encode_images(images), rtol=1e-4, atol=1e-5)
    assert long.null_image_features(2).shape == (2, long.tokens, D)


def test_fingerprint(checkpoint: Path) -> None:
    plain = load_encoder(EncoderSpec(str(checkpoint), resolution=R, dtype="float32")).fingerprint()
    wide, long = (load(checkpoint, layers_as=how).fingerprint() for how in ("width", "tokens"))
    assert "layers" not in plain and wide["layers"] == long["layers"] == "deepstack"
    assert wide["weights_sha256"] == long["weights_sha256"] != plain["weights_sha256"]
    assert {n for n in wide if wide[n] != long[n]} == {"layers_as", "tokens"}


def test_refused(checkpoint: Path, tmp_path: Path) -> None:
    for settings, message in (
        ({"depth": "language"}, "without layers deepstack"),
        ({"features": "patch"}, "layers deepstack needs qwen3vl with features merged"),
        ({"vlm": "paligemma2"}, "layers deepstack needs qwen3vl"),
        ({"boundary": 1}, "leave out tokens, features patch, keep and layers deepstack"),
    ):
        with pytest.raises(UserError, match=message):
            load(checkpoint, **settings)
    other = make_tiny_qwen3vl(tmp_path / "other", TINY)
    config = json.loads((other / "config.json").read_text())
    config["vision_config"]["deepstack_visual_indexes"] = []
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="--layers deepstack: .*has no such layers"):
        load(other)
