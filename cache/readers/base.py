"""What every reader shares: a `Source` turns a format's columns and images into checked, hashed episodes.

A reader subclasses `Source` and says where columns and images are; checks, hashing and unit maps are here, once.
Letters: T frames of an episode, ds/da native state and action width.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np

from ...errors import Failed, Note, UserError, unknown
from ..actions.action_map import ActionMap
from ..actions.rotations import NotARotation
from ..actions.selection import Choice
from .config import DatasetConfig
from .episode import CorruptEpisode, Episode, View
from .faults import guarded_frames, one_episode
from .tables import EpisodeTable, Rows, TableBlock, as_blocks, join_columns

Result = TypeVar("Result")
Seen = TypeVar("Seen")
Name = TypeVar("Name", bound=Hashable)
UNKNOWN_HZ = 10.0  # rows per second of files that do not give it and that no config describes


class Source(ABC):
    """One dataset. Cheap to make, safe to use from several threads, holds no open file between calls."""

    format: ClassVar[str]  # as in DatasetConfig.format
    environment: str | None = None  # simulated task it was recorded in, e.g. "metaworld/push-v3"
    location: str = ""  # where to open it again: its absolute path, or its hub id
    problem: UserError | None = None  # why it was opened without a config
    starts: dict[int, list[float]] | None = None  # start vector of each recorded simulator episode
    choice = Choice()  # what is used of it
    left_out: tuple[int, ...] = ()  # episodes that are not used by choice
    text_from: str = ""  # where in the files the task texts are, most preferred first; "" where a format has one place

    def __init__(
        self,
        path: Path,
        name: str,
        config: DatasetConfig,
        *,
        fps: float | None = None,
        view_names: Sequence[str],
        episode_ids: Sequence[int],
        widths: Mapping[str, int] | None = None,
    ) -> None:
        """`UserError` when the config does not describe the files.

        Args:
            fps: rows per second by the files; None where they do not say, and then the config must.
            widths: numbers per row of each column of the files; None where that is not known before they are read.
        """
        self.path, self.name, self.config = path, name, config
        self.view_names, self.episode_ids = tuple(view_names), tuple(sorted(episode_ids))
        hz = config.control_hz or fps
        self.rate_known = bool(hz)
        if not hz and not config.mapped:
            hz = UNKNOWN_HZ
        if not hz:
            raise UserError(
                f"{name}: the files do not give the number of rows per second; add control_hz to dataset config "
                f"'{config.name}'"
            )
        self.fps = float(fps or hz)  # rows per second by the files
        self.control_hz = float(hz)  # the config's, else the files'
        self.action_map = ActionMap(config.action, self.control_hz)
        self.state_map = ActionMap(config.state, self.control_hz)
        self._numbers = frozenset(self.episode_ids)
        self._found: dict[tuple[int, str], tuple[object, View]] = {}  # (episode, view) → state of its files, the view
        if widths is not None:
            self._check_widths(widths)
        if not self.view_names and config.mapped:
            raise UserError(f"{name} has no camera; a cache needs images")
        for wanted in config.bgr_views if config.views is None else ():
            if wanted not in self.view_names:
                raise UserError(f"{name}: {unknown('view in bgr_views', wanted, self.view_names)}")

    # --- what a reader says ---

    @classmethod
    @abstractmethod
    def matches(cls, names: Sequence[str], root: Path | None) -> bool:
        """Whether a dataset with these file names (relative, "/" between parts, at most three parts of a local folder)
        is of this format. `root` is the local folder they are in, to open a file where names do not tell; None
        for a hub dataset, of which only names are known."""

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
    def _files(self, episode_id: int, view: str, where: str) -> Sequence[Path]:
        """The files that hold a view's images: while none of them changes, the view is not looked for again."""

    @abstractmethod
    def _views(self, episode_id: int, names: Sequence[str], table: EpisodeTable, where: str) -> Iterable[View]:
        """The views `names`, in that order, hashed but not decoded. Small: they are kept."""

    # --- what everyone else calls ---

    def attempt(self, read: Callable[[int], Result], episode_id: int) -> Result | Failed:
        """`read(episode_id)`, or why that cannot be read."""
        where = self.where(episode_id)
        try:
            with one_episode(where, self.path):
                return read(episode_id)
        except CorruptEpisode as error:
            return error.failed(episode_id, where)

    def notes(self) -> tuple[Note, ...]:
        """What to know about the dataset as a whole, in one line each: `check` finds it, the others say it."""
        return ()

    def instruction_of(self, episode_id: int) -> str:
        """The episode's task text, else the config's. A reader with cheap metadata overrides it."""
        return self.table(episode_id).instruction

    def success_of(self, episode_id: int) -> bool | None:
        """Whether the demonstration succeeded, by its files; None where they do not say."""
        return None

    def key_of(self, episode_id: int) -> str | None:
        """The name of the episode's recording, as lists of other projects name it; None where it has none."""
        return None

    def choose(self, choice: Choice) -> None:
        """Use these episodes only: the others are listed no more. `UserError` for episodes that it does not have, or
        where none is left. One that cannot be looked at shows that when it is read."""
        listed = self.episode_ids
        if choice:
            choice = choice.numbered(listed, self.name, functools.partial(self.attempt, self.key_of))
        used = choice.episodes(listed, self.name) if choice else list(listed)
        if choice.success_only:
            kept = [number for number in used if self.attempt(self.success_of, number) is not False]
            if not kept:
                raise UserError(
                    f"{self.name}: all {len(used)} demonstrations are marked as failed; leave --success-only out"
                )
            used = kept
        self.choice = choice
        self.episode_ids, self.left_out = tuple(used), tuple(sorted(set(listed).difference(used)))

    def table(self, episode_id: int) -> EpisodeTable:
        """State, action, time and task of one episode, no image; `CorruptEpisode` for rows that cannot be used,
        `UserError` for an episode that is not listed."""
        where = self.where(episode_id)
        with one_episode(where, self.path):
            return self._checked(self._rows(episode_id, self.config.columns, where), where)

    def dimension_names(self, columns: Sequence[str]) -> list[str] | None:
        """The files' name of each dimension of these columns, side by side; None where they have none."""
        return None

    def columns_of(self, episode_id: int) -> Mapping[str, np.ndarray]:
        """The config's columns of one episode as they are in the files; `CorruptEpisode` as `table`."""
        where = self.where(episode_id)
        with one_episode(where, self.path):
            return self._rows(episode_id, self.config.columns, where).columns

    def tables(self, batch_rows: int = 65536) -> Iterator[TableBlock]:
        """The tables of every listed episode once, in blocks of at least `batch_rows` rows (the last may be shorter).

        Memory is bounded by one block and the longest episode. An episode that `table` refuses adds no row; it is in
        `refused`. A reader whose files hold many episodes overrides this to read each file once."""
        return self._blocks(((e, self.attempt(self.table, e)) for e in self.episode_ids), batch_rows)

    def _blocks(self, tables: Iterable[tuple[int, EpisodeTable | Failed]], batch_rows: int) -> Iterator[TableBlock]:
        return as_blocks(tables, batch_rows, self.state_map.native_dim, self.action_map.native_dim)

    def load(
        self, episode_id: int, views: Sequence[str] | None = None, hashes: Mapping[str, str] | None = None
    ) -> Episode:
        """One episode, its views lazily decoded.

        A view's files are read for its hash when it is first asked for, and again only after they changed (path, size
        or time of modification); a view that is not asked for is not opened.

        Args:
            views: names of those wanted, None for all.
            hashes: view name → sha256 of the others; with those, too, the episode's `source_hash` is known.

        Raises:
            CorruptEpisode: what is missing, cut short or not finite.
        """
        where, table = self.where(episode_id), self.table(episode_id)
        digest = hashlib.sha256()
        text = np.frombuffer(table.instruction.encode(), np.uint8)
        for values in (text, table.state, table.action, table.timestamps):
            part = values.tobytes()
            digest.update(f"{len(part)};".encode() + part)
        wanted = self.view_names if views is None else tuple(v for v in self.view_names if v in views)
        with one_episode(where, self.path):
            found = self._find(episode_id, wanted, table, digest.digest(), where)
        known = {**(hashes or {}), **{v.name: v.sha256 for v in found}}
        for name in self.view_names:
            digest.update(f"{name}:{known.get(name)};".encode())
        return Episode(
            self.name,
            episode_id,
            digest.hexdigest() if known.keys() >= set(self.view_names) else "",
            table.instruction,
            self.control_hz,
            len(table.action),
            found,
            table.state,
            table.action,
            table.timestamps,
        )

    def where(self, episode_id: int) -> str:
        """How messages begin that concern this episode; `UserError` when it is not listed."""
        if episode_id not in self._numbers:
            ids = self.episode_ids
            listed = f"{len(ids)}, {ids[0]} to {ids[-1]}" if ids else "none"
            raise UserError(f"{self.name} has no episode {episode_id}; it lists {listed}")
        return f"{self.name} episode {episode_id}"

    def no_usable_episode(self, reasons: Sequence[object], remedy: str) -> UserError:
        """The error where no episode can be used; `reasons`: why each one cannot."""
        present = [note.text.partition(";")[0] for note in self.notes() if note.rule == "partly-present"]
        why = "; ".join(map(str, [*present, *(reasons[:1] or ["it lists no episodes"])]))
        return UserError(f"{self.path} has no usable episode ({why}); {remedy}")

    # --- one episode ---

    def _find(
        self, episode_id: int, names: Sequence[str], table: EpisodeTable, rows: bytes, where: str
    ) -> tuple[View, ...]:
        """The views `names`: those of before while `rows` (a hash of the table) and their files are the same."""
        state = {n: (rows, *map(_stamp, self._files(episode_id, n, where))) for n in names}  # before they are read
        new = [n for n in names if self._found.get((episode_id, n), (None,))[0] != state[n]]
        for view in self._views(episode_id, new, table, where) if new else ():
            if view.length != len(table.action):
                raise CorruptEpisode(
                    f"{where}: {view.length} images of '{view.name}' for {len(table.action)} rows", "row-count"
                )
            if view.name in self.config.bgr_views:
                digest = hashlib.sha256(f"bgr:{view.sha256}".encode()).hexdigest()
                view = dataclasses.replace(view, open=functools.partial(_swapped, view.open), sha256=digest)
            opener = functools.partial(guarded_frames, view.open, view, where, self.path)
            view = dataclasses.replace(view, open=opener)
            self._found[episode_id, view.name] = state[view.name], view
        return tuple(self._found[episode_id, n][1] for n in names)

    def _checked(self, rows: Rows, where: str) -> EpisodeTable:
        """The raw rows of one episode as its table; `CorruptEpisode` for rows that cannot be used."""
        config = self.config
        action = join_columns(rows.columns, config.action_columns, where)
        length = len(action)
        if not length:
            raise CorruptEpisode(f"{where}: it has no rows")
        if config.action_shift:  # the target of a frame is what was measured that much later; the end holds
            action = action[np.minimum(np.arange(length) + config.action_shift, length - 1)]
        state = join_columns(rows.columns, config.state_columns, where) if config.state else np.zeros((length, 0))
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
            raise CorruptEpisode(f"{where}: {length} rows of action, {len(state)} of state", "row-count")
        what = "state"
        try:
            self.state_map.check(state)
            what = "action"
            if config.integrate:
                action = config.integrate.apply(self.state_map.hand_pose(state[0]), action)
            self.action_map.check(action)
        except NotARotation as error:
            raise CorruptEpisode(f"{where}: {what}, {error}", "rotation-norm") from None
        times = np.arange(length) / self.fps if rows.timestamps is None else np.asarray(rows.timestamps, np.float64)
        if len(times) != length:
            raise CorruptEpisode(f"{where}: {length} rows of action, {len(times)} timestamps", "row-count")
        forwards = (np.diff(times, prepend=-np.inf) > 0) & np.isfinite(times)
        if not forwards.all() or times[0] < 0:
            frame = int(forwards.argmin())
            raise CorruptEpisode(f"{where}: timestamps do not increase at frame {frame}", "time-order")
        text = rows.instruction or config.instruction
        if not text.isascii() and re.search("[\ud800-\udfff]", text):
            raise CorruptEpisode(f"{where}: its instruction is not Unicode text: {text}")
        return EpisodeTable(state.astype(np.float32), action.astype(np.float32), times, text, rows.notes, rows.origin)

    def _check_widths(self, widths: Mapping[str, int]) -> None:
        config = self.config
        sides = [(config.action_columns, config.action_width)]
        if config.state:
            sides.append((config.state_columns, self.state_map.native_dim))
        for columns, described in sides:
            for column in columns:
                if column not in widths:
                    raise UserError(
                        f"{self.name}: {unknown('column', column, widths)}; dataset config '{config.name}' asks for it"
                    )
            width = sum(widths[c] for c in columns)
            if width != described:
                raise UserError(
                    f"{self.name}: '{' + '.join(columns)}' has {width} dimensions, dataset config '{config.name}' "
                    f"describes {described}; {self._remedy(columns)}"
                )

    def _remedy(self, columns: Sequence[str]) -> str:
        """What to do about columns of another width than the config describes."""
        return "choose or write another dataset config"


