"""How much of a dataset is pauses, by a sample of its episodes. The rule: cache/actions/idle.py."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ....cache.actions.idle import bands, idle_frames
from ....cache.readers import Source
from ....errors import Failed
from .findings import Facts, Finding
from .images import sample_episodes

LOOKED_AT = 64  # episodes
NOTABLE = 0.05  # share of idle frames from which it is mentioned


def idle_share(source: Source, facts: Facts) -> float:
    """The share of idle frames; reads the tables of the sampled episodes again, since the range of the dataset's motion
    is known only after all of them."""
    tables = [t for t in facts.tables if t.mapping.mask.any() and t.rows]
    spread = [bands(t.unified.result().on(t.mapping.mask), t.mapping.mask) for t in tables]
    found: list[np.ndarray] = []
    for number in sample_episodes(sorted(facts.lengths), LOOKED_AT) if tables else ():
        rows = source.attempt(source.table, number)
        if not isinstance(rows, Failed):
            values = [t.mapping.to_unified(getattr(rows, t.dims[0].table)) for t in tables]
            found.append(idle_frames(list(zip(values, spread)), source.control_hz))
    return float(np.concatenate(found).mean()) if found else 0.0


def idle(facts: Facts) -> Iterator[Finding]:
    """Pauses of half a second or more."""
    if facts.idle >= NOTABLE:
        what = "nothing moves for half a second or more; build or train with --drop-idle to leave them out"
        yield Finding("idle", "info", f"{facts.idle:.0%} of frames are idle: {what}")
