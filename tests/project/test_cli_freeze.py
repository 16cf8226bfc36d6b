"""The command line is an interface: options may be added; one that is removed, renamed or changed fails here.

On purpose: `python tests/project/test_cli_freeze.py`, run in the repository, writes cli_options.json anew.
A renamed option keeps its old name, with a warning, for one release.
"""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer.models

from dvla import cli
from dvla.common.options import with_options

FROZEN = Path(__file__).with_name("cli_options.json")
HINT = (
    "if this is on purpose, run `python tests/project/test_cli_freeze.py`, commit cli_options.json and name the change "
    "in CHANGELOG.md; a renamed option must keep its old name, with a warning, for one release"
)


def described() -> dict[str, dict[str, str]]:
    """Command → its options' names → type and default."""
    found = {**cli.COMMANDS, **{f"{group} {n}": c for group, (_, room) in cli.GROUPS.items() for n, c in room.items()}}
    return {name: dict(_options(command)) for name, command in sorted(found.items())}


def _options(command: Callable[..., None]) -> Iterator[tuple[str, str]]:
    command = with_options(command)
    hints = typing.get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        info = next(
            (m for m in getattr(hints[name], "__metadata__", ()) if isinstance(m, typer.models.ParameterInfo)), None
        )
        if info is None:  # typer.Context
            continue
        names = [name.partition("__")[2] or name]
        if isinstance(info, typer.models.OptionInfo):
            names = [info.default, *info.param_decls] if isinstance(info.default, str) else [*info.param_decls]
        kind = hints[name].__origin__
        kind = next((a for a in typing.get_args(kind) if type(None) in typing.get_args(kind)), kind)
        default = "required" if parameter.default is parameter.empty else f"default {_plain(parameter.default)}"
        kind = str(kind).replace("pathlib._local.", "pathlib.") if typing.get_args(kind) else kind  # Python 3.13's name
        yield " ".join(names), f"{getattr(kind, '__name__', kind)}, {default}"


def _plain(default: Any) -> str:
    return str(default) if isinstance(default, Path) else repr(default)


def test_options_keep_their_names_types_and_defaults() -> None:
    frozen, now = json.loads(FROZEN.read_text()), described()
    wrong = [f"dvla {command} is gone" for command in frozen if command not in now]
    for command in frozen.keys() & now.keys():
        by_name = {name: (names, what) for names, what in now[command].items() for name in names.split()}
        for names, what in frozen[command].items():
            for name in names.split():
                if name not in by_name:
                    wrong.append(f"dvla {command}: {name} is gone")
                elif by_name[name][1] != what:
                    wrong.append(f"dvla {command}: {name} is now {by_name[name][1]}; it was {what}")
    assert not wrong, "; ".join(sorted(wrong)) + f". {HINT}"


def test_what_is_removed_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(quiet: Annotated[bool, typer.Option("--quiet")] = True) -> None: ...

    monkeypatch.delitem(cli.COMMANDS, "toy")
    monkeypatch.setitem(cli.COMMANDS, "doctor", changed)
    with pytest.raises(AssertionError, match="dvla toy is gone.*keep its old name, with a warning"):
        test_options_keep_their_names_types_and_defaults()


def test_what_is_frozen_is_what_the_commands_take() -> None:
    """The description above misses nothing that typer reads."""
    root = typer.main.get_command(cli.app)
    for path, options in described().items():
        command: Any = root
        for word in path.split():
            command = command.commands[word]
        names = {n for p in command.params for n in (*p.opts, *p.secondary_opts) if n.startswith("-")}
        assert names == {n for o in options for word in o.split() for n in word.split("/") if n.startswith("-")}, path


if __name__ == "__main__":
    FROZEN.write_text(json.dumps(described(), indent=1, ensure_ascii=False) + "\n")
    print(f"{FROZEN}: {sum(map(len, described().values()))} options")
