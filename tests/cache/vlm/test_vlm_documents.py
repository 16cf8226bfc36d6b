"""A VLM checkpoint is anyone's: what is used of its files has its type and range, before memory is asked for."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dvla.cache.vlm.adapter import load_adapter, save_adapter
from dvla.cache.vlm.load import load_encoder
from dvla.cache.vlm.lora import add_lora, lora_parameters
from dvla.cache.vlm.spec import EncoderSpec, LoraSpec
from dvla.cache.vlm.tiny_qwen3vl import make_tiny_qwen3vl
from dvla.errors import UserError
from support.vlm_samples import TINY


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3vl(tmp_path_factory.mktemp("vlm") / "tiny", TINY)


def edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        document = json.loads((folder / name).read_text())
        change(document)
        (folder / name).write_text(json.dumps(document))

    return spoil


def vision(**values: Any) -> Callable[[Path], None]:
    return edit("config.json", lambda d: d["vision_config"].update(values))


def replaced(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return spoil


def hole(path: Path) -> None:
    path.touch()
    os.truncate(path, 3 << 30)


INDEX, PROCESSOR, TOKENIZER = "model.safetensors.index.json", "preprocessor_config.json", "tokenizer.json"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (vision(depth=10**6), "vision_config.depth' is 1000000, expected"),
        (vision(hidden_size=10**9), "vision_config.hidden_size' is 1000000000, expected"),
        (vision(hidden_size="32"), "vision_config.hidden_size' is '32'"),
        (vision(num_position_embeddings=195), "expected a square number"),
        (vision(num_heads=3), "expected a multiple"),
        (vision(hidden_act="none such"), "cannot be read as a checkpoint"),
        (vision(rope_parameters={"rope_theta": "x"}), "rope_parameters.rope_theta' is 'x', expected"),
        (vision(rope_parameters=[2]), "rope_parameters' is"),
        (edit("config.json", lambda d: d["text_config"].update(num_hidden_layers=10**9)), "num_hidden_layers"),
        (edit("config.json", lambda d: d.update(model_type=7)), "'model_type' is 7"),
        (edit(PROCESSOR, lambda d: d.update(image_std=[0.5, 0.0, 0.5])), r"image_std\[1\]"),
        (edit(PROCESSOR, lambda d: d.update(image_mean=[0.5, 0.5])), "image_mean"),
        (edit(INDEX, lambda d: d.update(weight_map={"a": "../x.safetensors"})), "weight_map"),
        (edit(INDEX, lambda d: d.pop("weight_map")), "'weight_map' is missing"),
        (edit(TOKENIZER, lambda d: d["model"].update(vocab=[])), "cannot be read as a checkpoint"),
        (edit(TOKENIZER, lambda d: d["model"]["vocab"].update(zzz=10**6)), "cannot be read as a checkpoint"),
        (replaced(TOKENIZER, os.mkfifo), "tokenizer.json: it is a pipe"),
        (replaced("config.json", os.mkfifo), "it is a pipe|config.json is missing"),
        (replaced(PROCESSOR, os.mkfifo), "it is a pipe"),
        (replaced(TOKENIZER, hole), "expected at most"),
        (replaced(INDEX, lambda path: path.symlink_to(path.name)), "Too many levels"),
    ],
)
def test_a_document_of_another_form_is_one_line(
    sound: Path, tmp_path: Path, spoil: Callable[[Path], None], said: str
) -> None:
    folder = shutil.copytree(sound, tmp_path / "vlm")
    spoil(folder)
    with pytest.raises(UserError, match=said) as error:
        load_encoder(EncoderSpec(str(folder), resolution=64))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.to(torch.int32), "expected a matrix of floats"),
        (lambda t: t[..., :-1].contiguous(), "do not fit its config"),
        (lambda t: torch.full_like(t, torch.nan), "is not finite"),
    ],
)
def test_weights_of_another_form_are_refused(
    sound: Path, tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], said: str
) -> None:
    folder = shutil.copytree(sound, tmp_path / "vlm")
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    name = next(n for n in index if n.endswith("attn.qkv.weight"))
    tensors = load_file(folder / index[name])
    save_file(tensors | {name: change(tensors[name])}, folder / index[name], {"format": "pt"})
    with pytest.raises(UserError, match=said):
        load_encoder(EncoderSpec(str(folder), resolution=64))


def test_an_embedding_table_has_the_rows_of_its_vocabulary(sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound, tmp_path / "vlm")
    name = "model.language_model.embed_tokens.weight"
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    save_file(tensors | {name: torch.cat([tensors[name]] * 2)}, file, {"format": "pt"})
    with pytest.raises(UserError, match="do not fit its config.*embed_tokens"):
        load_encoder(EncoderSpec(str(folder), resolution=64))


def test_other_rotary_positions_are_another_fingerprint(sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound, tmp_path / "vlm")
    own = load_encoder(EncoderSpec(str(folder), resolution=64)).fingerprint()
    vision(rope_parameters={"rope_theta": 10000.0})(folder)
    assert load_encoder(EncoderSpec(str(folder), resolution=64)).fingerprint() == own
    vision(rope_parameters={"rope_theta": 500.0})(folder)
    assert load_encoder(EncoderSpec(str(folder), resolution=64)).fingerprint() != own


@pytest.mark.parametrize("lora", [True, False])
def test_fine_tuned_weights_are_those_that_their_identity_names(sound: Path, tmp_path: Path, lora: bool) -> None:
    spec = EncoderSpec(str(sound), resolution=64, dtype="float32")
    encoder = load_encoder(spec)
    if lora:
        add_lora(encoder, LoraSpec(r=2))
        for _, p in lora_parameters(encoder):
            p.data += 0.1
    save_adapter(encoder, tmp_path / "adapter")
    load_adapter(fresh := load_encoder(spec), tmp_path / "adapter")
    assert fresh.adapted() == encoder.adapted() or not lora
    file = next((tmp_path / "adapter").glob("*.safetensors"))
    tensors = load_file(file)
    name = next(iter(tensors))
    for change, said in (
        ({name: tensors[name] + 1}, "not those that its identity.json names"),
        ({name: tensors[name].half()}, "float16"),
        ({"more": torch.ones(1)}, "'more' belongs to no part"),
        ({name: tensors[name] * torch.nan}, "not finite"),
    ):
        save_file(tensors | change, file)
        with pytest.raises(UserError, match=said):
            load_adapter(load_encoder(spec), tmp_path / "adapter")
    save_file(tensors, file)
    if lora:
        for key, value in (("r", 10**6), ("use_dora", True), ("peft_type", "IA3"), ("lora_alpha", "x")):
            shutil.copytree(tmp_path / "adapter", tmp_path / key)
            edit("adapter_config.json", lambda d, k=key, v=value: d.update({k: v}))(tmp_path / key)
            with pytest.raises(UserError, match=f"'{key}' is"):
                load_adapter(load_encoder(spec), tmp_path / key)
