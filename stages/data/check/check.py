"""`dvla data check`: reads every table of a dataset and a sample of its images, and reports what is wrong.

What is kept in memory grows with episodes and dimensions, never with rows. Letters: T rows of an episode, d native
dimensions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from .... import __version__
from ....cache.readers import Source, open_source
from ....cache.readers.tables import EpisodeTable
from ....common.console import table
from ....common.files import write_file
from ....common.progress import Progress
from ....errors import Failed, Note, UserError
from ..summary import column_names
from .findings import Facts, Finding
from .images import CameraFacts, sample_episodes, sample_frames, scan
from .numeric_rules import limits
from .pauses import idle_share
from .rules import judge
from .table_stats import Following, TableStats, dimensions, extremes_of

SAMPLED = 64  # episodes whose images are decoded by default
OPENED = 1000  # of more episodes, only those sampled have their image files opened
THREADS = 4  # episodes whose images are decoded at a time
COLORS = {"error": "red", "warning": "yellow", "info": "dim"}


@dataclass(frozen=True)
class CheckConfig:
    """What `dvla data check` needs."""

    source: str  # dataset folder, file or hub id
    episodes: int | None = None  # episodes whose images are decoded, evenly spread; None = SAMPLED
    frames: int = 8  # frames decoded of each view of these
    everything: bool = False  # decode every frame of every episode instead
    out: Path | None = None  # JSON report to write
    dataset_config: str | None = None  # YAML of the field map, or a shipped name


@dataclass(frozen=True)
class CheckReport:
    """What was found in one dataset."""

    source: Source
    facts: Facts
    findings: tuple[Finding, ...]  # the gravest first
    seconds: float

    @property
    def must_fix(self) -> bool:
        return any(f.severity == "error" for f in self.findings)

    @property
    def summary(self) -> str:
        """The closing lines."""
        f, counts = self.facts, {s: sum(x.severity == s for x in self.findings) for s in COLORS}
        usable, rows = len(f.listed) - len({x.episode for x in f.failures}), sum(f.lengths.values())
        decoded, looked = sum(p.frames for p in f.images), len({p.episode for p in f.images if p.frames})
        words = zip(("error", "warning", "note"), counts.values())
        found = ", ".join(f"{n} {word}{'' if n == 1 else 's'}" for word, n in words)
        read = (
            f"{usable} of {len(f.listed)} episodes usable, {rows} rows; {decoded} images of {looked} episodes decoded"
        )
        problem = self.source.problem
        unchecked = f"\n  not checked: units, rotations, action against state ({problem})" if problem else ""
        return f"{self.source.name}: {read}\n  {found}; {self.seconds:.1f} s{unchecked}"


def check(config: CheckConfig, progress: Progress = lambda *_: None) -> CheckReport:
    """Examine a dataset; with `config.out`, also write the JSON report, which must not exist yet.

    `UserError` for bad settings or a dataset that cannot be opened. Damaged episodes are findings.
    """
    began = time.perf_counter()
    count = SAMPLED if config.episodes is None else config.episodes
    if count < 0 or config.frames < 1:
        raise UserError(f"--episodes {count} must be 0 or more, --frames {config.frames} at least 1")
    if config.everything and config.episodes is not None:
        raise UserError(f"--episodes {count} and --all exclude each other; give one of them")
    if config.out is not None and config.out.exists():
        raise UserError(f"{config.out} exists; choose another --out")
    source = open_source(config.source, config.dataset_config, unmapped=True)
    facts = _read_tables(source, progress)
    facts.about = source.notes()
    _look_at_images(source, facts, config, count, progress)
    report = CheckReport(source, facts, tuple(judge(facts)), time.perf_counter() - began)
    if config.out is not None:
        if config.out.exists():
            raise UserError(f"{config.out} appeared meanwhile; choose another --out")
        write_file(config.out, as_text(as_json(report)).encode(errors="backslashreplace"))
    return report


def findings_table(report: CheckReport) -> Table:
    """One row per finding."""
    found = table(("", "rule", "finding"), [(f.severity, f.rule, f.message) for f in report.findings])
    for row, f in zip(found.rows, report.findings):
        row.style = COLORS[f.severity]
    return found


def as_json(report: CheckReport) -> dict[str, Any]:
    """The report as plain JSON values."""
    f, source = report.facts, report.source
    dims = [
        {
            "table": d.table,
            "index": d.index,
            "name": d.name,
            "kind": d.kind,
            "min": float(t.low[d.index]),
            "max": float(t.high[d.index]),
            "share_at_min": float(t.at_low[d.index] / t.rows),
            "share_at_max": float(t.at_high[d.index] / t.rows),
        }
        for t in f.tables
        if t.rows
        for d in t.dims
    ]
    return {
        "dvla": __version__,
        "dataset": source.name,
        "format": source.format,
        "dataset_config": source.config.name if source.config.mapped else None,
        "revision": source.revision_hash,
        "must_fix": report.must_fix,
        "seconds": round(report.seconds, 3),
        "rows_per_second": source.fps,
        "control_hz": source.control_hz,
        "episodes_listed": len(f.listed),
        "episodes_readable": len(f.lengths),
        "rows": sum(f.lengths.values()),
        "idle_share": round(f.idle, 4),
        "findings": [dataclasses.asdict(x) for x in report.findings],
        "failures": [{"episode": x.episode, "kind": x.kind, "reason": x.reason} for x in f.failures],
        "dimensions": dims,
        "cameras": [dataclasses.asdict(p) for p in f.images],
        "instructions": [{"text": text, "episodes": len(e)} for text, e in f.instructions.items()],
    }


# --- tables -----------------------------------------------------------------------------------------------------------


def _read_tables(source: Source, progress: Progress) -> Facts:
    maps = {"action": source.action_map, "state": source.state_map}
    dims = {name: dimensions(name, m) for name, m in maps.items()}
    tables = {name: TableStats(name, m, *limits(dims[name])) for name, m in maps.items() if m.native_dim}
    for name, stats in tables.items() if not source.config.mapped else ():
        named = zip(stats.dims, column_names(source)[name])
        stats.dims = tuple(dataclasses.replace(d, name=called, kind="other") for d, called in named)
    facts = Facts(
        source.episode_ids,
        tuple(tables.values()),
        Following(dims["action"], dims["state"], source.control_hz),
        source.fps,
        source.control_hz,
        source.config.license if source.config.mapped else "not known",
        *_declared(source),
    )
    seen: dict[bytes, int] = {}
    for i, number in enumerate(source.episode_ids):
        length = source.attempt(source.length_of, number)
        if not isinstance(length, Failed):
            facts.listed_lengths[number] = length
        table = length if isinstance(length, Failed) else source.attempt(source.table, number)
        if isinstance(table, Failed):
            facts.failures.append(table)
        else:
            _add(facts, number, table, seen)
            if source.attempt(source.success_of, number) is False:
                note = Note("failed-demonstration", "is marked as failed by its files; --success-only leaves it out")
                facts.notes.append((number, note))
        progress(f"{source.name}: tables", i + 1, len(source.episode_ids))
    facts.idle = idle_share(source, facts)
    facts.extremes = [extremes_of(source, stats) for stats in facts.tables if stats.mapping.mask.any() and stats.rows]
    return facts


def _add(facts: Facts, number: int, table: EpisodeTable, seen: dict[bytes, int]) -> None:
    """Add one episode's rows; `seen`: hash of all rows → the first episode that has them."""
    facts.lengths[number] = len(table.action)
    facts.notes += [(number, note) for note in table.notes]
    for stats in facts.tables:
        stats.update(number, getattr(table, stats.dims[0].table))
    facts.following.update(table.action, table.state)
    facts.instructions.setdefault(table.instruction, []).append(number)
    gaps, drift = rhythm(table.timestamps, facts.fps)
    facts.gaps += [(number, frame, step) for frame, step in gaps[:1]]
    facts.drifts += [(number, *drift)] if drift else []
    digest = hashlib.blake2b(table.action.tobytes() + b";" + table.state.tobytes(), digest_size=16).digest()
    first = seen.setdefault(digest, number)
    if first != number and len(table.action) > 1:
        facts.twins.append((number, first))


