"""Frozen dataclass settings from YAML/JSON mappings: unknown keys are refused with the nearest valid name."""

from __future__ import annotations

import contextlib
import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UserError, unknown
from .documents import read_yaml, shown

T = TypeVar("T")


class Option:
    """A setting's command-line option: `lr: Annotated[float, Option("--lr", help="Peak learning rate.")] = 4e-4`.

    `common/options.py` makes the options of a command from these; every setting, with an Option or without, can also be
    given as `--set NAME=VALUE` or `--NAME=VALUE` where a command has --set. `type` is the option's where it differs.
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

    Raises `UserError` for an unknown key (nearest name suggested), a missing one, or a value of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: expected a mapping of {cls.__name__} fields, got {type(values).__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            raise UserError(f"{where}: {unknown('setting', str(key), fields)}")
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


def from_dotted(cls: type[T], values: Mapping[str, Any], where: str = "settings") -> T:
    """`from_mapping` of dotted names: {"optimizer.lr": 1e-4}. None: not given."""
    return from_mapping(cls, apply({}, values), where)


def apply(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with dotted `overrides` ("optimizer.lr": 1e-4) put in; those that are None are not given."""
    out = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
    for key, value in overrides.items():
        if value is None:
            continue
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
            raise UserError(f"{where}: {unknown('value', str(value), [str(a) for a in args])}")
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
        return {_convert(args[0], k, where): _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_mapping(hint, value, where)
    if hint is Any:
        return value
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            return float(value)  # YAML 1.1 reads 1e-4 as text
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise UserError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {shown(value)}")
