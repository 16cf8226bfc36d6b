"""One damaged dataset through `dvla data show`, `data check` and `cache build`, in this process, and what came of it.

The build has a stand-in for the vision-language model whose features are checksums of the images: equal features, equal
images.
"""

from __future__ import annotations

import random
import re
import shutil
import traceback
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dvla.cache.store.cache import Cache
from dvla.cache.vlm.encoder import VisionLanguageEncoder
from dvla.cache.vlm.preprocess import ImageSpec
from dvla.cache.vlm.spec import EncoderSpec
from dvla.stages.caching import build_plan
from fuzz.bounded import run_bounded
from fuzz.fuzz_samples import Format
from fuzz.mutations import Mutation, mutate

# From good to bad. right: all as before; left out: some episodes are quarantined, the others are as before; refused:
# one line, exit code 2; told: other rows, text or images, and `check` has a finding that the undamaged dataset has not;
# changed: the same without a finding, from values that nothing else vouches for; silent: the same although the damaged
# file is metadata or carries a checksum; the rest are faults.
OUTCOMES = ("right", "left out", "refused", "told", "changed", "silent", "traceback", "hang", "memory", "died")
FAULTS = OUTCOMES[6:]
COMMANDS = (("data", "show"), ("data", "check", "--all"), ("cache", "build", "--allow-quarantine"))
Content = dict[int, str]  # episode → digest of its rows, text and features


class StandIn(VisionLanguageEncoder):
    """A vision-language encoder of one token of four numbers, without a network."""

    image_tokens, native_tokens, tokens, width = 1, 1, 1, 4  # type: ignore[assignment]

    def __init__(self, spec: EncoderSpec) -> None:
        image = ImageSpec(1, 1, 1, 1, (0.5,) * 3, (0.5,) * 3)
        super().__init__(spec, image, torch.nn.Linear(1, 1), torch.zeros(1, 4), None, {})

    def require_fits(self, views: int, instructions: Sequence[str]) -> None: ...

    def fingerprint(self) -> dict[str, Any]:
        return {"vlm": "checksums"}

    def encode_text(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        found = [_numbers(text.encode(errors="replace")) for text in texts]
        return torch.tensor(found)[:, None], torch.ones(len(texts), dtype=torch.int64)

    def encode_observation(self, views: Sequence[torch.Tensor | np.ndarray], instruction: str) -> torch.Tensor:
        found = [[_numbers(np.asarray(image).tobytes()) for image in images] for images in views]
        return torch.tensor(found).swapaxes(0, 1)[:, :, None]

    def null_image_features(self, views: int) -> torch.Tensor:
        return torch.zeros(views, 1, 4)


def _numbers(data: bytes) -> list[float]:
    return [float(b) for b in zlib.crc32(data).to_bytes(4, "big")]


@dataclass
class Outcome:
    """What came of one mutation."""

    index: int
    mutation: Mutation
    result: str = "right"  # of OUTCOMES
    unforeseen: bool = False  # an error that no reader names: it was caught where all are
    text: str = ""  # the reason, one line, or the traceback
    content: Content = field(default_factory=dict)
    findings: str = ""  # of check: how many errors, warnings and notes


def prepare() -> None:
    """Put the stand-in in the place of the encoder, and have threads and destructors report what they raise."""
    build_plan.load_encoder = lambda spec, device, say=None: StandIn(spec)  # type: ignore[assignment, return-value]
    torch.set_num_threads(1)


def examine(folder: Path, dataset: str, index: int, mutation: Mutation) -> Outcome:
    """Run the commands on `folder`/`dataset`; `content` is what the build stored of each usable episode."""
    found, cache = Outcome(index, mutation), folder.parent / f"{folder.name}.cache"
    shutil.rmtree(cache, ignore_errors=True)
    for words in COMMANDS:
        arguments = [*words, str(folder / dataset)]
        if words[0] == "cache":
            arguments += ["--out", str(cache), "--batch-size", "8", "--device", "cpu"]
        result, text = run_bounded(arguments)
        if place := next((x for x in text.splitlines() if "please report" in x or re.search(r"\.py:\d", x)), ""):
            found.unforeseen, found.text = True, place
        if counts := re.search(r"\d+ errors?, \d+ warnings?, \d+ notes?", text):
            found.findings = counts[0]
        if result == "refused" and words[0] == "cache":
            found.result, found.text = "refused", text
        if result in FAULTS:
            found.result, found.text = result, f"{' '.join(words)}: {text}"
            return found
    if found.result != "refused":
        try:
            found.content = content_of(cache)
        except Exception:
            found.result, found.text = "traceback", f"of the finished cache: {traceback.format_exc()}"
    return found


def judge(found: Outcome, sound: Outcome, format: Format) -> Outcome:
    """Compare what was stored with what the undamaged dataset gives."""
    if found.result != "right":
        return found
    wrong = {e: d for e, d in found.content.items() if sound.content.get(e) != d}
    if wrong:
        vouched = format.vouched(found.mutation.file, found.mutation.sound)
        found.result = "told" if found.findings != sound.findings else "silent" if vouched else "changed"
        found.text = f"episodes {sorted(wrong)} differ"
    elif found.content.keys() != sound.content.keys():
        found.result = "left out"
    return found


def content_of(path: Path) -> Content:
    """Digest of what a finished cache holds of each episode that is not in its quarantine."""
    found: Content = {}
    for data in Cache.open(path).datasets:
        for i, episode in enumerate(data.episode_id.tolist()):
            if data.quarantined[i]:
                continue
            rows = slice(int(data.episode_start[i]), int(data.episode_start[i] + data.episode_length[i]))
            digest = zlib.crc32(
                str((data.views, data.instructions[int(data.episode_instruction[i])])).encode(errors="replace")
            )
            for view in data.views:
                digest = zlib.crc32(data.features(view, np.arange(rows.start, rows.stop)).tobytes(), digest)
            for table in (data.action, data.proprio, data.timestamp):
                digest = zlib.crc32(np.asarray(table[rows]).tobytes(), digest)
            found[episode] = f"{rows.stop - rows.start} rows {digest:08x}"
    return found


def damaged(sample: Path, folder: Path, seed: str, only: str = "*") -> Mutation:
    """`folder` becomes a copy of `sample` with one mutation of a file named as `only`; the same for the same seed."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sample, folder)
    return mutate(folder, random.Random(seed), only)
