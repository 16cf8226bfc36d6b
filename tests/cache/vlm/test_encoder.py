"""The encoder: the toy checkpoint, preprocessing, features, loading, fingerprint, LoRA."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dvla.cache.vlm import blocks as attention_module
from dvla.cache.vlm import encoder as encoder_module
from dvla.cache.vlm.adapter import save_adapter
from dvla.cache.vlm.checkpoint import load_tokenizer
from dvla.cache.vlm.load import load_encoder
from dvla.cache.vlm.lora import add_lora, load_lora, lora_dropout, lora_parameters, merge_lora
from dvla.cache.vlm.preprocess import ImageSpec, pad_to_square, preprocess
from dvla.cache.vlm.qwen3vl.load import EMBEDDING_NAME
from dvla.cache.vlm.spec import EncoderSpec, LoraSpec, encoder_spec
from dvla.cache.vlm.tiny_qwen3vl import TinySpec, make_tiny_qwen3vl
from dvla.errors import UserError
from support.tolerances import assert_same_features
from support.vlm_samples import smooth_images, weight_files

R = 64  # resolution of most tests: 16 patches, 4 tokens
SMALL = TinySpec(vision_depth=3, vision_width=32, vision_heads=2, out_width=64, init_std=0.1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny_qwen3vl(tmp_path_factory.mktemp("vlm") / "tiny", SMALL)


@pytest.fixture
def copied(checkpoint, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(checkpoint, tmp_path / "copy")


@pytest.fixture(scope="module")
def model(checkpoint):
    """transformers' own complete model."""
    from transformers import Qwen3VLForConditionalGeneration

    found, info = Qwen3VLForConditionalGeneration.from_pretrained(checkpoint, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return found.eval()


@pytest.fixture
def encoder(checkpoint):
    return load_encoder(EncoderSpec(path=str(checkpoint), resolution=R))


def images(n, h=R, w=R, seed=0):
    return smooth_images(n, h, w, seed)


def tower_output(output):
    """Merged features from what a transformers tower returns (a pair in version 4, an object in 5)."""
    return output[0] if isinstance(output, tuple) else output.pooler_output


def official(pixels, spec):
    """Patch rows of transformers' torch image processor for square uint8 images, resized to spec.resolution."""
    from transformers import Qwen2VLImageProcessorFast

    limits = {"shortest_edge": (spec.resolution - 1) ** 2, "longest_edge": (spec.resolution + 1) ** 2}
    processor = Qwen2VLImageProcessorFast(
        size=limits,
        patch_size=spec.patch_size,
        merge_size=spec.merge_size,
        temporal_patch_size=spec.temporal_patch_size,
        image_mean=list(spec.mean),
        image_std=list(spec.std),
    )
    batch = processor(images=list(pixels.permute(0, 3, 1, 2)), return_tensors="pt")
    grid = spec.resolution // spec.patch_size
    assert batch["image_grid_thw"].tolist() == [[1, grid, grid]] * len(pixels)
    return batch["pixel_values"], batch["image_grid_thw"]


# --- the toy checkpoint ----------------------------------------------------------------------------------------------


def test_tiny_checkpoint_bytes_depend_on_the_spec_only(checkpoint, tmp_path):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again = make_tiny_qwen3vl(tmp_path / "again", SMALL)
    assert torch.equal(before, torch.get_rng_state())
    names = sorted(f.name for f in checkpoint.iterdir())
    assert names == sorted(f.name for f in again.iterdir())
    assert [n for n in names if (checkpoint / n).read_bytes() != (again / n).read_bytes()] == []
    other = make_tiny_qwen3vl(tmp_path / "other", TinySpec(**{**SMALL.__dict__, "seed": 1}))
    changed = {n for n in names if (checkpoint / n).read_bytes() != (other / n).read_bytes()}
    assert changed and all(n.endswith(".safetensors") for n in changed)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "other"]  # no temporary folder left
    with pytest.raises(UserError, match="exists"):
        make_tiny_qwen3vl(again, SMALL)


@pytest.mark.parametrize("sizes", [{"vision_width": 36, "vision_heads": 4}, {"out_width": 48}, {"vocabulary": 100}])
def test_tiny_refuses_sizes_that_do_not_divide(sizes):
    with pytest.raises(UserError, match=next(iter(sizes))):
        TinySpec(**sizes)


