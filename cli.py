"""The `dvla` command: parse, build a config, call one stage. Heavy imports happen inside the commands."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ._version import __version__
from .cli_cache import Device, VlmPath, cache_app
from .cli_data import data_app
from .errors import UserError
from .stages.console import (closing_line, console, doctor_table, errors, progress_bars, success_table,
                             training_lines)

app = typer.Typer(name="dvla", no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False,
                  context_settings={"help_option_names": ["-h", "--help"]},
                  help="Run the frozen VLM **once** into a feature cache, train a one-step Drifting DiT from it, bring the VLM back with LoRA.")
vlm_app = typer.Typer(no_args_is_help=True, help="Vision-language checkpoints.")
app.add_typer(data_app, name="data")
app.add_typer(vlm_app, name="vlm")
app.add_typer(cache_app, name="cache")

Out = Annotated[Path, typer.Option("--out", help="Folder to create.")]


def main() -> None:
    """Entry point: `UserError` is one line and exit code 2; Ctrl-C is exit code 130."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        run(sys.argv[1:])
    except UserError as error:
        errors.print(f"error: {error}", style="red", markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        errors.print("interrupted; run the same command again to go on", style="yellow")
        sys.exit(130)


def run(arguments: list[str]) -> None:
    """Run one command line in this process. Raises `UserError`; usage errors exit 2 by themselves."""
    click_error = typer.BadParameter.__mro__[2]     # ClickException: of click, or of the copy inside newer typers
    try:
        code = typer.main.get_command(app).main(args=arguments, prog_name="dvla", standalone_mode=False)
    except click_error as error:    # wrong options: click's own message names them
        if type(error).__name__ == "NoArgsIsHelpError":     # a group without a command: its help
            error.show()
            sys.exit(error.exit_code)
        message, context = " ".join(error.format_message().split()).rstrip("."), getattr(error, "ctx", None)
        raise UserError(f"{message}; see `{context.command_path if context else 'dvla'} --help`") from None
    except typer.Abort:
        raise KeyboardInterrupt from None
    if code == 130:     # how newer typers report Ctrl-C
        raise KeyboardInterrupt
    if code:
        sys.exit(code)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False) -> None:
    if version:
        console.print(f"dvla {__version__}")
        raise typer.Exit()


# --- vlm ---------------------------------------------------------------------------------------------------------------

@vlm_app.command("tiny")
def vlm_tiny(
    out: Out,
    arch: Annotated[str, typer.Option("--arch", help="Architecture: qwen3vl or paligemma2.")] = "qwen3vl",
    seed: Annotated[int, typer.Option("--seed", help="Of the random weights.")] = 0,
) -> None:
    """Make a checkpoint of the real architecture at toy width with random weights, offline: for demos and tests, not for robots.

    Example: dvla vlm tiny --arch qwen3vl --out vlm
    """
    from .cache.tiny_paligemma import TinyPaliGemmaSpec, make_tiny_paligemma2
    from .cache.tiny_vlm import TinySpec, make_tiny_qwen3vl
    from .errors import unknown

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


# --- training ----------------------------------------------------------------------------------------------------------

Recipe = Annotated[Optional[str], typer.Option("--recipe", help="YAML file or a shipped recipe (configs/train).")]
Set = Annotated[Optional[list[str]], typer.Option("--set", help="Any setting, e.g. --set optimizer.warmup=100; may be given several times.")]
Steps = Annotated[Optional[int], typer.Option("--steps", "--max-steps", help="Optimiser steps of the run.")]
BatchSize = Annotated[Optional[int], typer.Option("--batch-size", help="Observations per step.")]
LearningRate = Annotated[Optional[float], typer.Option("--lr", help="Peak learning rate.")]
MaskProb = Annotated[Optional[float], typer.Option("--cond-mask-prob", help="Probability of dropping text, pictures or state, each.")]
Seed = Annotated[Optional[int], typer.Option("--seed", help="Order of samples, noise, initialisation.")]
StopAfter = Annotated[Optional[int], typer.Option("--stop-after", help="Save and stop at this step of the run; run again to go on.")]


