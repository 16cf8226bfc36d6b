"""Callbacks by which long work reports progress; `console.progress_bars` shows them."""

from __future__ import annotations

from collections.abc import Callable

# (name, done, total); a name tells what is counted, as in "push/front: images".
Progress = Callable[[str, int, int], None]
# (done, total) of one thing.
Count = Callable[[int, int], None]
