"""In which data file, and where in it, the rows of an episode are.

`episode_index`, `index`, the listed file, the listed rows and length are compared. Where the file that is listed for
an episode does not hold it, the files beside it are searched, each at most once. Letters: n rows of a file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ....errors import Note
from ..episode import CorruptEpisode
from .listing import EpisodeEntry
from .metadata import Metadata
from .parquet import NoEpisodeIndex, RowsAt, read_places, read_rows

_KEPT = 3  # files whose contents are kept besides the one in use


@dataclass(frozen=True)
class FoundRows:
    """The rows of one episode, in file order."""

    table: pa.Table
    at: RowsAt
    name: str  # of the file, relative to the dataset
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True)
class _Contents:
    """What the rows of a file say about their place."""

    episodes: np.ndarray  # [n] int64
    frames: np.ndarray | None  # [n] int64; None where the file has no frame_index
    index: np.ndarray | None  # [n] int64, likewise

    def episode_at(self, start: int, length: int) -> int | None:
        """Number of the one episode that rows [start, start + length) are from its first to its last; else None."""
        episodes = self.episodes[start : start + length]
        if start < 0 or not length or len(episodes) < length or (episodes != episodes[0]).any():
            return None
        if self.frames is not None:
            follows = self.frames[start + length : start + length + 1]
            is_whole = np.array_equal(self.frames[start : start + length], np.arange(length)) and not follows.any()
        else:
            edges = self.episodes[max(start - 1, 0) : start], self.episodes[start + length : start + length + 1]
            is_whole = not any((e == episodes[0]).any() for e in edges)
        return int(episodes[0]) if is_whole else None

    def index_at(self, row: int) -> int | None:
        """`index` of a row."""
        return None if self.index is None else int(self.index[row])


class DataFiles:
    """The data files of one dataset."""

    def __init__(self, meta: Metadata) -> None:
        self._meta = meta
        self._listed: defaultdict[str, set[int]] = defaultdict(set)  # file → episodes listed in it
        for number, entry in meta.episodes.items():
            self._listed[entry.data_path].add(number)
        spans = {name: [meta.episodes[e].rows for e in found] for name, found in self._listed.items()}
        self._first_row = {name: min((s[0] for s in found if s), default=0) for name, found in spans.items()}
        self._moved: dict[int, str] = {}  # episode → the file it was found in
        self._seen: dict[str, _Contents] = {}  # the files looked into last
        self._holds: dict[str, frozenset[int]] = {}  # file → the episodes in it, once it was searched

    def path_of(self, episode_id: int) -> str:
        """The file with the episode's rows, as far as is known."""
        return self._moved.get(episode_id, self._meta.episodes[episode_id].data_path)

    def judge(self, episode_id: int, table: pa.Table, first: int, where: str) -> tuple[Note, ...] | None:
        """Notes on rows found by `episode_index` in the listed file, `first` of them at that place in it; None when the
        listed place has to decide. `CorruptEpisode` when each of two places has as much for it as the other."""
        entry = self._meta.episodes[episode_id]
        if table.num_rows != entry.length or not entry.length:
            return None
        if entry.rows is None or first == self._place(entry):
            return ()
        contents = self._contents(entry.data_path, where)
        index = contents.index_at(first)
        if index == entry.rows[0]:
            return ()
        other = contents.episode_at(self._place(entry), entry.length)
        text = f"rows of episode_index {episode_id} begin at row {first} of {entry.data_path}"
        text += f", meta/ lists {entry.rows[0]}" + ("" if index is None else f", their index is {index}")
        if other not in (None, episode_id):
            if not self._listed[entry.data_path] <= set(np.unique(contents.episodes).tolist()):
                return None  # the file's numbers are not this dataset's
            if contents.index_at(self._place(entry)) == entry.rows[0]:
                raise CorruptEpisode(f"{where}: {text}; there, episode_index is {other}")
        return (Note("row-index", text),)

    def find(self, episode_id: int, columns: Sequence[str], where: str) -> FoundRows:
        """The rows of one episode, of those `columns` its file has. `CorruptEpisode`, beginning with `where`, when no
        file holds them."""
        entry = self._meta.episodes[episode_id]
        if episode_id in self._moved:
            return self._elsewhere(entry, episode_id, self._moved[episode_id], columns, where)
        name, count = entry.data_path, 0
        try:
            at = RowsAt(self._meta.locate(name, where), episode_id)
            table, first = read_rows(at, columns, where)
            count, problem = table.num_rows, None
        except CorruptEpisode as error:
            problem = error
        if problem is None:
            notes = self.judge(episode_id, table, first, where)
            if notes is not None:
                return FoundRows(table, at, name, notes)
        is_readable = problem is None or isinstance(problem, NoEpisodeIndex)
        if is_readable and (placed := self._by_place(entry, at, count, columns, where)):
            return placed
        for other in () if count else self._search(episode_id, where):
            try:
                return self._elsewhere(entry, episode_id, other, columns, where)
            except CorruptEpisode as error:
                problem = error
        if problem:
            raise problem
        return FoundRows(table, at, name)

    def _elsewhere(
        self, entry: EpisodeEntry, episode_id: int, name: str, columns: Sequence[str], where: str
    ) -> FoundRows:
        """The rows with its `episode_index` in a file it is not listed in; their `index` must be that listed."""
        at = RowsAt(self._meta.locate(name, where), episode_id)
        table, first = read_rows(at, columns, where)
        index = None if episode_id in self._moved else self._contents(name, where).index_at(first)
        text = f"its rows are in {name}, meta/ lists {entry.data_path}"
        if entry.rows and index not in (None, entry.rows[0]):
            text = f"{entry.data_path} does not hold its rows; those in {name} have index {index}"
            raise CorruptEpisode(f"{where}: {text}, meta/ lists {entry.rows[0]}", "row-count")
        self._moved[episode_id] = name
        return FoundRows(table, at, name, (Note("file-index", text),))

    def _place(self, entry: EpisodeEntry) -> int:
        """Row of the listed file at which an episode is listed to begin: episodes follow each other."""
        return entry.rows[0] - self._first_row[entry.data_path] if entry.rows else 0

    def _by_place(
        self, entry: EpisodeEntry, at: RowsAt, count: int, columns: Sequence[str], where: str
    ) -> FoundRows | None:
        """The rows at the listed place, where they are one whole episode of the listed length; `count`: how many have
        its `episode_index`."""
        episode_id, name, length = at.episode_id, entry.data_path, entry.length or 0
        contents = self._contents(name, where)
        start = self._place(entry)
        number = contents.episode_at(start, length)
        if number is None or (entry.rows is None and len(contents.episodes) != length):
            return None
        if number != episode_id and count and self._listed[name] <= set(np.unique(contents.episodes).tolist()):
            return None
        at = RowsAt(at.path, episode_id, tuple(range(start, start + length)))
        text = f"{count} rows of {name} have its episode_index, meta/ lists {length}; the rows at its place were taken"
        text += f", with episode_index {number}" if number >= 0 else ""
        return FoundRows(read_rows(at, columns, where)[0], at, name, (Note("row-index", text),))

    def _search(self, episode_id: int, where: str) -> Iterator[str]:
        """Other files with rows of this episode, the nearest by name first."""
        if self._meta.version != "v3.0":
            return
        listed = self._meta.episodes[episode_id].data_path
        names = sorted({*self._listed, *self._meta.data_files()})
        middle = names.index(listed)
        for name in sorted(names, key=lambda n: abs(names.index(n) - middle)):
            if name != listed and episode_id in self._episodes_in(name, where):
                yield name

    def _episodes_in(self, name: str, where: str) -> frozenset[int]:
        if name not in self._holds:
            try:
                self._holds[name] = frozenset(np.unique(self._contents(name, where).episodes).tolist())
            except CorruptEpisode:
                self._holds[name] = frozenset()
        return self._holds[name]

    def _contents(self, name: str, where: str) -> _Contents:
        found = self._seen.get(name)
        if found is None:
            found = _Contents(*read_places(self._meta.locate(name, where), where))
            self._seen = {**dict(list(self._seen.items())[-_KEPT:]), name: found}
        return found
