"""Which frames of a video file belong to which episode, and to which of its rows.

Listed times, lengths, neighbors in the same file, the number of its frames, timestamps and `frame_index` are compared;
a frame of another episode never takes part. Nothing is decoded. Letters: T rows, n frames.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ....errors import Note
from ..episode import CorruptEpisode
from ..video import NoFrame, VideoExtent, find_extent, stored_times
from .rows import Clock

_HALF = 0.5 + 1e-3  # of a step: a frame that is nearer belongs to a time
_QUARTER = 0.25 + 1e-3  # the same, where nothing else proves it
_ONE = 1 - 1e-3  # steps by which a listed end may differ from the length
_TRIED = 8  # episodes that are wrong, of which each is tried as the only one
_ORDINARY = Clock()


@dataclass(frozen=True, slots=True)
class Claim:
    """What the metadata says about one episode in a video file."""

    episode: int
    length: int  # frames
    start: float  # seconds into the file
    stop: float | None  # None: not listed


@dataclass(frozen=True, slots=True)
class Span:
    """Frames [first, stop) of a file, counted as they are shown; or `problem`: why they are not known."""

    first: int
    stop: int
    note: str = ""
    problem: str = ""
    is_shared: bool = False  # by the number of frames alone


class VideoFile:
    """One video file and the episodes listed in it."""

    def __init__(self, claims: Sequence[Claim], fps: float) -> None:
        self.claims, self._fps = sorted(claims, key=lambda c: c.episode), fps
        self._starts = starts = np.array([c.start for c in self.claims])
        self._lengths = lengths = np.array([c.length for c in self.claims], np.int64)
        stops = [c.start + c.length / fps if c.stop is None else c.stop for c in self.claims]
        self._stops = np.array(stops)
        sizes = (self._stops - starts) * fps
        order = np.argsort(starts, kind="stable")
        free = np.diff(starts[order]) * fps - lengths[order][:-1]  # frames between an episode and the next
        tiled = np.cumsum(lengths[order])
        self._is_sound = bool((free > -_HALF).all() and (np.abs(sizes - lengths) < _ONE).all())
        self._is_tiled = bool((np.abs(starts[order] * fps - tiled + lengths[order]) < _HALF).all())
        self._placed: tuple[tuple[int, int], np.ndarray, dict[int, Span]] | None = None

    def claim(self, episode: int) -> Claim:
        return self.claims[bisect.bisect_left(self.claims, episode, key=lambda c: c.episode)]

    def without(self, episode: int) -> VideoFile:
        return VideoFile([c for c in self.claims if c.episode != episode], self._fps)

    def find(
        self, path: Path, episode: int, times: np.ndarray, clock: Clock | None, where: str
    ) -> tuple[VideoExtent, tuple[Note, ...]]:
        """The frames of an episode's rows, whose `times` [T] are seconds since its first row.

        `CorruptEpisode`, beginning with `where`, with the numbers that contradict each other.
        """
        claim = self.claim(episode)
        if clock is None and self._is_sound and times[-1] * self._fps < max(claim.length, len(times)) - 0.5:
            try:
                extent = find_extent(path, claim.start + times, where)
            except NoFrame:
                pass
            else:
                starts = abs(extent.begins) * self._fps < _HALF  # else listed times may count from the first frame
                ends = not extent.in_file or float(self._stops.max()) * self._fps < extent.in_file + 1
                if len(self.claims) == 1 or (starts and ends and (self._is_tiled or extent.in_file != self.total)):
                    return extent, ()
        stored, spans = self._spans(path, where)
        span = spans[episode]
        if span.problem:
            raise CorruptEpisode(f"{where}: {path.name}: {span.problem}", "row-count")
        frames = stored[span.first : span.stop]
        clock = clock or _ORDINARY
        if span.is_shared:
            clock = dataclasses.replace(clock, counted=False)
        chosen = frames_of_rows(frames, times, clock, self._fps, f"{where}: {path.name}")
        notes = (Note("video-span", f"{path.name}: {span.note}"),) if span.note else ()
        return find_extent(path, frames[chosen], where), notes

    def _spans(self, path: Path, where: str) -> tuple[np.ndarray, dict[int, Span]]:
        """Times of all frames of the file, and where each episode lies among them; kept while the file is the same."""
        found = path.stat()
        state = found.st_size, found.st_mtime_ns
        placed = self._placed
        if placed is None or placed[0] != state:
            stored = stored_times(path, where)
            if not len(stored):
                raise CorruptEpisode(f"{where}: {path.name} has no frame", "unreadable-file")
            self._placed = placed = state, stored, self.place(stored)
        return placed[1:]

    def unsettled(self, path: Path, where: str) -> list[int]:
        """Episodes whose frames are not known."""
        return [episode for episode, span in self._spans(path, where)[1].items() if span.problem]

    def fits(self, stored: np.ndarray) -> bool:
        """Whether all episodes are where they are listed among the `stored` [n] times of all frames."""
        if not self.claims or not len(stored):
            return not self.claims
        return not any(s.note or s.problem or s.stop - s.first < c.length for c, s in self._by_claim(stored))

    @property
    def total(self) -> int:
        """Frames of all episodes."""
        return int(self._lengths.sum())

    def _by_claim(self, stored: np.ndarray) -> list[tuple[Claim, Span]]:
        spans = self.place(stored)
        return [(c, spans[c.episode]) for c in self.claims]

    def place(self, stored: np.ndarray) -> dict[int, Span]:
        """Where each episode lies among the `stored` [n] times of all frames."""
        count = len(stored)
        if len(self.claims) == 1 and (count == self.total or self.claims[0].stop is None):
            return {self.claims[0].episode: Span(0, count)}
        fitting = [s for s in map(self._as_listed, (stored, stored - stored[0])) if s is not None]
        if fitting and fitting[0] == fitting[-1]:
            return fitting[0]
        if fitting:
            problem = f"its listed times fit when counted from 0 s and from the first frame at {stored[0]:.3f} s"
            return {claim.episode: Span(0, 0, problem=problem) for claim in self.claims}
        shown = stored - stored[0]
        first, _ = self._nearest(shown)
        if len(self.claims) == 1:
            return {self.claims[0].episode: Span(int(first[0]), count)}
        return self._settled(shown, first, self._lengths)

    def _nearest(self, shown: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First frame of each episode and number of its frames, by the listed times."""
        first = _nearest(shown, self._starts)
        behind = np.clip(np.round((self._stops - shown[-1]) * self._fps) - 1, 0, 2**40).astype(np.int64)
        ends = np.searchsorted(shown, self._stops - 0.5 / self._fps) + behind
        return first, np.maximum(ends - first, 1)

    def _as_listed(self, shown: np.ndarray) -> dict[int, Span] | None:
        """The listed places, where each has a frame and no two share one; None otherwise. Frames that nobody claims
        belong to the episode before them, as far as its listed end."""
        count, (first, by_stop) = len(shown), self._nearest(shown)
        order = np.argsort(first, kind="stable")
        limits = np.append(first[order][1:], count)  # where the next one begins
        is_whole = count == self.total  # with as many frames as rows, none can be off by one unnoticed
        if (np.abs(shown[first] - self._starts) * self._fps >= (_HALF if is_whole else _QUARTER)).any():
            return None
        if (first[order] + self._lengths[order] <= limits).all():
            ends = first + np.maximum(self._lengths, by_stop)
        elif not is_whole and (first[order] + by_stop[order] <= limits).all():
            ends = first + by_stop
        else:
            return None
        spans, before = {}, 0
        for i, limit in zip(order.tolist(), limits.tolist()):
            claim, note, problem = self.claims[i], "", ""
            stop = limit if claim.stop is None else min(limit, int(ends[i]))
            off = 0.0 if claim.stop is None else abs((claim.stop - claim.start) * self._fps - claim.length)
            if off > _ONE:
                note = f"it is listed from {claim.start:.3f} to {claim.stop:.3f} s, with {claim.length} frames"
            if _ONE < off < claim.length / 2 and not is_whole and (first[i] != before or (off > 1.5 and stop == limit)):
                note, problem = "", note  # which of the two times is right?
            spans[claim.episode] = Span(int(first[i]), stop, note, problem)
            before = int(first[i]) + claim.length
        return spans

    def _settled(self, shown: np.ndarray, first: np.ndarray, sizes: np.ndarray) -> dict[int, Span]:
        """Listed times contradict each other or the file: the frames that the sound ones leave are shared out in order
        of the episodes, where these need exactly as many."""
        count, stops = len(shown), first + sizes
        outside = (np.abs(shown[first] - self._starts) * self._fps >= _QUARTER) | (stops > count)
        wrong = _overlapping(first, stops) | outside
        if sizes.sum() == count:  # together they are the whole file
            wrong[:] = True
        elif wrong.sum() <= _TRIED:
            alone = [i for i in np.flatnonzero(wrong).tolist() if _fits(i, first, stops, outside)]
            wrong[:] = _doubtful(first, stops, wrong, count) if len(alone) != 1 else np.arange(len(wrong)) == alone[0]
        else:
            wrong[:] = _doubtful(first, stops, wrong, count)
        spans = {c.episode: Span(int(f), int(s)) for c, f, s in zip(self.claims, first, stops)}
        edges = np.flatnonzero(np.diff(np.concatenate([[0], wrong.astype(int), [0]])))
        for a, b in zip(edges[::2].tolist(), edges[1::2].tolist()):
            left, right = int(stops[a - 1]) if a else 0, int(first[b]) if b < len(first) else count
            spans |= self._shared_out(shown, range(a, b), sizes, left, right)
        return spans

    def _shared_out(
        self, shown: np.ndarray, members: range, sizes: np.ndarray, left: int, right: int
    ) -> dict[int, Span]:
        """Frames [left, right) to neighboring episodes; `problem` where another order fits the listed times better."""
        starts, fps = self._starts, self._fps
        by_number = np.array(members)
        by_time = by_number[np.argsort(starts[by_number], kind="stable")]
        places = [dict(zip(o.tolist(), left + np.cumsum(sizes[o]) - sizes[o])) for o in (by_number, by_time)]
        full = right - left == sizes[by_number].sum()

        def differs(i: int, place: dict[int, int]) -> bool:
            return abs(shown[min(place[i], len(shown) - 1)] - starts[i]) * fps >= _HALF

        better = full and sum(differs(i, places[0]) for i in members) < sum(differs(i, places[1]) for i in members)
        known = full and (better or (by_number == by_time).all())
        spans = {}
        for i in members:
            claim, at = self.claims[i], int(places[0][i])
            listed = f"it is listed at {claim.start:.3f} s, {claim.length} frames"
            if known or (full and places[0][i] == places[1][i] and not differs(i, places[0])):
                seconds = shown[min(at, len(shown) - 1)]
                note = f"{listed}; by the frames of the file and its other episodes it is at {seconds:.3f} s"
                note = note if differs(i, places[0]) else ""
                spans[claim.episode] = Span(at, at + int(sizes[i]), note, is_shared=True)
            else:
                others = f"the file has {len(shown)} frames for {int(sizes.sum())} rows of {len(sizes)} episodes"
                spans[claim.episode] = Span(0, 0, problem=f"{listed}, where others are or no frames; {others}")
        return spans


