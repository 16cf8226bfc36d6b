"""LeRobot's parquet files: the rows of one episode, its images, and all episodes of a file as a stream."""

from __future__ import annotations

import contextlib
import functools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..episode import CorruptEpisode
from ..location import regular, unreadable
from ..tables import require_finite

_IMAGE_ROWS = 32  # rows of images read at a time
_MOST_ROWS = 1 << 24  # of a row group; writers end one at a million
_MOST_BYTES = 1 << 29  # of a row group, unpacked, unless the file has a hundredth of that
_MOST_SEEN = 4096
_MOST_TEXT = 1 << 28  # bytes of the texts of a table
_SEEN: dict[tuple[Path, int, int], list[str]] = {}  # files whose claims were looked at → their columns of texts
_READ_BYTES = 1 << 20  # read ahead per column; without it a row group is read at once, and a file may be one row group


DAMAGE = (OSError, ValueError, KeyError, pa.ArrowException)  # what pyarrow raises for damaged files


@contextmanager
def opened(path: Path, where: str, buffer_size: int = 0, texts: bool = False) -> Iterator[pq.ParquetFile]:
    """The open file, read by row groups or, with `buffer_size`, that many bytes at a time; `texts` as `open_file`.

    A damaged file (no footer, cut off, flipped bytes) is a `CorruptEpisode`, now or while it is read.
    """
    try:
        with open_file(path, texts, buffer_size=buffer_size, pre_buffer=not buffer_size) as file:
            yield file
    except (OSError, ValueError, pa.ArrowException) as error:
        raise CorruptEpisode(f"{where}: {unreadable(path, 'parquet', error)}", "unreadable-file") from None


def open_file(path: Path, texts: bool = False, **options: Any) -> pq.ParquetFile:
    """An open file; one of `DAMAGE` for what is none, and for one that claims more than it can hold.

    `texts`: read as dictionaries, for `plain_texts` to look at: a text may be repeated in a million rows.
    """
    found = os.stat(regular(path))
    version = path, found.st_size, found.st_mtime_ns
    names = _SEEN.get(version)
    if names is None or not (texts and names):
        file = pq.ParquetFile(path, **options)
        if names is None:
            names = _texts_of(file)
            if len(_SEEN) >= _MOST_SEEN:
                _SEEN.clear()
            _SEEN[version] = names
        if not (texts and names):
            return file
        file.close()
    return pq.ParquetFile(path, read_dictionary=names, **options)


def _texts_of(file: pq.ParquetFile) -> list[str]:
    """Columns of texts and bytes, not in lists, of a file whose claims are possible; else closes it: `ValueError`."""
    try:
        _require_possible(file.metadata)
        columns = [file.schema.column(i) for i in range(len(file.schema))]
    except Exception:
        file.close()
        raise
    flat = [c for c in columns if not c.max_repetition_level and c.path in file.schema_arrow.names]
    names = [c.path for c in flat if c.physical_type == "BYTE_ARRAY" and c.logical_type.type != "DECIMAL"]
    return names if len(set(names)) == len(names) else []


def require_texts(table: pa.Table | pa.RecordBatch) -> None:
    """`ValueError` for a table whose texts, read as dictionaries, are too long."""
    nbytes = sum(_text_nbytes(c) for column in table.columns for c in getattr(column, "chunks", [column]))
    if nbytes > _MOST_TEXT:
        raise ValueError(f"its texts have {nbytes:,} bytes, at most {_MOST_TEXT:,} are read")


def plain_texts(table: Any) -> Any:
    """The table or batch with its dictionaries resolved; `ValueError` as `require_texts`."""
    if any(pa.types.is_dictionary(kind) for kind in table.schema.types):
        require_texts(table)
        for at, (name, kind) in enumerate(zip(table.schema.names, table.schema.types)):
            if pa.types.is_dictionary(kind):
                table = table.set_column(at, name, table.column(at).cast(kind.value_type))
    return table


def _text_nbytes(values: pa.Array) -> int:
    if not pa.types.is_dictionary(values.type):
        return 0
    return pc.sum(pc.binary_length(values.dictionary).take(values.indices)).as_py() or 0


