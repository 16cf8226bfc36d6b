"""Tables of episodes: the raw rows of a format, checked rows in native units, and many episodes in blocks.

Letters: T rows of an episode, n of a block, ds/da native state and action width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import Failed, Note
from .episode import CorruptEpisode

LARGEST = 1e30  # of a number: float32 holds it times any scale and rate that make it a slot's unit


@dataclass(frozen=True)
class Rows:
    """The raw table of one episode, as the format has it."""

    columns: dict[str, np.ndarray]  # each column asked for, [T] or [T, d], any numeric dtype
    instruction: str  # task text; "" where there is none
    timestamps: np.ndarray | None = None  # [T] seconds; None: row / control_hz
    notes: tuple[Note, ...] = ()
    origin: object = None  # what the reader wants to know of these rows when it looks for their images


@dataclass(frozen=True)
class EpisodeTable:
    """The rows of one episode, in native units, without images."""

    state: np.ndarray  # [T, ds] float32; ds = 0 where the config has no state
    action: np.ndarray  # [T, da] float32
    timestamps: np.ndarray  # [T] float64 seconds since the episode's start
    instruction: str  # may be empty
    notes: tuple[Note, ...] = ()  # what was settled to read it
    origin: object = None  # its reader's own


def join_columns(columns: Mapping[str, np.ndarray], names: Sequence[str], where: str) -> np.ndarray:
    """The named columns side by side, float64 [T, d]; `CorruptEpisode` for one that is missing or cannot be used."""
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
        require_finite(values, name, where)
        parts.append(values)
    lengths = {n: len(p) for n, p in zip(names, parts)}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{n} {k}" for n, k in lengths.items())
        raise CorruptEpisode(f"{where}: columns differ in length ({shown})", "row-count")
    return np.concatenate(parts, axis=1)


def require_finite(values: np.ndarray, column: str, where: str) -> None:
    """`CorruptEpisode` for a value of a column [T, d] that is not finite, or beyond float32 in its own or a slot's
    unit."""
    good = np.abs(values) <= LARGEST  # False for NaN too
    if not good.all():
        row, dim = np.argwhere(~good)[0]
        value = values[row, dim]
        raise CorruptEpisode(f"{where}: column '{column}' is {value} at frame {row}, dimension {dim}", "not-finite")


@dataclass(frozen=True)
class TableBlock:
    """The tables of several episodes, one after another, in native units."""

    episode_ids: np.ndarray  # [n] int64, the episode of each row
    state: np.ndarray  # [n, ds] float32
    action: np.ndarray  # [n, da] float32
    refused: tuple[Failed, ...]  # episodes met meanwhile that cannot be used


def as_blocks(
    tables: Iterable[tuple[int, EpisodeTable | Failed]], batch_rows: int, state_width: int, action_width: int
) -> Iterator[TableBlock]:
    """Tables gathered into blocks of at least `batch_rows` rows; the last may be shorter, or hold only refused ones."""
    nothing = np.zeros((0, state_width), np.float32), np.zeros((0, action_width), np.float32)

    def gathered() -> TableBlock:
        ids = np.repeat(np.array([e for e, _ in parts], np.int64), [len(t.action) for _, t in parts])
        states, actions = [nothing[0]], [nothing[1]]
        states += [t.state for _, t in parts]
        actions += [t.action for _, t in parts]
        return TableBlock(ids, np.concatenate(states), np.concatenate(actions), tuple(refused))

    parts: list[tuple[int, EpisodeTable]] = []
    refused: list[Failed] = []
    rows = 0
    for episode_id, table in tables:
        if isinstance(table, Failed):
            refused.append(table)
            continue
        parts.append((episode_id, table))
        rows += len(table.action)
        if rows >= batch_rows:
            yield gathered()
            parts, refused, rows = [], [], 0
    if parts or refused:
        yield gathered()
