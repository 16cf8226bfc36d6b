"""The tables of a whole dataset as a stream of blocks: what statistics and checks over every row read.

Letters: n rows of a block, ds/da native state and action width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..episode import CorruptEpisode

if TYPE_CHECKING:
    from .base import EpisodeTable


@dataclass(frozen=True)
class TableBlock:
    """The tables of several whole episodes, one after another, in native units."""

    episode_ids: np.ndarray     # [n] int64, the episode of each row
    state: np.ndarray           # [n, ds] float32
    action: np.ndarray          # [n, da] float32
    refused: tuple[tuple[int, str], ...]    # (episode, reason) of those met meanwhile that cannot be used


def attempt(table: Callable[..., EpisodeTable], *args: object) -> EpisodeTable | CorruptEpisode:
    """`table(*args)`, or why there is none."""
    try:
        return table(*args)
    except CorruptEpisode as error:
        return error


def as_blocks(tables: Iterable[tuple[int, EpisodeTable | CorruptEpisode]], batch_rows: int, state_width: int,
              action_width: int) -> Iterator[TableBlock]:
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
