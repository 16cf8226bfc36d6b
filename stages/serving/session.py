"""One client's episode: which requests are answered from the current chunk, and which need a new one.

Letters: T action steps of a chunk, d native action width, n steps of it that are executed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...cache.actions.history import NO_HISTORY, History
from ...errors import UserError
from ..policy.history import Past
from ..policy.observation import Observation
from .fields import ObservationReader

WAITING = 256 << 20  # bytes of a connection's images that are kept for a policy with a history


class Session:
    """Answers a client's messages.

    With `execute` n, a message is answered with one action [d], and only every n-th needs a forward pass; with None,
    each is answered with the full chunk [T,d]. Noise is keyed by the episode's number on this connection and the step
    in it.

    A policy with a history sees earlier frames of the episode: those of messages for a control step, which is the
    message's `step`, or the one after the latest message's. A message with `act` false brings a frame alone.
    """

    def __init__(self, reader: ObservationReader, execute: int | None, history: History = NO_HISTORY) -> None:
        self._reader, self._execute, self._history = reader, execute, history
        self._episode = self._step = 0
        self._past = Past(history)
        self._left: list[np.ndarray] = []  # actions [d] of the chunk that are not executed yet, in order
        self._prompt: str | None = None  # the instruction of the chunk

    def ask(self, message: Any) -> Observation | dict[str, Any]:
        """The observation that needs a forward pass, or the answer if none is needed. A `UserError` changes nothing."""
        if not isinstance(message, dict):
            raise UserError(f"a message must be a map with images, state and prompt; got {type(message).__name__}")
        prompt = self._reader.prompt(message)
        reset, act = _flag(message, "reset", False), _flag(message, "act", True)
        if reset and len(message) == 1:
            self._begin()
            return {"reset": True}
        fresh = reset and self._step > 0
        step = self._stated(message, 0 if fresh else self._step)
        left = act and self._left and not reset and prompt in (None, self._prompt)
        if left and not (self._history and self._reader.brings_frame(message)):
            return self._next(step)
        prompt = self._prompt if left else None if act else self._prompt or ""
        observation = self._reader.observation(message, self._episode + fresh, step, prompt)
        if self._history:
            self._require_room(observation, fresh)
        if reset:
            self._begin()
        if self._history:
            observation = self._past.push(observation)
        if left:
            return self._next(step)
        if not act:
            self._step = step + 1
            return {"step": step}
        return observation

    def answer(self, observation: Observation, chunk: np.ndarray) -> dict[str, Any]:
        """The answer to `observation`, from the policy's chunk [T,d]."""
        if self._execute is None:
            self._step = observation.step + 1
            return {"actions": chunk}
        self._left, self._prompt = list(chunk[: self._execute]), observation.instruction
        return self._next(observation.step)

    def _next(self, step: int) -> dict[str, Any]:
        self._step = step + 1
        return {"actions": self._left.pop(0), "chunk_left": len(self._left)}

    def _begin(self) -> None:
        """Begin a new episode, unless the current one has no step yet."""
        if self._step:
            self._episode, self._step = self._episode + 1, 0
        self._left, self._past = [], Past(self._history)

    def _stated(self, message: dict[Any, Any], step: int) -> int:
        """The control step of a message: `step`, unless it says a later one. Only a history depends on it."""
        stated = message.get("step") if self._history else None
        if stated is None:
            return step
        if not isinstance(stated, (int, np.integer)) or isinstance(stated, bool):
            raise UserError(f"'step' must be a whole number, got {type(stated).__name__}")
        if not step - 1 <= stated < 2**31 or stated < 0:
            raise UserError(
                f"'step' is {stated}, the episode is at {step}; steps go forward, and a new episode begins with 'reset'"
            )
        return int(stated)

    def _require_room(self, observation: Observation, fresh: bool) -> None:
        """`UserError` where the images that wait would take more memory than a connection may."""
        waiting = sum(i.nbytes for i in observation.images.values()) + (0 if fresh else self._past.nbytes)
        if waiting > WAITING:
            raise UserError(
                f"the images of the last {self._history.depth} steps would take {waiting >> 20} MiB, and a connection "
                f"may keep {WAITING >> 20}; send smaller images, or only the frames of the policy's history"
            )


def _flag(message: dict[Any, Any], name: str, default: bool) -> bool:
    """A truth value of a message; `UserError` for anything else."""
    value = message.get(name, default)
    if not isinstance(value, (bool, np.bool_)):
        raise UserError(f"'{name}' must be true or false, got {type(value).__name__}")
    return bool(value)