def rhythm(times: np.ndarray, fps: float) -> tuple[list[tuple[int, float]], tuple[float, float] | None]:
    """Steps of `times` [T] seconds that are out of rhythm, as (frame, seconds), and (seconds off at the end, rows per
    second) where the others do not add up to `fps`: more than one row off, or 2 % of them, None otherwise."""
    steps = np.diff(times)
    if not len(steps):
        return [], None
    usual = float(np.median(steps))
    odd = (steps > 1.5 * usual) | (steps < 0.5 * usual)
    even = steps[~odd]
    off = float(even.sum()) - len(even) / fps
    is_off = abs(off) * fps > (min(1.0, 0.02 * len(even)) if len(even) >= 5 else 1.0)  # rows; 2 % of a short episode
    drift = (off, len(even) / float(even.sum())) if is_off else None
    return [(int(i) + 1, float(steps[i])) for i in np.flatnonzero(odd)], drift


def _declared(source: Source) -> tuple[dict[str, int], tuple[int, ...]]:
    """Totals by a LeRobot dataset's metadata, and episodes that have a v2 table file without being listed."""
    if source.format != "lerobot":
        return {}, ()
    info = source.meta.info  # type: ignore[attr-defined]
    named = (("episodes", info.get("total_episodes")), ("frames", info.get("total_frames")))
    totals = {short: total for short, total in named if isinstance(total, int)}
    files = (
        re.fullmatch(r"episode_(\d+)\.parquet", p.name) for p in (source.path / "data").glob("*/episode_*.parquet")
    )
    return totals, tuple(sorted({int(m[1]) for m in files if m} - set(source.episode_ids)))


