"""A part of a dataset that cannot be used, as a value: it takes the data's place from the reader to the ledger."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# What is wrong, in one word; `dvla data check` names its findings after it.
Kind = Literal[
    "missing-file", "unreadable-file", "not-finite", "rotation-norm", "time-order", "row-count", "unusable-episode"
]


@dataclass(frozen=True)
class Failed:
    """An episode, or the rest of it, that cannot be read. `str` gives the line for the ledger."""

    episode: int
    where: str  # dataset and episode, as every message about it begins
    kind: Kind
    reason: str  # one line: what is wrong, in which file or at which frame
    rows: int = 0  # observations of a stream that it takes the place of; 0 when it was refused before any was read

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"
