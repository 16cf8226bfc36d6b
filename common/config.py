"""Frozen dataclass settings from YAML/JSON mappings: unknown keys are refused with the nearest valid name."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import operator
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from annotated_types import Interval

from ..errors import UserError, unknown
from .documents import read_yaml, shown

T = TypeVar("T")
SHORT = 100_000  # larger bounds are not shown where they do not matter
# Marks of ranges that many settings have; the upper bounds only keep what cannot be meant from the machine.
COUNT = Interval(ge=1, le=10**9)
ANY_COUNT = Interval(ge=0, le=10**9)
THREADS = Interval(ge=1, le=1024)
WORKERS = Interval(ge=0, le=4096)
STEPS = Interval(ge=1, le=10_000)  # forward passes of an action
SHARE = Interval(ge=0, le=1)
SEED = Interval(ge=0, lt=2**32)  # of simulators
_BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "ge": ("at least", operator.ge),
    "gt": ("above", operator.gt),
    "le": ("at most", operator.le),
    "lt": ("below", operator.lt),
}
_QUOTES = "'\""


class Option:
    """A setting's command-line option: `lr: Annotated[float, Option("--lr", help="Peak rate."), Ge(0)] = 4e-4`.

    A range (`annotated_types`: Ge, Gt, Le, Lt, Interval) is that of each number where the setting holds several; it is
    checked wherever the setting comes from. `common/options.py` makes the options of a command from these; every
    setting, with an Option or without, can also be given as `--set NAME=VALUE` or `--NAME=VALUE` where a command has
    --set. `type` is the option's where it differs.
    """

    def __init__(self, *names: str, help: str, type: Any = None) -> None:
        self.names, self.help, self.type = names, help, type


DEVICE = Option("--device", help="Device: cpu, cuda, cuda:N, or auto (CUDA where there is one).")
VLM_PATH = Option("--vlm-path", help="Checkpoint folder or hub id of the VLM; default: the model's own.")
DATASET_CONFIG = Option(
    "--dataset-config", help="YAML of the field map, or a registered or shipped name; default: the nearest that fits."
)
SAMPLE_STEPS = Option(
    "--sample-steps", help="Forward passes per action of a flow or diffusion head; default: as it was trained for."
)


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str = "settings") -> T:
    """Build the frozen dataclass `cls` from `values`: nested dataclasses from nested mappings, tuples from lists.

    Raises `UserError` for an unknown key (nearest name suggested), a missing one, a value of the wrong type, or a
    number out of its range.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: expected a mapping of {cls.__name__} fields, got {type(values).__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    hints = hints_of(cls)  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise UserError(f"{where}: {unknown('setting', shown(key).strip(_QUOTES), fields)}")
    kwargs = {name: _convert(hints[name], values[name], f"{where}.{name}") for name in fields if name in values}
    required = (n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING)
    missing = [name for name in required if name not in kwargs]
    if missing:
        raise UserError(f"{where}: missing {', '.join(missing)}")
    return cls(**kwargs)


def from_document(cls: type[T], values: Mapping[str, Any], path: Path, place: str = "settings") -> T:
    """`from_mapping` of what a file says; the error begins with its path."""
    try:
        return from_mapping(cls, values, place)
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from None


@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    """The annotations of a dataclass, with what is `Annotated`."""
    return typing.get_type_hints(cls, include_extras=True)


def require_ranges(settings: Any) -> None:
    """`UserError` for a number of a dataclass out of its range, where it was not made by `from_mapping`."""
    for name, hint in hints_of(type(settings)).items():  # type: ignore[arg-type]
        require(name, getattr(settings, name), *getattr(hint, "__metadata__", ()))


def require(name: str, value: Any, *marks: Any) -> None:
    """`UserError` unless `value`, or each number in it, is in the range that `marks` give; None passes."""
    bounds = [(_BOUNDS[kind], getattr(mark, kind, None)) for mark in marks for kind in _BOUNDS]
    given = [(word, holds, bound) for (word, holds), bound in bounds if bound is not None]
    numbers = {name: value}
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        numbers = {f"{name}[{shown(key)}]": number for key, number in items}
    for place, number in numbers.items() if given else ():
        finite = not isinstance(number, float) or math.isfinite(number)
        if number is not None and not (finite and all(holds(number, bound) for _, holds, bound in given)):
            near = math.inf if number > SHORT else SHORT
            option = next((f" ({mark.names[0]})" for mark in marks if isinstance(mark, Option)), "")
            raise UserError(f"{place} is {shown(number)}; it must be {allowed(marks, near)}{option}")


def allowed(marks: Iterable[Any], most: float = math.inf) -> str:
    """A range in words, "at least 1 and at most 64"; bounds above `most` are left out."""
    found = [(word, getattr(mark, kind, None)) for mark in marks for kind, (word, _) in _BOUNDS.items()]
    return " and ".join(f"{word} {bound}" for word, bound in found if bound is not None and bound <= most)


def from_dotted(cls: type[T], values: Mapping[str, Any], where: str = "settings") -> T:
    """`from_mapping` of dotted names: {"optimizer.lr": 1e-4}."""
    return from_mapping(cls, apply({}, values), where)


def apply(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with dotted `overrides` ("optimizer.lr": 1e-4) put in."""
    out = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
    for key, value in overrides.items():
        *groups, name = key.split(".")
        node = out
        for part in groups:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise UserError(f"setting '{key}': '{part}' is a value, not a group of settings")
        node[name] = value
    return out


def configs_dir() -> Path:
    """The folder of shipped YAML recipes (package data)."""
    return Path(__file__).parents[1] / "configs"


def shipped(folder: str) -> tuple[str, ...]:
    """Names of the shipped YAML recipes in a folder of `configs_dir`, sorted."""
    return tuple(sorted(p.stem for p in (configs_dir() / folder).glob("*.yaml")))


def load_shipped(folder: str, name_or_file: str) -> dict[str, Any]:
    """The mapping of a recipe: a YAML file, or one shipped in `folder` by name. `UserError` for an unknown name."""
    if name_or_file.endswith((".yaml", ".yml")):
        return read_yaml(Path(name_or_file))
    if name_or_file not in shipped(folder):
        raise unknown("recipe", name_or_file, shipped(folder))
    return read_yaml(configs_dir() / folder / f"{name_or_file}.yaml")


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        converted = _convert(args[0], value, where)
        require(where, converted, *args[1:])
        return converted
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        inner = [a for a in args if a is not type(None)]
        for candidate in inner:
            try:
                return _convert(candidate, value, where)
            except UserError:
                if len(inner) == 1:
                    raise
        raise UserError(f"{where}: {shown(value)} fits none of {', '.join(str(a) for a in inner)}")
    if origin is typing.Literal:
        if value not in args:
            raise UserError(f"{where}: {unknown('value', shown(value).strip(_QUOTES), [str(a) for a in args])}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where}: expected a list, got {shown(value)}")
        item = args[0] if len(args) == 2 and args[1] is Ellipsis else None
        if item is None and len(value) != len(args):
            raise UserError(f"{where}: expected {len(args)} values, got {shown(value)}")
        return tuple(_convert(item or args[i], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: expected a mapping, got {shown(value)}")
        inside = {k: f"{where}.{shown(k).strip(_QUOTES)}" for k in value}
        return {_convert(args[0], k, where): _convert(args[1], v, inside[k]) for k, v in value.items()}
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_mapping(hint, value, where)
    if hint is Any:
        return value
    return _scalar(hint, value, where)


def _scalar(hint: Any, value: Any, where: str) -> Any:
    """A number or a text; a float also from text, since YAML 1.1 reads 1e-4 as text."""
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)
    if not isinstance(hint, type) or not isinstance(value, hint) or hint is int and isinstance(value, bool):
        raise UserError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {shown(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} is {value}; it must be a finite number")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UserError(f"{where} is {shown(value)}; it must be below 2^63")
    return value
