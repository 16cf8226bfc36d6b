"""Settings from mappings: the types that become of them, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Interval

from dvla.common.config import Option, apply, from_mapping, require_ranges
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


@dataclass(frozen=True)
class Ranged:
    share: Annotated[float, Interval(gt=0, le=1)] = 0.5
    count: Annotated[int, Option("--count", help="Count."), Interval(ge=1, le=10**9)] = 1
    widths: Annotated[tuple[float, ...], Gt(0)] = ()
    steps: Annotated[dict[str, int], Ge(1)] = field(default_factory=dict)
    limit: Annotated[int | None, Ge(2)] = None
    rate: float = 0.0
    wide: int = 0

    def __post_init__(self) -> None:
        require_ranges(self)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": 0}, "settings.share is 0.0; it must be above 0 and at most 1"),
        ({"share": "1.5"}, "settings.share is 1.5; it must be above 0 and at most 1"),
        ({"count": 0}, "settings.count is 0; it must be at least 1 (--count)"),
        ({"count": 2 * 10**9}, "settings.count is 2000000000; it must be at least 1 and at most 1000000000 (--count)"),
        ({"count": 10**26}, "settings.count is 100000000000000000000000000; it must be below 2^63"),
        ({"wide": -(10**5000)}, "settings.wide is a number of thousands of digits; it must be below 2^63"),
        ({"widths": [1, 0]}, "settings.widths[1] is 0.0; it must be above 0"),
        ({"steps": {"a b": 0}}, "settings.steps['a b'] is 0; it must be at least 1"),
        ({"limit": 1}, "settings.limit is 1; it must be at least 2"),
        ({"rate": "nan"}, "settings.rate is nan; it must be a finite number"),
        ({"rate": float("-inf")}, "settings.rate is -inf; it must be a finite number"),
        ({"rate": 10**400}, "settings.rate: expected float"),
        ({"rate": "x" * 500}, f"settings.rate: expected float, got '{'x' * 58}…"),
        ({"x" * 500: 1}, f"settings: unknown setting '{'x' * 58}…'"),
    ],
)
def test_numbers_have_ranges(values: dict[Any, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        from_mapping(Ranged, values)
    assert str(error.value).startswith(message) and len(str(error.value)) < 200


def test_a_range_holds_however_the_settings_are_made() -> None:
    assert from_mapping(Ranged, {"share": 1, "count": 1, "limit": None, "widths": [1e-9]}).widths == (1e-9,)
    for made in (lambda: Ranged(share=float("nan")), lambda: Ranged(widths=(1.0, -1.0)), lambda: Ranged(count=0)):
        with pytest.raises(UserError, match="it must be"):
            made()


def test_null_is_a_value() -> None:
    assert apply({"a": {"b": 1}}, {"a.b": None, "c": 2}) == {"a": {"b": None}, "c": 2}
    with pytest.raises(UserError, match="settings.count: expected int, got None"):
        from_mapping(Ranged, apply({}, {"count": None}))


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