def test_tiny_checkpoint_loads_with_the_auto_classes(checkpoint, model):
    from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer

    config = AutoConfig.from_pretrained(checkpoint)
    assert config.model_type == "qwen3_vl" and config.vision_config.depth == SMALL.vision_depth
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = "Push the puck to the goal, 25 cm — schnell! 你好\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == config.image_token_id
    assert len(tokenizer) == config.text_config.vocab_size
    assert len(tokenizer("push the puck to the goal")["input_ids"]) == 6  # the words of the corpus are single tokens
    assert AutoImageProcessor.from_pretrained(checkpoint).patch_size == SMALL.patch_size

    processor = AutoProcessor.from_pretrained(checkpoint)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "open the drawer"}]}]
    prompt = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[prompt], images=[images(1)[0].numpy()], return_tensors="pt")
    assert int((inputs["input_ids"] == config.image_token_id).sum()) == (R // 32) ** 2
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 2


# --- preprocessing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("native, resolution", [(64, 64), (128, 96), (50, 64), (97, 64)])
@pytest.mark.parametrize(
    "mean, std",
    [
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ],
)
def test_preprocess_is_the_official_processor_bit_for_bit(native, resolution, mean, std):
    spec = ImageSpec(resolution, 16, 2, 2, mean, std)
    pixels = images(3, native, native)
    assert torch.equal(preprocess(pixels, spec).flatten(0, 1), official(pixels, spec)[0])


@pytest.mark.parametrize("h, w", [(48, 64), (64, 33), (1, 64)])
def test_padding_centres_the_image_on_black(h, w):
    pixels = images(2, h, w) // 2 + 100
    square = pad_to_square(pixels)
    side = max(h, w)
    top, left = (side - h) // 2, (side - w) // 2
    assert square.shape == (2, side, side, 3)
    assert torch.equal(square[:, top : top + h, left : left + w], pixels)
    assert int(square.sum()) == int(pixels.sum())  # everything else is zero
    spec = ImageSpec(64, 16, 2, 2, (0.5,) * 3, (0.5,) * 3)
    assert torch.equal(preprocess(pixels, spec), preprocess(square.numpy(), spec))


def test_preprocess_refuses_other_inputs():
    spec = ImageSpec(64, 16, 2, 2, (0.5,) * 3, (0.5,) * 3)
    channels_first = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    for bad in (torch.zeros(1, 64, 64, 3), channels_first, np.zeros((64, 64, 3), np.uint8)):
        with pytest.raises(ValueError, match="uint8 images"):
            preprocess(bad, spec)
    with pytest.raises(UserError, match="multiple of 32.*use 96"):
        ImageSpec(100, 16, 2, 2, (0.5,) * 3, (0.5,) * 3)


# --- features --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", [32, 64, 160])
def test_features_equal_transformers_forward(checkpoint, model, resolution):
    encoder = load_encoder(EncoderSpec(path=str(checkpoint), resolution=resolution))
    pixels = images(5, resolution, resolution)
    rows, grid = official(pixels, encoder.image)
    with torch.no_grad():
        wanted = tower_output(model.model.visual(rows, grid)).reshape(5, -1, SMALL.out_width)
        own = tower_output(encoder.vision(rows, grid)).reshape_as(wanted)  # proves the rebuilt rotary buffers
    features = encoder.encode_images(pixels)
    assert features.shape == (5, encoder.tokens, encoder.width) == wanted.shape
    assert wanted.std() > 0.1
    torch.testing.assert_close(features, wanted, rtol=0, atol=2e-5)
    torch.testing.assert_close(own, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("resolution", [64, 160])
def test_patch_features_are_the_last_blocks_output_row_by_row(checkpoint, model, resolution):
    encoder = load_encoder(EncoderSpec(path=str(checkpoint), resolution=resolution, features="patch"))
    pixels, side = images(3, resolution, resolution), resolution // 16
    rows, grid = official(pixels, encoder.image)
    seen = []
    hook = model.model.visual.blocks[-1].register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        model.model.visual(rows, grid)
    hook.remove()
    blocks = seen[0].reshape(3, side // 2, side // 2, 2, 2, -1)  # merge order: 2 x 2 neighbours together
    wanted = blocks.transpose(2, 3).reshape(3, side * side, -1)  # row by row
    features = encoder.encode_images(pixels)
    assert features.shape == (3, encoder.tokens, encoder.width) == (3, side * side, SMALL.vision_width)
    assert encoder.text_width == SMALL.out_width == encoder.encode_text(["push"])[0].shape[2]
    torch.testing.assert_close(features, wanted, rtol=0, atol=2e-5)
    whole = load_encoder(EncoderSpec(path=str(checkpoint), resolution=resolution))
    changed = encoder.fingerprint()
    assert [k for k, v in whole.fingerprint().items() if changed[k] != v] == ["features", "tokens"]
    merged = whole.vision.merger(
        blocks.reshape(-1, SMALL.vision_width)
    )  # the merger finishes what patch features begin
    torch.testing.assert_close(merged.reshape(3, -1, SMALL.out_width), whole.encode_images(pixels), rtol=0, atol=2e-5)


def test_pooling_196_tokens_to_49_is_the_mean_of_2_by_2_cells(checkpoint):
    whole, pooled = (load_encoder(EncoderSpec(path=str(checkpoint), resolution=448, tokens=t)) for t in (None, 49))
    features = whole.encode_images(images(1))  # [1,196,D], row by row
    assert (whole.tokens, pooled.tokens) == (196, 49) == (features.shape[1], pooled.null_image_features(1).shape[1])
    cells = features.reshape(1, 7, 2, 7, 2, -1).mean((2, 4)).flatten(1, 2)
    torch.testing.assert_close(pooled.encode_images(images(1)), cells)
    assert pooled.fingerprint() == whole.fingerprint() | {"tokens": 49}


@pytest.mark.parametrize("tokens", [0, -4, 5, 25])
def test_counts_that_cannot_be_pooled_are_refused_in_one_line(checkpoint, tokens):
    with pytest.raises(
        UserError, match=f"--tokens {tokens}: this model gives 16 tokens.*choose one of 1, 4, 9, 16$"
    ) as caught:
        load_encoder(EncoderSpec(path=str(checkpoint), resolution=128, tokens=tokens))
    assert "\n" not in str(caught.value)


def test_without_flash_attn_or_on_the_cpu_torchs_attention_is_used(monkeypatch):
    q, k, v = torch.randn(3, 2, 4, 9, 16, generator=torch.Generator().manual_seed(0))
    called = []
    monkeypatch.setattr(attention_module, "flash_kernel", lambda: called.append(1))
    for dtype in (torch.float32, torch.bfloat16):
        given = [x.to(dtype) for x in (q, k, v)]
        assert torch.equal(attention_module.attention(*given), F.scaled_dot_product_attention(*given))
    assert not called  # CPU tensors never ask for it
    weights = (q @ k.transpose(2, 3) / 4).softmax(-1)
    torch.testing.assert_close(attention_module.attention(q, k, v), weights @ v)


@pytest.mark.skipif(
    not torch.cuda.is_available() or attention_module.flash_kernel() is None, reason="needs CUDA and flash-attn"
)
@pytest.mark.parametrize("width", [64, 72])
def test_flash_attn_equals_torchs_attention_up_to_rounding(width):
    q, k, v = torch.randn(3, 2, 4, 100, width, generator=torch.Generator().manual_seed(0)).cuda().to(torch.bfloat16)
    flash = attention_module.attention(q, k, v)
    assert flash.shape == q.shape
    torch.testing.assert_close(flash, F.scaled_dot_product_attention(q, k, v), rtol=2e-2, atol=2e-2)


def test_flash_attn_is_called_with_heads_after_tokens(monkeypatch):
    """Its layout is [N,S,A,E]; shown with a stand-in, on tensors that say they are on CUDA."""

    class Cuda(torch.Tensor):
        is_cuda = True

    q, k, v = torch.randn(3, 2, 4, 9, 16, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)

    def kernel(*given):
        assert all(x.shape == (2, 9, 4, 16) for x in given)
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in given)).transpose(1, 2)

    monkeypatch.setattr(attention_module, "flash_kernel", lambda: kernel)
    out = attention_module.attention(*(x.as_subclass(Cuda) for x in (q, k, v))).as_subclass(torch.Tensor)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v))


