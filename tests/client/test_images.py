"""Images on their way to the server: padded as the server pads, resized as it resizes, compressed or not."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dvla.cache.vlm import preprocess
from dvla_client import ClientError
from dvla_client.images import PADDING_RULE, each_image, encode, fit, to_bytes

SIDE = 64


def camera(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth, with an edge and noise."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), np.uint8))
    image = np.asarray(small.resize((width, height))).astype(int) + rng.integers(-6, 7, (height, width, 3))
    image[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
    return image.clip(0, 255).astype(np.uint8)


def on_the_server(image: np.ndarray) -> np.ndarray:
    square = preprocess.pad_to_square(torch.from_numpy(image.copy())[None]).permute(0, 3, 1, 2)
    return preprocess.resize(square, SIDE)[0].permute(1, 2, 0).numpy()


def test_the_rule_has_one_name() -> None:
    assert PADDING_RULE == preprocess.PADDING_RULE


@pytest.mark.parametrize("size", [(120, 160), (161, 90), (64, 97), (200, 200), (65, 65)])
def test_it_sees_what_the_server_would_make_of_it(size: tuple[int, int]) -> None:
    image = camera(*size)
    here, there = fit(image, SIDE), on_the_server(image)
    assert here.shape == (SIDE, SIDE, 3) and here.dtype == np.uint8
    difference = np.abs(here.astype(int) - there)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01
    np.testing.assert_array_equal(on_the_server(here), here)  # nothing is left for the server to do


@pytest.mark.parametrize("size", [(64, 64), (64, 40), (20, 30)])
def test_what_is_no_larger_is_left_to_the_server(size: tuple[int, int]) -> None:
    image = camera(*size)
    assert fit(image, SIDE) is image


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_compressed_images_are_files(form: str) -> None:
    image = camera(SIDE, SIDE)
    sizes = []
    for quality in (50, 95):
        data = encode(image, form, quality)
        assert Image.open(io.BytesIO(data)).format == form.upper()
        found = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        sizes.append((len(data), np.abs(found.astype(int) - image).mean()))
    assert sizes[0][0] < sizes[1][0] < image.nbytes and sizes[0][1] > sizes[1][1]
    assert encode(image, "raw", 90) is image is encode(image, "native", 90)


def test_images_are_found_under_any_name() -> None:
    image, state = camera(20, 30), np.arange(3.0)
    floats = torch.from_numpy(image).permute(2, 0, 1) / 255
    seen: list[np.ndarray] = []
    observation: dict[str, Any] = {
        "observation": {"image": image, "state": state},
        "observation.images.front": floats,
        "images/wrist": image.transpose(2, 0, 1),
        "depth": np.zeros((20, 30, 1), np.uint8),
        "prompt": "go",
        "rows": np.zeros((3, 4, 5), np.int64),
    }
    found = each_image(observation, lambda one: seen.append(one) or "sent")  # type: ignore[func-returns-value]
    assert len(seen) == 3
    for one in seen:
        np.testing.assert_array_equal(one, image)
    assert found["observation"] == {"image": "sent", "state": state} and found["prompt"] == "go"
    assert found["images/wrist"] == found["observation.images.front"] == "sent"
    assert found["depth"].shape == (20, 30, 1) and found["rows"].shape == (3, 4, 5)


@pytest.mark.parametrize("factor", [255.0, float("nan")])
def test_floats_out_of_range_are_refused(factor: float) -> None:
    with pytest.raises(ClientError, match=r"image 'x' has values from .* scale images of float to \[0, 1\]"):
        to_bytes(np.ones((3, 4, 5), np.float32) * factor, "x")
