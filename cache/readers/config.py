"""One YAML per dataset family (configs/datasets/): what each native dimension means, at what rate, which embodiment."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.config import configs_dir, from_mapping, load_yaml
from ...errors import UserError, unknown
from ..actions.action_map import ActionMap, FieldSpec
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

    def to_dict(self) -> dict[str, Any]:
        """As a cache keeps it; without what is not given and earlier releases did not know."""
        values = dataclasses.asdict(self)
        return {k: v for k, v in values.items() if k != "normalize" or v is not None}

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


def load_config(path_or_name: Path | str) -> DatasetConfig:
    """Read a dataset config from a YAML file, or a shipped one by name; `UserError` names the file and the entry."""
    path, name = Path(path_or_name), Path(path_or_name).stem
    if path.suffix not in (".yaml", ".yml"):
        name = str(path_or_name)
        if name not in config_names():
            raise unknown("dataset config", name, config_names())
        return _shipped(name)
    return _read(path, name)


@functools.cache
def _shipped(name: str) -> DatasetConfig:
    return _read(configs_dir() / "datasets" / f"{name}.yaml", name)


def _read(path: Path, name: str) -> DatasetConfig:
    values = load_yaml(path)
    try:
        return from_mapping(DatasetConfig, {"name": name, **values}, "dataset config")
    except UserError as error:
        raise UserError(f"{path.name}: {error}") from None


def config_names() -> tuple[str, ...]:
    """Names of the shipped dataset configs, sorted. Those in a folder, like "legacy/droid", are loaded by name only."""
    root = configs_dir() / "datasets"
    return tuple(sorted(p.relative_to(root).with_suffix("").as_posix() for p in root.rglob("*.yaml")))


def find_config(format: str, names: Iterable[str]) -> DatasetConfig:
    """The shipped config of a format whose `match` fits one of `names`: robot type, repository or folder name.

    `UserError` unless exactly one fits.
    """
    known = [n.lower().rsplit("/", 1)[-1] for n in dict.fromkeys(names) if n]
    configs = [c for c in (load_config(n) for n in config_names() if "/" not in n) if c.format == format]
    fitting = [c for c in configs if any(fnmatch.fnmatchcase(n, p.lower()) for p in c.match for n in known)]
    if len(fitting) == 1:
        return fitting[0]
    fit = ", ".join(c.name for c in fitting)
    found = f"{len(fitting)} dataset configs ({fit}) fit" if fitting else "no dataset config fits"
    raise UserError(
        f"{found} a {format} dataset called {' or '.join(repr(n) for n in known) or 'nothing'}; give --dataset-config "
        f"with one of {', '.join(c.name for c in configs) or 'no shipped one'}, or with a YAML file like those in "
        "configs/datasets/ (`dvla data add` writes one for a LeRobot dataset)"
    )