def test_bfloat16_features_are_close(checkpoint, encoder):
    half = load_encoder(encoder.spec, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    real, rounded = encoder.encode_images(images(4)), half.encode_images(images(4))
    assert rounded.dtype == torch.bfloat16
    assert (real - rounded.float()).norm() < 0.03 * real.norm()
    assert half.fingerprint() == encoder.fingerprint() | {"dtype": "bfloat16"}


def test_images_of_a_batch_do_not_see_each_other_and_share_each_attention_call(encoder, monkeypatch):
    pixels = images(6)
    alone = torch.cat([encoder.encode_images(p[None]) for p in pixels])
    shapes = []
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: shapes.append(q.shape) or real(q, k, v))
    assert_same_features(encoder.encode_images(pixels), alone)
    assert shapes == [(6, SMALL.vision_heads, 16, 16)] * SMALL.vision_depth


def test_frozen_by_default_and_every_weight_learns_when_asked(encoder):
    assert not encoder.encode_images(images(2)).requires_grad
    encoder.vision.requires_grad_(True)
    encoder.encode_images(images(2)).square().sum().backward()
    assert [n for n, p in encoder.vision.named_parameters() if p.grad is None] == []
    assert encoder.vision.pos_embed.weight.grad.abs().sum() > 0


def test_text_is_the_embedding_rows(encoder, model):
    texts = ["push the puck to the goal", "", "open the drawer"]
    out, lengths = encoder.encode_text(texts)
    assert out.shape == (3, 6, SMALL.out_width) and lengths.tolist() == [6, 1, 3]
    table = model.get_input_embeddings()
    for text, row, length in zip(texts, out, lengths):
        ids = encoder.tokenizer(text or "<|endoftext|>")["input_ids"]
        assert torch.equal(row[:length], table(torch.tensor(ids)))
        assert not row[length:].any()


