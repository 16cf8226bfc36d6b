"""The rules of `dvla data check`: each a pure function from the gathered `Facts` to its findings, one per kind of
trouble.

"error" means that it must be fixed, "warning" that somebody should look, "info" that it is worth knowing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from .findings import Facts, Finding, Severity, about_cameras, about_episodes, likewise, ranges
from .images import CameraFacts
from .numeric_rules import action_follows, clipped, constant, glitches, jumps, rotations, saturated, units
from .pauses import idle

CHUNK = 16  # rows of an action chunk by default
REPEATED = 0.75  # share of equal neighboring images while the robot moves


# --- files and counts -------------------------------------------------------------------------------------------------


def failures(facts: Facts) -> Iterator[Finding]:
    """Episodes a build would put into quarantine, one finding per kind of reason."""
    return _grouped("error", ((f.episode, f.kind, f.reason) for f in facts.failures), len(facts.listed))


def notes(facts: Facts) -> Iterator[Finding]:
    """What the reader settled where a dataset contradicts itself, one finding per kind."""
    yield from (Finding(note.rule, "warning", note.text) for note in facts.about)
    yield from _grouped("warning", ((episode, n.rule, n.text) for episode, n in facts.notes), len(facts.listed))


def _grouped(severity: Severity, found: Iterable[tuple[int, str, str]], listed: int) -> Iterator[Finding]:
    """One finding for all (episode, rule, text) that differ in numbers only."""
    groups: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for episode, rule, text in found:
        groups.setdefault((rule, re.sub(r"-?\d+(\.\d+)?(e[-+]?\d+)?", "#", text)), []).append((episode, text))
    for (rule, _), group in groups.items():
        episodes = tuple(sorted({e for e, _ in group}))
        yield Finding(rule, severity, f"episode {group[0][0]}: {group[0][1]}{likewise(episodes, listed)}", episodes)


def listed_count(facts: Facts) -> Iterator[Finding]:
    """Totals of the metadata against its own list."""
    actual = {"episodes": len(facts.listed)}
    if len(facts.listed_lengths) == len(facts.listed):
        actual["frames"] = sum(facts.listed_lengths.values())
    for what, count in actual.items():
        if facts.declared.get(what, count) != count:
            message = f"the metadata gives a total of {facts.declared[what]} {what} but lists {count}"
            yield Finding("listed-count", "warning", message)


def row_count(facts: Facts) -> Iterator[Finding]:
    """Rows of each table against the metadata."""
    wrong = {e: n for e, n in facts.lengths.items() if facts.listed_lengths.get(e, n) != n}
    return about_episodes(
        "row-count", "error", wrong, lambda e: f"has {wrong[e]} rows, the metadata lists {facts.listed_lengths[e]}"
    )


def unlisted_files(facts: Facts) -> Iterator[Finding]:
    what = "has files here but is not listed in the metadata"
    return about_episodes("unlisted-files", "warning", facts.unlisted, lambda _: what)


def short_episodes(facts: Facts) -> Iterator[Finding]:
    """One row is a static pose where the whole dataset is like that; a chunk longer than the episode is masked."""
    single = [e for e, n in facts.lengths.items() if n < 2]
    severity: Severity = "info" if len(single) == len(facts.lengths) else "warning"
    yield from about_episodes("single-row", severity, single, lambda _: "has one row only, a pose without motion")
    short = [e for e, n in facts.lengths.items() if 2 <= n < CHUNK]
    what = f"fewer than a chunk of {CHUNK}; steps past its end are masked"
    yield from about_episodes("short-episode", "info", short, lambda e: f"has {facts.lengths[e]} rows, {what}")


def duplicates(facts: Facts) -> Iterator[Finding]:
    earlier = dict(facts.twins)
    what = "has exactly the numbers of episode {}; recorded or copied twice?"
    return about_episodes("twin-episodes", "warning", earlier, lambda e: what.format(earlier[e]))


# --- time -------------------------------------------------------------------------------------------------------------


def time_gaps(facts: Facts) -> Iterator[Finding]:
    at = {e: (frame, step) for e, frame, step in reversed(facts.gaps)}
    usual = f"rows are 1/{facts.fps:g} = {1 / facts.fps:.4g} s apart"

    def what(episode: int) -> str:
        frame, step = at[episode]
        return f"comes {step:.4g} s after the row before at frame {frame}; {usual}"

    return about_episodes("time-gap", "warning", at, what)


def time_drift(facts: Facts) -> Iterator[Finding]:
    at = {e: (off, rate) for e, off, rate in facts.drifts}

    def what(episode: int) -> str:
        off, rate = at[episode]
        by_metadata = f"{facts.fps:g} by the metadata: {off:+.3g} s at its end"
        return f"has {rate:.4g} rows per second by its timestamps, {by_metadata}"

    return about_episodes("time-drift", "warning", at, what)


def rate_differs(facts: Facts) -> Iterator[Finding]:
    if abs(facts.control_hz / facts.fps - 1) >= 0.01:
        rates = f"the dataset config says {facts.control_hz:g} rows per second, the files {facts.fps:g}"
        yield Finding("rate-differs", "info", f"{rates}; displacements become velocities by the config's")


# --- images -----------------------------------------------------------------------------------------------------------


def camera_black(facts: Facts) -> Iterator[Finding]:
    return about_cameras(
        "camera-black", "error", facts, lambda p: p.is_black, lambda p: f"is black in all {p.frames} frames checked"
    )


def camera_frozen(facts: Facts) -> Iterator[Finding]:
    def what(p: CameraFacts) -> str:
        return f"shows one image in all {p.frames} frames checked while the robot moves"

    return about_cameras("camera-frozen", "error", facts, lambda p: p.is_frozen, what)


def camera_repeats(facts: Facts) -> Iterator[Finding]:
    """A camera slower than the rows repeats some images; one that repeats most of them is worth a look."""
    for view, seen in facts.by_view().items():
        scans = [p for p in seen if not (p.is_black or p.is_frozen)]
        pairs, repeated = sum(p.pairs for p in scans), sum(p.repeated for p in scans)
        if repeated > max(2, 0.02 * pairs):
            yield Finding(
                "camera-repeats",
                "warning" if repeated > max(4, REPEATED * pairs) else "info",
                f"view '{view}': {repeated} of {pairs} pairs of neighboring frames are the same image while the robot "
                "moves; the camera is slower than the rows",
                tuple(sorted({p.episode for p in scans if p.repeated})),
            )


def image_sizes(facts: Facts) -> Iterator[Finding]:
    for view, seen in facts.by_view().items():
        sizes: dict[tuple[int, int], list[int]] = {}
        for p in seen:
            sizes.setdefault((p.width, p.height), []).append(p.episode)
        if len(sizes) > 1:
            shown = "; ".join(f"{w}x{h} in episodes {ranges(sorted(e))}" for (w, h), e in sizes.items())
            yield Finding("picture-size", "warning", f"view '{view}' changes size: {shown}")


# --- text and terms ---------------------------------------------------------------------------------------------------


def instructions(facts: Facts) -> Iterator[Finding]:
    what = "has no instruction; give one in the dataset config where all share it"
    yield from about_episodes("instruction-empty", "warning", facts.instructions.get("", ()), lambda _: what)
    spellings: dict[str, list[str]] = {}
    for text in facts.instructions:
        spellings.setdefault(" ".join(re.sub(r"[^\w\s]", " ", text).casefold().split()), []).append(text)
    for plain, texts in spellings.items():
        if plain and len(texts) > 1:
            shown = ", ".join(f"{t!r} ({len(facts.instructions[t])} episodes)" for t in texts[:4])
            message = f"one instruction under {len(texts)} spellings: {shown}"
            yield Finding("instruction-spelling", "warning", message)


def license_missing(facts: Facts) -> Iterator[Finding]:
    if not facts.license:
        yield Finding("license-missing", "info", "the dataset config names no license")


RULES: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    failures,
    notes,
    listed_count,
    row_count,
    unlisted_files,
    short_episodes,
    duplicates,
    idle,
    time_gaps,
    time_drift,
    rate_differs,
    camera_black,
    camera_frozen,
    camera_repeats,
    image_sizes,
    constant,
    saturated,
    units,
    rotations,
    jumps,
    glitches,
    clipped,
    action_follows,
    instructions,
    license_missing,
)


def judge(facts: Facts) -> list[Finding]:
    """All findings, the gravest first."""
    order = ("error", "warning", "info")
    return sorted((f for rule in RULES for f in rule(facts)), key=lambda f: order.index(f.severity))