# --- images ----------------------------------------------------------------------------------------------------------


def _look_at_images(source: Source, facts: Facts, config: CheckConfig, count: int, progress: Progress) -> None:
    """Decode a sample, or everything; open the files of the others where they are here and not too many."""
    usable = sorted(facts.lengths)
    decoded = set(usable if config.everything else sample_episodes(usable, count))
    is_here = Path(config.source).expanduser().exists()
    chosen = [e for e in usable if e in decoded or (is_here and len(usable) <= OPENED)]
    stats, stop = facts.tables[-1], threading.Event()  # of the state, or of the action where there is none

    def look(number: int, notes: list[Note]) -> Iterator[CameraFacts]:
        episode = source.load(number)
        position = _position(stats, getattr(episode, stats.dims[0].table))
        for view in episode.views:
            notes += view.notes
            frames: Sequence[tuple[int, int]] = ()
            if number in decoded:
                few = sample_frames(view.length, config.frames, number % 2 > 0)
                frames = [(0, view.length)] if config.everything else few
            yield scan(number, view, frames, position, stop.is_set)

    def attempt(number: int) -> tuple[list[CameraFacts], list[tuple[int, Note]], Failed | None]:
        seen: list[CameraFacts] = []  # of the views before a failure, too
        notes: list[Note] = []
        failed = source.attempt(lambda n: seen.extend(look(n, notes)), number)
        return seen, [(number, note) for note in notes], failed

    pool = ThreadPoolExecutor(THREADS, "dvla-check")
    try:
        waiting = [pool.submit(attempt, number) for number in chosen]
        for done, future in enumerate(as_completed(waiting), 1):
            seen, notes, failed = future.result()
            facts.images += seen
            facts.notes += notes
            facts.failures += [failed] if failed else []
            progress(f"{source.name}: images", done, len(chosen))
    finally:  # on Ctrl-C, too: what has not begun is dropped, what has ends with its frame
        stop.set()
        pool.shutdown(cancel_futures=True)
    facts.images.sort(key=lambda p: (p.episode, source.view_names.index(p.view)))
    facts.failures.sort(key=lambda f: (f.episode, f.reason))
    facts.notes.sort(key=lambda n: (n[0], n[1].text))


def _position(stats: TableStats, native: np.ndarray) -> np.ndarray:
    """[T, k] values as shares of their range over the dataset, without constant and dropped dimensions."""
    used = [d.index for d in stats.dims if d.kind != "dropped" and stats.high[d.index] > stats.low[d.index]]
    return (native[:, used] - stats.low[used]) / (stats.high[used] - stats.low[used])


# --- report -----------------------------------------------------------------------------------------------------------


def as_text(report: dict[str, Any]) -> str:
    """JSON with one line per entry, and per element of a list of objects."""

    def entry(value: Any) -> str:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "[\n  " + ",\n  ".join(json.dumps(v, ensure_ascii=False) for v in value) + "\n ]"
        return json.dumps(value, ensure_ascii=False)

    return "{\n " + ",\n ".join(f"{json.dumps(k)}: {entry(v)}" for k, v in report.items()) + "\n}\n"
