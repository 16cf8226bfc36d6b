"""The rules of `dvla data check`: each a pure function from the gathered `Facts` to its findings, one per kind of
trouble.

"error" means that it must be fixed, "warning" that somebody should look, "info" that it is worth knowing.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from ....common.failure import Failed
from .findings import Facts, Finding, about_cameras, about_episodes, likewise, ranges
from .numeric_rules import action_follows, constant, jumps, rotations, saturated, units

CHUNK = 16  # rows of an action chunk by default
REPEATED = 0.75  # share of equal neighboring images while the robot moves


# --- files and counts -------------------------------------------------------------------------------------------------


def failures(facts: Facts) -> list[Finding]:
    """Episodes a build would put into quarantine, one finding per kind of reason."""
    groups: dict[tuple[str, str], list[Failed]] = {}
    for failed in facts.failures:
        alike = re.sub(r"-?\d+(\.\d+)?(e[-+]?\d+)?", "#", failed.reason)
        groups.setdefault((failed.kind, alike), []).append(failed)
    found = []
    for (kind, _), group in groups.items():
        episodes = tuple(sorted({f.episode for f in group}))
        several = likewise(episodes, len(facts.listed))
        found.append(Finding(kind, "error", f"episode {group[0].episode}: {group[0].reason}{several}", episodes))
    return found


def listed_count(facts: Facts) -> list[Finding]:
    """Totals of the metadata against its own list."""
    actual = {"episodes": len(facts.listed), "frames": sum(facts.listed_lengths.values())}
    if len(facts.listed_lengths) < len(facts.listed):
        del actual["frames"]
    return [
        Finding("listed-count", "warning", f"the metadata says {facts.declared[what]} {what} in all but lists {count}")
        for what, count in actual.items()
        if facts.declared.get(what, count) != count
    ]


def row_count(facts: Facts) -> list[Finding]:
    """Rows of each table against the metadata."""
    wrong = {e: n for e, n in facts.lengths.items() if facts.listed_lengths.get(e, n) != n}
    return about_episodes(
        "row-count", "error", wrong, lambda e: f"has {wrong[e]} rows, the metadata lists {facts.listed_lengths[e]}"
    )


def unlisted_files(facts: Facts) -> list[Finding]:
    return about_episodes(
        "unlisted-files", "warning", facts.unlisted, lambda _: "has files here but is not listed in the metadata"
    )


def short_episodes(facts: Facts) -> list[Finding]:
    """One row is a static pose where the whole dataset is like that; a chunk longer than the episode is masked."""
    single = [e for e, n in facts.lengths.items() if n < 2]
    static = len(single) == len(facts.lengths)
    found = about_episodes(
        "single-row", "info" if static else "warning", single, lambda _: "has one row only, a pose without motion"
    )
    short = [e for e, n in facts.lengths.items() if 2 <= n < CHUNK]
    return found + about_episodes(
        "short-episode",
        "info",
        short,
        lambda e: f"has {facts.lengths[e]} rows, fewer than a chunk of {CHUNK}; steps past its end are masked",
    )


def twin_episodes(facts: Facts) -> list[Finding]:
    earlier = dict(facts.twins)
    return about_episodes(
        "twin-episodes",
        "warning",
        earlier,
        lambda e: f"has exactly the numbers of episode {earlier[e]}; recorded or copied twice?",
    )


# --- time -------------------------------------------------------------------------------------------------------------


def time_gaps(facts: Facts) -> list[Finding]:
    at = {e: (frame, step) for e, frame, step in reversed(facts.gaps)}
    return about_episodes(
        "time-gap",
        "warning",
        sorted(at),
        lambda e: (
            f"comes {at[e][1]:.4g} s after the row before at frame {at[e][0]}; "
            f"rows are 1/{facts.fps:g} = {1 / facts.fps:.4g} s apart"
        ),
    )


def time_drift(facts: Facts) -> list[Finding]:
    at = {e: (off, rate) for e, off, rate in facts.drifts}
    return about_episodes(
        "time-drift",
        "warning",
        at,
        lambda e: (
            f"has {at[e][1]:.4g} rows per second by its timestamps, {facts.fps:g} by the "
            f"metadata: {at[e][0]:+.3g} s at its end"
        ),
    )


def rate_differs(facts: Facts) -> list[Finding]:
    if abs(facts.control_hz / facts.fps - 1) < 0.01:
        return []
    return [
        Finding(
            "rate-differs",
            "info",
            f"the dataset config says {facts.control_hz:g} rows per second, the files {facts.fps:g}; "
            "displacements become velocities by the config's",
        )
    ]


# --- images ----------------------------------------------------------------------------------------------------------


def camera_black(facts: Facts) -> list[Finding]:
    return about_cameras(
        "camera-black", "error", facts, lambda p: p.is_black, lambda p: f"is black in all {p.frames} frames looked at"
    )


def camera_frozen(facts: Facts) -> list[Finding]:
    return about_cameras(
        "camera-frozen",
        "error",
        facts,
        lambda p: p.is_frozen,
        lambda p: f"shows one image in all {p.frames} frames looked at while the robot moves",
    )


def camera_repeats(facts: Facts) -> list[Finding]:
    """A camera slower than the rows repeats some images; one that repeats most of them is worth a look."""
    found = []
    for view in dict.fromkeys(p.view for p in facts.images):
        scans = [p for p in facts.images if p.view == view and not (p.is_black or p.is_frozen)]
        pairs, repeated = sum(p.pairs for p in scans), sum(p.repeated for p in scans)
        if repeated > max(2, 0.02 * pairs):
            found.append(
                Finding(
                    "camera-repeats",
                    "warning" if repeated > max(4, REPEATED * pairs) else "info",
                    f"view '{view}': {repeated} of {pairs} pairs of neighboring frames are the same image while the robot "
                    "moves; the camera is slower than the rows",
                    tuple(sorted({p.episode for p in scans if p.repeated})),
                )
            )
    return found


def image_sizes(facts: Facts) -> list[Finding]:
    found = []
    for view in dict.fromkeys(p.view for p in facts.images):
        sizes: dict[tuple[int, int], list[int]] = {}
        for p in facts.images:
            if p.view == view:
                sizes.setdefault((p.width, p.height), []).append(p.episode)
        if len(sizes) > 1:
            shown = "; ".join(f"{w}x{h} in episodes {ranges(sorted(e))}" for (w, h), e in sizes.items())
            found.append(Finding("picture-size", "warning", f"view '{view}' changes size: {shown}"))
    return found


# --- text and terms ---------------------------------------------------------------------------------------------------


def instructions(facts: Facts) -> list[Finding]:
    found = about_episodes(
        "instruction-empty",
        "warning",
        facts.instructions.get("", ()),
        lambda _: "has no instruction; give one in the dataset config where all share it",
    )
    spellings: dict[str, list[str]] = {}
    for text in facts.instructions:
        spellings.setdefault(" ".join(re.sub(r"[^\w\s]", " ", text).casefold().split()), []).append(text)
    for plain, texts in spellings.items():
        if plain and len(texts) > 1:
            shown = ", ".join(f"{t!r} ({len(facts.instructions[t])} episodes)" for t in texts[:4])
            found.append(
                Finding("instruction-spelling", "warning", f"one instruction under {len(texts)} spellings: {shown}")
            )
    return found


def license_missing(facts: Facts) -> list[Finding]:
    return [] if facts.license else [Finding("license-missing", "info", "the dataset config names no license")]


RULES: tuple[Callable[[Facts], list[Finding]], ...] = (
    failures,
    listed_count,
    row_count,
    unlisted_files,
    short_episodes,
    twin_episodes,
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
    action_follows,
    instructions,
    license_missing,
)


def judge(facts: Facts) -> list[Finding]:
    """All findings, the gravest first."""
    order = ("error", "warning", "info")
    return sorted((f for rule in RULES for f in rule(facts)), key=lambda f: order.index(f.severity))
