"""Hidden states of Qwen3-VL's language model against transformers' own forward."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dvla.cache.vlm.load import load_encoder
from dvla.cache.vlm.observations import encode_observations
from dvla.cache.vlm.spec import EncoderSpec
from dvla.cache.vlm.tiny_qwen3vl import TinySpec, make_tiny_qwen3vl
from dvla.errors import UserError
from support.vlm_samples import smooth_images

R, LAYERS, K = 128, 6, 16
TINY = TinySpec(vision_depth=4, vision_width=64, vision_heads=2, out_width=64, text_layers=LAYERS, init_std=0.1)
TEXT = "push the puck to the goal"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3vl(tmp_path_factory.mktemp("vlm") / "tiny", TINY)


def load(checkpoint: Path, **settings: Any) -> Any:
    return load_encoder(EncoderSpec(str(checkpoint), resolution=R, dtype="float32", depth="language", **settings))


@pytest.fixture(scope="module")
def official(checkpoint: Path) -> Any:
    """(prefix tokens, ids, what each layer receives and the last one gives, as transformers has it) of images and a
    text."""
    from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

    model = Qwen3VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)

    @torch.no_grad()
    def run(images: torch.Tensor, text: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        prompt = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        inputs = processor(text=[prompt] * len(images), images=[x.numpy() for x in images], return_tensors="pt")
        received: list[torch.Tensor] = []
        hooks = [
            layer.register_forward_pre_hook(
                lambda m, args, kwargs: received.append((args[0] if args else kwargs["hidden_states"]).clone()),
                with_kwargs=True,
            )
            for layer in model.model.language_model.layers
        ]
        out = model.model(**inputs, output_hidden_states=True)
        for hook in hooks:
            hook.remove()
        hidden = out.hidden_states
        assert len(hidden) == LAYERS + 1
        for number in range(4, LAYERS):  # above DeepStack what a layer receives is what transformers calls it
            assert torch.equal(hidden[number], received[number])
        return inputs["input_ids"][0], [*received, hidden[-1]]

    return run


@pytest.mark.parametrize("layer", range(1, LAYERS + 1))
def test_features_are_the_hidden_states_of_transformers(checkpoint: Path, official: Any, layer: int) -> None:
    images = smooth_images(2, R, R, 0)
    encoder = load(checkpoint, layers=(layer,))
    ids, states = official(images, TEXT)
    at = ids.tolist().index(encoder.tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    after = len(ids) - at - K
    features = encoder.encode_images(images, TEXT)
    assert features.shape == (2, K + 32, 64) == (2, encoder.tokens, encoder.width)
    assert encoder.visible(TEXT) == K + after and len(encoder.prompt.prefix) == at
    torch.testing.assert_close(features[:, : K + after], states[layer][:, at:], rtol=1e-3, atol=1e-4)
    assert not features[:, K + after :].any()
    assert len(encoder.language.layers) == layer and (encoder.language.norm is None) == (layer < LAYERS)


def test_only_the_tensors_that_are_needed_are_read(checkpoint: Path) -> None:
    names = dict(load(checkpoint, layers=(2,)).vision.named_parameters())
    assert {n.split(".")[2] for n in names if n.startswith("language.layers.")} == {"0", "1"}
    assert "language.norm.weight" not in names and any(n.startswith("deepstack_merger_list.1.") for n in names)
    assert len(load(checkpoint).language.layers) == round(LAYERS * 4 / 7)
    first, second = (load(checkpoint, layers=(n,)).fingerprint() for n in (2, 3))
    assert first["layers"] == [2] and first["weights_sha256"] != second["weights_sha256"]
    assert "{instruction}" in first["prompt"] and first["template"] == second["template"]


def test_what_is_kept(checkpoint: Path) -> None:
    images = smooth_images(2, R, R, 1)
    every, image = load(checkpoint), load(checkpoint, keep="image")
    pooled = load(checkpoint, tokens=4)
    queries = load(checkpoint, queries=8)
    whole = every.encode_images(images, TEXT)
    assert (every.reads, image.reads, image.tokens, queries.tokens) == ("instruction", "image", K, 8)
    torch.testing.assert_close(image.encode_images(images, "another text"), whole[:, :K], rtol=1e-4, atol=1e-5)
    few = pooled.encode_images(images, TEXT)
    torch.testing.assert_close(few[:, 4:], whole[:, K:])
    torch.testing.assert_close(few[:, 0], whole[:, [0, 1, 4, 5]].mean(1), rtol=1e-4, atol=1e-5)
    seen = queries.encode_images(images, TEXT)
    other = queries.encode_images(images, "open the drawer")
    assert seen.shape == (2, 8, 64) and (seen - other).abs().amax((1, 2)).min() > 1e-3
    assert (seen[0] - seen[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kept", [{}, {"queries": 8}])
def test_a_boundary_changes_nothing(checkpoint: Path, kept: dict[str, Any]) -> None:
    images, texts = smooth_images(2, R, R, 2), [TEXT, "open the drawer and close it again"]
    encoder = load(checkpoint, layers=(LAYERS,), **kept)
    wanted = torch.cat([encoder.encode_images(images[i : i + 1], text) for i, text in enumerate(texts)])
    for n in (1, 3):
        lower = encoder.at_boundary(n)
        hidden = torch.cat([lower.encode_images(images[i : i + 1], text) for i, text in enumerate(texts)])
        visible = torch.tensor([lower.visible(text) for text in texts])
        assert hidden.shape[1] == lower.tokens and visible[0] < visible[1] < lower.tokens
        torch.testing.assert_close(encoder.encode_upper(hidden, n, visible), wanted, rtol=1e-4, atol=1e-5)
        alone = load(checkpoint, layers=(LAYERS,), boundary=n, queries=kept.get("queries"))
        assert alone.fingerprint() == lower.fingerprint()


def test_several_layers(checkpoint: Path) -> None:
    images = smooth_images(1, R, R, 3)
    apart = [load(checkpoint, layers=(n,)).encode_images(images, TEXT) for n in (2, 5)]
    wide = load(checkpoint, layers=(2, 5))
    features = wide.encode_images(images, TEXT)
    assert features.shape[-1] == wide.width == 128
    torch.testing.assert_close(features, torch.cat(apart, -1), rtol=1e-4, atol=1e-5)
    long = load(checkpoint, layers=(2, 5), layers_as="tokens")
    features = long.encode_images(images, TEXT)
    assert features.shape == (1, 2 * (K + 32), 64) and long.visible(TEXT) == 2 * wide.visible(TEXT)
    torch.testing.assert_close(features[:, ::2], apart[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features[:, 1::2], apart[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(long.of_image(features), wide.of_image(wide.encode_images(images, TEXT)))


def test_observations_of_one_instruction_share_a_call(checkpoint: Path) -> None:
    encoder = load(checkpoint)
    images = [[image.numpy()] for image in smooth_images(3, R, R, 4)]
    texts = [TEXT, "open the drawer", TEXT]
    found = encode_observations(encoder, images, texts)
    for (image,), text, features in zip(images, texts, found):
        torch.testing.assert_close(features[0], encoder.encode_images(image[None], text)[0], rtol=1e-4, atol=1e-5)
    assert encoder.null_image_features(2).shape == (2, encoder.tokens, 64)


def test_refused(checkpoint: Path, tmp_path: Path) -> None:
    for settings, message in (
        ({"layers": (7,)}, "layers 1 to 6"),
        ({"layers": (3, 2)}, "first ones first"),
        ({"layers": (4,), "boundary": 2}, "1 to 1"),
        ({"queries": 8, "keep": "all"}, "queries"),
        ({"layers": (2, 4), "boundary": 1}, "one layer"),
    ):
        with pytest.raises(UserError, match=message):
            load(checkpoint, **settings)
    with pytest.raises(UserError, match="prompt-tokens"):
        load(checkpoint, prompt_tokens=8).encode_images(smooth_images(1, R, R, 0), TEXT)
    with pytest.raises(UserError, match="context"):
        load(checkpoint, prompt_tokens=8000).require_fits(1, ["push " * 5000])
    with pytest.raises(UserError, match="depth language"):
        EncoderSpec(str(checkpoint), layers=(3,))
    bare = shutil.copytree(checkpoint, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="chat template"):
        load(bare)
    (bare / "chat_template.jinja").write_text("{{ messages[0].content[1].text }}")
    with pytest.raises(UserError, match="chat template"):
        load(bare)
    assert np.isfinite(load(checkpoint).encode_images(smooth_images(1, R, R, 0), "").detach().numpy()).all()


def test_an_instruction_is_tokenized_once(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Acting asks for its length and its ids at every step."""
    encoder, asked = load(checkpoint), []
    ids = type(encoder.prompt)._ids
    monkeypatch.setattr(type(encoder.prompt), "_ids", lambda self, text: asked.append(text) or ids(self, text))
    for _ in range(3):
        assert encoder.visible(TEXT) == encoder.visible(TEXT)
        encoder.require_fits(1, [TEXT])
    assert sum(TEXT in text for text in asked) == 1
