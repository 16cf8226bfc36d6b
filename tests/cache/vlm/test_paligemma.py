"""PaliGemma 2 as an encoder: toy checkpoint, preprocessing, features against transformers, loading, LoRA, a build."""

from __future__ import annotations

import copy
import json
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file

from dvla.cache.vlm.adapter import save_adapter
from dvla.cache.vlm.load import load_encoder
from dvla.cache.vlm.lora import add_lora, load_lora, lora_parameters, merge_lora
from dvla.cache.vlm.paligemma2.encoder import EMBEDDING_NAME, canonical
from dvla.cache.vlm.preprocess import ImageSpec, preprocess
from dvla.cache.vlm.spec import EncoderSpec, LoraSpec, encoder_spec
from dvla.cache.vlm.tiny_paligemma2 import TinyPaliGemmaSpec, make_tiny_paligemma2
from dvla.errors import UserError
from support.lerobot_samples import LENGTHS
from support.tolerances import assert_same_features
from support.vlm_samples import smooth_images, weight_files

R = 56  # resolution of most tests: 16 patches of 14 pixels
SMALL = TinyPaliGemmaSpec(
    vision_depth=3, vision_width=32, vision_heads=2, image_size=R, out_width=96, vocabulary=600
)  # sqrt(96) rounds
TEXTS = ["push the puck to the goal", "", "open the drawer"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny_paligemma2(tmp_path_factory.mktemp("vlm") / "tiny", SMALL)


@pytest.fixture
def copied(checkpoint, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(checkpoint, tmp_path / "copy")


@pytest.fixture(scope="module")
def model(checkpoint):
    """transformers' own complete model; eager attention, since its others leave out Gemma 2's soft caps."""
    from transformers import PaliGemmaForConditionalGeneration

    found, info = PaliGemmaForConditionalGeneration.from_pretrained(
        checkpoint, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return found.eval()


def spec_of(folder, **changes):
    return EncoderSpec(**{"path": str(folder), "vlm": "paligemma2", "resolution": R, **changes})


@pytest.fixture
def encoder(checkpoint):
    return load_encoder(spec_of(checkpoint))


def images(n, h=R, w=R, seed=0):
    return smooth_images(n, h, w, seed)


def official(pixels, resolution, mean=0.5, std=0.5):
    """float32 [N,3,R,R] of transformers' torch image processor for square uint8 images."""
    from transformers import SiglipImageProcessorFast

    processor = SiglipImageProcessorFast(
        size={"height": resolution, "width": resolution}, image_mean=[mean] * 3, image_std=[std] * 3
    )
    return processor(images=list(pixels.permute(0, 3, 1, 2)), return_tensors="pt")["pixel_values"]


def run(model, tokenizer, views, instruction):
    """(input of Gemma's first layer, its last hidden state), each [1,V*S+Lt,D], of transformers on one observation."""
    seen = []
    hook = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    places = len(views) * (R // 14) ** 2
    ids = tokenizer("<image>" * places + f"<bos>{instruction}\n", add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        prefix = torch.zeros_like(ids["input_ids"])  # all of it: every token sees every other
        out = model.model(
            **ids, token_type_ids=prefix, pixel_values=torch.cat([official(v, R) for v in views]).to(model.dtype)
        )
    hook.remove()
    return seen[0], out.last_hidden_state


# --- the toy checkpoint ----------------------------------------------------------------------------------------------


def test_the_toy_is_a_paligemma_2_that_transformers_runs(checkpoint, model, encoder):
    from transformers import AutoProcessor, PaliGemmaProcessor

    processor = AutoProcessor.from_pretrained(checkpoint)
    assert isinstance(processor, PaliGemmaProcessor) and type(model.model.language_model).__name__ == "Gemma2Model"
    assert len(processor.tokenizer) == model.config.text_config.vocab_size  # nothing had to be added
    inputs = processor(images=[images(1)[0].numpy()], text="<image>open the drawer", return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(model.config.image_token_id) == 16
    assert ids[16:] == load_encoder(spec_of(checkpoint, depth="language")).prompt("open the drawer")
    assert processor.tokenizer.decode(ids[17:]) == "open the drawer\n" and processor.tokenizer.unk_token_id not in ids
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] <= len(ids) + 2


def test_the_same_spec_gives_the_same_bytes(checkpoint, tmp_path):
    again = make_tiny_paligemma2(tmp_path / "again", SMALL)
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {p.name: p.read_bytes() for p in checkpoint.iterdir()}
    with pytest.raises(UserError, match="exists already"):
        make_tiny_paligemma2(again, SMALL)
    with pytest.raises(UserError, match="must be a multiple"):
        TinyPaliGemmaSpec(image_size=100)


# --- preprocessing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("native, resolution", [(56, 56), (128, 56), (40, 56), (97, 112)])
@pytest.mark.parametrize("mean, std", [(0.5, 0.5), (0.4, 0.27)])
def test_preprocess_is_the_official_processor_bit_for_bit(native, resolution, mean, std):
    pixels = images(3, native, native)
    rows = preprocess(pixels, ImageSpec(resolution, 14, 1, 1, (mean,) * 3, (std,) * 3))  # [3,S,3*14*14]
    cut = F.unfold(official(pixels, resolution, mean, std), 14, stride=14).transpose(
        1, 2
    )  # the convolution's own order
    assert torch.equal(rows, cut)


# --- features --------------------------------------------------------------------------------------------------------


def test_features_are_what_the_language_model_is_given(model, encoder):
    pixels = images(4)
    with torch.no_grad():
        found = model.model.get_image_features(official(pixels, R))
    found = found if isinstance(found, torch.Tensor) else found.pooler_output  # an object in version 5
    divided_by = 96**0.5 if Version(transformers.__version__) < Version("5.4") else 1.0
    given, _ = run(model, encoder.tokenizer, [pixels[:1]], TEXTS[0])
    features = encoder.encode_images(pixels)
    assert features.shape == (4, 16, 96) == (4, encoder.tokens, encoder.width) and features.std() > 0.1
    torch.testing.assert_close(features[:1], given[:, :16], rtol=0, atol=2e-5)
    torch.testing.assert_close(features, found * divided_by, rtol=0, atol=2e-5)
    text, lengths = encoder.encode_text(TEXTS)
    assert torch.equal(text[0, : lengths[0]], given[0, 17 : 17 + lengths[0]])  # after the image tokens and <bos>


def test_text_features_carry_gemmas_scale_in_its_rounding(checkpoint, model, encoder):
    table, pad = model.get_input_embeddings().weight, encoder.tokenizer.pad_token_id
    for dtype in (torch.float32, torch.bfloat16):
        out, lengths = load_encoder(encoder.spec, dtype=dtype).encode_text(TEXTS)
        assert out.dtype == dtype and lengths.tolist()[1] == 1
        for text, row, length in zip(TEXTS, out, lengths):
            ids = encoder.tokenizer(text, add_special_tokens=False)["input_ids"] or [pad]
            wanted = table[ids].to(dtype) * torch.tensor(96**0.5, dtype=dtype)  # as Gemma2Model.forward
            assert torch.equal(row[:length], wanted) and not row[length:].any()
    half = load_encoder(encoder.spec, dtype=torch.bfloat16)
    given, _ = run(copy.deepcopy(model).to(torch.bfloat16), encoder.tokenizer, [images(1)], TEXTS[0])
    text, lengths = half.encode_text(TEXTS[:1])
    assert torch.equal(text[0], given[0, 17 : 17 + lengths[0]])
    real, rounded = encoder.encode_images(images(4)), half.encode_images(images(4))
    assert rounded.dtype == torch.bfloat16 and (real - rounded.float()).norm() < 0.03 * real.norm()
    assert half.fingerprint() == encoder.fingerprint() | {"dtype": "bfloat16"}


@pytest.mark.parametrize("resolution", [28, 56, 98])
def test_patch_features_are_siglips_output_at_any_resolution(checkpoint, model, resolution):
    encoder = load_encoder(spec_of(checkpoint, resolution=resolution, features="patch"))
    pixels = images(2, resolution, resolution)
    with torch.no_grad():
        wanted = model.model.vision_tower(official(pixels, resolution), interpolate_pos_encoding=True).last_hidden_state
    features = encoder.encode_images(pixels)
    assert features.shape == (2, (resolution // 14) ** 2, 32) == (2, encoder.tokens, encoder.width)
    assert encoder.text_width == 96 == encoder.encode_text(TEXTS)[0].shape[2]
    torch.testing.assert_close(features, wanted, rtol=0, atol=2e-5)
    own = encoder.vision.siglip  # proves the rebuilt buffers
    if resolution == R:
        torch.testing.assert_close(own(official(pixels, R)).last_hidden_state, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("instruction", TEXTS)
def test_language_depth_is_gemmas_last_hidden_state_over_the_image_tokens(checkpoint, model, instruction):
    encoder = load_encoder(spec_of(checkpoint, depth="language"))
    views = [images(2, seed=1), images(2, seed=2)]
    features = encoder.encode_observation(views, instruction)  # [N,V,K,D]
    assert features.shape == (2, 2, 16, 96) and not features.requires_grad
    for i in range(2):
        _, last = run(model, encoder.tokenizer, [v[i : i + 1] for v in views], instruction)
        torch.testing.assert_close(features[i].flatten(0, 1), last[0, :32], rtol=0, atol=2e-4)
    other = encoder.encode_observation(views, instruction + " slowly")
    assert (features - other).abs().amax((0, 2, 3)).min() > 1e-3  # every view's features depend on it
    changed = encoder.encode_observation([views[0], 255 - views[1]], instruction)
    assert (features - changed)[:, 0].abs().max() > 1e-3  # and on the other views


def test_language_depth_pools_and_takes_cameras_of_any_size_but_not_single_images(checkpoint, tmp_path):
    whole, pooled = (load_encoder(spec_of(checkpoint, depth="language", tokens=t)) for t in (None, 4))
    views = [images(1), images(1, 40, 70)]
    wanted = whole.encode_observation(views, "push").reshape(1, 2, 2, 2, 2, 2, 96).mean((3, 5)).flatten(2, 3)
    torch.testing.assert_close(pooled.encode_observation(views, "push"), wanted)
    with pytest.raises(UserError, match="depth vision"):
        whole.encode_images(views[0])
    plain = load_encoder(spec_of(checkpoint))
    apart = torch.stack([plain.encode_images(v) for v in views], 1)
    assert (
        torch.equal(plain.encode_observation(views, "push"), apart)
        and not plain.by_observation
        and whole.by_observation
    )
    with pytest.raises(UserError, match="more than the 8192"):
        whole.encode_observation([views[0]] * 512, "push")
    with pytest.raises(UserError, match="8176 image tokens and a prompt of .* are more than the 8192"):
        whole.require_fits(511, ["push", "push " * 20])
    whole.require_fits(500, ["push", "push " * 20])
    plain.require_fits(5000, ["push"])
    for bad in ({"features": "patch"}, {"deepstack": True}):
        with pytest.raises(UserError, match="depth language needs features merged"):
            spec_of(checkpoint, depth="language", **bad)


def test_pooling_averages_cells_of_the_grid(checkpoint, encoder):
    pooled = load_encoder(spec_of(checkpoint, tokens=4))
    whole = encoder.encode_images(images(3))  # [3,16,96], row by row
    cells = whole.reshape(3, 2, 2, 2, 2, 96).mean((2, 4)).reshape(3, 4, 96)
    torch.testing.assert_close(pooled.encode_images(images(3)), cells)
    with pytest.raises(UserError, match="--tokens 5.*choose one of 1, 4, 9, 16") as caught:
        load_encoder(spec_of(checkpoint, tokens=5))
    assert "\n" not in str(caught.value)


def test_null_features_frozen_weights_and_the_batch(encoder):
    black = encoder.encode_images(np.zeros((1, 40, 120, 3), np.uint8))[0]
    assert torch.equal(encoder.null_image_features(2), torch.stack([black, black]))
    assert not black.requires_grad and not any(p.requires_grad for p in encoder.parameters())
    alone = torch.cat([encoder.encode_images(p[None]) for p in images(4)])
    assert_same_features(encoder.encode_images(images(4)), alone)
    encoder.vision.requires_grad_(True)
    encoder.encode_images(images(2)).square().sum().backward()
    assert [n for n, p in encoder.vision.named_parameters() if p.grad is None] == []


# --- loading ---------------------------------------------------------------------------------------------------------


def files_of(folder):
    """(files without a vision or embedding tensor, all files)."""
    return weight_files(folder, canonical)


def test_language_shards_may_be_missing_unless_they_are_asked_for(copied, encoder):
    spare, _ = files_of(copied)
    assert spare
    for file in spare:
        (copied / file).unlink()
    other = load_encoder(spec_of(copied))
    assert other.fingerprint() == encoder.fingerprint()
    assert torch.equal(other.encode_images(images(2)), encoder.encode_images(images(2)))
    with pytest.raises(UserError, match=f"{spare[0]}.*missing"):
        load_encoder(spec_of(copied, depth="language"))


def in_layout(name, kind):
    """A hub tensor's name as other versions of transformers store it."""
    if kind == "one model":  # everything under "model."
        return "model." + name.replace("language_model.model.", "language_model.")
    return "model." + re.sub(r"^(vision_tower|language_model)\.(vision_model|model)\.", r"\1.", name)


@pytest.mark.parametrize("kind", ["one model", "flat"])
def test_other_layouts_of_the_same_weights_are_the_same_encoder(copied, encoder, kind):
    tensors = {}
    for file in sorted(copied.glob("*.safetensors")):
        tensors |= {in_layout(canonical(n, layers=99, norm=True) or n, kind): t for n, t in load_file(file).items()}
        file.unlink()
    tensors["lm_head.weight"] = torch.zeros(1)
    tensors[in_layout("vision_tower.vision_model.head.probe", kind)] = torch.zeros(1)
    (copied / "model.safetensors.index.json").unlink()
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    for depth in ("vision", "language"):
        old, new = (load_encoder(spec_of(f, depth=depth)) for f in (encoder.spec.path, copied))
        assert new.fingerprint() == old.fingerprint()
    assert torch.equal(load_encoder(spec_of(copied)).encode_images(images(2)), encoder.encode_images(images(2)))
    tensors.pop(in_layout(EMBEDDING_NAME, kind))
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match="lacks weights of a PaliGemma 2 model: language_model.model.embed_tokens.weight"
    ):
        load_encoder(spec_of(copied))


@pytest.mark.parametrize(
    "kind, wanted",
    [
        ("other model", "'qwen3_vl' checkpoint; --vlm paligemma2 needs model_type 'paligemma'"),
        ("first paligemma", "'gemma' checkpoint; --vlm paligemma2 needs text_config.model_type 'gemma2'"),
        ("other sizes", "do not fit its config"),
        ("no tokenizer", "has no tokenizer"),
        ("missing shard", "is incomplete"),
        ("truncated shard", "is damaged"),
        ("no processor", "processor_config.json"),
    ],
)
def test_a_damaged_checkpoint_is_named_in_one_line(copied, kind, wanted):
    spare, files = files_of(copied)
    shard = copied / next(f for f in files if f not in spare)
    config = json.loads((copied / "config.json").read_text())
    if kind == "other model":
        config["model_type"] = "qwen3_vl"
    elif kind == "first paligemma":
        config["text_config"]["model_type"] = "gemma"
    elif kind == "other sizes":
        config["vision_config"]["intermediate_size"] *= 2
    elif kind == "no tokenizer":
        (copied / "tokenizer.json").unlink()
    elif kind == "no processor":
        (copied / "preprocessor_config.json").unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-1000])
        if kind == "missing shard":
            shard.unlink()
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=wanted) as caught:
        load_encoder(spec_of(copied))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="multiple of 14"):
        load_encoder(spec_of(copied, resolution=60)) if kind == "truncated shard" else ImageSpec(
            60, 14, 1, 1, (0,) * 3, (1,) * 3
        )


def test_specs_and_the_fingerprint(checkpoint, copied, encoder):
    assert encoder_spec("paligemma2") == EncoderSpec("google/paligemma2-3b-mix-448", "paligemma2", resolution=448)
    assert encoder_spec("tiny_paligemma2", path="x") == EncoderSpec("x", "paligemma2", resolution=112, dtype="float32")
    base = encoder.fingerprint()
    assert json.loads(json.dumps(base)) == base and base["vlm"] == "paligemma2"

    def differ(**changes):
        other = load_encoder(spec_of(checkpoint, **changes)).fingerprint()
        return sorted(k for k in base if base[k] != other[k])

    assert differ(resolution=28) == ["resolution", "tokens"] and differ(tokens=4) == ["tokens"]
    assert differ(features="patch") == ["features"] and differ(depth="language") == [
        "depth",
        "vision_config",
        "weights_sha256",
    ]
    for file in copied.glob("*.safetensors"):
        tensors = load_file(file)
        if "multi_modal_projector.linear.bias" in tensors:
            tensors["multi_modal_projector.linear.bias"][0] += 1e-6
            save_file(tensors, file, metadata={"format": "pt"})
    changed = load_encoder(spec_of(copied)).fingerprint()
    assert [k for k in base if base[k] != changed[k]] == ["weights_sha256"]


# --- LoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "features, targets, last, layers",
    [
        ("merged", "qv", None, 6),
        ("merged", "attention", None, 12),
        ("merged", "attention", 1, 4),
        ("merged", "all-linear", 2, 13),
        ("patch", "all-linear", 2, 12),
    ],
)
def test_a_fresh_adapter_changes_nothing_and_is_all_that_learns(checkpoint, features, targets, last, layers):
    encoder = load_encoder(spec_of(checkpoint, features=features))
    base, before = encoder.encode_images(images(3)), encoder.fingerprint()
    add_lora(encoder, LoraSpec(r=4, targets=targets, last_n_blocks=last))
    out = encoder.encode_images(images(3))
    assert torch.equal(out, base)
    names = [n for n, _ in lora_parameters(encoder)]
    assert len(names) == 2 * layers
    assert ["vision." + n for n in names] == [n for n, p in encoder.named_parameters() if p.requires_grad]
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in lora_parameters(encoder) if "lora_B" in n)
    changed = encoder.fingerprint()
    assert [k for k in before if before[k] != changed[k]] == ["adapter"]


def test_at_language_depth_the_gradient_reaches_the_adapter_through_a_frozen_gemma(checkpoint):
    encoder, views = (
        load_encoder(spec_of(checkpoint, depth="language")),
        [images(2, seed=1), images(2, 40, 70, seed=2)],
    )
    base = encoder.encode_observation(views, "push")
    add_lora(encoder, LoraSpec(r=4, targets="all-linear"))
    out = encoder.encode_observation(views, "push")  # [2,2,16,96]
    assert torch.equal(out, base)
    (
        out[:, 0] * torch.randn(out[:, 0].shape, generator=torch.Generator().manual_seed(0))
    ).sum().backward()  # of one view alone
    named = dict(lora_parameters(encoder))
    assert all(p.grad.abs().sum() > 0 for n, p in named.items() if "lora_B" in n)
    assert {n for n, p in encoder.named_parameters() if p.grad is not None} == {"vision." + n for n in named}
    before = encoder.fingerprint()
    with torch.no_grad():
        next(p for n, p in named.items() if "lora_B" in n).add_(0.05)
    assert not torch.equal(encoder.encode_observation(views, "push"), base)
    assert [k for k, v in encoder.fingerprint().items() if before[k] != v] == ["adapter"]


def test_adapter_round_trip_merge_and_learning(checkpoint, encoder, tmp_path):
    add_lora(encoder, LoraSpec(r=4, alpha=8, targets="all-linear"))
    target = load_encoder(encoder.spec).encode_images(images(3, seed=3))
    optimizer = torch.optim.Adam([p for _, p in lora_parameters(encoder)], 0.01)
    losses = []
    for _ in range(8):
        loss = (encoder.encode_images(images(3)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    with torch.no_grad():
        adapted = encoder.encode_images(images(3))
    save_adapter(encoder, tmp_path / "lora")
    fresh = load_encoder(encoder.spec)
    load_lora(fresh, tmp_path / "lora", trainable=False)
    assert torch.equal(fresh.encode_images(images(3)), adapted) and fresh.fingerprint() == encoder.fingerprint()
    merge_lora(fresh)
    torch.testing.assert_close(fresh.encode_images(images(3)), adapted, rtol=0, atol=1e-4)
    wide = make_tiny_paligemma2(tmp_path / "wide", TinyPaliGemmaSpec(**{**SMALL.__dict__, "vision_width": 64}))
    with pytest.raises(UserError, match="does not fit this model"):
        load_lora(load_encoder(spec_of(wide)), tmp_path / "lora")


# --- from a recording to a policy ------------------------------------------------------------------------------------


def first_observation(source):
    """The first frame of a recording, as a robot would show it."""
    from dvla.cache.readers import open_source
    from dvla.stages.simulation.envs import Observation

    episode = open_source(str(source)).load(0)
    return Observation({v.name: next(v.frames(0, 1)) for v in episode.views}, episode.instruction, episode.state[0])


@pytest.mark.parametrize("vlm", ["paligemma2", "qwen3vl"])
def test_patch_features_through_build_training_live_features_and_policy(recorded, checkpoint, tmp_path, vlm):
    """Their width is the vision tower's, while text keeps the language model's."""
    from dvla.cache.loader.loader import gather
    from dvla.cache.store.cache import Cache
    from dvla.cache.vlm.tiny_qwen3vl import TinySpec, make_tiny_qwen3vl
    from dvla.common.config import from_mapping
    from dvla.stages.caching.build import build
    from dvla.stages.caching.config import BuildConfig
    from dvla.stages.caching.upkeep.verify import verify
    from dvla.stages.policy.policy import Policy
    from dvla.stages.training.config import TrainConfig
    from dvla.stages.training.stage_three.finetune import finetune, finetune_config
    from dvla.stages.training.train import train

    if vlm == "qwen3vl":
        checkpoint = make_tiny_qwen3vl(
            tmp_path / "qwen", TinySpec(vision_depth=2, vision_width=32, vision_heads=2, out_width=96)
        )
    spec = spec_of(checkpoint, vlm=vlm, resolution=56 if vlm == "paligemma2" else 64, features="patch", tokens=4)
    source, out = str(recorded["h264"]), tmp_path / "cache"
    build(BuildConfig((source,), spec, out, batch_size=8, device="cpu"))
    cache = Cache.open(out)
    assert (cache.tokens, cache.width, cache.text_width) == (4, 32, 96)
    batch = gather(cache, np.zeros(3, np.int64), np.arange(3), 4, dropped=(np.array([True, False, False]),) * 3)
    assert batch.tokens.shape == (3, 8, 32) and batch.text.shape[2] == 96
    wanted, lengths = load_encoder(spec).encode_text(cache.datasets[0].instructions[:1])
    torch.testing.assert_close(batch.text[1, : lengths[0]], wanted[0].half())
    problems, check = verify(out, live=4, device="cpu")
    assert not problems and check.relative < 1e-3
    run = from_mapping(
        TrainConfig,
        {
            "cache": str(out),
            "out": str(tmp_path / "two"),
            "steps": 2,
            "batch_size": 2,
            "model_size": "tiny",
            "device": "cpu",
        },
    )
    train(run, say=lambda _: None)
    again = finetune_config(
        tmp_path / "two", (source,), LoraSpec(r=2, targets="all-linear"), {"out": str(tmp_path / "three"), "steps": 1}
    )
    _, continuity = finetune(again, say=lambda _: None)
    assert continuity.jump < 1e-3
    policy = Policy.from_pretrained(tmp_path / "three")
    assert policy.net.config.text_width == 96 and policy.net.config.feature_width == 32
    assert np.isfinite(policy.act_batch([first_observation(source)])).all()


def test_build_verify_train_finetune_and_act(recorded, tmp_path, monkeypatch):
    from dvla.cache.store.cache import Cache
    from dvla.cli import run as command
    from dvla.stages.policy.policy import Policy

    monkeypatch.chdir(tmp_path)

    def dvla(line: str) -> None:
        command(line.split())

    data = recorded["h264"]
    dvla("vlm tiny --arch paligemma2 --out vlm")
    build = f"cache build {data} --vlm tiny_paligemma2 --vlm-path vlm --tokens 16 --device cpu"
    dvla(f"{build} --out cache")
    with pytest.raises(UserError, match="features: unknown value 'pach'; did you mean 'patch'"):
        dvla(f"{build} --features pach --out other")
    dvla("cache verify cache --live 8 --device cpu")  # exits 1 when something differs
    cache = Cache.open(tmp_path / "cache")
    assert (cache.tokens, cache.width, cache.datasets[0].frames) == (16, 128, sum(LENGTHS))
    dvla("train --from-cache cache --out runs/two --model-size tiny --steps 2 --batch-size 4 --device cpu")
    dvla(f"finetune runs/two --source {data} --out runs/three --steps 1 --batch-size 2 --device cpu")
    policy = Policy.from_pretrained(tmp_path / "runs/three")
    assert np.isfinite(policy.act_batch([first_observation(recorded["h264"])])).all()
