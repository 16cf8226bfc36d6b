"""Hidden states of PaliGemma 2's language model against transformers' own forward."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dvla.cache.vlm.adapter import load_adapter, save_adapter, tower_parameters
from dvla.cache.vlm.load import load_encoder
from dvla.cache.vlm.lora import add_lora, lora_parameters
from dvla.cache.vlm.spec import EncoderSpec, LoraSpec, features_in_words
from dvla.cache.vlm.tiny_paligemma2 import TinyPaliGemmaSpec, make_tiny_paligemma2
from dvla.errors import UserError
from support.vlm_samples import smooth_images

R, LAYERS, K, ROOM = 56, 4, 16, 32
TINY = TinyPaliGemmaSpec(
    vision_depth=2, vision_width=32, vision_heads=2, image_size=R, out_width=64, text_layers=LAYERS, vocabulary=600
)
TEXT = "push the puck to the goal"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every other layer has a window of 8 tokens, which transformers does not apply within the prefix."""
    folder = make_tiny_paligemma2(tmp_path_factory.mktemp("vlm") / "tiny", TINY)
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"]["layer_types"] == ["sliding_attention", "full_attention"] * 2
    config["text_config"]["sliding_window"] = 8
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(checkpoint: Path, **settings: Any) -> Any:
    spec = {"vlm": "paligemma2", "resolution": R, "dtype": "float32", "depth": "language"}
    return load_encoder(EncoderSpec(str(checkpoint), **{**spec, **settings}))


@pytest.fixture(scope="module")
def official(checkpoint: Path) -> Any:
    """(hidden states of the layers as transformers has them, of the views of one observation and a text)."""
    from transformers import AutoProcessor, PaliGemmaForConditionalGeneration

    model = PaliGemmaForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    assert model.config.text_config.sliding_window == 8

    @torch.no_grad()
    def run(views: list[torch.Tensor], text: str) -> tuple[torch.Tensor, ...]:
        prompt = "<image>" * K * len(views) + f"<bos>{text}\n"
        inputs = processor.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        pixels = processor.image_processor(images=[v.numpy() for v in views], return_tensors="pt")["pixel_values"]
        prefix = torch.zeros_like(inputs["input_ids"])  # all of it: every token sees every other
        out = model.model(**inputs, token_type_ids=prefix, pixel_values=pixels, output_hidden_states=True)
        assert len(out.hidden_states) == LAYERS + 1
        return out.hidden_states

    return run


@pytest.mark.parametrize("layer", range(1, LAYERS + 1))
def test_features_are_the_hidden_states_of_transformers(checkpoint: Path, official: Any, layer: int) -> None:
    first, second = smooth_images(2, R, R, 0)
    encoder = load(checkpoint, layers=(layer,))
    wanted = official([first, second], TEXT)[layer][:, : 2 * K]
    features = encoder.encode_observation([first[None], second[None]], TEXT)
    torch.testing.assert_close(features.flatten(1, 2), wanted, rtol=1e-3, atol=1e-4)
    every = load(checkpoint, layers=(layer,), keep="all")
    visible = every.visible(TEXT)
    wanted = torch.cat([official([view], TEXT)[layer] for view in (first, second)])
    features = every.encode_images(torch.stack([first, second]), TEXT)
    assert features.shape == (2, K + ROOM, 64) and visible == wanted.shape[1] == K + len(every.prompt(TEXT))
    torch.testing.assert_close(features[:, :visible], wanted, rtol=1e-3, atol=1e-4)
    assert not features[:, visible:].any()
    assert (encoder.vision.language.norm is None) == (layer < LAYERS) and encoder.language_layers == layer


def test_the_last_layer_is_the_default_with_the_fingerprint_it_had(checkpoint: Path) -> None:
    plain, last = load(checkpoint), load(checkpoint, layers=(LAYERS,))
    views = [smooth_images(1, R, R, i) for i in range(2)]
    assert torch.equal(plain.encode_observation(views, TEXT), last.encode_observation(views, TEXT))
    assert plain.fingerprint() == last.fingerprint() and plain.fingerprint()["depth"] == "language"
    added = {"layers", "keep", "prompt", "prompt_tokens", "layers_as"}
    assert not added & set(plain.fingerprint()) and plain.reads == "observation"
    other = load(checkpoint, layers=(1, 2), keep="all", layers_as="tokens").fingerprint()
    assert {name: other[name] for name in added} == {
        "layers": [1, 2],
        "keep": "all",
        "prompt": "<bos>{instruction}\n",
        "prompt_tokens": ROOM,
        "layers_as": "tokens",
    }
    assert other["weights_sha256"] != plain.fingerprint()["weights_sha256"]
    assert features_in_words(other) == "language layers 1, 2 as tokens, image and prompt tokens"


def test_only_the_tensors_that_are_needed_are_read(checkpoint: Path) -> None:
    names = [n for n, _ in load(checkpoint, layers=(2,)).vision.named_parameters() if n.startswith("language.")]
    assert {n.split(".")[2] for n in names} == {"0", "1"} and "language.norm.weight" not in names
    assert "1 of" not in (said := load(checkpoint, layers=(2,)).contents()) and said.startswith(
        "2 of 4 language layers"
    )


