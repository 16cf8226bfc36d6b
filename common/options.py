"""Options of commands: those that several rooms share, and those made from the settings of a dataclass; running a line.

A setting says in its dataclass how it is given on the command line (`config.Option`). A command names those it offers:

    def serve_command(given: Annotated[Given, Options(ServeConfig, "host port")], device: Device = "auto") -> None:
        config = from_dotted(ServeConfig, given)

`with_options` turns the parameter `given` into the options --host and --port with the settings' help, type and default.
To add a setting, add a field with an `Option`; a command with --set takes it at once, as `--NAME=VALUE`.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand
from typer.models import OptionInfo

from ..errors import UserError
from .config import DATASET_CONFIG, DEVICE, SHORT, VLM_PATH, Option, allowed, hints_of, require
from .doctor.faults import explained
from .documents import parse_yaml, shown

# Of click, or of the copy inside newer typers.
UsageError: Any = typer.BadParameter.__mro__[1]
ClickException: Any = typer.BadParameter.__mro__[2]

VlmPath = Annotated[str | None, typer.Option(*VLM_PATH.names, help=VLM_PATH.help)]
Device = Annotated[str, typer.Option(*DEVICE.names, help=DEVICE.help)]
DatasetConfig = Annotated[str | None, typer.Option(*DATASET_CONFIG.names, help=DATASET_CONFIG.help)]
Json = Annotated[Path | None, typer.Option("--json", help="JSON file to write the results to.")]
Public = Annotated[bool, typer.Option("--public", help="Make a new repository public; default: private.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any setting, e.g. --set optimizer.warmup=100; may be given several times."),
]

Given = dict[str, Any]
"""Dotted name of a setting → value, of the options that were given (or have a default)."""


class Options:
    """Marks a command's parameter that stands for settings of the dataclass `config`.

    `order` holds their dotted names in the order of --help; the name of another parameter of the command puts that one
    there, and `p.x` the setting x of another parameter p of this kind. `defaults=False`: options have no default, and
    the parameter holds only what was given, for settings that a recipe may give.
    """

    def __init__(self, config: type, order: str = "", *, defaults: bool = True) -> None:
        self.config, self.order, self.defaults = config, order.split(), defaults


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with one parameter for each setting of its `Options`, as typer wants it; others stay as they are."""
    hints = typing.get_type_hints(command, include_extras=True)
    own = inspect.signature(command).parameters
    groups = {name: found for name in own if (found := _options_of(hints[name]))}
    seen: set[str] = set()
    placed: list[inspect.Parameter] = []
    settings: dict[str, tuple[str, str]] = {}  # name of a made parameter → (the command's parameter, setting)

    def place(name: str) -> None:
        if name in seen:
            return
        seen.add(name)
        if name not in groups:
            annotation = _with_range(hints[name])
            placed.append(own[name].replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=annotation))
            return
        for setting in groups[name].order:
            if setting in own:
                place(setting)
                continue
            other, _, rest = setting.partition(".")
            group, setting = (other, rest) if rest and other in groups else (name, setting)
            made = f"{group}__{setting.replace('.', '_')}"
            placed.append(_parameter(made, groups[group], setting))
            settings[made] = group, setting

    for name in own:
        place(name)

    def run(**values: Any) -> None:
        for name in own.keys() - groups.keys():
            marks = getattr(hints[name], "__metadata__", ())
            require(str(next((m.default for m in marks if isinstance(m, OptionInfo)), name)), values[name], *marks)
        given: dict[str, Given] = {name: {} for name in groups}
        for name, (group, setting) in settings.items():
            value = values.pop(name)
            if value is not None and (groups[group].defaults or value is not False):
                given[group][setting] = value
        command(**given, **values)

    run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in placed}
    run.__signature__ = inspect.Signature(placed)  # type: ignore[attr-defined]
    return run


def _options_of(hint: Any) -> Options | None:
    return next((m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Options)), None)


def _parameter(name: str, options: Options, setting: str) -> inspect.Parameter:
    """The option of one setting, as typer wants it."""
    hint, default = _setting(options.config, setting)
    option = next(m for m in hint.__metadata__ if isinstance(m, Option))
    kind = option.type or _type_of(hint.__origin__)
    if default is not inspect.Parameter.empty and (typing.get_origin(kind) is list or not options.defaults):
        default = False if kind is bool else None
    given: Any = kind | None if default is None else kind
    annotation = _with_range(Annotated[given, typer.Option(*option.names, help=option.help), *hint.__metadata__])
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _with_range(hint: Any) -> Any:
    """The annotation of an option for typer, whose help ends with the range that stands beside it."""
    marks = getattr(hint, "__metadata__", ())
    info, numbers = next((m for m in marks if isinstance(m, OptionInfo)), None), allowed(marks, SHORT)
    if info is None or info.help is None or not numbers:
        return hint
    text, info = info.help, copy.copy(info)
    info.help = f"{text[:-1]} ({numbers})."
    return Annotated[hint.__origin__, info]


