"""What `dvla data check` remembers of a dataset's numbers: sums and extremes that grow with dimensions, not with rows.

Letters: T rows of an episode, d native dimensions of a table.
"Mapped" values are native · scale + offset (· Hz for displacements): the units of the unified space.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ....cache.actions.action_map import ActionMap
from ....cache.actions.extremes import Extremes, extremes
from ....cache.actions.normalizer import Normalizer
from ....cache.actions.rotations import matrix_from_rot6d, to_rot6d
from ....cache.actions.slots import SLOTS, kind_of
from ....cache.actions.statistics import RunningStatistics
from ....cache.readers import Source
from ....errors import Failed

TOP = 4  # examples kept per dimension
BINS, PER_OCTAVE, LOWEST = 160, 2, -40  # step sizes 2^-40 .. 2^40, two bins an octave
LAGS = range(-4, 9)  # rows by which the state may follow the action


@dataclass(frozen=True)
class Dimension:
    """One native dimension of a table."""

    table: str  # "action" or "state"
    index: int  # in the native vector
    name: str  # as in ActionMap.field_names
    kind: str  # a value of KINDS, "angle" (Euler, axis-angle), "rotation" (other forms), "dropped" or "other"
    gain: float  # mapped = native · gain + offset
    offset: float

    def __str__(self) -> str:
        return f"{self.table} {self.index} ({self.name})"


def dimensions(table: str, mapping: ActionMap) -> tuple[Dimension, ...]:
    """The native dimensions of a field map, in order."""
    found: list[Dimension] = []
    for spec in mapping.specs:
        rate = mapping.control_hz if spec.delta else 1.0
        for i in range(spec.width):
            index = len(found)
            if spec.rotation:
                kind = "angle" if spec.rotation in ("euler_xyz", "axis_angle") else "rotation"
            else:
                kind = "dropped" if spec.drop else kind_of(spec.names[i])
            found.append(
                Dimension(table, index, mapping.field_names[index], kind, spec.scale * rate, spec.offset * rate)
            )
    return tuple(found)


class Steps:
    """Sizes of steps from row to row, per column: a histogram in octaves and the largest few with their place."""

    def __init__(self, width: int) -> None:
        self.counts = np.zeros((width, BINS), np.int64)  # of steps that are not 0
        self.top: list[list[tuple[float, int, int]]] = [
            [] for _ in range(width)
        ]  # (size, episode, frame it arrives at)

    def update(self, episode: int, sizes: np.ndarray) -> None:
        """`sizes` [T-1, width], 0 or more."""
        if not len(sizes):
            return
        moved, column = sizes > 0, np.broadcast_to(np.arange(sizes.shape[1]), sizes.shape)
        octave = np.floor(np.log2(sizes[moved]) * PER_OCTAVE).astype(np.int64) - LOWEST * PER_OCTAVE
        flat = column[moved] * BINS + np.clip(octave, 0, BINS - 1)
        self.counts += np.bincount(flat, minlength=self.counts.size).reshape(self.counts.shape)
        for i, (row, best) in enumerate(zip(sizes.argmax(0), self.top)):
            heapq.heappush(best, (float(sizes[row, i]), episode, int(row) + 1))
            if len(best) > TOP:
                heapq.heappop(best)

    def quantile(self, q: float) -> np.ndarray:
        """[width] size below which a share q of the moving steps lie (rounded up to half an octave); 0 without any."""
        total = self.counts.sum(1)
        bins = (np.cumsum(self.counts, 1) < np.ceil(q * total)[:, None]).sum(1)
        return np.where(total > 0, 2.0 ** ((bins + 1) / PER_OCTAVE + LOWEST), 0.0)

    def largest(self, column: int) -> list[tuple[float, int, int]]:
        """The largest step of the few episodes with the largest ones, largest first."""
        return sorted(self.top[column], reverse=True)


class TableStats:
    """Running extremes of one table (action or state), native and mapped, and of its rotations."""

    def __init__(self, table: str, mapping: ActionMap, soft: np.ndarray, hard: np.ndarray) -> None:
        """`soft`, `hard` [d, 2]: limits on mapped values, beyond which they look odd and wrong; infinite for none."""
        self.dims, self.rows, width = dimensions(table, mapping), 0, mapping.native_dim
        self.low, self.high = np.full(width, np.inf), np.full(width, -np.inf)  # native
        self.at_low, self.at_high = np.zeros(width, np.int64), np.zeros(width, np.int64)  # rows at exactly that value
        self.worst = np.zeros(width)  # mapped value furthest beyond `soft`
        self.worst_at: list[tuple[int, int]] = [(-1, -1)] * width  # (episode, frame) of it
        self.odd, self.wrong = np.zeros(width, np.int64), np.zeros(width, np.int64)  # rows beyond `soft`, `hard`
        self.steps = Steps(width)
        self.rotations = [RotationStats(form, span) for form, span in rotation_spans(mapping)]
        self.mapping, self.unified = mapping, RunningStatistics()  # of the slots that the mapping fills
        self._soft, self._hard = soft, hard
        self._gain = np.array([d.gain for d in self.dims])
        self._offset = np.array([d.offset for d in self.dims])

    def update(self, episode: int, native: np.ndarray) -> None:
        """Add one episode's rows [T, d], T ≥ 1."""
        self.rows += len(native)
        for extreme, count, best in ((self.low, self.at_low, native.min(0)), (self.high, self.at_high, native.max(0))):
            new = best < extreme if extreme is self.low else best > extreme
            here = (native == best).sum(0)
            count[:] = np.where(new, here, count + here * (best == extreme))
            extreme[new] = best[new]
        mapped = native * self._gain + self._offset
        beyond = np.maximum(self._soft[:, 0] - mapped, mapped - self._soft[:, 1])  # [T, d], > 0 outside
        self.odd += (beyond > 0).sum(0)
        self.wrong += ((mapped < self._hard[:, 0]) | (mapped > self._hard[:, 1])).sum(0)
        rows = beyond.argmax(0)
        known = np.maximum(self._soft[:, 0] - self.worst, self.worst - self._soft[:, 1])
        for i in np.flatnonzero(beyond[rows, np.arange(len(rows))] > np.maximum(known, 0)):
            self.worst[i], self.worst_at[i] = mapped[rows[i], i], (episode, int(rows[i]))
        self.steps.update(episode, np.abs(np.diff(native.astype(np.float64), axis=0)))
        self.unified.update(self.mapping.to_unified(native)[:, self.mapping.mask])
        for rotation in self.rotations:
            rotation.update(episode, native)