def _stamp(path: Path) -> tuple[str, int, int] | None:
    """What changes when a file does; None for a missing file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return str(path), found.st_size, found.st_mtime_ns


def _swapped(open: Callable[[int, int], Iterator[np.ndarray]], start: int, stop: int) -> Iterator[np.ndarray]:
    """Images with red and blue exchanged."""
    return (np.ascontiguousarray(frame[..., ::-1]) for frame in open(start, stop))


def listing_hash(root: Path, files: Sequence[Path]) -> str:
    """sha256 hex over relative names and sizes: the revision of a dataset without metadata files."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(root).as_posix()}:{path.stat().st_size};".encode())
    return digest.hexdigest()


def look_around(
    look: Callable[[int], Seen | None], ids: Sequence[int], most: int = 9
) -> tuple[list[Seen], list[CorruptEpisode]]:
    """What `look` finds in up to `most` of the episodes `ids`, evenly spread, and why some cannot be read: an odd first
    episode does not speak for a dataset. Others are looked at only while nothing was found."""
    found: list[Seen] = []
    refused: list[CorruptEpisode] = []
    spread = {ids[int(i)] for i in np.linspace(0, len(ids) - 1, min(most, len(ids)))} if ids else set()
    for number in (*sorted(spread), *(n for n in ids if n not in spread)):
        if found and number not in spread:
            break
        try:
            with one_episode(f"episode {number}"):
                seen = look(number)
            found += [] if seen is None else [seen]
        except CorruptEpisode as error:
            refused.append(error)
    return found, refused


def common(sets: Sequence[Iterable[Name]]) -> list[Name]:
    """What at least half of the sets hold, in the order of the first of the largest."""
    counts = Counter(name for names in sorted(map(list, sets), key=len, reverse=True) for name in names)
    return [name for name, count in counts.items() if 2 * count >= len(sets)]


def rare_cameras(sets: Sequence[Iterable[str]]) -> tuple[Note, ...]:
    """What to say about cameras that fewer than half of the episodes looked at have, so that they are no views."""
    counts = Counter(name for names in sets for name in names)
    few = ((name, n) for name, n in sorted(counts.items()) if 2 * n < len(sets))
    text = "camera '{}' is in {} of {} episodes looked at and not used"
    return tuple(Note("camera-rare", text.format(name, n, len(sets))) for name, n in few)


def choose_views(names: Sequence[str], config: DatasetConfig, dataset: str) -> tuple[str, ...]:
    """The cameras to use among `names`: the config's, in its order, or all. `UserError` names the nearest valid one."""
    for wanted in config.views or ():
        if wanted not in names:
            raise UserError(f"{dataset}: {unknown('view', wanted, names)}; see `views` of its dataset config")
    return tuple(names) if config.views is None else config.views
