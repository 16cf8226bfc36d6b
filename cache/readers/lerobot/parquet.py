"""LeRobot's parquet files: the rows of one episode, its images, and all episodes of a file as a stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..episode import CorruptEpisode
from ..images import decode_all, survey
from ..location import unreadable
from ..tables import require_finite

_IMAGE_ROWS = 32  # rows of images read at a time
_READ_BYTES = 1 << 20  # read ahead per column; without it a row group is read at once, and a file may be one row group


@contextmanager
def opened(path: Path, where: str, buffer_size: int = 0) -> Iterator[pq.ParquetFile]:
    """The open file, read by row groups or, with `buffer_size`, that many bytes at a time.

    A damaged file (no footer, cut off, flipped bytes) is a `CorruptEpisode`, now or while it is read.
    """
    try:
        with pq.ParquetFile(path, buffer_size=buffer_size, pre_buffer=not buffer_size) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        raise CorruptEpisode(f"{where}: {unreadable(path, 'parquet', error)}", "unreadable-file") from None


# --- one episode ---


def read_rows(path: Path, episode_id: int, columns: Sequence[str], where: str) -> pa.Table:
    """The rows with `episode_index == episode_id`, in file order, of those `columns` the file has.

    `CorruptEpisode`, beginning with `where`, when the file cannot be read or lacks `episode_index`.
    """
    with opened(path, where) as file:
        names = [c for c in dict.fromkeys([*columns, "episode_index"]) if c in file.schema_arrow.names]
        table = file.read_row_groups(_row_groups(file, episode_id, where), columns=names)
        return table.filter(pc.equal(table["episode_index"], episode_id))


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


def _row_groups(file: pq.ParquetFile, episode_id: int, where: str) -> list[int]:
    """Row groups whose statistics allow the episode; all groups without statistics."""
    paths = [file.schema.column(i).path for i in range(len(file.schema))]
    if "episode_index" not in paths:
        raise CorruptEpisode(f"{where}: column 'episode_index' is missing from the table, or is not a number")
    for path in {p for p in paths if paths.count(p) > 1}:
        raise CorruptEpisode(f"{where}: the table has column '{path}' twice")
    leaf, chosen = paths.index("episode_index"), []
    for group in range(file.num_row_groups):
        stats = file.metadata.row_group(group).column(leaf).statistics
        if stats is None or not stats.has_min_max or stats.min <= episode_id <= stats.max:
            chosen.append(group)
    return chosen


def to_matrix(table: pa.Table, column: str, where: str) -> np.ndarray:
    """A numeric column (scalars or lists, nested or not) as float64 [T, d]. `CorruptEpisode` when it is absent, has a
    null, a non-finite value or rows of different width."""
    if column not in table.column_names:
        raise CorruptEpisode(f"{where}: column '{column}' is missing from the table")
    values = table[column].combine_chunks()
    while pa.types.is_nested(values.type) and not pa.types.is_struct(values.type):
        if values.null_count:
            raise CorruptEpisode(f"{where}: column '{column}' has an empty row")
        if not pa.types.is_fixed_size_list(values.type) and pc.count_distinct(pc.list_value_length(values)).as_py() > 1:
            raise CorruptEpisode(f"{where}: rows of column '{column}' differ in width")
        values = values.flatten()
    if values.null_count:
        raise CorruptEpisode(f"{where}: column '{column}' has an empty value")
    try:
        matrix = values.to_numpy(zero_copy_only=False).astype(np.float64).reshape(table.num_rows, -1)
    except (ValueError, TypeError):
        raise CorruptEpisode(f"{where}: column '{column}' is not numeric ({values.type})") from None
    require_finite(matrix, column, where)
    return matrix


# --- its images ---


@dataclass(frozen=True, slots=True)
class ImageRows:
    """The images of one camera and one episode, as encoded bytes (PNG or JPEG) in the rows of a parquet file."""

    path: Path
    episode_id: int
    column: str
    height: int  # H of the first image; all others must agree
    width: int  # W
    length: int  # rows with an image
    sha256: str  # hex, over the encoded bytes of every image


def find_images(path: Path, episode_id: int, column: str, where: str) -> ImageRows:
    """Check that each of the episode's rows holds image bytes, without decoding more than the first header."""
    count, height, width, sha256 = survey(_encoded(path, episode_id, column, where), None)
    return ImageRows(path, episode_id, column, height, width, count, sha256)


