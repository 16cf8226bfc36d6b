"""`dvla launch`: a command on many processes."""

from __future__ import annotations

import sys
from typing import Annotated, Optional

import typer

from .errors import UserError
from .stages.console import console


def launch_command(
    script: Annotated[str, typer.Argument(help="torchrun, torchrun-nodes, slurm-train, slurm-cache, accelerate-fsdp2, accelerate-zero2, or a file *.sh.", show_default=False)],
    command: Annotated[Optional[list[str]], typer.Argument(help="The dvla command, after --.", show_default=False)] = None,
    set_: Annotated[Optional[list[str]], typer.Option("--set", help="A setting of the script, e.g. --set processes=4; may be given several times.")] = None,
    print_: Annotated[bool, typer.Option("--print", help="Show the script and run nothing.")] = False,
    settings: Annotated[bool, typer.Option("--settings", help="Show the script's settings.")] = False,
) -> None:
    """Run a command on every GPU, on several machines, or under Slurm (queued again after each walltime), by a script one can read.

    Example: dvla launch slurm-train --set nodes=8 --print -- train --recipe pretrain --from-cache caches/all --out runs/all
    """
    from .stages.launch import launch, read_script, render, settings_of

    text = read_script(script)
    if settings:
        for name, setting in settings_of(text).items():
            console.print(f"{name}={setting.default}  {setting.meaning}", markup=False)
        return
    given = {}
    for word in set_ or ():
        name, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"--set {word}: give NAME=VALUE")
        given[name] = value
    rendered = render(text, command or (), given)
    if print_:
        print(rendered, end="")     # as it is: to be saved, or given to sbatch
        return
    if code := launch(rendered):
        sys.exit(130 if code < 0 else code)
