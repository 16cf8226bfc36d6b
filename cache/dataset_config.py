"""One YAML per dataset family (configs/datasets/): what each native dimension means, at what rate, which embodiment."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, unknown
from ..settings import configs_dir, from_mapping, load_yaml
from .actions import EMBODIMENTS, ActionMap, FieldSpec


@dataclass(frozen=True)
class DatasetConfig:
    """How one dataset family maps into the unified space."""

    name: str                               # family name, equal to the file name
    match: tuple[str, ...]                  # patterns of the robot type or repository/folder name, e.g. "*droid*"
    embodiment: str                         # one of EMBODIMENTS
    action: tuple[FieldSpec, ...]           # meaning of the native action, dimension by dimension
    state: tuple[FieldSpec, ...]            # meaning of the native state; empty = the dataset has none
    control_hz: float | None = None         # rows per second; None = the dataset's own fps
    views: tuple[str, ...] | None = None    # cameras to use, by full key or short name, in order; None = all
    instruction: str = ""                   # used where an episode has no task text
    license: str = ""                       # of the data
    note: str = ""                          # traps, units, what was checked
    action_key: str = "action"              # column of the native action
    state_key: str = "observation.state"    # column of the native state

    def __post_init__(self) -> None:
        if self.embodiment not in EMBODIMENTS:
            raise unknown("embodiment", self.embodiment, EMBODIMENTS)
        if not self.action:
            raise UserError(f"dataset config '{self.name}': the action field map is empty")
        for specs in (self.action, self.state):
            ActionMap(specs, self.control_hz or 1.0)  # refuses two entries in one slot and a frequency ≤ 0

    @property
    def embodiment_id(self) -> int:
        """Position in EMBODIMENTS, as fed to the model."""
        return EMBODIMENTS.index(self.embodiment)


def load_config(path_or_name: Path | str) -> DatasetConfig:
    """Read a dataset config from a YAML file, or a shipped one by name; `UserError` names the file and the entry."""
    path = Path(path_or_name)
    if path.suffix not in (".yaml", ".yml"):
        if str(path_or_name) not in config_names():
            raise unknown("dataset config", str(path_or_name), config_names())
        path = configs_dir() / "datasets" / f"{path_or_name}.yaml"
    values = load_yaml(path)
    try:
        return from_mapping(DatasetConfig, {"name": path.stem, **values}, "dataset config")
    except UserError as error:
        raise UserError(f"{path.name}: {error}") from None


def config_names() -> tuple[str, ...]:
    """Names of the shipped dataset configs, sorted."""
    return tuple(sorted(p.stem for p in (configs_dir() / "datasets").glob("*.yaml")))


def find_config(info: Mapping[str, Any], repo: str, explicit: Path | str | None = None) -> DatasetConfig:
    """The config of a dataset: `explicit` (a YAML file or a shipped name), else the one whose `match` fits.

    `info` is the dataset's info.json, `repo` its hub id or folder name. `UserError` unless exactly one family fits.
    """
    if explicit is not None:
        return load_config(explicit)
    robot = str(info.get("robot_type") or "")
    names = {robot.lower(), repo.rsplit("/", 1)[-1].lower()} - {""}
    configs = [load_config(name) for name in config_names()]
    fitting = [c for c in configs if any(fnmatch.fnmatchcase(n, p.lower()) for p in c.match for n in names)]
    if len(fitting) == 1:
        return fitting[0]
    fit = ", ".join(c.name for c in fitting)
    found = f"{len(fitting)} dataset configs ({fit}) fit" if fitting else "no dataset config fits"
    raise UserError(f"{found} '{repo}' with robot type '{robot}'; name one of {', '.join(config_names())}, "
                    "or give a YAML file that describes its action and state like those in configs/datasets/")
