"""How many episodes a build may lose: above that it does not finish, and says what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import UserError

if TYPE_CHECKING:
    from ...cache.store.plan import BuildPlan

USUAL = "20%"  # that most builds may lose
SHOWN = 3  # reasons
Quarantined = Mapping[str, set[tuple[int, str]]]  # dataset → (episode, reason)


class TooManyQuarantined(UserError):
    """A build does not finish. All shards are committed. `reasons`: lines, the most frequent first; exit code 1."""

    def __init__(self, message: str, reasons: list[str]) -> None:
        super().__init__(message)
        self.reasons = reasons


def most_allowed(limit: str, episodes: int) -> float:
    """The number of `episodes` that "5%" or "12" allows. `UserError` for anything else."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*%|(\d{1,18})", limit.strip(), re.ASCII)
    if not found or found[1] and float(found[1]) > 100:
        raise UserError(f"--max-quarantine {limit}: give a share of the episodes, 0% to 100%, or their number")
    return float(found[1]) * episodes / 100 if found[1] else int(found[2])


def require_few(out: Path, plan: BuildPlan, quarantined: Quarantined, limit: str) -> None:
    """`TooManyQuarantined` where `quarantined` holds more of the plan's episodes than `limit` allows."""
    lost = {name: {episode for episode, _ in found} for name, found in quarantined.items()}
    counts = {d.name: len(d.episodes) + len(d.quarantined) for d in plan.datasets}
    bad, total = sum(map(len, lost.values())), sum(counts.values())
    if bad <= most_allowed(limit, total):
        return
    empty = [name for name, count in counts.items() if len(lost[name]) == count]
    head = f"{bad} of {total} episodes ({100 * bad / total:.3g} %) cannot be used"
    if bad == total:
        head = f"no episode of {', '.join(empty)} could be read"
    raise TooManyQuarantined(
        f"{head}: {out} is not finished (--max-quarantine {limit}). Rerun with --allow-quarantine to finish it at "
        "once; --update adds episodes that are mended later",
        reasons(quarantined),
    )


def reasons(quarantined: Quarantined) -> list[str]:
    """The most frequent reasons, a line each with an example; those that differ in numbers only are one."""
    groups: dict[str, dict[tuple[str, int], str]] = {}
    for name, found in quarantined.items():
        for episode, reason in sorted(found):
            groups.setdefault(re.sub(r"\d+", "#", reason), {}).setdefault((name, episode), reason)
    ordered = sorted(groups.values(), key=len, reverse=True)
    lines = [f"  {len(group)} × {next(iter(group.values()))}" for group in ordered[:SHOWN]]
    return lines + [f"  and {len(ordered) - SHOWN} other reasons"] * (len(ordered) > SHOWN)