class RotationStats:
    """One rotation of a table: rows that are none, sign flips of its quaternion, angles from row to row (rad)."""

    def __init__(self, form: str, span: slice) -> None:
        self.form, self.span = form, span
        self.defective = self.flips = self.rows = 0
        self.worst, self.worst_at = 0.0, (-1, -1)  # largest `rotation_defect` and where
        self.first_flip = (-1, -1)
        self.steps = Steps(1)

    def update(self, episode: int, native: np.ndarray) -> None:
        values = native[:, self.span].astype(np.float64)
        defect = rotation_defect(self.form, values)
        bad, row = defect > 0.02, int(defect.argmax())
        self.rows += len(values)
        self.defective += int(bad.sum())
        if defect[row] > self.worst:
            self.worst, self.worst_at = float(defect[row]), (episode, row)
        if self.form == "quat_xyzw":
            turned = np.flatnonzero((values[1:] * values[:-1]).sum(1) < 0)
            if len(turned) and not self.flips:
                self.first_flip = (episode, int(turned[0]) + 1)
            self.flips += len(turned)
        if not bad.any() and len(values) > 1:
            self.steps.update(episode, step_angles(self.form, values)[:, None])


def rotation_defect(form: str, values: np.ndarray) -> np.ndarray:
    """[T] how far rows [T, width] of a rotation are from being one: deviation of norms (and products of columns) from
    those of a rotation; 0 for forms of which every value is a rotation."""
    if form == "quat_xyzw":
        return np.abs(np.linalg.norm(values, axis=1) - 1)
    if form in ("euler_xyz", "axis_angle"):
        return np.zeros(len(values))
    # 6D is two columns one after the other, a matrix is row-major
    columns = values.reshape(len(values), 2, 3) if form == "rot6d" else values.reshape(len(values), 3, 3).swapaxes(1, 2)
    return np.abs(columns @ columns.swapaxes(1, 2) - np.eye(columns.shape[1])).max((1, 2))