def _require_possible(metadata: pq.FileMetaData) -> None:
    """`ValueError` for a row group that unpacks to more than any writer puts into one."""
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        columns = map(group.column, range(group.num_columns if group.total_byte_size > _MOST_BYTES else 0))
        packed = sum(column.total_compressed_size for column in columns)
        if group.num_rows > _MOST_ROWS or group.total_byte_size > max(_MOST_BYTES, 100 * packed):
            raise ValueError(f"a row group claims {group.num_rows:,} rows of {group.total_byte_size:,} bytes")


# --- one episode ---


@dataclass(frozen=True, slots=True)
class RowsAt:
    """Where the rows of one episode are: those with its `episode_index`, else those at `positions`."""

    path: Path
    episode_id: int
    positions: tuple[int, ...] | None = None  # of rows of the file, in the order of the frames

    def row_groups(self, file: pq.ParquetFile, where: str) -> list[int]:
        """Row groups that can hold the rows."""
        if self.positions is None:
            return _row_groups(file, self.path, self.episode_id, where)
        return np.unique(np.searchsorted(_group_starts(file), self.positions, "right") - 1).tolist()

    def order(self, file: pq.ParquetFile, groups: Sequence[int]) -> np.ndarray:
        """Where the rows at `positions` are in a table of these row groups."""
        rows = [np.arange(s, e) for s, e in zip(_group_starts(file), _group_starts(file)[1:])]
        return np.searchsorted(np.concatenate([rows[g] for g in groups]), self.positions or ())

    def reordered(self, order: np.ndarray, where: str) -> RowsAt:
        """The same rows with the one at `order[0]` first."""
        positions = self.positions or np.flatnonzero(read_places(self.path, where)[0] == self.episode_id)
        return RowsAt(self.path, self.episode_id, tuple(np.asarray(positions)[order].tolist()))


def read_rows(at: RowsAt, columns: Sequence[str], where: str) -> tuple[pa.Table, int]:
    """The rows, in file order or that of the positions, of those `columns` the file has; and the position of the first.

    `CorruptEpisode`, beginning with `where`, when the file cannot be read or lacks `episode_index`.
    """
    with opened(at.path, where, texts=True) as file:
        names = [c for c in dict.fromkeys([*columns, "episode_index"]) if c in file.schema_arrow.names]
        groups = at.row_groups(file, where)
        table = plain_texts(file.read_row_groups(groups, columns=names))
        if at.positions is not None:
            return table.take(at.order(file, groups)), at.positions[0]
        chosen = _numbers(table["episode_index"], where) == at.episode_id
        first = int(chosen.argmax()) if len(chosen) else 0
        starts, sizes = _group_starts(file), np.diff(_group_starts(file))[groups]
        ends = np.cumsum(sizes)
        group = min(int(np.searchsorted(ends, first, "right")), len(groups) - 1)
        offset = int(starts[groups[group]] - (ends[group] - sizes[group])) if groups else 0
        return table.filter(pa.array(chosen)), first + offset


def read_places(path: Path, where: str) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """`episode_index`, `frame_index` and `index` [rows] int64 of all rows, -1 where one has none; None for one of the
    latter two columns that the file lacks."""
    with opened(path, where) as file:
        wanted = ("episode_index", "frame_index", "index")
        table = file.read(columns=[c for c in wanted if c in file.schema_arrow.names])
        found: dict[str, np.ndarray | None] = dict.fromkeys(wanted)
        for name in table.column_names:
            with contextlib.suppress(CorruptEpisode):
                found[name] = _numbers(table[name], where, name)
        episodes = found["episode_index"]
        none = np.full(file.metadata.num_rows, -1)
        return none if episodes is None else episodes, found["frame_index"], found["index"]


def _numbers(column: pa.Array | pa.ChunkedArray, where: str, name: str = "episode_index") -> np.ndarray:
    """Whole numbers [T] int64 of a column of integers, floats, or lists of one of these; -1 where there is none."""
    if pa.types.is_integer(column.type) and not column.null_count:
        return column.to_numpy().astype(np.int64, copy=False)
    values = plain_values(column)
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type) or pa.types.is_fixed_size_list(values.type):
        if values.null_count or len(values.flatten()) != len(values):
            raise CorruptEpisode(f"{where}: '{name}' has rows without a number, or with several")
        values = plain_values(values.flatten())
    if not _is_number(values.type):
        raise CorruptEpisode(f"{where}: '{name}' is not a number ({values.type})")
    numbers = pc.fill_null(pc.cast(values, pa.float64()), -1.0).to_numpy(zero_copy_only=False)
    return np.where(numbers == np.floor(numbers), numbers, -1).astype(np.int64)