@app.command("train")
def train_command(
    from_cache: Annotated[Path, typer.Option("--from-cache", help="Cache folder.")],
    out: Annotated[Path, typer.Option("--out", help="Run folder; one with the same settings is resumed.")],
    recipe: Recipe = None,
    model_size: Annotated[Optional[str], typer.Option("--model-size", help="tiny, small, base or large.")] = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    accumulate: Annotated[Optional[int], typer.Option("--grad-accumulation", help="Batches per optimiser step.")] = None,
    draws: Annotated[Optional[int], typer.Option("--draws", help="Noise draws per observation.")] = None,
    lr: LearningRate = None,
    loss_type: Annotated[Optional[str], typer.Option("--loss-type", help="mse, pure_drift or hybrid.")] = None,
    mask: MaskProb = None,
    image_aug: Annotated[bool, typer.Option("--image-aug", help="Draw pictures among the augmented variants of the cache.")] = False,
    blind: Annotated[bool, typer.Option("--blind", help="Train the proprioception-only baseline.")] = False,
    seed: Seed = None,
    set_: Set = None,
    stop_after: StopAfter = None,
    device: Device = "auto",
) -> None:
    """Stage two: train the Drifting DiT from a cache. Ctrl-C saves; run again to resume.

    Example: dvla train --from-cache cache --out runs/base --model-size base --steps 100000
    """
    from .stages.train import train
    from .stages.train_config import train_config

    config = train_config(recipe, {
        "cache": str(from_cache), "out": str(out), "model_size": model_size, "steps": steps, "batch_size": batch_size,
        "accumulate": accumulate, "draws": draws, "optimizer.lr": lr, "loss.kind": loss_type, "masking.text": mask,
        "masking.images": mask, "masking.proprio": mask, "blind": blind or None, "image_aug": image_aug or None,
        "seed": seed, "device": device, **_settings(set_)})
    with progress_bars() as show:
        report = train(config, training_lines(show, config.steps), console.print, stop_after)
    _finish(report)


@app.command("finetune")
def finetune_command(
    start: Annotated[Path, typer.Argument(help="Run or checkpoint of stage two.", show_default=False)],
    source: Annotated[list[str], typer.Option("--source", help="Dataset folder or hub id behind the cache; may be given several times.")],
    out: Annotated[Path, typer.Option("--out", help="Run folder; one with the same settings is resumed.")],
    lora: Annotated[bool, typer.Option("--lora/--frozen", help="Train LoRA in the vision tower, or keep it frozen but live.")] = True,
    lora_r: Annotated[int, typer.Option("--lora-r", help="Rank.")] = 16,
    lora_alpha: Annotated[float, typer.Option("--lora-alpha", help="The update is scaled by alpha / r.")] = 32.0,
    lora_targets: Annotated[str, typer.Option("--lora-targets", help="attention or all-linear.")] = "attention",
    last_blocks: Annotated[Optional[int], typer.Option("--lora-last-blocks", help="Only the last n vision blocks; default: all.")] = None,
    vlm_lr_scale: Annotated[Optional[float], typer.Option("--vlm-lr-scale", help="LoRA's learning rate as a share of --lr.")] = None,
    from_cache: Annotated[Optional[Path], typer.Option("--from-cache", help="The run's cache, if it moved.")] = None,
    vlm_path: VlmPath = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    mask: MaskProb = None,
    seed: Seed = None,
    set_: Set = None,
    stop_after: StopAfter = None,
    device: Device = "auto",
) -> None:
    """Stage three: continue with the live VLM and LoRA, starting at the same loss.

    Settings that are not given are those of the stage-two run. Example:
    dvla finetune --lora runs/base --source data/push --source data/button --out runs/lora --steps 2000 --lr 1e-4
    """
    from .cache.lora import LoraSpec
    from .errors import unknown
    from .stages.finetune import finetune, finetune_config

    if lora_targets not in ("attention", "all-linear"):
        raise unknown("LoRA target", lora_targets, ["attention", "all-linear"])
    spec = LoraSpec(r=lora_r, alpha=lora_alpha, targets=lora_targets, last_n_blocks=last_blocks) if lora else None
    config = finetune_config(start, tuple(source), spec, {
        "out": str(out), "cache": str(from_cache) if from_cache else None, "steps": steps, "batch_size": batch_size, "optimizer.lr": lr,
        "optimizer.vlm_lr_scale": vlm_lr_scale, "masking.text": mask, "masking.images": mask, "masking.proprio": mask, "seed": seed,
        "device": device, **_settings(set_)}, vlm_path)
    with progress_bars() as show:
        report, _ = finetune(config, training_lines(show, config.train.steps), console.print, stop_after)
    _finish(report)


