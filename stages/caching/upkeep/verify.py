"""`dvla cache verify`: checksums, and the features of random frames recomputed with the live encoder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ....cache.loader.live import LiveFeatures
from ....cache.loader.loader import gather
from ....cache.loader.provenance import require_sources, sources_of
from ....cache.store.cache import Cache
from ....cache.store.checksums import verify_checksums
from ....cache.store.codec import relative_error
from ....cache.vlm.encoder import VisionLanguageEncoder
from ....cache.vlm.load import load_encoder, require_encoder
from ....cache.vlm.spec import EncoderSpec
from ....common.config import from_mapping
from ....common.device import pick_device
from ....common.progress import Progress
from ....common.text import in_megabytes
from ....errors import UserError

# Of the features' RMS. float16 rounds at 5e-4 relative, int8 with channel and token scales at 8e-3, fp8 at 2.6e-2;
# batches of another size add rounding of their own: 2e-5 with a float32 encoder (docs/concepts.md). Features with rarer
# and larger values than those that the scales were measured on round more coarsely: what theirs is, is measured.
TOLERANCE = {"float16": 2e-3, "int8": 2e-2, "float8_e4m3fn": 6e-2}
# Of a bfloat16 encoder, whose features move with the order of its sums: 0.006 to 0.016 measured between kernels, and as
# much from float32. Another normalization of the images moves them by 0.4 and more.
BFLOAT16 = 4e-2


@dataclass(frozen=True)
class LiveCheck:
    """Cached against recomputed features of `count` frames (all views of each)."""

    count: int
    largest: float  # largest absolute difference
    scale: float  # RMS of the cached features
    relative: float  # RMS of the difference / scale


def recorded_encoder(
    attributes: Mapping[str, Any], vlm_path: str | None, device: str, say: Callable[[str], None]
) -> VisionLanguageEncoder:
    """The encoder that a dataset's attributes name; `vlm_path`: where its checkpoint is now."""
    spec = from_mapping(EncoderSpec, attributes["encoder"], "cache")
    return load_encoder(dataclasses.replace(spec, path=vlm_path) if vlm_path else spec, pick_device(device), say=say)


def tolerance(cache: Cache, encoder: VisionLanguageEncoder, stored: float = 0.0) -> float:
    """RMS difference, over the features' RMS, that storage and rounding explain: of the cache's and this encoder's
    dtypes the coarser one counts. `stored`: what storing these very features costs."""
    coarse = "bfloat16" in (cache.fingerprint["encoder"].get("dtype"), encoder.fingerprint()["dtype"])
    return math.hypot(max(TOLERANCE[cache.format.dtype], 1.5 * stored), BFLOAT16 if coarse else 0.0)


def verify(
    path: Path,
    live: int = 0,
    sources: tuple[str, ...] = (),
    vlm_path: str | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: Progress = lambda *_: None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[list[str], LiveCheck | None]:
    """(problems, live check). Problems: a line per damaged file, and one when live features differ beyond `tolerance`.

    `sources` defaults to the folders the cache was built from. `UserError` when the VLM or the sources are missing, or
    are not those of the cache.
    """
    cache = Cache.open(path)
    problems = verify_checksums(path, in_megabytes(progress, "checksums"))
    if live < 1 or problems:
        return problems, None
    encoder = recorded_encoder(cache.datasets[0].attributes, vlm_path, device, say)
    require_encoder(encoder, cache.fingerprint["encoder"], f"cache {path}")
    given = sources_of(cache, sources)
    require_sources(cache, given)
    features = LiveFeatures(encoder, cache, given, memory_gib=0.0)
    rng = np.random.default_rng(seed)
    sizes = np.array([d.observations for d in cache.datasets])
    ids = rng.choice(len(sizes), live, p=sizes / sizes.sum())
    at = (rng.random(live) * sizes[ids]).astype(np.int64)
    rows = np.array([int(cache.datasets[d].frame_of(at[i : i + 1])[0]) for i, d in enumerate(ids)], np.int64)
    usable = np.array(
        [not cache.datasets[d].quarantined[cache.datasets[d].episode_of(rows[i : i + 1])[0]] for i, d in enumerate(ids)]
    )
    if not usable.any():
        raise UserError(f"all {live} sampled frames are quarantined ({path}/quarantine.jsonl); raise --live")
    ids, rows = ids[usable], rows[usable]
    square, scale, largest, stored = 0.0, 0.0, 0.0, 0.0
    for begin in range(0, len(rows), 16):
        part = slice(begin, begin + 16)
        cached = gather(cache, ids[part], rows[part], 1)
        with torch.inference_mode():
            again = features(
                gather(cache, ids[part], rows[part], 1, features=False), np.zeros(len(rows[part]), bool)
            ).tokens.cpu()
        seen = cached.token_mask
        difference = (cached.tokens.float() - again.float())[seen]
        square += float(difference.square().sum())
        scale += float(cached.tokens.float()[seen].square().sum())
        largest = max(largest, float(difference.abs().max()))
        if (channels := cache.datasets[0].channel_scale) is not None:
            stored = max(stored, relative_error(again[seen][None], cache.format, channels)[0])
    count = len(rows)
    check = LiveCheck(count, largest, (scale / max(1, count * cache.width)) ** 0.5, (square / max(scale, 1e-30)) ** 0.5)
    allowed = tolerance(cache, encoder, stored)
    if check.relative > allowed:
        problems.append(
            f"live features of {count} frames differ by {check.relative:.2g} of their RMS; {cache.format.dtype} of a "
            f"{cache.fingerprint['encoder']['dtype']} encoder allows {allowed:.2g}: the cache comes from other "
            "weights, preprocessing or hardware"
        )
    return problems, check
