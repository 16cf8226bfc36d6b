"""`dvla ablate`, `launch`, `cotrain`, `demo` and `toy`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from annotated_types import Interval

from ...common.config import COUNT, SEED, THREADS
from ...common.console import console, progress_bars, say
from ...common.console import table as grid
from ...common.options import DatasetConfig, VlmPath, runner_of
from ...errors import UserError

FurtherTraining = Annotated[
    str,
    typer.Option(
        "--train", help='Further options of every training, in one string, e.g. "--model-size base --steps 20000".'
    ),
]


def ablate_command(
    recipe: Annotated[str, typer.Argument(help="Shipped recipe (configs/ablations) or YAML file.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of the whole grid; an interrupted one is resumed. Default: runs/RECIPE."),
    ] = None,
    from_cache: Annotated[
        str | None,
        typer.Option("--from-cache", help="Cache to train from, instead of recording demonstrations and building one."),
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option("--seed", help="Random seed; may be given several times. Default: the recipe's."),
        SEED,
    ] = None,
    episodes: Annotated[
        int | None,
        typer.Option("--episodes", help="Held-out initial states per task and seed; default: the recipe's."),
        COUNT,
    ] = None,
    train: FurtherTraining = "",
    jobs: Annotated[
        int, typer.Option("--jobs", help="Cells (a training and its evaluations) to run in parallel."), THREADS
    ] = 1,
    print_: Annotated[bool, typer.Option("--print", help="Show the cells and an estimate; run nothing.")] = False,
    table: Annotated[bool, typer.Option("--table", help="Rewrite and print table.md of what is finished.")] = False,
) -> None:
    """Train and evaluate every variant of a recipe with every seed, and tabulate the results.

    The table, written after each variant, also shows the expert, a random and a blind policy.

    Examples: dvla ablate baselines --jobs 2

    dvla ablate lambda --from-cache caches/push --train "--model-size base --steps 20000" --seed 0 --print
    """
    from .ablate.recipe import load_ablation
    from .ablate.run import ablate, begin, outline
    from .ablate.table import cells, write

    loaded = load_ablation(recipe, {"seeds": seed, "episodes": episodes}, train)
    out = out or Path("runs") / Path(recipe).stem
    if print_:
        steps, line = outline(loaded, out, jobs, from_cache)
        for name, state, commands in steps:
            console.print(f"{name}  ({state})", style="bold", markup=False)
            for command in commands:
                say(f"  dvla {command}")
        say(line)
        return
    if table:
        if not (out / "recipe.json").exists():
            raise UserError(f"{out} holds no results; give the --out of a grid")
        found = write(loaded, out, begin(loaded, out, from_cache))
        say((out / "table.md").read_text())
        return
    with progress_bars() as show:
        found = ablate(loaded, out, jobs, from_cache, console.print, show)
    console.print(grid(*cells(found), title=loaded.title))
    say(f"{out}/table.md, results.json")


def launch_command(
    script: Annotated[
        str,
        typer.Argument(
            help="Script: torchrun, torchrun-nodes, slurm-train, slurm-cache, accelerate-fsdp2, accelerate-zero2, "
            "or a *.sh file.",
            show_default=False,
        ),
    ],
    command: Annotated[list[str] | None, typer.Argument(help="The dvla command, after --.", show_default=False)] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Setting of the script, e.g. --set processes=4; may be given several times."),
    ] = None,
    print_: Annotated[bool, typer.Option("--print", help="Show the script and run nothing.")] = False,
    settings: Annotated[bool, typer.Option("--settings", help="Show the script's settings.")] = False,
) -> None:
    """Run a command on every GPU, on several machines, or under Slurm, by a readable script.

    A Slurm job is requeued after each walltime.

    Example: dvla launch slurm-train --set nodes=8 --print -- train --recipe pretrain --from-cache caches/all
    --out runs/all
    """
    from .launch import launch, read_script, render, settings_of

    text = read_script(script)
    if settings:
        for name, setting in settings_of(text).items():
            say(f"{name}={setting.default}  {setting.meaning}")
        return
    given = {}
    for word in set_ or ():
        name, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"--set {word}: give NAME=VALUE")
        given[name] = value
    rendered = render(text, command or (), given)
    if print_:
        print(rendered, end="")  # as it is: to be saved, or given to sbatch
        return
    if code := launch(rendered):
        sys.exit(130 if code < 0 else code)


def cotrain_command(
    context: typer.Context,
    sources: Annotated[list[str], typer.Argument(help="Dataset folders or hub ids.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Folder of the whole loop; an interrupted one is resumed.")],
    vlm: Annotated[
        str, typer.Option("--vlm", help="Model: qwen3vl, paligemma2, or a tiny one (configs/models).")
    ] = "qwen3vl",
    vlm_path: VlmPath = None,
    cache: Annotated[str, typer.Option("--cache", help="Options of every `dvla cache build`, in one string.")] = "",
    train: Annotated[str, typer.Option("--train", help="Options of the first `dvla train`.")] = "",
    finetune: Annotated[str, typer.Option("--finetune", help="Options of every `dvla finetune`.")] = "",
    retrain: Annotated[
        str | None, typer.Option("--retrain", help="Options of later `dvla train`; default: those of the first.")
    ] = None,
    rounds: Annotated[
        int,
        typer.Option("--rounds", help="Rounds of fine-tuning the VLM and rebuilding the cache."),
        Interval(ge=1, le=1000),
    ] = 1,
    dataset_config: DatasetConfig = None,
) -> None:
    """Co-train policy and VLM: train, fine-tune with LoRA, rebuild the cache, train on.

    Prints every command before running it.

    Example: dvla cotrain data/push --out runs/loop --cache "--tokens 49" --train "--recipe base"
    --finetune "--steps 2000 --lr 1e-4" --retrain "--recipe base --steps 20000"
    """
    from .cotrain import CotrainConfig, cotrain

    if dataset_config:
        cache = f"--dataset-config {shlex.quote(dataset_config)} {cache}".strip()
    cotrain(
        CotrainConfig(tuple(sources), out, vlm, vlm_path, cache, train, finetune, retrain, rounds),
        runner_of(context),
        console.print,
    )


def demo_command(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", help="Folder of the whole demo; an interrupted one is resumed.")] = Path(
        "runs/demo"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="Run every command in two minutes, with no claim of success.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Random seed of recording, model and training."), SEED] = 0,
) -> None:
    """Run the full pipeline here: record, cache, train, fine-tune with LoRA, evaluate.

    Prints every command before running it.

    Example: dvla demo
    """
    from ..simulation.tables import success_table
    from .demo import demo

    demo(out, quick, seed, runner_of(context), console.print, success_table)


def toy_command(
    out: Annotated[Path, typer.Option("--out", help="Folder of the whole toy; an interrupted one is resumed.")] = Path(
        "runs/toy"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="Run in about a minute, to show that it runs, not what drifting can do.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Random seed of data, initialization and noise."), SEED] = 0,
) -> None:
    """Show drifting where the answer is known: 2-D distributions, and two ways around an obstacle.

    Compares it with flow matching and diffusion. Needs no GPU.

    Example: dvla toy
    """
    from .toy.toy import toy

    with progress_bars() as show:
        toy(out, quick, seed, console.print, show)
