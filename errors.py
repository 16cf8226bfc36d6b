"""What a user may meet: the one exception, and a part of a dataset that cannot be used, as a value."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

LONGEST = 1000  # characters of a message
_LONG_WORD = re.compile(r"(\S{120})\S{120,}(\S{60})")
SHOWN_NAMES = 120  # characters of a list of allowed names in a message
# What is wrong, in one word; `dvla data check` names its findings after it.
Kind = Literal[
    "missing-file",
    "unreadable-file",
    "not-finite",
    "rotation-norm",
    "time-order",
    "row-count",
    "unusable-episode",
    "unexpected-error",  # rather a fault of the reader than of the file
]


class UserError(Exception):
    """Bad input. The message is one line: what was given, what is allowed, what to do. The CLI exits with 2."""

    def __init__(self, message: str = "") -> None:
        line = " ".join(message.splitlines())  # it may quote a file, whose name may hold anything
        line = _LONG_WORD.sub(r"\1…\2", line)
        super().__init__(line if len(line) <= LONGEST else f"{line[:LONGEST]}…")


@dataclass(frozen=True, slots=True)
class Note:
    """What a reader settled about an episode or a dataset that it can read: a finding of `dvla data check`, never a
    refusal."""

    rule: str  # id of the finding, e.g. "task-differs"
    text: str  # one line: which witnesses disagree, with both values, and which one was used


def unknown(kind: str, given: str, allowed: Iterable[str]) -> UserError:
    """`UserError` for a name that is not in `allowed`, naming the nearest valid one.

    >>> str(unknown("setting", "leraning_rate", ["learning_rate", "seed"]))
    "unknown setting 'leraning_rate'; did you mean 'learning_rate'? (allowed: learning_rate, seed)"
    """
    names = sorted(str(a) for a in allowed)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.4)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    fit = [name for name, used in zip(names, accumulate(len(name) + 2 for name in names)) if used <= SHOWN_NAMES]
    fit = fit or names[:1]
    shown = ", ".join(fit) + (f", … {len(names) - len(fit)} more" if len(fit) < len(names) else "")
    return UserError(f"unknown {kind} '{given}'{hint} (allowed: {shown})")


@dataclass(frozen=True)
class Failed:
    """An episode, or the rest of it, that cannot be read: a value that takes its place from the reader to the ledger.

    `str` gives the line for the ledger.
    """

    episode: int
    where: str  # dataset and episode, as every message about it begins
    kind: Kind
    reason: str  # one line: what is wrong, in which file or at which frame
    rows: int = 0  # observations of a stream that it takes the place of; 0 when it was refused before any was read

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"
