"""The `dvla` command: parse, build a config, call one stage. Heavy imports happen inside the commands."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ._version import __version__
from .cli_ablate import ablate_command
from .cli_cache import cache_app
from .cli_data import data_app
from .cli_eval import eval_command
from .cli_hub import push_command
from .cli_launch import launch_command
from .cli_report import compare_command, report_command, rerun_command
from .cli_serve import bench_app, serve_command
from .cli_train import cotrain_command, export_command, finetune_command, train_command
from .errors import UserError
from .stages.console import console, doctor_table, errors, progress_bars, success_table

app = typer.Typer(name="dvla", no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False,
                  context_settings={"help_option_names": ["-h", "--help"]},
                  help="Run the frozen VLM **once** into a feature cache, train a one-step Drifting DiT from it, bring the VLM back with LoRA.")
vlm_app = typer.Typer(no_args_is_help=True, help="Vision-language checkpoints.")
app.add_typer(data_app, name="data")
app.add_typer(vlm_app, name="vlm")
app.add_typer(cache_app, name="cache")
app.add_typer(bench_app, name="bench")

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
    click_error: Any = typer.BadParameter.__mro__[2]     # ClickException: of click, or of the copy inside newer typers
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


# --- training and evaluation -------------------------------------------------------------------------------------------

app.command("train")(train_command)
app.command("finetune")(finetune_command)
app.command("cotrain")(cotrain_command)
app.command("export")(export_command)
app.command("report")(report_command)
app.command("compare")(compare_command)
app.command("rerun")(rerun_command)
app.command("push")(push_command)
app.command("launch")(launch_command)
app.command("serve")(serve_command)
app.command("eval")(eval_command)
app.command("ablate")(ablate_command)


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


@app.command("toy")
def toy_command(
    out: Annotated[Path, typer.Option("--out", help="Folder of everything; an interrupted toy is resumed.")] = Path("runs/toy"),
    quick: Annotated[bool, typer.Option("--quick", help="About a minute; shows that it runs, not what drifting can do.")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of data, initialisation and noise.")] = 0,
) -> None:
    """Drifting where the answer is known: the paper's 2-D pictures, and two ways round an obstacle beside flow and diffusion. No GPU.

    Example: dvla toy
    """
    from .stages.toy import toy

    with progress_bars() as show:
        toy(out, quick, seed, console.print, show)


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


if __name__ == "__main__":
    main()
