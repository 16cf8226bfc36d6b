"""Options of a command are made from the dataclass that holds its settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from annotated_types import Ge, Interval

from dvla.common.config import Option, from_dotted
from dvla.common.options import Command, Given, Options, Set, parse_set, run_command, with_options
from dvla.errors import UserError


@dataclass(frozen=True)
class Engine:
    power: Annotated[float, Option("--power", help="Power in kW."), Interval(ge=0, le=10**6)] = 55.0
    fuel: Annotated[Literal["petrol", "diesel"], Option("--fuel", help="Fuel: petrol or diesel.")] = "petrol"


@dataclass(frozen=True)
class Car:
    name: Annotated[str, Option("--name", "-n", help="Name of the car.")]
    engine: Engine = field(default_factory=Engine)
    seats: Annotated[int, Option("--seats", "--places", help="Seats.")] = 4
    extras: Annotated[tuple[str, ...], Option("--extra", help="Extra; may be given several times.")] = ()
    folder: Annotated[str | None, Option("--folder", help="Where it is kept.", type=Path)] = None
    electric: Annotated[bool, Option("--electric", help="Electric.")] = False
    wheels: int = 4  # no option of its own


SEEN: list[Any] = []


def make(
    car: Annotated[Given, Options(Car, "engine.power who name seats other.fuel extras folder electric")],
    other: Annotated[Given, Options(Engine)],
    who: Annotated[str, typer.Option("--who", help="Driver.")] = "nobody",
    age: Annotated[int | None, typer.Option("--age", help="Age of the driver."), Interval(ge=18, le=120)] = None,
    height: Annotated[float, typer.Option("--height", help="Height in m.")] = 1.8,
    sizes: Annotated[list[int] | None, typer.Option("--size", help="Sizes."), Ge(0)] = None,
) -> None:
    """Make a car."""
    SEEN[:] = car, other, who


def change(car: Annotated[Given, Options(Car, "name seats electric", defaults=False)], set_: Set = None) -> None:
    """Change a car."""
    SEEN[:] = [car | parse_set(set_)]


APP = typer.Typer()
for command in (make, change):
    APP.command(cls=Command)(with_options(command))


def ran(*words: str) -> list[Any]:
    run_command(typer.main.get_command(APP), words)
    return SEEN


def test_options_have_names_defaults_and_order() -> None:
    options = typer.main.get_command(APP).commands["make"].params
    assert [o.opts for o in options] == [
        ["--power"],
        ["--who"],
        ["--name", "-n"],
        ["--seats", "--places"],
        ["--fuel"],
        ["--extra"],
        ["--folder"],
        ["--electric"],
        ["--age"],
        ["--height"],
        ["--size"],
    ]
    assert [o.default for o in options] == [55.0, "nobody", None, 4, "petrol", None, None, False, None, 1.8, None]
    assert [o.required for o in options] == [False, False, True, *[False] * 8]
    assert options[3].help == "Seats."
    assert options[0].help == "Power in kW (at least 0)."
    assert options[8].help == "Age of the driver (at least 18 and at most 120)."


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--age", "17"], "--age is 17; it must be at least 18 and at most 120"),
        (["--size", "1", "--size", "-2"], "--size\\[1\\] is -2; it must be at least 0"),
        (["--height", "nan"], "--height is nan; it must be a number below 2.63"),
        (["--seats", "1" + "0" * 26], "--seats is 10+; it must be a number below 2.63"),
        (["--who", "caf\udce9"], r"'caf\\udce9' is not text in UTF-8"),
        (["--bogus=\udce9"], "is not text in UTF-8"),
    ],
)
def test_numbers_and_texts_that_no_option_can_mean(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ran("make", "-n", "Ada", *words)


def test_a_command_is_given_its_settings() -> None:
    car, other, who = ran("make", "-n", "Ada", "--extra", "roof", "--extra", "bell", "--folder", "a/b", "--who", "me")
    assert car == {
        "name": "Ada",
        "engine.power": 55.0,
        "seats": 4,
        "extras": ["roof", "bell"],
        "folder": Path("a/b"),
        "electric": False,
    }
    assert (other, who) == ({"fuel": "petrol"}, "me")
    made = from_dotted(Car, car | {"folder": "a/b"})
    assert made.engine == Engine() and made.extras == ("roof", "bell")


def test_what_is_not_given_is_left_to_the_recipe() -> None:
    assert ran("change", "--name", "Ada") == [{"name": "Ada"}]
    assert ran("change", "--name", "Ada", "--electric", "--places", "2") == [
        {"name": "Ada", "electric": True, "seats": 2}
    ]


def test_every_setting_is_an_option_where_there_is_set() -> None:
    assert ran("change", "--name=Ada", "--engine.power=1e1", "--wheels=3", "--set", "seats=1") == [
        {"name": "Ada", "engine.power": "1e1", "wheels": 3, "seats": 1}
    ]
    for words in (("make", "-n", "Ada", "--wheels=3"), ("change", "--name=Ada", "--wheels", "3")):
        with pytest.raises(UserError, match="No such option: --wheels"):
            ran(*words)
    with pytest.raises(UserError, match="unknown setting 'weels'; did you mean 'wheels'"):
        from_dotted(Car, ran("change", "--name=Ada", "--weels=3")[0])