def step_angles(form: str, values: np.ndarray) -> np.ndarray:
    """[T-1] angle (rad, 0 to π) between consecutive rotations [T, width]."""
    matrix = matrix_from_rot6d(to_rot6d(form, values))
    sine = np.linalg.norm((matrix[1:] - matrix[:-1]).reshape(-1, 9), axis=1) / np.sqrt(8)  # |A-B| = √8 · sin(angle / 2)
    return 2 * np.arcsin(np.clip(sine, 0, 1))


def rotation_spans(mapping: ActionMap) -> list[tuple[str, slice]]:
    """(form, native columns) of each rotation of a field map."""
    stops = np.cumsum([spec.width for spec in mapping.specs]).tolist()
    return [
        (spec.rotation, slice(stop - spec.width, stop)) for spec, stop in zip(mapping.specs, stops) if spec.rotation
    ]


class Following:
    """How the measured state follows the action: products of their steps at several lags, per pair of dimensions.

    Paired are equal slots (a position commanded and measured) and a hand's displacement with its measured position.
    """

    def __init__(self, action: Sequence[Dimension], state: Sequence[Dimension], control_hz: float) -> None:
        measured = {SLOTS[d.name]: d for d in state if d.kind in ("joint", "position")}
        wanted = [
            (a, SLOTS[a.name.replace("_vel_", "_pos_")])
            for a in action
            if a.kind in ("joint", "position") or "eef_vel" in a.name
        ]
        self.pairs = [(a, measured[slot]) for a, slot in wanted if slot in measured]
        self._hz = control_hz
        self.products = np.zeros((3, len(LAGS), len(self.pairs)))  # Σ xy, Σ xx, Σ yy

    def update(self, action: np.ndarray, state: np.ndarray) -> None:
        """Add one episode: native rows [T, da] and [T, ds]."""
        if not self.pairs or len(action) < 2:
            return
        commanded, moved = [], []
        for a, s in self.pairs:
            mapped = action[:, a.index] * a.gain + a.offset
            commanded.append(mapped[:-1] / self._hz if a.kind == "speed" else np.diff(mapped))
            moved.append(np.diff(state[:, s.index] * s.gain + s.offset))
        x, y = np.stack(commanded, 1).astype(np.float64), np.stack(moved, 1).astype(np.float64)  # [T-1, pairs]
        for i, lag in enumerate(LAGS):
            if abs(lag) >= len(x):
                continue
            before, after = x[max(0, -lag) : len(x) - max(0, lag)], y[max(0, lag) : len(y) + min(0, lag)]
            self.products[:, i] += (before * after).sum(0), (before**2).sum(0), (after**2).sum(0)

    def correlation(self) -> np.ndarray:
        """[lags, pairs] in -1..1; 0 where a dimension never moves."""
        xy, xx, yy = self.products
        return xy / np.sqrt(np.maximum(xx * yy, 1e-30))

    def slope(self, lag: int) -> np.ndarray:
        """[pairs] measured step per commanded one at a lag of `lag` rows, by least squares."""
        xy, xx, _ = self.products[:, LAGS.index(lag)]
        return xy / np.maximum(xx, 1e-30)


def extremes_of(source: Source, table: TableStats) -> Extremes:
    """Values far from all others or cut off; reads the tables again where the statistics show some."""
    mapping, what = table.mapping, table.dims[0].table
    stats = table.unified.result().on(mapping.mask)
    scheme = source.config.normalize or "std5"
    found = ((e, source.attempt(source.table, e)) for e in source.episode_ids)
    rows = ((e, mapping.to_unified(getattr(t, what))) for e, t in found if not isinstance(t, Failed))
    return extremes(what, stats, Normalizer(stats, mapping.mask, mapping.rotation_slots, scheme), rows)