def test_null_features_are_those_of_any_black_image(encoder):
    black = encoder.encode_images(np.zeros((1, 40, 120, 3), np.uint8))[0]
    assert torch.equal(encoder.null_image_features(2), torch.stack([black, black]))


# --- loading ---------------------------------------------------------------------------------------------------------


def files_of(folder):
    """(files without a vision or embedding tensor, all files)."""
    return weight_files(folder, lambda name: name == EMBEDDING_NAME or "visual" in name)


def test_language_shards_may_be_missing(copied, encoder):
    spare, _ = files_of(copied)
    assert spare
    for file in spare:
        (copied / file).unlink()
    other = load_encoder(EncoderSpec(path=str(copied), resolution=R))
    assert other.fingerprint() == encoder.fingerprint()
    assert torch.equal(other.encode_images(images(2)), encoder.encode_images(images(2)))


def test_a_checkpoint_in_one_file_needs_no_index(copied, encoder):
    tensors = {}
    for file in sorted(copied.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (copied / "model.safetensors.index.json").unlink()
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    assert load_encoder(EncoderSpec(path=str(copied), resolution=R)).fingerprint() == encoder.fingerprint()
    tensors.pop(EMBEDDING_NAME)
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks weights.*embed_tokens"):
        load_encoder(EncoderSpec(path=str(copied), resolution=R))


def test_the_processor_file_of_transformers_5_is_understood(copied, encoder):
    old = copied / "preprocessor_config.json"
    values = json.loads(old.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}
    old.unlink()
    (copied / "processor_config.json").write_text(json.dumps({"image_processor": values}))
    other = load_encoder(EncoderSpec(path=str(copied), resolution=R))
    assert other.fingerprint() == encoder.fingerprint() | {"image_mean": [0.1, 0.2, 0.3]}


def damage(folder, kind):
    spare, files = files_of(folder)
    needed = next(f for f in files if f not in spare)
    if kind == "missing shard":
        (folder / needed).unlink()
        return needed
    if kind == "truncated shard":
        (folder / needed).write_bytes((folder / needed).read_bytes()[:-1000])
        return needed
    if kind == "other model":
        (folder / "config.json").write_text('{"model_type": "llama"}')
        return "llama"
    if kind == "other sizes":
        config = json.loads((folder / "config.json").read_text())
        config["vision_config"]["intermediate_size"] *= 2
        (folder / "config.json").write_text(json.dumps(config))
        return "do not fit its config"
    if kind == "no config":
        (folder / "config.json").unlink()
        return "config.json"
    if kind == "no tokenizer":
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
            (folder / name).unlink()
        return "tokenizer"
    (folder / "preprocessor_config.json").write_text("{")
    return "not valid JSON"


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_code_of_a_checkpoint_is_never_run(copied, tmp_path, monkeypatch, file):
    """Not even after a "y" on standard input, which transformers asks for where nothing is said."""
    (copied / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nOwn = object\n")
    document = json.loads((copied / file).read_text())
    name = "AutoTokenizer" if "tokenizer" in file else "AutoConfig"
    document |= {"auto_map": {name: ["own.Own", None] if "tokenizer" in file else "own.Own"}, "tokenizer_class": "Own"}
    if file == "config.json":
        document |= {"model_type": "qwen3_vl_own"}
    (copied / file).write_text(json.dumps(document))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(UserError, match="never run|checkpoint; --vlm"):
        load_encoder(EncoderSpec(path=str(copied), resolution=R))
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_saved_by_transformers_5_is_the_same(copied):
    texts = ("push the ü button", "", "<|vision_start|>x<|im_end|>")
    expected = [load_tokenizer(copied, str(copied), 10**6)(text).input_ids for text in texts]
    document = json.loads((copied / "tokenizer_config.json").read_text())
    document["extra_special_tokens"] = document.pop("additional_special_tokens", None) or ["<|vision_start|>"]
    (copied / "tokenizer_config.json").write_text(json.dumps(document))
    assert [load_tokenizer(copied, str(copied), 10**6)(text).input_ids for text in texts] == expected


@pytest.mark.parametrize(
    "kind", ["missing shard", "truncated shard", "other model", "other sizes", "no config", "no tokenizer", "bad json"]
)
def test_a_damaged_checkpoint_is_named_in_one_line(copied, kind):
    wanted = damage(copied, kind)
    with pytest.raises(UserError, match=wanted) as caught:
        load_encoder(EncoderSpec(path=str(copied), resolution=R))
    assert "\n" not in str(caught.value)


def test_bad_paths_and_models_are_refused(tmp_path, monkeypatch):
    import huggingface_hub

    with pytest.raises(UserError, match="does not exist"):
        load_encoder(EncoderSpec(path=str(tmp_path / "nothing")))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="cannot get owner/name from the hub: give a local checkpoint folder") as caught:
        load_encoder(EncoderSpec(path="owner/name"))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="did you mean 'qwen3vl'"):
        encoder_spec("qwen3-vl")
    with pytest.raises(UserError, match="--vlm-path"):
        encoder_spec("tiny_qwen3vl")
    assert encoder_spec("qwen3vl") == EncoderSpec(path="Qwen/Qwen3-VL-2B-Instruct", resolution=448)
    assert encoder_spec("tiny_qwen3vl", path="x", resolution=96, revision=None).resolution == 96


