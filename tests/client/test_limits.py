"""Limits of actions and states, as the server's metadata tells them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dvla_client import ClientError, Limits

ABOUT: dict[str, Any] = {
    "actions": ["x", "turn", "grip"],
    "state": ["x", "grip"],
    "limits": {
        "action": {"low": [-1, None, 0], "high": [1, None, 1], "step": [0.5, None, 1]},
        "state": {"low": [-1, None], "high": [3, None]},
    },
}


def act(mode: str, action: list[float], before: list[float] | None = None) -> tuple[list[float], str]:
    last = None if before is None else np.array(before)
    found, line = Limits(ABOUT, mode, margin=0.0).apply(np.array(action, np.float32), last)
    return found.tolist(), line


@pytest.mark.parametrize(
    ("action", "before", "expected"),
    [
        ([0.5, 99, 1], None, [0.5, 99, 1]),
        ([1.5, 99, 1], None, [1, 99, 1]),
        ([-9, -9, 2], None, [-1, -9, 1]),
        ([1, 0, 0], [0, 0, 0], [0.5, 0, 0]),
        ([-1, 0, 0], [0, 0, 1], [-0.5, 0, 0]),
        ([0, 0, 0], [-4, 0, 0], [-0.5, 0, 0]),  # from outside it comes back inside at once
        ([0, 0, 0], [0.4, 7, 0], [0, 0, 0]),
    ],
)
def test_clip_and_stop(action: list[float], before: list[float] | None, expected: list[float]) -> None:
    found, line = act("clip", action, before)
    assert found == expected and bool(line) == (found != action)
    if line:
        assert "its limits are" in line and "\n" not in line
        with pytest.raises(ClientError, match=line.replace("(", r"\(")):
            act("stop", action, before)
    else:
        assert act("stop", action, before) == (action, "")


def test_a_margin_is_a_share_of_the_range_and_of_the_step() -> None:
    limits = Limits(ABOUT, "clip", margin=0.1)
    assert limits.low[0] == pytest.approx(-1.2) and limits.high[2] == pytest.approx(1.1)
    assert limits.step[0] == pytest.approx(0.55) and limits.high[1] == np.inf == -limits.low[1]


@pytest.mark.parametrize("mode", ["clip", "stop"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_actions_that_are_not_finite_are_never_given(mode: str, bad: float) -> None:
    with pytest.raises(ClientError, match="action 'turn' is not a finite number"):
        act(mode, [0, bad, 0])


def test_states() -> None:
    limits = Limits(ABOUT)
    limits.require_state([0, 1e9])
    limits.require_state(np.array([4.9, 0], np.float32))
    for state, words in (
        ([5.1, 0], "state 'x' is 5.1, and the policy knows -3 to 5"),
        ([np.nan, 0], "state 'x' is nan"),
        ([0, np.inf], "state 'grip' is inf"),
        ([0], "has 1 numbers, the robot's has 2"),
    ):
        with pytest.raises(ClientError, match=words):
            limits.require_state(state)


def test_a_server_without_limits_has_none() -> None:
    for about in ({**ABOUT, "limits": None}, {k: v for k, v in ABOUT.items() if k != "limits"}):
        limits = Limits(about, "stop", margin=0.0)
        assert limits.apply(np.full(3, 1e9), np.zeros(3))[1] == ""
        limits.require_state([1e9, -1e9])


def test_a_chunk_is_clipped_step_by_step() -> None:
    chunk = np.array([[0, 0, 0], [1, 0, 0], [1, 0, 0]], np.float32)
    found = Limits(ABOUT, "clip", margin=0.0).chunk(chunk)
    assert found[:, 0].tolist() == [0, 0.5, 1.0] and found.dtype == np.float32


@pytest.mark.parametrize(("mode", "margin"), [("warn", 0.1), ("clip", -1), ("clip", np.nan), ("stop", np.inf)])
def test_settings_out_of_range_are_refused(mode: str, margin: float) -> None:
    with pytest.raises(ClientError, match="clip or stop"):
        Limits(ABOUT, mode, margin)


def test_limits_of_another_width_are_refused() -> None:
    with pytest.raises(ClientError, match="limits have 2 dimensions, expected 3"):
        Limits({**ABOUT, "limits": {"action": {"low": [0, 0], "high": [0, 0]}}})
