"""Settings from mappings: the types that become of them, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from dvla.common.config import from_mapping
from dvla.common.documents import read_yaml
from dvla.errors import UserError


@dataclass(frozen=True)
class Inner:
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    rate: float
    names: tuple[str, ...] = ()
    inner: Inner = Inner()
    limit: int | None = None
    weights: dict[str, float] | None = None


def test_values_take_the_types_of_their_fields(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("rate: 1e-4\nnames: [x, y]\ninner: {kind: b}\nweights: {x: 2}\n")
    assert from_mapping(Outer, read_yaml(tmp_path / "settings.yaml")) == Outer(
        1e-4, ("x", "y"), Inner("b"), None, {"x": 2.0}
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "settings: missing rate"),
        ({"rate": 1, "nmaes": []}, "settings: unknown setting 'nmaes'; did you mean 'names'"),
        ({"rate": True}, "settings.rate: expected float, got True"),
        ({"rate": "fast"}, "settings.rate: expected float, got 'fast'"),
        ({"rate": 1, "limit": True}, "settings.limit: expected int, got True"),
        ({"rate": 1, "names": "x"}, "settings.names: expected a list, got 'x'"),
        ({"rate": 1, "inner": {"kind": "c"}}, "settings.inner.kind: unknown value 'c'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(values: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        from_mapping(Outer, values)
    assert str(error.value).startswith(message)
