"""The canonical text of a document, its hash, and the fields that differ."""

from __future__ import annotations

import pytest

from dvla.common import fingerprint


def test_fingerprint_is_canonical_and_names_nested_differences() -> None:
    assert fingerprint.canonical({"b": (1, 2), "a": "é"}) == '{"a":"é","b":[1,2]}'
    assert fingerprint.digest({"a": 1, "b": 2}) == fingerprint.digest({"b": 2, "a": 1})
    assert fingerprint.digest({"a": 1, "b": 2}) != fingerprint.digest({"a": 1, "b": 3})
    a = {"x": {"y": [1, {"z": 2}], "w": None}, "same": 1.5, "list": [1]}
    b = {"x": {"y": [1, {"z": 3}], "w": None}, "same": 1.5, "list": [1, 2], "new": True}
    assert fingerprint.diff(a, a) == []
    assert fingerprint.diff(a, b) == [
        "list: cache has [1], you requested [1, 2]",
        "new: cache has no such field, you requested true",
        "x.y[1].z: cache has 2, you requested 3",
    ]
    with pytest.raises(ValueError):
        fingerprint.canonical({"a": float("nan")})
