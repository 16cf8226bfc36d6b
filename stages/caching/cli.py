"""`dvla cache build` and `dvla cache plan`."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...common.console import console, progress_bars, say
from ...common.options import Device, Json, VlmPath
from ...common.text import duration, size
from ...errors import UserError

if TYPE_CHECKING:
    from .config import BuildConfig


# Options of `build`, which `plan` takes too.
Sources = Annotated[list[str] | None, typer.Argument(help="Dataset folders or hub ids.", show_default=False)]
Vlm = Annotated[
    str | None, typer.Option("--vlm", help="Model: qwen3vl (the default), paligemma2, or a tiny one (configs/models).")
]
Adapter = Annotated[
    Path | None,
    typer.Option(
        "--adapter", help="Run or checkpoint of `dvla finetune`: encode with its VLM and what it learnt in it."
    ),
]
Resolution = Annotated[
    int | None, typer.Option("--resolution", help="Side of the padded, resized picture; default: the model's own.")
]
Tokens = Annotated[
    int | None, typer.Option("--tokens", help="Tokens per picture, averaged on the grid (196, 49, 16 …); default: all.")
]
FeatureKind = Annotated[
    str | None,
    typer.Option("--features", help="merged: after the model's own projection; patch: before it, more and narrower."),
]
Depth = Annotated[
    str | None,
    typer.Option(
        "--depth",
        help="vision: each picture for itself. language (paligemma2): the language model's last hidden "
        "state, of all views of a frame together with the instruction; it stays in the features where "
        "training masks the text.",
    ),
]
Boundary = Annotated[
    int | None,
    typer.Option(
        "--boundary",
        help="Store what enters the last n blocks of the vision tower, in place of features: for "
        "`dvla finetune --lora --from-cache`, which then runs those n blocks only.",
    ),
]
Dtype = Annotated[str, typer.Option("--dtype", help="fp16, int8 or fp8 (with channel and token scales).")]
Compression = Annotated[str, typer.Option("--compression", help="none, zstd or lz4: lossless, for slow disks.")]
FrameStride = Annotated[int, typer.Option("--frame-stride", help="Features of every n-th frame; actions of all.")]
Views = Annotated[
    list[str] | None, typer.Option("--view", help="Camera to encode; may be given several times. Default: all.")
]
Augment = Annotated[int, typer.Option("--augment", help="Augmented variants of every picture.")]
Workers = Annotated[
    int, typer.Option("--workers", help="Worker processes, one per GPU where there are GPUs; 0: this one alone.")
]
Scheduler = Annotated[str | None, typer.Option("--scheduler", help="Address of a dask scheduler, tcp://host:8786.")]
Slurm = Annotated[str | None, typer.Option("--slurm", help="YAML of a Slurm cluster (configs/launch/slurm.yaml).")]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Pictures per encoder call.")]
ShardFrames = Annotated[
    int | None, typer.Option("--shard-frames", help="Frames per shard file; default: about 256 MiB.")
]
DatasetConfig = Annotated[
    str | None,
    typer.Option("--dataset-config", help="YAML of the field map, or a shipped name; default: found by robot type."),
]
Append = Annotated[bool, typer.Option("--append", help="Add new episodes to a finished cache, in a new generation.")]
Update = Annotated[
    bool, typer.Option("--update", help="Bring a finished cache up to its sources and settings, in a new generation.")
]


def _build_config(o: dict[str, Any]) -> BuildConfig:
    """From the parameters of `build` or `plan` by name."""
    from ...cache.store.feature_format import feature_format
    from ...cache.vlm.spec import encoder_spec
    from ..policy.load import adapted_spec
    from .config import BuildConfig, WorkerSpec

    if o["append"] and o["update"]:
        raise UserError("--append and --update exclude each other: --update also adds new episodes")
    mode = "append" if o["append"] else "update" if o["update"] else "new"
    if o["adapter"] and o["vlm"]:
        raise UserError("--adapter brings the VLM that it was trained in; leave --vlm out")
    make = (
        functools.partial(adapted_spec, o["adapter"])
        if o["adapter"]
        else functools.partial(encoder_spec, o["vlm"] or "qwen3vl")
    )
    spec = make(
        path=o["vlm_path"],
        resolution=o["resolution"],
        tokens=o["tokens"],
        features=o["features"],
        depth=o["depth"],
        boundary=o["boundary"],
    )
    return BuildConfig(
        tuple(o["sources"] or ()),
        spec,
        o["out"],
        o["batch_size"],
        o["shard_frames"],
        o["device"],
        o["dataset_config"],
        feature_format(o["dtype"], o["compression"]),
        o["frame_stride"],
        tuple(o["views"] or ()),
        o["augment"],
        mode,
        WorkerSpec(o["workers"], o["scheduler"], o["slurm"]),
    )


def cache_build(
    out: Annotated[Path, typer.Option("--out", help="Cache folder; an unfinished one is resumed.")],
    sources: Sources = None,
    vlm: Vlm = None,
    vlm_path: VlmPath = None,
    adapter: Adapter = None,
    resolution: Resolution = None,
    tokens: Tokens = None,
    dtype: Dtype = "fp16",
    compression: Compression = "none",
    frame_stride: FrameStride = 1,
    views: Views = None,
    augment: Augment = 0,
    append: Append = False,
    update: Update = False,
    workers: Workers = 0,
    scheduler: Scheduler = None,
    slurm: Slurm = None,
    batch_size: BatchSize = 64,
    shard_frames: ShardFrames = None,
    dataset_config: DatasetConfig = None,
    device: Device = "auto",
    features: FeatureKind = None,
    depth: Depth = None,
    boundary: Boundary = None,
) -> None:
    """Run the frozen VLM once over every frame and write features, actions and tables. Run again to resume.

    Example: dvla cache build data/push data/button --vlm qwen3vl --out cache --tokens 49 --dtype int8
    """
    options = dict(locals())
    from .build import build

    config = _build_config(options)
    with progress_bars() as show:
        report = build(config, show, say)
    timing = report.timing
    rate = (
        f"{report.images_per_second:.0f} images/s, bottleneck: {timing.bottleneck}"
        if timing.images
        else "nothing was missing"
    )
    found = f"{report.resumed_shards} shards found finished"
    if report.previous:
        found += f", {report.adopted_shards} taken whole and {timing.reused} pictures copied from the generation before ({report.previous})"
    console.print(
        f"{out}: {report.frames} frames, {size(report.bytes)}, {report.quarantined} episodes in quarantine, {found}; "
        f"{report.seconds:.1f} s, {rate}"
    )
    if report.error:
        console.print(
            f"stored as {dtype}: relative error {report.error[0]:.2g} over all, {report.error[1]:.2g} in the worst channel"
        )
    if report.pooled is not None:
        console.print(f"pooled to {tokens} tokens: relative error {report.pooled:.2g}")
    if report.quarantined:
        console.print(f"see {out}/quarantine.jsonl for the reasons")


def cache_plan(
    sources: Sources = None,
    out: Annotated[
        Path, typer.Option("--out", help="Cache folder to be: its disk is measured, nothing stays on it.")
    ] = Path("cache"),
    vlm: Vlm = None,
    vlm_path: VlmPath = None,
    adapter: Adapter = None,
    resolution: Resolution = None,
    tokens: Tokens = None,
    dtype: Dtype = "fp16",
    compression: Compression = "none",
    frame_stride: FrameStride = 1,
    views: Views = None,
    augment: Augment = 0,
    workers: Workers = 0,
    scheduler: Scheduler = None,
    slurm: Slurm = None,
    batch_size: BatchSize = 64,
    shard_frames: ShardFrames = None,
    dataset_config: DatasetConfig = None,
    device: Device = "auto",
    features: FeatureKind = None,
    depth: Depth = None,
    boundary: Boundary = None,
    append: Append = False,
    update: Update = False,
    pilot: Annotated[int, typer.Option("--pilot", help="Pictures to measure with, over all datasets and views.")] = 64,
    price: Annotated[float | None, typer.Option("--price", help="USD per hour of all that builds.")] = None,
    train_rate: Annotated[
        str | None,
        typer.Option(
            "--train-samples-per-second",
            help="Samples/s of the policy alone, or 'measured': trained here for a moment.",
        ),
    ] = None,
    model_size: Annotated[
        str, typer.Option("--model-size", help="Policy to measure: tiny, small, base or large.")
    ] = "base",
    draws: Annotated[int, typer.Option("--draws", help="Noise draws that share one sample.")] = 4,
    disk_rate: Annotated[
        float | None, typer.Option("--disk-rate", help="GB/s of the disk to train from; default: measured at --out.")
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster",
            help="YAML of a cluster (cluster: the shipped configs/launch/cluster.yaml): tell what it would take there.",
        ),
    ] = None,
    frames: Annotated[
        int | None, typer.Option("--frames", min=1, help="With --cluster: of a corpus of so many frames like these.")
    ] = None,
    json: Json = None,
) -> None:
    """Measure a few pictures, then tell bytes, hours, cost, errors, and the speed of training from the cache. Takes the options of build;
    with --append or --update it tells what of the finished cache at --out stays, and what has to be encoded.

    Example: dvla cache plan data/push data/button --out cache --tokens 49 --dtype int8 --price 3.5 --train-samples-per-second measured
    """
    options = dict(locals())
    from ...common.console import write_json
    from .planning.cluster import cluster_forecast, read_cluster, work_of
    from .planning.pilot import PilotConfig, plan_build
    from .planning.tables import show_cluster, show_forecast

    if frames is not None and cluster is None:
        raise UserError("--frames is of --cluster; give both, or neither")
    config = None if cluster is None else read_cluster(cluster)
    try:
        rate = None if train_rate in (None, "measured") else float(train_rate)
    except ValueError:
        raise UserError(f"--train-samples-per-second {train_rate}: give a number, or 'measured'") from None
    settings = PilotConfig(
        pilot, price, rate, train_rate == "measured", model_size, draws, None if disk_rate is None else disk_rate * 1e9
    )
    with progress_bars() as show:
        found = plan_build(_build_config(options), settings, show, say)
    if config is not None:
        found = dataclasses.replace(
            found, cluster=cluster_forecast(work_of(found, frames, shard_frames), config, model=found.measured.model)
        )
    write_json(json, found)
    show_forecast(found)
    if found.cluster is not None:
        show_cluster(found.cluster)
    names = {"new": "new", "again": "encoded again", "copied": "copied", "adopted": "in shards that stay whole"}
    for share in found.shares:
        console.print(
            f"against the finished cache, {names[share.kind]}: {share.pictures} pictures, {size(share.bytes)}, {duration(share.hours * 3600)}"
        )


def vlm_tiny(
    out: Annotated[Path, typer.Option("--out", help="Folder to create.")],
    arch: Annotated[str, typer.Option("--arch", help="Architecture: qwen3vl or paligemma2.")] = "qwen3vl",
    seed: Annotated[int, typer.Option("--seed", help="Of the random weights.")] = 0,
) -> None:
    """Make a checkpoint of the real architecture at toy width with random weights, offline: for demos and tests, not for robots.

    Example: dvla vlm tiny --arch qwen3vl --out vlm
    """
    from ...cache.vlm.tiny_paligemma2 import TinyPaliGemmaSpec, make_tiny_paligemma2
    from ...cache.vlm.tiny_qwen3vl import TinySpec, make_tiny_qwen3vl
    from ...errors import unknown

    if arch not in ("qwen3vl", "paligemma2"):
        raise unknown("architecture", arch, ["qwen3vl", "paligemma2"])
    if out.exists():
        raise UserError(f"{out} exists; choose another --out")
    if arch == "qwen3vl":
        make_tiny_qwen3vl(out, TinySpec(seed=seed))
    else:
        make_tiny_paligemma2(out, TinyPaliGemmaSpec(seed=seed))
    name = {"qwen3vl": "Qwen3-VL", "paligemma2": "PaliGemma 2"}[arch]
    console.print(f"{out}: {name} at toy width with random weights")
