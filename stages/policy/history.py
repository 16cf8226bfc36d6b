"""The last control steps of an episode, as far back as a policy's history reaches: what an observation brings along.

`Past.push` takes in every control step, also those that no action is asked at, and gives back the observation with what
the policy sees of the steps before it. An image waits until a forward pass needs it; then its features take its place,
so each is encoded once at most. What was not pushed is masked, as before an episode's start.
"""

from __future__ import annotations

import dataclasses

from ...cache.actions.history import History
from .observation import Observation, Step, Window


class Past:
    """The steps of one episode that a history reaches."""

    def __init__(self, history: History) -> None:
        self._history, self._steps = history, dict[int, Step]()

    def push(self, observation: Observation) -> Observation:
        """The observation of the newest step, with its window; steps from its own on are forgotten."""
        return dataclasses.replace(observation, window=self.window(observation))

    def window(self, observation: Observation) -> Window:
        """What `push` gives it."""
        now, history = observation.step, self._history
        self._steps = {at: step for at, step in self._steps.items() if now - history.depth <= at < now}
        self._steps[now] = Step(observation.images, observation.state)
        frames, states = (tuple(self._steps.get(now + o) for o in x) for x in (history.frames, history.states))
        return Window(frames, states)

    @property
    def nbytes(self) -> int:
        """Of the images that wait."""
        return sum(image.nbytes for step in self._steps.values() for image in step.images.values())


def asked_later(history: History, step: int, chunk: int) -> bool:
    """Whether the image of the `step`-th control step after a forward pass, 1 to `chunk`, is seen by a later one, where
    each follows `chunk` steps after the one before."""
    return any((step - offset) % chunk == 0 for offset in history.frames)