def decode_images(rows: ImageRows, where: str, start: int, stop: int) -> Iterator[np.ndarray]:
    """Yield uint8 [H, W, 3] RGB of frames start..stop-1; `CorruptEpisode` where an image cannot be decoded."""
    encoded = _encoded(rows.path, rows.episode_id, rows.column, where)
    return decode_all(islice(encoded, start, stop), (rows.height, rows.width), None)


def _encoded(path: Path, episode_id: int, column: str, where: str) -> Iterator[tuple[str, bytes]]:
    index = 0
    with opened(path, where) as file:
        if column not in file.schema_arrow.names:
            raise CorruptEpisode(f"{where}: column '{column}' is missing from {path.name}")
        groups = _row_groups(file, episode_id, where)
        for batch in file.iter_batches(_IMAGE_ROWS, row_groups=groups, columns=[column, "episode_index"]):
            batch = batch.filter(pc.equal(batch.column("episode_index"), episode_id))
            values = batch.column(column)
            for value in values.field("bytes") if pa.types.is_struct(values.type) else values:
                if not value.is_valid:
                    raise CorruptEpisode(f"{where}: a row of '{column}' holds no image bytes")
                yield f"{where}: image {index} of '{column}'", value.as_py()
                index += 1


# --- all episodes of a file ---


def stream_rows(path: Path, columns: Sequence[str], batch_rows: int, where: str) -> Iterator[tuple[int, pa.Table]]:
    """Yield (episode, its T rows in file order) once per episode of the file, when the last of its rows was read.

    Of `columns` those the file has. Memory is bounded by one batch and the longest episode where an episode's rows are
    contiguous, as lerobot writes them. `CorruptEpisode`, beginning with `where`, when the file cannot be read from here
    on; the episodes yielded before are sound.
    """
    with opened(path, where, buffer_size=_READ_BYTES) as file:
        schema = file.schema_arrow
        names = [c for c in dict.fromkeys([*columns, "episode_index"]) if c in schema.names]
        if "episode_index" not in names or not pa.types.is_integer(schema.field("episode_index").type):
            raise CorruptEpisode(f"{where}: {path.name} has no integers in 'episode_index'")
        missing = _rows_per_episode(file, batch_rows)  # rows still to come
        pieces: dict[int, list[pa.RecordBatch]] = {}
        for batch in file.iter_batches(batch_rows, columns=names):
            for episode_id, piece in _runs(batch):
                pieces.setdefault(episode_id, []).append(piece)
                missing[episode_id] -= piece.num_rows
                if not missing[episode_id]:
                    yield episode_id, pa.Table.from_batches(pieces.pop(episode_id))


def _rows_per_episode(file: pq.ParquetFile, batch_rows: int) -> Counter[int]:
    counts: Counter[int] = Counter()
    for batch in file.iter_batches(batch_rows, columns=["episode_index"]):
        for episode_id, piece in _runs(batch):
            counts[episode_id] += piece.num_rows
    return counts


def _runs(batch: pa.RecordBatch) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The stretches of a batch that belong to one episode; rows without an `episode_index` belong to none."""
    if batch.column("episode_index").null_count:
        batch = batch.filter(pc.is_valid(batch.column("episode_index")))
    ids = batch.column("episode_index").to_numpy()
    starts = [0, *(np.flatnonzero(np.diff(ids)) + 1).tolist(), len(ids)]
    for start, stop in zip(starts[:-1], starts[1:]):
        if stop > start:
            yield int(ids[start]), batch.slice(start, stop - start)