def _group_starts(file: pq.ParquetFile) -> np.ndarray:
    """Position of the first row of each row group, and the number of all rows."""
    sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


class NoEpisodeIndex(CorruptEpisode):
    """A file without the column by which its rows are found."""


def _require_episodes(schema: pa.Schema, where: str) -> None:
    if "episode_index" not in schema.names:
        raise NoEpisodeIndex(f"{where}: column 'episode_index' is missing from the table")


def read_marks(path: Path, column: str, where: str) -> dict[int, bool]:
    """Episode → whether any of its rows is set in a column of flags; without the episodes that have none.

    `CorruptEpisode` as `read_rows`.
    """
    with opened(path, where) as file:
        if column not in file.schema_arrow.names or "episode_index" not in file.schema_arrow.names:
            return {}
        table = file.read(columns=["episode_index", column])
    values = table[column].combine_chunks()
    while pa.types.is_nested(values.type) and not pa.types.is_struct(values.type):
        values = values.flatten()
    if len(values) != table.num_rows or not (pa.types.is_boolean(values.type) or pa.types.is_primitive(values.type)):
        return {}
    marks: dict[int, bool] = {}
    for number, mark in zip(table["episode_index"].to_pylist(), values.to_pylist()):
        if number is not None and mark is not None:
            marks[number] = marks.get(number, False) or mark > 0
    return marks


def _row_groups(file: pq.ParquetFile, path: Path, episode_id: int, where: str) -> list[int]:
    """Row groups that hold the episode, by the values themselves: pyarrow ends the process over damaged statistics."""
    _require_episodes(file.schema_arrow, where)
    leaves = [file.schema.column(i).path for i in range(len(file.schema))]
    for leaf in {name for name in leaves if leaves.count(name) > 1}:
        raise CorruptEpisode(f"{where}: the table has column '{leaf}' twice")
    if file.num_row_groups == 1:
        return [0]
    stat = path.stat()
    first, last = _episode_spans(path, stat.st_size, stat.st_mtime_ns)
    return np.flatnonzero((first <= episode_id) & (episode_id <= last)).tolist()


