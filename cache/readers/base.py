"""What every reader shares: a `Source` turns a format's columns and pictures into checked, hashed episodes.

A reader subclasses `Source` and says where columns and pictures are; checks, hashing and unit maps are here, once.
Letters: T frames of an episode, ds/da native state and action width.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from ...errors import UserError, unknown
from ..actions.action_map import ActionMap
from ..actions.rotations import NotARotation
from .config import DatasetConfig
from .episode import CorruptEpisode, Episode, View


@dataclass(frozen=True)
class Rows:
    """The raw table of one episode, as the format has it."""

    columns: dict[str, np.ndarray]  # each column asked for, [T] or [T, d], any numeric dtype
    instruction: str  # task text; "" where there is none
    timestamps: np.ndarray | None = None  # [T] seconds; None: row / control_hz


@dataclass(frozen=True)
class EpisodeTable:
    """The rows of one episode, in native units, without pictures."""

    state: np.ndarray  # [T, ds] float32; ds = 0 where the config has no state
    action: np.ndarray  # [T, da] float32
    timestamps: np.ndarray  # [T] float64 seconds since the episode's start
    instruction: str  # may be empty


class Source(ABC):
    """One dataset. Cheap to make, safe to use from several threads, holds no open file between calls."""

    format: ClassVar[str]  # as in DatasetConfig.format
    environment: str | None = None  # simulated task it was recorded in, e.g. "metaworld/push-v3"
    location: str = ""  # where to open it again: its absolute path, or its hub id
    starts: dict[int, list[float]] | None = None  # start vector of each recorded simulator episode

    def __init__(
        self,
        path: Path,
        name: str,
        config: DatasetConfig,
        *,
        fps: float | None,
        view_names: Sequence[str],
        episode_ids: Sequence[int],
    ) -> None:
        """`fps`: rows per second by the files; None where they do not say, and then the config must."""
        self.path, self.name, self.config = path, name, config
        self.view_names, self.episode_ids = tuple(view_names), tuple(sorted(episode_ids))
        hz = config.control_hz or fps
        if not hz:
            raise UserError(
                f"{name}: the files do not say how many rows there are per second; add control_hz to dataset "
                f"config '{config.name}'"
            )
        self.fps = float(fps or hz)  # rows per second by the files
        self.control_hz = float(hz)  # the config's, else the files'
        self.action_map = ActionMap(config.action, self.control_hz)
        self.state_map = ActionMap(config.state, self.control_hz)
        self._numbers = frozenset(self.episode_ids)
        if not self.view_names:
            raise UserError(f"{name} has no camera; a cache needs pictures")
        for wanted in config.bgr_views if config.views is None else ():
            if wanted not in self.view_names:
                raise UserError(f"{name}: {unknown('view in bgr_views', wanted, self.view_names)}")

    # --- what a reader says ---

    @classmethod
    @abstractmethod
    def matches(cls, names: Sequence[str], root: Path | None) -> bool:
        """Whether a dataset with these file names (relative, "/" between parts, at most three parts of a local folder) is
        of this format. `root` is the local folder they lie in, to look into a file where names do not tell; None for a
        hub dataset, of which only names are known."""

    @property
    @abstractmethod
    def revision_hash(self) -> str:
        """sha256 hex over what describes the dataset (its metadata; file names and sizes where there is none)."""

    @abstractmethod
    def length_of(self, episode_id: int) -> int:
        """Number of frames T by the metadata or a cheap look; `CorruptEpisode` when that look fails."""

    @abstractmethod
    def _rows(self, episode_id: int, columns: Sequence[str], where: str) -> Rows:
        """The columns asked for; `CorruptEpisode`, beginning with `where`, when one is missing or unreadable."""

    @abstractmethod
    def _views(self, episode_id: int, table: EpisodeTable, where: str) -> list[tuple[View, str]]:
        """(view, sha256 hex of its stored picture bytes) in the order of `view_names`, found but not decoded."""

    # --- what everyone else calls ---

    def instruction_of(self, episode_id: int) -> str:
        """The episode's task text; the config's default where there is none. A reader with cheap metadata overrides it."""
        return self.table(episode_id).instruction

    def table(self, episode_id: int) -> EpisodeTable:
        """State, action, time and task of one episode, no picture; `CorruptEpisode` for rows that cannot be used,
        `UserError` for an episode that is not listed."""
        where = self.where(episode_id)
        return self._checked(self._rows(episode_id, self._columns, where), where)

    def tables(self, batch_rows: int = 65536) -> Iterator[TableBlock]:
        """The tables of every listed episode once, in blocks of at least `batch_rows` rows (the last may be shorter), in
        memory bounded by one block and the longest episode. An episode that `table` refuses adds no row; it is named
        in `refused`. A reader whose files hold many episodes overrides it to read each file once."""
        return self._blocks(((e, attempt(self.table, e)) for e in self.episode_ids), batch_rows)

    def _blocks(
        self, tables: Iterable[tuple[int, EpisodeTable | CorruptEpisode]], batch_rows: int
    ) -> Iterator[TableBlock]:
        return as_blocks(tables, batch_rows, self.state_map.native_dim, self.action_map.native_dim)

    @property
    def _columns(self) -> tuple[str, ...]:
        """Columns that make the action and the state, each once."""
        return tuple(dict.fromkeys((*self.config.action_columns, *self.config.state_columns)))

    def _checked(self, rows: Rows, where: str) -> EpisodeTable:
        """The raw rows of one episode as its table; `CorruptEpisode` for rows that cannot be used."""
        config = self.config
        action = join_columns(rows.columns, config.action_columns, where)
        length = len(action)
        if not length:
            raise CorruptEpisode(f"{where}: it has no rows")
        if config.action_shift:  # the target of a frame is what was measured that much later; the end holds
            action = action[np.minimum(np.arange(length) + config.action_shift, length - 1)]
        state = np.zeros((length, 0))
        if config.state:
            state = join_columns(rows.columns, config.state_columns, where)
        for what, values, width in (
            ("action", action, config.action_width),
            ("state", state, self.state_map.native_dim),
        ):
            if values.shape[1] != width:
                raise CorruptEpisode(
                    f"{where}: its {what} has {values.shape[1]} dimensions, dataset config '{config.name}' "
                    f"describes {width}"
                )
        if len(state) != length:
            raise CorruptEpisode(f"{where}: {length} rows of action, {len(state)} of state")
        what = "state"
        try:
            self.state_map.check(state)
            what = "action"
            if config.integrate:
                action = config.integrate.apply(self.state_map.hand_pose(state[0]), action)
            self.action_map.check(action)
        except NotARotation as error:
            raise CorruptEpisode(f"{where}: {what}, {error}") from None
        times = np.arange(length) / self.fps if rows.timestamps is None else np.asarray(rows.timestamps, np.float64)
        if len(times) != length:
            raise CorruptEpisode(f"{where}: {length} rows of action, {len(times)} timestamps")
        backwards = np.diff(times, prepend=-np.inf) <= 0
        if backwards.any() or times[0] < 0:
            raise CorruptEpisode(f"{where}: timestamps do not increase at frame {int(backwards.argmax())}")
        return EpisodeTable(
            state.astype(np.float32), action.astype(np.float32), times, rows.instruction or config.instruction
        )

    def load(self, episode_id: int) -> Episode:
        """One episode, its views lazily decoded; `CorruptEpisode` says what is missing, cut short or not finite."""
        where, table = self.where(episode_id), self.table(episode_id)
        digest = hashlib.sha256()
        text = np.frombuffer(table.instruction.encode(), np.uint8)
        for values in (text, table.state, table.action, table.timestamps):
            part = values.tobytes()
            digest.update(f"{len(part)};".encode() + part)
        views = []
        for view, found in self._views(episode_id, table, where):
            if view.length != len(table.action):
                raise CorruptEpisode(f"{where}: {view.length} pictures of '{view.name}' for {len(table.action)} rows")
            if view.name in self.config.bgr_views:
                view, found = (
                    dataclasses.replace(view, open=functools.partial(_swapped, view.open)),
                    hashlib.sha256(f"bgr:{found}".encode()).hexdigest(),
                )
            digest.update(f"{view.name}:{found};".encode())
            views.append(dataclasses.replace(view, sha256=found))
        return Episode(
            self.name,
            episode_id,
            digest.hexdigest(),
            table.instruction,
            self.control_hz,
            len(table.action),
            tuple(views),
            table.state,
            table.action,
            table.timestamps,
        )

    def where(self, episode_id: int) -> str:
        """How messages begin that concern this episode; `UserError` when it is not listed."""
        if episode_id not in self._numbers:
            listed = (
                f"{len(self.episode_ids)}, {self.episode_ids[0]} to {self.episode_ids[-1]}"
                if self.episode_ids
                else "none"
            )
            raise UserError(f"{self.name} has no episode {episode_id}; it lists {listed}")
        return f"{self.name} episode {episode_id}"


def _swapped(open: Callable[[int, int], Iterator[np.ndarray]], start: int, stop: int) -> Iterator[np.ndarray]:
    """Pictures whose red and blue were stored in each other's place, put right."""
    return (np.ascontiguousarray(frame[..., ::-1]) for frame in open(start, stop))


