"""`dvla ablate`: a grid of trainings and their closed-loop success as one table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from .errors import UserError
from .stages.console import console, progress_bars
from .stages.console import table as grid


def ablate_command(
    recipe: Annotated[str, typer.Argument(help="Shipped recipe (configs/ablations) or YAML file.", show_default=False)],
    out: Annotated[Optional[Path], typer.Option("--out", help="Folder of everything; an interrupted grid goes on there. Default: runs/RECIPE.")] = None,
    from_cache: Annotated[Optional[str], typer.Option("--from-cache", help="Cache to train from, in place of recording demonstrations and building one.")] = None,
    seed: Annotated[Optional[list[int]], typer.Option("--seed", help="Seed; may be given several times. Default: the recipe's.")] = None,
    episodes: Annotated[Optional[int], typer.Option("--episodes", help="Unseen starts per task and seed; default: the recipe's.")] = None,
    train: Annotated[str, typer.Option("--train", help="Further options of every training, in one string, e.g. \"--model-size base --steps 20000\".")] = "",
    jobs: Annotated[int, typer.Option("--jobs", help="Cells side by side.")] = 1,
    print_: Annotated[bool, typer.Option("--print", help="Show the cells and an estimate; run nothing.")] = False,
    table: Annotated[bool, typer.Option("--table", help="Write table.md anew from what is finished, and print it; run nothing.")] = False,
) -> None:
    """Train and evaluate every variant of a recipe with every seed, and write a table after each; expert, random and a blind policy beside.

    Examples: dvla ablate baselines --jobs 2

    dvla ablate lambda --from-cache caches/push --train "--model-size base --steps 20000" --seed 0 --print
    """
    from .stages.ablate import ablate, begin, outline
    from .stages.ablate_recipe import load_ablation
    from .stages.ablate_table import cells, write

    loaded = load_ablation(recipe, {"seeds": seed, "episodes": episodes}, train)
    out = out or Path("runs") / Path(recipe).stem
    if print_:
        steps, line = outline(loaded, out, jobs, from_cache)
        for name, state, commands in steps:
            console.print(f"{name}  ({state})", style="bold", markup=False)
            for command in commands:
                console.print(f"  dvla {command}", markup=False)
        console.print(line, markup=False)
        return
    if table:
        if not (out / "recipe.json").exists():
            raise UserError(f"{out} holds no results; give the --out of the grid")
        found = write(loaded, out, begin(loaded, out, from_cache))
        console.print((out / "table.md").read_text(), markup=False)
        return
    with progress_bars() as show:
        found = ablate(loaded, out, jobs, from_cache, console.print, show)
    console.print(grid(*cells(found), title=loaded.title))
    console.print(f"{out}/table.md, results.json", markup=False)
