"""`dvla train`, `dvla finetune`, `dvla cotrain` and `dvla export`: stages two and three, and what they made as a folder for deployment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ...common.console import console, progress_bars
from ...common.options import Device, VlmPath
from ...errors import UserError, unknown
from .console import closing_line, training_lines

# Options of both commands. None: the recipe's value, or the default (of `finetune`: the stage-two run's value).
Recipe = Annotated[
    str | None, typer.Option("--recipe", help="YAML file, or a shipped recipe such as base or tiny (configs/train).")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any setting, e.g. --set optimizer.warmup=100; may be given several times."),
]
LocalCache = Annotated[
    str | None, typer.Option("--local-cache", help="Folder for copies of what is read of a cache behind a URL.")
]
Steps = Annotated[int | None, typer.Option("--steps", "--max-steps", help="Optimiser steps of the run.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Observations per batch and device.")]
Accumulation = Annotated[int | None, typer.Option("--grad-accumulation", help="Batches per optimiser step.")]
Draws = Annotated[int | None, typer.Option("--draws", help="Noise draws per observation.")]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Peak learning rate.")]
MaskProb = Annotated[
    float | None, typer.Option("--cond-mask-prob", help="Probability of dropping text, pictures or state, each.")
]
Seed = Annotated[int | None, typer.Option("--seed", help="Order of samples, noise, initialisation.")]
Threads = Annotated[int | None, typer.Option("--num-workers", help="Loader threads.")]
Precision = Annotated[str | None, typer.Option("--precision", help="fp32 or bf16.")]
Compile = Annotated[bool, typer.Option("--compile", help="Compile the network with torch.compile.")]
FlashAttention = Annotated[
    bool, typer.Option("--use-flash-attn", help="flash-attn in place of torch's own attention (dvla\\[gpu], CUDA).")
]
Strategy = Annotated[str | None, typer.Option("--strategy", help="On several devices (torchrun): ddp, fsdp2 or zero2.")]
LogEvery = Annotated[int | None, typer.Option("--log-every", help="Steps between log lines.")]
EvalEvery = Annotated[
    int | None, typer.Option("--eval-every", help="Steps between evaluations on held-out episodes; 0: never.")
]
EvalBatches = Annotated[int | None, typer.Option("--eval-batches", help="Batches of one evaluation.")]
SaveEvery = Annotated[int | None, typer.Option("--save-every", help="Steps between checkpoints.")]
WandbMode = Annotated[
    str | None, typer.Option("--wandb-mode", help="online, offline or disabled; RUN/log.jsonl is always written.")
]
WandbProject = Annotated[str | None, typer.Option("--wandb-project", help="W&B project.")]
StopAfter = Annotated[
    int | None, typer.Option("--stop-after", help="Save and stop at this step of the run; run again to go on.")
]
OPTIONS: dict[str, tuple[str, ...]] = {  # parameter of a command → the settings it gives
    "from_cache": ("cache",),
    "init": ("init",),
    "local": ("local",),
    "out": ("out",),
    "model_size": ("model_size",),
    "loss_type": ("loss.kind",),
    "steps": ("steps",),
    "batch_size": ("batch_size",),
    "accumulation": ("accumulate",),
    "draws": ("draws",),
    "lr": ("optimizer.lr",),
    "vlm_lr_scale": ("optimizer.vlm_lr_scale",),
    "mask": ("masking.text", "masking.images", "masking.proprio"),
    "image_aug": ("image_aug",),
    "blind": ("blind",),
    "temperature": ("temperature",),
    "order": ("order",),
    "seed": ("seed",),
    "threads": ("threads",),
    "precision": ("precision",),
    "compile_": ("compile",),
    "strategy": ("strategy",),
    "log_every": ("log_every",),
    "eval_every": ("eval_every",),
    "eval_batches": ("eval_batches",),
    "save_every": ("save_every",),
    "wandb_mode": ("wandb.mode",),
    "wandb_project": ("wandb.project",),
    "device": ("device",),
}


def train_command(
    from_cache: Annotated[
        str,
        typer.Option(
            "--from-cache",
            help="Folder of a cache or of its WebDataset export; or a cache's URL (s3://…), with --local-cache.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Run folder; one with the same settings is resumed.")
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(
            "--init",
            help="Run or checkpoint to go on with, on a cache of the features it sees (cache build --adapter).",
        ),
    ] = None,
    local: LocalCache = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Show settings, parameters, memory and speed from a 20-step pilot; write nothing."
        ),
    ] = False,
    recipe: Recipe = None,
    model_size: Annotated[str | None, typer.Option("--model-size", help="tiny, small, base or large.")] = None,
    loss_type: Annotated[
        str | None, typer.Option("--loss-type", help="hybrid, pure_drift, mse, flow or diffusion.")
    ] = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    accumulation: Accumulation = None,
    draws: Draws = None,
    lr: LearningRate = None,
    mask: MaskProb = None,
    image_aug: Annotated[
        bool, typer.Option("--image-aug", help="Draw pictures among the augmented variants of the cache.")
    ] = False,
    blind: Annotated[bool, typer.Option("--blind", help="Train the proprioception-only baseline.")] = False,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            "--weight", help="Share of a dataset, NAME=0.3; the others divide the rest. May be given several times."
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", help="Datasets are drawn in proportion to size^this: 1 by size, 0 all alike."),
    ] = None,
    order: Annotated[
        str | None, typer.Option("--order", help="global shuffle, block shuffle (slow disks) or sequential.")
    ] = None,
    seed: Seed = None,
    threads: Threads = None,
    precision: Precision = None,
    compile_: Compile = False,
    flash: FlashAttention = False,
    strategy: Strategy = None,
    log_every: LogEvery = None,
    eval_every: EvalEvery = None,
    eval_batches: EvalBatches = None,
    save_every: SaveEvery = None,
    wandb_mode: WandbMode = None,
    wandb_project: WandbProject = None,
    set_: Set = None,
    stop_after: StopAfter = None,
    device: Annotated[str | None, typer.Option("--device", help="auto (the default), cpu, cuda or cuda:N.")] = None,
) -> None:
    """Stage two: train the Drifting DiT from a cache. Ctrl-C saves; run again to resume.

    Example: dvla train --from-cache cache --out runs/base --model-size base --steps 100000
    """
    from .config import load_recipe, train_config

    if out is None and not dry_run:
        raise UserError("Missing option '--out' (the run folder); only --dry-run needs none")
    overrides = {"out": "", **{k: v for k, v in _overrides(locals()).items() if v is not None}}
    if init is not None:
        from .warm_start import network_of

        overrides = {**network_of(init), **overrides}
    config = train_config(recipe, overrides)
    if dry_run:
        from .dry_run import dry_run as pilot
        from .dry_run import show

        with progress_bars() as bar:
            found = pilot(config, lambda done, total: bar("pilot", done, total))
        if _speaks():
            show(found, load_recipe(recipe) if recipe else {}, overrides)
        return
    from .train import train

    with progress_bars(every=None) as bar:  # the run's own log lines tell
        report = train(config, training_lines(bar, config.steps), console.print, stop_after)
    _finish(report)


def finetune_command(
    start: Annotated[Path, typer.Argument(help="Run or checkpoint of stage two.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Run folder; one with the same settings is resumed.")],
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
            help="What is trained of the VLM: lora in its vision tower (the default), the full tower, "
            "or nothing (frozen, but live).",
        ),
    ] = None,
    lora: Annotated[
        bool | None, typer.Option("--lora/--frozen", help="Short for --vlm-mode lora and --vlm-mode frozen.")
    ] = None,
    lora_r: Annotated[int, typer.Option("--lora-r", help="Rank.")] = 16,
    lora_alpha: Annotated[float, typer.Option("--lora-alpha", help="The update is scaled by alpha / r.")] = 32.0,
    lora_dropout: Annotated[
        float, typer.Option("--lora-dropout", help="Share of the adapter's input that is dropped in training.")
    ] = 0.0,
    lora_targets: Annotated[
        str, typer.Option("--lora-targets", help="qv (queries and values), attention or all-linear.")
    ] = "attention",
    last_blocks: Annotated[
        int | None,
        typer.Option(
            "--lora-last-blocks",
            help="Only the last n vision blocks; default: all, or those above the cache's boundary.",
        ),
    ] = None,
    vlm_lr_scale: Annotated[
        float | None, typer.Option("--vlm-lr-scale", help="The VLM's learning rate as a share of --lr.")
    ] = None,
    from_cache: Annotated[
        str | None,
        typer.Option(
            "--from-cache",
            help="The run's cache, if it moved; or one built with "
            "--boundary n, above which only the last n vision blocks run.",
        ),
    ] = None,
    local: LocalCache = None,
    vlm_path: VlmPath = None,
    recipe: Recipe = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    accumulation: Accumulation = None,
    lr: LearningRate = None,
    mask: MaskProb = None,
    seed: Seed = None,
    threads: Threads = None,
    precision: Precision = None,
    compile_: Compile = False,
    flash: FlashAttention = False,
    log_every: LogEvery = None,
    eval_every: EvalEvery = None,
    eval_batches: EvalBatches = None,
    save_every: SaveEvery = None,
    wandb_mode: WandbMode = None,
    wandb_project: WandbProject = None,
    set_: Set = None,
    stop_after: StopAfter = None,
    device: Device = "auto",
) -> None:
    """Stage three: continue with the live VLM, by default with LoRA in it, starting at the same loss.

    Settings that neither a recipe nor an option gives are those of the stage-two run. Example:
    dvla finetune --lora runs/base --source data/push --source data/button --out runs/lora --steps 2000 --lr 1e-4
    """
    from ...cache.vlm.lora import LoraSpec
    from .config import load_recipe
    from .stage_three.finetune import finetune, finetune_config

    mode = _vlm_mode(vlm_mode, lora)
    spec = (
        LoraSpec(
            r=lora_r,
            alpha=lora_alpha,
            dropout=lora_dropout,
            targets=lora_targets,  # type: ignore[arg-type]  # it checks them
            last_n_blocks=last_blocks,
        )
        if mode == "lora"
        else None
    )
    given = {k: v for k, v in _overrides(locals()).items() if v is not None}
    config = finetune_config(
        start,
        tuple(source or ()),
        spec,
        {**(_dotted(load_recipe(recipe)) if recipe else {}), **given},
        vlm_path,
        mode == "full",
    )
    with progress_bars(every=None) as bar:  # the run's own log lines tell
        report, _ = finetune(config, training_lines(bar, config.train.steps), console.print, stop_after)
    _finish(report)


def _vlm_mode(given: str | None, lora: bool | None) -> str:
    """--vlm-mode, or what --lora or --frozen stand for."""
    short = "lora" if lora is None or lora else "frozen"
    if given not in (None, "frozen", "lora", "full"):
        raise unknown("--vlm-mode", given, ["frozen", "lora", "full"])
    if given and lora is not None and given != short:
        raise UserError(f"--{short} is short for --vlm-mode {short}; given as well: --vlm-mode {given}")
    return given or short


def _overrides(given: dict[str, Any]) -> dict[str, Any]:
    """The settings behind a command's options, `given` by parameter name; None: not given. Those of --set come last and win."""
    out = {setting: given[name] for name, settings in OPTIONS.items() if name in given for setting in settings}
    out = {k: None if v is False else str(v) if isinstance(v, Path) else v for k, v in out.items()}
    return (
        out
        | {"attention": "flash" if given["flash"] else None, "weights": _shares(given.get("weight"))}
        | _settings(given["set_"])
    )


def _dotted(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"optimizer": {"lr": 1e-4}}` → {"optimizer.lr": 1e-4}; mappings whose keys are not settings stay whole."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= (
            _dotted(value, f"{prefix}{key}.")
            if isinstance(value, dict) and key not in ("unfreeze", "weights")
            else {f"{prefix}{key}": value}
        )
    return out


def _finish(report: Any) -> None:
    """Closing line of a training run; a run that a signal stopped ends like any interrupted command."""
    if _speaks():
        closing_line(report)
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


def _settings(given: list[str] | None) -> dict[str, Any]:
    """`["optimizer.warmup=100"]` → {"optimizer.warmup": 100}; values are YAML."""
    import yaml

    out = {}
    for item in given or []:
        key, separator, value = item.partition("=")
        if not separator:
            raise UserError(f"--set {item}: expected name=value, e.g. --set optimizer.warmup=100")
        try:
            out[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"--set {item}: the value is not valid YAML") from None
    return out