def test_from_the_hub_only_the_needed_files_are_asked_for(checkpoint, encoder, monkeypatch, tmp_path):
    import fnmatch

    import huggingface_hub

    asked = []

    def download(repo, revision, allow_patterns):
        asked.append((repo, revision))
        for file in checkpoint.iterdir():
            if any(fnmatch.fnmatch(file.name, p) for p in allow_patterns):
                shutil.copy(file, tmp_path)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    other = load_encoder(EncoderSpec(path="owner/name", revision="v1", resolution=R))
    assert set(asked) == {("owner/name", "v1")}
    spare, files = files_of(checkpoint)
    assert {f.name for f in tmp_path.glob("*.safetensors")} == set(files) - set(spare)
    assert other.fingerprint() == encoder.fingerprint()


def test_fingerprint_follows_what_features_depend_on(copied, encoder):
    base = encoder.fingerprint()
    assert json.loads(json.dumps(base)) == base
    wide = load_encoder(EncoderSpec(path=str(copied), resolution=96)).fingerprint()
    assert wide == base | {"resolution": 96, "tokens": 9}
    for file in sorted(copied.glob("*.safetensors")):
        with safe_open(file, framework="pt") as f:
            if "model.visual.merger.linear_fc2.bias" in f.keys():
                break
    tensors = load_file(file)
    tensors["model.visual.merger.linear_fc2.bias"][0] += 1e-6
    save_file(tensors, file, metadata={"format": "pt"})
    changed = load_encoder(EncoderSpec(path=str(copied), resolution=R)).fingerprint()
    assert [k for k in base if base[k] != changed[k]] == ["weights_sha256"]


