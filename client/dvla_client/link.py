"""The thread that talks to the server while the control loop runs: messages in, answers out, connecting again."""

from __future__ import annotations

import contextlib
import queue
import threading
from typing import Any, NamedTuple

from .client import PolicyClient
from .errors import ClientError

WAITING = 8  # frames without an asked action that may wait to be sent
PAUSE = 0.2  # seconds between two attempts to connect


class Answer(NamedTuple):
    """What became of a request."""

    asked: int  # tick
    actions: Any  # [T, d]; None if it failed
    line: str = ""  # why


class Link:
    """One request in flight at most; frames for a policy with a history go between."""

    def __init__(self, client: PolicyClient) -> None:
        self.client, self.answers = client, queue.SimpleQueue[Answer]()
        self.lost = 0  # times that the connection was
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="dvla-link", daemon=True)
        self._thread.start()

    def send(self, tick: int, observation: dict[str, Any]) -> bool:
        """Hand over the observation of a tick; False for a frame that is left out because too many wait."""
        if not observation.get("act", True) and self._messages.qsize() >= WAITING:
            return False
        self._messages.put((tick, observation))
        return True

    def close(self, seconds: float = 1.0) -> None:
        """End the thread. A connection that still waits for an answer is closed: nobody would take it."""
        self._ended.set()
        self._messages.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            threading.Thread(target=self.client.close, daemon=True).start()  # a closing handshake may take a while

    def _work(self) -> None:
        with contextlib.suppress(ClientError):  # the first request will tell
            if self.client.connected:
                self.client.reset()
        while (message := self._messages.get()) is not None and not self._ended.is_set():
            tick, observation = message
            asks = observation.get("act", True)
            try:
                if not self.client.connected:
                    self.client.connect()
                answer = Answer(tick, self.client.infer(observation).get("actions"))
            except ClientError as error:
                answer = Answer(tick, None, str(error))
            except Exception as error:  # whatever it is, the loop must learn that no answer comes
                self.client.close()
                answer = Answer(tick, None, f"the observation cannot be sent: {type(error).__name__}: {error}")
            if answer.line and not self.client.connected:
                self.lost += 1
                self._ended.wait(PAUSE)
            if asks:
                self.answers.put(answer)
