"""`dvla cache build` and `dvla cache plan`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from annotated_types import Ge

from ...common.config import from_dotted
from ...common.console import errors, progress_bars, say, write_json
from ...common.options import Given, Json, Options
from ...common.text import duration, size
from ...errors import UserError, unknown
from .config import BuildConfig, FeatureChoice, PilotConfig
from .quarantine import TooManyQuarantined

if TYPE_CHECKING:
    from .build import BuildReport
    from .planning.forecast import Share

# Parameters of `build` and of `plan`.
Sources = Annotated[list[str] | None, typer.Argument(help="Dataset folders or hub ids.", show_default=False)]
Choice = Annotated[Given, Options(FeatureChoice)]
Append = Annotated[bool, typer.Option("--append", help="Add new episodes to a finished cache, in a new generation.")]
Update = Annotated[
    bool,
    typer.Option("--update", help="Update a finished cache to its current sources and settings, as a new generation."),
]
SELECT = "select.include select.exclude select.success_only select.drop_idle"
FEATURES = """choice.vlm choice.vlm_path choice.adapter choice.resolution choice.tokens choice.dtype choice.compression
    frame_stride views augment"""
RUNNING = """workers.count workers.scheduler workers.slurm batch_size shard_frames dataset_config device
    choice.features choice.depth choice.layers choice.layers_as choice.keep choice.pool choice.prompt_tokens
    choice.boundary"""
BUILD = f"""out sources {FEATURES} {SELECT} append update max_quarantine
    allow_quarantine {RUNNING}"""
PLAN = f"sources out {FEATURES} {SELECT} {RUNNING} append update pilot"


def _build_config(given: Given, choice: Given, sources: list[str] | None, append: bool, update: bool) -> BuildConfig:
    """The settings of a build that the options of `build` or `plan` give."""
    if append and update:
        raise UserError("--append and --update exclude each other: --update also adds new episodes")
    chosen = from_dotted(FeatureChoice, choice)
    mode = "append" if append else "update" if update else "new"
    made = {"sources": tuple(sources or ()), "encoder": chosen.spec(), "format": chosen.format(), "mode": mode}
    return from_dotted(BuildConfig, given | made)


def cache_build(
    given: Annotated[Given, Options(BuildConfig, BUILD)],
    choice: Choice,
    sources: Sources = None,
    append: Append = False,
    update: Update = False,
) -> None:
    """Run the frozen VLM once over every frame and write features, actions and tables. Rerun to resume.

    Example: dvla cache build data/push data/button --vlm qwen3vl --out cache --tokens 49 --dtype int8
    """
    from .build import build

    config = _build_config(given, choice, sources, append, update)
    with refusal(), progress_bars() as show:
        report = build(config, show, say)
    for line in build_lines(config, report):
        say(line)
    if report.lost:
        raise typer.Exit(1)


@contextlib.contextmanager
def refusal() -> Iterator[None]:
    """A build that lost too many episodes ends with exit code 1, and with their reasons below the message."""
    try:
        yield
    except TooManyQuarantined as error:
        for line in (str(error), *error.reasons):
            errors.print(line, style="red", markup=False)
        raise typer.Exit(1) from None


def build_lines(config: BuildConfig, report: BuildReport) -> list[str]:
    """What a build made, and the next command."""
    from ...common.device import peak_line  # and torch with it

    timing, out = report.timing, config.out
    rate = "already complete" if report.complete_before else "nothing to encode"
    if timing.images:
        rate = f"{report.images_per_second:.0f} images/s, bottleneck: {timing.bottleneck}"
    lines = [
        f"{out}: {report.frames} frames, {size(report.bytes)}, {report.quarantined} episodes in quarantine",
        f"{report.resumed_shards} shards reused; {report.seconds:.1f} s, {rate}",
    ]
    if report.previous:
        copied = f"{report.adopted_shards} shards reused unchanged, {timing.reused} images copied"
        lines += [f"from the previous generation: {copied}", f"previous generation: {report.previous}"]
    if report.error:
        overall, worst = report.error
        error = f"relative error {overall:.2g} overall, {worst:.2g} in the worst channel"
        lines.append(f"stored as {config.format.dtype}: {error}")
    if report.pooled is not None:
        lines.append(f"pooled to {config.encoder.tokens} tokens: relative error {report.pooled:.2g}")
    if report.quarantined:
        lines.append(f"see {out}/quarantine.jsonl for the reasons")
    lines += [peak_line(), *report.remarks]
    if report.lost:
        return [f"no episode of {', '.join(report.lost)} could be read; run `dvla data check` on it", *lines]
    split = config.encoder.boundary is not None
    command = "finetune --lora RUN" if split else "train"
    return [*lines, f"next: dvla {command} --from-cache {out} --out runs/{'lora' if split else 'base'}"]


def cache_plan(
    given: Annotated[Given, Options(BuildConfig, PLAN)],
    choice: Choice,
    pilot: Annotated[Given, Options(PilotConfig, "images price train_rate model_size draws disk_rate")],
    sources: Sources = None,
    out: Annotated[
        Path, typer.Option("--out", help="Future cache folder: its disk is measured, nothing stays on it.")
    ] = Path("cache"),
    append: Append = False,
    update: Update = False,
    cluster: Annotated[
        str | None,
        typer.Option("--cluster", help="YAML of a cluster to predict for; cluster: the shipped example."),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option("--frames", help="With --cluster: number of frames, like these, to predict for."),
        Ge(1),
    ] = None,
    json: Json = None,
) -> None:
    """Measure a few images, then predict bytes, hours, cost, errors, and the speed of training from the cache.

    Takes the options of build; with --append or --update it shows what of the finished cache at --out stays, and what
    has to be encoded.

    Example: dvla cache plan data/push data/button --out cache --tokens 49 --dtype int8 --price 3.5
    --train-samples-per-second measured
    """
    from .planning.cluster import cluster_forecast, read_cluster, work_of
    from .planning.pilot import plan_build
    from .planning.tables import show_cluster, show_forecast

    if frames is not None and cluster is None:
        raise UserError("--frames needs --cluster; give both, or neither")
    machines = None if cluster is None else read_cluster(cluster)
    settings = _pilot_config(pilot)
    with progress_bars() as show:
        found = plan_build(_build_config(given | {"out": out}, choice, sources, append, update), settings, show, say)
    if machines is not None:
        work = work_of(found, frames, given.get("shard_frames"))
        found = dataclasses.replace(found, cluster=cluster_forecast(work, machines, model=found.measured.model))
    write_json(json, found)
    show_forecast(found)
    if found.cluster is not None:
        show_cluster(found.cluster)
    _show_shares(found.shares)


def _pilot_config(given: Given) -> PilotConfig:
    """The settings of `plan`'s own options, whose rates are a number or 'measured', and GB/s."""
    rate: Any = given.get("train_rate")
    measured = rate == "measured"
    try:
        rate = None if measured or rate is None else float(rate)
    except ValueError:
        raise UserError(f"--train-samples-per-second {rate}: give a number, or 'measured'") from None
    disk = None if "disk_rate" not in given else given["disk_rate"] * 1e9
    rates = {"train_rate": rate, "measure_model": measured, "disk_rate": disk}
    return from_dotted(PilotConfig, given | rates, "plan")


