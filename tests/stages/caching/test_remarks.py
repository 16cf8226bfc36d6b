"""What a build says of the numbers that it stores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dvla.stages.caching.sources import read_corpus
from support.doctor_samples import MemorySource, Record, config, records


def remarks(change: Callable[[list[Record]], None], **changes: Any) -> list[str]:
    made = records()
    change(made)
    source = MemorySource(made, config(False, **changes))
    return [line for line in read_corpus(source, False, lambda *_: None).remarks() if "instruction" not in line]


def rarely_closed(made: list[Record]) -> None:
    for record in made:
        record.action[:, 10] = 1.0
    made[1].action[30:32, 10] = 0.0


def glitching(made: list[Record]) -> None:
    made[4].state[7, 2] = -1e5


def test_a_healthy_dataset_needs_no_remark() -> None:
    assert remarks(lambda _: None) == []


def test_a_glitch_is_named_with_its_row() -> None:
    (line,) = remarks(glitching)
    assert line.startswith("memory: state arm_joint_2_pos is -1e+05 at episode 4 row 7, ")
    assert line.endswith("; std5 reaches up to it; leave it out with --exclude-episodes memory=4") and len(line) < 200
    assert "reaches" not in remarks(glitching, normalize="quantile")[0]


@pytest.mark.parametrize(("scheme", "count"), [(None, 0), ("std5-clipped", 1), ("minmax", 0)])
def test_what_the_config_s_normalization_cuts_off(scheme: str | None, count: int) -> None:
    lines = remarks(rarely_closed, normalize=scheme)
    assert len(lines) == count and all("0.56 % of action gripper_open is beyond the range" in line for line in lines)


def test_a_config_without_normalization_is_stored_as_before() -> None:
    assert "normalize" not in config(False).document()
    assert config(False, normalize="minmax").document()["normalize"] == "minmax"


def test_episodes_without_an_instruction_are_counted() -> None:
    made = records()
    for record in made[:2]:
        record.text = ""
    source = MemorySource(made, config(False))
    (line,) = [x for x in read_corpus(source, False, lambda *_: None).remarks() if "instruction" in x]
    assert line.startswith(f"memory: 2 of {len(made)} episodes (")