def join_columns(columns: dict[str, np.ndarray], names: Sequence[str], where: str) -> np.ndarray:
    """The named columns side by side as float64 [T, d]. `CorruptEpisode` for one that is missing, of another length, not
    numeric, or not finite (or beyond float32, which the tables are kept in)."""
    parts = []
    for name in names:
        if name not in columns:
            raise CorruptEpisode(
                f"{where}: column '{name}' is missing (there are {', '.join(sorted(columns)) or 'none'})"
            )
        values = np.asarray(columns[name])
        if values.dtype.kind not in "fiub":
            raise CorruptEpisode(f"{where}: column '{name}' is not numeric ({values.dtype})")
        values = values.astype(np.float64).reshape(len(values), math.prod(values.shape[1:]))  # [T, d]
        good = np.abs(values) <= np.finfo(np.float32).max  # False for NaN too
        if not good.all():
            row, dim = np.argwhere(~good)[0]
            raise CorruptEpisode(f"{where}: column '{name}' is {values[row, dim]} at frame {row}, dimension {dim}")
        parts.append(values)
    lengths = {n: len(p) for n, p in zip(names, parts)}
    if len(set(lengths.values())) > 1:
        raise CorruptEpisode(f"{where}: columns differ in length ({', '.join(f'{n} {k}' for n, k in lengths.items())})")
    return np.concatenate(parts, axis=1)


