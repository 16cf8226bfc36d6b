"""`dvla train` and `dvla finetune`: stages two and three."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from annotated_types import Ge

from ...cache.vlm.spec import LoraSpec
from ...common.config import SHARE, from_dotted
from ...common.console import progress_bars, say
from ...common.options import Device, Given, Options, Set, VlmPath, parse_set
from ...errors import UserError, unknown
from .config import ALL, TrainConfig, load_recipe, train_config
from .console import closing_lines, training_lines

if TYPE_CHECKING:
    from .context import TrainReport

Recipe = Annotated[
    str | None, typer.Option("--recipe", help="YAML file, or a shipped recipe such as base or tiny (configs/train).")
]
MaskProb = Annotated[
    float | None,
    typer.Option("--cond-mask-prob", help="Condition dropout: probability of dropping text, images and state, each."),
    SHARE,
]
FlashAttention = Annotated[
    bool, typer.Option("--use-flash-attn", help="Use flash-attn in place of torch's own attention (dvla\\[gpu], CUDA).")
]
StopAfter = Annotated[
    int | None, typer.Option("--stop-after", help="Save and stop at this step; rerun without it to resume."), Ge(1)
]
RUN_FOLDER = "Run folder; one with the same settings is resumed."
LOOP = """seed threads precision compile {} log_every eval_every eval_batches save_every trackers wandb.mode
    wandb.project set_ stop_after device"""
TRAIN = f"""cache out init local dry_run recipe model_size loss_type steps batch_size accumulate draws optimizer.lr
    optimizer.schedule mask
    image_aug blind select.include select.exclude select.success_only select.drop_idle weight temperature normalize
    action_frame history proprio_history order {LOOP.format("flash strategy")}"""
FINETUNE = f"""out source vlm_mode lora adapter optimizer.vlm_lr_scale from_cache local vlm_path recipe steps batch_size
    accumulate optimizer.lr optimizer.schedule mask {LOOP.format("flash")}"""


def train_command(
    given: Annotated[Given, Options(TrainConfig, TRAIN, defaults=False)],
    out: Annotated[Path | None, typer.Option("--out", help=RUN_FOLDER)] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show settings, parameters, memory and a 20-step pilot's speed; write nothing."),
    ] = False,
    recipe: Recipe = None,
    loss_type: Annotated[
        str | None, typer.Option("--loss-type", help="Loss: hybrid, pure_drift, mse, flow or diffusion.")
    ] = None,
    mask: MaskProb = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            "--weight", help="Share of a dataset, NAME=0.3; the others divide the rest. May be given several times."
        ),
    ] = None,
    normalize: Annotated[
        list[str] | None,
        typer.Option(
            "--normalize",
            help="Normalization: std5 (default), meanstd, minmax or quantile, for all or as NAME=SCHEME; may be given "
            "several times.",
        ),
    ] = None,
    flash: FlashAttention = False,
    set_: Set = None,
    stop_after: StopAfter = None,
) -> None:
    """Stage two: train the Drifting DiT from a cache. Ctrl-C saves; rerun the same command to resume.

    Example: dvla train --from-cache cache --out runs/base --model-size base --steps 100000
    """
    if out is None and not dry_run:
        raise UserError("Missing option '--out' (the run folder); only --dry-run needs none")
    given |= {"out": str(out or ""), "loss.kind": loss_type, "weights": _shares(weight)}
    given |= {"normalize": _schemes(normalize)}
    overrides = _overrides(given, mask, flash, set_)
    if isinstance(overrides.get("init"), str):
        from .warm_start import settings_of_start

        overrides = {**settings_of_start(overrides["init"]), **overrides}
    config = train_config(recipe, overrides)
    if dry_run:
        _dry_run(config, recipe, overrides)
        return
    from .train import train

    with progress_bars() as bar:
        report = train(config, training_lines(bar, config.steps), say, stop_after)
    _finish(report, config, "eval {run} --env TASK" if config.blind else "finetune --lora {run} --out runs/lora")


def _dry_run(config: TrainConfig, recipe: str | None, overrides: Given) -> None:
    """Measure a run and show it."""
    from .dry_run import dry_run, show

    with progress_bars() as bar:
        found = dry_run(config, lambda done, total: bar("pilot", done, total))
    if _speaks():
        show(found, load_recipe(recipe) if recipe else {}, overrides)


def finetune_command(
    start: Annotated[Path, typer.Argument(help="Run or checkpoint of stage two.", show_default=False)],
    given: Annotated[Given, Options(TrainConfig, FINETUNE, defaults=False)],
    adapter: Annotated[Given, Options(LoraSpec, "r alpha dropout targets last_n_blocks")],
    out: Annotated[Path, typer.Option("--out", help=RUN_FOLDER)],
    source: Annotated[
        list[str] | None,
        typer.Option(
            "--source",
            help="Dataset folder or hub id behind the cache, if moved since it was built; may be given several times.",
        ),
    ] = None,
    vlm_mode: Annotated[
        str | None,
        typer.Option(
            "--vlm-mode",
            help="Train in the VLM: lora (the default), full (all between pixels and features), or nothing (frozen, "
            "but live).",
        ),
    ] = None,
    lora: Annotated[
        bool | None, typer.Option("--lora/--frozen", help="Short for --vlm-mode lora and --vlm-mode frozen.")
    ] = None,
    from_cache: Annotated[
        str | None,
        typer.Option(
            "--from-cache",
            help="The run's cache, if it moved; or one built with "
            "--boundary n, above which only the last n blocks run.",
        ),
    ] = None,
    vlm_path: VlmPath = None,
    recipe: Recipe = None,
    mask: MaskProb = None,
    flash: FlashAttention = False,
    set_: Set = None,
    stop_after: StopAfter = None,
    device: Device = "auto",
) -> None:
    """Stage three: continue with the live VLM, by default with LoRA in it, starting at the same loss.

    Settings that neither a recipe nor an option gives are those of the stage-two run. Example:
    dvla finetune --lora runs/base --source data/push --source data/button --out runs/lora --steps 2000 --lr 1e-4
    """
    from .stage_three.finetune import finetune, finetune_config

    mode = _vlm_mode(vlm_mode, lora)
    spec = from_dotted(LoraSpec, adapter, "LoRA") if mode == "lora" else None
    given |= {"out": str(out), "cache": from_cache, "device": device}
    overrides = (_dotted(load_recipe(recipe)) if recipe else {}) | _overrides(given, mask, flash, set_)
    config = finetune_config(start, tuple(source or ()), spec, overrides, vlm_path, mode == "full")
    with progress_bars() as bar:
        report, _ = finetune(config, training_lines(bar, config.train.steps), say, stop_after)
    _finish(report, config.train, "eval {run} --env TASK")


def _overrides(given: Given, mask: float | None, flash: bool, set_: list[str] | None) -> Given:
    """The settings that a command's options give; those of --set come last and win."""
    given = given | {"attention": "flash" if flash else None}
    given |= dict.fromkeys(("masking.text", "masking.images", "masking.proprio"), mask)
    found = {name: str(v) if isinstance(v, Path) else v for name, v in given.items() if v is not None}
    return found | parse_set(set_)


