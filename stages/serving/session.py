"""One client's episode: which requests are answered from the current chunk, and which need a new one.

Letters: T action steps of a chunk, d native action width, n steps of it that are executed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import UserError
from ..policy.observation import Observation
from .fields import ObservationReader


class Session:
    """Answers a client's messages.

    With `execute` n, a message is answered with one action [d], and only every n-th needs a forward pass; with None,
    each is answered with the full chunk [T,d]. Noise is keyed by the episode's number on this connection and the step
    in it.
    """

    def __init__(self, reader: ObservationReader, execute: int | None) -> None:
        self._reader, self._execute = reader, execute
        self._episode = self._step = 0
        self._left: list[np.ndarray] = []  # actions [d] of the chunk that are not executed yet, in order
        self._prompt: str | None = None  # the instruction of the chunk

    def ask(self, message: Any) -> Observation | dict[str, Any]:
        """The observation that needs a forward pass, or the answer if none is needed. A `UserError` changes nothing."""
        if not isinstance(message, dict):
            raise UserError(f"a message must be a map with images, state and prompt; got {type(message).__name__}")
        prompt = self._reader.prompt(message)
        reset = message.get("reset", False)
        if not isinstance(reset, (bool, np.bool_)):
            raise UserError(f"'reset' must be true or false, got {type(reset).__name__}")
        if reset and len(message) == 1:
            self._begin()
            return {"reset": True}
        if self._left and not reset and prompt in (None, self._prompt):
            return self._next()
        fresh = bool(reset) and self._step > 0
        observation = self._reader.observation(message, self._episode + fresh, 0 if fresh else self._step)
        if reset:
            self._begin()
        return observation

    def answer(self, observation: Observation, chunk: np.ndarray) -> dict[str, Any]:
        """The answer to `observation`, from the policy's chunk [T,d]."""
        if self._execute is None:
            self._step += 1
            return {"actions": chunk}
        self._left, self._prompt = list(chunk[: self._execute]), observation.instruction
        return self._next()

    def _next(self) -> dict[str, Any]:
        self._step += 1
        return {"actions": self._left.pop(0), "chunk_left": len(self._left)}

    def _begin(self) -> None:
        """Begin a new episode, unless the current one has no step yet."""
        if self._step:
            self._episode, self._step = self._episode + 1, 0
        self._left = []