def listing_hash(root: Path, files: Sequence[Path]) -> str:
    """sha256 hex over relative names and sizes: the revision of a dataset without metadata files."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(root).as_posix()}:{path.stat().st_size};".encode())
    return digest.hexdigest()


def choose_views(names: Sequence[str], config: DatasetConfig, dataset: str) -> tuple[str, ...]:
    """The cameras to use among `names`: the config's, in its order, or all. `UserError` names the nearest valid one."""
    for wanted in config.views or ():
        if wanted not in names:
            raise UserError(f"{dataset}: {unknown('view', wanted, names)}")
    return tuple(names) if config.views is None else config.views


@dataclass(frozen=True)
class TableBlock:
    """The tables of several whole episodes, one after another, in native units."""

    episode_ids: np.ndarray  # [n] int64, the episode of each row
    state: np.ndarray  # [n, ds] float32
    action: np.ndarray  # [n, da] float32
    refused: tuple[tuple[int, str], ...]  # (episode, reason) of those met meanwhile that cannot be used


def attempt(table: Callable[..., EpisodeTable], *args: object) -> EpisodeTable | CorruptEpisode:
    """`table(*args)`, or why there is none."""
    try:
        return table(*args)
    except CorruptEpisode as error:
        return error


def as_blocks(
    tables: Iterable[tuple[int, EpisodeTable | CorruptEpisode]], batch_rows: int, state_width: int, action_width: int
) -> Iterator[TableBlock]:
    """Gather (episode, its table or the reason for none) into blocks of at least `batch_rows` rows; the last may be
    shorter, or hold refused episodes only."""
    nothing = np.zeros((0, state_width), np.float32), np.zeros((0, action_width), np.float32)

    def gathered() -> TableBlock:
        ids = np.repeat(np.array([e for e, _ in parts], np.int64), [len(t.action) for _, t in parts])
        states, actions = [nothing[0]], [nothing[1]]
        states += [t.state for _, t in parts]
        actions += [t.action for _, t in parts]
        return TableBlock(ids, np.concatenate(states), np.concatenate(actions), tuple(refused))

    parts: list[tuple[int, EpisodeTable]] = []
    refused: list[tuple[int, str]] = []
    rows = 0
    for episode_id, table in tables:
        if isinstance(table, CorruptEpisode):
            refused.append((episode_id, str(table)))
            continue
        parts.append((episode_id, table))
        rows += len(table.action)
        if rows >= batch_rows:
            yield gathered()
            parts, refused, rows = [], [], 0
    if parts or refused:
        yield gathered()
