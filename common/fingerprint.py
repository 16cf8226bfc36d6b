"""What a cache's content depends on, as one JSON document: its canonical text, its hash, and the fields that differ.

In a fingerprint: everything that changes the bytes (weights, processor, resolution, prompt, schema versions, source
hashes). Never in it: output paths, host, worker count, date.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

_ABSENT = object()


def canonical(document: dict[str, Any]) -> str:
    """The one JSON text of a document: sorted keys, no spaces, tuples as lists. `ValueError` for NaN or infinity."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(document: dict[str, Any]) -> str:
    """sha256 (hex) of the canonical text."""
    return hashlib.sha256(canonical(document).encode()).hexdigest()


def diff(
    cached: dict[str, Any], asked: dict[str, Any], was: str = "cache has", now: str = "you requested"
) -> list[str]:
    """One line per differing field, sorted by name; empty when equal. `was`, `now`: the words before each value.

    >>> diff({"encoder": {"resolution": 448}}, {"encoder": {"resolution": 224}})
    ['encoder.resolution: cache has 448, you requested 224']
    """
    return [
        f"{where}: {was} {_short(a)}, {now} {_short(b)}"
        for where, a, b in _diff(json.loads(canonical(cached)), json.loads(canonical(asked)), "")
    ]


def _diff(a: Any, b: Any, where: str) -> list[tuple[str, Any, Any]]:
    """(field, its value in a, its value in b) of those that differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            found
            for key in sorted(a.keys() | b.keys())
            for found in _diff(a.get(key, _ABSENT), b.get(key, _ABSENT), f"{where}.{key}" if where else key)
        ]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [found for i, (x, y) in enumerate(zip(a, b)) for found in _diff(x, y, f"{where}[{i}]")]
    if type(a) is type(b) and a == b:
        return []
    return [(where, a, b)]


def _short(value: Any) -> str:
    if value is _ABSENT:
        return "no such field"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    return text if len(text) <= 60 else f"{text[:57]}…"
