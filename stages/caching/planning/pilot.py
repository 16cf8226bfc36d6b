"""`dvla cache plan`: a few images are decoded, encoded, written and read back to predict the whole build (forecast.py).

Decoding is timed as the build does it (an episode opened, then its frames in order), encoding with the real encoder in
the build's batches, writing and reading with a temporary shard on the disk of the cache. For `--append` and `--update`
the sources are read and hashed as the build does it, and compared with the finished cache. Letters: n images, K tokens
as stored, D width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from ....cache.readers import Source
from ....cache.readers.episode import CorruptEpisode
from ....cache.store.cache import Cache
from ....cache.store.codec import channel_scale, quantize, relative_error
from ....cache.store.plan import BuildPlan, DatasetPlan, EpisodePlan
from ....cache.vlm.augment import augment
from ....cache.vlm.encoder import VisionLanguageEncoder
from ....cache.vlm.observations import encoder_calls, require_finite
from ....cache.vlm.pooling import pooling_error
from ....cache.vlm.spec import features_in_words
from ....common.progress import Progress
from ....errors import Failed, UserError
from ..build_plan import decide, make_plan, open_all
from ..calibration import encode_singly
from ..config import BuildConfig, PilotConfig, WorkerSpec, check_settings
from ..generations import ViewChange, changes
from ..sizes import free_nbytes
from .forecast import Forecast, Measured, forecast
from .looks import Look, look_into, observations
from .rates import disk_rates, model_rate

Result = TypeVar("Result")
PAIRS = 8  # images encoded once more, to measure what pooling and strides lose


def plan_build(
    config: BuildConfig,
    pilot: PilotConfig = PilotConfig(),  # noqa: B008  # frozen
    progress: Progress = lambda *_: None,
    say: Callable[[str], None] = lambda _: None,
) -> Forecast:
    """Measure, and predict the build of `config`; nothing stays on the disk. `UserError` for what `build` refuses."""
    check_settings(config)
    if config.encoder.boundary is not None and (pilot.measure_model or pilot.train_rate is not None):
        raise UserError(
            "leave out --train-samples-per-second: it is the speed of a policy on features, which a cache with "
            "--boundary does not hold"
        )
    earlier = Cache.open(config.out) if config.mode != "new" else None
    sources, encoder = open_all(config, earlier, say)
    plan, changed = _planned(config, sources, encoder, earlier, progress)
    plan.check()
    each = max(2, pilot.images // sum(len(d.views) for d in plan.datasets))
    with contextlib.suppress(CorruptEpisode):
        sources[0].load(plan.datasets[0].episodes[-1].episode_id)  # imports what reads the format; not timed
    looks = [
        look
        for source, dataset in zip(sources, plan.datasets)
        for look in look_into(source, dataset, plan.frame_stride, each)
    ]
    progress("pilot: decoded", 1, 4)
    result = forecast(
        plan,
        _measure(config, pilot, plan, looks, encoder, progress),
        free=free_nbytes(config.out),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        parallel=_parallel(config.workers, encoder.device),
        overlap=encoder.device.type == "cuda",
        draws=pilot.draws,
        price=pilot.price,
        changed=changed,
    )
    result = dataclasses.replace(result, **_features(plan, encoder))
    if config.encoder.boundary is None:
        return result
    return dataclasses.replace(result, boundary=config.encoder.boundary, break_even_epoch=None)


def _features(plan: BuildPlan, encoder: VisionLanguageEncoder) -> dict[str, Any]:
    """What a forecast says of the features themselves."""
    unused = plan.tokens - max(encoder.visible(text) for dataset in plan.datasets for text in dataset.instructions)
    first, count, layers = encoder.image_span
    room = count and (plan.tokens - first) // layers - count
    return {
        "features": features_in_words(encoder.fingerprint()),
        "tokens": (plan.tokens, plan.width),
        "prompt": (room - unused // layers, room) if room else None,
        "reads": encoder.reads,
    }


def _planned(
    config: BuildConfig,
    sources: Sequence[Source],
    encoder: VisionLanguageEncoder,
    earlier: Cache | None,
    progress: Progress,
) -> tuple[BuildPlan, list[ViewChange] | None]:
    """The plan of the build, and what changes against the finished cache `earlier` (None: there is none)."""
    frames_chosen = any(s.choice.drop_idle or s.choice.frames is not None for s in sources)
    if earlier is None and frames_chosen:  # which frames, the tables tell
        return decide(config, sources, encoder, None, progress).plan, None
    if earlier is None:
        return make_plan(config, [glance(source, progress) for source in sources], encoder), None
    found = decide(config, sources, encoder, earlier, progress)
    return found.plan, changes(earlier, found.plan, found.reused, found.unchanged)


def _measure(
    config: BuildConfig,
    pilot: PilotConfig,
    plan: BuildPlan,
    looks: Sequence[Look],
    encoder: VisionLanguageEncoder,
    progress: Progress,
) -> Measured:
    """Encode the images, write and read their features, and train a policy for a moment where that is asked for."""
    features, encode = _encode(looks, encoder, config.batch_size, plan)
    progress("pilot: encoded", 2, 4)
    channels = channel_scale(features)
    codes, scales = features.half().numpy(), None
    if plan.format.quantized:
        codes, scales = (x.numpy() for x in quantize(features, torch.from_numpy(channels), plan.format.dtype))
    disk = disk_rates(config.out, plan, codes, scales)
    progress("pilot: written and read", 3, 4)
    model = pilot.train_rate
    if pilot.measure_model:
        views = max(len(d.views) for d in plan.datasets)
        model = model_rate(pilot.model_size, pilot.draws, views, plan, encoder.device)
    measured = Measured(
        tuple(look.cost() for look in looks),
        encode,
        disk.compression,
        disk.write,
        pilot.disk_rate or disk.read,
        min(disk.read_warm, pilot.disk_rate or math.inf),
        model,
        relative_error(features, plan.format, channels),
        pooled_away(looks, encoder) if encoder.pools else None,
        stride_change(looks, encoder) if plan.frame_stride > 1 else None,
    )
    progress("pilot: done", 4, 4)
    return measured


def glance(source: Source, progress: Progress) -> DatasetPlan:
    """The source's episodes from metadata or a cheap look: lengths and instructions, no hashes."""
    episodes, quarantined = [], []
    for i, number in enumerate(source.episode_ids):
        found = source.attempt(lambda n: EpisodePlan(n, source.length_of(n), source.instruction_of(n), ""), number)
        if isinstance(found, Failed):
            quarantined.append((number, str(found)))
        else:
            episodes.append(found)
        progress(f"{source.name}: episodes", i + 1, len(source.episode_ids))
    if not episodes:
        raise source.no_usable_episode([why for _, why in quarantined], "run on a complete copy of the dataset")
    return DatasetPlan(source.name, source.view_names, tuple(episodes), tuple(quarantined))


