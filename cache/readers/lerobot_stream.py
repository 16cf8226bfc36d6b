"""The rows of every episode of one LeRobot parquet file in a single pass: a v3.0 file holds many episodes.

Letters: T rows of an episode.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..episode import CorruptEpisode
from .lerobot_tables import opened

_READ_BYTES = 1 << 20   # read ahead per column; without it a row group is read whole, and a file may be one row group


def stream_rows(path: Path, columns: Sequence[str], batch_rows: int, where: str) -> Iterator[tuple[int, pa.Table]]:
    """Yield (episode, its T rows in file order) once per episode of the file, when the last of its rows was read.

    Of `columns` those the file has. Memory is bounded by one batch and the longest episode where the rows of an
    episode lie together, as lerobot writes them. `CorruptEpisode`, beginning with `where`, when the file cannot be read
    from here on; the episodes yielded before are sound.
    """
    with opened(path, where, buffer_size=_READ_BYTES) as file:
        schema = file.schema_arrow
        names = [c for c in dict.fromkeys([*columns, "episode_index"]) if c in schema.names]
        if "episode_index" not in names or not pa.types.is_integer(schema.field("episode_index").type):
            raise CorruptEpisode(f"{where}: {path.name} has no whole numbers in 'episode_index'")
        missing = _rows_per_episode(file, batch_rows)   # rows still to come
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
