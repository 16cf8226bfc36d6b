"""The short names of cameras."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from ....errors import UserError, unknown


def choose_cameras(
    keys: Sequence[str], prefix: str, wanted: Sequence[str] | None, where: str, remedy: str
) -> dict[str, str]:
    """Short name → key of the cameras `wanted` (keys or short names, in that order; None for all).

    A short name is the last part of a key; where two cameras share it, all that follows `prefix`, which ends with the
    separator of parts. `UserError` for an unknown camera, or two of one name (`remedy`: what to do then).
    """
    last = {k: k.rpartition(prefix[-1])[2] for k in keys}
    count = Counter(last.values())
    short = {k: re.sub(r"[^\w-]+", "_", v if count[v] == 1 else k.removeprefix(prefix)) for k, v in last.items()}
    if len(set(short.values())) < len(keys):
        raise UserError(f"{where}: two cameras get the same short name: {', '.join(keys)}; {remedy}")
    by_name = {v: k for k, v in short.items()} | {k: k for k in keys}
    for name in wanted or ():
        if name not in by_name:
            raise UserError(f"{where}: {unknown('view', name, by_name)}; see `views` of its dataset config")
    chosen = keys if wanted is None else [by_name[w] for w in wanted]
    return {short[k]: k for k in chosen}
