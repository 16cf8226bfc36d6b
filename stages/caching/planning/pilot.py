"""`dvla cache plan`: a few pictures are decoded, encoded, written and read back, and from that the whole build is foretold (plan.py).

Decoding is timed as the build does it (an episode opened, then its pictures in order), encoding with the real encoder in the build's
batches, writing and reading with a temporary shard in the file system of the cache. For `--append` and `--update` the sources are read
as the build reads them, hashes and all, and compared with the finished cache. Letters: n pictures, H × W their size, V views, K tokens as
stored, P tokens before pooling, D width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

import numpy as np
import torch

from ....cache.readers import Source
from ....cache.readers.episode import CorruptEpisode, View
from ....cache.store.cache import Cache
from ....cache.store.codec import channel_scale, quantize, relative_error
from ....cache.store.plan import BuildPlan, DatasetPlan, EpisodePlan
from ....cache.vlm.augment import augment
from ....cache.vlm.encoder import VisionLanguageEncoder
from ....cache.vlm.load import load_encoder
from ....cache.vlm.observations import encoder_calls
from ....cache.vlm.pooling import pooling_error
from ....common.device import pick_device
from ....errors import UserError
from ..build_plan import decide, make_plan
from ..config import BuildConfig, WorkerSpec, check_settings
from ..generations import changes
from ..sizes import free_nbytes
from ..sources import Progress, open_sources, sources_to_append
from .forecast import Forecast, Measured, ViewCost, forecast
from .rates import disk_rates, model_rate

Result = TypeVar("Result")
RUNS = 2  # episodes of each dataset that are looked into
PAIRS = 8  # pictures encoded once more, to see what pooling and strides lose


@dataclass(frozen=True)
class PilotConfig:
    """What `plan` needs besides the build's own settings."""

    pictures: int = 64  # to measure with, over all datasets and views
    price: float | None = None  # USD per hour of all that builds
    train_rate: float | None = None  # observations/s of the policy alone; None = unknown
    measure_model: bool = False  # measure it here
    model_size: str = "base"  # of the policy measured
    draws: int = 4  # noise draws that share one observation
    disk_rate: float | None = None  # bytes/s of the disk that will be trained from; None = measured here

    def __post_init__(self) -> None:
        if self.pictures < 2 or self.draws < 1:
            raise UserError(
                f"--pilot {self.pictures} and --draws {self.draws}: give at least 2 pictures to measure with, and 1 draw"
            )
        for option, value in (
            ("--price", self.price),
            ("--train-samples-per-second", self.train_rate),
            ("--disk-rate", self.disk_rate),
        ):
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{option}: {value:g} is not above 0")


@dataclass
class _Look:
    """What was seen of one camera of one dataset: pictures uint8 [H,W,3] of observations, and (observation, last skipped frame). Those of
    the dataset's other cameras are of the same observations."""

    dataset: str
    view: str
    pictures: list[np.ndarray] = field(default_factory=list)
    instructions: list[str] = field(default_factory=list)  # of the pictures
    pairs: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    pair_instructions: list[str] = field(default_factory=list)
    load: list[float] = field(default_factory=list)  # seconds, per episode
    first: list[float] = field(default_factory=list)  # seconds, per episode
    following: list[float] = field(default_factory=list)  # seconds per further observation, per episode

    def cost(self) -> ViewCost:
        first = float(np.mean(self.first))
        return ViewCost(
            self.dataset, self.view, float(np.mean(self.load)), first, float(np.mean(self.following or [first]))
        )


