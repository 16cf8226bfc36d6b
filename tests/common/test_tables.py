"""Every table fits 80 columns and cuts nothing off: its least important columns go, then words are folded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dvla.cache.readers import open_source
from dvla.cache.readers.search import config_names, load_config
from dvla.common import console as console_module
from dvla.common.console import console, table
from dvla.common.doctor.doctor import Finding, doctor_table
from dvla.stages.data import tables as data
from dvla.stages.serving.latency import latency_table
from dvla.stages.simulation.tables import success_table

ROW = {
    "success": 1.0,
    "episodes": 100,
    "ci95": (0.95, 1.0),
    "expert": 1.0,
    "random": 0.0,
    "blind": 0.05,
    "mean_return": 1234.5,
    "ms_per_action": 3.2,
    "ms_per_chunk": 12.3,
}
TASKS = ("metaworld/push-v3", "metaworld/button-press-topdown-v3")


@pytest.fixture(params=[80, 120])
def width(request: pytest.FixtureRequest) -> Iterator[int]:
    before = console.width
    console.width = request.param
    yield request.param
    console.width = before


def lines(found: Any, width: int) -> list[str]:
    with console.capture() as capture:
        console.print(found)
    shown = [line.rstrip() for line in capture.get().splitlines()]
    assert max(map(len, shown)) <= width and not any("…" in line for line in shown), shown
    return shown


def test_success_rates(width: int) -> None:
    policies = ("stage two", "with LoRA")
    shown = lines(success_table({name: {"tasks": dict.fromkeys(TASKS, ROW)} for name in policies}), width)
    assert len(shown) == 2 + 4 or width == 80
    text = "\n".join(shown)
    for word in ("push-v3", "button-press-topdow", "100% of 100", "95% – 100%", "expert", "random", "blind"):
        assert word in text
    assert "metaworld" not in text and ("ms/chunk" in text) == (width == 120)


def test_what_the_doctor_says(width: int) -> None:
    found = [
        Finding("torch", "2.10.0", "", ""),
        Finding("mani-skill", None, "no ManiSkill tasks", "pip install 'dvla[maniskill]', see docs/simulators.md"),
    ]
    assert "missing" in "".join(lines(doctor_table(found), width))


def test_latency(width: int) -> None:
    rows = [
        {"part": "a new instruction's text", "batch": n, "p50": 1234.5, "p90": 2345.6, "p99": 3456.7}
        for n in (1, 8, 64)
    ]
    assert len(lines(latency_table({"rows": rows}), width)) == 5


def test_datasets(width: int, recorded: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    data.show_families([load_config(name) for name in config_names()])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= width
    source = open_source(str(recorded["h264"]))
    episode = source.load(source.episode_ids[0])
    for name, mapping, values in (
        ("action", source.action_map, episode.action),
        ("state", source.state_map, episode.state),
    ):
        assert "native → unified" in "".join(lines(data.field_table(name, mapping, None), width))
        assert "first" in "".join(lines(data.values_table(name, mapping, None, values), width))
    quantiles = dict.fromkeys(data.SHOWN_QUANTILES, -1.2345e-05)
    field = {
        "unit": "rad",
        "count": 100000,
        "quantiles": quantiles,
        **dict.fromkeys(("mean", "std", "min", "max"), -1.2e-5),
    }
    text = "".join(lines(data.statistics_table("action", {"left_dex_finger_joint_5_pos": field}), width))
    assert "mean" in text and "max" in text and ("q0.01" in text) == (width == 120)


def test_columns_go_before_words_fold(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    assert console_module.console is console
    head, rows = ("name", "note", "extra"), [("x" * 30, "y " * 30, "z" * 30)]
    shown = "".join(lines(table(head, rows, drop=("extra",)), width))
    assert ("extra" in shown) == (width == 120) and "x" * 30 in shown
    assert shown.count("y") == 30


def test_what_files_contain_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Square brackets are no markup, and nothing that a terminal would obey gets through."""
    name = "[red]cup[/red] [/] \x1b[2J\x9b31m\x07 \u202edlo \udcff"
    shown = "[red]cup[/red] [/] �[2J�31m� �dlo �"
    console.print(table((name, "b"), [(name, name)], name))
    console_module.say(name)
    printed = capsys.readouterr().out
    assert printed.count(shown) == 5 and not set(printed) & set("\x1b\x9b\x07\u202e\udcff")
