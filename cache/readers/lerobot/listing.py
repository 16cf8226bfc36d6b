"""The lists of `meta/`: tasks and episodes, of every version, as plain entries. One bad line costs one entry."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ....errors import Kind, Note, UserError
from ..labels import SUCCESS, truth
from ..location import Location
from .documents import Line, Template, number, read_lines, read_rows, shown, whole
from .documents import field as whole_field

_TEXT_COLUMNS = ("task", "__index_level_0__", "tasks", "instruction", "language_instruction", "task_description")
_MOST_TIMES = 100  # that one episode is listed: each is compared with the others
_NO_INSTRUCTIONS = ("valid", "invalid")  # GR00T's marks of an episode, kept among the tasks


@dataclass(frozen=True)
class EpisodeEntry:
    """One listed episode: where its rows and images are (paths relative to the dataset)."""

    length: int | None  # rows; None where the list does not tell, and the rows have to
    tasks: tuple[str, ...]  # as listed; the rows decide which of them are used
    data_path: str
    video_paths: Mapping[str, str]  # video key → file
    video_starts: Mapping[str, float]  # video key → seconds into that file at which the episode begins
    video_ends: Mapping[str, float] = field(default_factory=dict)  # and ends, where that is listed (v3.0)
    rows: tuple[int, int] | None = None  # [from, to) among all rows, where that is listed (v3.0)
    success: bool | None = None  # whether the demonstration succeeded, where that is listed


@dataclass
class Listing:
    """What a dataset lists."""

    tasks: dict[int, str] = field(default_factory=dict)  # task_index → text, "" where it has none
    entries: dict[int, EpisodeEntry] = field(default_factory=dict)
    damaged: dict[int, tuple[Kind, str]] = field(default_factory=dict)  # episode → why its entry cannot be used
    notes: list[Note] = field(default_factory=list)


def usable_texts(values: Any, tasks: Mapping[int, str]) -> tuple[str, ...]:
    """The instructions in a `tasks` entry: a list or one text, of texts or of indices into `tasks`; each once."""
    values = values if isinstance(values, (list, tuple)) else [values]
    texts = [tasks.get(v, "") if isinstance(v, int) else as_text(v) for v in values]
    return tuple(dict.fromkeys(t for t in texts if is_instruction(t)))


def as_text(value: Any) -> str:
    """A text, also one stored as bytes; "" for anything else."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if isinstance(value, str) else ""


def is_instruction(text: str) -> bool:
    """Whether a task's text says what to do."""
    return bool(text.strip()) and text.strip().casefold() not in _NO_INSTRUCTIONS


# --- tasks ------------------------------------------------------------------------------------------------------------


def read_tasks(location: Location, listing: Listing) -> None:
    """Fill `listing.tasks` from tasks.parquet or tasks.jsonl; without either, the episodes' own texts have to do.

    `UserError` when the file is there and cannot be read at all.
    """
    meta = location.root / "meta"
    for name in ("tasks.parquet", "tasks.jsonl"):
        path = meta / name
        if os.path.lexists(path):
            break
    else:
        listing.notes.append(Note("tasks-missing", "meta/ has no tasks file; the texts are those of the episode list"))
        return
    try:
        lines = read_lines(path) if name == "tasks.jsonl" else read_rows(path, location.root)
    except ValueError as error:
        raise UserError(f"{location.given}: meta/{error}") from None
    note_odd_bytes(lines, listing)
    rows = [line.value for line in lines if line.value is not None]
    column = _text_column(rows)
    if rows and column is None:
        names = ", ".join(rows[0])
        listing.notes.append(Note("task-column", f"meta/{name} has no column of texts (columns: {names}): not used"))
        return
    texts: dict[int, set[str]] = {}
    for position, line in enumerate(lines):
        try:
            if line.value is None:
                raise ValueError(line.problem)
            index = whole_field(line.value, "task_index") if "task_index" in line.value else position
            text = line.value.get(column or "")
            found = text if isinstance(text, (list, tuple)) else [text]
            texts.setdefault(index, set()).add("; ".join(filter(None, map(as_text, found))))
        except ValueError as error:
            listing.notes.append(Note("task-unreadable", f"{line.where} {error}"))
    for index, different in texts.items():
        if len(different) > 1:
            both = " and ".join(map(shown, sorted(different)))
            listing.notes.append(Note("task-twice", f"meta/{name} gives task_index {index} the texts {both}"))
        else:
            listing.tasks[index] = different.pop()


