"""A synchronous client of `dvla serve`: one connection, one answer a message."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI
from websockets.sync.client import ClientConnection, connect

from . import wire
from .errors import ClientError
from .images import FORMS, PADDING_RULE, each_image, encode, fit


class PolicyClient:
    """One connection to a policy server. `metadata` says which views, state and actions the policy has.

    Raises `ClientError` when there is no server, the token is wrong, or the server answers with an error; from
    `dvla.PolicyClient` it is a `dvla.errors.UserError`, too.
    """

    error: type[ClientError] = ClientError

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 8000,
        token: str | None = None,
        timeout: float | None = 60.0,
        images: str = "native",
        quality: int = 90,
    ) -> None:
        """`timeout`: seconds to wait for an answer; None: without limit.

        `images`: how they travel: "native" as they are given; "raw" resized to what the encoder sees, where that is
        smaller; "jpeg" or "webp" of `quality` (1 to 100) also compressed. A server that does not know one of these
        gets the next simpler; `form` is what it got.
        """
        if images not in FORMS or not 1 <= quality <= 100:
            raise self.error(f"images '{images}' of quality {quality}: give {', '.join(FORMS)}, and 1 to 100")
        self._address, self._token, self._timeout = (host, port), token, timeout
        self._where, self._asked, self._quality = f"{host}:{port}", images, quality
        self._connection: ClientConnection | None = None
        self.connect()

    def connect(self) -> None:
        """Open the connection again, where it was lost or closed; the server begins a new episode."""
        self.close()
        headers = {"Authorization": f"Api-Key {self._token}"} if self._token else None
        host, port = self._address
        try:
            url = f"ws://[{host}]:{port}" if ":" in host else f"ws://{host}:{port}"
            connecting = connect(url, additional_headers=headers, compression=None, max_size=None, proxy=None)
            self._connection = connecting.__enter__()  # websockets is about to connect only here
        except (OSError, InvalidHandshake, InvalidURI) as error:
            raise self.error(f"cannot connect to the policy server at {self._where}: {error}") from None
        self.metadata: dict[str, Any] = self.receive()
        takes = self.metadata.get("images") or {}
        resized = takes.get("padding") == PADDING_RULE and self._asked != "native"
        self._side = takes.get("side") if resized else None
        self.form = "native" if not self._side else self._asked if self._asked in takes["encodings"] else "raw"

    @property
    def connected(self) -> bool:
        return self._connection is not None

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """Send an observation, receive actions.

        Args:
            observation: `{"images": {view: uint8 [H, W, 3]}, "state": [ds], "prompt": text}`, or with the names of
                LeRobot or openpi; for a policy with a history also "step", the control step of the episode, where not
                every step is sent.

        Returns:
            "actions": the chunk [T, d] in the robot's units, or one action [d] if the server executes chunks; then also
            "chunk_left", the number of actions left before it needs new images.
        """
        self.send(observation)
        return self.receive()

    def send(self, observation: Mapping[str, Any]) -> None:
        """Send an observation; its answer is the one that `receive` gives after those to earlier ones."""
        data, most = self.pack(observation), self.metadata.get("max_message")
        if most is not None and len(data) > most:
            raise self.error(
                f"an observation has {len(data)} bytes; the policy server at {self._where} takes {most}: send smaller "
                "images, or give it a larger --max-message-mib"
            )
        try:
            self._open().send(data)
        except ConnectionClosed as error:
            raise self._closed(error) from None

    def pack(self, observation: Mapping[str, Any]) -> bytes:
        """The message of an observation: its images as they travel."""
        try:
            return wire.pack(each_image(observation, self._image))
        except ClientError as error:
            raise self.error(str(error)) from None

    def observe(self, observation: Mapping[str, Any]) -> None:
        """Send the frame of a control step that no action is asked at, to a policy with a history (`metadata`)."""
        self.infer({**observation, "act": False})

    def reset(self) -> None:
        """Begin a new episode: the rest of the last chunk is dropped."""
        self.infer({"reset": True})

    def close(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            with contextlib.suppress(OSError):
                connection.close()

    def __repr__(self) -> str:
        views = ", ".join(self.metadata.get("views", ()))
        return f"PolicyClient({self._where}, robot {self.metadata.get('robot')}, views {views or 'none'})"

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def receive(self) -> dict[str, Any]:
        """The next answer."""
        try:
            answer = self._open().recv(self._timeout)
        except TimeoutError:
            self.close()  # a late answer would be taken for the next request's
            raise self.error(
                f"the policy server at {self._where} did not answer within {self._timeout:g} s; connect again"
            ) from None
        except ConnectionClosed as error:
            raise self._closed(error) from None
        if isinstance(answer, str):
            raise self.error(f"the policy server at {self._where} refused: {answer}")
        try:
            return dict(wire.unpack(answer))
        except (ClientError, TypeError, ValueError) as error:
            self.close()
            raise self.error(f"the policy server at {self._where} sent something else: {error}") from None

    def _image(self, image: np.ndarray) -> Any:
        return encode(fit(image, self._side) if self._side else image, self.form, self._quality)

    def _open(self) -> ClientConnection:
        if self._connection is None:
            raise self.error(f"the connection to the policy server at {self._where} is closed; connect again")
        return self._connection

    def _closed(self, error: ConnectionClosed) -> ClientError:
        self.close()
        return self.error(f"the policy server at {self._where} closed the connection: {error}")
