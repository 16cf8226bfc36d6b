"""LoRA in a stack of vision blocks and language layers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dvla.cache.vlm.adapter import load_adapter, save_adapter, tower_parameters
from dvla.cache.vlm.load import load_encoder
from dvla.cache.vlm.lora import add_lora, lora_dropout, lora_parameters, merge_lora, without_copies
from dvla.cache.vlm.spec import EncoderSpec, LoraSpec
from dvla.cache.vlm.tiny_paligemma2 import TinyPaliGemmaSpec, make_tiny_paligemma2
from dvla.cache.vlm.tiny_qwen3vl import TinySpec, make_tiny_qwen3vl
from dvla.errors import UserError
from support.vlm_samples import smooth_images

BLOCKS, LAYERS = 3, 4
TINY = TinySpec(
    vision_depth=BLOCKS, vision_width=40, vision_heads=2, out_width=64, text_layers=LAYERS + 1, init_std=0.1
)
IMAGES, TEXT = smooth_images(2, 64, 64), "push the puck to the goal"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3vl(tmp_path_factory.mktemp("vlm") / "tiny", TINY)


def load(checkpoint: Path, **settings: Any) -> Any:
    language = {"depth": "language", "layers": (LAYERS,)} if "deepstack" not in settings else {}
    return load_encoder(EncoderSpec(str(checkpoint), resolution=64, **{"dtype": "float32", **language, **settings}))


def trained(encoder: Any, spec: LoraSpec) -> torch.Tensor:
    """Features with an adapter that changes something."""
    add_lora(encoder, spec)
    with torch.no_grad():
        for i, (_, p) in enumerate(lora_parameters(encoder)):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return encoder.encode_images(IMAGES, TEXT)


def places(encoder: Any) -> dict[str, int]:
    """Adapted linear layers of each part: blocks of the tower, language layers, projections."""
    found: dict[str, int] = {}
    for name, _ in lora_parameters(encoder):
        part = re.match(r"(language\.layers|blocks|deepstack_merger_list|merger)(\.\d+)?", name)
        found[part[0]] = found.get(part[0], 0) + ("lora_A" in name)
    return found


def stack(*numbers: int, vision: int, language: int) -> dict[str, int]:
    """`places` of these blocks of the whole stack."""
    parts = [(f"blocks.{n}", vision) if n < BLOCKS else (f"language.layers.{n - BLOCKS}", language) for n in numbers]
    return dict(parts)


PROJECTIONS = {"merger": 2, "deepstack_merger_list.0": 2, "deepstack_merger_list.1": 2}


@pytest.mark.parametrize(
    "targets, last, wanted",
    [
        ("qv", 2, stack(5, 6, vision=1, language=2)),
        ("attention", LAYERS, stack(3, 4, 5, 6, vision=2, language=4)),
        ("attention", LAYERS + 1, stack(2, 3, 4, 5, 6, vision=2, language=4)),
        ("all-linear", 1, stack(6, vision=4, language=7)),
        ("all-linear", LAYERS, stack(3, 4, 5, 6, vision=4, language=7)),
        ("all-linear", LAYERS + 1, stack(2, 3, 4, 5, 6, vision=4, language=7) | PROJECTIONS),
        ("all-linear", LAYERS + BLOCKS, stack(*range(7), vision=4, language=7) | PROJECTIONS),
        ("all-linear", None, stack(0, 1, 2, vision=4, language=7) | PROJECTIONS),
    ],
)
def test_it_is_where_it_shall_be_and_all_of_it_learns(
    checkpoint: Path, targets: str, last: int | None, wanted: dict[str, int]
) -> None:
    encoder = load(checkpoint)
    base, before = encoder.encode_images(IMAGES, TEXT), encoder.fingerprint()
    add_lora(encoder, LoraSpec(r=2, targets=targets, last_n_blocks=last))
    assert places(encoder) == wanted
    features = encoder.encode_images(IMAGES, TEXT)
    assert torch.equal(features, base)  # it begins as nothing
    features.square().sum().backward()
    gradients = {n: p.grad for n, p in lora_parameters(encoder) if "lora_B" in n}
    assert all(g.abs().sum() > 0 for g in gradients.values())
    assert ["vision." + n for n, _ in lora_parameters(encoder)] == [
        n for n, p in encoder.named_parameters() if p.requires_grad
    ]
    assert [k for k in before if before[k] != encoder.fingerprint()[k]] == ["adapter"]


def test_deepstack_mergers_are_projections(checkpoint: Path) -> None:
    encoder = load(checkpoint, deepstack=True)
    add_lora(encoder, LoraSpec(r=2, targets="all-linear", last_n_blocks=1))
    assert places(encoder) == {"blocks.2": 4} | PROJECTIONS
    assert encoder.language_layers == 0


@pytest.mark.parametrize("settings", [{}, {"queries": 4}, {"layers": (2, LAYERS)}, {"keep": "image", "tokens": 1}])
def test_saved_loaded_and_merged_it_gives_the_same(checkpoint: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    encoder = load(checkpoint, **settings)
    base = encoder.encode_images(IMAGES, TEXT)
    adapted = trained(encoder, LoraSpec(r=2, alpha=8, targets="all-linear", last_n_blocks=LAYERS + 1))
    assert not torch.allclose(adapted, base, atol=1e-2)
    save_adapter(encoder, tmp_path / "lora")
    fresh = load(checkpoint, **settings)
    load_adapter(fresh, tmp_path / "lora")
    assert torch.equal(fresh.encode_images(IMAGES, TEXT), adapted)
    assert fresh.fingerprint() == encoder.fingerprint() and places(fresh) == places(encoder)
    merge_lora(fresh)
    torch.testing.assert_close(fresh.encode_images(IMAGES, TEXT), adapted.detach(), rtol=0, atol=1e-4)
    assert fresh.fingerprint() == encoder.fingerprint()
    with pytest.raises(UserError, match="another VLM .*weights_sha256.* depth and layers of the run"):
        load_adapter(load(checkpoint, layers=(LAYERS - 1,)), tmp_path / "lora")


def test_dropout_is_a_function_of_the_key(checkpoint: Path) -> None:
    encoder = load(checkpoint)
    adapted = trained(encoder, LoraSpec(r=2, dropout=0.5, last_n_blocks=2))

    def dropped(key: int) -> torch.Tensor:
        with lora_dropout(encoder, key):
            return encoder.encode_images(IMAGES, TEXT)

    first, again, other = (dropped(key) for key in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(first, adapted)
    assert torch.equal(encoder.encode_images(IMAGES, TEXT), adapted)


@pytest.mark.parametrize("last", [LAYERS, LAYERS + BLOCKS])
def test_checkpointing_keeps_less_and_the_gradients(checkpoint: Path, last: int) -> None:
    """Of the language layers, with their dropout; of an upper part as well."""
    encoder = load(checkpoint)
    trained(encoder, LoraSpec(r=2, dropout=0.3, targets="all-linear", last_n_blocks=last))
    hidden = encoder.at_boundary(2).encode_images(IMAGES, TEXT).detach()
    visible = torch.full((2,), encoder.at_boundary(2).visible(TEXT))
    for run in (lambda: encoder.encode_images(IMAGES, TEXT), lambda: encoder.encode_upper(hidden, 2, visible)):
        found, kept = [], []
        for recompute in (False, True):
            encoder.vision.recompute, total = recompute, []
            encoder.zero_grad(set_to_none=True)
            with lora_dropout(encoder, 3):
                with torch.autograd.graph.saved_tensors_hooks(lambda x: total.append(x.nbytes) or x, lambda x: x):
                    features = run()
                features.square().mean().backward()
            found.append({n: p.grad.clone() for n, p in encoder.vision.named_parameters() if p.grad is not None})
            kept.append(sum(total))
        assert found[0].keys() == found[1].keys() and len(found[0]) >= 2 * 7
        assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
        assert kept[1] < 0.5 * kept[0]


def test_language_layers_alone_keep_nothing_of_the_tower(checkpoint: Path) -> None:
    """So the default of depth language needs less memory than LoRA in the whole stack."""
    kept = {}
    for last in (LAYERS, LAYERS + BLOCKS):
        encoder, total = load(checkpoint), []
        add_lora(encoder, LoraSpec(r=2, last_n_blocks=last))
        with torch.autograd.graph.saved_tensors_hooks(lambda x: total.append(x.shape) or x, lambda x: x):
            encoder.encode_images(IMAGES, TEXT)
        kept[last] = [s for s in total if s[-1] == TINY.vision_width * 4]  # of the tower's MLPs
    assert not kept[LAYERS] and kept[LAYERS + BLOCKS]


def test_all_of_it_is_saved_as_a_tower(checkpoint: Path, tmp_path: Path) -> None:
    encoder = load(checkpoint)
    names = dict(tower_parameters(encoder))
    assert any(n.startswith("language.layers.3.") for n in names)
    assert not any(n.startswith("language.") for n, _ in tower_parameters(encoder, language=False))
    with torch.no_grad():
        for i, p in enumerate(names.values()):
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    save_adapter(encoder, tmp_path / "tower")
    fresh = load(checkpoint)
    before = fresh.encode_images(IMAGES, TEXT)
    load_adapter(fresh, tmp_path / "tower")
    assert torch.equal(fresh.encode_images(IMAGES, TEXT), encoder.encode_images(IMAGES, TEXT))
    assert not torch.allclose(before, fresh.encode_images(IMAGES, TEXT), atol=1e-2)


def test_refused(checkpoint: Path) -> None:
    for last in (0, LAYERS + BLOCKS + 1):
        with pytest.raises(UserError, match="3 blocks and the language model 4 layers; give 1 to 7"):
            add_lora(load(checkpoint), LoraSpec(last_n_blocks=last))


# --- PaliGemma 2 ------------------------------------------------------------------------------------------------------

GEMMA = TinyPaliGemmaSpec(
    vision_depth=2, vision_width=32, vision_heads=2, image_size=56, out_width=64, text_layers=3, vocabulary=600
)
SIGLIP_BLOCK = "vision_tower.vision_model.encoder.layers"


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_paligemma2(tmp_path_factory.mktemp("vlm") / "gemma", GEMMA)


def load_gemma(folder: Path, **settings: Any) -> Any:
    spec = {"vlm": "paligemma2", "resolution": 56, "dtype": "float32", "depth": "language", **settings}
    return load_encoder(EncoderSpec(str(folder), **spec))


@pytest.mark.parametrize("settings", [{}, {"keep": "all"}, {"layers": (1, 2)}])
@pytest.mark.parametrize(
    "targets, last, wanted",
    [
        ("qv", 1, {"language": 2}),
        ("attention", None, {SIGLIP_BLOCK: 8}),
        ("all-linear", 2, {"language": 14}),
        ("all-linear", None, {SIGLIP_BLOCK: 12, "multi_modal_projector": 1}),
    ],
)
def test_in_gemmas_layers(
    gemma: Path, tmp_path: Path, settings: dict[str, Any], targets: str, last: int | None, wanted: dict[str, int]
) -> None:
    """All of it learns, with gradient checkpointing the same; saved and merged it gives the same features."""
    encoder = load_gemma(gemma, **settings)
    add_lora(encoder, LoraSpec(r=2, alpha=8, targets=targets, last_n_blocks=last))
    found: dict[str, int] = {}
    for name, p in lora_parameters(encoder):
        place = next(part for part in ("language", SIGLIP_BLOCK, "multi_modal_projector") if name.startswith(part))
        found[place] = found.get(place, 0) + ("lora_A" in name)
        with torch.no_grad():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    assert found == wanted
    gradients = []
    for recompute in (False, True):
        encoder.vision.recompute = recompute
        encoder.zero_grad(set_to_none=True)
        features = encoder.encode_observation([IMAGES, IMAGES], TEXT)
        features.square().mean().backward()
        gradients.append([p.grad for _, p in lora_parameters(encoder)])
    assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(*gradients, strict=True))
    save_adapter(encoder, tmp_path / "lora")
    fresh = load_gemma(gemma, **settings)
    before = fresh.encode_observation([IMAGES, IMAGES], TEXT)
    load_adapter(fresh, tmp_path / "lora")
    assert torch.equal(fresh.encode_observation([IMAGES, IMAGES], TEXT), features) and not torch.equal(before, features)
    merge_lora(fresh)
    torch.testing.assert_close(fresh.encode_observation([IMAGES, IMAGES], TEXT), features.detach(), rtol=0, atol=1e-3)


def test_a_tower_that_an_earlier_release_wrote(gemma: Path, tmp_path: Path) -> None:
    """It trained SigLIP and the projector alone, and stored no language layer."""
    encoder = load_gemma(gemma)
    with torch.no_grad():
        for name, p in tower_parameters(encoder, language=False):
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    save_adapter(encoder, tmp_path / "tower", language=False)
    assert not any("language" in name for name in load_file(tmp_path / "tower" / "tower.safetensors"))
    fresh = load_gemma(gemma)
    load_adapter(fresh, tmp_path / "tower")
    assert torch.equal(*(e.encode_observation([IMAGES], TEXT) for e in (encoder, fresh)))


def test_matrices_multiply_in_the_dtype_of_the_tower(checkpoint: Path) -> None:
    """As on a GPU: features and gradients are peft's up to bfloat16's rounding, and no float32 copy of an input is
    kept."""
    found, kept = {}, {}
    for plain in (True, False):
        encoder, sizes = load(checkpoint, dtype="bfloat16"), []
        add_lora(encoder, LoraSpec(r=4, targets="all-linear"))
        if not plain:
            without_copies(encoder)
        for i, (_, p) in enumerate(lora_parameters(encoder)):
            p.data.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        parameters = [p for _, p in lora_parameters(encoder)]
        assert {p.dtype for p in parameters} == {torch.float32}

        def note(x: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(x.numel() * (x.dtype == torch.float32))
            return x.detach()

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            features = encoder.encode_images(IMAGES, TEXT)
        gradients = torch.autograd.grad(features.float().square().sum(), parameters)
        found[plain], kept[plain] = [features, *gradients], sum(sizes)
    for ours, peft in zip(found[False], found[True]):
        assert ours.dtype == peft.dtype and (ours - peft).float().norm() <= 0.05 * peft.float().norm()
    assert kept[False] < 0.75 * kept[True]  # the rest is the tower's own
