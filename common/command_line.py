"""Running one command line of the `dvla` command in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer

from ..errors import UserError

# Of click, or of the copy inside newer typers.
UsageError: Any = typer.BadParameter.__mro__[1]
ClickException: Any = typer.BadParameter.__mro__[2]


def run_command(command: Any, arguments: Sequence[str]) -> None:
    """Run a command line of `command`, the root of all commands.

    Raises `UserError`, `KeyboardInterrupt` for Ctrl-C, and `SystemExit` with a command's own exit code.
    """
    try:
        code = command.main(args=list(arguments), prog_name="dvla", standalone_mode=False)
    except ClickException as error:  # wrong options: click's own message names them
        if type(error).__name__ == "NoArgsIsHelpError":  # a group without a command: its help
            error.show()
            sys.exit(error.exit_code)
        message, context = " ".join(error.format_message().split()).rstrip("."), getattr(error, "ctx", None)
        joined = f"{message} See" if message.endswith("?") else f"{message}; see"
        raise UserError(f"{joined} `{context.command_path if context else 'dvla'} --help`") from None
    except typer.Abort:
        raise KeyboardInterrupt from None
    if code == 130:  # how newer typers report Ctrl-C
        raise KeyboardInterrupt
    if code:
        sys.exit(code)


def runner_of(context: typer.Context) -> Callable[[Sequence[str]], None]:
    """For a command that runs other commands: `run(arguments)`, by the root command that it was called through."""
    root = context.find_root().command
    return lambda arguments: run_command(root, arguments)