def _vlm_mode(given: str | None, lora: bool | None) -> str:
    """--vlm-mode, or what --lora or --frozen stand for."""
    short = "lora" if lora is None or lora else "frozen"
    if given not in (None, "frozen", "lora", "full"):
        raise unknown("--vlm-mode", given, ["frozen", "lora", "full"])
    if given and lora is not None and given != short:
        raise UserError(f"--{short} is short for --vlm-mode {short}; given as well: --vlm-mode {given}")
    return given or short


def _dotted(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"optimizer": {"lr": 1e-4}}` → {"optimizer.lr": 1e-4}; mappings whose keys are not settings stay whole."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= (
            _dotted(value, f"{prefix}{key}.")
            if isinstance(value, dict) and key not in ("unfreeze", "weights", "normalize")
            else {f"{prefix}{key}": value}
        )
    return out


def _finish(report: TrainReport, config: TrainConfig, next_command: str) -> None:
    """Print where a run stands; one that a signal stopped ends like any interrupted command."""
    if _speaks():
        for line in closing_lines(report, config.steps, f"dvla {next_command.format(run=report.run)}"):
            say(line)
    if report.interrupted:
        raise typer.Exit(130)


def _speaks() -> bool:
    """Whether this process is the one that prints, of those that `torchrun` started."""
    return os.environ.get("RANK", "0") == "0"


def _shares(given: list[str] | None) -> dict[str, float] | None:
    """`["droid=0.3"]` → {"droid": 0.3}; None: not given. A name may hold "="."""
    out = {}
    for item in given or []:
        name, separator, share = item.rpartition("=")
        try:
            out[name] = float(share)
        except ValueError:
            separator = ""
        if not separator or not name:
            raise UserError(f"--weight {item}: expected NAME=SHARE, e.g. --weight droid=0.3")
    return out or None


def _schemes(given: list[str] | None) -> dict[str, str] | None:
    """`["minmax", "droid=quantile"]` → {"*": "minmax", "droid": "quantile"}; None: not given."""
    parts = [item.rpartition("=") for item in given or []]
    return {name if separator else ALL: scheme for name, separator, scheme in parts} or None
