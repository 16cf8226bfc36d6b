"""The one exception a user may meet, and the helper that names the nearest valid choice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from itertools import accumulate

SHOWN_NAMES = 120  # characters of a list of allowed names in a message


class UserError(Exception):
    """Bad input. The message is one line: what was given, what is allowed, what to do. The CLI exits with 2."""


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