def _encode(
    looks: Sequence[Look], encoder: VisionLanguageEncoder, batch_size: int, plan: BuildPlan
) -> tuple[torch.Tensor, float]:
    """(float32 [n,K,D] of all images, seconds per image of the build: encoding, augmentation, quantization)."""
    calls = encoder_calls(encoder, *observations(looks), batch_size)
    few = calls[0].views if encoder.device.type == "cuda" else [images[:1] for images in calls[0].views]
    _timed(encoder, lambda: encoder.encode_observation(few, calls[0].instruction))  # warms up
    features, seconds = [], 0.0
    for call in calls:
        made, took = _timed(encoder, lambda: encoder.encode_observation(call.views, call.instruction).float().cpu())
        features.append(made.flatten(0, 1))
        seconds += took
        for images in call.views if plan.variants else ():
            keys = np.arange(1, 1 + len(images), dtype=np.uint64)
            _, took = _timed(encoder, lambda: augment(torch.from_numpy(images).to(encoder.device), keys))
            seconds += took * plan.variants / (plan.variants + 1)
    found = torch.cat(features)  # [n,K,D]
    require_finite(found, "pilot")
    if plan.format.quantized:
        on_device = found.to(encoder.device)
        scales = torch.from_numpy(channel_scale(found)).to(encoder.device)
        seconds += _timed(encoder, lambda: quantize(on_device, scales, plan.format.dtype))[1]
    return found, seconds / len(found)


def pooled_away(looks: Sequence[Look], encoder: VisionLanguageEncoder) -> float:
    """`pooling_error` of a few images."""
    first = [dataclasses.replace(look, images=look.images[:1], instructions=look.instructions[:1]) for look in looks]
    full = encoder.unpooled()
    return pooling_error(full.of_image(_few(first, full)), encoder.image_tokens)


def stride_change(looks: Sequence[Look], encoder: VisionLanguageEncoder) -> float | None:
    """RMS of the features' change from an observation to the last skipped frame after it, over their RMS.

    None: the episodes are too short.
    """
    if not any(look.pairs for look in looks):
        return None
    before, after = (
        _few(
            [dataclasses.replace(x, images=[p[i] for p in x.pairs], instructions=x.pair_instructions) for x in looks],
            encoder,
        )
        for i in (0, 1)
    )  # [n,K,D]
    return float((after - before).square().mean().sqrt() / before.square().mean().sqrt())


def _few(looks: Sequence[Look], encoder: VisionLanguageEncoder) -> torch.Tensor:
    """float32 [n,K,D] of about `PAIRS` of their images."""
    images, instructions = observations(looks)
    count = max(1, PAIRS // len(images[0]))
    features = encode_singly(encoder, zip(images[:count], instructions))
    assert features is not None  # count ≥ 1
    return features


def _timed(encoder: VisionLanguageEncoder, work: Callable[[], Result]) -> tuple[Result, float]:
    """(result, seconds until the device is done with it)."""
    began = time.perf_counter()
    with torch.inference_mode():
        result = work()
    if encoder.device.type == "cuda":
        torch.cuda.synchronize(encoder.device)
    return result, time.perf_counter() - began


def _parallel(workers: WorkerSpec, device: torch.device) -> int:
    """Processes that add speed: those of a cluster, and those here that have a GPU each; others share processors."""
    if workers.scheduler or workers.slurm:
        return max(1, workers.count)
    return max(1, min(workers.count, torch.cuda.device_count())) if device.type == "cuda" else 1
