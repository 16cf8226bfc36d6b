"""What `dvla data check` gathers about a dataset, what it finds, and the words findings are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ....cache.actions.extremes import Extremes
from ....errors import Failed, Note
from .images import CameraFacts
from .table_stats import Dimension, Following, TableStats

Severity = Literal["error", "warning", "info"]


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    rule: str  # id of the kind of trouble, e.g. "camera-black"
    severity: Severity
    message: str  # one line: what, where, what to do
    episodes: tuple[int, ...] = ()  # all concerned, where it is about single episodes


@dataclass
class Facts:
    """What was gathered about one dataset."""

    listed: tuple[int, ...]  # episode ids by the metadata
    tables: tuple[TableStats, ...]  # action, and state where there is one
    following: Following
    fps: float  # rows per second by the files
    control_hz: float  # rows per second by the config
    license: str
    declared: dict[str, int] = field(default_factory=dict)  # "episodes", "frames" as the metadata totals them
    unlisted: tuple[int, ...] = ()  # episodes with files that the metadata does not list
    failures: list[Failed] = field(default_factory=list)  # episodes that cannot be used
    about: tuple[Note, ...] = ()  # what the reader says about the dataset as a whole
    notes: list[tuple[int, Note]] = field(default_factory=list)  # (episode, what its reader settled)
    lengths: dict[int, int] = field(default_factory=dict)  # rows of each usable table
    listed_lengths: dict[int, int] = field(default_factory=dict)  # rows by the metadata
    gaps: list[tuple[int, int, float]] = field(default_factory=list)  # (episode, frame, step in seconds) out of rhythm
    drifts: list[tuple[int, float, float]] = field(default_factory=list)  # (episode, seconds off at its end, rows/s)
    instructions: dict[str, list[int]] = field(default_factory=dict)  # text → episodes
    twins: list[tuple[int, int]] = field(default_factory=list)  # (episode, earlier one with the same numbers)
    extremes: list[Extremes] = field(default_factory=list)  # of each table
    images: list[CameraFacts] = field(default_factory=list)
    idle: float = 0.0  # share of frames in which nothing moves

    def by_view(self) -> dict[str, list[CameraFacts]]:
        views: dict[str, list[CameraFacts]] = {}
        for seen in self.images:
            views.setdefault(seen.view, []).append(seen)
        return views


def ranges(numbers: Sequence[int], most: int = 6) -> str:
    """`[0, 1, 2, 5]` → "0-2, 5"; at most `most` parts."""
    parts: list[list[int]] = []
    for n in sorted(set(numbers)):
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    shown = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts[:most])
    return shown + (f", … {len(parts) - most} more" if len(parts) > most else "")


def about_episodes(
    rule: str, severity: Severity, episodes: Iterable[int], what: Callable[[int], str]
) -> Iterator[Finding]:
    """One finding for all episodes concerned: the first in words, the others by number."""
    chosen = tuple(sorted(episodes))
    if chosen:
        yield Finding(rule, severity, f"episode {chosen[0]} {what(chosen[0])}{likewise(chosen)}", chosen)


def likewise(episodes: Sequence[int], listed: int | None = None) -> str:
    """What to add to a message about the first of these episodes; `listed`: of how many."""
    share = len(episodes) if listed is None else f"{len(episodes)} of {listed}"
    return f"; the same in {share} episodes ({ranges(episodes)})" if len(episodes) > 1 else ""


def about_cameras(
    rule: str, severity: Severity, facts: Facts, test: Callable[[CameraFacts], bool], what: Callable[[CameraFacts], str]
) -> Iterator[Finding]:
    """One finding per view."""
    for view, seen in facts.by_view().items():
        bad = [p for p in seen if test(p)]
        if bad:
            episodes = tuple(sorted(p.episode for p in bad))
            share = f"{len(bad)} of {len(seen)} episodes checked ({ranges(episodes)})"
            message = f"view '{view}' of episode {bad[0].episode} {what(bad[0])}; {share}"
            yield Finding(rule, severity, message, episodes)


def named(dims: Sequence[Dimension]) -> str:
    """`action 0-6 (arm_joint_0_pos, arm_joint_1_pos, … 5 more)`."""
    names = ", ".join(d.name for d in dims[:2]) + (f", … {len(dims) - 2} more" if len(dims) > 2 else "")
    return f"{dims[0].table} {ranges([d.index for d in dims])} ({names})"


def places(steps: Sequence[tuple[float, int, int]]) -> str:
    return ", ".join(f"episode {e} frame {f}" for _, e, f in steps[:3])