@pytest.mark.parametrize("keep", ["image", "all"])
def test_several_layers(checkpoint: Path, keep: str) -> None:
    views = [smooth_images(1, R, R, i) for i in range(2)]
    apart = [load(checkpoint, layers=(n,), keep=keep, tokens=4).encode_observation(views, TEXT) for n in (1, 3, LAYERS)]
    wide = load(checkpoint, layers=(1, 3, LAYERS), keep=keep, tokens=4)
    features = wide.encode_observation(views, TEXT)  # [1,2,K,3·D]
    assert features.shape == (1, 2, wide.tokens, wide.width) and wide.width == 3 * 64
    torch.testing.assert_close(features, torch.cat(apart, -1), rtol=1e-4, atol=1e-5)
    long = load(checkpoint, layers=(1, 3, LAYERS), keep=keep, tokens=4, layers_as="tokens")
    features = long.encode_observation(views, TEXT)
    assert long.tokens == 3 * wide.tokens and long.visible(TEXT) == 3 * wide.visible(TEXT)
    for i in range(3):
        torch.testing.assert_close(features[:, :, i::3], apart[i], rtol=1e-4, atol=1e-5)
    null = long.null_image_features(2)
    assert null.shape == (2, long.tokens, 64) and not null[:, long.visible("") :].any()


def test_each_view_alone_where_the_prompt_is_kept(checkpoint: Path) -> None:
    encoder = load(checkpoint, keep="all")
    first, second = (smooth_images(1, R, R, i) for i in range(2))
    both = encoder.encode_observation([first, second], TEXT)
    assert encoder.reads == "instruction" and not encoder.by_observation
    torch.testing.assert_close(both[:, 0], encoder.encode_images(first, TEXT))
    other = encoder.encode_images(first, "open the drawer")
    assert (both[:, 0, :K] - other[:, :K]).abs().max() > 1e-3  # image tokens have read the instruction


def test_refused(checkpoint: Path, tmp_path: Path) -> None:
    for settings, message in (
        ({"layers": (5,)}, "--layers 5: give layers 1 to 4 of the language model"),
        ({"layers": (2,), "depth": "vision"}, "layers is a setting of depth language"),
        ({"keep": "all", "depth": "vision"}, "keep is a setting of depth language"),
        ({"queries": 8}, "pool queries:N keeps .* of qwen3vl"),
        ({"layers": (2,), "boundary": 1}, "a boundary with depth language needs qwen3vl"),
        ({"layers": (2,), "layers_as": "tokens"}, "layers-as tokens needs several layers"),
        (
            {"prompt_tokens": 8},
            "prompt-tokens 8 needs depth language with keep all; given: .* keep image of paligemma2",
        ),
        ({"prompt_tokens": 8, "keep": "all", "depth": "vision"}, "prompt-tokens 8 needs depth language"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            load(checkpoint, **settings)
        assert "\n" not in str(caught.value)
    with pytest.raises(
        UserError, match="has 13 tokens, a record has room for 4; build the cache with --prompt-tokens 13"
    ):
        load(checkpoint, keep="all", prompt_tokens=4).encode_images(smooth_images(1, R, R, 0), TEXT)
    with pytest.raises(UserError, match="are more than the 8192 tokens"):
        load(checkpoint, keep="all", prompt_tokens=9000).require_fits(1, ["push " * 9000])
    load(checkpoint, keep="all").require_fits(600, [TEXT])  # each view alone
    bare = shutil.copytree(checkpoint, tmp_path / "bare")
    for file in bare.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match="incomplete|lacks"):
        load(bare, layers=(2,))


def test_fine_tuned_weights_with_and_without_the_language_layers(checkpoint: Path, tmp_path: Path) -> None:
    """Earlier releases trained the tower alone and wrote no language layer."""
    views = [smooth_images(1, R, R, i) for i in range(2)]
    for language in (False, True):
        tuned, folder = load(checkpoint), tmp_path / f"language-{language}"
        for _, p in tower_parameters(tuned, language):
            p.data += 0.01
        if language:
            save_adapter(tuned, folder)
        else:
            saved = tuned.vision.language
            del tuned.vision.language
            save_adapter(tuned, folder)
            tuned.vision.language = saved
        other = load(checkpoint)
        before = other.encode_observation(views, TEXT)
        load_adapter(other, folder)
        features = other.encode_observation(views, TEXT)
        assert torch.equal(features, tuned.encode_observation(views, TEXT)) and not torch.equal(features, before)


@pytest.mark.parametrize(
    "last, adapted", [(1, {"language.layers.3"}), (LAYERS, {f"language.layers.{i}" for i in range(4)})]
)
def test_lora_in_the_language_layers(checkpoint: Path, last: int, adapted: set[str]) -> None:
    encoder = load(checkpoint, keep="all")
    image = smooth_images(1, R, R, 0)
    before = encoder.encode_images(image, TEXT)
    add_lora(encoder, LoraSpec(targets="all-linear", last_n_blocks=last))
    names = {name.split(".self_attn")[0].split(".mlp")[0] for name, _ in lora_parameters(encoder)}
    assert {name.split("base_model.model.")[-1] for name in names} == adapted
    assert torch.equal(encoder.encode_images(image, TEXT), before)
    encoder.encode_images(image, TEXT).square().sum().backward()
    assert [n for n, p in lora_parameters(encoder) if p.grad is None] == []
