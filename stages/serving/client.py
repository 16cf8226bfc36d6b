"""A small synchronous client of `dvla serve`, for a robot's control loop.

Needs websockets, msgpack and NumPy; no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import wire  # first: it says what to install where websockets is missing

# isort: split
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI
from websockets.sync.client import connect

from ...errors import UserError


class PolicyClient:
    """One connection to a policy server. `metadata` says which views, state and actions the policy has.

    Raises `UserError` when there is no server, the token is wrong, or the server answers with an error.
    """

    def __init__(
        self, host: str = "127.0.0.1", port: int = 8000, token: str | None = None, timeout: float | None = 60.0
    ) -> None:
        """`timeout`: seconds to wait for an answer; None: without limit."""
        self._where, self._timeout = f"{host}:{port}", timeout
        headers = {"Authorization": f"Api-Key {token}"} if token else None
        try:
            url = f"ws://[{host}]:{port}" if ":" in host else f"ws://{host}:{port}"
            connecting = connect(url, additional_headers=headers, compression=None, max_size=None, proxy=None)
            self._connection = connecting.__enter__()  # websockets is about to connect only here
        except (OSError, InvalidHandshake, InvalidURI) as error:
            raise UserError(f"cannot connect to the policy server at {self._where}: {error}") from None
        self.metadata: dict[str, Any] = self._receive()

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """Send an observation, receive actions.

        Args:
            observation: `{"images": {view: uint8 [H, W, 3]}, "state": [ds], "prompt": text}`; for a policy with a
                history also "step", the control step of the episode, where not every step is sent.

        Returns:
            "actions": the chunk [T, d] in the robot's units, or one action [d] if the server executes chunks; then also
            "chunk_left", the number of actions left before it needs new images.
        """
        data, most = wire.pack(dict(observation)), self.metadata.get("max_message")
        if most is not None and len(data) > most:
            raise UserError(
                f"an observation has {len(data)} bytes; the policy server at {self._where} takes {most}: send smaller "
                "images, or give it a larger --max-message-mib"
            )
        try:
            self._connection.send(data)
        except ConnectionClosed as error:
            raise self._closed(error) from None
        return self._receive()

    def observe(self, observation: Mapping[str, Any]) -> None:
        """Send the frame of a control step that no action is asked at, to a policy with a history (`metadata`)."""
        self.infer({**observation, "act": False})

    def reset(self) -> None:
        """Begin a new episode: the rest of the last chunk is dropped."""
        self.infer({"reset": True})

    def close(self) -> None:
        self._connection.close()

    def __repr__(self) -> str:
        views = ", ".join(self.metadata.get("views", ()))
        return f"PolicyClient({self._where}, robot {self.metadata.get('robot')}, views {views or 'none'})"

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _receive(self) -> dict[str, Any]:
        try:
            answer = self._connection.recv(self._timeout)
        except TimeoutError:
            self.close()  # a late answer would be taken for the next request's
            raise UserError(
                f"the policy server at {self._where} did not answer within {self._timeout:g} s; connect again"
            ) from None
        except ConnectionClosed as error:
            raise self._closed(error) from None
        if isinstance(answer, str):
            raise UserError(f"the policy server at {self._where} refused: {answer}")
        return wire.unpack(answer)

    def _closed(self, error: ConnectionClosed) -> UserError:
        return UserError(f"the policy server at {self._where} closed the connection: {error}")
