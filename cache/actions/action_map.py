"""Per-dataset field maps: native vectors of a robot to the unified 128-d action space, and back.

Slots [0, 103) are RDT-1B's table (github.com/thu-ml/RoboticsDiffusionTransformer, configs/state_vec.py); head, spine,
torso and finger joints are added. A slot holds one quantity in one unit: m, rad, m/s, rad/s; gripper_open is 1 open,
0 closed; rotations are 6D. Letters: d native width of one dataset's action or state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np

from ...common.config import from_mapping
from ...common.documents import Field, Form, require_form
from ...errors import UserError, unknown
from .rotations import WIDTH, from_quaternion, from_rot6d, require_rotations, to_quaternion, to_rot6d
from .slots import ACTION_SCHEMA_VERSION, ROTATION_PREFIXES, SIX_D, SLOTS, UNIFIED_DIM, expand

MOST_NATIVE = 4096  # dimensions of a robot's vector
NATIVE = ("native", "unit")  # entries of a FieldSpec that only name things


class MapForm(Form):
    """What `ActionMap.to_dict` makes."""

    version: int
    control_hz: Annotated[float, Field(gt=0, le=1e5)]
    fields: Annotated[list[dict[str, Any]], Field(max_length=MOST_NATIVE)]


@dataclass(frozen=True)
class FieldSpec:
    """What the next native dimensions of a vector mean. Exactly one of `field`, `fields`, `rotation`, `drop` is given.

    unified = (native · scale + offset) · (control_hz if delta else 1). `arm_joint_{0..6}_pos` stands for seven names.
    """

    field: str | None = None  # one named slot; consumes one dimension
    fields: tuple[str, ...] | None = None  # several named slots in order, each consuming one dimension
    # Consumes 4 / 3 / 3 / 6 / 9 dimensions.
    rotation: Literal["quat_xyzw", "euler_xyz", "axis_angle", "rot6d", "matrix"] | None = None
    prefix: str = "eef_angle"  # with `rotation`: the six slots it fills, eef_angle or left_eef_angle
    drop: int | None = None  # this many dimensions are dropped
    fill: float = 0.0  # with `drop`: their value in `to_native`
    scale: float = 1.0  # with `field(s)`: unit and sign, never 0
    offset: float = 0.0  # with `field(s)`: in unified units, before the × control_hz
    delta: bool = False  # with `field(s)`: native is a displacement per step, the slot is a velocity
    # For old layouts, whose 6D slots count as plain scaled slots: with `field(s)` they hold raw numbers, with
    # `rotation` a quaternion xyzw (w ≥ 0) in the first four.
    legacy: bool = False
    native: tuple[str, ...] = ()  # the robot's own name of each dimension, e.g. "shoulder_pan.pos"
    unit: str = ""  # native unit, e.g. "deg"

    def __post_init__(self) -> None:
        given = [n for n in ("field", "fields", "rotation", "drop") if getattr(self, n) is not None]
        if len(given) != 1:
            raise UserError(f"a field map entry takes exactly one of field, fields, rotation, drop; got {given}")
        for name in self.names:
            if name not in SLOTS:
                raise unknown("action field", name, SLOTS)
            if SLOTS[name] in SIX_D and not self.legacy:
                raise UserError(f"'{name}' is part of a 6D rotation; use 'rotation:' {', '.join(WIDTH)}")
            if self.delta and "_vel" not in name:
                raise UserError(f"'{name}' with 'delta: true': a displacement per step belongs in a velocity slot")
        if self.native and len(self.native) != self.width:
            raise UserError(f"'native' names {len(self.native)} dimensions of an entry that has {self.width}")
        if self.prefix not in ROTATION_PREFIXES:
            raise unknown("rotation prefix", self.prefix, ROTATION_PREFIXES)
        if self.drop is not None and not 1 <= self.drop <= MOST_NATIVE:
            raise UserError(f"'drop: {self.drop}': give the number of dimensions to drop, 1 to {MOST_NATIVE}")
        if self.scale == 0 or not np.isfinite([self.scale, self.offset, self.fill]).all():
            raise UserError(f"scale {self.scale}, offset {self.offset}, fill {self.fill}: must be finite, scale not 0")
        if not self.names and (self.scale, self.offset, self.delta) != (1.0, 0.0, False) or self.drop and self.legacy:
            raise UserError("scale, offset and delta apply to 'field' and 'fields' entries only, legacy not to 'drop'")

    @property
    def names(self) -> tuple[str, ...]:
        """Slot names of a `field`/`fields` entry, ranges expanded; empty for the other forms."""
        patterns = (self.field,) if self.field is not None else self.fields or ()
        return tuple(name for p in patterns for name in expand(p))

    @property
    def width(self) -> int:
        """Native dimensions this entry consumes."""
        return self.drop or (WIDTH[self.rotation] if self.rotation else len(self.names))


class ActionMap:
    """Native vector [..., d] ↔ unified vector [..., 128] for one dataset. Computes in float64, gives float32."""

    def __init__(self, specs: Sequence[FieldSpec], control_hz: float) -> None:
        """`UserError` when two entries fill the same slot or `control_hz` (Hz) is not positive."""
        if not (np.isfinite(control_hz) and control_hz > 0):
            raise UserError(f"control frequency {control_hz} Hz: must be positive")
        self.specs, self.control_hz = tuple(specs), float(control_hz)
        columns: list[int] = []  # native ones of plain slots
        names: list[str] = []  # of the native dimensions
        slots, gains, offsets = [], [], []
        self._rotations: list[tuple[str, bool, slice, slice]] = []  # (form, legacy, native columns, unified slots)
        self._dropped: list[tuple[slice, float]] = []  # (native columns, fill)
        for spec in self.specs:
            start, span = len(names), slice(len(names), len(names) + spec.width)
            if spec.rotation:
                first = SLOTS[f"{spec.prefix}_0"]
                self._rotations.append(
                    (spec.rotation, spec.legacy, span, slice(first, first + (4 if spec.legacy else 6)))
                )
                names += [f"{spec.prefix}.{spec.rotation}[{i}]" for i in range(spec.width)]
            elif spec.drop:
                self._dropped.append((span, spec.fill))
                names += ["dropped"] * spec.drop
            else:
                rate = self.control_hz if spec.delta else 1.0
                columns += range(start, start + spec.width)
                slots += [SLOTS[n] for n in spec.names]
                gains += [spec.scale * rate] * spec.width
                offsets += [spec.offset * rate] * spec.width
                names += spec.names
        self.field_names: tuple[str, ...] = tuple(names)  # one per native dimension
        self.native_dim = len(names)
        self._columns, self._slots = np.array(columns, dtype=np.int64), np.array(slots, dtype=np.int64)
        self._gain, self._offset = np.array(gains, dtype=np.float64), np.array(offsets, dtype=np.float64)
        filled = slots + [i for *_, s in self._rotations for i in range(s.start, s.stop)]
        twice = sorted({s for s in filled if filled.count(s) > 1})
        if twice:
            name = next(n for n in SLOTS if SLOTS[n] == twice[0])
            raise UserError(f"two entries of the field map fill '{name}' (slot {twice[0]})")
        self.mask = np.zeros(UNIFIED_DIM, dtype=bool)  # [128] slots this dataset fills
        self.mask[filled] = True
        self.rotation_slots = np.zeros(UNIFIED_DIM, dtype=bool)  # [128] of those, the 6D rotation slots
        for _, legacy, _, target in self._rotations:
            self.rotation_slots[target] = not legacy

    @property
    def native_names(self) -> tuple[str, ...]:
        """The robot's own name of each native dimension, where the config gives it; else the slot's."""
        ends = np.cumsum([spec.width for spec in self.specs])
        named = [s.native or self.field_names[end - s.width : end] for s, end in zip(self.specs, ends)]
        return tuple(name for names in named for name in names)

    @property
    def native_units(self) -> tuple[str, ...]:
        """The native unit of each dimension; "" where the config does not give it."""
        return tuple(spec.unit for spec in self.specs for _ in range(spec.width))

    def check(self, native: np.ndarray) -> None:
        """`NotARotation` (a `UserError`) naming the first row of `native [..., d]` that holds no valid rotation."""
        for form, _, source, _ in self._rotations:
            require_rotations(form, native[..., source])

    def to_unified(self, native: np.ndarray) -> np.ndarray:
        """`native [..., d]` → float32 [..., 128], 0 in inactive slots. `UserError` as `check`, or for another d."""
        native = np.asarray(native, dtype=np.float64)
        if native.shape[-1] != self.native_dim:
            raise UserError(f"the field map describes {self.native_dim} dimensions, the data has {native.shape[-1]}")
        unified = np.zeros((*native.shape[:-1], UNIFIED_DIM))
        unified[..., self._slots] = native[..., self._columns] * self._gain + self._offset
        for form, legacy, source, target in self._rotations:
            unified[..., target] = (to_quaternion if legacy else to_rot6d)(form, native[..., source])
        return unified.astype(np.float32)

    def to_native(self, unified: np.ndarray) -> np.ndarray:
        """`unified [..., 128]` → float32 [..., d]; dropped dimensions get `fill`, rotations are orthonormalized."""
        unified = np.asarray(unified, dtype=np.float64)
        if unified.shape[-1] != UNIFIED_DIM:
            raise ValueError(f"unified vectors have {UNIFIED_DIM} slots, got {unified.shape[-1]}")
        native = np.zeros((*unified.shape[:-1], self.native_dim))
        native[..., self._columns] = (unified[..., self._slots] - self._offset) / self._gain
        for form, legacy, source, target in self._rotations:
            native[..., source] = (from_quaternion if legacy else from_rot6d)(form, unified[..., target])
        for source, fill in self._dropped:
            native[..., source] = fill
        return native.astype(np.float32)

    def bounds(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Native (low, high) float64 [d] of unified bounds [128]; NaN for dimensions of rotations and dropped ones."""
        ends = np.full((2, self.native_dim), np.nan)
        unified = np.stack([low, high]).astype(np.float64)[:, self._slots]
        ends[:, self._columns] = np.sort((unified - self._offset) / self._gain, axis=0)
        return ends[0], ends[1]

    def hand_pose(self, native: np.ndarray) -> np.ndarray:
        """Pose [..., 7] of the one (or right) end effector, float64: x y z in m, quaternion xyzw.

        `native [..., d]`; only for a map that fills the slots eef_pos and eef_angle.
        """
        unified = self.to_unified(native).astype(np.float64)
        position, angle = SLOTS["eef_pos_x"], SLOTS["eef_angle_0"]
        return np.concatenate(
            [unified[..., position : position + 3], from_rot6d("quat_xyzw", unified[..., angle : angle + 6])], axis=-1
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready description; `from_dict` gives an equal map back."""
        plain = FieldSpec(drop=1)
        keep = [
            {
                k: list(v) if isinstance(v, tuple) else v
                for k, v in dataclasses.asdict(s).items()
                if k == "drop" and v or k != "drop" and v != getattr(plain, k)
            }
            for s in self.specs
        ]
        return {"version": ACTION_SCHEMA_VERSION, "control_hz": self.control_hz, "fields": keep}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ActionMap:
        """Inverse of `to_dict`; `UserError` for another action-schema version, and for what is no such map."""
        require_form(values, "the map of its fields", MapForm)
        if values["version"] != ACTION_SCHEMA_VERSION:
            raise UserError(
                f"action schema version {values['version']} was written by another release; "
                f"this one uses {ACTION_SCHEMA_VERSION}: rebuild the cache"
            )
        return cls([from_mapping(FieldSpec, f, "fields") for f in values["fields"]], values["control_hz"])