def plan_build(
    config: BuildConfig, pilot: PilotConfig = PilotConfig(), progress: Progress = lambda *_: None
) -> Forecast:
    """Measure, and foretell the build of `config`; nothing stays on the disk. `UserError` for what `build` refuses."""
    check_settings(config)
    if config.encoder.boundary is not None and (pilot.measure_model or pilot.train_rate is not None):
        raise UserError(
            "--train-samples-per-second is of the policy on features, and a cache with --boundary holds none; leave one of the two out"
        )
    device = pick_device(config.device)
    earlier = Cache.open(config.out) if config.mode != "new" else None
    sources = open_sources(config.sources, config.dataset_config, config.views)
    if earlier is not None and config.mode == "append":
        sources = sources_to_append(earlier, sources)
    encoder, changed = load_encoder(config.encoder, device), None
    if earlier is None:
        plan = make_plan(config, [glance(source, progress) for source in sources], encoder)
    else:
        found = decide(config, sources, encoder, earlier, progress)
        plan, changed = found.plan, changes(earlier, found.plan, found.reused, found.unchanged)
    plan.check()
    datasets = plan.datasets
    each = max(2, pilot.pictures // sum(len(d.views) for d in datasets))
    with contextlib.suppress(CorruptEpisode):
        sources[0].load(datasets[0].episodes[-1].episode_id)  # imports what reads the format; not timed
    looks = [
        look
        for source, dataset in zip(sources, datasets)
        for look in look_into(source, dataset, plan.frame_stride, each)
    ]
    progress("pilot: decoded", 1, 4)
    features, encode = _encode(looks, encoder, config.batch_size, plan)
    progress("pilot: encoded", 2, 4)
    channels = channel_scale(features)
    codes, scales = features.half().numpy(), None
    if plan.format.quantized:
        codes, scales = (x.numpy() for x in quantize(features, torch.from_numpy(channels), plan.format.dtype))
    disk = disk_rates(config.out, plan, codes, scales)
    progress("pilot: written and read", 3, 4)
    views = max(len(d.views) for d in datasets)
    model = model_rate(pilot.model_size, pilot.draws, views, plan, device) if pilot.measure_model else pilot.train_rate
    measured = Measured(
        tuple(look.cost() for look in looks),
        encode,
        disk.compression,
        disk.write,
        pilot.disk_rate or disk.read,
        min(disk.read_warm, pilot.disk_rate or math.inf),
        model,
        relative_error(features, plan.format, channels),
        pooled_away(looks, encoder) if encoder.tokens < encoder.native_tokens else None,
        stride_change(looks, encoder) if plan.frame_stride > 1 else None,
    )
    progress("pilot: done", 4, 4)
    result = forecast(
        plan,
        measured,
        free=free_nbytes(config.out),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        parallel=_parallel(config.workers, device),
        overlap=device.type == "cuda",
        draws=pilot.draws,
        price=pilot.price,
        changed=changed,
    )
    return (
        result
        if config.encoder.boundary is None
        else dataclasses.replace(result, boundary=config.encoder.boundary, break_even_epoch=None)
    )


def glance(source: Source, progress: Progress) -> DatasetPlan:
    """The source's episodes as far as metadata or a cheap look tell: lengths and instructions, no hashes."""
    episodes, quarantined = [], []
    for i, number in enumerate(source.episode_ids):
        try:
            episodes.append(EpisodePlan(number, source.length_of(number), source.instruction_of(number), ""))
        except CorruptEpisode as error:
            quarantined.append((number, str(error)))
        progress(f"{source.name}: lengths", i + 1, len(source.episode_ids))
    if not episodes:
        reason = quarantined[0][1] if quarantined else "it lists no episodes"
        raise UserError(f"{source.path} has no usable episode ({reason}); run on a whole copy of the dataset")
    return DatasetPlan(source.name, source.view_names, tuple(episodes), tuple(quarantined))


def look_into(source: Source, dataset: DatasetPlan, stride: int, each: int) -> list[_Look]:
    """Decode about `each` observations of every view, in order from the start of `RUNS` episodes. `UserError` when none can be decoded."""
    looks = {view: _Look(dataset.name, view) for view in dataset.views}
    count, runs, reason = len(dataset.episodes), 0, ""
    for number in dict.fromkeys(
        [0, count // 2, *range(count)]
    ):  # the first, the middle, and others where these are corrupt
        entry = dataset.episodes[number]
        try:
            began = time.perf_counter()
            episode = source.load(entry.episode_id)
            loaded = time.perf_counter() - began
            seen = [_decode(view, stride, -(-each // RUNS)) for view in episode.views]
        except CorruptEpisode as error:
            reason = str(error)
            continue
        for view, (pictures, pairs, first, following) in zip(episode.views, seen):
            look = looks[view.name]
            look.pictures += pictures
            look.pairs += pairs
            look.instructions += [entry.instruction] * len(pictures)
            look.pair_instructions += [entry.instruction] * len(pairs)
            look.load.append(loaded)
            look.first.append(first)
            look.following += following
        runs += 1
        if runs == RUNS:
            break
    if not runs:
        raise UserError(f"no episode of {source.path} can be decoded ({reason}); run `dvla data check` on it")
    return list(looks.values())


def _decode(
    view: View, stride: int, count: int
) -> tuple[list[np.ndarray], list[tuple[np.ndarray, np.ndarray]], float, list[float]]:
    """(pictures of the first `count` observations, a pair over a stride, seconds to the first picture, seconds to each following one)."""
    rows = min(count, -(-view.length // stride))
    frames = islice(view.frames(0, (rows - 1) * stride + 1), 0, None, stride)
    began = time.perf_counter()
    pictures = [next(frames)]
    first = time.perf_counter()
    pictures += frames
    ended = time.perf_counter()
    pairs = [(pictures[0], next(view.frames(stride - 1, stride)))] if stride > 1 and view.length >= stride else []
    return pictures, pairs, first - began, [(ended - first) / (rows - 1)] if rows > 1 else []


def _encode(
    looks: Sequence[_Look], encoder: VisionLanguageEncoder, batch_size: int, plan: BuildPlan
) -> tuple[torch.Tensor, float]:
    """(features float32 [n,K,D] of all pictures, seconds per picture of the build: encoding, a share of it augmented, quantized)."""
    calls = encoder_calls(encoder, *_observations(looks), batch_size)
    few = calls[0].views if encoder.device.type == "cuda" else [images[:1] for images in calls[0].views]
    _synchronised(encoder, lambda: encoder.encode_observation(few, calls[0].instruction))  # warms up
    features, seconds = [], 0.0
    for call in calls:
        began = time.perf_counter()
        features.append(
            _synchronised(
                encoder, lambda: encoder.encode_observation(call.views, call.instruction).float().cpu()
            ).flatten(0, 1)
        )
        seconds += time.perf_counter() - began
        for images in call.views if plan.variants else ():
            began = time.perf_counter()
            _synchronised(
                encoder,
                lambda: augment(
                    torch.from_numpy(images).to(encoder.device), np.arange(1, 1 + len(images), dtype=np.uint64)
                ),
            )
            seconds += (time.perf_counter() - began) * plan.variants / (plan.variants + 1)
    found = torch.cat(features)  # [n,K,D]
    if not torch.isfinite(found).all():
        raise UserError("the encoder gave a value that is not finite; check the weights and their dtype")
    if plan.format.quantized:
        on_device = found.to(encoder.device)
        scales = torch.from_numpy(channel_scale(found)).to(encoder.device)
        began = time.perf_counter()
        _synchronised(encoder, lambda: quantize(on_device, scales, plan.format.dtype))
        seconds += time.perf_counter() - began
    return found, seconds / len(found)


def _observations(looks: Sequence[_Look]) -> tuple[list[tuple[np.ndarray, ...]], list[str]]:
    """Pictures of every view of all observations, and their instructions."""
    pictures: list[tuple[np.ndarray, ...]] = []
    instructions: list[str] = []
    for name in dict.fromkeys(look.dataset for look in looks):
        views = [look for look in looks if look.dataset == name]
        pictures += zip(*(look.pictures for look in views))
        instructions += views[0].instructions
    return pictures, instructions


def pooled_away(looks: Sequence[_Look], encoder: VisionLanguageEncoder) -> float:
    """`codec.pooling_error` of a few pictures."""
    first = [
        dataclasses.replace(look, pictures=look.pictures[:1], instructions=look.instructions[:1]) for look in looks
    ]
    return pooling_error(_features(*_observations(first), encoder.unpooled()), encoder.tokens)


def stride_change(looks: Sequence[_Look], encoder: VisionLanguageEncoder) -> float | None:
    """RMS of the features' change from an observation to the last skipped frame behind it, over their RMS; None: episodes too short."""
    if not any(look.pairs for look in looks):
        return None
    ends = (
        [
            dataclasses.replace(look, pictures=[pair[i] for pair in look.pairs], instructions=look.pair_instructions)
            for look in looks
        ]
        for i in (0, 1)
    )
    before, after = (_features(*_observations(end), encoder) for end in ends)  # [n,K,D]
    return float((after - before).square().mean().sqrt() / before.square().mean().sqrt())


def _features(
    pictures: Sequence[Sequence[np.ndarray]], instructions: Sequence[str], encoder: VisionLanguageEncoder
) -> torch.Tensor:
    """float32 [n,K,D] on the CPU, of the pictures of about `PAIRS` / V observations, one at a time since sizes may differ."""
    few = max(1, PAIRS // len(pictures[0]))
    with torch.inference_mode():
        return torch.cat(
            [
                encoder.encode_observation([p[None] for p in views], text)[0].float().cpu()
                for views, text in zip(pictures[:few], instructions)
            ]
        )


def _synchronised(encoder: VisionLanguageEncoder, work: Callable[[], Result]) -> Result:
    with torch.inference_mode():
        result = work()
    if encoder.device.type == "cuda":
        torch.cuda.synchronize(encoder.device)
    return result


def _parallel(workers: WorkerSpec, device: torch.device) -> int:
    """Processes that gain: those of a cluster, and those here that have a GPU each. Others share this machine's processors."""
    if workers.scheduler or workers.slurm:
        return max(1, workers.count)
    return max(1, min(workers.count, torch.cuda.device_count())) if device.type == "cuda" else 1
