"""The instruction of an episode: its rows' `task_index` decides; other columns and `meta/` help if it says nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from ....errors import Note
from ..episode import CorruptEpisode
from .documents import shown
from .listing import EpisodeEntry, as_text, usable_texts

_TEXTS = re.compile(
    r"annotation\..*|language_instruction.*|(natural_)?(instruction|language)|task(_description)?|prompt|subtask"
)
_SKIPPED = re.compile(r"annotation\..*validity.*")


def text_columns(features: Iterable[str], annotations: Mapping[str, str] | None) -> tuple[str, ...]:
    """Columns of rows that may hold instructions besides `task_index`, as texts or as indices of tasks, best first:
    GR00T's task descriptions, its other annotations, then those that other converters write."""
    named = [n for n in (annotations or {}).values() if n != "task_index" and "validity" not in n]
    found = dict.fromkeys([*named, *(k for k in features if _TEXTS.fullmatch(k) and not _SKIPPED.fullmatch(k))])
    return tuple(sorted(found, key=lambda n: (n == "subtask", "task_description" not in n, n not in named, n)))


def instruction_of(
    rows: pa.Table, entry: EpisodeEntry, tasks: Mapping[int, str], others: Sequence[str], where: str
) -> tuple[str, tuple[Note, ...]]:
    """The text of one episode's rows, several joined by "; " in the order of their use; "" where there is none.

    `CorruptEpisode`, beginning with `where`, when they point at a task that does not exist and nothing else tells.
    """
    used, listed = _values(rows, "task_index"), "; ".join(entry.tasks)
    texts = usable_texts(used, tasks)
    for column in others if not texts else ():
        if found := usable_texts(_values(rows, column), tasks):
            return "; ".join(found), ()
    unknown = [n for n in used if n not in tasks] if tasks else []
    if not texts and not listed and unknown:
        raise CorruptEpisode(f"{where}: task_index {unknown[0]} is not among the {len(tasks)} tasks of meta/")
    if not texts and listed:
        note = f"task_index {used[0] if used else ''} has no text in meta/; the one that the episode lists is used"
        return listed, (Note("task-unknown", f"{note}, {shown(listed)}"),) if used and tasks else ()
    text, notes = "; ".join(texts), []
    if unknown:
        notes.append(Note("task-unknown", f"task_index {shown(unknown[0])} of some rows is no task of meta/"))
    if listed and set(texts) != set(entry.tasks):
        differs = f"the rows' task is {shown(text)}, which is used; meta/ lists {shown(listed)}"
        notes.append(Note("task-differs", differs))
    return text, tuple(notes)


def _values(rows: pa.Table, column: str) -> list[Any]:
    """The different values of a column in order, those that stand in a list too; whole numbers as int, no null."""
    if column not in rows.column_names:
        return []
    values = rows[column]
    if pa.types.is_struct(values.type) or pa.types.is_map(values.type):
        return []
    while (
        pa.types.is_list(values.type) or pa.types.is_large_list(values.type) or pa.types.is_fixed_size_list(values.type)
    ):
        values = pa.chunked_array([chunk.flatten() for chunk in values.chunks], values.type.value_type)
    found = [v for v in values.unique().to_pylist() if v is not None]
    is_index = column == "task_index"  # one in a text, too
    return [
        int(v) if isinstance(v, float) and v.is_integer() or is_index and as_text(v).isdecimal() else v for v in found
    ]