@app.command("eval")
def eval_command(
    policy: Annotated[Path, typer.Argument(help="Run or checkpoint folder.", show_default=False)],
    env: Annotated[list[str], typer.Option("--env", help="Simulated task; may be given several times.")],
    out: Annotated[Optional[Path], typer.Option("--out", help="Folder to create with summary.json and videos.")] = None,
    episodes: Annotated[int, typer.Option("--episodes", help="Unseen starts per task.")] = 20,
    blind: Annotated[Optional[str], typer.Option("--blind", help="Run trained with --blind; default: this policy shown black pictures.")] = None,
    replan: Annotated[int, typer.Option("--replan", help="Steps of each chunk to execute.")] = 4,
    max_steps: Annotated[Optional[int], typer.Option("--max-steps", help="Step limit; default: the task's own.")] = None,
    image_size: Annotated[int, typer.Option("--image-size", help="Side of the rendered pictures, as recorded.")] = 128,
    seed: Annotated[int, typer.Option("--seed", help="Chooses the starts.")] = 0,
    workers: Annotated[int, typer.Option("--workers", help="Simulating processes.")] = 1,
    videos: Annotated[int, typer.Option("--videos", help="Episodes filmed per task.")] = 10,
    vlm_path: VlmPath = None,
) -> None:
    """Closed-loop success on unseen starts, beside the expert, a random and a blind policy.

    Example: dvla eval runs/base --env metaworld/push-v3 --episodes 50 --out eval/base
    """
    from .stages.evaluate import EvalConfig, evaluate_policy

    config = EvalConfig(str(policy), tuple(env), episodes, out, blind, seed, replan, max_steps, image_size, workers, videos, vlm_path)
    with progress_bars() as show:
        summary = evaluate_policy(config, show)
    console.print(success_table({"policy": summary}))
    console.print(f"blind: {summary['blind_is']}. Expert, random and blind ran on the same {episodes} starts, none of which was trained on.")


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option("--out", help="Folder of everything; an interrupted demo is resumed.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Two minutes, every command, no claim of success.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of recording, model and training.")] = 0,
) -> None:
    """The whole road on this machine: record, cache, train, fine-tune with LoRA, and measure success. Prints every command.

    Example: dvla demo
    """
    from .stages.demo import demo

    demo(out, quick, seed, run, console.print, success_table)


@app.command("doctor")
def doctor_command() -> None:
    """What is installed, what each missing piece costs, how to get it. Exit code 1 when something necessary is missing.

    Example: dvla doctor
    """
    from .stages.doctor import examine

    findings = examine()
    console.print(doctor_table(findings))
    if any(f.required and f.found is None for f in findings):
        raise typer.Exit(1)


# --- shared ------------------------------------------------------------------------------------------------------------

def _finish(report: Any) -> None:
    """Closing line of a training run; a run that a signal stopped ends like any interrupted command."""
    closing_line(report)
    if report.interrupted:
        raise typer.Exit(130)


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


if __name__ == "__main__":
    main()
