"""`dvla cache …`: stage one, the feature cache."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from .errors import UserError
from .stages.console import console, duration, errors, progress_bars, size

if TYPE_CHECKING:
    from .stages.build import BuildConfig

cache_app = typer.Typer(no_args_is_help=True, help="Stage one: the feature cache.")

# Options of `build`, which `plan` takes too.
Sources = Annotated[Optional[list[str]], typer.Argument(help="Dataset folders or hub ids.", show_default=False)]
Vlm = Annotated[Optional[str], typer.Option("--vlm", help="Model: qwen3vl (the default), paligemma2, or a tiny one (configs/models).")]
Adapter = Annotated[Optional[Path], typer.Option("--adapter", help="Run or checkpoint of `dvla finetune`: encode with its VLM and what it learnt in it.")]
VlmPath = Annotated[Optional[str], typer.Option("--vlm-path", help="Checkpoint folder or hub id; default: the model's own.")]
Resolution = Annotated[Optional[int], typer.Option("--resolution", help="Side of the padded, resized picture; default: the model's own.")]
Tokens = Annotated[Optional[int], typer.Option("--tokens", help="Tokens per picture, averaged on the grid (196, 49, 16 …); default: all.")]
FeatureKind = Annotated[Optional[str], typer.Option("--features", help="merged: after the model's own projection; patch: before it, more and narrower.")]
Depth = Annotated[Optional[str], typer.Option("--depth", help="vision: each picture for itself. language (paligemma2): the language model's last hidden "
                                             "state, of all views of a frame together with the instruction; it stays in the features where "
                                             "training masks the text.")]
Boundary = Annotated[Optional[int], typer.Option("--boundary", help="Store what enters the last n blocks of the vision tower, in place of features: for "
                                                 "`dvla finetune --lora --from-cache`, which then runs those n blocks only.")]
Dtype = Annotated[str, typer.Option("--dtype", help="fp16, int8 or fp8 (with channel and token scales).")]
Compression = Annotated[str, typer.Option("--compression", help="none, zstd or lz4: lossless, for slow disks.")]
FrameStride = Annotated[int, typer.Option("--frame-stride", help="Features of every n-th frame; actions of all.")]
Views = Annotated[Optional[list[str]], typer.Option("--view", help="Camera to encode; may be given several times. Default: all.")]
Augment = Annotated[int, typer.Option("--augment", help="Augmented variants of every picture.")]
Workers = Annotated[int, typer.Option("--workers", help="Worker processes, one per GPU where there are GPUs; 0: this one alone.")]
Scheduler = Annotated[Optional[str], typer.Option("--scheduler", help="Address of a dask scheduler, tcp://host:8786.")]
Slurm = Annotated[Optional[str], typer.Option("--slurm", help="YAML of a Slurm cluster (configs/launch/slurm.yaml).")]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Pictures per encoder call.")]
ShardFrames = Annotated[Optional[int], typer.Option("--shard-frames", help="Frames per shard file; default: about 256 MiB.")]
DatasetConfig = Annotated[Optional[str], typer.Option("--dataset-config", help="YAML of the field map, or a shipped name; default: found by robot type.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Append = Annotated[bool, typer.Option("--append", help="Add new episodes to a finished cache, in a new generation.")]
Update = Annotated[bool, typer.Option("--update", help="Bring a finished cache up to its sources and settings, in a new generation.")]

Moved = Annotated[Optional[list[str]], typer.Option("--source", help="Dataset folders, if moved since the build; may be given several times.")]
CachePath = Annotated[Path, typer.Argument(help="Cache folder.", show_default=False)]
Json = Annotated[Optional[Path], typer.Option("--json", help="File to write the same as JSON to.")]


def _build_config(o: dict[str, Any]) -> BuildConfig:
    """From the parameters of `build` or `plan` by name."""
    from .cache.codec import feature_format
    from .cache.encoder import encoder_spec
    from .stages.adapted import adapted_spec
    from .stages.build import BuildConfig
    from .stages.workers import WorkerSpec

    if o["append"] and o["update"]:
        raise UserError("--append and --update exclude each other: --update also adds new episodes")
    mode = "append" if o["append"] else "update" if o["update"] else "new"
    if o["adapter"] and o["vlm"]:
        raise UserError("--adapter brings the VLM that it was trained in; leave --vlm out")
    make = functools.partial(adapted_spec, o["adapter"]) if o["adapter"] else functools.partial(encoder_spec, o["vlm"] or "qwen3vl")
    spec = make(path=o["vlm_path"], resolution=o["resolution"], tokens=o["tokens"], features=o["features"],
                        depth=o["depth"], boundary=o["boundary"])
    return BuildConfig(tuple(o["sources"] or ()), spec, o["out"], o["batch_size"], o["shard_frames"], o["device"], o["dataset_config"],
                       feature_format(o["dtype"], o["compression"]), o["frame_stride"], tuple(o["views"] or ()), o["augment"], mode,
                       WorkerSpec(o["workers"], o["scheduler"], o["slurm"]))


@cache_app.command("build")
def cache_build(
    out: Annotated[Path, typer.Option("--out", help="Cache folder; an unfinished one is resumed.")],
    sources: Sources = None, vlm: Vlm = None, vlm_path: VlmPath = None, adapter: Adapter = None, resolution: Resolution = None, tokens: Tokens = None,
    dtype: Dtype = "fp16", compression: Compression = "none", frame_stride: FrameStride = 1, views: Views = None, augment: Augment = 0,
    append: Append = False, update: Update = False,
    workers: Workers = 0, scheduler: Scheduler = None, slurm: Slurm = None, batch_size: BatchSize = 64, shard_frames: ShardFrames = None,
    dataset_config: DatasetConfig = None, device: Device = "auto", features: FeatureKind = None, depth: Depth = None, boundary: Boundary = None,
) -> None:
    """Run the frozen VLM once over every frame and write features, actions and tables. Run again to resume.

    Example: dvla cache build data/push data/button --vlm qwen3vl --out cache --tokens 49 --dtype int8
    """
    options = dict(locals())
    from .stages.build import build

    config = _build_config(options)
    with progress_bars() as show:
        report = build(config, show)
    timing = report.timing
    rate = f"{timing.images / report.seconds:.0f} pictures/s, {timing.binds} binds" if timing.images else "nothing was missing"
    found = f"{report.resumed_shards} shards found finished"
    if report.previous:
        found += f", {report.adopted_shards} taken whole and {timing.reused} pictures copied from the generation before ({report.previous})"
    console.print(f"{out}: {report.frames} frames, {size(report.bytes)}, {report.quarantined} episodes in quarantine, {found}; "
                  f"{report.seconds:.1f} s, {rate}")
    if report.error:
        console.print(f"stored as {dtype}: relative error {report.error[0]:.2g} over all, {report.error[1]:.2g} in the worst channel")
    if report.pooled is not None:
        console.print(f"pooled to {tokens} tokens: relative error {report.pooled:.2g}")
    if report.quarantined:
        console.print(f"see {out}/quarantine.jsonl for the reasons")


@cache_app.command("plan")
def cache_plan(
    sources: Sources = None,
    out: Annotated[Path, typer.Option("--out", help="Cache folder to be: its disk is measured, nothing stays on it.")] = Path("cache"),
    vlm: Vlm = None, vlm_path: VlmPath = None, adapter: Adapter = None, resolution: Resolution = None, tokens: Tokens = None,
    dtype: Dtype = "fp16", compression: Compression = "none", frame_stride: FrameStride = 1, views: Views = None, augment: Augment = 0,
    workers: Workers = 0, scheduler: Scheduler = None, slurm: Slurm = None, batch_size: BatchSize = 64, shard_frames: ShardFrames = None,
    dataset_config: DatasetConfig = None, device: Device = "auto", features: FeatureKind = None, depth: Depth = None, boundary: Boundary = None,
    append: Append = False, update: Update = False,
    pilot: Annotated[int, typer.Option("--pilot", help="Pictures to measure with, over all datasets and views.")] = 64,
    price: Annotated[Optional[float], typer.Option("--price", help="USD per hour of all that builds.")] = None,
    train_rate: Annotated[Optional[str], typer.Option("--train-samples-per-second",
                                                      help="Samples/s of the policy alone, or 'measured': trained here for a moment.")] = None,
    model_size: Annotated[str, typer.Option("--model-size", help="Policy to measure: tiny, small, base or large.")] = "base",
    draws: Annotated[int, typer.Option("--draws", help="Noise draws that share one sample.")] = 4,
    disk_rate: Annotated[Optional[float], typer.Option("--disk-rate", help="GB/s of the disk to train from; default: measured at --out.")] = None,
    cluster: Annotated[Optional[str], typer.Option("--cluster", help="YAML of a cluster (cluster: the shipped configs/launch/cluster.yaml): tell what it would take there.")] = None,
    frames: Annotated[Optional[int], typer.Option("--frames", min=1, help="With --cluster: of a corpus of so many frames like these.")] = None,
    json: Json = None,
) -> None:
    """Measure a few pictures, then tell bytes, hours, cost, errors, and the speed of training from the cache. Takes the options of build;
    with --append or --update it tells what of the finished cache at --out stays, and what has to be encoded.

    Example: dvla cache plan data/push data/button --out cache --tokens 49 --dtype int8 --price 3.5 --train-samples-per-second measured
    """
    options = dict(locals())
    from .stages.cache_tables import show_cluster, show_forecast, write_json
    from .stages.cluster_plan import cluster_forecast, read_cluster, work_of
    from .stages.pilot import PilotConfig, plan_build

    if frames is not None and cluster is None:
        raise UserError("--frames is of --cluster; give both, or neither")
    config = None if cluster is None else read_cluster(cluster)
    try:
        rate = None if train_rate in (None, "measured") else float(train_rate)
    except ValueError:
        raise UserError(f"--train-samples-per-second {train_rate}: give a number, or 'measured'") from None
    settings = PilotConfig(pilot, price, rate, train_rate == "measured", model_size, draws, None if disk_rate is None else disk_rate * 1e9)
    with progress_bars() as show:
        found = plan_build(_build_config(options), settings, show)
    if config is not None:
        found = dataclasses.replace(found, cluster=cluster_forecast(work_of(found, frames, shard_frames), config, model=found.measured.model))
    write_json(json, found)
    show_forecast(found)
    if found.cluster is not None:
        show_cluster(found.cluster)
    names = {"new": "new", "again": "encoded again", "copied": "copied", "adopted": "in shards that stay whole"}
    for share in found.shares:
        console.print(f"against the finished cache, {names[share.kind]}: {share.pictures} pictures, {size(share.bytes)}, {duration(share.hours * 3600)}")


@cache_app.command("verify")
def cache_verify(
    path: CachePath,
    live: Annotated[int, typer.Option("--live", help="Frames to recompute with the live encoder.")] = 0,
    source: Moved = None,
    vlm_path: VlmPath = None,
    device: Device = "auto",
) -> None:
    """Check every byte against its checksum, and random features against the live encoder. Exit code 1 when something differs.

    Example: dvla cache verify cache --live 32
    """
    from .stages.verify import verify

    with progress_bars() as show:
        problems, check = verify(path, live, tuple(source or ()), vlm_path, device, progress=lambda done, total: show("checksums", done, total))
    for line in problems:
        errors.print(line, style="red", markup=False)
    if check is not None:
        console.print(f"{check.count} frames recomputed: largest difference {check.largest:.2g}, RMS of the difference "
                      f"{check.relative:.2g} of the features' ({check.scale:.2g})")
    if problems:
        raise typer.Exit(1)
    console.print(f"{path}: all files are as they were written")


@cache_app.command("status")
def cache_status(path: CachePath, json: Json = None) -> None:
    """What is done of a cache and of its generations, and whether a builder runs. Reads no feature and needs no VLM.

    Example: dvla cache status cache
    """
    from .stages.cache_tables import show_status, write_json
    from .stages.cache_tools import status

    found = status(path)
    write_json(json, found)
    show_status(found)


@cache_app.command("inspect")
def cache_inspect(
    path: CachePath,
    out: Annotated[Optional[Path], typer.Option("--out", help="Folder for a picture of the token norms of each view; nothing there is overwritten.")] = None,
    html: Annotated[Optional[Path], typer.Option("--html", help="Page to write: datasets, pictures, token norms, action ranges, masks, bytes.")] = None,
    source: Moved = None,
) -> None:
    """What a finished cache was built with, its episodes, instructions and action slots.

    Example: dvla cache inspect cache --html cache.html
    """
    from .stages.cache_content import inspect, norm_pictures
    from .stages.cache_tables import show_facts, show_ranges

    facts = inspect(path)
    ranges = norm_pictures(path, out) if out else {}
    if html is not None:
        from .stages.cache_page import write_cache_page

        with progress_bars() as show:
            nbytes = write_cache_page(path, html, tuple(source or ()), show)
    show_facts(facts)
    show_ranges(ranges)
    if html is not None:
        console.print(f"{html}: {size(nbytes)}, one file that needs no network", markup=False)


@cache_app.command("diff")
def cache_diff(
    a: Annotated[Path, typer.Argument(help="Cache folder A.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="Cache folder B.", show_default=False)],
    samples: Annotated[int, typer.Option("--samples", help="Frames of each view whose features are compared.")] = 256,
    json: Json = None,
) -> None:
    """How two finished caches differ: settings, datasets, episodes, tables, and features of sampled frames. Exit code 1 when they do.

    Example: dvla cache diff cache cache.gen-1
    """
    from .stages.cache_content import diff
    from .stages.cache_tables import show_diff, write_json

    with progress_bars() as show:
        found = diff(a, b, samples, progress=show)
    write_json(json, found)
    show_diff(found)
    if not found.same:
        raise typer.Exit(1)


@cache_app.command("repair")
def cache_repair(path: CachePath, source: Moved = None, vlm_path: VlmPath = None, device: Device = "auto") -> None:
    """Check every file, and build again only what is damaged or missing, with the settings the cache was built with.

    Example: dvla cache repair cache
    """
    from .stages.cache_repair import repair

    with progress_bars() as show:
        report = repair(path, tuple(source or ()), vlm_path, device, lambda line: console.print(line, markup=False), show)
    if report.whole:
        console.print(f"{path}: all files are as they were written")
        return
    console.print(f"{path}: whole again; {report.parts} were written again")
    if report.other_bytes:
        console.print(f"{len(report.other_bytes)} files have other bytes than before, as encoding on other hardware or in other batches gives: "
                      f"{', '.join(report.other_bytes[:3])}{', …' if len(report.other_bytes) > 3 else ''}", style="yellow", markup=False)


@cache_app.command("gc")
def cache_gc(
    path: CachePath,
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
) -> None:
    """List earlier generations, an unfinished next one and files of killed builders; remove them with --yes or after asking.

    Example: dvla cache gc cache --yes
    """
    from .stages.cache_tables import show_garbage
    from .stages.cache_tools import garbage, remove, require_no_builder

    items = garbage(path)
    require_no_builder(path)
    if not items:
        console.print(f"{path}: nothing to remove")
        return
    show_garbage(items)
    if not yes:
        if not console.is_terminal:
            console.print("nothing was removed; give --yes to remove all of these")
            return
        if typer.prompt("type 'remove' to remove all of these", default="", show_default=False).strip() != "remove":
            console.print("nothing was removed")
            return
    console.print(f"{path}: {len(items)} removed, {size(remove(path, items))} freed")


@cache_app.command("export")
def cache_export(
    path: Annotated[Path, typer.Argument(help="Cache folder.", show_default=False)],
    out: Annotated[str, typer.Option("--out", help="Folder, fsspec URL (s3://bucket/cache), or 'pipe:COMMAND' with {name} for the name of each file.")],
    format: Annotated[str, typer.Option("--format", help="webdataset.")] = "webdataset",
    shard_size: Annotated[str, typer.Option("--shard-size", help="Largest size of a tar, as in 1GiB or 500MB.")] = "1GiB",
) -> None:
    """Write a finished cache as WebDataset tars, which other tools can train from. Run again to finish an interrupted export.

    Example: dvla cache export cache --out s3://bucket/cache --shard-size 1GiB
    """
    from .stages.exchange import export, parse_size

    with progress_bars() as show:
        report = export(path, out, format, parse_size(shard_size), show)
    console.print(f"{report.where}: {report.samples} observations in {report.parts} tars, {size(report.bytes)}, {report.found} found finished; "
                  f"{report.seconds:.1f} s", markup=False)


@cache_app.command("import")
def cache_import(
    source: Annotated[str, typer.Argument(help="What an export was written to: folder, fsspec URL, or 'pipe:COMMAND' with {name}.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Cache folder to make; an unfinished one is resumed.")],
) -> None:
    """Make a cache from its export again, byte for byte. Every tar is checked against its checksum first.

    Example: dvla cache import s3://bucket/cache --out cache
    """
    from .stages.exchange import import_cache

    with progress_bars() as show:
        report = import_cache(source, out, show)
    same = "every file is the exported cache's, byte for byte"
    if report.found == report.parts:
        same = "nothing was missing"
    elif report.rewritten:
        same = f"{report.rewritten} files have other bytes than the exported cache's, of the same content (compressed again, or metadata)"
    console.print(f"{out}: {report.samples} observations, {report.parts} shards, {size(report.bytes)}, {report.found} found finished; {same}; "
                  f"{report.seconds:.1f} s", markup=False)