def _setting(config: type, setting: str) -> tuple[Any, Any]:
    """(annotation, default) of a dotted setting; a default that is empty: it must be given."""
    group, _, rest = setting.partition(".")
    hint = hints_of(config)[group]
    if rest:
        return _setting(hint, rest)
    field = next(f for f in dataclasses.fields(config) if f.name == group)
    if field.default_factory is not dataclasses.MISSING:
        return hint, field.default_factory()
    return hint, inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default


def _type_of(hint: Any) -> Any:
    """What typer reads for a setting of this type: names as text, tuples as options that may be repeated."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        (hint,) = (a for a in args if a is not type(None))
        return _type_of(hint)
    return str if origin is Literal else list[args[0]] if origin is tuple else hint  # type: ignore[valid-type]


def parse_set(given: Sequence[str] | None) -> Given:
    """`["optimizer.warmup=100"]` → {"optimizer.warmup": 100}; values are YAML."""
    out = {}
    for item in given or ():
        key, separator, value = item.partition("=")
        if not separator:
            raise UserError(f"--set {item}: expected name=value, e.g. --set optimizer.warmup=100")
        out[key] = parse_yaml(value, f"--set {item}: the value")
    return out


class Command(TyperCommand):
    """A command that takes `--NAME=VALUE` as `--set NAME=VALUE` where it has --set and no option of that name."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Rewrite such arguments before they are parsed; refuse what no option can mean."""
        for word in args:
            if any("\ud800" <= letter <= "\udfff" for letter in word):  # bytes that are no UTF-8
                raise UserError(f"{shown(word)} is not text in UTF-8; rename the file, or type it again")
        left = self._parsed(ctx, args)
        for parameter in self.params:
            values = ctx.params.get(parameter.name)
            for value in values if isinstance(values, (list, tuple)) else [values]:
                if isinstance(value, (int, float)) and not abs(value) < 2**63:
                    raise UserError(f"{parameter.opts[0]} is {shown(value)}; it must be a number below 2^63")
        return left

    def _parsed(self, ctx: Any, args: list[str]) -> list[str]:
        options = {name for parameter in self.params for name in (*parameter.opts, *parameter.secondary_opts)}
        if "--set" not in options:
            return super().parse_args(ctx, args)
        end = args.index("--") if "--" in args else len(args)
        rewritten: list[str] = []
        for word in args[:end]:
            name, equals, value = word.partition("=")
            if name.startswith("--") and equals and name not in options:
                rewritten += ["--set", f"{name[2:]}={value}"]
            else:
                rewritten.append(word)
        try:
            return super().parse_args(ctx, rewritten + args[end:])
        except UsageError as error:
            name = getattr(error, "option_name", "")
            if type(error).__name__ == "NoSuchOption" and ("." in name or not getattr(error, "possibilities", None)):
                error.message += f" (a setting is written {name}=VALUE, with '=')"
            raise


def run_command(command: Any, arguments: Sequence[str]) -> None:
    """Run a command line of `command`, the root of all commands.

    Raises `UserError`, also for what the machine refused; `KeyboardInterrupt` for Ctrl-C; `SystemExit` with a command's
    own exit code.
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
    except typer.Abort as abort:
        if isinstance(abort.__cause__, EOFError):  # of a file: one of a terminal has no cause
            raise abort.__cause__ from None
        raise KeyboardInterrupt from None
    except BrokenPipeError:  # whatever read the output has enough
        raise
    except Exception as error:
        if not isinstance(error, UserError) and (line := explained(error)):
            raise UserError(line) from error
        raise
    if code == 130:  # how newer typers report Ctrl-C
        raise KeyboardInterrupt
    if code:
        sys.exit(code)


def runner_of(context: typer.Context) -> Callable[[Sequence[str]], None]:
    """For a command that runs other commands: `run(arguments)`, by the root command that it was called through."""
    root = context.find_root().command
    return lambda arguments: run_command(root, arguments)
