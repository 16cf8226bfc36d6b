"""A robot of the tests at 50 Hz, in time of its own: a policy server that answers late, fails, or says nothing.

An action is the number of the tick that it is for, so that a robot that gets another one is seen at once.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from dvla_client import ClientError, ControlLoop, Limits, PolicyClient, link

HZ, NEVER = 50, 10**9
ABOUT: dict[str, Any] = {"state": ["x"], "actions": ["x", "y"], "control_hz": HZ, "horizon": 16, "execute": None}


class Server(PolicyClient):
    """A client whose server answers `latency` ticks after it is asked; `broken`: ticks at which it cannot be reached,
    `silent`: at which it does not answer."""

    def __init__(self, latency: int, about: dict[str, Any], broken: range = range(0), silent: range = range(0)) -> None:
        self.metadata, self.latency, self.broken, self.silent = about, latency, broken, silent
        self.tick, self.here, self.seen, self.gone = 0, True, list[dict[str, Any]](), False
        self.chunk = lambda tick, horizon: np.arange(tick, tick + horizon, dtype=np.float32)

    @property
    def connected(self) -> bool:
        return self.here

    def connect(self) -> None:
        self.here = self.tick not in self.broken
        if not self.here:
            raise ClientError("cannot connect")

    def close(self) -> None:
        self.gone, self.here = True, False

    def infer(self, observation: Any) -> dict[str, Any]:
        self.seen.append(observation)
        if len(observation) == 1:
            return dict(observation)
        if not observation.get("act", True):
            return {}
        asked = int(observation["tick"])
        while self.tick < asked + self.latency and not self.gone:
            if self.tick in self.broken:
                self.here = False
                raise ClientError("closed the connection")
            time.sleep(1e-4)
        while self.tick in self.silent and not self.gone:
            time.sleep(1e-4)
        if self.tick in self.broken or self.gone:
            self.here = False
            raise ClientError("closed the connection")
        steps = self.chunk(asked, self.metadata["horizon"])
        return {"actions": np.stack([steps, -steps], axis=1)}


class Robot(ControlLoop):
    """The loop on a clock that stands still while the loop works; `log`: what the robot got at each tick."""

    def __init__(
        self, latency: int = 2, *, broken: range = range(0), silent: range = range(0), **settings: Any
    ) -> None:
        about = {**ABOUT, **settings.pop("about", {})}
        self.server, self.log, self.said = Server(latency, about, broken, silent), list[Any](), list[str]()
        self.time, self.slow = 1e6, dict[int, float]()  # seconds that reading takes at a tick
        settings = {"read": self.look, "act": self.take, "hold": self.rest, "say": self.said.append} | settings
        super().__init__(self.server, **settings)

    def look(self) -> dict[str, Any]:
        self.time += self.slow.get(self.report.ticks, 0)
        return {"tick": self.report.ticks, "state": np.zeros(1)}

    def take(self, action: np.ndarray) -> None:
        self.log.append(float(action[0]))
        assert action[1] == -action[0]

    def rest(self) -> None:
        self.log.append(None)

    def _now(self) -> float:
        return self.time

    def _sleep(self, seconds: float) -> None:
        self.time += max(seconds, 0)
        self.server.tick = tick = self.report.ticks
        end, server = time.monotonic() + 10, self.server
        due = self._flying and (self._asked + server.latency <= tick or tick in server.broken)
        while due and tick not in server.silent and not self._link.answers.qsize():
            assert time.monotonic() < end
            time.sleep(1e-4)


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "PAUSE", 0)


def require_sound(robot: Robot, ticks: int) -> None:
    """Every tick has its own action or none, and is counted once; at the end the robot holds."""
    report, log = robot.report, robot.log
    assert len(log) == ticks + 1 and log[-1] is None
    assert all(value is None or value == tick for tick, value in enumerate(log[:-1]))
    acted = sum(value is not None for value in log)
    assert (report.ticks, report.acted, report.idle + report.waited) == (ticks, acted, ticks - acted)


@pytest.mark.parametrize("latency", range(7))
def test_no_tick_is_lost_or_doubled(latency: int) -> None:
    robot = Robot(latency)
    report = robot.run(ticks=150)
    require_sound(robot, 150)
    delay = max(latency, 1)  # an answer is taken in at the next tick at the earliest
    assert (report.waited, report.idle, report.ended) == (delay, 0, "done") and set(report.delays) == {delay}
    sent = [seen["d"] for seen in robot.server.seen[1:]]
    assert robot.server.seen[0] == {"reset": True} and sent[0] == 1 and set(sent[1:]) == {delay}
    assert f"150 ticks: {150 - delay} acted, 0 idle" in str(report) and not robot.said


def test_a_queue_that_runs_dry_is_counted_and_said() -> None:
    robot = Robot(6, about={"horizon": 8})  # of a chunk's 8 actions 2 are left when it is there
    report = robot.run(ticks=120)
    require_sound(robot, 120)
    assert report.idle == 76 and report.waited == 6 and report.acted == 38
    assert robot.said[0] == "tick 8: no action is left; the last chunks took [6] of 8 ticks" and len(robot.said) > 3


def test_chunks_that_come_too_late_are_dropped() -> None:
    robot = Robot(9, about={"horizon": 8}, silence=60.0)
    report = robot.run(ticks=60)
    require_sound(robot, 60)
    assert report.acted == 0 and report.chunks == report.dropped == 6


@pytest.mark.parametrize("ensemble", [None, 0.0, 0.5])
def test_chunks_are_replaced_or_averaged(ensemble: float | None) -> None:
    robot = Robot(1, ensemble=ensemble, replan=2, limits=Limits({**ABOUT, "limits": None}))
    robot.server.chunk = lambda tick, horizon: np.full(
        horizon, float(tick), np.float32
    )  # the tick that it was asked at
    robot.run(ticks=9)
    newest = [None, 0, 0, 2, 2, 4, 4, 6, 6]
    if ensemble is None:
        assert robot.log[:-1] == newest
        return
    old, new = 1.0, np.exp(-ensemble)
    assert robot.log[:3] == newest[:3] and robot.log[3] == pytest.approx(2 * new / (old + new))
    third = (2 * new + 4 * new**2) / (old + new + new**2)
    assert robot.log[5] == pytest.approx(third)


def test_rotations_are_not_averaged() -> None:
    about = {"actions": ["x", "eef_angle.quat_xyzw[0]"]}
    robot = Robot(1, ensemble=0.0, replan=2, about=about, act=lambda action: robot.log.append(tuple(action)))
    robot.server.chunk = lambda tick, horizon: np.full(horizon, float(tick), np.float32)
    robot.run(ticks=5)
    assert robot.log[3] == (1.0, -2.0)  # the mean of 0 and 2; the newest


def test_a_lost_connection_is_opened_again() -> None:
    robot = Robot(2, broken=range(50, 70), silence=10.0)
    report = robot.run(ticks=150)
    require_sound(robot, 150)
    assert report.lost >= 1 and report.idle > 0 and None not in robot.log[75:150] and report.ended == "done"
    assert any("closed the connection" in line or "cannot connect" in line for line in robot.said)


def test_silence_stops() -> None:
    robot = Robot(2, silent=range(50, NEVER), silence=0.5)
    report = robot.run(ticks=500)
    require_sound(robot, report.ticks)
    assert report.ended == "silence: no new chunk for 0.5 s" and 70 <= report.ticks <= 76
    assert report.idle > 0


def test_silence_holds_until_there_is_a_chunk() -> None:
    robot = Robot(2, silent=range(50, 120), silence=0.1, on_silence="hold")
    report = robot.run(ticks=200)
    require_sound(robot, 200)
    assert robot.log[60:120] == [None] * 60 and None not in robot.log[125:200] and report.ended == "done"


def test_a_long_chunk_is_no_silence() -> None:
    robot = Robot(2, about={"horizon": 200}, replan=100, silence=0.5)  # a chunk every two seconds
    assert robot.run(ticks=400).ended == "done"


@pytest.mark.parametrize("at", [0, 1, 40])
def test_a_stop_is_honored_within_the_tick(at: int) -> None:
    robot = Robot(1)

    def look() -> dict[str, Any]:
        if robot.report.ticks >= at:
            robot.stop("emergency")
        return robot.look()

    robot._read = look
    report = robot.run(ticks=100)
    require_sound(robot, report.ticks)
    # it was asked for while the tick was at work: that tick has no action already
    assert report.ended == "emergency" and report.acted == max(0, report.ticks - 2) and report.ticks <= at + 8


def test_a_stop_from_another_thread_wakes_the_loop() -> None:
    client, acted = Server(0, {**ABOUT, "control_hz": 0.5}), list[float]()
    loop = ControlLoop(client, lambda: {"tick": 0, "state": [0.0]}, lambda action: acted.append(time.monotonic()))
    thread = threading.Thread(target=loop.run)
    thread.start()
    time.sleep(0.1)
    began = time.monotonic()
    loop.stop()
    thread.join(10)
    assert time.monotonic() - began < 1.5 and loop.report.ended == "stopped" and not acted  # its tick takes 2 s


def test_a_stop_before_the_start_is_not_lost() -> None:
    robot = Robot()
    robot.stop()
    assert robot.run().ticks == 0 and robot.log == [None]


def test_a_slow_tick_moves_the_others() -> None:
    robot = Robot(2)
    robot.slow = {16: 0.2}
    report = robot.run(ticks=60)
    require_sound(robot, 60)
    assert report.late == 1


def test_what_the_robot_raises_ends_it_after_a_hold() -> None:
    def broken(action: np.ndarray) -> None:
        raise OSError("motor 3 does not answer")

    robot = Robot(1, act=broken)
    with pytest.raises(OSError, match="motor 3"):
        robot.run(ticks=10)
    assert robot.log[-1] is None and robot.report.ended == "OSError: motor 3 does not answer"


LIMITED = {"limits": {"action": {"low": [0, None], "high": [20, None], "step": [1, None]}}}


def test_actions_are_clipped_to_the_limits() -> None:
    robot = Robot(1, about=LIMITED, act=lambda action: robot.log.append(float(action[0])))
    report = robot.run(ticks=40)
    assert max(robot.log[1:40]) == 22 and report.clipped == 17  # a tenth of the range beyond it
    assert len([line for line in robot.said if "clipped: action 'x' is 23" in line]) == 1


def test_actions_beyond_the_limits_stop() -> None:
    robot = Robot(1, about=LIMITED, limits=Limits({**ABOUT, **LIMITED}, "stop"))
    report = robot.run(ticks=40)
    require_sound(robot, 24)
    assert report.ended == "action 'x' is 23, its limits are 20.9 to 22"


def test_a_state_out_of_range_is_not_sent_and_said_once() -> None:
    limits = {"limits": {"state": {"low": [-1], "high": [1]}}}
    states = {tick: {"tick": tick, "state": [9.0 if tick > 20 else 0.0]} for tick in range(100)}
    robot = Robot(1, about=limits, read=lambda: states[robot.report.ticks], silence=0.3)
    report = robot.run(ticks=100)
    assert report.ended.startswith("silence") and max(seen.get("tick", 0) for seen in robot.server.seen) <= 20
    assert [line for line in robot.said if "state 'x' is 9" in line] and len(robot.said) <= 3


def test_a_policy_with_a_history_gets_every_frame() -> None:
    robot = Robot(1, about={"history": [0, -4], "proprio_history": [0]})
    robot.run(ticks=30)
    frames = robot.server.seen[1:]
    assert [seen["step"] for seen in frames] == list(range(30 - robot.report.frames_dropped))[: len(frames)]
    assert {seen["act"] for seen in frames if "d" not in seen} == {False}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hz": 0}, "a loop of 0"),
        ({"replan": 17}, "1 to 16 ticks"),
        ({"silence": 0}, "seconds above 0"),
        ({"on_silence": "wait"}, "hold or stop"),
        ({"about": {"execute": 4}}, "without --execute"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ClientError, match=words):
        Robot(**settings)
