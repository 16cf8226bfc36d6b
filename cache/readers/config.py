"""One YAML per dataset family: what each native dimension means, at what rate, which embodiment.

Which file describes a dataset is found in `search`."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.config import from_mapping
from ...common.documents import read_yaml
from ...errors import UserError, unknown
from ..actions.action_map import NATIVE, ActionMap, FieldSpec
from ..actions.integration import POSE, Integration
from ..actions.schemes import Scheme
from ..actions.slots import EMBODIMENTS, SLOTS

FORMATS = {  # format → what it is, in one phrase; the reader is cache/readers/<format>.py
    "lerobot": "LeRobot v2.0, v2.1 or v3.0 (parquet with video or images)",
    "rlds": "RLDS: TFRecord shards with features.json",
    "rlbench": "RLBench demonstrations: PNG folders with low_dim_obs.pkl, zipped or not",
    "dexgraspnet": "DexGraspNet 2.0: grasps and scenes, rendered from the point cloud",
    "dexwild": "DexWild: one HDF5 of episodes with JPEG image groups",
    "episode_hdf5": "one HDF5 file per episode, actions already unified to 128 slots",
    "robomimic": "robomimic HDF5: data/demo_N with actions and obs",
    "replay_buffer": "Diffusion Policy's Zarr replay buffer: data and meta/episode_ends",
}
_POSE_FIELDS = ("eef_pos_x", "eef_pos_y", "eef_pos_z", *(f"eef_angle.quat_xyzw[{i}]" for i in range(4)))
_POSE_SLOTS = [SLOTS[n] for n in ("eef_pos_x", "eef_pos_y", "eef_pos_z", *(f"eef_angle_{i}" for i in range(6)))]


@dataclass(frozen=True)
class Reach:
    """How large some numbers of a dataset are, which tells their unit."""

    dims: tuple[int, ...]  # of the action, and of a state of the same width
    above: float = 0.0  # their largest magnitude in the data is more than this …
    upto: float = math.inf  # … and at most this


@dataclass(frozen=True)
class Fit:
    """What the files must show for a config to fit, where one robot's datasets come in several orders or units."""

    # Patterns of the files' names of the action's dimensions, where they name them; "|" parts alternatives.
    names: tuple[str, ...] = ()
    named: bool = False  # files without names do not fit
    reach: tuple[Reach, ...] = ()