def _text_column(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The column of the texts: by its name, else the only one that holds texts."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    known = [name for name in _TEXT_COLUMNS if name in names]
    others = [n for n in names if n != "task_index" and any(as_text(row.get(n)) for row in rows)]
    return known[0] if known else others[0] if len(others) == 1 else None


def note_odd_bytes(lines: Iterable[Line], listing: Listing) -> None:
    """A note about lines that are no UTF-8."""
    odd = [line.where for line in lines if line.odd_bytes]
    if odd:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        listing.notes.append(Note("text-encoding", f"{odd[0]}{more} is not UTF-8; it was read as Windows-1252"))


# --- episodes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paths:
    """How info.json says where files are."""

    data: Template
    video: Template | None  # None: no video
    video_keys: tuple[str, ...]
    chunks_size: int

    def entry_v2(self, number: int, length: int | None, tasks: tuple[str, ...]) -> EpisodeEntry:
        """An episode that has files of its own."""
        chunk = number // self.chunks_size
        values = {"episode_index": number, "episode_chunk": chunk, "chunk_index": chunk}
        videos = {k: self.video.fill(video_key=k, **values) for k in self.video_keys} if self.video else {}
        return EpisodeEntry(length, tasks, self.data.fill(**values), videos, dict.fromkeys(videos, 0.0))

    def entry_v3(self, row: Mapping[str, Any], tasks: tuple[str, ...]) -> EpisodeEntry:
        """An episode of a row of meta/episodes; a camera without a file in it has no video path."""
        ends, starts, videos = {}, {}, {}
        for key, (start, end) in self._times.items():
            if _is_empty(row.get(start)) or _is_empty(row.get(f"videos/{key}/file_index")):
                continue
            videos[key] = self._path(key, row)
            starts[key] = _seconds(row, start)
            if not _is_empty(row.get(end)):
                ends[key] = _seconds(row, end)
        bounds = row.get("dataset_from_index"), row.get("dataset_to_index")
        span = None if any(map(_is_empty, bounds)) else (whole(bounds[0]), whole(bounds[1]))
        return EpisodeEntry(_length(row), tasks, self._path("", row), videos, starts, ends, span)

    @functools.cached_property
    def _times(self) -> dict[str, tuple[str, str]]:
        return {k: (f"videos/{k}/from_timestamp", f"videos/{k}/to_timestamp") for k in self.video_keys if self.video}

    @functools.cached_property
    def _filled(self) -> dict[tuple[str, int, int], str]:
        return {}

    def _path(self, key: str, row: Mapping[str, Any]) -> str:
        """The file of a camera, or of the rows (""), that many episodes share."""
        of = f"videos/{key}" if key else "data"
        chunk, file = whole_field(row, f"{of}/chunk_index"), whole_field(row, f"{of}/file_index")
        wanted = key, chunk, file
        if wanted not in self._filled:
            template, named = (self.video, {"video_key": key}) if key and self.video else (self.data, {})
            self._filled[wanted] = template.fill(chunk_index=chunk, file_index=file, **named)
        return self._filled[wanted]


def _length(row: Mapping[str, Any]) -> int | None:
    return None if _is_empty(row.get("length")) else whole_field(row, "length")


def _seconds(row: Mapping[str, Any], name: str) -> float:
    try:
        return number(row[name])
    except ValueError as error:
        raise ValueError(f"'{name}' {error}") from None


def _is_empty(value: Any) -> bool:
    return value is None or isinstance(value, float) and value != value  # NaN, as pandas writes it


def read_episodes(location: Location, paths: Paths, is_v3: bool, total: int, listing: Listing) -> None:
    """Fill `listing.entries` and `listing.damaged`; `UserError` when the list cannot be read at all."""
    lines = _v3_lines(location, total, listing) if is_v3 else _v2_lines(location)
    note_odd_bytes(lines, listing)
    found: dict[int, list[tuple[str, EpisodeEntry | str]]] = {}
    for position, line in enumerate(lines):
        episode: int | None = None
        try:
            if line.value is None:
                raise ValueError(line.problem)
            row = line.value
            episode = whole_field(row, "episode_index")
            tasks = usable_texts(row.get("tasks", row.get("task")), listing.tasks)
            read = paths.entry_v3(row, tasks) if is_v3 else paths.entry_v2(episode, _length(row), tasks)
            mark = next((name for name in SUCCESS if row.get(name) is not None), None)
            entry: EpisodeEntry | str = read if mark is None else dataclasses.replace(read, success=truth(row[mark]))
        except ValueError as error:
            entry = f"{line.where} {error}"
            if episode is None:
                named = re.search(r'"episode_index"\s*:\s*(\d{1,9})\b', line.text)
                episode = int(named[1]) if named else position
        found.setdefault(episode, []).append((line.where, entry))
    for episode, candidates in found.items():
        _settle(episode, candidates, listing)


def _settle(episode: int, candidates: Sequence[tuple[str, EpisodeEntry | str]], listing: Listing) -> None:
    """Keep the one entry of an episode. Several that differ in its length leave that to the rows, where not just one
    agrees with itself; several in different places damage it."""
    if len(candidates) > _MOST_TIMES:
        listing.damaged[episode] = "unusable-episode", f"it is listed {len(candidates)} times"
        return
    readable = [(where, e) for where, e in candidates if isinstance(e, EpisodeEntry)]
    different = [e for i, (_, e) in enumerate(readable) if e not in [x for _, x in readable[:i]]]
    if len(different) == 1:
        listing.entries[episode] = different[0]
        listing.notes += [Note("entry-unreadable", str(e)) for _, e in candidates if not isinstance(e, EpisodeEntry)]
    elif different:
        lengths = " and ".join(f"{e.length} frames ({where})" for where, e in readable[:2])
        told = f"it is listed {len(readable)} times: {lengths}"
        sound = [e for e in different if e.rows is not None and e.rows[1] - e.rows[0] == e.length]
        places = [dataclasses.replace(e, length=None, tasks=(), video_ends={}, rows=None) for e in different]
        if all(place == places[0] for place in places):
            unsure = dataclasses.replace(different[-1], length=None, video_ends={}, rows=None)
            listing.entries[episode] = sound[0] if len(sound) == 1 else unsure
            listing.notes.append(Note("entry-twice", f"episode {episode}: {told}; the rows decide"))
        else:
            listing.damaged[episode] = "unusable-episode", told
    else:
        listing.damaged[episode] = "unusable-episode", str(candidates[0][1])


def _v2_lines(location: Location) -> list[Line]:
    path = location.root / "meta" / "episodes.jsonl"
    if not os.path.lexists(path):
        return []
    try:
        return read_lines(path)
    except ValueError as error:
        raise UserError(f"{location.given}: meta/{error}") from None


def _v3_lines(location: Location, total: int, listing: Listing) -> list[Line]:
    """Rows of every file of meta/episodes; the episodes of a file that cannot be read are damaged, if others can."""
    lines, problems = [], []
    files = sorted((location.root / "meta" / "episodes").rglob("*.parquet"))
    for path in (p for p in files if not p.name.startswith(".")):  # as macOS leaves beside a file
        try:
            lines += read_rows(path, location.root, skip="stats/")
        except ValueError as error:
            problems.append(f"{path.parent.relative_to(location.root).as_posix()}/{error}")
    if problems and not lines:
        raise UserError(f"{location.given}: {problems[0]}")
    if problems:
        listed = {line.value.get("episode_index") for line in lines if line.value is not None}
        lost = [episode for episode in range(total) if episode not in listed]
        listing.damaged |= dict.fromkeys(lost, ("unreadable-file", problems[0]))
        listing.notes += [Note("list-unreadable", f"{problem}; its episodes are not listed") for problem in problems]
    return lines
