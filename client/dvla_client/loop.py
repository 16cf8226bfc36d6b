"""A robot's control loop: actions at a fixed rate while the policy server works on the next chunk.

Time is counted in ticks, the robot's control steps, by this machine's monotonic clock alone; the server's clock is
never looked at. At each tick the loop takes in the chunks that arrived, asks for another when it is due, and gives the
robot the action of this tick. An observation read at tick a asks for the actions of a, a + 1, …; those whose ticks pass
before the answer is there, d of them, are dropped from it.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .chunks import Chunks
from .client import PolicyClient
from .errors import ClientError
from .limits import Limits
from .link import Link

ON_SILENCE = ("hold", "stop")
STATES = ("state", "observation/state", "observation.state")  # where an observation may have its state
LOG = logging.getLogger("dvla_client")
RECENT = 8  # delays by which the next one is predicted


@dataclass
class Report:
    """What a run was like; every tick is one of acted, idle and waited."""

    ticks: int = 0
    acted: int = 0  # ticks at which the robot got an action
    idle: int = 0  # ticks at which the queue was dry
    waited: int = 0  # ticks before the first chunk
    late: int = 0  # ticks that began more than a period late; those after them were moved, not lost
    chunks: int = 0
    dropped: int = 0  # chunks that came too late for any of their actions
    refused: int = 0  # requests that failed, and observations that were not sent
    clipped: int = 0  # actions that were beyond the limits
    frames_dropped: int = 0  # frames of a history that were not sent
    lost: int = 0  # times that the connection was
    delays: list[int] = field(default_factory=list)  # of each chunk, in ticks
    ended: str = ""  # why

    def __str__(self) -> str:
        delay = f"{np.mean(self.delays):.1f} (largest {max(self.delays)})" if self.delays else "none"
        return (
            f"{self.ticks} ticks: {self.acted} acted, {self.idle} idle, {self.waited} before the first chunk, "
            f"{self.late} late; {self.chunks} chunks, {self.dropped} dropped, delay {delay} ticks; {self.refused} "
            f"refused, {self.clipped} clipped, {self.lost} connections lost; ended: {self.ended}"
        )


class ControlLoop:
    """Runs a robot with a policy server: `run` in one thread, `stop` from any other or a signal handler."""

    def __init__(
        self,
        client: PolicyClient,
        read: Callable[[], Mapping[str, Any]],
        act: Callable[[np.ndarray], None],
        *,
        hold: Callable[[], None] = lambda: None,
        hz: float | None = None,
        replan: int | None = None,
        ensemble: float | None = None,
        limits: Limits | None = None,
        silence: float = 1.0,
        on_silence: str = "stop",
        say: Callable[[str], None] = LOG.warning,
    ) -> None:
        """
        Args:
            read: the observation now, as for `PolicyClient.infer`; quick, as it is called within a tick.
            act: give the robot an action [d].
            hold: called at every tick without an action, and at the end, however it comes: a robot that is driven by
                velocities or displacements stands still here; one that is driven by positions does so by itself.
            hz: control rate; that of the policy's data by default.
            replan: ticks between two requests, half of a chunk by default; fewer when the queue runs low.
            ensemble: average the chunks for a tick, with weights exp(-ensemble·i), the oldest first; None: the newest.
            limits: `Limits(client.metadata)` by default: actions are clipped to them.
            silence: seconds without a new chunk after which the loop ends (`on_silence` "stop") or holds ("hold"),
                still trying, until there is one.
            say: takes lines about what went wrong.
        """
        about = client.metadata
        rate, horizon = about["control_hz"] if hz is None else hz, about["horizon"]
        replan = max(1, horizon // 2) if replan is None else replan
        if not 0 < rate <= 1e4 or not 1 <= replan <= horizon or not silence > 0 or on_silence not in ON_SILENCE:
            raise client.error(
                f"a loop of {rate} Hz, replan {replan}, silence {silence} s, on_silence '{on_silence}': give a rate, 1 "
                f"to {horizon} ticks, seconds above 0, and {' or '.join(ON_SILENCE)}"
            )
        if about.get("execute") is not None:
            raise client.error("this server answers with one action at a time; start it without --execute")
        self._client, self._read, self._act, self._hold, self._say = client, read, act, hold, say
        self._period, self._replan, self._horizon = 1 / rate, replan, horizon
        self._limits = Limits(about) if limits is None else limits
        averaged = np.array([not name.endswith("]") for name in about["actions"]])  # a rotation's are `….quat_xyzw[0]`
        self._chunks = Chunks(ensemble, averaged)
        offsets = [*(about.get("history") or ()), *(about.get("proprio_history") or ())]
        self._history = any(offsets)  # whether the policy sees other ticks than the one it is asked at
        self._silence, self._on_silence = silence, on_silence
        self._stopping, self._reason, self._said = threading.Event(), "", set[str]()
        self._before: np.ndarray | None = None  # the latest action [d]
        self._asked, self._flying = -horizon, False  # tick of the latest request, and whether it has no answer yet
        self._since: float | None = None  # when the chunk was due that is waited for
        self.report = Report()

    def stop(self, reason: str = "stopped") -> None:
        """Emergency stop: no action is given after the one that is being given now, and `run` returns."""
        self._reason = self._reason or reason
        self._stopping.set()

    def run(self, ticks: int | None = None) -> Report:
        """Drive the robot for so many ticks, or until `stop`; a new episode on the server. What `read`, `act` or `hold`
        raises ends it and is raised, after `hold`. A loop runs once."""
        self._link, due, report = Link(self._client), self._now(), self.report
        try:
            while not self._stopping.is_set() and (ticks is None or report.ticks < ticks):
                kind = self._tick(report.ticks)
                setattr(report, kind, getattr(report, kind) + 1)
                report.ticks, due, now = report.ticks + 1, due + self._period, self._now()
                if now > due + self._period:
                    report.late, due = report.late + 1, now
                self._sleep(due - now)
            report.ended = self._reason or "done"
        except BaseException as error:
            report.ended = f"{type(error).__name__}: {error}"
            raise
        finally:
            try:
                self._hold()
            finally:
                self._link.close()
                report.lost = self._link.lost
        return report

    def _tick(self, tick: int) -> str:
        """What became of a tick: acted, idle or waited."""
        self._take(tick)
        self._ask(tick)
        action, none = self._chunks.pop(tick), "idle" if self.report.chunks else "waited"
        silent = self._since is not None and self._now() - self._since > self._silence
        if silent and self._on_silence == "stop":
            self.stop(f"silence: no new chunk for {self._silence:g} s")
        if action is not None and not silent and not self._stopping.is_set():
            try:
                action, line = self._limits.apply(action, self._before)
            except ClientError as error:
                self.stop(str(error))
            else:
                if line:
                    self.report.clipped += 1
                    self._tell(tick, "clipped", f"clipped: {line}")
                self._act(action)
                self._before = action
                return "acted"
        if none == "idle" and not self._stopping.is_set():
            took = self.report.delays[-3:]
            self._tell(tick, "dry", f"no action is left; the last chunks took {took} of {self._horizon} ticks")
        self._hold()
        return none

    def _tell(self, tick: int, kind: str, line: str) -> None:
        """Say it, once of its kind until there is a new chunk; once at all that actions are clipped."""
        if kind not in self._said:
            self._said.add(kind)
            self._say(f"tick {tick}: {line}")

    def _take(self, tick: int) -> None:
        """Take in the answers that are there."""
        report = self.report
        while True:
            try:
                answer = self._link.answers.get_nowait()
            except queue.Empty:
                return
            self._flying = False
            if answer.actions is None:
                report.refused += 1
                self._tell(tick, "failed", answer.line or "the answer has no actions")
                self._asked = tick - self._replan  # ask again
                continue
            report.chunks += 1
            report.delays.append(tick - answer.asked)
            if self._chunks.merge(answer.asked, np.asarray(answer.actions), tick):
                self._since, self._said = None, self._said & {"clipped"}
            else:
                report.dropped += 1

    def _ask(self, tick: int) -> None:
        """Send this tick's observation, if a chunk is due, or if the policy sees earlier frames."""
        delay = max(self.report.delays[-RECENT:], default=1)
        due = tick - self._asked >= self._replan or self._chunks.left(tick) <= delay + 1
        asks = due and not self._flying
        self._since = self._now() if due and self._since is None else self._since
        if not asks and not self._history:
            return
        observation = dict(self._read())
        state = next((observation[name] for name in STATES if name in observation), None)
        try:
            if state is not None:
                self._limits.require_state(state)
        except ClientError as error:
            self.report.refused += 1
            return self._tell(tick, "state", str(error))
        extra: dict[str, Any] = {"d": delay} if asks else {"act": False}
        if self._history:
            extra["step"] = tick
        if not self._link.send(tick, {**observation, **extra}):
            self.report.frames_dropped += 1
        if asks:
            self._asked, self._flying = tick, True

    def _now(self) -> float:
        return time.monotonic()

    def _sleep(self, seconds: float) -> None:
        """Until the next tick, or until `stop`."""
        self._stopping.wait(max(seconds, 0))
