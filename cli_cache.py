"""`dvla cache …`: stage one, the feature cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from .errors import UserError
from .stages.console import console, errors, progress_bars, size

cache_app = typer.Typer(no_args_is_help=True, help="Stage one: the feature cache.")

Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
VlmPath = Annotated[Optional[str], typer.Option("--vlm-path", help="Checkpoint folder or hub id; default: the model's own.")]


@cache_app.command("build")
def cache_build(
    out: Annotated[Path, typer.Option("--out", help="Cache folder; an unfinished one is resumed.")],
    sources: Annotated[Optional[list[str]], typer.Argument(help="Dataset folders or hub ids.", show_default=False)] = None,
    vlm: Annotated[str, typer.Option("--vlm", help="Model: qwen3vl or tiny_qwen3vl (configs/models).")] = "qwen3vl",
    vlm_path: VlmPath = None,
    resolution: Annotated[Optional[int], typer.Option("--resolution", help="Side of the padded, resized picture; default: the model's own.")] = None,
    tokens: Annotated[Optional[int], typer.Option("--tokens", help="Tokens per picture, averaged on the grid (196, 49, 16 …); default: all.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="fp16, int8 or fp8 (with channel and token scales).")] = "fp16",
    compression: Annotated[str, typer.Option("--compression", help="none, zstd or lz4: lossless, for slow disks.")] = "none",
    frame_stride: Annotated[int, typer.Option("--frame-stride", help="Features of every n-th frame; actions of all.")] = 1,
    views: Annotated[Optional[list[str]], typer.Option("--view", help="Camera to encode; may be given several times. Default: all.")] = None,
    augment: Annotated[int, typer.Option("--augment", help="Augmented variants of every picture.")] = 0,
    append: Annotated[bool, typer.Option("--append", help="Add new episodes to a finished cache, in a new generation.")] = False,
    update: Annotated[bool, typer.Option("--update", help="Bring a finished cache up to its sources and settings, in a new generation.")] = False,
    workers: Annotated[int, typer.Option("--workers", help="Worker processes, one per GPU where there are GPUs; 0: this one alone.")] = 0,
    scheduler: Annotated[Optional[str], typer.Option("--scheduler", help="Address of a dask scheduler, tcp://host:8786.")] = None,
    slurm: Annotated[Optional[str], typer.Option("--slurm", help="YAML of a Slurm cluster (configs/launch/slurm.yaml).")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Pictures per encoder call.")] = 64,
    shard_frames: Annotated[Optional[int], typer.Option("--shard-frames", help="Frames per shard file; default: about 256 MiB.")] = None,
    dataset_config: Annotated[Optional[str], typer.Option("--dataset-config", help="YAML of the field map, or a shipped name; default: found by robot type.")] = None,
    device: Device = "auto",
) -> None:
    """Run the frozen VLM once over every frame and write features, actions and tables. Run again to resume.

    Example: dvla cache build data/push data/button --vlm qwen3vl --out cache --tokens 49 --dtype int8
    """
    from .cache.codec import feature_format
    from .cache.encoder import encoder_spec
    from .stages.build import BuildConfig, build
    from .stages.workers import WorkerSpec

    if append and update:
        raise UserError("--append and --update exclude each other: --update also adds new episodes")
    spec = encoder_spec(vlm, path=vlm_path, resolution=resolution, tokens=tokens)
    config = BuildConfig(tuple(sources or ()), spec, out, batch_size, shard_frames, device, dataset_config, feature_format(dtype, compression),
                         frame_stride, tuple(views or ()), augment, "append" if append else "update" if update else "new",
                         WorkerSpec(workers, scheduler, slurm))
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
    if report.quarantined:
        console.print(f"see {out}/quarantine.jsonl for the reasons")


@cache_app.command("verify")
def cache_verify(
    path: Annotated[Path, typer.Argument(help="Cache folder.", show_default=False)],
    live: Annotated[int, typer.Option("--live", help="Frames to recompute with the live encoder.")] = 0,
    source: Annotated[Optional[list[str]], typer.Option("--source", help="Dataset folders, if moved since the build; may be given several times.")] = None,
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