def _overlapping(first: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Which of the spans [first, stops) share a frame with another one."""
    order = np.argsort(first, kind="stable")
    ends = np.maximum.accumulate(stops[order])
    found = np.zeros(len(first), bool)
    found[order[1:]] |= first[order[1:]] < ends[:-1]
    found[order[:-1]] |= first[order[1:]] < stops[order[:-1]]
    return found


def _doubtful(first: np.ndarray, stops: np.ndarray, wrong: np.ndarray, count: int) -> np.ndarray:
    """`wrong`, and what touches no other sound span: in a file that contradicts itself, one number proves nothing."""
    touches = np.isin(first, stops[~wrong]) | np.isin(stops, first[~wrong])
    touches |= (first == 0) & (np.cumsum(wrong) == 0)
    touches |= (stops == count) & (np.cumsum(wrong[::-1])[::-1] == 0)
    return wrong | ~touches


def _fits(i: int, first: np.ndarray, stops: np.ndarray, outside: np.ndarray) -> bool:
    """Whether all episodes but `i` are where they are listed, and leave exactly its frames between its neighbors."""
    others = np.arange(len(first)) != i
    if not 0 < i < len(first) - 1 or outside[others].any() or _overlapping(first[others], stops[others]).any():
        return False
    return bool(first[i + 1] - stops[i - 1] == stops[i] - first[i])


def frames_of_rows(stored: np.ndarray, times: np.ndarray, clock: Clock, fps: float, what: str) -> np.ndarray:
    """Which of an episode's `stored` [n] frames belongs to each row: all in order where n = T, else those on which
    timestamps and `frame_index` agree. `CorruptEpisode`, beginning with `what`, where they do not."""
    rows, count = len(times), len(stored)
    if count == rows:
        return np.arange(rows)
    numbers = f"{what} has {count} frames for {rows} rows"
    if count < rows or not clock.counted:
        raise CorruptEpisode(numbers, "row-count")
    shown = stored - stored[0]
    frames = np.arange(rows) if clock.frames is None else clock.frames
    if clock.start is None:
        steady = abs(float(np.median(np.diff(shown))) * fps - 1) < 0.05
        if clock.damaged or clock.frames is None or not steady or frames[0] < 0 or frames[-1] >= count:
            raise CorruptEpisode(f"{numbers} and no timestamps that tell which are theirs", "row-count")
        return frames
    is_into_video = clock.start >= 0 and clock.start + times[-1] <= shown[-1] + 0.5 / fps
    wanted = times + clock.start if is_into_video else times
    chosen = _nearest(shown, wanted)
    off = np.abs(shown[chosen] - wanted)
    step = float(np.diff(wanted).min()) if rows > 1 else 1 / fps
    agree = np.array_equal(chosen, frames) and (off < _HALF / fps).all()
    if not agree and ((off > 0.25 * step).any() or (np.diff(chosen) <= 0).any()):
        row = int((off > 0.25 * step).argmax())
        raise CorruptEpisode(f"{numbers} and none for row {row} at {wanted[row]:.3f} s", "row-count")
    if abs(clock.start * fps - 1) < _QUARTER and count == rows + 1 and np.array_equal(frames, np.arange(rows)):
        return frames  # times of the end of each step, and a last image after the last: order and frame_index agree
    if chosen[0] != frames[0]:
        reason = f"row 0 is frame {chosen[0]} by its timestamp and frame {frames[0]} by its frame_index"
        raise CorruptEpisode(f"{numbers}: {reason}", "row-count")
    return chosen


def _nearest(ascending: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Index of the value nearest to each of `wanted`."""
    return np.searchsorted((ascending[1:] + ascending[:-1]) / 2, wanted)