@functools.lru_cache(256)
def _episode_spans(path: Path, size: int, modified: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last episode of each row group of a file; an empty span where they cannot be read."""
    spans = []
    with opened(path, path.name) as file:
        for group in range(file.num_row_groups):
            try:
                found = _numbers(file.read_row_group(group, columns=["episode_index"])["episode_index"], path.name)
                found = found[found >= 0]
                spans.append((int(found.min()), int(found.max())) if len(found) else (1, 0))
            except (OSError, pa.ArrowException):
                spans.append((1, 0))
    first, last = np.array(spans).reshape(-1, 2).T
    return first, last


def to_matrix(table: pa.Table, column: str, where: str) -> np.ndarray:
    """A numeric column (scalars or lists, nested or not) as float64 [T, d]. `CorruptEpisode` when it is absent, has a
    null, a non-finite value or rows of different width."""
    if column not in table.column_names:
        raise CorruptEpisode(f"{where}: column '{column}' is missing from the table")
    values, rows = plain_values(table[column]), table.num_rows

    def require_no_null() -> None:
        if values.null_count:
            row = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0]) * rows // len(values)
            raise CorruptEpisode(f"{where}: column '{column}' is empty at frame {row}")

    while pa.types.is_nested(values.type) and not pa.types.is_struct(values.type):
        require_no_null()
        if not pa.types.is_fixed_size_list(values.type) and pc.count_distinct(pc.list_value_length(values)).as_py() > 1:
            raise CorruptEpisode(f"{where}: rows of column '{column}' differ in width")
        values = plain_values(values.flatten())
    require_no_null()
    if not _is_number(values.type):
        raise CorruptEpisode(f"{where}: column '{column}' is not numeric ({values.type})")
    if pa.types.is_decimal(values.type):
        values = pc.cast(values, pa.float64())
    flat = values.to_numpy(zero_copy_only=False).astype(np.float64)
    matrix = flat.reshape(rows, len(flat) // max(rows, 1))
    require_finite(matrix, column, where)
    return matrix


def plain_values(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """One array of the values themselves: chunks joined, extension types and dictionaries resolved."""
    values = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    return values.dictionary_decode() if pa.types.is_dictionary(values.type) else values


def _is_number(kind: pa.DataType) -> bool:
    """A text of digits is none: it would be parsed."""
    t = pa.types
    return t.is_integer(kind) or t.is_floating(kind) or t.is_boolean(kind) or t.is_decimal(kind)


def column_batches(at: RowsAt, column: str, where: str) -> Iterator[pa.Array]:
    """The values of one column in the rows, some rows at a time; `CorruptEpisode` where the file cannot be read."""
    with opened(at.path, where) as file:
        if column not in file.schema_arrow.names:
            raise CorruptEpisode(f"{where}: column '{column}' is missing from {at.path.name}")
        yield from _batches(file, at, column, where)


def first_value(path: Path, column: str, where: str) -> pa.Array:
    """The value of one column in the first row of a file, [1]."""
    with opened(path, where, buffer_size=_READ_BYTES) as file:
        if column not in file.schema_arrow.names or not file.metadata.num_rows:
            raise CorruptEpisode(f"{where}: column '{column}' is missing from {path.name}")
        return next(file.iter_batches(1, columns=[column])).column(0)


def _batches(file: pq.ParquetFile, at: RowsAt, column: str, where: str) -> Iterator[pa.Array]:
    groups = at.row_groups(file, where)
    if at.positions is not None:  # any order: all of them at once
        values = file.read_row_groups(groups, columns=[column])[column].take(at.order(file, groups))
        yield from values.chunks
        return
    for batch in file.iter_batches(_IMAGE_ROWS, row_groups=groups, columns=[column, "episode_index"]):
        chosen, values = _numbers(batch.column("episode_index"), where) == at.episode_id, batch.column(column)
        if chosen.any():  # filtering copies the images
            yield values if chosen.all() else values.filter(pa.array(chosen))


# --- all episodes of a file ---


def stream_rows(path: Path, columns: Sequence[str], batch_rows: int, where: str) -> Iterator[tuple[int, int, pa.Table]]:
    """Yield (episode, position of its first row in the file, its T rows in file order) once per episode of the file,
    when the last of its rows was read.

    Of `columns` those the file has. Memory is bounded by one batch and the longest episode where an episode's rows are
    contiguous, as lerobot writes them. `CorruptEpisode`, beginning with `where`, when the file cannot be read from here
    on; the episodes yielded before are sound.
    """
    with opened(path, where, buffer_size=_READ_BYTES, texts=True) as file:
        _require_episodes(file.schema_arrow, where)
        names = [c for c in dict.fromkeys([*columns, "episode_index"]) if c in file.schema_arrow.names]
        missing = _rows_per_episode(file, batch_rows, where)  # rows still to come
        pieces: dict[int, list[pa.RecordBatch]] = {}
        firsts: dict[int, int] = {}
        done = 0
        for batch in file.iter_batches(batch_rows, columns=names):
            for episode_id, start, piece in _runs(plain_texts(batch), where):
                firsts.setdefault(episode_id, done + start)
                pieces.setdefault(episode_id, []).append(piece)
                missing[episode_id] -= piece.num_rows
                if not missing[episode_id]:
                    yield episode_id, firsts[episode_id], pa.Table.from_batches(pieces.pop(episode_id))
            done += batch.num_rows


def _rows_per_episode(file: pq.ParquetFile, batch_rows: int, where: str) -> Counter[int]:
    counts: Counter[int] = Counter()
    for batch in file.iter_batches(batch_rows, columns=["episode_index"]):
        for episode_id, _, piece in _runs(batch, where):
            counts[episode_id] += piece.num_rows
    return counts


def _runs(batch: pa.RecordBatch, where: str) -> Iterator[tuple[int, int, pa.RecordBatch]]:
    """The stretches of a batch that belong to one episode: (episode, where in the batch, rows). Rows without an
    `episode_index` belong to none."""
    ids = _numbers(batch.column("episode_index"), where)
    starts = [0, *(np.flatnonzero(np.diff(ids)) + 1).tolist(), len(ids)]
    for start, stop in zip(starts[:-1], starts[1:]):
        if stop > start and ids[start] >= 0:
            yield int(ids[start]), start, batch.slice(start, stop - start)
