"""Section prepare, on the CPU beside the first sections: the checkpoint that the others encode with."""

from __future__ import annotations

import time
from pathlib import Path
from unittest import mock

import full_size
from train import FIELDS

from dvla.cache.vlm.spec import EncoderSpec
from dvla.cache.vlm.tiny_qwen3vl import TinySpec, make_tiny_qwen3vl

from .items import Number, Place, item
from .policies import width

LAYER, LAYERS = 16, 17  # features of depth language, and how many layers are written: one more, as in the released one
PATIENCE = 120.0  # seconds


@item("a checkpoint of Qwen3-VL-2B's sizes, random weights")
def prepare(place: Place) -> str:
    folder = place.work / "vlm"
    if folder.exists():
        return Number("it is there already")
    part = place.work / "vlm.part"
    if place.toy:
        make_tiny_qwen3vl(part, TinySpec(vision_depth=4, out_width=width(place), text_layers=3))
    else:
        with mock.patch.dict(full_size.QWEN_TEXT, num_hidden_layers=LAYERS):
            full_size.make_full_size(part)
    part.rename(folder)
    return Number(f"{sum(file.stat().st_size for file in folder.iterdir()) / 2**20:.0f} MiB")


def checkpoint(place: Place) -> Path:
    """It, once it is there. `FileNotFoundError` when it does not come."""
    folder, began = place.work / "vlm", time.perf_counter()
    while not folder.is_dir():
        if time.perf_counter() - began > PATIENCE:
            raise FileNotFoundError(f"{folder}: section prepare has not made it")
        time.sleep(0.5)
    return folder


def spec(place: Place, language: bool = False) -> EncoderSpec:
    """Of the features."""
    depth = {"depth": "language", "layers": (place.size(LAYER, 2),)} if language else {}
    return EncoderSpec(str(checkpoint(place)), resolution=resolution(place), **depth)


def resolution(place: Place) -> int:
    return int(place.size(448, 128))


def fields(place: Place) -> Path:
    """The dataset config of the recording."""
    file = place.work / "bench.yaml"
    file.write_text(FIELDS)
    return file