@dataclass(frozen=True)
class DatasetConfig:
    """How one dataset family maps into the unified space."""

    name: str  # family name, equal to the file name (for a shipped one with its folder)
    match: tuple[str, ...]  # patterns of the robot type or repository/folder name, e.g. "*droid*"; () = only by name
    embodiment: str  # one of EMBODIMENTS
    action: tuple[FieldSpec, ...]  # meaning of the native action, dimension by dimension
    state: tuple[FieldSpec, ...]  # meaning of the native state; empty = the dataset has none
    format: str = "lerobot"  # one of FORMATS: which reader understands the files
    source: tuple[str, ...] = ()  # where the data is: hub ids, or the address of its page
    control_hz: float | None = None  # rows per second; None = the dataset's own fps
    views: tuple[str, ...] | None = None  # cameras to use, by full key or short name, in order; None = all
    bgr_views: tuple[str, ...] = ()  # cameras, by short name, whose red and blue are stored in each other's place
    instruction: str = ""  # used where an episode has no task text
    license: str = ""  # of the data
    note: str = ""  # traps, units, what was checked
    action_columns: tuple[str, ...] = ("action",)  # columns that make the native action, side by side
    state_columns: tuple[str, ...] = ("observation.state",)  # columns that make the native state, side by side
    action_shift: int = 0  # rows by which the action's columns are read ahead: 1 = the next measured pose
    integrate: Integration | None = None  # the action begins with displacements per step: make them absolute poses
    sampling_weight: float = 1.0  # factor on the dataset's share of the mixture, which goes as N^temperature
    normalize: Scheme | None = None  # of its actions and state where a run does not choose; None = std5
    fits: Fit = Fit()  # what else than `match` must agree for it to be found
    origin: str = ""  # the file it was read from
    mapped: bool = True  # False: no config describes the files, and every dimension is taken as it is

    def __post_init__(self) -> None:
        if self.embodiment not in EMBODIMENTS:
            raise unknown("embodiment", self.embodiment, EMBODIMENTS)
        if self.format not in FORMATS:
            raise unknown("dataset format", self.format, FORMATS)
        if self.action_shift < 0 or not self.sampling_weight > 0:
            raise UserError(
                f"dataset config '{self.name}': action_shift {self.action_shift} must be 0 or more, "
                f"sampling_weight {self.sampling_weight} positive"
            )
        if not self.action:
            raise UserError(f"dataset config '{self.name}': the action field map is empty")
        for specs in (self.action, self.state):
            ActionMap(specs, self.control_hz or 1.0)  # refuses two entries in one slot and a frequency ≤ 0
        if self.integrate:
            self._check_integration()

    def _check_integration(self) -> None:
        """The integrated action begins with a pose, and the pose it starts from is measured."""
        if self.action_shift:
            raise UserError(
                f"dataset config '{self.name}': integrate makes poses of displacements, action_shift reads measured "
                "poses ahead; give one of them"
            )
        described = ActionMap(self.action, 1.0).field_names[:POSE]
        if described != _POSE_FIELDS:
            raise UserError(
                f"dataset config '{self.name}': with integrate the action begins with {', '.join(_POSE_FIELDS)}; the "
                f"field map says {', '.join(described)}"
            )
        measured = ActionMap(self.state, 1.0)
        if not measured.mask[_POSE_SLOTS].all() or not measured.rotation_slots[_POSE_SLOTS[3:]].all():
            raise UserError(
                f"dataset config '{self.name}': integrate starts from the measured pose, so the state needs "
                "eef_pos_x, eef_pos_y, eef_pos_z and a rotation in eef_angle"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that make the action and the state, each once."""
        return tuple(dict.fromkeys((*self.action_columns, *(self.state_columns if self.state else ()))))

    @property
    def action_width(self) -> int:
        """Numbers of the stored action, before `integrate`."""
        width = sum(spec.width for spec in self.action)
        return width if self.integrate is None else width - POSE + self.integrate.width

    @property
    def embodiment_id(self) -> int:
        """Position in EMBODIMENTS, as fed to the model."""
        return EMBODIMENTS.index(self.embodiment)

    def document(self) -> dict[str, Any]:
        """What a cache or policy stores of it, JSON-ready: the map, not how it was found."""
        values = dataclasses.asdict(self)
        for found in ("fits", "origin", "mapped", *(() if self.normalize else ("normalize",))):
            del values[found]
        for vector in ("action", "state"):
            values[vector] = [{k: v for k, v in s.items() if v or k not in NATIVE} for s in values[vector]]
        return values


def read_config(path: Path, name: str) -> DatasetConfig:
    """The config in a YAML file; `UserError` names the file and the entry."""
    values = read_yaml(path)
    try:
        config: DatasetConfig = from_mapping(DatasetConfig, {"name": name, **values}, "dataset config")
    except UserError as error:
        raise UserError(f"{path.name}: {error}") from None
    return dataclasses.replace(config, origin=str(path))


def unmapped_config(format: str, columns: Mapping[str, int]) -> DatasetConfig:
    """A config of files that none describes: every number of `columns` (name → numbers per row) as it is, in no slot.

    The action's are those called action, else all. `data show`, `check`, `stats` and `video` read with it; nothing is
    built of it."""
    numbers = {c: n for c, n in columns.items() if n > 0 and not _BOOKKEEPING.fullmatch(c)}
    named = [c for c in numbers if re.fullmatch(r"actions?", c)] or [c for c in numbers if _ACTION.match(c)]
    action = named or list(numbers)
    state = [c for c in numbers if c not in action]
    if not action:
        raise UserError(f"it has no column of numbers (columns: {', '.join(columns) or 'none'})")
    return dataclasses.replace(
        UNMAPPED,
        format=format,
        action=tuple(FieldSpec(drop=numbers[c]) for c in action),
        state=tuple(FieldSpec(drop=numbers[c]) for c in state),
        action_columns=tuple(action),
        state_columns=tuple(state),
    )


_ACTION = re.compile(r"actions?[./_]", re.IGNORECASE)
_BOOKKEEPING = re.compile(
    r"timestamp|(frame_|episode_|task_|subtask_)?index|next\..*|is_(first|last|terminal)|reward|discount|annotation\..*"
)
UNMAPPED = DatasetConfig("none", (), EMBODIMENTS[0], (FieldSpec(drop=1),), (), mapped=False)
"""Given to a reader instead of a config: take every number as it is."""