# --- LoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets, last, layers", [("qv", None, 3), ("attention", None, 6), ("attention", 1, 2), ("all-linear", 2, 10)]
)
def test_a_fresh_adapter_changes_nothing_and_is_all_that_learns(encoder, targets, last, layers):
    base, before = encoder.encode_images(images(3)), encoder.fingerprint()
    add_lora(encoder, LoraSpec(r=4, targets=targets, last_n_blocks=last))
    features = encoder.encode_images(images(3))
    assert torch.equal(features, base)
    names = [n for n, _ in lora_parameters(encoder)]
    assert len(names) == 2 * layers
    assert ["vision." + n for n in names] == [n for n, p in encoder.named_parameters() if p.requires_grad]
    features.square().sum().backward()
    gradients = {n: p.grad for n, p in lora_parameters(encoder) if "lora_B" in n}
    assert all(g.abs().sum() > 0 for g in gradients.values())
    for name, gradient in gradients.items():
        if ".qkv." in name:
            assert [bool(g.any()) for g in gradient.chunk(3)] == [True, targets != "qv", True]
    changed = encoder.fingerprint()
    assert [k for k in before if before[k] != changed[k]] == ["adapter"]


def test_dropout_is_a_function_of_the_key_and_ends_with_the_step(encoder):
    adapted = trained_adapter(encoder, LoraSpec(r=4, dropout=0.5))
    state = torch.get_rng_state()

    def dropped(key):
        with lora_dropout(encoder, key):
            return encoder.encode_images(images(3))

    first, again, other = (dropped(key) for key in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(first, adapted)
    assert torch.equal(encoder.encode_images(images(3)), adapted) and torch.equal(torch.get_rng_state(), state)
    with pytest.raises(UserError, match="dropout is 1; it must be"):
        LoraSpec(dropout=1)
    with pytest.raises(UserError, match="unknown LoRA target 'q'"):
        LoraSpec(targets="q")


def trained_adapter(encoder, spec):
    add_lora(encoder, spec)
    with torch.no_grad():
        for i, (_, p) in enumerate(lora_parameters(encoder)):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return encoder.encode_images(images(3))


def test_adapter_round_trip_and_merge(encoder, tmp_path):
    base = encoder.encode_images(images(3))
    adapted = trained_adapter(encoder, LoraSpec(r=4, alpha=8, targets="all-linear"))
    assert not torch.allclose(adapted, base, atol=1e-2)
    save_adapter(encoder, tmp_path / "lora")
    assert sorted(p.name for p in tmp_path.rglob("*")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "identity.json",
        "lora",
    ]
    with pytest.raises(UserError, match="exists"):
        save_adapter(encoder, tmp_path / "lora")

    fresh = load_encoder(encoder.spec)
    load_lora(fresh, tmp_path / "lora")
    assert torch.equal(fresh.encode_images(images(3)), adapted)
    assert fresh.fingerprint() == encoder.fingerprint()
    learning = [n for n, p in fresh.named_parameters() if p.requires_grad]
    assert learning == ["vision." + n for n, _ in lora_parameters(encoder)]
    with pytest.raises(ValueError, match="already"):
        add_lora(fresh, LoraSpec())

    merge_lora(fresh)
    assert not list(lora_parameters(fresh)) and not any(p.requires_grad for p in fresh.parameters())
    torch.testing.assert_close(fresh.encode_images(images(3)), adapted, rtol=0, atol=1e-4)
    assert fresh.fingerprint() == encoder.fingerprint()
    with pytest.raises(ValueError, match="no LoRA adapter"):
        merge_lora(fresh)


def test_adapters_that_do_not_fit_are_refused(encoder, checkpoint, tmp_path):
    add_lora(encoder, LoraSpec(r=2))
    save_adapter(encoder, tmp_path / "lora")
    wide = make_tiny_qwen3vl(tmp_path / "wide", TinySpec(**{**SMALL.__dict__, "vision_width": 64}))
    with pytest.raises(UserError, match="does not fit this model"):
        load_lora(load_encoder(EncoderSpec(path=str(wide), resolution=R)), tmp_path / "lora")
    fresh = load_encoder(encoder.spec)
    with pytest.raises(UserError, match="adapter_config.json is missing"):
        load_lora(fresh, checkpoint)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match="damaged"):
        load_lora(fresh, tmp_path / "lora")
    assert fresh.adapter is None
    with pytest.raises(UserError, match="give 1 to 3"):
        add_lora(fresh, LoraSpec(last_n_blocks=4))
    with pytest.raises(UserError, match="r is 0"):
        LoraSpec(r=0)


def test_the_code_version_is_in_the_fingerprint(encoder, monkeypatch):
    before = encoder.fingerprint()
    monkeypatch.setattr(encoder_module, "ENCODER_CODE_VERSION", -1)
    assert encoder.fingerprint() == before | {"code_version": -1}
