"""A dataset as `dvla data add` sees it: its columns of numbers with names and ranges, its cameras, its robot."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence

import numpy as np

from ....cache.readers import open_source
from ....cache.readers.config import UNMAPPED
from ....cache.readers.episode import CorruptEpisode
from ....cache.readers.search import SAMPLED
from ....cache.readers.tables import join_columns
from ....errors import unknown
from ..summary import summarize

# Columns that many datasets call alike → the names of their dimensions.
_CALLED = (
    (re.compile(r".*quat(ernion)?(_xyzw)?", re.I), 4, ("qx", "qy", "qz", "qw")),
    (re.compile(r".*(eef?|tcp|hand|end_effector)_?(pos|position|xyz)", re.I), 3, ("x", "y", "z")),
    (re.compile(r".*(world_vector|xyz|translation)", re.I), 3, ("x", "y", "z")),
    (re.compile(r".*(axis_?angle|rotvec)", re.I), 3, ("axis_rx", "axis_ry", "axis_rz")),
    (re.compile(r".*(rotation_delta|euler|rpy)", re.I), 3, ("roll", "pitch", "yaw")),
)
_JOINTS = re.compile(r".*(joint_?(pos|positions?|state|angles?)?s?|qpos)", re.I)
_STATE = re.compile(r"(observation[./]|obs/)?(state|proprio|robot_state|robot0_(eef_pos|eef_quat|gripper_qpos))", re.I)


class Dataset:
    """Opened without a map. `UserError` when it cannot be read."""

    def __init__(self, path: str) -> None:
        self.path, self.source = path, open_source(path, UNMAPPED)
        config = self.source.config
        vectors = ((config.action_columns, config.action), (config.state_columns, config.state))
        self.widths = {c: spec.width for columns, specs in vectors for c, spec in zip(columns, specs)}
        self.known = config.match  # names that a config's `match` may fit
        self.low, self.high = ({c: np.full(w, end) for c, w in self.widths.items()} for end in (np.inf, -np.inf))
        self._look()

    @property
    def robot(self) -> str:
        """Its type in the files; "" where they do not say."""
        return str(getattr(self.meta, "info", {}).get("robot_type") or "")

    @property
    def meta(self) -> object:
        """LeRobot's metadata, None of other formats."""
        return getattr(self.source, "meta", None)

    @property
    def version(self) -> str:
        """Format and version in words."""
        return f"LeRobot {self.meta.version}" if self.meta else self.source.format  # type: ignore[attr-defined]

    def cameras(self) -> tuple[list[str], str]:
        """(names, their sizes in words)."""
        found = summarize(self.path).cameras if self.source.view_names else {}
        sizes = {name: found.get(name) for name in self.source.view_names}
        return list(sizes), ", ".join("×".join(map(str, size)) if size else "?" for size in sizes.values())

    def columns(self, what: str, given: Sequence[str] | None) -> tuple[str, ...]:
        """Columns of the action or the state: those given, else the usual ones; `UserError` for an unknown one."""
        usual = self.source.config.action_columns
        if what == "state":
            usual = tuple(c for c in self.source.config.state_columns if _STATE.fullmatch(c))
        for column in given or ():
            if column not in self.widths:
                error = unknown("column", column, self.widths)
                raise type(error)(f"{error}; name the {what}'s with --{what}-column")
        return tuple(usual if given is None else given)

    def names(self, what: str, columns: Sequence[str]) -> list[str]:
        """A name for each dimension: the files' own, else by the column's, else "action[3]"."""
        named = self.source.dimension_names(columns)
        if named:
            return named
        found: list[str] = []
        for column in columns:
            found += self.source.dimension_names((column,)) or self._called(column, what, len(found))
        return found

    def range_of(self, columns: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Smallest and largest value of each dimension of these columns, side by side; infinite where none is known."""
        low, high = (np.concatenate([np.zeros(0), *(side[c] for c in columns)]) for side in (self.low, self.high))
        return low, high

    def _called(self, column: str, what: str, start: int) -> list[str]:
        width, last = self.widths[column], re.split(r"[./]", column)[-1]
        for pattern, count, names in _CALLED:
            if width == count and pattern.fullmatch(last):
                return [f"{last} {n}" if n in "xyz" and "eef" in last else n for n in names]
        if re.search(r"gripper", last, re.I) and width <= 2:
            return ["gripper", "gripper pad"][:width]
        if _JOINTS.fullmatch(last):
            return [f"joint_{i}" for i in range(width)]
        return [f"{what}[{start + i}]" for i in range(width)]

    def _look(self) -> None:
        every = self.source.episode_ids
        for i in sorted({round(i) for i in np.linspace(0, len(every) - 1, min(SAMPLED, len(every)))}):
            with contextlib.suppress(CorruptEpisode):
                found = self.source.columns_of(every[i])
                for column in self.widths:
                    values = join_columns(found, (column,), self.source.name)
                    if len(values):
                        self.low[column] = np.minimum(self.low[column], values.min(0))
                        self.high[column] = np.maximum(self.high[column], values.max(0))
