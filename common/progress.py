"""Callbacks by which long work reports progress; `console.progress_bars` shows them."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[
    [str, int, int], None
]  # (name, done, total); a name tells what is counted, as in "push/front: images"
Count = Callable[[int, int], None]  # (done, total) of one thing
