"""What people write about an episode, under which names: its task text, and whether it succeeded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

SUCCESS = ("success", "is_success", "successful", "task_success", "episode_success", "succeeded")
NAMES = (  # of task texts, the most telling first
    "language_instruction",
    "natural_language_instruction",
    "instruction",
    "instructions",
    "task_instruction",
    "task_description",
    "language_goal",
    "language",
    "lang",
    "prompt",
)
VAGUE = ("task", "text", "goal", "description", "task_name")  # a text when there are several words, else a label
_NUMBERED = re.compile(r"(.+?)_?\d+")  # DROID: language_instruction, language_instruction_2, language_instruction_3
_LONGEST = 200  # characters of a name
_MAX_DEPTH = 3  # of objects in each other


def rank(name: str) -> tuple[int, str] | None:
    """Sort key of a field that may hold a task text, by its own name; None for a name that is not known for that."""
    name = name[:_LONGEST].lower()  # the pattern takes the square of it
    found = _NUMBERED.fullmatch(name)
    for known in (name, found[1] if found else ""):
        if known in NAMES or known in VAGUE:
            return (*NAMES, *VAGUE).index(known), name
    return None


def is_task(name: str, text: str) -> bool:
    """Whether a text under a known name says what to do: under a vague one, a single word is a label."""
    found = rank(name)
    return bool(text) and found is not None and (found[0] < len(NAMES) or len(text.split()) > 1)


def joined(texts: Iterable[str]) -> str:
    """The texts of an episode's rows as one: each once, in order of use, by "; "; "" where all are empty."""
    return "; ".join(dict.fromkeys(filter(None, (t.strip() for t in texts))))


def found_in(values: Mapping[Any, Any], depth: int = _MAX_DEPTH) -> str:
    """The task text in a JSON object, or in the objects inside it; "" where there is none."""
    ranked = sorted((key for key in values if isinstance(key, str) and rank(key)), key=lambda k: rank(k) or (0, ""))
    for key in ranked:
        text = plain(values[key])
        if is_task(key, text):
            return text
    inside = (found_in(v, depth - 1) for v in values.values() if isinstance(v, dict) and depth)
    return next(filter(None, inside), "")


def plain(value: Any) -> str:
    """A text out of JSON: LIBERO writes a list of its letters, in quotes. "" for what is no text."""
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        value = "".join(value) if all(len(v) == 1 for v in value) else value[0]
    return value.strip().strip('"').strip() if isinstance(value, str) else ""


def truth(value: Any) -> bool | None:
    """A flag as people write it: true, 1, "success", "yes"; None for what is neither true nor false."""
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(-1)[0]
    if isinstance(value, (bool, int, float, np.bool_, np.number)):
        return bool(value) if value == value else None
    word = (value.decode(errors="replace") if isinstance(value, bytes) else str(value)).strip().lower()
    yes, no = ("true", "1", "yes", "y", "success", "successful"), ("false", "0", "no", "n", "failure", "failed", "fail")
    return True if word in yes else False if word in no else None