def _show_shares(shares: tuple[Share, ...]) -> None:
    """What an append or update keeps of the finished cache."""
    names = {"new": "new", "again": "encoded again", "copied": "copied", "adopted": "in shards reused unchanged"}
    for share in shares:
        say(
            f"against the finished cache, {names[share.kind]}: {share.pictures} images, {size(share.bytes)}, "
            f"{duration(share.hours * 3600)}"
        )


def vlm_tiny(
    out: Annotated[Path, typer.Option("--out", help="Folder to create.")],
    arch: Annotated[str, typer.Option("--arch", help="Architecture: qwen3vl or paligemma2.")] = "qwen3vl",
    seed: Annotated[int, typer.Option("--seed", help="Random seed of the weights."), Ge(0)] = 0,
) -> None:
    """Make a checkpoint of the real architecture at toy width with random weights, offline: for demos and tests.

    Example: dvla vlm tiny --arch qwen3vl --out vlm
    """
    from ...cache.vlm.load import NAMES
    from ...cache.vlm.tiny_paligemma2 import TinyPaliGemmaSpec, make_tiny_paligemma2
    from ...cache.vlm.tiny_qwen3vl import TinySpec, make_tiny_qwen3vl

    if arch not in NAMES:
        raise unknown("architecture", arch, NAMES)
    if out.exists():
        raise UserError(f"{out} exists; choose another --out")
    if arch == "qwen3vl":
        make_tiny_qwen3vl(out, TinySpec(seed=seed))
    else:
        make_tiny_paligemma2(out, TinyPaliGemmaSpec(seed=seed))
    say(f"{out}: {NAMES[arch]} at toy width with random weights")
